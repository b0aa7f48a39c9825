"""ScoreIndex: a score table laid out once, so that thousands of θ can be answered in milliseconds each.

Documents are sorted by domain and, within it, so that like scores lie together; a θ then reads only those leaves that
can reach its window, some tenth of the table. The selections equal ``count_copies``' to the last document.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from threading import local
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.arguments import (
    require_domain_ids,
    require_drawable,
    require_finite,
    require_one_length,
    require_tokens,
)
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import DocIds, hash64, stream_hash
from quadmix_plugin.kernels import cpu, leaves
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.rank_map import Ties, check_ties
from quadmix_plugin.rank_states import BINS, Totals
from quadmix_plugin.selections import Selection

Array = NDArray[np.float64]

_LUCK = 1 / 256  # the largest ε whose draws outside the window come from the index and not from a scan
_SAMPLE = 2048  # documents of a domain that the window's end is guessed from
_KEY_BITS = 32
_EXACT_BINS = 4096  # that exact ranks are sorted by
_BLOCK = 8  # θ at once: their outputs wait in memory together
_FIELDS = ("alpha", "lam", "omega", "eta", "epsilon")


class ScoreIndex:
    """The documents of one score table, ready for many θ. Make it with ``of``."""

    def __init__(self, documents: leaves.Leaves, n: int, totals: Totals, bins: int) -> None:
        self.n, self.totals, self.bins = n, totals, bins
        self._leaves = documents
        self._exact_bins = np.clip(totals.documents // 8, 1, _EXACT_BINS)
        self._work = local()

    @classmethod
    def of(
        cls,
        normalised: ArrayLike,
        domain_ids: ArrayLike,
        tokens: ArrayLike,
        doc_ids: DocIds,
        seed: int = 0,
        bins: int = BINS,
        n_domains: int | None = None,
    ) -> Self:
        """Lays the table out: ``normalised`` [n, N] is σ(q) in float32, smaller = better; the others [n].

        ``seed``: of the draws; ``bins``: of the method ``histogram``. Takes some 8 N + 30 bytes per document.

        Raises:
            InputError: as ``count_copies``; float64 scores, which would not give the same q̄ after conversion.
        """
        if bins < 1:
            raise InputError(f"bins={bins}; give at least 1")
        scores = np.asarray(normalised)
        if scores.dtype != np.float32:
            raise InputError(f"normalised: type {scores.dtype}; an index holds float32, so convert the scores first")
        ids, weights = require_domain_ids(domain_ids, n_domains), require_tokens(tokens)
        hashes = hash64(doc_ids, seed)
        require_one_length(domain_ids=ids, tokens=weights, doc_ids=hashes)
        if scores.ndim != 2 or scores.shape[0] != ids.size or not scores.shape[1]:
            raise InputError(f"normalised: shape {scores.shape}; give a row for each of the {ids.size} documents")
        require_finite(scores, "normalised")
        n_domains = n_domains or (int(ids.max()) + 1 if ids.size else 0)
        totals = Totals.of(ids, weights, n_domains)
        low, high = np.full((2, n_domains, scores.shape[1]), np.inf)
        high *= -1
        cpu.score_range(scores, ids, low, high)
        order = _order(scores, ids, low, high)
        return cls(_lay_out(scores, weights, hashes, order, low, high, totals), ids.size, totals, bins)

    def select(
        self,
        theta: Parameters,
        method: Literal["histogram", "exact"] = "histogram",
        ties: Ties = "paper",
        thin: float = 1.0,
        stream: int = 0,
    ) -> Selection:
        """The documents with copies under θ.

        ``thin``: factor on every expected number of copies; ``stream``: 0 shares the uniforms with every other θ, any
        other number is a stream of its own (see ``draw_copies``).

        Raises:
            InputError: θ of another number of domains or scorers, or an unknown ``method`` or ``ties``.
        """
        return self._select([theta], method, ties, thin, stream)[0]

    def select_many(
        self,
        thetas: Sequence[Parameters],
        method: Literal["histogram", "exact"] = "histogram",
        ties: Ties = "paper",
        thin: float = 1.0,
        streams: Sequence[int] | None = None,
        threads: int = 1,
    ) -> Iterator[Selection]:
        """The selections of many θ in order, a few in memory at once; ``streams``: of each θ, as in ``select``."""
        if streams is not None and len(streams) != len(thetas):
            raise InputError(f"streams: {len(streams)} for {len(thetas)} parameters; give one for each, or none")
        if streams is None:
            jobs = [(thetas[i : i + _BLOCK], 0) for i in range(0, len(thetas), _BLOCK)]
        else:
            jobs = [([theta], stream) for theta, stream in zip(thetas, streams, strict=True)]
        with ThreadPoolExecutor(max(1, threads)) as pool:
            waiting: deque[Future[list[Selection]]] = deque()
            for block, stream in jobs:
                waiting.append(pool.submit(self._select, block, method, ties, thin, stream))
                if len(waiting) > threads:
                    yield from waiting.popleft().result()
            for future in waiting:
                yield from future.result()

    def _select(
        self, thetas: Sequence[Parameters], method: str, ties: Ties, thin: float, stream: int
    ) -> list[Selection]:
        for theta in thetas:
            self._check(theta.n_domains, theta.n_scorers, method, ties)
            require_drawable(theta, thin)
        work = self._workspace()
        n_domains, exact = self.totals.tokens.size, method == "exact"
        fields = [np.stack([getattr(theta, name) for theta in thetas]) for name in _FIELDS]
        stacked = cpu.Theta._make([*fields, thin])
        ends = np.zeros((n_domains, len(thetas)), dtype=np.int64)
        work.rows, work.copies = leaves.select(
            self._leaves, stream_hash(self._leaves.hashes, stream), stacked,
            self._exact_bins if exact else np.full(n_domains, self.bins), exact, cpu.TIES[ties], stream == 0,
            work.work, work.rows, work.copies, ends,
        )  # fmt: skip
        flat = np.concatenate([[0], ends.ravel()])
        pieces = [slice(a, b) for a, b in pairwise(flat.tolist())]
        each = [pieces[t :: len(thetas)] for t in range(len(thetas))]
        return [Selection(*(np.concatenate([a[p] for p in parts]) for a in (work.rows, work.copies))) for parts in each]

    def expect(
        self, alpha: Array, lam: Array, omega: Array, eta: Array, epsilon: Array, ties: Ties = "paper"
    ) -> tuple[Array, Array, Array]:
        """Expected selections of T parameters, ranks exact: Σ tokens·S [T, M], Σ tokens·S·σ(q) [T, N] and Σ S [T].

        Shapes: ``alpha`` [T, M, N], the others [T, M].
        """
        self._check(alpha.shape[1], alpha.shape[2], "exact", ties)
        tokens, copies = np.zeros(omega.shape), np.zeros(omega.shape[0])
        scores = np.zeros((omega.shape[0], alpha.shape[2]))
        leaves.expect(
            self._leaves, alpha, lam, omega, eta, self._exact_bins, cpu.TIES[ties], self._workspace().work, tokens,
            scores, copies,
        )  # fmt: skip
        tokens += epsilon * self.totals.tokens
        scores += epsilon @ self.token_scores
        copies += epsilon @ self.totals.documents
        return tokens, scores, copies

    @property
    def token_scores(self) -> Array:
        """Σ tokens·σ(q) of every domain [M, N]."""
        if not hasattr(self, "_token_scores"):
            documents = self._leaves
            sums = np.zeros(documents.low.shape)
            leaves.token_scores(documents.scores, documents.tokens, documents.start, sums)
            self._token_scores = sums
        return self._token_scores

    def _check(self, n_domains: int, n_scorers: int, method: str, ties: str) -> None:
        if (n_domains, n_scorers) != self._leaves.low.shape:
            raise InputError(
                f"the parameters have {n_domains} domains and {n_scorers} scorers, the index "
                f"{self._leaves.low.shape[0]} and {self._leaves.low.shape[1]}; use parameters of this corpus"
            )
        if method not in ("histogram", "exact"):
            raise InputError(f"method={method!r}; choose 'histogram' or 'exact'")
        check_ties(ties)

    def _workspace(self) -> Any:
        """This thread's memory, made on its first use."""
        if not hasattr(self._work, "work"):
            largest = int(np.diff(self._leaves.start).max(initial=0)) * leaves.LEAF + 1
            n_bins = max(self.bins, _EXACT_BINS)
            of_bins = [np.empty(n_bins + 1, dtype=kind) for kind in ("q", "q", leaves.DRAW, "B", cpu.CELL, "q")]
            self._work.work = leaves.Work._make([*of_bins, *(np.empty(largest, dtype=kind) for kind in "iiidqQd")])
            self._work.rows = np.empty(0, dtype=self._leaves.rows.dtype)
            self._work.copies = np.empty(0, dtype=np.int32)
        return self._work


