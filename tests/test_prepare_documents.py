"""PrepareDocuments and the shard stages: names from the input alone, every row kept or dropped by a named reason."""

import pandas as pd
import pyarrow as pa
import pytest
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.stages import PrepareDocuments, ReadShards, WriteShards
from quadmix_plugin.stages.shards import shard_tasks
from quadmix_plugin.store import RunDirectory


def _batch(data: pa.Table | pd.DataFrame, name: str = "folder/a.parquet") -> DocumentBatch:
    return DocumentBatch(dataset_name="x", data=data, _metadata={"source_name": name})


def _texts(n: int) -> pa.Table:
    return pa.table({"key": [f"k{i}" for i in range(n)], "body": [f"text {i}" for i in range(n)], "extra": range(n)})


def _prepare(**options) -> PrepareDocuments:
    return PrepareDocuments(**{"id_field": "key", "text_field": "body", "documents_per_shard": 4, **options})


@pytest.mark.parametrize("as_pandas", [False, True])
def test_file_is_cut_in_order_and_renamed(as_pandas: bool) -> None:
    data = _texts(10).to_pandas() if as_pandas else _texts(10)
    shards = _prepare(keep=["extra"]).process(_batch(data))
    assert [shard.num_items for shard in shards] == [4, 4, 2]
    rows = [row for shard in shards for row in shard.to_pyarrow().to_pylist()]
    assert rows == [{"doc_id": f"k{i}", "text": f"text {i}", "extra": i} for i in range(10)]


def test_shard_names_depend_on_file_and_position_only() -> None:
    names = [[s._metadata["shard"] for s in _prepare().process(_batch(_texts(10)))] for _ in range(2)]
    assert names[0] == names[1]
    other = [s._metadata["shard"] for s in _prepare().process(_batch(_texts(10), "other/a.parquet"))]
    assert not set(names[0]) & set(other)
    hostile = _prepare().process(_batch(_texts(1), "../../etc/<script>'x y'.parquet"))[0]._metadata["shard"]
    assert hostile.replace("-", "").replace("_", "").isalnum()


def test_shards_that_are_done_are_not_emitted_again() -> None:
    names = [s._metadata["shard"] for s in _prepare().process(_batch(_texts(10)))]
    left = _prepare(done=frozenset(names[:2])).process(_batch(_texts(10)))
    assert [shard._metadata["shard"] for shard in left] == names[2:]


def test_blank_and_null_texts_are_counted_by_reason() -> None:
    data = pa.table({"key": ["a", "b", "c", "d"], "body": ["x", " \n\t", None, ""]})
    with pytest.raises(InputError, match=r"a.parquet: row 2 has no text"):
        _prepare().process(_batch(data))
    shard = _prepare(invalid_rows="drop").process(_batch(data))[0]
    assert shard._metadata["dropped"] == {"null text": 1, "empty text": 2}
    assert shard._metadata["rows_in"] == 4
    assert shard.to_pyarrow()["doc_id"].to_pylist() == ["a"]


def test_ids_are_made_from_file_and_row_when_there_are_none() -> None:
    shards = _prepare(id_field=None).process(_batch(_texts(6)))
    ids = [i for shard in shards for i in shard.to_pyarrow()["doc_id"].to_pylist()]
    assert len(set(ids)) == 6
    again = _prepare(id_field=None, documents_per_shard=100).process(_batch(_texts(6)))[0]
    assert again.to_pyarrow()["doc_id"].to_pylist() == ids


def test_integer_ids_stay_integers_and_other_types_are_refused() -> None:
    table = pa.table({"key": pa.array([3, 4], pa.int32()), "body": ["x", "y"]})
    assert _prepare().process(_batch(table))[0].to_pyarrow().schema.field("doc_id").type == pa.int64()
    with pytest.raises(InputError, match="column 'key' is double; ids must be integers or strings"):
        _prepare().process(_batch(pa.table({"key": [1.5], "body": ["x"]})))
    with pytest.raises(InputError, match="no column 'key'; found id, body"):
        _prepare().process(_batch(pa.table({"id": [1], "body": ["x"]})))


def test_written_shard_reads_back_and_unselected_rows_are_counted(run_dir: RunDirectory) -> None:
    step = run_dir.step("select", "k" * 64)
    columns = ["doc_id", "tokens", "copies"]
    data = pa.table({"doc_id": ["a", "b", "c"], "tokens": [3, 0, 4], "copies": [2, 1, 0], "text": ["x", "y", "z"]})
    batch = DocumentBatch(dataset_name="x", data=data, _metadata={"shard": "s", "rows_in": 4, "dropped": {"other": 1}})
    out = WriteShards(step=step, folder="selection", columns=columns).process(batch)
    assert out.to_pyarrow().to_pylist() == [{"shard": "s", "rows_in": 4, "rows_kept": 1}]
    entry = step.entry("selection/s.parquet")
    assert entry is not None
    assert entry.facts["dropped"] == {"other": 1, "no tokens": 1, "not selected": 1}
    back = ReadShards(step=step, folder="selection").process(shard_tasks(["s"])[0])
    assert back.to_pyarrow().to_pylist() == [{"doc_id": "a", "tokens": 3, "copies": 2}]
    with pytest.raises(QuadmixError, match="not there, or not from this recipe"):
        ReadShards(step=step, folder="selection").process(shard_tasks(["absent"])[0])
