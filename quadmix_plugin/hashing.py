"""The randomness of every draw: a 64-bit hash of the document's id and a seed, and nothing else.

A document's draw therefore does not change with partitioning, row order, executor, worker count or a retry.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError

DocIds = NDArray[np.integer] | Sequence[str] | Sequence[int] | pa.Array | pa.ChunkedArray

_GOLDEN = 0x9E3779B97F4A7C15
_SEED_STRIDE = 0xD1342543DE82EF95  # odd: distinct seeds give distant streams, seed 0 the plain hash
_MASK = 0xFFFFFFFFFFFFFFFF
TIES_STREAM = 0x71E5  # the stream that breaks ties, so that a tie's order says nothing of its draw


def hash64(doc_ids: DocIds, seed: int = 0) -> NDArray[np.uint64]:
    """A 64-bit hash of every document id.

    Integers: splitmix64 (Steele, Lea and Flood 2014) of id + seed·c with an odd c; with seed 0 the first output of
    the generator seeded by the id. Strings: xxhash64 of the UTF-8 bytes with this seed. Returns uint64 [n]. Integer
    ids may be a cupy array; the hash then is one.

    Raises:
        InputError: ids that are neither all integers nor all strings, or missing.
    """
    integers = integer_ids(doc_ids)
    if integers is not None:
        return splitmix64(integers, seed)
    import xxhash

    ids: Any = doc_ids
    if isinstance(ids, pa.Array | pa.ChunkedArray):
        ids = ids.to_pylist()
    digest, seed64 = xxhash.xxh64_intdigest, int(seed) & _MASK
    try:
        return np.fromiter((digest(i.encode(), seed64) for i in ids), dtype=np.uint64, count=len(ids))
    except (AttributeError, UnicodeEncodeError) as error:
        bad = next(i for i in ids if not isinstance(i, str) or not _is_utf8(i))
        raise InputError(f"doc_id {bad!r}: give all ids as integers or all as strings of valid Unicode") from error


def splitmix64(values: Any, seed: int = 0) -> Any:
    """splitmix64 of unsigned integers [n] under a seed; numpy or cupy in, the same out."""
    step = np.uint64(splitmix64_step(seed))
    if not isinstance(values, np.ndarray):
        return mix64(values + step)
    from quadmix_plugin.kernels import cpu

    out = np.empty(values.size, dtype=np.uint64)
    cpu.splitmix64(values, step, out)
    return out


def splitmix64_step(seed: int) -> int:
    """What ``splitmix64`` adds to a value under this seed."""
    return (int(seed) * _SEED_STRIDE + _GOLDEN) & _MASK


def stream_hash(hashes: Any, stream: int) -> Any:
    """The hash of stream number ``stream`` from ``hash64``'s: the same for stream 0, independent for every other.

    Parameters that shall not share their uniforms draw from streams of their own.
    """
    return hashes if stream == 0 else splitmix64(hashes, stream)


def tie_hash(hashes: Any) -> Any:
    """What breaks ties of q̄ under ``ties: hash``, from ``hash64``'s; the lower comes first."""
    return splitmix64(hashes, TIES_STREAM)


def unit_interval(hashes: Any) -> Any:
    """Hashes [n] as float64 in [0, 1), from their upper 53 bits."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform(doc_ids: DocIds, seed: int = 0) -> Any:
    """u = hash64(doc_id, seed) / 2^64 as float64 in [0, 1)."""
    return unit_interval(hash64(doc_ids, seed))


def mix64(z: Any) -> Any:
    """The finaliser of splitmix64, of unsigned integers."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def integer_ids(doc_ids: Any) -> Any:
    """Integer ids as uint64, on the device that they are on; None where they are strings."""
    if hasattr(doc_ids, "__cuda_array_interface__"):
        if doc_ids.dtype.kind not in "iu":
            raise InputError(f"doc_id: type {doc_ids.dtype} on a GPU; give integers, or strings as an Arrow array")
        return doc_ids.astype(np.uint64)
    if isinstance(doc_ids, pa.Array | pa.ChunkedArray):
        if doc_ids.null_count:
            raise InputError(f"doc_id: {doc_ids.null_count} missing; every document needs an id")
        if not pa.types.is_integer(doc_ids.type):
            return None
        doc_ids = doc_ids.to_numpy()
    elif isinstance(next(iter(doc_ids), None), str):
        return None  # and no fixed-width array of strings, whose size is that of the longest id
    array = np.asarray(doc_ids)
    if array.ndim != 1:
        raise InputError(f"doc_id: shape {array.shape}; give one id for each document")
    if array.size == 0:
        return array.astype(np.uint64)
    if array.dtype == np.int64:
        return array.view(np.uint64)
    return array.astype(np.uint64, copy=False) if array.dtype.kind in "iu" else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
