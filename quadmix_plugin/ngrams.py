"""Hashed n-gram features of texts, as DSIR counts them (Xie et al. 2023, arXiv 2302.03169): exact, and fast.

Words and n-grams are numbered as they are first seen, so that only distinct ones are hashed, once in a thread. What
is remembered is bounded, and changes no result.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import pairwise

import numpy as np
import regex
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.kernels import interning
from quadmix_plugin.portions import portions

SMOOTHING = 1e-8
_AT_ONCE = 1 << 20  # characters
# N-grams of one length; about 35 bytes each, with the text of those that longer ones need about 120.
_REMEMBERED = 1 << 22
_thread = threading.local()


@dataclass(frozen=True)
class NgramBuckets:
    r"""Features of a text: how many of its n-grams of 1 to ``ngrams`` words fall into each of ``n_buckets``.

    Words: of the lower-cased text, what NLTK's WordPunctTokenizer finds (``\w+|[^\w\s]+``, since NLTK 3.10 by the
    package ``regex``). The bucket of an n-gram: SHA-256 of its words, joined by spaces, modulo ``n_buckets``. The same
    as ``get_ngram_counts`` of the package ``data-selection`` 1.0.3.

    Raises:
        InputError: fewer than one word or bucket, or buckets of more than 31 bits; by the methods, a text that cannot
            be encoded.
    """

    n_buckets: int = 10_000
    ngrams: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.n_buckets < 1 << 31:
            raise InputError(f"n_buckets: {self.n_buckets}; give 1 to {(1 << 31) - 1:,}, such as 10,000")
        if self.ngrams < 1:
            raise InputError(f"ngrams: {self.ngrams}; give at least 1 (words alone), such as 2")

    def counts(self, texts: Iterable[str]) -> NDArray[np.int64]:
        """The features of all these texts together [n_buckets]."""
        total = np.zeros(self.n_buckets, dtype=np.int64)
        for some in portions(texts, _AT_ONCE):
            seen = _memory(self).read(some)
            for numbers, buckets in seen.ngrams:
                total += np.bincount(buckets[numbers[numbers >= 0]], minlength=self.n_buckets)
        return total

    def sums(self, texts: Sequence[str], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """features · ``values`` [n_buckets] of every text [n], and its number of words [n].

        A text's n-grams are added in their order, all words first, so its sum is the same to the bit in any company.
        """
        sums, words = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
        first = 0
        for some in portions(texts, _AT_ONCE):
            seen = _memory(self).read(some)
            here = slice(first, first + len(some))
            words[here] = np.diff(seen.ends, prepend=0)
            for numbers, buckets in seen.ngrams:
                interning.add_up(numbers, buckets, values, seen.ends, sums[here])
            first += len(some)
        return sums, words


def log_ratio(target_counts: NDArray[np.int64], raw_counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """log p̂(bucket) - log q̂(bucket) [n_buckets], both smoothed by 1e-8, as the package does: a bucket's weight."""
    target, raw = (counts / max(int(counts.sum()), 1) for counts in (target_counts, raw_counts))
    return np.log(target + SMOOTHING) - np.log(raw + SMOOTHING)


@dataclass(frozen=True, eq=False)
class _Seen:
    """Texts as numbers.

    ``ngrams``: of each length the number of the n-gram at every token [t], -1 for none, and the bucket of every number;
    ``ends`` [d]: the token behind each text.
    """

    ngrams: list[tuple[NDArray[np.int32], NDArray[np.int32]]]
    ends: NDArray[np.int64]


class _Length:
    """The distinct n-grams of one length so far: their keys, buckets and, where longer ones need it, their text."""

    def __init__(self) -> None:
        self.size = 0
        self.keys = np.empty(0, dtype=np.uint64)
        self.slots = np.full(1, -1, dtype=np.int32)
        self.buckets = np.empty(0, dtype=np.int32)
        self.texts: list[bytes] = []

    def reserve(self, more: int) -> None:
        """Makes room for so many further entries."""
        needed = self.size + more
        if needed > self.keys.size:
            self.keys, self.buckets = (_larger(array, needed) for array in (self.keys, self.buckets))
        if 2 * needed > self.slots.size:
            self.slots = np.full(1 << (2 * needed).bit_length(), -1, dtype=np.int32)
            interning.place(self.keys, self.size, self.slots)


