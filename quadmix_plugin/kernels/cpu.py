"""Eq. 1 to 3 compiled by numba: one pass over documents each, no temporaries, no threads of their own.

A rank is computed from the *cells* of a domain: intervals of q̄ in ascending order with the tokens in each, and at its
two ends. At an end the rank is exactly that of Eq. 2; between them the tokens are taken to lie evenly. Cells are found
through a *grid*, equal bins over the domain's range of q̄. Every document is computed alone and every sum is of
integers, so no result depends on the order of documents. All float arithmetic is in float64 and in the order of the
equations; numba contracts and reorders nothing.
"""

from math import exp
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

PAPER, MID, HASH = 0, 1, 2
TIES = {"paper": PAPER, "mid": MID, "hash": HASH}
TINY = np.finfo(np.float64).tiny
_UNIT = 2.0**-53
_SHIFT = np.uint64(11)


class Theta(NamedTuple):
    """θ as arrays: ``alpha`` [M, N], the others [M], all float64; ``thin``: factor on every S."""

    alpha: NDArray[np.float64]
    lam: NDArray[np.float64]
    omega: NDArray[np.float64]
    eta: NDArray[np.float64]
    epsilon: NDArray[np.float64]
    thin: float


_ENDS = [("lowest", np.float64), ("highest", np.float64), ("at_lowest", np.int64), ("at_highest", np.int64)]

BIN = np.dtype([("tokens", np.int64), *_ENDS])
"""A bin of a histogram: its tokens, its lowest and highest q̄ and the tokens of exactly these."""

CELL = np.dtype([("before", np.int64), ("tokens", np.int64), *_ENDS])
"""A cell of a rank map; ``before``: tokens of the domain in earlier cells."""


class Cells(NamedTuple):
    """A rank map: the grid ``low``, ``scale`` [M] and ``first`` [M, B + 1], the first cell of each bin in ``cell`` [k].

    ``tie`` [k], or empty where cells are not told apart by hash; ``total``, ``mean`` [M]: tokens of the domain, and
    per document.
    """

    low: NDArray[np.float64]
    scale: NDArray[np.float64]
    first: NDArray[np.int64]
    cell: NDArray[Any]
    tie: NDArray[np.uint64]
    total: NDArray[np.int64]
    mean: NDArray[np.float64]


_jit: Any = njit(cache=True, nogil=True, error_model="numpy")


@_jit
def merge(scores: Any, domain: Any, alpha: Any, out: Any) -> None:
    """Eq. 1 for ``scores`` [n, N]."""
    for i in range(scores.shape[0]):
        m = domain[i]
        merged = 0.0
        for n in range(scores.shape[1]):
            merged += alpha[m, n] * scores[i, n]
        out[i] = merged


@_jit
def value_range(merged: Any, domain: Any, low: Any, high: Any) -> None:
    """Lowers ``low`` [M] and raises ``high`` [M] to the range of q̄ in each domain."""
    for i in range(merged.size):
        m, q = domain[i], merged[i]
        low[m] = min(low[m], q)
        high[m] = max(high[m], q)


@_jit
def totals(domain: Any, tokens: Any, documents: Any, sums: Any, squares: Any, large_squares: Any) -> None:
    """Adds the documents, tokens and tokens² (lower 32 bits, and the rest) of each domain to arrays [M]."""
    for i in range(domain.size):
        m, w = domain[i], tokens[i]
        documents[m] += 1
        sums[m] += w
        squares[m] += (w * w) & 0xFFFFFFFF
        large_squares[m] += (w * w) >> 32


@_jit
def score_range(scores: Any, domain: Any, low: Any, high: Any) -> None:
    """Lowers ``low`` [M, N] and raises ``high`` [M, N] to the range of ``scores`` [n, N] in each domain."""
    for i in range(domain.size):
        m = domain[i]
        for n in range(scores.shape[1]):
            low[m, n] = min(low[m, n], scores[i, n])
            high[m, n] = max(high[m, n], scores[i, n])


@_jit
def bin_of(q: float, low: float, scale: float, n_bins: int) -> int:
    """The bin of q̄; never falls as q̄ grows."""
    position = (q - low) * scale
    if position >= n_bins:
        return n_bins - 1
    return int(position) if position >= 1.0 else 0  # NaN, where the range overflows, is in the first


@_jit
def add_to_bin(each: Any, q: float, tokens: int) -> None:
    """Adds one document to a BIN."""
    each.tokens += tokens
    if q <= each.lowest:
        each.at_lowest = tokens + (each.at_lowest if q == each.lowest else 0)
        each.lowest = q
    if q >= each.highest:
        each.at_highest = tokens + (each.at_highest if q == each.highest else 0)
        each.highest = q


