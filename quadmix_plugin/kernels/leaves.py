"""One θ over documents sorted into leaves: only leaves whose best possible q̄ can be in the window are read.

Documents of a domain lie together, and within it near others of like scores (Morton order). A leaf is a run of LEAF of
them with the lowest value of each score; a lower bound of q̄ follows by Eq. 1 itself, whose float arithmetic is
monotone, so what is left out is certain to be outside the window. Nor is Eq. 3 evaluated for every document: the ends
of a bin bound S, and only where the document's hash falls between the two bounds its own rank is asked for. The
results are those of ``kernels.cpu`` to the last document.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from quadmix_plugin.hashing import TIES_STREAM, splitmix64_step
from quadmix_plugin.kernels.cpu import (
    _SHIFT,
    _UNIT,
    TINY,
    Theta,
    _draw,
    _sort_segment,
    _window,
    add_to_bin,
    bin_of,
    chances,
    mass_at,
    mix64,
)

LEAF = 128

_COARSE = 1024  # bins of the guess
_ALL = np.uint64(1 << 53)
_MARGIN = np.uint64(1 << 20)  # of 2^53: 1e-10 copies, far above the rounding of exp and pow
_TIE_STEP = np.uint64(splitmix64_step(TIES_STREAM))

DRAW = np.dtype([("whole", np.int64), ("sure", np.uint64), ("maybe", np.uint64)])
"""The draw in a bin: ``whole`` copies, one more for a hash below ``sure``, none more from ``maybe`` on; between the two
the document's own rank decides."""

_jit: Any = njit(cache=True, nogil=True, error_model="numpy")


