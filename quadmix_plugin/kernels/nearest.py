"""The nearest centroid of every vector, compiled by numba: each vector is computed alone, in one order of additions.

A matrix product would be faster and rounds by how many rows it has; here the company of a vector changes no bit.
"""

from math import sqrt
from typing import Any

import numpy as np
from numba import njit

_jit: Any = njit(cache=True, nogil=True, error_model="numpy")


@_jit
def nearest(vectors: Any, transposed: Any, cosine: bool, cluster: Any, distance: Any) -> None:
    """Fills in ``cluster`` [n], the centroid of least distance, the first of equals, and ``distance`` [n] to it.

    ``vectors`` float32 [n, d] and ``transposed`` float32 [d, K], the centroids. ``cosine``: 1 - x·c, of vectors and
    centroids of length one; otherwise |x - c|. Centroids are compared in float32, the distance is a sum in float64.
    """
    d, k = transposed.shape
    sums = np.empty(k, dtype=np.float32)
    for i in range(vectors.shape[0]):
        sums[:] = 0
        for j in range(d):
            x = vectors[i, j]
            if cosine:
                for c in range(k):
                    sums[c] -= x * transposed[j, c]
            else:
                for c in range(k):
                    difference = x - transposed[j, c]
                    sums[c] += difference * difference
        best = np.argmin(sums)
        total = 0.0
        for j in range(d):
            x, centre = np.float64(vectors[i, j]), np.float64(transposed[j, best])
            total += x * centre if cosine else (x - centre) * (x - centre)
        cluster[i] = best
        distance[i] = max(1.0 - total, 0.0) if cosine else sqrt(total)
