"""Eq. 3 of QuaDMix as pure functions: from the quality rank to expected copies, and the draw of the integer.

The draw of a document is a function of its id and the seed alone (see ``hashing``). Arrays may be numpy's, or cupy's on
a GPU.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.arguments import as_floats, require_domain_ids, require_drawable, require_one_length, require_tokens
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import DocIds, hash64, stream_hash, tie_hash
from quadmix_plugin.kernels import arrays
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.rank_map import Method, RankMap, Ties
from quadmix_plugin.rank_states import BINS, Grid, Hashes, RankHistogram, RankSample
from quadmix_plugin.ranking import merge_quality

Array = NDArray[np.float64]


def sampling_value(rank: ArrayLike, domain_ids: ArrayLike, theta: Parameters) -> Array:
    """Eq. 3: S = (2·sigmoid(λ(ω − r̄)))^η + ε where r̄ <= ω, else ε.

    Shapes: ``rank`` [n] in (0, 1], ``domain_ids`` [n]. Returns float64 [n], the expected number of copies; inside
    the window 1 + ε <= S <= 2^η + ε. The power is evaluated only there, since λ(r̄ − ω) reaches 1000.

    Raises:
        InputError: a rank outside (0, 1], a domain id outside θ, or lengths that differ.
    """
    if arrays.on_device(rank, domain_ids):
        return arrays.sampling_value(rank, domain_ids, theta)
    from quadmix_plugin.kernels import cpu

    ranks = as_floats(rank, "rank").astype(np.float64, copy=False)
    ids = require_domain_ids(domain_ids, theta.n_domains)
    require_one_length(rank=ranks, domain_ids=ids)
    if ranks.size and not (ranks.min() > 0 and ranks.max() <= 1):  # NaN fails as well
        bad = ranks[~((ranks > 0) & (ranks <= 1))]
        raise InputError(f"rank: {bad.size} outside (0, 1], first {bad[0]}; give what quality_rank returns")
    value = np.empty(ranks.size)
    cpu.value(ranks, ids, cpu.theta_of(theta), value)
    return value


def draw_copies(value: ArrayLike, doc_ids: DocIds, seed: int, stream: int = 0) -> NDArray[np.int32]:
    """The integer number of copies: floor(S) + [u < S − floor(S)] with u = hash64(doc_ids, seed) / 2^64.

    Shapes: ``value`` [n], ``doc_ids`` [n]. Returns int32 [n]. Different θ share their uniforms (common random
    numbers), unless each is given a ``stream`` of its own.

    Raises:
        InputError: lengths that differ, or a value that is negative, not finite or too large for int32.
    """
    if arrays.on_device(value, doc_ids):
        return arrays.draw_copies(value, doc_ids, seed, stream)
    values = as_floats(value, "value").astype(np.float64, copy=False)
    if values.size and not (values.min() >= 0 and values.max() < np.iinfo(np.int32).max):
        bad = values[~((values >= 0) & (values < np.iinfo(np.int32).max))]
        raise InputError(
            f"value: {bad.size} are negative, not finite or above int32, first {bad[0]}; give what sampling_value "
            f"returns"
        )
    hashes = stream_hash(hash64(doc_ids, seed), stream)
    if hashes.shape != values.shape:
        raise InputError(f"value {values.shape} and doc_ids {hashes.shape} must be of one length")
    return draw_hashes(values, hashes)


def draw_hashes(values: Array, hashes: Hashes) -> NDArray[np.int32]:
    """``draw_copies`` by hashes that are there already."""
    from quadmix_plugin.kernels import cpu

    copies = np.empty(values.size, dtype=np.int32)
    cpu.draw(values, hashes, copies)
    return copies


def count_copies(
    normalised: ArrayLike,
    domain_ids: ArrayLike,
    tokens: ArrayLike,
    doc_ids: DocIds,
    theta: Parameters,
    seed: int = 0,
    method: Method = "histogram",
    ties: Ties = "paper",
    bins: int = BINS,
    subset_documents: int = 10_000,
    subset_per_domain: bool = True,
    thin: float = 1.0,
    stream: int = 0,
) -> NDArray[np.int32]:
    """Eq. 1 to 3 and the draw in one call: the number of copies of every document under θ.

    Shapes: ``normalised`` [n, N] is σ(q), smaller = better; the others [n]. Returns int32 [n]. ``method``: how r̄ is
    computed; ``histogram`` takes tokens to lie evenly within each of ``bins`` bins of a domain's q̄, ``subset`` ranks
    against ``subset_documents`` of each domain or of the corpus (see ``rank_map``). ``thin``: factor on every S;
    ``stream``: as in ``draw_copies``.

    For many θ over one table, ``ScoreIndex`` is far faster.

    Raises:
        InputError: as ``merge_quality``, ``quality_rank`` and ``draw_copies``; an unknown ``method``.
    """
    if method not in ("histogram", "exact", "subset"):
        raise InputError(f"method={method!r}; choose 'histogram', 'exact' or 'subset'")
    if arrays.on_device(normalised, domain_ids, tokens, doc_ids):
        return arrays.count_copies(
            normalised, domain_ids, tokens, doc_ids, theta, seed, method, ties, bins, thin, stream
        )  # fmt: skip
    from quadmix_plugin.kernels import cpu

    require_drawable(theta, thin)
    ids, weights = require_domain_ids(domain_ids, theta.n_domains), require_tokens(tokens)
    scores = as_floats(normalised, "normalised")
    merged = merge_quality(scores, ids, theta)
    hashes = hash64(doc_ids, seed)
    require_one_length(normalised=merged, tokens=weights, doc_ids=hashes)
    tie = tie_hash(hashes) if ties == "hash" else np.empty(0, dtype=np.uint64)
    if method == "subset":
        sample = RankSample.of(merged, ids, weights, hashes, subset_documents, subset_per_domain)
        value = sampling_value(RankMap.of_sample(sample, ties).rank(merged, ids, tie), ids, theta)
        return draw_hashes(value * thin, stream_hash(hashes, stream))
    histogram = RankHistogram.of(merged, ids, weights, Grid(*cpu.reach(scores, ids, theta.alpha), bins))
    ranks = RankMap.of_histogram(histogram, ties)
    if method == "exact":
        ranks = exact_tail(ranks, histogram, merged, ids, weights, tie, theta)
    copies = np.empty(ids.size, dtype=np.int32)
    cpu.count(
        merged, ids, stream_hash(hashes, stream), tie, ranks.arrays, ranks.cut(theta.omega), cpu.theta_of(theta, thin),
        cpu.TIES[ties], copies,
    )  # fmt: skip
    return copies


def exact_tail(
    ranks: RankMap,
    histogram: RankHistogram,
    merged: Array,
    ids: NDArray[np.int64],
    tokens: NDArray[np.int64],
    tie: Hashes,
    theta: Parameters,
) -> RankMap:
    """``ranks`` made exact wherever r̄ <= ω is possible: only those documents are sorted."""
    last = histogram.last_bins(theta.omega)
    rows = histogram.grid.rows_upto(last, merged, ids)
    tail = RankMap.exact(merged[rows], ids[rows], tokens[rows], ranks.ties, tie[rows] if ranks.ties == "hash" else None)
    return ranks.with_exact_tail(tail, last)