class Leaves(NamedTuple):
    """The documents in leaves: domain m is leaf ``start[m]`` to ``start[m + 1]``, its last leaf filled up.

    ``scores`` [leaves, N, LEAF] float32 (∞ where filled up), ``best`` [leaves, N]: the lowest of each; ``tokens``,
    ``hashes`` and ``rows`` (of the table) [leaves · LEAF]. ``low``, ``high`` [M, N]: range of the scores; ``total``,
    ``mean`` [M]: tokens of the domain, and per document. ``sample`` [N, s] and ``sample_tokens`` [s]: some documents
    for a guess of the window's end, ``first_sample`` [M + 1]. ``lucky`` [l]: the documents of each domain whose
    hash's upper 53 bits are below ``luck``, in the order of their hash, ``first_lucky`` [M + 1].
    """

    scores: NDArray[np.float32]
    best: NDArray[np.float32]
    tokens: NDArray[Any]
    hashes: NDArray[np.uint64]
    rows: NDArray[Any]
    start: NDArray[np.int64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    total: NDArray[np.int64]
    mean: NDArray[np.float64]
    sample: NDArray[np.float32]
    sample_tokens: NDArray[np.int64]
    first_sample: NDArray[np.int64]
    lucky: NDArray[np.int64]
    first_lucky: NDArray[np.int64]
    luck: np.uint64


class Work(NamedTuple):
    """Memory that one thread uses again for every θ: arrays of bins, and arrays as long as the largest domain.

    Of a bin: ``mass`` (tokens) and ``before`` (those of earlier bins), ``draw``, ``asked`` (whether any document's own
    rank is needed), ``cell``. Of a collected document: ``at`` (its place) and ``bin``; ``members``: those in asked
    bins; ``quality``, ``place``, ``tie`` and ``upto`` (Eq. 2's numerator): these in order.
    """

    mass: NDArray[np.int64]
    before: NDArray[np.int64]
    draw: Any
    asked: Any
    cell: Any
    ends: NDArray[np.int64]
    at: NDArray[np.int32]
    bin: NDArray[np.int32]
    members: NDArray[np.int32]
    quality: NDArray[np.float64]
    place: NDArray[np.int64]
    tie: NDArray[np.uint64]
    upto: NDArray[np.float64]


@_jit
def _limits(alpha: Any, low: Any, high: Any, n_bins: int) -> tuple[float, float]:
    """``Grid.of`` for one domain, to the bit: the low end and the scale."""
    least, most = 0.0, 0.0
    for n in range(alpha.size):
        least += alpha[n] * low[n]
        most += alpha[n] * high[n]
    scale = n_bins / (most - least) if most > least else 0.0
    return least, scale if np.isfinite(scale) else 0.0


@_jit
def _guess(
    sample: Any, tokens: Any, start: int, end: int, alpha: Any, low: float, scale: float, n_bins: int, omega: float
) -> int:
    """A bin that the window most likely does not pass; the last one where there is no sample."""
    if start == end:
        return n_bins - 1
    coarse = np.zeros(_COARSE, dtype=np.int64)
    total, squares = 0, 0.0
    for j in range(start, end):
        q = 0.0
        for n in range(alpha.size):
            q += alpha[n] * sample[n, j]
        w = tokens[j]
        coarse[bin_of(q, low, scale * _COARSE / n_bins, _COARSE)] += w
        total += w
        squares += float(w) * w
    # Twice the standard error of a random sample; a systematic one in Morton order is nearer.
    limit = omega * total + 2.0 * np.sqrt(omega * (1.0 - omega) * squares)
    mass = 0
    for k in range(_COARSE):
        mass += coarse[k]
        if mass >= limit:
            return min(n_bins - 1, (k + 1) * n_bins // _COARSE)
    return n_bins - 1


@_jit
def _collect(
    leaves: Leaves, m: int, alpha: Any, low: float, scale: float, n_bins: int, last: int, work: Work
) -> tuple[int, int]:
    """Documents of domain m in bins up to ``last``: place and bin in ``work``, and bins' mass; their number, tokens."""
    scores, best, tokens, _, _, start, _, _, _, _, _, _, _, _, _, _ = leaves
    mass, _, _, _, _, _, at, bin_at, _, _, _, _, _ = work
    for b in range(last + 1):
        mass[b] = 0
    limit = np.inf if last >= n_bins - 1 else last + 1.0
    local, which = np.empty(LEAF, dtype=np.float64), np.empty(LEAF + 1, dtype=np.int64)
    count: int = 0
    total: Any = 0
    for leaf in range(start[m], start[m + 1]):
        bound = 0.0
        for n in range(alpha.size):
            bound += alpha[n] * best[leaf, n]
        if (bound - low) * scale >= limit:
            continue
        a = alpha[0]
        for j in range(LEAF):
            local[j] = a * scores[leaf, 0, j]
        for n in range(1, alpha.size):
            a = alpha[n]
            for j in range(LEAF):
                local[j] += a * scores[leaf, n, j]
        k = 0
        for j in range(LEAF):
            which[k] = j
            k += (local[j] - low) * scale < limit
        for x in range(k):
            q, i = local[which[x]], leaf * LEAF + which[x]
            b = int(min(max((q - low) * scale, 0.0), n_bins - 1.0))
            at[count + x], bin_at[count + x] = i, b
            w = tokens[i]
            mass[b] += w
            total += w
        count += k
    return count, total


@_jit
def _window_of(leaves: Leaves, m: int, alpha: Any, omega: float, n_bins: int, work: Work) -> tuple[int, int]:
    """Collects all documents of domain m that can have r̄ <= ω, and fills their bins; their number, the last bin."""
    low, scale = _limits(alpha, leaves.low[m], leaves.high[m], n_bins)
    first, end = leaves.first_sample[m], leaves.first_sample[m + 1]
    last = _guess(leaves.sample, leaves.sample_tokens, first, end, alpha, low, scale, n_bins, omega)
    count, total = _collect(leaves, m, alpha, low, scale, n_bins, last, work)
    while last < n_bins - 1 and total / leaves.total[m] <= omega:
        last = min(n_bins - 1, 2 * last + 1)
        count, total = _collect(leaves, m, alpha, low, scale, n_bins, last, work)
    before = 0
    for b in range(last + 1):
        work.before[b] = before
        before += work.mass[b]
    return count, last


@_jit
def _quality_at(scores: Any, alpha: Any, i: int) -> float:
    """Eq. 1 for the document at place i."""
    q = 0.0
    for n in range(alpha.size):
        q += alpha[n] * scores[i // LEAF, n, i % LEAF]
    return q


@_jit
def _tie(h: Any) -> Any:
    """``hashing.tie_hash`` of one hash."""
    return mix64(h + _TIE_STEP)


@_jit
def _prepare_draws(
    last: int, total: float, whole: int, limit: Any, lam: float, omega: float, eta: float, epsilon: float, thin: float,
    work: Work,
) -> None:  # fmt: skip
    """What a hash draws in each bin, as far as the bin alone decides; ``whole`` and ``limit`` outside the window."""
    mass, before, draw, asked, _, _, _, _, _, _, _, _, _ = work
    upper = (epsilon + _window(0.0, lam, omega, eta)) * thin
    for b in range(last + 1):
        asked[b] = 0
        start, end = before[b] / total, (before[b] + mass[b]) / total
        each = draw[b]
        each.whole, each.sure, each.maybe = whole, limit, limit
        if end <= omega:
            lower = (epsilon + _window(end, lam, omega, eta)) * thin
            floor = np.floor(lower)
            sure, maybe = np.uint64((lower - floor) * _ALL), np.uint64((min(upper, floor + 1.0) - floor) * _ALL)
            each.whole = int(floor)
            each.sure = sure - _MARGIN if sure > _MARGIN else np.uint64(0)
            each.maybe = min(maybe + _MARGIN, _ALL)
            if upper > floor + 1.0:
                each.sure, each.maybe = np.uint64(0), _ALL
            upper = lower
        elif start <= omega:
            each.sure, each.maybe = np.uint64(0), _ALL


@_jit
def _members(count: int, work: Work) -> int:
    """The collected documents in asked bins, in ``members``; their number."""
    _, _, _, asked, _, _, _, bin_at, members, _, _, _, _ = work
    k = 0
    for c in range(count):
        members[k] = c
        k += asked[bin_at[c]]
    return k


@_jit
def _masses_by_sort(leaves: Leaves, alpha: Any, count: int, last: int, ties: int, work: Work) -> None:
    """Exact masses of ``count`` members, which are put in order; ``ends`` [b]: where bin b ends."""
    scores, _, tokens, hashes, _, _, _, _, _, _, _, _, _, _, _, _ = leaves
    _, masses, _, _, _, ends, at, bin_at, members, q, place, tie, upto = work
    for b in range(last + 2):
        ends[b] = 0
    for k in range(count):
        ends[bin_at[members[k]] + 1] += 1
    for b in range(last + 1):
        ends[b + 1] += ends[b]
    for k in range(count):
        i, b = at[members[k]], bin_at[members[k]]
        j = ends[b]
        ends[b] += 1
        q[j], place[j] = _quality_at(scores, alpha, i), i
        tie[j] = _tie(hashes[i]) if ties == 2 else np.uint64(0)
    start = 0
    for b in range(last + 1):
        end, before = ends[b], masses[b]
        if end - start > 1:
            _sort_segment(q, place, tie, start, end)
        j = start
        while j < end:
            group, k = 0, j
            while k < end and q[k] == q[j] and tie[k] == tie[j]:
                group += tokens[place[k]]
                k += 1
            for i in range(j, k):
                upto[i] = before + 0.5 * group if ties == 1 else float(before + group)
            before += group
            j = k
        start = end


@_jit
def _masses_by_cells(leaves: Leaves, alpha: Any, count: int, last: int, mean: float, ties: int, work: Work) -> None:
    """Masses of ``count`` members by the cells of their bins."""
    scores, _, tokens, hashes, _, _, _, _, _, _, _, _, _, _, _, _ = leaves
    _, before, _, asked, cell, _, at, bin_at, members, q, place, _, upto = work
    for b in range(last + 1):
        if asked[b]:
            each = cell[b]
            each.before, each.tokens, each.lowest, each.highest = before[b], 0, np.inf, -np.inf
    for k in range(count):
        i = at[members[k]]
        q[k], place[k] = _quality_at(scores, alpha, i), i
        add_to_bin(cell[bin_at[members[k]]], q[k], tokens[i])
    for k in range(count):
        u = float(_tie(hashes[place[k]]) >> _SHIFT) * _UNIT if ties == 2 else 0.0
        upto[k] = mass_at(q[k], cell[bin_at[members[k]]], mean, ties, u)


@_jit
def _outside(
    leaves: Leaves, draws: Any, m: int, alpha: Any, n_bins: int, last: int, whole: int, limit: Any, use_luck: bool,
    found: int, out_rows: Any, out_copies: Any,
) -> int:  # fmt: skip
    """Adds the documents of domain m that were not collected and yet have copies, by ε; returns the new number."""
    scores, _, _, _, rows, start, lows, highs, _, _, _, _, _, lucky, first_lucky, luck = leaves
    low, scale = _limits(alpha, lows[m], highs[m], n_bins)
    beyond = np.inf if last >= n_bins - 1 else last + 1.0
    listed = use_luck and whole == 0 and limit <= luck
    first, end = start[m] * LEAF, start[m + 1] * LEAF
    if listed:
        first, end = first_lucky[m], first_lucky[m + 1]
    for k in range(first, end):
        i = lucky[k] if listed else k
        t = draws[i] >> _SHIFT
        if listed and t >= limit:
            break
        copies = whole + (t < limit)
        if copies and rows[i] >= 0 and (_quality_at(scores, alpha, i) - low) * scale >= beyond:
            out_rows[found] = rows[i]
            out_copies[found] = copies
            found += 1
    return found


@_jit
def _select_domain(
    leaves: Leaves, draws: Any, m: int, theta: Any, n_bins: int, exact: bool, ties: int, use_luck: bool, work: Work,
    whole: int, limit: Any, found: int, out_rows: Any, out_copies: Any,
) -> int:  # fmt: skip
    """Adds the documents of domain m that have copies; returns the new number."""
    _, _, _, _, rows, _, _, _, totals, means, _, _, _, _, _, _ = leaves
    alpha, lam, omega, eta, epsilon, thin = theta
    _, _, draw, asked, _, ends, at, bin_at, members, _, place, _, upto = work
    total = float(totals[m])
    count, last = _window_of(leaves, m, alpha[m], omega[m], n_bins, work)
    _prepare_draws(last, total, whole, limit, lam[m], omega[m], eta[m], epsilon[m], thin, work)
    for c in range(count):
        i, b = at[c], bin_at[c]
        each, t = draw[b], draws[i] >> _SHIFT
        if each.sure <= t < each.maybe:
            asked[b] = 1
            continue
        copies = each.whole + (t < each.sure)
        out_rows[found] = rows[i]
        out_copies[found] = copies
        found += copies > 0
    count = _members(count, work)
    if exact:
        _masses_by_sort(leaves, alpha[m], count, last, ties, work)
    else:
        _masses_by_cells(leaves, alpha[m], count, last, means[m], ties, work)
    b, last_mass, copies, s = 0, -1.0, 0, 0.0
    for k in range(count):
        i = place[k]
        if exact:
            while k >= ends[b]:
                b += 1
        else:
            b = bin_at[members[k]]
        t = draws[i] >> _SHIFT
        if draw[b].sure <= t < draw[b].maybe:
            if upto[k] != last_mass:  # a tie group shares its S
                last_mass = upto[k]
                r = max(last_mass / total, TINY)
                s = (epsilon[m] + _window(r, lam[m], omega[m], eta[m])) * thin if r <= omega[m] else -1.0
            copies = _draw(s, draws[i]) if s >= 0.0 else whole + (t < limit)
            out_rows[found] = rows[i]
            out_copies[found] = copies
            found += copies > 0
    return _outside(leaves, draws, m, alpha[m], n_bins, last, whole, limit, use_luck, found, out_rows, out_copies)


@_jit
def select(
    leaves: Leaves, draws: Any, thetas: Any, n_bins: Any, exact: bool, ties: int, use_luck: bool, work: Work,
    out_rows: Any, out_copies: Any, ends: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Rows and copies of all documents with copies under each of T parameters, in arrays that grow as needed.

    ``thetas``: as ``Theta`` with a leading axis T; ``draws`` [n]: the hashes that copies are drawn by; ``use_luck``:
    they are those of ``leaves``; ``n_bins`` [M]. ``ends`` [M, T]: where the documents of a domain and θ end; domains
    are the outer loop, so that a domain's documents stay in the cache for all θ.
    """
    start = leaves.start
    alpha, lam, omega, eta, epsilon, thin = thetas
    found: Any = np.int64(0)  # a literal 0 would compile all it is passed to once more
    for m in range(start.size - 1):
        for t in range(alpha.shape[0]):
            size = (start[m + 1] - start[m]) * LEAF
            if size:
                if found + size + 1 > out_rows.size:
                    longer = max(2 * out_rows.size, found + size + 1)
                    more_rows, more_copies = np.empty(longer, out_rows.dtype), np.empty(longer, out_copies.dtype)
                    for k in range(found):
                        more_rows[k], more_copies[k] = out_rows[k], out_copies[k]
                    out_rows, out_copies = more_rows, more_copies
                theta = Theta(alpha[t], lam[t], omega[t], eta[t], epsilon[t], thin)
                whole, limit = chances(epsilon[t], thin)
                found = _select_domain(
                    leaves, draws, m, theta, n_bins[m], exact, ties, use_luck, work, whole[m], limit[m], found,
                    out_rows, out_copies,
                )  # fmt: skip
            ends[m, t] = found
    return out_rows, out_copies


@_jit
def expect(
    leaves: Leaves, alpha: Any, lam: Any, omega: Any, eta: Any, n_bins: Any, ties: int, work: Work, tokens: Any,
    scores: Any, copies: Any,
) -> None:  # fmt: skip
    """What T parameters select without ε: adds Σ tokens·S to ``tokens`` [T, M], Σ tokens·S·σ to ``scores`` [T, N], Σ S.

    ``alpha`` [T, M, N], the others [T, M], ``copies`` [T]; ranks are exact.
    """
    sigma, _, weights, _, _, start, _, _, totals, _, _, _, _, _, _, _ = leaves
    _, before, _, asked, _, _, _, _, _, _, place, _, upto = work
    for t in range(alpha.shape[0]):
        for m in range(start.size - 1):
            if start[m] == start[m + 1]:
                continue
            count, last = _window_of(leaves, m, alpha[t, m], omega[t, m], n_bins[m], work)
            for b in range(last + 1):
                asked[b] = before[b] / totals[m] <= omega[t, m]
            count = _members(count, work)
            _masses_by_sort(leaves, alpha[t, m], count, last, ties, work)
            for k in range(count):
                r = max(upto[k] / totals[m], TINY)
                if r <= omega[t, m]:
                    i = place[k]
                    s = _window(r, lam[t, m], omega[t, m], eta[t, m])
                    copies[t] += s
                    s *= weights[i]
                    tokens[t, m] += s
                    for n in range(alpha.shape[2]):
                        scores[t, n] += s * sigma[i // LEAF, n, i % LEAF]


@_jit
def morton_keys(scores: Any, domain: Any, low: Any, high: Any, bits: int, used: int, out: Any) -> None:
    """(domain, interleaved ``bits`` of the first ``used`` scores' places in the domain's range) of every document."""
    for i in range(domain.size):
        m = domain[i]
        key = np.uint64(m)
        for shift in range(bits - 1, -1, -1):
            for n in range(used):
                width = high[m, n] - low[m, n]
                place = 0
                if width > 0.0:
                    place = min((1 << bits) - 1, int((scores[i, n] - low[m, n]) / width * (1 << bits)))
                key = (key << np.uint64(1)) | np.uint64((place >> shift) & 1)
        out[i] = key


@_jit
def token_scores(scores: Any, tokens: Any, start: Any, out: Any) -> None:
    """Σ tokens·σ(q) of every domain [M, N]."""
    for m in range(start.size - 1):
        for leaf in range(start[m], start[m + 1]):
            for n in range(scores.shape[1]):
                for j in range(LEAF):
                    w = tokens[leaf * LEAF + j]
                    if w > 0:
                        out[m, n] += w * scores[leaf, n, j]
