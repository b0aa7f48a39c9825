# pyright: reportAttributeAccessIssue=false
# pyarrow makes its compute functions at import; no checker sees them.
"""GatherTokens: a selection's documents × copies out of token files that hold every document, shard by shard."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.errors import InputError
from quadmix_plugin.megatron import TokenFile
from quadmix_plugin.schema import COPIES, DOC_ID, TOKENS
from quadmix_plugin.stages.export_tokens import pair_entry, readable_pair, require_counts, shard_counts, shard_name
from quadmix_plugin.stages.score_columns import arrow, read_numbers
from quadmix_plugin.store import Step
from quadmix_plugin.training_data import Documents, shard_facts, write_shard


@dataclass
class GatherTokens(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Writes what ``ExportTokens`` with copies writes, from a pool of token files in place of text.

    Takes the selected documents of a shard: ``doc_id``, ``copies`` and ``tokens``.

    Args:
        step: where the files are entered.
        pool: the step with the pool's pairs, ``<pool_folder>/<shard>``.
        table: the step with ``<table>/<shard>.parquet``, whose documents are those of the pool's pair, in its order.
        vocabulary: number of ids of the tokenizer.
        tokenizer: its name, for errors.
        folder, stem: of the files, as in ``ExportTokens``.
        seed: of the order of copies.
        counted: whether ``tokens`` is exact, so that the pool must agree with it.

    Raises:
        InputError: a pair that is missing, truncated or of other documents; ids outside the vocabulary; other counts.
    """

    step: Step
    pool: Step
    table: Step
    vocabulary: int
    tokenizer: str
    folder: str = "tokens"
    stem: str = "train-"
    pool_folder: str = "proxies/pool"
    seed: int = 0
    counted: bool = True
    name: str = "gather_tokens"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """The selected documents."""
        return ["data"], [DOC_ID, COPIES, TOKENS]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The shard's name and counts."""
        return ["data"], ["shard", "rows", "tokens"]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Writes one shard."""
        shard = shard_name(task, self.name)
        prefix = f"{self.folder}/{self.stem}{shard}"
        return shard_counts(task, shard_facts(self.step, prefix) or self._write(arrow(task), shard, prefix))

    def _write(self, selected: pa.Table, shard: str, prefix: str) -> dict[str, int]:
        file, path = self._open(shard), self.pool.path(f"{self.pool_folder}/{shard}.bin")
        doc_ids = self.table.read_table(f"{self.table.name}/{shard}.parquet", [DOC_ID])[DOC_ID].combine_chunks()
        if len(doc_ids) != file.n_documents:
            raise InputError(
                f"{path}: {file.n_documents} documents, the labels have {len(doc_ids)}; the two are not of one run, so "
                f"run `quadmix proxies` again into another --out"
            )
        where = pc.index_in(selected[DOC_ID], value_set=doc_ids)
        if where.null_count:
            raise InputError(
                f"{prefix}: {where.null_count} selected documents are not in the labels; the selection is not of this "
                f"run, so select again"
            )
        rows = where.to_numpy().astype(np.int64)
        documents = Documents(np.asarray(file.tokens), file.offsets[rows], file.lengths[rows])
        ids = selected[DOC_ID]
        if self.counted:
            counted = read_numbers(selected, TOKENS, "integers")
            require_counts(str(path), ids, counted, documents.lengths, self.tokenizer)
        copies = read_numbers(selected, COPIES, "integers").astype(np.int32)
        return write_shard(self.step, prefix, ids, copies, documents, self.vocabulary, self.seed)

    def _open(self, shard: str) -> TokenFile:
        prefix = f"{self.pool_folder}/{shard}"
        if pair_entry(self.pool, prefix) is None:
            file = TokenFile.open(str(self.pool.path(prefix)))  # which says what is missing or truncated
            raise InputError(f"{file.bin_path}: not of this recipe, or changed since; run `quadmix proxies` first")
        return TokenFile.open(readable_pair(self.pool, prefix))
