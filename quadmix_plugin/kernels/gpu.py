"""Kernels by Triton that answer many θ over one table on a GPU; ``device_index`` lays the table out and calls them.

One program takes one block of documents, all of one domain, through some θ; a block that cannot reach a θ's window is
skipped. Four passes: ``add_tokens`` of the bins of q̄ up to the window's end; ``add_ends``, the lowest and highest q̄ of
these bins; ``add_at_ends``, the tokens at exactly these; ``draw_inside``, rank, Eq. 3 and draw of each document at
once, and ``draw_lucky`` for what ε draws beyond. All sums are of integers and extremes have no order, so that results
do not depend on how the GPU schedules. The arithmetic is that of ``kernels.cpu``: float64, in the order of the
equations, and nothing contracted, which the caller asks for at the launch.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

# What is known of a θ in a domain: columns of ``table`` [T · M, COLUMNS], float64.
LOW, SCALE, FIRST, LIMIT, LAM, OMEGA, ETA, EPSILON, THIN, TOTAL, MEAN, UNTIL, STREAM = map(tl.constexpr, range(13))
COLUMNS = tl.constexpr(13)
# What is known of a bin: columns of ``bins`` [T · M · B, FIELDS], int64; the ends are q̄ as integers of the same order.
TOKENS, BEFORE, LOWEST, HIGHEST, AT_LOWEST, AT_HIGHEST = map(tl.constexpr, range(6))
FIELDS = tl.constexpr(6)


@triton.jit
def _place_of_best(best, alpha, table, block, k, N: tl.constexpr):
    """A lower bound of what ``_places`` gives for the block: rounding is monotone."""
    q = tl.load(alpha + k * N) * tl.load(best + block * N).to(tl.float64)
    for n in tl.static_range(1, N):
        q += tl.load(alpha + k * N + n) * tl.load(best + block * N + n).to(tl.float64)
    return (q - tl.load(table + k * COLUMNS + LOW)) * tl.load(table + k * COLUMNS + SCALE)


@triton.jit
def _places(scores, alpha, table, block, k, N: tl.constexpr, BLOCK: tl.constexpr):
    """Eq. 1 for the documents of a block under θ in a domain, k, and their places among the bins."""
    q = tl.zeros((BLOCK,), tl.float64)
    for n in tl.static_range(N):
        score = tl.load(scores + (block * N + n) * BLOCK + tl.arange(0, BLOCK))
        q += tl.load(alpha + k * N + n) * score.to(tl.float64)
    return q, (q - tl.load(table + k * COLUMNS + LOW)) * tl.load(table + k * COLUMNS + SCALE)


@triton.jit
def _slots(place, k, BINS: tl.constexpr):
    """Where the bins of these places are, under θ in a domain, k."""
    return (k * BINS + tl.minimum(tl.maximum(place, 0.0), BINS - 1.0).to(tl.int64)) * FIELDS


@triton.jit
def _as_key(q):
    """An integer that is ordered as q̄."""
    bits = q.to(tl.int64, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)


@triton.jit
def _from_key(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFFFFFFFFFF, key).to(tl.float64, bitcast=True)


@triton.jit
def _mix(z):
    """The finaliser of splitmix64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _splitmix64(values, step):
    return _mix(values.to(tl.uint64, bitcast=True) + step.to(tl.uint64, bitcast=True))


