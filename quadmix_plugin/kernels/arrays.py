"""Eq. 1 to 3 and the draw in whole-array operations of numpy or cupy: what runs on a GPU, and needs no numba.

Every float operation is that of ``kernels.cpu``, in the same order, so the copies are the same; on a CPU those kernels
are several times as fast. Arrays that are on a GPU stay there, and results are of the kind of the inputs. For many θ
over one table there is ``kernels.gpu``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from quadmix_plugin import arguments
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import TIES_STREAM, DocIds, hash64, integer_ids, mix64, splitmix64_step, unit_interval
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.rank_map import Ties, check_ties
from quadmix_plugin.rank_states import BINS, Grid

TINY = np.finfo(np.float64).tiny


def on_device(*values: Any) -> bool:
    """Whether any of these is an array on a GPU: cupy's, a column of cudf or a tensor of torch."""
    return any(hasattr(value, "__cuda_array_interface__") for value in values)


def array_namespace(*values: Any) -> Any:
    """The module that computes with these arrays: ``cupy`` if any is on a GPU, else ``numpy``."""
    if not on_device(*values):
        return np
    import cupy  # pyright: ignore[reportMissingImports]

    return cupy


def to_host(array: Any) -> Any:
    """The same array as numpy's."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def merge_quality(normalised: Any, domain_ids: Any, theta: Parameters) -> Any:
    """Eq. 1 as ``ranking.merge_quality``: shapes, result and errors are the same."""
    xp = array_namespace(normalised, domain_ids)
    ids, scores = require_domain_ids(xp, domain_ids, theta.n_domains), _floats(xp, normalised)
    if scores.ndim != 2 or scores.shape != (ids.size, theta.n_scorers):
        raise InputError(
            f"normalised: shape {scores.shape}; give one row for each of the {ids.size} documents and one column "
            f"for each of the {theta.n_scorers} scorers of the parameters"
        )
    merged = xp.zeros(ids.size)
    for n in range(theta.n_scorers):
        merged += xp.asarray(theta.alpha[:, n])[ids] * scores[:, n]
    return require_finite(xp, merged, "normalised")


def quality_rank(
    merged: Any, domain_ids: Any, tokens: Any, ties: Ties = "paper", doc_ids: DocIds | None = None, seed: int = 0
) -> Any:
    """Eq. 2, exact, as ``ranking.quality_rank``: shapes, result and errors are the same."""
    check_ties(ties)
    xp = array_namespace(merged, domain_ids, tokens)
    values = require_finite(xp, xp.asarray(merged, dtype=np.float64), "merged")
    ids, weights = require_domain_ids(xp, domain_ids), require_tokens(xp, tokens)
    arguments.require_one_length(merged=values, domain_ids=ids, tokens=weights)
    if ties != "hash":
        return _exact_ranks(xp, values, ids, weights, ties, None)
    if doc_ids is None:
        raise InputError("ties='hash' needs doc_ids: equal merged quality is ordered by their hash")
    hashes = hash_ids(xp, doc_ids, seed)
    arguments.require_one_length(merged=values, doc_ids=hashes)
    return _exact_ranks(xp, values, ids, weights, ties, splitmix64(hashes, TIES_STREAM))


def sampling_value(rank: Any, domain_ids: Any, theta: Parameters) -> Any:
    """Eq. 3 as ``sampling.sampling_value``: shapes, result and errors are the same."""
    xp = array_namespace(rank, domain_ids)
    ranks, ids = xp.asarray(rank, dtype=np.float64), require_domain_ids(xp, domain_ids, theta.n_domains)
    arguments.require_one_length(rank=ranks, domain_ids=ids)
    bad = ~((ranks > 0) & (ranks <= 1))  # NaN as well
    if bad.any():
        raise InputError(
            f"rank: {int(bad.sum())} outside (0, 1], first {float(ranks[bad][0])}; give what quality_rank returns"
        )
    return _value(xp, ranks, xp.arange(ids.size), ids, theta)


def draw_copies(value: Any, doc_ids: DocIds, seed: int, stream: int = 0) -> Any:
    """The draw as ``sampling.draw_copies``: shapes, result and errors are the same."""
    xp = array_namespace(value, doc_ids)
    values = xp.asarray(value, dtype=np.float64)
    hashes = hash_ids(xp, doc_ids, seed)
    if hashes.shape != values.shape:
        raise InputError(f"value {values.shape} and doc_ids {hashes.shape} must be of one length")
    return _draw(xp, values, splitmix64(hashes, stream) if stream else hashes)


def count_copies(
    normalised: Any,
    domain_ids: Any,
    tokens: Any,
    doc_ids: DocIds,
    theta: Parameters,
    seed: int = 0,
    method: str = "histogram",
    ties: Ties = "paper",
    bins: int = BINS,
    thin: float = 1.0,
    stream: int = 0,
) -> Any:
    """Eq. 1 to 3 and the draw as ``sampling.count_copies``: shapes, result and errors are the same.

    Raises:
        InputError: likewise, and the ``method`` is ``subset``, for which a GPU has no use.
    """
    check_ties(ties)
    if method not in ("histogram", "exact"):
        raise InputError(f"method={method!r} is not computed on a GPU; choose 'exact', or give arrays of numpy")
    xp = array_namespace(normalised, domain_ids, tokens, doc_ids)
    ids, weights = require_domain_ids(xp, domain_ids, theta.n_domains), require_tokens(xp, tokens)
    if bins < 1:
        raise InputError(f"bins={bins}; give at least one")
    scores = _floats(xp, normalised)
    merged = merge_quality(scores, ids, theta)
    hashes = hash_ids(xp, doc_ids, seed)
    arguments.require_one_length(normalised=merged, tokens=weights, doc_ids=hashes)
    tie = splitmix64(hashes, TIES_STREAM) if ties == "hash" else None
    if method == "exact":
        rows, ranks = xp.arange(ids.size), _exact_ranks(xp, merged, ids, weights, ties, tie)
    else:
        grid = Grid(*_reach(xp, scores, ids, theta), bins)
        rows, ranks = _histogram_ranks(xp, merged, ids, weights, ties, tie, grid, theta.omega)
    values = _value(xp, ranks, rows, ids, theta) * thin
    return _draw(xp, values, splitmix64(hashes, stream) if stream else hashes)


def hash_ids(xp: Any, doc_ids: DocIds, seed: int = 0) -> Any:
    """``hashing.hash64`` as an array of ``xp``; integer ids are hashed where the result is."""
    integers = integer_ids(doc_ids)
    return xp.asarray(hash64(doc_ids, seed)) if integers is None else splitmix64(xp.asarray(integers), seed)


def splitmix64(values: Any, seed: int) -> Any:
    """``hashing.splitmix64`` without numba."""
    return mix64(values + np.uint64(splitmix64_step(seed)))


def require_domain_ids(xp: Any, domain_ids: Any, n_domains: int | None = None) -> Any:
    """``arguments.require_domain_ids`` for an array of ``xp``."""
    ids = xp.asarray(domain_ids)
    limit = np.inf if n_domains is None else n_domains
    if ids.dtype.kind not in "iu" or (ids.size and (int(ids.min()) < 0 or int(ids.max()) >= limit)):
        arguments.require_domain_ids(to_host(ids), n_domains)
    return ids.astype(np.int64, copy=False)


def require_tokens(xp: Any, tokens: Any) -> Any:
    """``arguments.require_tokens`` for an array of ``xp``."""
    counts = xp.asarray(tokens)
    if counts.dtype.kind not in "iu" or (counts.size and int(counts.min()) <= 0):
        arguments.require_tokens(to_host(counts))
    return counts.astype(np.int64, copy=False)


def require_finite(xp: Any, values: Any, name: str) -> Any:
    """``arguments.require_finite`` for an array of ``xp``."""
    if not bool(xp.isfinite(values).all()):
        arguments.require_finite(to_host(values), name)
    return values


def from_cudf(frame: Any, columns: Sequence[str]) -> Any:
    """Columns of a frame of cudf (or pandas) as one array [n, k] on its device, for ``normalised``.

    Raises:
        InputError: a value is missing.
    """
    for name in columns:
        if missing := int(frame[name].isna().sum()):
            raise InputError(f"{name}: {missing} of {len(frame)} documents have none; drop them or repair the scorer")
    arrays = [frame[name].values for name in columns]
    return array_namespace(*arrays).stack(arrays, axis=1)


def to_cudf(frame: Any, **columns: Any) -> Any:
    """A frame of cudf (or pandas) with more columns, arrays [n] on its device."""
    return frame.assign(**columns)


def _floats(xp: Any, values: Any) -> Any:
    """float32 and float64 as they are, anything else as float64."""
    array = xp.asarray(values)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)


def _sums(xp: Any, groups: Any, weights: Any, n_groups: int) -> Any:
    """Sum of ``weights`` int64 in each group [n_groups], exact."""
    sums = xp.zeros(n_groups, dtype=np.uint64)  # cupy adds in place to unsigned but not to signed 64-bit integers
    xp.add.at(sums, groups, weights.astype(np.uint64))
    return sums.astype(np.int64)


def _exact_ranks(xp: Any, merged: Any, ids: Any, tokens: Any, ties: str, tie: Any) -> Any:
    """Eq. 2 by a sort of all documents; ``tie`` [n] or None."""
    if not ids.size:
        return xp.empty(0)
    values = merged + 0.0  # makes -0.0 and 0.0 one value
    keys = (values, ids) if tie is None else (tie, values, ids)
    order = xp.arange(ids.size)
    for key in keys:
        order = order[xp.argsort(key[order], kind="stable")]
    differs = xp.zeros(ids.size, dtype=bool)  # from the document before
    for key in keys:
        ordered = key[order]
        differs[1:] |= ordered[1:] != ordered[:-1]
    last = xp.ones(ids.size, dtype=bool)  # of a group of equal documents
    last[:-1] = differs[1:]
    through, domain = xp.cumsum(tokens[order])[last], ids[order[last]]
    group = through.copy()
    group[1:] -= through[:-1]
    total = _sums(xp, ids, tokens, int(ids.max()) + 1)
    before = through - group - (xp.cumsum(total) - total)[domain]
    mass = before + 0.5 * group if ties == "mid" else before + group
    ranks = xp.empty(ids.size)
    ranks[order] = xp.maximum(mass / total[domain], TINY)[xp.cumsum(differs)]
    return ranks


def _reach(xp: Any, scores: Any, ids: Any, theta: Parameters) -> tuple[Any, Any]:
    """``kernels.cpu.reach``: the range [M] of q̄ that Eq. 1 can reach, on the host."""
    reached = np.zeros((2, theta.n_domains))
    for n in range(theta.n_scorers):
        for i, (reduce, start) in enumerate(((xp.minimum, np.inf), (xp.maximum, -np.inf))):
            extreme = xp.full(theta.n_domains, start, dtype=scores.dtype)
            reduce.at(extreme, ids, scores[:, n])
            known = to_host(extreme).astype(np.float64)
            reached[i] += theta.alpha[:, n] * np.where(np.isfinite(known), known, 0.0)
    return reached[0], reached[1]


def _histogram_ranks(
    xp: Any, merged: Any, ids: Any, tokens: Any, ties: str, tie: Any, grid: Grid, omega: Any
) -> tuple[Any, Any]:
    """Eq. 2 by the bins of ``grid``, for all documents that can have r̄ <= ω: their rows and ranks."""
    n_domains, n_bins = grid.n_domains, grid.n_bins
    position = (merged - xp.asarray(grid.low)[ids]) * xp.asarray(grid.scale)[ids]
    at = ids * n_bins + xp.clip(position, 0, n_bins - 1).astype(np.int64)
    mass = _sums(xp, at, tokens, n_domains * n_bins)
    through = xp.cumsum(mass.reshape(n_domains, n_bins), axis=1)
    before, total = through.ravel() - mass, through[:, -1]
    mean = total / xp.maximum(xp.bincount(ids, minlength=n_domains), 1)
    rows = xp.flatnonzero(before[at] / total[ids] <= xp.asarray(omega)[ids])
    at, q, m, weights = at[rows], merged[rows], ids[rows], tokens[rows]
    ends = []
    for reduce, start in ((xp.minimum, np.inf), (xp.maximum, -np.inf)):
        extreme = xp.full(mass.size, start)
        reduce.at(extreme, at, q)
        equal = q == extreme[at]
        ends += [extreme[at], _sums(xp, at[equal], weights[equal], mass.size)[at].astype(np.float64)]
    group, counted = _mass_in_bin(xp, q, before[at].astype(np.float64), mass[at], ends, mean[m])
    if ties != "paper":
        group = (0.5 if ties == "mid" else unit_interval(tie[rows])) * group
    return rows, xp.maximum((counted + group) / total[m], TINY)


def _mass_in_bin(xp: Any, q: Any, before: Any, mass: Any, ends: list[Any], mean: Any) -> tuple[Any, Any]:
    """As ``kernels.cpu.mass_at``: tokens taken to have the same q̄, and tokens before these."""
    lowest, at_lowest, highest, at_highest = ends
    inner = mass - at_lowest - at_highest
    group = xp.minimum(mean, inner)
    width = xp.where(highest > lowest, highest - lowest, 1.0)
    between = before + (at_lowest + (inner - group) * ((q - lowest) / width))
    at_end, at_start = q == highest, q == lowest
    group = xp.where(at_end, at_highest, xp.where(at_start, at_lowest, group))
    return group, xp.where(at_end, before + (mass - at_highest), xp.where(at_start, before, between))


def _value(xp: Any, ranks: Any, rows: Any, ids: Any, theta: Parameters) -> Any:
    """Eq. 3 of all documents, of which only ``rows`` [k], with ``ranks`` [k], can be in the window."""
    lam, omega, eta, epsilon = (xp.asarray(getattr(theta, name)) for name in ("lam", "omega", "eta", "epsilon"))
    inside = ranks <= omega[ids[rows]]
    rows, r = rows[inside], ranks[inside]
    m = ids[rows]
    value = epsilon[ids]
    value[rows] += (2.0 / (1.0 + xp.exp(-lam[m] * (omega[m] - r)))) ** eta[m]
    return value


def _draw(xp: Any, value: Any, hashes: Any) -> Any:
    """floor(S) + [u < S − floor(S)] as int32."""
    bad = ~((value >= 0) & (value < np.iinfo(np.int32).max))
    if bad.any():
        raise InputError(
            f"value: {int(bad.sum())} are negative, not finite or above int32, first {float(value[bad][0])}; give what "
            f"sampling_value returns, and θ of smaller eta or epsilon if it is that large"
        )
    whole = xp.floor(value)
    return (whole + (unit_interval(hashes) < value - whole)).astype(np.int32)
