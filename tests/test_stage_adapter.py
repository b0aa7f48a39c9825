"""The adapter's timer: Curator's statistics, without its number per row."""

import pyarrow as pa
from nemo_curator.tasks import DocumentBatch
from small_run import MODELS

from quadmix_plugin.stage_adapter import StageAdapter
from quadmix_plugin.stages.count_tokens import CountTokens

ROWS = 20_000


def test_statistics_count_rows_and_time_and_keep_nothing_per_row() -> None:
    stage = CountTokens(tokenizer=str(MODELS / "tokenizer"))
    adapter = StageAdapter(stage)
    adapter.setup()
    task = DocumentBatch(dataset_name="x", data=pa.table({"text": ["a word"] * ROWS}))
    (out,) = adapter.process_batch([task])
    (performance,) = out._stage_perf
    assert performance.stage_name == stage.name
    assert performance.num_items_processed == ROWS
    assert performance.process_time > 0
    assert adapter._timer._durations_s == []
