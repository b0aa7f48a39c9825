"""Numbers for words and n-grams, compiled by numba: every distinct one gets the next number at its first occurrence.

A table is ``slots`` (a power of two of them; the number of an entry, or -1) and ``keys`` (of the entries, by number).
The caller sees to it that at least half of the slots stay free and that ``keys`` has room for what may come.
"""

from typing import Any

import numpy as np
from numba import njit

SPACE, WORD, PUNCTUATION = 0, 1, 2
_START, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)  # FNV-1a
_GOLDEN, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)

_jit: Any = njit(cache=True, nogil=True, error_model="numpy")


@_jit
def tokens(characters: Any, kinds: Any, begin: Any, end: Any) -> int:
    """Fills in where each run of word characters or of punctuation begins and ends; returns how many there are.

    ``characters`` [c] code points, ``kinds`` the kind of every code point, ``begin`` and ``end`` [>= c].
    """
    count, last = 0, SPACE
    for i in range(characters.size):
        kind = kinds[characters[i]]
        if kind != last:
            if last != SPACE:
                end[count] = i
                count += 1
            begin[count] = i
            last = kind
    if last != SPACE:
        end[count] = characters.size
        count += 1
    return count


@_jit
def intern_words(
    characters: Any, begin: Any, end: Any, slots: Any, keys: Any, stored: Any, bounds: Any, size: int, out: Any
) -> int:
    """Fills ``out`` [t] with the number of every token; returns the new size of the table.

    The characters of entry i are ``stored[bounds[i] : bounds[i + 1]]``; tokens are compared by them, so two words
    never share a number.
    """
    for t in range(begin.size):
        first, length = begin[t], end[t] - begin[t]
        key = _START
        for i in range(first, first + length):
            key = (key ^ np.uint64(characters[i])) * _PRIME
        slot = _slot(key, slots.size)
        while slots[slot] >= 0:
            entry = slots[slot]
            if keys[entry] == key and bounds[entry + 1] - bounds[entry] == length:
                at, same = bounds[entry], True
                for i in range(length):
                    same &= stored[at + i] == characters[first + i]
                if same:
                    break
            slot = (slot + 1) & (slots.size - 1)
        if slots[slot] < 0:
            slots[slot], keys[size] = size, key
            at = bounds[size]
            stored[at : at + length] = characters[first : first + length]
            size += 1
            bounds[size] = at + length
        out[t] = slots[slot]
    return size


@_jit
def intern_ngrams(shorter: Any, words: Any, length: int, ends: Any, slots: Any, keys: Any, size: int, out: Any) -> int:
    """Fills ``out`` [t] with the number of the n-gram that begins at each token, -1 where its document is too short.

    ``shorter`` [t]: the numbers of the n-grams of one word less, of which the last is ``words`` [t] further on;
    ``ends`` [d]: the token behind the last one of each document. Returns the new size of the table.
    """
    first = 0
    for d in range(ends.size):
        for t in range(first, ends[d]):
            if t + length > ends[d]:
                out[t] = -1
                continue
            key = np.uint64(shorter[t]) << _SHIFT | np.uint64(words[t + length - 1])
            slot = _slot(key, slots.size)
            while slots[slot] >= 0 and keys[slots[slot]] != key:
                slot = (slot + 1) & (slots.size - 1)
            if slots[slot] < 0:
                slots[slot], keys[size] = size, key
                size += 1
            out[t] = slots[slot]
        first = ends[d]
    return size


@_jit
def place(keys: Any, size: int, slots: Any) -> None:
    """Puts the first ``size`` entries into empty slots."""
    for entry in range(size):
        slot = _slot(keys[entry], slots.size)
        while slots[slot] >= 0:
            slot = (slot + 1) & (slots.size - 1)
        slots[slot] = entry


@_jit
def add_up(numbers: Any, buckets: Any, values: Any, ends: Any, sums: Any) -> None:
    """Adds to ``sums`` [d] the values of the buckets of each document's n-grams, one after the other; -1 is none."""
    first = 0
    for d in range(ends.size):
        total = sums[d]
        for t in range(first, ends[d]):
            if numbers[t] >= 0:
                total += values[buckets[numbers[t]]]
        sums[d] = total
        first = ends[d]


@_jit
def _slot(key: Any, n_slots: int) -> Any:
    mixed = key * _GOLDEN
    return np.int64((mixed ^ (mixed >> _SHIFT)) & np.uint64(n_slots - 1))
