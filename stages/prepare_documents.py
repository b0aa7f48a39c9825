# pyright: reportAttributeAccessIssue=false
# pyarrow makes its compute functions at import; no checker sees them.
"""PrepareDocuments: the first stage after a Curator reader; one batch per file becomes shards of fixed size.

It gives the two columns their names, checks every row, drops what cannot be used by a stated reason, and names
each shard after its input alone, so that a retry or a resumed run writes the same files.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.errors import InputError
from quadmix_plugin.schema import DOC_ID, TEXT


@dataclass
class PrepareDocuments(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Cuts a file's documents into shards with the columns ``doc_id``, ``text`` and those of ``keep``.

    Args:
        id_field: column with the document's id (integers or strings); None makes ids from file name and row.
        text_field: column with the text.
        keep: further columns that later stages read.
        documents_per_shard: rows per shard, the unit of parallel work and of resuming.
        invalid_rows: what to do with a null text: ``error``, or ``drop`` and count it. Texts of white space only are
            always dropped and counted.
        done: names of shards that are already written; they are not emitted again.

    Raises:
        InputError: a missing column, or null texts under ``error``; names the file.
    """

    id_field: str | None = DOC_ID
    text_field: str = TEXT
    keep: list[str] = field(default_factory=list)
    documents_per_shard: int = 2000
    invalid_rows: Literal["error", "drop"] = "error"
    done: frozenset[str] = frozenset()
    name: str = "prepare_documents"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """The id and text columns, and ``keep``."""
        wanted = [self.text_field, *self.keep] + ([self.id_field] if self.id_field else [])
        return ["data"], wanted

    def outputs(self) -> tuple[list[str], list[str]]:
        """``doc_id``, ``text`` and ``keep``."""
        return ["data"], [DOC_ID, TEXT, *self.keep]

    def process(self, task: DocumentBatch) -> list[DocumentBatch]:
        """One batch of a file in, its shards out."""
        source = task._metadata.get("source_name") or str((task._metadata.get("source_files") or ["documents"])[0])
        table = self._rename(task.to_pyarrow(), source)
        shards = []
        for i, start in enumerate(range(0, table.num_rows, self.documents_per_shard)):
            name = f"{shard_stem(source)}-{i:05d}"
            if name in self.done:
                continue
            kept, dropped = self._drop(table.slice(start, self.documents_per_shard), source, start)
            facts = {"shard": name, "rows_in": kept.num_rows + sum(dropped.values()), "dropped": dropped}
            shards.append(
                DocumentBatch(
                    dataset_name=task.dataset_name,
                    data=kept,
                    _metadata={**task._metadata, **facts},
                    _stage_perf=list(task._stage_perf),
                )
            )
        return shards

    def _rename(self, table: pa.Table, source: str) -> pa.Table:
        columns = {}
        for name in self.inputs()[1]:
            if name not in table.column_names:
                found = ", ".join(n for n in table.column_names if not n.startswith("__"))
                raise InputError(f"{source}: no column {name!r}; found {found}; name it under corpus in the recipe")
            columns[name] = table[name]
        ids = columns.pop(self.id_field) if self.id_field else None
        if ids is None:
            stem = shard_stem(source)
            ids = pa.array([f"{stem}:{row}" for row in range(table.num_rows)], pa.string())
        is_integer = pa.types.is_integer(ids.type)
        if not is_integer and not pa.types.is_string(ids.type) and not pa.types.is_large_string(ids.type):
            raise InputError(f"{source}: column {self.id_field!r} is {ids.type}; ids must be integers or strings")
        ids_type = pa.int64() if is_integer else pa.string()
        text = columns.pop(self.text_field).cast(pa.string())
        try:
            text.validate(full=True)
        except pa.ArrowInvalid as error:  # Parquet without page checksums may be damaged and read
            what = f"column {self.text_field!r} is damaged ({error})"
            raise InputError(f"{source}: {what}; write the file again") from error
        return pa.table({DOC_ID: ids.cast(ids_type), TEXT: text, **columns})

    def _drop(self, shard: pa.Table, source: str, start: int) -> tuple[pa.Table, dict[str, int]]:
        dropped = {}
        null = pc.is_null(shard[TEXT])
        if (n := pc.sum(null).as_py() or 0) > 0:
            if self.invalid_rows == "error":
                row = start + pc.index(null, True).as_py()
                raise InputError(
                    f"{source}: row {row} has no text ({n} such rows in this shard); remove them or set "
                    f"corpus.invalid_rows: drop"
                )
            dropped["null text"] = n
            shard = shard.filter(pc.invert(null))
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(shard[TEXT])), 0)
        if (n := pc.sum(blank).as_py() or 0) > 0:
            dropped["empty text"] = n
            shard = shard.filter(pc.invert(blank))
        return shard, dropped


def shard_stem(source: str) -> str:
    """The part of a shard's name that stands for its file: readable, safe in paths, distinct for distinct files."""
    stem = PurePosixPath(source.replace("\\", "/")).name.split(".")[0]
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:64] or "file"
    return f"{safe}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
