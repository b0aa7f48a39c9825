# pyright: reportAttributeAccessIssue=false
# pyarrow makes its compute functions at import; no checker sees them.
"""Passes of selectors over the shards of a run: ReadColumns, then FoldBatches, DeriveBatches or ApplyLaw.

What is folded, derived or applied comes from ``labelled_corpus``; here are only the shards.
"""

from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.errors import InputError
from quadmix_plugin.labelled_corpus import Derive, Fold, Law
from quadmix_plugin.schema import COPIES, DOC_ID, TEXT
from quadmix_plugin.stages.score_columns import arrow
from quadmix_plugin.store import Step


@dataclass(frozen=True)
class Derived:
    """Columns that a pass has made, as shards ``<folder>/<shard>.parquet`` of a step."""

    step: Step
    folder: str
    columns: tuple[str, ...]


@dataclass
class ReadColumns(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Columns of the documents of a shard, rows as in the score table.

    Args:
        table: the step with ``<folder>/<shard>.parquet``, the score table or a selection from it.
        columns: what is wanted; ``text`` among them comes from the incoming batch, which then has ``doc_id`` and
            ``text`` of all documents of the shard.
        derived: where columns that the score table does not have are.
        folder: None for the name of the step.

    Raises:
        InputError: a column that is nowhere, or a document of the score table whose text is not there.
    """

    table: Step
    columns: list[str]
    derived: list[Derived] = field(default_factory=list)
    folder: str | None = None
    name: str = "read_columns"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """A shard's name, or its documents where the text is wanted."""
        return ["data"], [DOC_ID, TEXT] if TEXT in self.columns else ["shard"]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The columns asked for."""
        return ["data"], list(self.columns)

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The columns of one shard."""
        shard = str(task._metadata["shard"])
        source = {name: each for each in self.derived for name in each.columns}
        own = [name for name in self.columns if name not in source and name != TEXT]
        path = f"{self.folder or self.table.name}/{shard}.parquet"
        table = self.table.read_table(path, list(dict.fromkeys([DOC_ID, *own])))
        for each in dict.fromkeys(source[name] for name in self.columns if name in source):
            made = each.step.read_table(f"{each.folder}/{shard}.parquet", list(each.columns))
            for name in each.columns:
                table = table.append_column(name, made[name])
        if TEXT in self.columns:
            table = table.append_column(TEXT, _texts(table[DOC_ID], arrow(task), shard))
        facts = {"shard": shard, "rows_in": table.num_rows, "dropped": {}}
        return DocumentBatch(
            dataset_name=task.dataset_name,
            data=table.select(list(dict.fromkeys(self.columns))),
            _metadata=facts,
            _stage_perf=list(task._stage_perf),
        )


def _texts(doc_ids: pa.ChunkedArray, documents: pa.Table, shard: str) -> pa.ChunkedArray:
    where = pc.index_in(doc_ids, value_set=documents[DOC_ID].combine_chunks())
    if where.null_count:
        raise InputError(
            f"{shard}: {where.null_count} documents of the score table are not in the corpus; it changed since it was "
            f"labelled, so run again into another --out"
        )
    return documents[TEXT].take(where)


@dataclass
class FoldBatches(ProcessingStage[DocumentBatch, DocumentBatch]):
    """One state of so many batches as ``batch_size`` says."""

    fold: Fold
    name: str = "fold_batches"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """What the fold reads."""
        return ["data"], list(self.fold.columns)

    def outputs(self) -> tuple[list[str], list[str]]:
        """A state as a table."""
        return ["data"], []

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The state of one batch."""
        return self.process_batch([task])[0]

    def process_batch(self, tasks: list[DocumentBatch]) -> list[DocumentBatch]:
        """One state of all these batches."""
        states = [self.fold.of(arrow(task)) for task in tasks]
        first = tasks[0]
        return [
            DocumentBatch(
                dataset_name=first.dataset_name,
                data=states[0] if len(states) == 1 else self.fold.merge(states),
                _metadata=first._metadata,
                _stage_perf=list(first._stage_perf),
            )
        ]


@dataclass
class DeriveBatches(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Writes the columns that a pass makes as ``<folder>/<shard>.parquet``; passes on the shard's name.

    Raises:
        InputError: another number of rows than the batch has.
    """

    step: Step
    folder: str
    derive: Derive
    name: str = "derive_columns"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """What the pass reads."""
        return ["data"], list(self.derive.columns)

    def outputs(self) -> tuple[list[str], list[str]]:
        """The shard's name."""
        return ["data"], ["shard"]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Writes one shard."""
        table, shard = arrow(task), str(task._metadata["shard"])
        made = self.derive.of(table).select(list(self.derive.makes))
        if made.num_rows != table.num_rows:
            raise InputError(
                f"{shard}: {', '.join(self.derive.makes)} of {made.num_rows} documents, the shard has "
                f"{table.num_rows}; mend the selector"
            )
        self.step.write_table(f"{self.folder}/{shard}.parquet", made)
        return DocumentBatch(
            dataset_name=task.dataset_name,
            data=pa.table({"shard": [shard]}),
            _metadata=task._metadata,
            _stage_perf=list(task._stage_perf),
        )


@dataclass
class ApplyLaw(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds ``copies`` (int32) as a law gives them.

    Raises:
        InputError: the law gives another number of documents, fractions, or negative copies.
    """

    law: Law
    name: str = "apply_law"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """What the law reads."""
        return ["data"], list(self.law.columns)

    def outputs(self) -> tuple[list[str], list[str]]:
        """The copies."""
        return ["data"], [COPIES]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The copies of one batch."""
        table = arrow(task)
        copies = self.law.copies(table)
        if copies.shape != (table.num_rows,) or copies.dtype.kind not in "iu" or copies.min(initial=0) < 0:
            raise InputError(
                f"{type(self.law).__name__} returns {copies.dtype} {copies.shape} for {table.num_rows} documents; a "
                f"law gives each a whole number of copies, so mend the selector"
            )
        return DocumentBatch(
            dataset_name=task.dataset_name,
            data=table.append_column(COPIES, pa.array(copies, pa.int32())),
            _metadata=task._metadata,
            _stage_perf=list(task._stage_perf),
        )
