"""One shard of training data: documents × copies in a shuffled order as a pair, and what says where each came from.

Knows documents as ids in arrays; where those come from (a pool, a tokenizer) and how shards become a run's training
data is the business of stages and pipelines.
"""

import heapq
import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.hashing import DocIds, hash64
from quadmix_plugin.megatron import write_documents
from quadmix_plugin.parquet import write_parquet
from quadmix_plugin.schema import DOC_ID, TOKENS
from quadmix_plugin.store import Step

logger = logging.getLogger(__name__)

COPY = "copy"
"""Column of the table beside a pair: the number of the copy, from 0 on in the order of the file."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents as ids: document i is ``tokens[offsets[i] : offsets[i] + lengths[i]]``, its end included."""

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def __getitem__(self, i: int) -> NDArray[Any]:
        return self.tokens[self.offsets[i] : self.offsets[i] + self.lengths[i]]


def shard_facts(step: Step, prefix: str) -> dict[str, int] | None:
    """What ``write_shard`` returned for a shard that is wholly there, else None."""
    entry = step.entry(f"{prefix}.json")
    if entry is None or (entry.facts["rows"] and any(step.entry(path) is None for path in _beside(prefix))):
        return None
    return {name: int(entry.facts[name]) for name in ("rows", "tokens", "unique_rows", "unique_tokens")}


def write_shard(
    step: Step,
    prefix: str,
    doc_ids: pa.Array | pa.ChunkedArray,
    copies: NDArray[np.int32],
    documents: Documents,
    vocabulary: int,
    seed: int,
) -> dict[str, int]:
    """Writes ``<prefix>.bin``, ``.idx``, ``.documents.parquet`` and ``.json``; returns the facts in the last of them.

    ``doc_ids`` and ``copies`` [n] belong to ``documents``. Without copies ``<prefix>.json`` alone is written, which
    says that the shard is done. The order is that of ``shuffled_copies``.

    Raises:
        InputError: ids outside the vocabulary, or a document without any; names the document.
    """
    order = shuffled_copies(doc_ids, copies, seed)
    taken = copies > 0
    facts = {
        "rows": int(order.size),
        "tokens": int(documents.lengths[order].sum()),
        "unique_rows": int(taken.sum()),
        "unique_tokens": int(documents.lengths[taken].sum()),
    }
    if not order.size:
        step.write_json(f"{prefix}.json", facts, **facts)
        return facts

    def named(i: int) -> str:
        return f"{prefix}: doc_id {doc_ids[int(order[i])].as_py()!r}"

    columns = doc_ids.take(pa.array(order)), numbers_of_copies(order).astype(np.int32), documents.lengths[order]
    table = pa.table(dict(zip((DOC_ID, COPY, TOKENS), columns, strict=True)))
    with step.writing(*_beside(prefix), f"{prefix}.json", **facts) as (bin_path, idx_path, table_path, facts_path):
        write_documents((documents[i] for i in order.tolist()), bin_path, idx_path, vocabulary, named=named)
        write_parquet(table, table_path)
        facts_path.write_text(json.dumps(facts), encoding="utf-8")
    return facts


def _beside(prefix: str) -> tuple[str, str, str]:
    """The pair and the table of its documents."""
    return f"{prefix}.bin", f"{prefix}.idx", f"{prefix}.documents.parquet"


def numbers_of_copies(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often the document of each place has come before it."""
    places = np.argsort(order, kind="stable")
    _, first, counts = np.unique(order[places], return_index=True, return_counts=True)
    numbers = np.empty(order.size, dtype=np.int64)
    numbers[places] = np.arange(order.size) - np.repeat(first, counts)
    return numbers


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


def _as_arrow(doc_ids: DocIds) -> pa.Array | pa.ChunkedArray:
    return doc_ids if isinstance(doc_ids, pa.Array | pa.ChunkedArray) else pa.array(doc_ids)