def _order(scores: NDArray[np.float32], ids: NDArray[np.int64], low: Array, high: Array) -> NDArray[np.integer]:
    """Rows sorted by domain and Morton key, which interleaves the bits of the scores' places in the domain's range."""
    n_domains, n_scorers = low.shape
    domain_bits = max(1, int(np.ceil(np.log2(max(n_domains, 2)))))
    bits = min(10, max(1, (_KEY_BITS - domain_bits) // n_scorers))
    keys = np.empty(ids.size, dtype=np.uint64)
    leaves.morton_keys(scores, ids, low, high, bits, min(n_scorers, (_KEY_BITS - domain_bits) // bits), keys)
    if ids.size < 1 << 32 and domain_bits < _KEY_BITS:
        keys <<= np.uint64(32)
        keys |= np.arange(ids.size, dtype=np.uint64)
        keys.sort()  # with the row in the lower half; several times as fast as argsort
        return keys.astype(np.uint32)
    return np.argsort(keys, kind="stable")


def _lay_out(
    scores: NDArray[np.float32],
    tokens: NDArray[np.int64],
    hashes: NDArray[np.uint64],
    order: NDArray[np.integer],
    low: Array,
    high: Array,
    totals: Totals,
) -> leaves.Leaves:
    n_leaves = -(-totals.documents // leaves.LEAF)
    start = np.concatenate([[0], np.cumsum(n_leaves)])
    first = np.concatenate([[0], np.cumsum(totals.documents)])
    shift = start[:-1] * leaves.LEAF - first[:-1]
    place = np.arange(order.size) + np.repeat(shift, totals.documents)
    size = int(start[-1]) * leaves.LEAF
    narrow = np.int32 if tokens.max(initial=0) <= np.iinfo(np.int32).max else np.int64
    weights, draws = np.zeros(size, dtype=narrow), np.full(size, ~np.uint64(0))
    rows = np.full(size, -1, dtype=np.int32 if order.size <= np.iinfo(np.int32).max else np.int64)
    weights[place], draws[place], rows[place] = tokens[order], hashes[order], order
    columns = np.full((int(start[-1]), scores.shape[1], leaves.LEAF), np.inf, dtype=np.float32)
    columns[place // leaves.LEAF, :, place % leaves.LEAF] = scores[order]
    sizes = np.where(totals.documents >= 4 * _SAMPLE, _SAMPLE, 0)
    chosen = [np.linspace(a, b - 1, k).astype(np.int64) for a, b, k in zip(first, first[1:], sizes, strict=False) if k]
    sample = order[np.concatenate(chosen)] if chosen else np.empty(0, dtype=np.int64)
    luck = np.uint64(_LUCK * 2**53)
    lucky = np.flatnonzero((draws >> np.uint64(11) < luck) & (rows >= 0))
    domain = np.searchsorted(start * leaves.LEAF, lucky, side="right") - 1
    return leaves.Leaves(
        scores=columns,
        best=columns.min(axis=2),
        tokens=weights,
        hashes=draws,
        rows=rows,
        start=start,
        low=np.where(np.isfinite(low), low, 0.0),
        high=np.where(np.isfinite(high), high, 0.0),
        total=totals.tokens,
        mean=totals.mean,
        sample=np.ascontiguousarray(scores[sample].T),
        sample_tokens=tokens[sample],
        first_sample=np.concatenate([[0], np.cumsum(sizes)]),
        lucky=lucky[np.lexsort((draws[lucky], domain))],
        first_lucky=np.searchsorted(domain, np.arange(totals.tokens.size + 1)),
        luck=luck,
    )
