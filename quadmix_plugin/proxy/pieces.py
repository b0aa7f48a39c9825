"""Training pieces of one context length, cut from copies of the pool's documents.

Selected documents in a seeded shuffle, one domain after the other, are cut into pieces, and the pieces are shuffled so
that every beginning of the list has the domains in their overall shares (measured: whole documents in random order
rank proxies worse at the same tokens). Only the order of documents and pieces is held; ids are gathered when asked.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.proxy.pool import TokenPool, spans

_DOMAIN_STREAM = 1 << 20  # the shuffle of pieces draws from other streams than that of documents


@dataclass(frozen=True, eq=False)
class Epoch:
    """One shuffle of the selected copies: a stream of documents, cut into pieces.

    ``stream`` int64 [copies]: documents in order; ``ends`` int64 [copies]: where each ends in the stream, in tokens;
    ``begins`` int64 [pieces]: where each piece begins, in the order of training; ``domain_ids`` int64 [pieces]: the
    domain of each piece's first token.
    """

    stream: NDArray[np.int64]
    ends: NDArray[np.int64]
    begins: NDArray[np.int64]
    domain_ids: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Training data: ``len()`` pieces, ``pieces[index]`` their ids [k, context + 1] (inputs and, one on, targets).

    ``index`` is a slice or an integer array. ``selected_tokens`` counts every copy, ``unique_tokens`` every selected
    document once, ``domain_tokens`` [M] the selected tokens by domain. Make it with ``cut_pieces``.
    """

    pool: TokenPool
    context: int
    count: int
    per_epoch: int
    documents: NDArray[np.int64]
    domains: NDArray[np.int64]
    seed: int
    selected_tokens: int
    unique_tokens: int
    domain_tokens: NDArray[np.int64]
    _held: dict[int, Epoch] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.count

    @property
    def tokens_seen(self) -> int:
        """Targets in all pieces."""
        return self.count * self.context

    @property
    def epochs(self) -> float:
        """How often each selected copy is seen."""
        return self.tokens_seen / self.selected_tokens

    @property
    def domain_ids(self) -> NDArray[np.int64]:
        """The domain of the first token of every piece, int64 [k]."""
        epochs = range(-(-self.count // self.per_epoch))
        return np.concatenate([self.epoch(e).domain_ids for e in epochs])[: self.count]

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[Any]:
        if isinstance(index, slice):
            index = np.arange(*index.indices(self.count))
        out = np.empty((index.size, self.context + 1), dtype=self.pool.dtype)
        of_epoch = index // self.per_epoch
        for number in np.unique(of_epoch):
            here = of_epoch == number
            out[here] = self._gather(self.epoch(int(number)), index[here] % self.per_epoch)
        return out

    def epoch(self, number: int) -> Epoch:
        """Epoch ``number``, from 0; the last one asked for is kept."""
        if number not in self._held:
            made = self._shuffle(number)
            self._held.clear()
            self._held[number] = made
        return self._held[number]

    def _shuffle(self, number: int) -> Epoch:
        random = np.random.default_rng([self.seed, number]).random(self.documents.size)
        stream = self.documents[np.lexsort((random, self.domains[self.documents]))]
        ends = np.cumsum(self.pool.lengths[stream])
        begins = np.arange(self.per_epoch, dtype=np.int64) * self.context
        domain_ids = self.domains[stream[np.searchsorted(ends, begins, side="right")]]
        order = stratified_order(domain_ids, [self.seed, number, _DOMAIN_STREAM])
        return Epoch(stream, ends, begins[order], domain_ids[order])

    def _gather(self, epoch: Epoch, index: NDArray[np.int64]) -> NDArray[Any]:
        begins, ends, stream = epoch.begins[index], epoch.ends, epoch.stream
        first = np.searchsorted(ends, begins, side="right")
        n_spans = np.searchsorted(ends, begins + self.context, side="right") - first + 1
        piece = np.repeat(np.arange(index.size), n_spans)
        at = spans(first, n_spans)
        document_start = ends[at] - self.pool.lengths[stream[at]]
        begin = np.maximum(begins[piece], document_start)
        end = np.minimum(begins[piece] + self.context + 1, ends[at])
        return self.pool.gather(stream[at], begin - document_start, end - begin).reshape(-1, self.context + 1)


def cut_pieces(
    pool: TokenPool,
    copies: NDArray[np.int32] | None,
    domain_ids: NDArray[np.int64] | None,
    context: int,
    n_tokens: int,
    seed: int,
    batch_size: int = 1,
) -> Pieces:
    """The pieces for ``n_tokens`` training tokens, rounded up to whole pieces.

    ``copies`` [documents], None for one of each; ``domain_ids`` [documents], None for a single domain. A selection
    with fewer tokens is repeated in whole epochs, each shuffled anew.

    Raises:
        InputError: arrays of another length, a negative number of copies, or a selection that is empty or smaller
            than one batch.
    """
    chosen = np.ones(pool.n_documents, dtype=np.int32) if copies is None else np.asarray(copies)
    domains = np.zeros(pool.n_documents, dtype=np.int64) if domain_ids is None else np.asarray(domain_ids)
    _require(pool, chosen, domains, n_tokens)
    selected = int((pool.lengths * chosen).sum())
    per_epoch = (selected - 1) // context
    if per_epoch < batch_size:
        raise InputError(
            f"the selection has {selected} tokens, fewer than a batch of {batch_size} pieces of {context}; "
            f"select more (space.omega_max) or train on shorter pieces"
        )
    return Pieces(
        pool=pool,
        context=context,
        count=-(-n_tokens // context),
        per_epoch=per_epoch,
        documents=np.repeat(np.arange(pool.n_documents), chosen),
        domains=domains,
        seed=seed,
        selected_tokens=selected,
        unique_tokens=int(pool.lengths[chosen > 0].sum()),
        domain_tokens=np.bincount(domains, weights=pool.lengths * chosen, minlength=1).astype(np.int64),
    )


def _require(pool: TokenPool, copies: NDArray[Any], domains: NDArray[Any], n_tokens: int) -> None:
    if n_tokens < 1:
        raise InputError(f"{n_tokens} training tokens; give a positive number")
    if copies.shape != pool.lengths.shape or domains.shape != pool.lengths.shape:
        raise InputError(
            f"pool: {pool.n_documents} documents, but {copies.size} numbers of copies and {domains.size} domains; "
            f"the pool and the labels are not of one run"
        )
    if copies.size and copies.min() < 0:
        raise InputError(
            f"copies: {int((copies < 0).sum())} documents have a negative number; give what draw_copies returns"
        )


def stratified_order(domain_ids: NDArray[np.int64], seed: int | list[int]) -> NDArray[np.int64]:
    """A shuffle [k] of items in which every beginning has the domains in nearly their overall shares.

    The j-th of the k_m items of domain m, in random order, goes to (j + u)/k_m of the list, with one random u in
    [0, 1) for each domain.
    """
    rng = np.random.default_rng(seed)
    shuffled = np.lexsort((rng.random(domain_ids.size), domain_ids))
    _, place, counts = np.unique(domain_ids[shuffled], return_index=True, return_counts=True)
    j = np.arange(domain_ids.size) - np.repeat(place, counts)
    position = (j + np.repeat(rng.random(counts.size), counts)) / np.repeat(counts, counts)
    return shuffled[np.argsort(position, kind="stable")]
