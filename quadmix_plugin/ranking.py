"""Eq. 1 and Eq. 2 of QuaDMix as pure functions: merged quality and its token-weighted rank within the domain.

Arrays may be numpy's, or cupy's on a GPU. For a corpus that does not fit into memory, or for ranks that shall be
kept for later documents, see ``rank_map``.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.arguments import as_floats, require_domain_ids, require_finite, require_one_length
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import DocIds, hash64, tie_hash
from quadmix_plugin.kernels import arrays
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.rank_map import Ties, exact_ranks

Array = NDArray[np.float64]


def merge_quality(normalised: ArrayLike, domain_ids: ArrayLike, theta: Parameters) -> Array:
    """Eq. 1: q̄ = Σ_n α_{n,m}·σ_n(q_n); smaller is better.

    Shapes: ``normalised`` [n, N], σ(q), finite, smaller = better; ``domain_ids`` [n] in [0, M). Returns float64 [n].
    The sum runs over scorers in order, in float64, so that a document's q̄ never depends on its neighbours.

    Raises:
        InputError: a shape that does not fit θ, a domain id outside θ, or a value that is not finite.
    """
    if arrays.on_device(normalised, domain_ids):
        return arrays.merge_quality(normalised, domain_ids, theta)
    from quadmix_plugin.kernels import cpu

    scores = as_floats(normalised, "normalised")
    ids = require_domain_ids(domain_ids, theta.n_domains)
    require_one_length(domain_ids=ids)
    if scores.ndim != 2 or scores.shape != (ids.size, theta.n_scorers):
        raise InputError(
            f"normalised: shape {scores.shape}; give one row for each of the {ids.size} documents and one column "
            f"for each of the {theta.n_scorers} scorers of the parameters"
        )
    merged = np.empty(ids.size)
    cpu.merge(scores, ids, theta.alpha, merged)
    require_finite(merged, "normalised")
    return merged


def quality_rank(
    merged: ArrayLike,
    domain_ids: ArrayLike,
    tokens: ArrayLike,
    ties: Ties = "paper",
    doc_ids: DocIds | None = None,
    seed: int = 0,
) -> Array:
    """Eq. 2, exact: r̄ = tokens of the domain with q̄_x <= q̄, divided by all tokens of the domain.

    Shapes: all [n]; ``tokens`` positive integers. Returns float64 [n] in (0, 1]. ``ties``: ``paper`` counts the whole
    group of equal q̄ and ``mid`` half of it, so equal q̄ get equal r̄; ``hash`` puts the group in the order of a hash of
    ``doc_ids``, which it needs, and ``seed``.

    Raises:
        InputError: shapes that differ, q̄ not finite, a token count that is not a positive integer, or ``hash``
            without ids.
    """
    if arrays.on_device(merged, domain_ids, tokens):
        return arrays.quality_rank(merged, domain_ids, tokens, ties, doc_ids, seed)
    hashes = None
    if ties == "hash":
        if doc_ids is None:
            raise InputError("ties='hash' needs doc_ids: equal merged quality is ordered by their hash")
        hashes = tie_hash(hash64(doc_ids, seed))
    return exact_ranks(merged, domain_ids, tokens, ties, hashes)
