# pyright: reportAttributeAccessIssue=false
# pyarrow makes its compute functions at import; no checker sees them.
"""WriteShards and ReadShards: between Curator batches and the Parquet artifacts of a run directory."""

from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch, Task

from quadmix_plugin.schema import COPIES, TOKENS
from quadmix_plugin.stages.count_tokens import ESTIMATE_ERROR
from quadmix_plugin.store import Step


def shard_tasks(shards: list[str]) -> list[Task]:
    """One initial task per shard name, for pipelines that begin with ``ReadShards``."""
    return [
        DocumentBatch(dataset_name=name, data=pa.table({"shard": [name]}), _metadata={"shard": name}) for name in shards
    ]


@dataclass
class ReadShards(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Reads ``<folder>/<shard>.parquet`` of a step for every task that names a shard.

    Raises:
        QuadmixError: the shard is not in the step's manifest, or is damaged.
    """

    step: Step
    folder: str
    columns: list[str] | None = None
    name: str = "read_shards"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """A shard name."""
        return ["data"], ["shard"]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The columns asked for."""
        return ["data"], list(self.columns or [])

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The shard's rows."""
        table = self.step.read_table(f"{self.folder}/{task._metadata['shard']}.parquet", self.columns)
        facts = {"shard": task._metadata["shard"], "rows_in": table.num_rows, "dropped": {}}
        return DocumentBatch(
            dataset_name=task.dataset_name, data=table, _metadata=facts, _stage_perf=list(task._stage_perf)
        )


@dataclass
class WriteShards(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Commits each batch as ``<folder>/<shard>.parquet`` with its row counts, and passes on only those counts.

    Rows with no tokens, or with no copies, are left out and counted by that reason.
    """

    step: Step
    folder: str
    columns: list[str]
    name: str = "write_shards"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """The columns that are written."""
        return ["data"], list(self.columns)

    def outputs(self) -> tuple[list[str], list[str]]:
        """The shard's name and counts."""
        return ["data"], ["shard", "rows_in", "rows_kept"]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Writes one shard."""
        table = task.to_pyarrow().select(self.columns)
        dropped = dict(task._metadata["dropped"])
        for column, reason in ((TOKENS, "no tokens"), (COPIES, "not selected")):
            if column in table.column_names:
                keep = pc.greater(table[column], 0)
                if left := table.num_rows - (pc.sum(keep).as_py() or 0):
                    dropped[reason] = left
                    table = table.filter(keep)
        shard = task._metadata["shard"]
        facts = {"rows_in": task._metadata["rows_in"], "rows_kept": table.num_rows, "dropped": dropped}
        if ESTIMATE_ERROR in task._metadata:
            facts[ESTIMATE_ERROR] = task._metadata[ESTIMATE_ERROR]
        self.step.write_table(f"{self.folder}/{shard}.parquet", table.replace_schema_metadata(None), **facts)
        counts = pa.table({"shard": [shard], "rows_in": [facts["rows_in"]], "rows_kept": [table.num_rows]})
        return DocumentBatch(
            dataset_name=task.dataset_name,
            data=counts,
            _metadata=task._metadata,
            _stage_perf=list(task._stage_perf),
        )