@_jit
def fill_bins(merged: Any, domain: Any, tokens: Any, low: Any, scale: Any, bins: Any) -> None:
    """Adds documents to a histogram ``bins`` [M, B] of BIN."""
    n_bins = bins.shape[1]
    for i in range(merged.size):
        m, q = domain[i], merged[i] + 0.0  # makes -0.0 and 0.0 one value
        add_to_bin(bins[m, bin_of(q, low[m], scale[m], n_bins)], q, tokens[i])


@_jit
def in_bins_upto(merged: Any, domain: Any, low: Any, scale: Any, n_bins: int, last: Any, out: Any) -> int:
    """Rows of documents whose bin is at most ``last`` [M], in ``out``; returns their number."""
    count = 0
    for i in range(merged.size):
        m = domain[i]
        out[count] = i
        count += bin_of(merged[i], low[m], scale[m], n_bins) <= last[m]
    return count


@_jit
def _is_after(q: Any, tie: Any, i: int, j: int) -> bool:
    return q[i] > q[j] or (q[i] == q[j] and tie[i] > tie[j])


@_jit
def _sort_segment(q: Any, other: Any, tie: Any, start: int, end: int) -> None:
    """Sorts [start, end) by q̄, then tie, carrying ``other``: by insertion where short, else a heap sort."""
    n = end - start
    if n <= 24:
        for i in range(start + 1, end):
            value, carried, t = q[i], other[i], tie[i]
            j = i - 1
            while j >= start and (q[j] > value or (q[j] == value and tie[j] > t)):
                q[j + 1], other[j + 1], tie[j + 1] = q[j], other[j], tie[j]
                j -= 1
            q[j + 1], other[j + 1], tie[j + 1] = value, carried, t
        return
    for root in range(n // 2 - 1, -1, -1):
        _sift_down(q, other, tie, start, root, n)
    for last in range(n - 1, 0, -1):
        _swap(q, other, tie, start, start + last)
        _sift_down(q, other, tie, start, 0, last)


@_jit
def _swap(q: Any, other: Any, tie: Any, i: int, j: int) -> None:
    q[i], q[j] = q[j], q[i]
    other[i], other[j] = other[j], other[i]
    tie[i], tie[j] = tie[j], tie[i]


@_jit
def _sift_down(q: Any, other: Any, tie: Any, start: int, root: int, n: int) -> None:
    """Restores the heap of the first ``n`` below ``root``."""
    while 2 * root + 1 < n:
        child = 2 * root + 1
        if child + 1 < n and _is_after(q, tie, start + child + 1, start + child):
            child += 1
        if not _is_after(q, tie, start + child, start + root):
            return
        _swap(q, other, tie, start + root, start + child)
        root = child


@_jit
def order_by_cell(merged: Any, domain: Any, tie: Any, low: Any, scale: Any, n_bins: int) -> tuple[Any, Any, Any]:
    """Documents in ascending order of (domain, q̄, tie): q̄, row and tie of each.

    A counting sort by domain and bin, then by value within the bin. ``tie`` is of length n, or empty.
    """
    n, hashed = merged.size, tie.size > 0
    place = np.zeros(low.size * n_bins + 1, dtype=np.int64)
    key = np.empty(n, dtype=np.int64)
    for i in range(n):
        m = domain[i]
        key[i] = m * n_bins + bin_of(merged[i], low[m], scale[m], n_bins)
        place[key[i] + 1] += 1
    for k in range(1, place.size):
        place[k] += place[k - 1]
    q, rows, t = np.empty(n, dtype=np.float64), np.empty(n, dtype=np.int64), np.zeros(n, dtype=np.uint64)
    at = place[:-1].copy()
    for i in range(n):
        j = at[key[i]]
        at[key[i]] += 1
        q[j], rows[j] = merged[i] + 0.0, i  # makes -0.0 and 0.0 one value
        if hashed:
            t[j] = tie[i]
    for k in range(place.size - 1):
        if place[k + 1] - place[k] > 1:
            _sort_segment(q, rows, t, place[k], place[k + 1])
    return q, rows, t


@_jit
def distinct(q: Any, rows: Any, tie: Any, domain: Any, tokens: Any) -> tuple[Any, Any, Any, Any]:
    """From ``order_by_cell``: (domain, q̄, tokens, tie) with equal documents summed."""
    ids, sums = np.empty(q.size, dtype=np.int64), np.empty(q.size, dtype=np.int64)
    values, ties = np.empty(q.size, dtype=np.float64), np.empty(q.size, dtype=np.uint64)
    count = 0
    for j in range(q.size):
        m, w = domain[rows[j]], tokens[rows[j]]
        if count and m == ids[count - 1] and q[j] == values[count - 1] and tie[j] == ties[count - 1]:
            sums[count - 1] += w
        else:
            ids[count], values[count], sums[count], ties[count] = m, q[j], w, tie[j]
            count += 1
    return ids[:count], values[:count], sums[:count], ties[:count]


@_jit
def ranks_in_order(q: Any, rows: Any, tie: Any, domain: Any, tokens: Any, total: Any, ties: int, out: Any) -> None:
    """From ``order_by_cell``: Eq. 2 of every document, exact."""
    before, start, n = 0, 0, q.size
    while start < n:
        m = domain[rows[start]]
        if start and m != domain[rows[start - 1]]:
            before = 0
        group, end = 0, start
        while end < n and q[end] == q[start] and tie[end] == tie[start] and domain[rows[end]] == m:
            group += tokens[rows[end]]
            end += 1
        mass = before + 0.5 * group if ties == 1 else float(before + group)
        for j in range(start, end):
            out[rows[j]] = max(mass / total[m], TINY)
        before += group
        start = end


@_jit
def mass_at(q: float, cell: Any, mean: float, ties: int, u: float) -> float:
    """Tokens that count for q̄ (Eq. 2's numerator), whose CELL this is or which lies beyond it; u breaks ties."""
    before = float(cell.before)
    if q > cell.highest:
        return before + cell.tokens
    group = float(cell.at_lowest)
    if q == cell.highest:
        group = float(cell.at_highest)
        before += cell.tokens - group
    elif q > cell.lowest:  # between the ends: the documents of q̄ itself are taken for one of mean size
        inner = float(cell.tokens - cell.at_lowest - cell.at_highest)
        group = min(mean, inner)
        before += cell.at_lowest + (inner - group) * ((q - cell.lowest) / (cell.highest - cell.lowest))
    if ties == 1:
        return before + 0.5 * group
    return before + (u * group if ties == 2 else group)


# Kernels take their tuples of arrays apart before the loop: inside it, each access would count a reference.


@_jit
def _rank_at(
    q: float, b: int, first: Any, cell: Any, cell_tie: Any, total: float, mean: float, tie: Any, ties: int
) -> float:
    """Eq. 2 for one document in bin b of a domain with the cells ``first`` [B + 1]; 1 where it has none."""
    if total == 0.0:
        return 1.0
    left, right = first[b], first[b + 1]
    hashed = cell_tie.size > 0
    while left < right:  # the first cell beyond the document
        middle = (left + right) // 2
        beyond = cell[middle].lowest > q
        if hashed and cell[middle].lowest == q:
            beyond = cell_tie[middle] > tie
        if beyond:
            right = middle
        else:
            left = middle + 1
    c = left - 1
    if c < first[0]:
        return TINY  # better than all: no mass, and r̄ is in (0, 1]
    at = cell[c]
    if hashed and at.lowest == at.highest:
        mass = float(at.before + at.tokens)
    else:
        u = float(tie >> _SHIFT) * _UNIT
        mass = mass_at(q, at, mean, ties, u)
    return max(mass / total, TINY)


@_jit
def rank(merged: Any, domain: Any, tie: Any, cells: Cells, ties: int, out: Any) -> None:
    """Eq. 2 of every document; ``tie`` [n], or empty where ``ties`` is not HASH."""
    hashed = tie.size > 0
    none = np.uint64(0)
    low, scale, first, cell, cell_tie, total, mean = cells
    n_bins = first.shape[1] - 1
    for i in range(merged.size):
        m, q = domain[i], merged[i]
        b = bin_of(q, low[m], scale[m], n_bins)
        t = tie[i] if hashed else none
        out[i] = _rank_at(q, b, first[m], cell, cell_tie, total[m], mean[m], t, ties)


@_jit
def _window(r: float, lam: float, omega: float, eta: float) -> float:
    """Eq. 3 without ε for r̄ <= ω: λ(ω − r̄) >= 0, so nothing overflows."""
    return (2.0 / (1.0 + exp(-lam * (omega - r)))) ** eta


@_jit
def value(ranks: Any, domain: Any, theta: Theta, out: Any) -> None:
    """Eq. 3 of every document."""
    _, lam, omega, eta, epsilon, thin = theta
    for i in range(ranks.size):
        m, r = domain[i], ranks[i]
        s = epsilon[m]
        if r <= omega[m]:
            s += _window(r, lam[m], omega[m], eta[m])
        out[i] = s * thin


@_jit
def _draw(s: float, h: Any) -> int:
    whole = np.floor(s)
    return int(whole) + (float(h >> _SHIFT) * _UNIT < s - whole)


@_jit
def draw(values: Any, hashes: Any, out: Any) -> None:
    """floor(S) + [u < S − floor(S)] of every document."""
    for i in range(values.size):
        out[i] = _draw(values[i], hashes[i])


@_jit
def splitmix64(values: Any, step: Any, out: Any) -> None:
    """``hashing.splitmix64``: the mixed value + step."""
    for i in range(values.size):
        out[i] = mix64(values[i] + step)


@_jit
def mix64(z: Any) -> Any:
    """The finaliser of splitmix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_jit
def chances(epsilon: Any, thin: float) -> Any:
    """ε [M] as the whole copies and the limit below which a hash's upper 53 bits draw one more; exact."""
    whole, limit = np.empty(epsilon.size, dtype=np.int64), np.empty(epsilon.size, dtype=np.uint64)
    for m in range(epsilon.size):
        s = epsilon[m] * thin
        whole[m] = int(np.floor(s))
        limit[m] = np.uint64(np.ceil((s - np.floor(s)) / _UNIT))
    return whole, limit


@_jit
def count(
    merged: Any, domain: Any, hashes: Any, tie: Any, cells: Cells, cut: Any, theta: Theta, ties: int, out: Any
) -> None:
    """Eq. 2, Eq. 3 and the draw at once; ``cut`` [M]: beyond this q̄ no document has r̄ <= ω."""
    hashed = tie.size > 0
    none = np.uint64(0)
    low, scale, first, cell, cell_tie, total, mean = cells
    _, lam, omega, eta, epsilon, thin = theta
    n_bins = first.shape[1] - 1
    whole, limit = chances(epsilon, thin)
    for i in range(merged.size):
        m, q = domain[i], merged[i]
        out[i] = whole[m] + (hashes[i] >> _SHIFT < limit[m])
        if q <= cut[m]:
            b = bin_of(q, low[m], scale[m], n_bins)
            t = tie[i] if hashed else none
            r = _rank_at(q, b, first[m], cell, cell_tie, total[m], mean[m], t, ties)
            if r <= omega[m]:
                out[i] = _draw((epsilon[m] + _window(r, lam[m], omega[m], eta[m])) * thin, hashes[i])


@_jit
def pick(
    merged: Any, domain: Any, hashes: Any, tie: Any, cells: Cells, cut: Any, theta: Theta, ties: int, rows: Any,
    ranks: Any, values: Any, copies: Any,
) -> int:  # fmt: skip
    """As ``count``, but only the documents with copies: row, r̄, S and copies of each; returns their number."""
    hashed = tie.size > 0
    none = np.uint64(0)
    low, scale, first, cell, cell_tie, total, mean = cells
    _, lam, omega, eta, epsilon, thin = theta
    n_bins = first.shape[1] - 1
    whole, limit = chances(epsilon, thin)
    found = 0
    for i in range(merged.size):
        m, q = domain[i], merged[i]
        drawn = whole[m] + (hashes[i] >> _SHIFT < limit[m])
        if q > cut[m] and not drawn:
            continue
        b = bin_of(q, low[m], scale[m], n_bins)
        t = tie[i] if hashed else none
        r = _rank_at(q, b, first[m], cell, cell_tie, total[m], mean[m], t, ties)
        s = epsilon[m] * thin
        if r <= omega[m]:
            s = (epsilon[m] + _window(r, lam[m], omega[m], eta[m])) * thin
            drawn = _draw(s, hashes[i])
        rows[found], ranks[found], values[found], copies[found] = i, r, s, drawn
        found += drawn > 0
    return found


def theta_of(theta: Any, thin: float = 1.0) -> Theta:
    """θ as the kernels read it."""
    return Theta(theta.alpha, theta.lam, theta.omega, theta.eta, theta.epsilon, thin)


def reach(scores: Any, domain: Any, alpha: Any) -> tuple[Any, Any]:
    """The range [M] of q̄ that Eq. 1 can reach in each domain, from the range of its scores [n, N]."""
    low, high = np.full(alpha.shape, np.inf), np.full(alpha.shape, -np.inf)
    score_range(scores, domain, low, high)
    least, most = np.zeros((2, alpha.shape[0]))
    for n in range(alpha.shape[1]):
        least += alpha[:, n] * np.where(np.isfinite(low[:, n]), low[:, n], 0.0)
        most += alpha[:, n] * np.where(np.isfinite(high[:, n]), high[:, n], 0.0)
    return least, most
