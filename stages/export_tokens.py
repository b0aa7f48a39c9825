"""ExportTokens: documents as Megatron token files, one pair per shard; and the selection gathered out of such pairs.

A document is tokenised once, for the proxies' pool. What a selection trains on is copied out of the pool, so that
text is not read again.
"""

import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch
from numpy.typing import NDArray

from quadmix_plugin import models
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import DocIds, hash64, uniform
from quadmix_plugin.megatron import write_documents
from quadmix_plugin.proxy.pool import TokenPool
from quadmix_plugin.schema import DOC_ID, TEXT
from quadmix_plugin.stages.labelling import read_texts
from quadmix_plugin.store import Entry, Step

logger = logging.getLogger(__name__)


@dataclass
class ExportTokens(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Writes the documents of each shard as ``<folder>/<shard>.bin`` and ``.idx``, in their order.

    Documents without tokens are left out, as they are from the labels. A shard that is already there is not written
    again. Passes on the shard's name and counts.

    Args:
        step: where the files are entered.
        tokenizer: a folder with a ``tokenizer.json``, or a hub id with ``revision``.
        revision: the 40 hex digits of a commit on the hub.
        eod: the token that ends every document.
        folder: folder of the files in the run directory.
        selection: ids of the documents to write; None writes all.
        kept: a step with ``<kept>/<shard>.parquet``, whose ids alone are written.
        below, seed: write only documents whose u (``hashing.uniform``) is below this.
        text_field: column with the text.

    Raises:
        InputError: no such tokenizer, or no token ``eod`` in it; a batch without a shard name.
    """

    step: Step
    tokenizer: str
    revision: str | None = None
    eod: str = "<|endoftext|>"
    folder: str = "proxies/pool"
    selection: pa.Array | None = None
    kept: Step | None = None
    below: float = 1.0
    seed: int = 0
    text_field: str = TEXT
    name: str = "export_tokens"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        models.check_source(self.tokenizer, self.revision)
        self._loaded: Any = None
        self._chosen = frozenset() if self.selection is None else frozenset(self.selection.to_pylist())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def inputs(self) -> tuple[list[str], list[str]]:
        """The text, and the id where a selection is made."""
        chooses = self.selection is not None or self.kept is not None or self.below < 1
        return ["data"], [self.text_field, *([DOC_ID] if chooses else [])]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The shard's name and counts."""
        return ["data"], ["shard", "rows", "tokens"]

    def setup_on_node(self, node_info: Any = None, worker_metadata: Any = None) -> None:
        """Fetches the tokenizer once per machine."""
        models.model_folder(self.tokenizer, self.revision)

    def setup(self, worker_metadata: Any = None) -> None:
        """Loads the tokenizer."""
        if self._loaded is None:
            self._loaded = models.load_tokenizer(self.tokenizer, self.revision)
            end_of_document(self._loaded, self.eod, self.tokenizer)

    def teardown(self) -> None:
        """Lets go of the tokenizer."""
        self._loaded = None

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Writes one shard."""
        shard = task._metadata.get("shard")
        if not isinstance(shard, str):
            raise InputError("export_tokens: a batch without a shard name; put PrepareDocuments before this stage")
        prefix = f"{self.folder}/{shard}"
        entry = pair_entry(self.step, prefix) or self._write(task, prefix)
        counts = {"shard": [shard], "rows": [entry["rows"]], "tokens": [entry["tokens"]]}
        return DocumentBatch(
            dataset_name=task.dataset_name,
            data=pa.table(counts),
            _metadata=task._metadata,
            _stage_perf=list(task._stage_perf),
        )

    def _write(self, task: DocumentBatch, prefix: str) -> dict[str, Any]:
        self.setup()
        texts = self._texts(task)
        encodings = self._loaded.encode_batch_fast(texts, add_special_tokens=False)
        documents = [ids for encoding in encodings if (ids := encoding.ids)]
        eod = end_of_document(self._loaded, self.eod, self.tokenizer)
        facts = {"rows": len(documents), "tokens": sum(map(len, documents)) + len(documents)}
        with self.step.writing(f"{prefix}.bin", f"{prefix}.idx", **facts) as (bin_path, idx_path):
            write_documents(documents, bin_path, idx_path, vocabulary_of(self._loaded), eod)
        return facts

    def _texts(self, task: DocumentBatch) -> list[str]:
        """The texts of the documents that are to be written."""
        texts = [models.encodable(text) for text in read_texts(task, self.text_field)]
        if DOC_ID not in self.inputs()[1]:
            return texts
        column = task.to_pyarrow()[DOC_ID]
        ids, chosen = column.to_pylist(), uniform(column, self.seed) < self.below
        if self.selection is not None:
            chosen &= np.fromiter((doc_id in self._chosen for doc_id in ids), bool, len(ids))
        if self.kept is not None:
            rows = self.kept.read_table(f"{self.kept.name}/{task._metadata['shard']}.parquet", [DOC_ID])
            kept = set(rows[DOC_ID].to_pylist())
            chosen &= np.fromiter((doc_id in kept for doc_id in ids), bool, len(ids))
        return [text for text, take in zip(texts, chosen, strict=True) if take]


def end_of_document(tokenizer: Any, eod: str, place: str) -> int:
    """The id of the end-of-document token.

    Raises:
        InputError: the tokenizer has no such token.
    """
    found = tokenizer.token_to_id(eod)
    if found is None:
        raise InputError(f"{place}: no token {eod!r}; set tokenizer.eod in the recipe to the one that ends a document")
    return found


def vocabulary_of(tokenizer: Any) -> int:
    """One more than the largest id: added tokens may lie beyond the size that a tokenizer states."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def pair_entry(step: Step, prefix: str) -> dict[str, Any] | None:
    """The facts of a pair that is wholly there, else None."""
    entries: list[Entry | None] = [step.entry(f"{prefix}{suffix}") for suffix in (".bin", ".idx")]
    return entries[0].facts if entries[0] is not None and entries[1] is not None else None


def write_selection(
    parts: Sequence[str | Path],
    doc_ids: DocIds,
    copies: NDArray[np.int32],
    seed: int,
    step: Step,
    prefix: str,
    vocabulary: int,
) -> dict[str, Any]:
    """Gathers documents × copies out of token files into ``<prefix>.bin`` and ``.idx``; returns the facts.

    ``parts`` are prefixes of pairs; ``doc_ids`` and ``copies`` [n] are in the order of their documents. The order is
    a shuffle by the hash of (id, number of the copy, seed), with copies of one document apart wherever that is
    possible.

    Raises:
        InputError: nothing selected, or lengths that differ.
    """
    if (facts := pair_entry(step, prefix)) is not None:
        return facts
    pool = TokenPool.open(parts)
    if len(doc_ids) != pool.n_documents or copies.shape != pool.lengths.shape:
        raise InputError(
            f"{prefix}: {len(doc_ids)} ids and {copies.size} numbers of copies for {pool.n_documents} documents; the "
            f"token files and the selection are not of one run"
        )
    order = shuffled_copies(doc_ids, copies, seed)
    if not order.size:
        raise InputError(f"{prefix}: no document is selected; raise the budget")
    facts = {
        "rows": int(order.size),
        "tokens": int(pool.lengths[order].sum()),
        "unique_rows": int((copies > 0).sum()),
        "unique_tokens": int(pool.lengths[copies > 0].sum()),
    }
    with step.writing(f"{prefix}.bin", f"{prefix}.idx", **facts) as (bin_path, idx_path):
        write_documents(_documents(pool, order), bin_path, idx_path, vocabulary)
    return facts


def shuffled_copies(doc_ids: DocIds, copies: NDArray[np.int32], seed: int) -> NDArray[np.int64]:
    """Positions of documents [Σ copies] in the order in which they are written.

    Sorted by the hash of (id, copy number, seed). Equal neighbours are then swapped with the next place where both
    fit; where a document has more than half of all copies, neighbours remain.
    """
    ids = _as_arrow(doc_ids)
    keys, documents = [], []
    for copy in range(int(copies.max(initial=0))):
        here = np.flatnonzero(copies > copy)
        stream = int(hash64(np.array([copy], dtype=np.int64), seed)[0])
        keys.append(hash64(ids.take(pa.array(here)), stream))
        documents.append(here)
    if not documents:
        return np.empty(0, dtype=np.int64)
    order = np.concatenate(documents)[np.argsort(np.concatenate(keys), kind="stable")]
    for i in np.flatnonzero(order[1:] == order[:-1]) + 1:
        if order[i] == order[i - 1] and not _swap(order, int(i)):
            logger.info("copies of few documents: placed in turn in place of a shuffle")
            return _in_turn(order)
    return order


def _swap(order: NDArray[np.int64], i: int) -> bool:
    """Swaps place ``i`` with the next place (going round) where neither then equals a neighbour."""
    n = order.size
    for step in range(1, n):
        j = (i + step) % n
        order[i], order[j] = order[j], order[i]
        if not any(0 < k < n and order[k] == order[k - 1] for k in (i, i + 1, j, j + 1)):
            return True
        order[i], order[j] = order[j], order[i]
    return False


def _in_turn(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same documents, the one with most copies left first, never twice in a row while another is left."""
    documents, first, counts = np.unique(order, return_index=True, return_counts=True)
    left = [(-int(c), int(f), int(d)) for d, f, c in zip(documents, first, counts, strict=True)]
    heapq.heapify(left)
    placed: list[int] = []
    held: tuple[int, int, int] | None = None
    while left or held:
        if not left:
            assert held is not None  # noqa: S101 - the loop's condition
            placed += [held[2]] * -held[0]
            break
        count, rank, document = heapq.heappop(left)
        placed.append(document)
        if held:
            heapq.heappush(left, held)
        held = (count + 1, rank, document) if count < -1 else None
    return np.array(placed, dtype=np.int64)


def _documents(pool: TokenPool, order: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
    """The ids of each document of ``order``, gathered some thousands at a time."""
    for start in range(0, order.size, 4096):
        chunk = order[start : start + 4096]
        lengths = pool.lengths[chunk]
        flat = pool.gather(chunk, np.zeros(chunk.size, dtype=np.int64), lengths)
        yield from np.split(flat, np.cumsum(lengths)[:-1])


def _as_arrow(doc_ids: DocIds) -> pa.Array | pa.ChunkedArray:
    return doc_ids if isinstance(doc_ids, pa.Array | pa.ChunkedArray) else pa.array(doc_ids)
