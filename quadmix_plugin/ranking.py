"""Eq. 1 and Eq. 2 of QuaDMix: merged quality and its token-weighted rank within the domain.

Pure functions over arrays. A ``RankMap`` is Eq. 2 frozen: built from states that merge in any order, it gives
each document its rank wherever and however the corpus is cut into pieces.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters

Array = NDArray[np.float64]
Ties = Literal["paper", "mid"]


def merge_quality(normalised: ArrayLike, domain_ids: ArrayLike, theta: Parameters) -> Array:
    """Eq. 1: q̄ = Σ_n α_{n,m}·σ_n(q_n); smaller is better.

    Shapes: ``normalised`` [n, N], σ(q), finite, smaller = better; ``domain_ids`` [n] in [0, M). Returns float64 [n].
    The sum runs over scorers in order, in float64, so that a document's q̄ never depends on its neighbours.

    Raises:
        InputError: a shape that does not fit θ, a domain id outside θ, or a value that is not finite.
    """
    scores = np.asarray(normalised)
    ids = require_domain_ids(domain_ids, theta.n_domains)
    if scores.ndim != 2 or scores.shape != (ids.size, theta.n_scorers):
        raise InputError(
            f"normalised: shape {scores.shape}; give one row for each of the {ids.size} documents and one column "
            f"for each of the {theta.n_scorers} scorers of the parameters"
        )
    merged = np.zeros(ids.size)
    for n in range(theta.n_scorers):
        merged += theta.alpha[ids, n] * scores[:, n].astype(np.float64, copy=False)
    require_finite(merged, "normalised")
    return merged


def quality_rank(merged: ArrayLike, domain_ids: ArrayLike, tokens: ArrayLike, ties: Ties = "paper") -> Array:
    """Eq. 2, exact: r̄ = tokens of the domain with q̄_x <= q̄, divided by all tokens of the domain.

    Shapes: all [n]; ``tokens`` positive integers. Returns float64 [n] in (0, 1]; equal q̄ get equal r̄. ``ties``:
    ``paper`` counts the whole tie group, ``mid`` counts half of it.

    Raises:
        InputError: shapes that differ, q̄ not finite, or a token count that is not a positive integer.
    """
    return RankMap.fit(merged, domain_ids, tokens).rank(merged, domain_ids, ties)


@dataclass(frozen=True, eq=False)
class RankMap:
    """Eq. 2 frozen: for every domain, its distinct q̄ in ascending order and the tokens at each.

    ``domain_ids`` [k] int64, ``merged`` [k] float64 (sorted within the domain), ``tokens`` [k] int64. Two maps of
    disjoint documents merge exactly, since token sums are integers.
    """

    domain_ids: NDArray[np.int64]
    merged: Array
    tokens: NDArray[np.int64]

    @classmethod
    def fit(cls, merged: ArrayLike, domain_ids: ArrayLike, tokens: ArrayLike) -> Self:
        """The map of these documents; shapes and errors as in ``quality_rank``."""
        values = require_finite(np.asarray(merged, dtype=np.float64), "merged")
        weights = _tokens(tokens)
        ids = require_domain_ids(domain_ids)
        if not values.shape == ids.shape == weights.shape or values.ndim != 1:
            raise InputError(
                f"merged {values.shape}, domain_ids {ids.shape} and tokens {weights.shape} must be one-dimensional "
                f"and of one length"
            )
        return cls._group(ids, values + 0.0, weights)  # + 0.0 makes -0.0 and 0.0 one value

    @classmethod
    def _group(cls, ids: NDArray[np.int64], values: Array, weights: NDArray[np.int64]) -> Self:
        order = np.lexsort((values, ids))
        ids, values, weights = ids[order], values[order], weights[order]
        starts = np.ones(ids.size, dtype=bool)
        starts[1:] = (ids[1:] != ids[:-1]) | (values[1:] != values[:-1])
        first = np.flatnonzero(starts)
        sums = np.add.reduceat(weights, first) if first.size else weights
        return cls(ids[first], values[first], sums)

    @classmethod
    def merge(cls, maps: Iterable[Self]) -> Self:
        """One map of the documents of several; the order of ``maps`` does not matter."""
        parts = list(maps)
        if not parts:
            return cls(np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))
        return cls._group(
            np.concatenate([part.domain_ids for part in parts]),
            np.concatenate([part.merged for part in parts]),
            np.concatenate([part.tokens for part in parts]),
        )

    def rank(self, merged: ArrayLike, domain_ids: ArrayLike, ties: Ties = "paper") -> Array:
        """r̄ of documents: those of this map, or later ones, which get the rank their q̄ would have had here.

        Raises:
            InputError: shapes that differ, q̄ not finite, a domain of which the map has no document, or an unknown
                ``ties``.
        """
        if ties not in ("paper", "mid"):
            raise InputError(f"ties={ties!r}; choose 'paper' or 'mid'")
        values = require_finite(np.asarray(merged, dtype=np.float64), "merged")
        ids = require_domain_ids(domain_ids)
        if values.shape != ids.shape or values.ndim != 1:
            raise InputError(
                f"merged {values.shape} and domain_ids {ids.shape} must be one-dimensional and of one length"
            )
        ranks = np.empty(values.size)
        for domain in np.unique(ids):
            low, high = np.searchsorted(self.domain_ids, [domain, domain + 1])
            if low == high:
                raise InputError(f"domain id {domain}: the rank map has no document of it; fit it on this corpus")
            mass = np.concatenate([[0], np.cumsum(self.tokens[low:high])])
            rows = ids == domain
            upto = np.searchsorted(self.merged[low:high], values[rows], side="right")
            if ties == "paper":
                ranks[rows] = mass[upto] / mass[-1]
            else:
                below = np.searchsorted(self.merged[low:high], values[rows], side="left")
                ranks[rows] = (mass[upto] + mass[below]) / (2 * mass[-1])
        # Before the domain's best known document the mass is 0; r̄ is in (0, 1].
        return np.maximum(ranks, np.finfo(np.float64).tiny)

    def to_table(self) -> pa.Table:
        """The map as an Arrow table, for ``rank_map.parquet``."""
        return pa.table({"domain_id": self.domain_ids, "merged_quality": self.merged, "tokens": self.tokens})

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """The inverse of ``to_table``."""
        return cls(*(table[name].to_numpy() for name in ("domain_id", "merged_quality", "tokens")))


def require_finite(values: Array, name: str) -> Array:
    """``values`` itself, or an error that counts and shows what is not finite."""
    bad = ~np.isfinite(values)
    if bad.any():
        rows = np.flatnonzero(bad)
        raise InputError(
            f"{name}: {rows.size} of {values.shape[0]} documents have a score that is not finite (first rows "
            f"{rows[:5].tolist()}); drop them or repair the scorer"
        )
    return values


def require_domain_ids(domain_ids: ArrayLike, n_domains: int | None = None) -> NDArray[np.int64]:
    """``domain_ids`` as int64, or an error when they are not integers in [0, n_domains)."""
    ids = np.asarray(domain_ids)
    if ids.dtype.kind not in "iu" and ids.size:
        raise InputError(f"domain_ids: type {ids.dtype}; give integers, the domain's position in the parameters")
    ids = ids.astype(np.int64)
    outside = (ids < 0) | (ids >= n_domains) if n_domains is not None else ids < 0
    if outside.any():
        limit = (
            "from 0" if n_domains is None else f"from 0 to {n_domains - 1}, as the parameters have {n_domains} domains"
        )
        raise InputError(
            f"domain_ids: {int(outside.sum())} outside the range, first {ids[outside][0]}; give positions {limit}"
        )
    return ids


def _tokens(tokens: ArrayLike) -> NDArray[np.int64]:
    counts = np.asarray(tokens)
    if counts.dtype.kind not in "iu" and counts.size:
        raise InputError(f"tokens: type {counts.dtype}; give integers")
    if (bad := counts <= 0).any():
        raise InputError(f"tokens: {int(bad.sum())} documents have {counts[bad][0]} tokens; drop empty documents first")
    return counts.astype(np.int64)
