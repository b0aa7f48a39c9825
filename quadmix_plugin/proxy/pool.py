"""The token pool: every document tokenised once; the data of a proxy is a number of copies of each.

``TokenPool.pieces`` turns copies into training pieces of one context length: selected documents in a seeded shuffle,
one domain after the other, are cut into pieces, and the pieces are shuffled so that every beginning of the list has
the domains in their overall shares. The pool knows neither θ nor models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.megatron import TokenFile

_DOMAIN_STREAM = 1 << 20  # the shuffle of pieces draws from other streams than that of documents


@dataclass(frozen=True, eq=False)
class Pieces:
    """Training data: ``tokens`` [k, context + 1] (inputs and, one on, targets) and ``domain_ids`` int64 [k].

    ``selected_tokens`` counts every copy, ``unique_tokens`` every selected document once, ``domain_tokens`` [M] the
    selected tokens by domain; ``epochs`` is tokens seen by selected tokens.
    """

    tokens: NDArray[Any]
    domain_ids: NDArray[np.int64]
    tokens_seen: int
    selected_tokens: int
    unique_tokens: int
    domain_tokens: NDArray[np.int64]

    @property
    def epochs(self) -> float:
        """How often each selected copy is seen."""
        return self.tokens_seen / self.selected_tokens


@dataclass(frozen=True, eq=False)
class TokenPool:
    """The documents of many token files, in the order of the files.

    ``lengths`` int64 [documents], end-of-document tokens included.
    """

    files: tuple[TokenFile, ...]
    lengths: NDArray[np.int64]

    @classmethod
    def open(cls, prefixes: Sequence[str | Path]) -> Self:
        """Opens ``<prefix>.bin`` and ``<prefix>.idx`` of each prefix.

        Raises:
            InputError: no prefixes, as ``TokenFile.open``, or files with ids of different types.
        """
        if not prefixes:
            raise InputError("pool: no token files; export the tokens first")
        files = tuple(TokenFile.open(prefix) for prefix in prefixes)
        if len({file.dtype for file in files}) > 1:
            raise InputError(f"pool: {files[0].bin_path} and others differ in the type of ids; use one tokenizer")
        return cls(files, np.concatenate([file.lengths for file in files]))

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return self.lengths.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids."""
        return self.files[0].dtype

    def document(self, i: int) -> NDArray[Any]:
        """A copy of the ids of document ``i``."""
        return self.gather(np.array([i]), np.zeros(1, dtype=np.int64), self.lengths[[i]])

    def gather(
        self, documents: NDArray[np.int64], begin: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[Any]:
        """The ids of spans, one after the other: ``lengths[i]`` ids of ``documents[i]`` from ``begin[i]`` on."""
        out = np.empty(int(lengths.sum()), dtype=self.dtype)
        places = np.cumsum(lengths) - lengths
        first = np.cumsum([0, *(file.n_documents for file in self.files)])
        owner = np.searchsorted(first, documents, side="right") - 1
        for f in np.unique(owner):
            of_file = owner == f
            source = self.files[f].offsets[documents[of_file] - first[f]] + begin[of_file]
            length = lengths[of_file]
            out[_spans(places[of_file], length)] = self.files[f].tokens[_spans(source, length)]
        return out

    def pieces(
        self,
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
        copies, domains = self._selection(copies, domain_ids)
        if n_tokens < 1:
            raise InputError(f"{n_tokens} training tokens; give a positive number")
        selected = int((self.lengths * copies).sum())
        per_epoch = (selected - 1) // context
        if per_epoch < batch_size:
            raise InputError(
                f"the selection has {selected} tokens, fewer than a batch of {batch_size} pieces of {context}; "
                f"select more (space.omega_max) or train on shorter pieces"
            )
        needed = -(-n_tokens // context)
        tokens = np.empty((needed, context + 1), dtype=self.dtype)
        piece_domains = np.empty(needed, dtype=np.int64)
        documents = np.repeat(np.arange(self.n_documents), copies)
        for epoch, start in enumerate(range(0, needed, per_epoch)):
            stop = min(start + per_epoch, needed)
            cut = self._epoch(documents, domains, context, stop - start, [seed, epoch])
            tokens[start:stop], piece_domains[start:stop] = cut
        by_domain = np.bincount(domains, weights=self.lengths * copies, minlength=1).astype(np.int64)
        unique = int(self.lengths[copies > 0].sum())
        return Pieces(tokens, piece_domains, needed * context, selected, unique, by_domain)

    def _selection(
        self, copies: NDArray[np.int32] | None, domain_ids: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The two arrays, None replaced, lengths and signs checked."""
        copies = np.ones(self.n_documents, dtype=np.int32) if copies is None else np.asarray(copies)
        domains = np.zeros(self.n_documents, dtype=np.int64) if domain_ids is None else np.asarray(domain_ids)
        if copies.shape != self.lengths.shape or domains.shape != self.lengths.shape:
            raise InputError(
                f"pool: {self.n_documents} documents, but {copies.size} numbers of copies and {domains.size} domains; "
                f"the pool and the labels are not of one run"
            )
        if copies.size and copies.min() < 0:
            raise InputError(
                f"copies: {int((copies < 0).sum())} documents have a negative number; give what draw_copies returns"
            )
        return copies, domains

    def _epoch(
        self, documents: NDArray[np.int64], domains: NDArray[np.int64], context: int, count: int, seed: list[int]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The first ``count`` pieces of one epoch over ``documents`` (copies already repeated)."""
        order = np.lexsort((np.random.default_rng(seed).random(documents.size), domains[documents]))
        stream = documents[order]
        ends = np.cumsum(self.lengths[stream])
        starts = np.arange((int(ends[-1]) - 1) // context, dtype=np.int64) * context
        domain_of_piece = domains[stream[np.searchsorted(ends, starts, side="right")]]
        chosen = stratified_order(domain_of_piece, [*seed, _DOMAIN_STREAM])[:count]
        first = np.searchsorted(ends, starts[chosen], side="right")
        last = np.searchsorted(ends, starts[chosen] + context, side="right")
        n_spans = last - first + 1
        piece = np.repeat(np.arange(count), n_spans)
        at = _spans(first, n_spans)
        document_start = ends[at] - self.lengths[stream[at]]
        begin = np.maximum(starts[chosen][piece], document_start)
        end = np.minimum(starts[chosen][piece] + context + 1, ends[at])
        tokens = self.gather(stream[at], begin - document_start, end - begin)
        return tokens.reshape(count, context + 1), domain_of_piece[chosen]


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


def _spans(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0] + 1, … (lengths[0] numbers), then those of starts[1], and so on."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)
