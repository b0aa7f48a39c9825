"""The file format of fastText, walked from the first byte to the last without fastText.

fastText's loader believes every number in a file; a damaged one makes it allocate without end, or crash at the first
document. ``inspect`` finds what contradicts itself. It does not read words or weights into memory.
"""

import mmap
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = (793712314).to_bytes(4, "little")  # the first bytes of every fastText model
HIERARCHICAL_SOFTMAX, SOFTMAX = 1, 3  # losses under which the probabilities of all labels sum to 1

_VERSIONS = (11, 12)
_SUPERVISED = 3
_LOSSES = (1, 2, 3, 4)
_LONGEST_NGRAM = 1000  # far beyond use; more would make fastText loop for hours
_LARGEST_WEIGHT = 1e6  # far beyond what training gives
_CENTROIDS = 256  # of a product quantiser
_ENTRY_TAIL = 10  # NUL, count, type: the bytes from a word's end to the next word


class DamagedError(ValueError):
    """The file contradicts itself."""


class NoClassifierError(ValueError):
    """A sound file of fastText, but of word vectors."""


@dataclass(frozen=True)
class Contents:
    """What a file says of itself: labels and loss, and a line of its own words to try it with."""

    labels: list[str]
    loss: int
    canary: bytes


def inspect(path: str | Path) -> Contents:
    """Walks a fastText file from its first byte to its last and checks that its parts agree.

    A file that was cut, or changed in a length or size, is always found; a changed word or a small change of a weight
    is not. Of a quantised file (``.ftz``) the structure is checked and the centroids, not the codes.

    Raises:
        DamagedError: the parts do not agree; the message is without the path.
        NoClassifierError: the file holds word vectors.
    """
    with Path(path).open("rb") as file:
        data = _Bytes(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    magic, version = data.numbers("4si")
    require(magic == MAGIC and version in _VERSIONS, f"version {version}, known are 11 and 12")
    dim, _, _, _, _, ngrams, loss, model, bucket, minn, maxn, _, _ = data.numbers("12id")
    if model in (1, 2):
        raise NoClassifierError("word vectors, not a classifier")
    require(model == _SUPERVISED and loss in _LOSSES, f"model {model}, loss {loss}")
    require(1 <= ngrams <= _LONGEST_NGRAM, f"word n-grams of {ngrams}")
    require(0 <= minn <= _LONGEST_NGRAM and 0 <= maxn <= _LONGEST_NGRAM, f"letter n-grams of {minn} to {maxn}")
    needs_buckets = ngrams > 1 or maxn > 0
    require(bucket >= needs_buckets, f"n-grams in {bucket} buckets")  # fastText divides by it
    words, labels, pruned = _dictionary(data)
    n_words = len(words)
    quantised = data.flag()
    require(quantised or pruned is None, "pruned but not quantised")
    rows = n_words + (bucket if pruned is None else pruned)
    _matrix(data, "input", (rows, dim), quantised)
    _matrix(data, "output", (len(labels), dim), data.flag() and quantised)
    require(data.at == data.size, f"{data.size - data.at} bytes too many")
    try:
        names = [label.decode() for label in labels]
    except UnicodeDecodeError as error:
        raise DamagedError("a label is not UTF-8") from error
    require(len(set(names)) == len(names), "a label occurs twice")
    return Contents(names, loss, b" ".join(words.first(20)) + b"\n")


class _Bytes:
    """A file's bytes, read in order; reading beyond the end is an error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self.at = data, len(data), 0

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        """Little-endian numbers as ``struct`` names them."""
        kinds = "<" + kinds
        return struct.unpack_from(kinds, self.data, self._pass(struct.calcsize(kinds)))

    def values(self, dtype: str, count: int) -> NDArray[Any]:
        """An array over the file, nothing copied."""
        require(count >= 0, f"an array of {count} values")
        return np.frombuffer(self.data, dtype, count, self._pass(count * np.dtype(dtype).itemsize))

    def flag(self) -> bool:
        """A byte that is 0 or 1."""
        (value,) = self.numbers("B")
        require(value <= 1, f"a flag is {value}")
        return bool(value)

    def _pass(self, count: int) -> int:
        start = self.at
        self.at += count
        require(self.at <= self.size, f"{self.size} bytes long, needs {self.at} or more")
        return start


@dataclass(frozen=True)
class _Words:
    """The words of a dictionary as positions in the file: ``begins`` and ``ends`` int64 [n]."""

    data: mmap.mmap
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return self.ends.size

    def first(self, count: int) -> list[bytes]:
        """The first ``count`` words."""
        return [self.data[b:e] for b, e in zip(self.begins[:count], self.ends[:count], strict=True)]


def _dictionary(data: _Bytes) -> tuple[_Words, list[bytes], int | None]:
    """Words, labels, and the number of n-grams that pruning left (None: not pruned)."""
    size, n_words, n_labels, n_tokens, n_pruned = data.numbers("3i2q")
    sizes = f"{size} entries of {n_words} words and {n_labels} labels"
    require(n_words >= 0 and n_labels >= 1 and size == n_words + n_labels, sizes)
    begin, positions, find = data.at, array("q"), data.data.find
    at = begin
    for _ in range(size):
        end = find(b"\0", at)
        if end <= at or end + _ENTRY_TAIL > data.size:
            raise DamagedError(f"the dictionary breaks off at entry {len(positions)} of {size}")
        positions.append(end)
        at = end + _ENTRY_TAIL
    data.at = at
    ends = np.frombuffer(positions, dtype=np.int64)
    begins = np.concatenate([[begin], ends[:-1] + _ENTRY_TAIL])
    raw = np.frombuffer(data.data, np.uint8)
    require(bool((raw[ends + 9] == (np.arange(size) >= n_words)).all()), "words and labels are mixed")
    counts = raw[(ends + 1)[:, None] + np.arange(8)].view("<i8").ravel()
    require(bool((counts >= 0).all() and (counts <= n_tokens).all()), "a word is counted more often than all words")
    labels = _Words(data.data, begins[n_words:], ends[n_words:]).first(n_labels)
    words = _Words(data.data, begins[:n_words], ends[:n_words])
    if n_pruned < 0:
        require(n_pruned == -1, f"{n_pruned} n-grams after pruning")
        return words, labels, None
    places = data.values("<i4", 2 * n_pruned)[1::2]
    require(bool((places >= 0).all() and (places < n_pruned).all()), "an n-gram points outside the matrix")
    return words, labels, n_pruned


def _matrix(data: _Bytes, name: str, shape: tuple[int, int], quantised: bool) -> None:
    """Passes over one matrix: its shape must be ``shape`` and its weights plausible."""
    if not quantised:
        _check_shape(name, data.numbers("2q"), shape)
        _check_weights(name, data.values("<f4", shape[0] * shape[1]))
        return
    with_norms = data.flag()
    *found, n_codes = data.numbers("2qi")
    _check_shape(name, tuple(found), shape)
    data.values("u1", n_codes)
    parts = _quantiser(data, name, shape[1])
    require(n_codes == shape[0] * parts, f"{name}: {n_codes} codes for {shape[0]} rows of {parts}")
    if with_norms:
        data.values("u1", shape[0])
        _quantiser(data, name, 1)


def _quantiser(data: _Bytes, name: str, dim: int) -> int:
    """Passes over a product quantiser; the number of parts that it makes of a row."""
    found, parts, width, last = data.numbers("4i")
    sound = found == dim and width >= 1 and 1 <= last <= width and (parts - 1) * width + last == dim
    require(sound, f"{name}: rows of {found} in {parts} parts of {width}, the last of {last}; needs {dim}")
    _check_weights(name, data.values("<f4", dim * _CENTROIDS))
    return parts


def _check_shape(name: str, found: tuple[int, ...], shape: tuple[int, int]) -> None:
    require(found == shape and min(shape) >= 1, f"{name}: a matrix of {found}, not {shape}")


def _check_weights(name: str, weights: NDArray[np.float32]) -> None:
    sound = weights.max() <= _LARGEST_WEIGHT and weights.min() >= -_LARGEST_WEIGHT
    require(bool(sound), f"{name}: a weight is not finite or beyond ±1e6")


def require(sound: bool, reason: str) -> None:
    """Raises ``DamagedError`` with the reason unless ``sound``."""
    if not sound:
        raise DamagedError(reason)
