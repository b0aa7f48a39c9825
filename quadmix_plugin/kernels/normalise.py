# pyright: reportUntypedFunctionDecorator=false
"""σ of many scores: linear interpolation between knots, several times as fast as ``np.interp``.

A table over the leading bits of a score says between which few knots it lies, whatever the scale of the scores.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from quadmix_plugin.score_sketch import ordered_bits

_TABLE_BITS = 16


def _column(kind: types.Type) -> types.Array:
    return types.Array(kind, 1, "C", readonly=True)  # Arrow's columns are read-only; others may be passed as well


# One signature: else each mixture of read-only and writable columns would be compiled by itself.
_SIGNATURE = types.int64(
    _column(types.float32),
    _column(types.int32),
    _column(types.float32),
    _column(types.float64),
    _column(types.float64),
    _column(types.int32),
    types.int64,
    types.int64,
    types.Array(types.float32, 1, "C"),
)


@dataclass(frozen=True, eq=False)
class Interpolation:
    """Knots made ready for ``__call__``."""

    knots: NDArray[np.float32]
    value: NDArray[np.float64]
    slope: NDArray[np.float64]
    below: NDArray[np.int32]
    base: int
    shift: int

    @classmethod
    def of(cls, knots: NDArray[np.float32], value: NDArray[np.float64]) -> Self:
        """From knots [k], strictly ascending float32 without -0.0, and the value at each, monotone float64 [k]."""
        key = ordered_bits(knots).astype(np.int64)
        shift = max(0, int(key[-1] - key[0]).bit_length() - _TABLE_BITS)
        bucket = (key - key[0]) >> shift
        # below[b]: the last knot of the buckets before b, where a search for a score in bucket b begins.
        below = np.maximum(np.searchsorted(bucket, np.arange(bucket[-1] + 2)) - 1, 0).astype(np.int32)
        slope = np.diff(value) / np.diff(knots.astype(np.float64))
        return cls(knots, value, slope, below, int(key[0]), shift)

    def __call__(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
        """The values at finite scores [n] as float32 [n], constant outside the knots; and how many are not finite.

        Monotone in the score: rounding never carries a value past that of the next knot.
        """
        column = np.ascontiguousarray(scores)
        out = np.empty(column.size, dtype=np.float32)
        bad = _interpolate(
            column, column.view(np.int32), self.knots, self.value, self.slope, self.below, self.base, self.shift, out
        )
        return out, int(bad)


@njit(_SIGNATURE, cache=True, nogil=True)
def _interpolate(scores, bits, knots, value, slope, below, base, shift, out):  # pragma: no cover - compiled
    bad = 0
    last = knots.size - 1
    for i in range(scores.size):
        score = scores[i]
        if not np.isfinite(score):
            bad += 1
            out[i] = np.nan
        elif score <= knots[0]:
            out[i] = value[0]
        elif score >= knots[last]:
            out[i] = value[last]
        else:
            key = np.int64(bits[i]) if score != 0 else 0  # -0.0 has the bits of another integer
            if key < 0:
                key ^= 0x7FFFFFFF
            bucket = (key - base) >> shift
            low, high = below[bucket], below[bucket + 1] + 1
            while high - low > 1:  # knots[low] <= score < knots[high]
                middle = (low + high) >> 1
                if knots[middle] <= score:
                    low = middle
                else:
                    high = middle
            found = slope[low] * (np.float64(score) - np.float64(knots[low])) + value[low]
            if value[low + 1] >= value[low]:
                out[i] = min(found, value[low + 1])
            else:
                out[i] = max(found, value[low + 1])
    return bad
