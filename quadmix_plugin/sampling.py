"""Eq. 3 of QuaDMix: from the quality rank to an expected number of copies, and the draw of the integer.

The draw of a document is a function of its id and the seed alone: it does not change with partitioning, row
order, executor, worker count or a retry.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.ranking import Ties, merge_quality, quality_rank, require_domain_ids

Array = NDArray[np.float64]
DocIds = NDArray[np.integer] | Sequence[str] | Sequence[int] | pa.Array | pa.ChunkedArray


def sampling_value(rank: ArrayLike, domain_ids: ArrayLike, theta: Parameters) -> Array:
    """Eq. 3: S = (2·sigmoid(λ(ω − r̄)))^η + ε where r̄ <= ω, else ε.

    Shapes: ``rank`` [n] in (0, 1], ``domain_ids`` [n]. Returns float64 [n], the expected number of copies; inside
    the window 1 + ε <= S <= 2^η + ε. The power is evaluated only there, since λ(r̄ − ω) reaches 1000.

    Raises:
        InputError: a rank outside (0, 1], a domain id outside θ, or lengths that differ.
    """
    ranks = np.asarray(rank, dtype=np.float64)
    ids = require_domain_ids(domain_ids, theta.n_domains)
    if ranks.shape != ids.shape or ranks.ndim != 1:
        raise InputError(f"rank {ranks.shape} and domain_ids {ids.shape} must be one-dimensional and of one length")
    if not ((ranks > 0) & (ranks <= 1)).all():
        bad = ranks[~((ranks > 0) & (ranks <= 1))]
        raise InputError(f"rank: {bad.size} outside (0, 1], first {bad[0]}; give what quality_rank returns")
    value = theta.epsilon[ids]
    inside = ranks <= theta.omega[ids]
    m = ids[inside]
    value[inside] += (2.0 * expit(theta.lam[m] * (theta.omega[m] - ranks[inside]))) ** theta.eta[m]
    return value


def draw_copies(value: ArrayLike, doc_ids: DocIds, seed: int) -> NDArray[np.int32]:
    """The integer number of copies: floor(S) + [u < S − floor(S)] with u = ``uniform(doc_ids, seed)``.

    Shapes: ``value`` [n], ``doc_ids`` [n]. Returns int32 [n].

    Raises:
        InputError: lengths that differ, or a value that is negative, not finite or too large for int32.
    """
    values = np.asarray(value, dtype=np.float64)
    if (bad := ~((values >= 0) & (values < np.iinfo(np.int32).max))).any():
        raise InputError(
            f"value: {int(bad.sum())} are negative, not finite or above int32, first {values[bad].flat[0]}; give what "
            f"sampling_value returns"
        )
    u = uniform(doc_ids, seed)
    if u.shape != values.shape:
        raise InputError(f"value {values.shape} and doc_ids {u.shape} must be of one length")
    whole = np.floor(values)
    return (whole + (u < values - whole)).astype(np.int32)


def count_copies(
    normalised: ArrayLike,
    domain_ids: ArrayLike,
    tokens: ArrayLike,
    doc_ids: DocIds,
    theta: Parameters,
    seed: int = 0,
    method: Literal["exact"] = "exact",
    ties: Ties = "paper",
) -> NDArray[np.int32]:
    """Eq. 1 to 3 and the draw in one call: the number of copies of every document under θ.

    Shapes: ``normalised`` [n, N] is σ(q), smaller = better; the others [n]. Returns int32 [n]. ``method``: how r̄ is
    computed.

    Raises:
        InputError: as ``merge_quality``, ``quality_rank`` and ``draw_copies``; an unknown ``method``.
    """
    if method != "exact":
        raise InputError(f"method={method!r}; this version computes ranks with 'exact' only")
    merged = merge_quality(normalised, domain_ids, theta)
    rank = quality_rank(merged, domain_ids, tokens, ties)
    return draw_copies(sampling_value(rank, domain_ids, theta), doc_ids, seed)


_GOLDEN = 0x9E3779B97F4A7C15
_SEED_STRIDE = 0xD1342543DE82EF95  # odd: distinct seeds give distant streams, seed 0 the plain hash
_MASK = 0xFFFFFFFFFFFFFFFF


def hash64(doc_ids: DocIds, seed: int = 0) -> NDArray[np.uint64]:
    """A 64-bit hash of every document id.

    Integers: splitmix64 (Steele, Lea and Flood 2014) of id + seed·c with an odd c; with seed 0 the first output of
    the generator seeded by the id. Strings: xxhash64 of the UTF-8 bytes with this seed. Returns uint64 [n].

    Raises:
        InputError: ids that are neither all integers nor all strings, or missing.
    """
    integers = _integer_ids(doc_ids)
    if integers is not None:
        with np.errstate(over="ignore"):
            z = integers + np.uint64((int(seed) * _SEED_STRIDE + _GOLDEN) & _MASK)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            return z ^ (z >> np.uint64(31))
    import xxhash

    ids: Any = doc_ids
    if isinstance(ids, pa.Array | pa.ChunkedArray):
        ids = ids.to_pylist()
    try:
        digests = [xxhash.xxh64_intdigest(i.encode(), int(seed) & _MASK) for i in ids]
    except (AttributeError, UnicodeEncodeError) as error:
        bad = next(i for i in ids if not isinstance(i, str) or not _is_utf8(i))
        raise InputError(f"doc_id {bad!r}: give all ids as integers or all as strings of valid Unicode") from error
    return np.array(digests, dtype=np.uint64)


def uniform(doc_ids: DocIds, seed: int = 0) -> Array:
    """u = hash64(doc_id, seed) / 2^64 as float64 in [0, 1), from the upper 53 bits."""
    return (hash64(doc_ids, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _integer_ids(doc_ids: Any) -> NDArray[np.uint64] | None:
    if isinstance(doc_ids, pa.Array | pa.ChunkedArray):
        if doc_ids.null_count:
            raise InputError(f"doc_id: {doc_ids.null_count} missing; every document needs an id")
        if not pa.types.is_integer(doc_ids.type):
            return None
        doc_ids = doc_ids.to_numpy()
    elif isinstance(next(iter(doc_ids), None), str):
        return None  # and no fixed-width array of strings, whose size is that of the longest id
    array = np.asarray(doc_ids)
    if array.size == 0:
        return array.astype(np.uint64)
    return array.astype(np.uint64) if array.dtype.kind in "iu" else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
