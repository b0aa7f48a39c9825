"""SelectDocuments: Eq. 1 to 3 and the draw in one stage that passes on only the documents with copies."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.hashing import hash64, tie_hash
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.schema import COPIES, MERGED_QUALITY, QUALITY_RANK, SAMPLING_VALUE
from quadmix_plugin.stages.labelling import with_column
from quadmix_plugin.stages.merge_rank import MergeRank
from quadmix_plugin.stages.score_columns import arrow

NOT_SELECTED = "not selected"


@dataclass
class SelectDocuments(MergeRank):
    """Keeps the documents with copies, each once, and adds why: what ``MergeRank`` and ``SigmoidSample`` add.

    Several times as fast as the two, since most documents need no rank. Rows left out are counted in the batch's
    metadata under "not selected". Arguments as ``MergeRank``; ``seed`` is that of the draw as well.
    """

    name: str = "select_documents"

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.theta, Parameters)  # noqa: S101 - set above
        self.rank_map = self._map.of_domains(self.theta.n_domains)

    def inputs(self) -> tuple[list[str], list[str]]:
        """The id, ``domain`` and the scores."""
        columns = super().inputs()[1]
        return ["data"], columns if self.id_field in columns else [self.id_field, *columns]

    def outputs(self) -> tuple[list[str], list[str]]:
        """Eq. 1, 2 and 3, and the copies."""
        return ["data"], [MERGED_QUALITY, QUALITY_RANK, SAMPLING_VALUE, COPIES]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The selected documents of one batch."""
        from quadmix_plugin.kernels import cpu

        assert isinstance(self.theta, Parameters)  # noqa: S101 - set in __post_init__
        table = arrow(task)
        merged, ids = self._merge(table)
        ranks, hashes = self._map, hash64(table[self.id_field], self.seed)
        ranks.require_known(ids)
        tie = tie_hash(hashes) if ranks.ties == "hash" else hashes[:0]
        rows, copies = np.empty(ids.size + 1, dtype=np.int64), np.empty(ids.size + 1, dtype=np.int32)
        rank, value = np.empty((2, ids.size + 1))
        found = cpu.pick(
            merged, ids, hashes, tie, ranks.arrays, ranks.cut(self.theta.omega), cpu.theta_of(self.theta),
            cpu.TIES[ranks.ties], rows, rank, value, copies,
        )  # fmt: skip
        return self._selected(task, rows[:found], merged[rows[:found]], rank[:found], value[:found], copies[:found])

    def _selected(self, task: DocumentBatch, rows: Any, *columns: Any) -> DocumentBatch:
        data: Any = task.data
        dropped = dict(task._metadata.get("dropped", {}))
        dropped[NOT_SELECTED] = dropped.get(NOT_SELECTED, 0) + len(data) - rows.size
        result = DocumentBatch(
            dataset_name=task.dataset_name,
            data=data.take(pa.array(rows)) if isinstance(data, pa.Table) else data.iloc[rows].reset_index(drop=True),
            _metadata={"rows_in": len(data), **task._metadata, "dropped": dropped},
            _stage_perf=list(task._stage_perf),
        )
        kinds = (pa.float64(), pa.float64(), pa.float64(), pa.int32())
        for name, column, kind in zip(self.outputs()[1], columns, kinds, strict=True):
            result = with_column(result, name, column, kind)
        return result