class _Memory:
    """The n-grams of all texts so far, and the characters of their words."""

    def __init__(self, features: NgramBuckets) -> None:
        self.features = features
        self.lengths = [_Length() for _ in range(features.ngrams)]
        self.stored = np.empty(0, dtype=np.uint32)
        self.bounds = np.zeros(1, dtype=np.int64)

    def read(self, texts: Sequence[str]) -> _Seen:
        """The numbers of all n-grams of these texts, whose buckets are then known."""
        characters, begin, end, ends = _tokens(texts)
        numbers = [words := self._words(characters, begin, end)]
        for n, length in enumerate(self.lengths[1:], start=2):
            length.reserve(words.size)
            found, before = np.empty(words.size, dtype=np.int32), length.size
            length.size = interning.intern_ngrams(numbers[-1], words, n, ends, length.slots, length.keys, before, found)
            self._hash_ngrams(n, before)
            numbers.append(found)
        return _Seen([(found, length.buckets) for found, length in zip(numbers, self.lengths, strict=True)], ends)

    def _words(self, characters: NDArray[np.uint32], begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray:
        words = self.lengths[0]
        words.reserve(begin.size)
        self.stored = _larger(self.stored, int(self.bounds[words.size]) + characters.size)
        self.bounds = _larger(self.bounds, words.keys.size + 1)
        found, before = np.empty(begin.size, dtype=np.int32), words.size
        words.size = interning.intern_words(
            characters, begin, end, words.slots, words.keys, self.stored, self.bounds, before, found
        )
        bounds = self.bounds[before : words.size + 1]
        text = self.stored[bounds[0] : bounds[-1]].tobytes().decode("utf-32-le")
        bounds = (bounds - bounds[0]).tolist()
        new = [text[i:j].encode() for i, j in pairwise(bounds)]
        self._store(words, before, new, keep=self.features.ngrams > 1)
        return found

    def _hash_ngrams(self, n: int, before: int) -> None:
        length, shorter, words = self.lengths[n - 1], self.lengths[n - 2].texts, self.lengths[0].texts
        keys = length.keys[before : length.size]
        pairs = zip((keys >> np.uint64(32)).tolist(), (keys & np.uint64(0xFFFFFFFF)).tolist(), strict=True)
        self._store(length, before, [b"%b %b" % (shorter[i], words[j]) for i, j in pairs], keep=n < len(self.lengths))

    def _store(self, length: _Length, before: int, new: list[bytes], keep: bool) -> None:
        n_buckets, number = self.features.n_buckets, int.from_bytes
        length.buckets[before : length.size] = [number(sha256(text).digest(), "big") % n_buckets for text in new]
        if keep:
            length.texts += new


def _memory(features: NgramBuckets) -> _Memory:
    """This thread's memory; a new one where the last is of other features, or full."""
    memory = getattr(_thread, "memory", None)
    if memory is None or memory.features != features or any(n.size > _REMEMBERED for n in memory.lengths):
        memory = _thread.memory = _Memory(features)
    return memory


def _tokens(
    texts: Sequence[str],
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Code points of the lower-cased texts, where tokens begin and end in them, and the token behind each text."""
    lower = [text.lower() for text in texts]
    try:
        characters = np.frombuffer("\n".join(lower).encode("utf-32-le"), dtype=np.uint32)
    except UnicodeEncodeError as error:
        where = error.object[max(error.start - 30, 0) : error.end + 30]
        raise InputError(f"text: {where!r}: half a surrogate pair, which is no character; repair the text") from error
    begin, end = np.empty((2, characters.size), dtype=np.int64)
    count = interning.tokens(characters, _kinds(), begin, end)
    behind = np.cumsum(np.fromiter(map(len, lower), dtype=np.int64, count=len(lower)) + 1)
    return characters, begin[:count], end[:count], np.searchsorted(begin[:count], behind)


@cache
def _kinds() -> NDArray[np.uint8]:
    """Whether each code point is a space, of a word, or punctuation [0x110000], by the expression's own classes."""
    every = "".join(map(chr, range(0x110000)))
    kinds = np.full(len(every), interning.PUNCTUATION, dtype=np.uint8)
    for expression, kind in ((r"\w+", interning.WORD), (r"\s+", interning.SPACE)):
        for run in regex.finditer(expression, every):
            kinds[run.start() : run.end()] = kind
    return kinds


def _larger(array: NDArray, size: int) -> NDArray:
    """The array itself where it has room for ``size`` entries, else a copy that has room for twice as many."""
    if array.size >= size:
        return array
    copy = np.empty(2 * size, dtype=array.dtype)
    copy[: array.size] = array
    return copy