@triton.jit
def _unit_interval(hashes):
    return (hashes >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def hash_ids(ids, step, out, n, BLOCK: tl.constexpr):
    """``hashing.splitmix64`` of integer ids."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    hashes = _splitmix64(tl.load(ids + at, mask=at < n, other=0), tl.load(step))
    tl.store(out + at, hashes.to(tl.int64, bitcast=True), mask=at < n)


@triton.jit
def add_tokens(
    scores, best, domain, tokens, hashes, rows, alpha, table, bins, n_thetas, n_domains,
    N: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, THETAS: tl.constexpr,
):  # fmt: skip
    """Pass 1: the tokens of bins from FIRST up to LIMIT."""
    block, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * THETAS
    weight = tl.load(tokens + block * BLOCK + tl.arange(0, BLOCK))
    for t in range(start, tl.minimum(start + THETAS, n_thetas)):
        k = t * n_domains + tl.load(domain + block)
        first, limit = tl.load(table + k * COLUMNS + FIRST), tl.load(table + k * COLUMNS + LIMIT)
        if (_place_of_best(best, alpha, table, block, k, N) < limit) & (first < limit):
            _, place = _places(scores, alpha, table, block, k, N, BLOCK)
            counts = (place >= first) & (place < limit) & (weight > 0)
            tl.atomic_add(bins + _slots(place, k, BINS) + TOKENS, weight, mask=counts, sem="relaxed")


@triton.jit
def add_ends(
    scores, best, domain, tokens, hashes, rows, alpha, table, bins, n_thetas, n_domains,
    N: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, THETAS: tl.constexpr,
):  # fmt: skip
    """Pass 2: the lowest and highest q̄ of bins up to LIMIT."""
    block, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * THETAS
    weight = tl.load(tokens + block * BLOCK + tl.arange(0, BLOCK))
    for t in range(start, tl.minimum(start + THETAS, n_thetas)):
        k = t * n_domains + tl.load(domain + block)
        limit = tl.load(table + k * COLUMNS + LIMIT)
        if _place_of_best(best, alpha, table, block, k, N) < limit:
            q, place = _places(scores, alpha, table, block, k, N, BLOCK)
            key, inside, slot = _as_key(q), (place < limit) & (weight > 0), _slots(place, k, BINS)
            # A value read may be old, but then it is only further out: most need no atomic operation.
            lowest, highest = bins + slot + LOWEST, bins + slot + HIGHEST
            tl.atomic_min(lowest, key, mask=inside & (key < tl.load(lowest, mask=inside, other=0)), sem="relaxed")
            tl.atomic_max(highest, key, mask=inside & (key > tl.load(highest, mask=inside, other=0)), sem="relaxed")


@triton.jit
def add_at_ends(
    scores, best, domain, tokens, hashes, rows, alpha, table, bins, n_thetas, n_domains,
    N: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, THETAS: tl.constexpr,
):  # fmt: skip
    """Pass 3: the tokens at exactly these."""
    block, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * THETAS
    weight = tl.load(tokens + block * BLOCK + tl.arange(0, BLOCK))
    for t in range(start, tl.minimum(start + THETAS, n_thetas)):
        k = t * n_domains + tl.load(domain + block)
        limit = tl.load(table + k * COLUMNS + LIMIT)
        if _place_of_best(best, alpha, table, block, k, N) < limit:
            q, place = _places(scores, alpha, table, block, k, N, BLOCK)
            key, inside, slot = _as_key(q), (place < limit) & (weight > 0), _slots(place, k, BINS)
            lowest = tl.load(bins + slot + LOWEST, mask=inside, other=0)
            highest = tl.load(bins + slot + HIGHEST, mask=inside, other=0)
            tl.atomic_add(bins + slot + AT_LOWEST, weight, mask=inside & (key == lowest), sem="relaxed")
            tl.atomic_add(bins + slot + AT_HIGHEST, weight, mask=inside & (key == highest), sem="relaxed")


@triton.jit
def _mass(q, bins, slot, inside, mean, u, TIES: tl.constexpr):
    """Eq. 2's numerator, as ``kernels.cpu.mass_at``."""
    tokens = tl.load(bins + slot + TOKENS, mask=inside, other=0).to(tl.float64)
    before = tl.load(bins + slot + BEFORE, mask=inside, other=0).to(tl.float64)
    lowest = _from_key(tl.load(bins + slot + LOWEST, mask=inside, other=0))
    highest = _from_key(tl.load(bins + slot + HIGHEST, mask=inside, other=0))
    at_lowest = tl.load(bins + slot + AT_LOWEST, mask=inside, other=0).to(tl.float64)
    at_highest = tl.load(bins + slot + AT_HIGHEST, mask=inside, other=0).to(tl.float64)
    inner = tokens - at_lowest - at_highest
    group = tl.minimum(mean, inner)
    width = tl.where(highest > lowest, highest - lowest, 1.0)
    between = before + (at_lowest + (inner - group) * ((q - lowest) / width))
    group = tl.where(q == highest, at_highest, tl.where(q == lowest, at_lowest, group))
    before = tl.where(q == highest, before + (tokens - at_highest), tl.where(q == lowest, before, between))
    if TIES == 1:
        return before + 0.5 * group
    elif TIES == 2:
        return before + u * group
    else:
        return before + group


@triton.jit
def _emit(copies, chosen, row, k, found, keys, out, capacity, ROW_BITS: tl.constexpr):
    """Appends the documents chosen; ``found`` counts on where the memory is full."""
    count = tl.sum(chosen.to(tl.int64), 0)
    if count > 0:
        at = tl.atomic_add(found, count, sem="relaxed") + tl.cumsum(chosen.to(tl.int64), 0) - 1
        fits = chosen & (at < capacity)
        tl.store(keys + at, (k << ROW_BITS) | row, mask=fits)
        tl.store(out + at, copies, mask=fits)


@triton.jit
def draw_inside(
    scores, best, domain, tokens, hashes, rows, alpha, table, bins, steps, found, keys, out, capacity,
    n_thetas, n_domains, TIES: tl.constexpr, STREAMS: tl.constexpr, ROW_BITS: tl.constexpr,
    N: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, THETAS: tl.constexpr,
):  # fmt: skip
    """Pass 4: rank, Eq. 3 and draw of documents in bins up to LIMIT, and draw by ε of those from there up to UNTIL."""
    block, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * THETAS
    at = block * BLOCK + tl.arange(0, BLOCK)
    weight, row, own = tl.load(tokens + at), tl.load(rows + at), tl.load(hashes + at)
    u = _unit_interval(own.to(tl.uint64, bitcast=True))
    for t in range(start, tl.minimum(start + THETAS, n_thetas)):
        k = t * n_domains + tl.load(domain + block)
        of = table + k * COLUMNS
        until = tl.load(of + UNTIL)
        if _place_of_best(best, alpha, table, block, k, N) < until:
            q, place = _places(scores, alpha, table, block, k, N, BLOCK)
            inside, tie, draw = (place < tl.load(of + LIMIT)) & (weight > 0), u, u
            if TIES == 2:
                tie = _unit_interval(_splitmix64(own, tl.load(steps + n_thetas)))
            if STREAMS:
                step = tl.load(steps + t)
                draw = tl.where(tl.load(of + STREAM) > 0, _unit_interval(_splitmix64(own, step)), u)
            mass = _mass(q, bins, _slots(place, k, BINS), inside, tl.load(of + MEAN), tie, TIES)
            rank, omega, epsilon = mass / tl.load(of + TOTAL), tl.load(of + OMEGA), tl.load(of + EPSILON)
            window = inside & (rank <= omega)
            slope = tl.where(window, tl.load(of + LAM) * (omega - rank), 0.0)
            value = tl.exp(tl.load(of + ETA) * tl.log(2.0 / (1.0 + tl.exp(-slope))))
            value = tl.where(window, epsilon + value, epsilon) * tl.load(of + THIN)
            whole = tl.floor(value)
            copies = whole.to(tl.int32) + (draw < value - whole).to(tl.int32)
            chosen = (copies > 0) & (weight > 0) & (place < until)
            _emit(copies, chosen, row, k, found, keys, out, capacity, ROW_BITS)


@triton.jit
def draw_lucky(
    scores, best, domain, tokens, hashes, rows, alpha, table, bins, steps, found, keys, out, capacity,
    n_thetas, n_domains, ROW_BITS: tl.constexpr,
    N: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, THETAS: tl.constexpr,
):  # fmt: skip
    """Pass 4 for the documents from UNTIL on that ε draws: one copy each."""
    block, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * THETAS
    at = block * BLOCK + tl.arange(0, BLOCK)
    weight, row = tl.load(tokens + at), tl.load(rows + at)
    u = _unit_interval(tl.load(hashes + at).to(tl.uint64, bitcast=True))
    for t in range(start, tl.minimum(start + THETAS, n_thetas)):
        k = t * n_domains + tl.load(domain + block)
        of = table + k * COLUMNS
        _, place = _places(scores, alpha, table, block, k, N, BLOCK)
        drawn = u < tl.load(of + EPSILON) * tl.load(of + THIN)
        chosen = drawn & (place >= tl.load(of + UNTIL)) & (weight > 0)
        _emit(tl.full((BLOCK,), 1, tl.int32), chosen, row, k, found, keys, out, capacity, ROW_BITS)
