"""Eq. 3, the draw and the whole count: against plain loops, and the same for every partition, order, process and id."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loops import count, draw, eq_1, eq_2, eq_3, hash_of

from examples import EXAMPLES, FEWER, TIES, documents, numbers, parameters
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64, stream_hash, tie_hash, uniform, unit_interval
from quadmix_plugin.parameters import Parameters, sample_parameters
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.rank_states import BINS, Grid, RankHistogram, RankSample
from quadmix_plugin.ranking import merge_quality, quality_rank
from quadmix_plugin.sampling import count_copies, draw_copies, sampling_value

SEED = st.integers(0, 2**32 - 1)
CURVE = ("lam", "omega", "eta", "epsilon")
METHODS = ("histogram", "exact", "subset")


@settings(max_examples=EXAMPLES, deadline=None)
@given(SEED, st.lists(st.floats(1e-300, 1) | st.sampled_from([0.1, 0.5, 1.0]), min_size=1, max_size=20))
def test_eq_3_is_the_papers(seed: int, numbers_drawn: list[float]) -> None:
    rng = np.random.default_rng(seed)
    theta = parameters(rng, 1, 3)
    ranks = np.array([*numbers_drawn, *theta.omega, *np.nextafter(theta.omega, 0)])
    domains = rng.integers(0, 3, ranks.size)
    columns = [getattr(theta, name)[domains] for name in CURVE]
    expected = [eq_3(*row) for row in np.column_stack([ranks, *columns]).tolist()]
    np.testing.assert_allclose(sampling_value(ranks, domains, theta), expected, rtol=1e-13, atol=0)


@pytest.mark.filterwarnings("error")
@settings(max_examples=EXAMPLES, deadline=None)
@given(SEED, st.lists(st.floats(1e-300, 1), min_size=2, max_size=30))
def test_value_falls_with_rank_and_stays_in_its_bounds(seed: int, ranks: list[float]) -> None:
    theta = parameters(np.random.default_rng(seed), 1, 1)
    ordered = np.sort(np.array([*ranks, theta.omega[0], min(1.0, np.nextafter(theta.omega[0], 2)), 1e-300, 1.0]))
    with np.errstate(all="raise", under="ignore"):
        value = sampling_value(ordered, np.zeros(ordered.size, int), theta)
    eta, epsilon, omega = theta.eta[0], theta.epsilon[0], theta.omega[0]
    assert (np.diff(value) <= 1e-15 * value[:-1]).all()
    inside = value[ordered <= omega]
    assert (inside >= 1 + epsilon).all()
    assert (inside <= (2**eta + epsilon) * (1 + 1e-15)).all()
    assert (value[ordered > omega] == epsilon).all()
    # r̄ = ω itself is inside, with sigmoid(0) = 1/2.
    assert sampling_value([omega], [0], theta)[0] == 1 + epsilon


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("eta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("omega", "rank"), [(1.0, 1e-300), (1e-9, 1.0), (1.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("lam", [1000.0, 1e6, 1e300])
def test_the_steepest_curves_raise_no_floating_point_warning(eta: float, omega: float, rank: float, lam: float) -> None:
    theta = Parameters([[1.0]], [lam], [omega], [eta], [0.001])
    with np.errstate(all="raise", under="ignore"):
        value = sampling_value([rank], [0], theta)[0]
    middle = 1.0 if rank == omega else 2.0
    assert value == pytest.approx((middle**eta if rank <= omega else 0.0) + 0.001, rel=1e-12)


VALUE = st.floats(0, 4) | st.sampled_from([0.0, 1.0, 2.0, 1e9, 1 - 2.0**-53, 2.0**-53, 1e-300, 0.5])


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.tuples(VALUE, st.integers(-(2**63), 2**63 - 1)), max_size=20), SEED, st.integers(0, 5))
def test_the_draw_is_the_plain_one(rows: list[tuple[float, int]], seed: int, stream: int) -> None:
    hashes = [hash_of(i, seed) for _, i in rows]
    expected = [draw(s, hash_of(h, stream) if stream else h) for (s, _), h in zip(rows, hashes, strict=True)]
    copies = draw_copies([s for s, _ in rows], [i for _, i in rows], seed, stream)
    assert copies.dtype == np.int32
    assert copies.tolist() == expected


@settings(max_examples=FEWER, deadline=None)
@given(st.lists(st.floats(0, 4), min_size=1, max_size=10), st.floats(0, 1), SEED)
def test_more_expected_copies_never_draw_fewer(values: list[float], more: float, seed: int) -> None:
    # Common random numbers: u is the document's, whatever θ.
    ids = np.arange(len(values)) + seed
    low, high = draw_copies(values, ids, 7), draw_copies(np.array(values) + more, ids, 7)
    assert (low <= high).all()
    assert (np.floor(values) <= low).all()
    assert (low <= np.floor(values) + 1).all()


def test_a_draw_takes_one_more_exactly_for_the_share_of_u() -> None:
    ids = np.arange(2000)
    u = uniform(ids, 4)
    np.testing.assert_array_equal(draw_copies(np.full(2000, 1.25), ids, 4), 1 + (u < 0.25))
    np.testing.assert_array_equal(draw_copies(u, ids, 4), 0)  # u < u does not hold
    np.testing.assert_array_equal(draw_copies(u + 2.0**-53, ids, 4), 1)  # u is a multiple of 2^-53
    np.testing.assert_array_equal(draw_copies([2.0] * 2000, ids, 4), 2)


@pytest.mark.parametrize("method", METHODS)
def test_outside_the_window_a_document_is_drawn_exactly_where_u_is_below_epsilon(method: str) -> None:
    # To the last bit: ε is u itself, the next number that u can be, and half way between.
    ids = np.arange(400)
    u = uniform(ids, 1)
    scores, zeros = ids[:, None] / 400, np.zeros(400, int)
    for i in np.flatnonzero((u < 0.5) & (ids > 300))[:40]:
        for epsilon, drawn in ((u[i], 0), (u[i] + 2.0**-54, 1), (u[i] + 2.0**-53, 1)):
            theta = Parameters([[1.0]], [1.0], [0.1], [1.0], [epsilon])
            copies = count_copies(scores, zeros, zeros + 1, ids, theta, 1, method)
            assert copies[i] == drawn
            np.testing.assert_array_equal(copies[300:], u[300:] < epsilon)


def test_streams_of_their_own_draw_independently() -> None:
    ids = np.arange(40_000)
    draws = np.stack([draw_copies(np.full(ids.size, 0.5), ids, 0, stream) for stream in range(4)])
    correlation = np.corrcoef(draws)
    assert np.abs(correlation - np.eye(4)).max() < 5 / math.sqrt(ids.size)
    np.testing.assert_array_equal(draws[0], draw_copies(np.full(ids.size, 0.5), ids, 0))


def test_selected_tokens_meet_their_expectation() -> None:
    # Seeds are fixed, so 3σ is either met for good or the draw is biased.
    rng = np.random.default_rng(6)
    n = 20_000
    domains, tokens, doc_ids = rng.integers(0, 4, n), rng.integers(1, 2000, n), np.arange(n)
    for seed, theta in enumerate(sample_parameters(10, 3, 4, seed=8)):
        rank = quality_rank(merge_quality(rng.random((n, 3)), domains, theta), domains, tokens)
        value = sampling_value(rank, domains, theta)
        got = float((tokens * draw_copies(value, doc_ids, seed)).sum())
        assert abs(got - float((tokens * value).sum())) < 3 * _spread(value, tokens)


def test_a_thousand_draws_scatter_about_their_expectation_as_they_must() -> None:
    # Of 1,000 normal deviations 2.7 are beyond 3σ on average and 13 hardly ever; their mean is within 3/√1000 of 0.
    rng = np.random.default_rng(7)
    deviations = []
    for seed in range(1000):
        n = 400
        theta = parameters(rng, 2, 3, 0.5)
        domains, tokens = rng.integers(0, 3, n), np.rint(rng.lognormal(5, 1, n)).astype(np.int64) + 1
        rank = quality_rank(merge_quality(rng.random((n, 2)), domains, theta), domains, tokens)
        value = sampling_value(rank, domains, theta)
        got = float((tokens * draw_copies(value, rng.integers(0, 2**62, n), seed)).sum())
        if (spread := _spread(value, tokens)) > 0:
            deviations.append((got - float((tokens * value).sum())) / spread)
    assert len(deviations) > 950
    assert np.mean(np.abs(deviations) > 3) < 0.013
    assert abs(np.mean(deviations)) < 3 / math.sqrt(len(deviations))
    assert 0.9 < np.std(deviations) < 1.1


def _spread(value: np.ndarray, tokens: np.ndarray) -> float:
    """σ of Σ tokens·copies."""
    fraction = value - np.floor(value)
    return math.sqrt(float((tokens.astype(float) ** 2 * fraction * (1 - fraction)).sum()))


def _counted(data, theta: Parameters, **options) -> np.ndarray:
    return count_copies(*data, theta, **options)


@settings(max_examples=EXAMPLES, deadline=None)
@given(documents(30, 4, 2, np.float32) | documents(30, 4, 3), SEED, st.sampled_from(TIES))
def test_exact_copies_are_those_of_the_plain_loop(data, seed: int, ties: str) -> None:
    theta = parameters(np.random.default_rng(seed), data.values.shape[1], 4)
    copies = _counted(data, theta, seed=seed, method="exact", ties=ties, bins=1 + seed % 50)
    assert copies.dtype == np.int32
    assert copies.tolist() == count(*data, theta, seed, ties)


@settings(max_examples=EXAMPLES, deadline=None)
@given(documents(30, 4, 2, np.float32) | documents(30, 4, 3), SEED, st.sampled_from(["paper", "mid"]))
def test_a_histogram_of_at_most_two_values_in_a_bin_is_exact(data, seed: int, ties: str) -> None:
    theta = parameters(np.random.default_rng(seed), data.values.shape[1], 4)
    copies = _counted(data, theta, seed=seed, ties=ties)  # type: ignore[arg-type]
    expected = np.array(count(*data, theta, seed, ties))
    sure = np.isin(data.domain_ids, _domains_of_two_values_in_a_bin(data, theta))
    assert copies[sure].tolist() == expected[sure].tolist()


def _domains_of_two_values_in_a_bin(data, theta: Parameters, bins: int = BINS) -> list[int]:
    """Domains of which no bin holds more than two distinct q̄; near an edge of bins all are taken to share one."""
    merged = eq_1(data.values, data.domain_ids, theta.alpha)
    sure = []
    for m in set(data.domain_ids.tolist()):
        rows = np.flatnonzero(data.domain_ids == m)
        ends = np.array([data.values[rows].min(axis=0), data.values[rows].max(axis=0)], dtype=float)
        low, high = ends @ theta.alpha[m]
        q = np.array(sorted({merged[i] for i in rows}))
        with np.errstate(divide="ignore", over="ignore"):
            scale = bins / (high - low)
        place = (q - low) * (scale if np.isfinite(scale) else 0.0)  # a range too narrow for bins is one bin
        if all(np.sum(np.abs(place - at) <= 1.001) <= 2 for at in place):
            sure.append(m)
    return sure


@pytest.mark.parametrize("n_scorers", [1, 3])
def test_few_values_are_counted_exactly_by_either_method(n_scorers: int) -> None:
    # Not a rare case of the test above: documents of some ten different q̄ each, and none is left out here.
    rng = np.random.default_rng(3)
    for seed in range(100):
        n = 60
        scores, domains, tokens = rng.integers(0, 4, (n, n_scorers)) / 4, rng.integers(0, 4, n), rng.integers(1, 99, n)
        theta = parameters(rng, n_scorers, 4)
        data = (scores, domains, tokens, rng.permutation(n))
        expected = count(*data, theta, seed, "paper")
        assert count_copies(*data, theta, seed).tolist() == expected
        assert count_copies(*data, theta, seed, "exact").tolist() == expected


@settings(max_examples=FEWER, deadline=None)
@given(
    documents(300, 5, 2, np.float32), SEED, st.sampled_from(METHODS), st.sampled_from(TIES),
    st.sampled_from([1, 2, 16, 1000, 4096]), st.sampled_from([1.0, 0.02, 1.7]), st.sampled_from([0, 1, 77]),
)  # fmt: skip
def test_one_call_is_the_four_steps(
    data, seed: int, method: str, ties: str, bins: int, thin: float, stream: int
) -> None:
    theta = parameters(np.random.default_rng(seed), 2, 5)
    merged = merge_quality(data.values, data.domain_ids, theta)
    options = {"seed": seed, "method": method, "ties": ties, "bins": bins, "thin": thin, "stream": stream}
    hashes = hash64(data.doc_ids, seed)
    if method == "subset":
        options |= {"subset_documents": 1 + bins % 37, "subset_per_domain": seed % 2 == 0}
        sample = RankSample.of(merged, data.domain_ids, data.tokens, hashes, 1 + bins % 37, seed % 2 == 0)
        rank = RankMap.of_sample(sample, ties).rank(merged, data.domain_ids, tie_hash(hashes))
    elif method == "exact":
        rank = quality_rank(merged, data.domain_ids, data.tokens, ties, data.doc_ids, seed)
    else:
        low, high = np.zeros((2, 5))
        for m in set(data.domain_ids.tolist()):
            rows = data.values[data.domain_ids == m]
            low[m], high[m] = (merge_quality([end(axis=0)], [m], theta)[0] for end in (rows.min, rows.max))
        histogram = RankHistogram.of(merged, data.domain_ids, data.tokens, Grid(low, high, bins))
        ranks = RankMap.of_histogram(histogram, ties)
        rank = ranks.rank(merged, data.domain_ids, tie_hash(hashes))
    expected = draw_copies(sampling_value(rank, data.domain_ids, theta) * thin, data.doc_ids, seed, stream)
    copies = _counted(data, theta, **options)
    np.testing.assert_array_equal(copies, expected)


@settings(max_examples=EXAMPLES, deadline=None)
@given(documents(200, 5, 2), SEED, st.sampled_from(METHODS), st.sampled_from(TIES))
def test_copies_do_not_depend_on_row_order(data, seed: int, method: str, ties: str) -> None:
    rng = np.random.default_rng(seed)
    theta, order = parameters(rng, 2, 5), rng.permutation(len(data.tokens))
    copies = _counted(data, theta, seed=seed, method=method, ties=ties)
    np.testing.assert_array_equal(_counted(data.take(order), theta, seed=seed, method=method, ties=ties), copies[order])


@pytest.mark.parametrize("kind", ["integers", "strings"])
@pytest.mark.parametrize("parts", [1, 7, 64])
@pytest.mark.parametrize("method", ["exact", "histogram"])
def test_copies_do_not_depend_on_partitions_and_row_order(kind: str, parts: int, method: str) -> None:
    rng = np.random.default_rng(9)
    n = 3000
    scores, domains, tokens = rng.integers(0, 50, (n, 3)) / 50, rng.integers(0, 5, n), rng.integers(1, 900, n)
    doc_ids = rng.permutation(n)
    ids = pa.array(doc_ids if kind == "integers" else [f"doc-{i}" for i in doc_ids])
    theta = sample_parameters(1, 3, 5, seed=1)[0]
    whole = count_copies(scores, domains, tokens, ids, theta, seed=4, method=method)
    assert 0 < (whole > 0).sum() < n
    part = rng.integers(0, parts, n)
    pieces = [rng.permutation(np.flatnonzero(part == p)) for p in range(parts)]
    merged = [merge_quality(scores[rows], domains[rows], theta) for rows in pieces]
    if method == "exact":
        maps = [RankMap.exact(q, domains[rows], tokens[rows]) for q, rows in zip(merged, pieces, strict=True)]
        ranks = RankMap.merge(maps[::-1])
    else:
        ends = [[end(scores[domains == m], axis=0) for m in range(5)] for end in (np.min, np.max)]
        grid = Grid(*(merge_quality(np.array(end), np.arange(5), theta) for end in ends))
        states = [RankHistogram.of(q, domains[r], tokens[r], grid) for q, r in zip(merged, pieces, strict=True)]
        ranks = RankMap.of_histogram(RankHistogram.merge(states[::-1]))
    for q, rows in zip(merged, pieces, strict=True):
        value = sampling_value(ranks.rank(q, domains[rows]), domains[rows], theta)
        np.testing.assert_array_equal(draw_copies(value, ids.take(pa.array(rows)), 4), whole[rows])


def test_scores_may_be_of_any_number_type() -> None:
    rng = np.random.default_rng(2)
    scores, theta = rng.integers(0, 9, (200, 2)), sample_parameters(1, 2, 3, seed=5)[0]
    rest = (rng.integers(0, 3, 200), rng.integers(1, 9, 200), np.arange(200), theta)
    for method in ("exact", "histogram"):
        expected = count_copies(scores.astype(float), *rest, method=method)
        kinds: list = [scores.tolist(), scores.astype(np.int8), scores.astype("f"), scores.astype(np.float16)]
        kinds += [scores.astype(object), scores.astype(">f4"), np.asfortranarray(scores.astype(float))]
        for given_scores in kinds:
            np.testing.assert_array_equal(count_copies(given_scores, *rest, method=method), expected)


def _zipf(n: int) -> tuple[np.ndarray, ...]:
    """26 domains after Zipf's law, three correlated scores clipped at both ends, lognormal tokens."""
    rng = np.random.default_rng(11)
    share = np.cumsum(1 / np.arange(1, 27))
    domains = np.searchsorted(share / share[-1], rng.random(n), side="right")
    common = 0.3 * rng.standard_normal(26)[domains] + rng.standard_normal(n)
    scores = np.clip(0.8 * common[:, None] + 0.6 * rng.standard_normal((n, 3)), -1.9, 1.6).astype(np.float32)
    tokens = np.maximum(np.rint(rng.lognormal(6.3, 1.1, n)), 1).astype(np.int64)
    return scores, domains, tokens, rng.permutation(n)


def test_a_million_documents_are_selected_alike_by_either_method() -> None:
    scores, domains, tokens, doc_ids = _zipf(1_000_000)
    total = np.bincount(domains, tokens, 26)
    longest = np.array([tokens[domains == m].max() for m in range(26)])
    errors = []
    for drawn in sample_parameters(8, 3, 26, seed=2):
        # S = 1 within ω and 0 outside: what is selected is the window itself.
        theta = Parameters(drawn.alpha, np.ones(26), np.full(26, 0.05), np.zeros(26), np.zeros(26))
        exact, histogram = (
            np.bincount(
                domains, tokens * count_copies(scores, domains, tokens, doc_ids, theta, method=method, bins=4096), 26
            )
            for method in ("exact", "histogram")
        )
        errors.append(np.abs(histogram / exact - 1))
        # Exact is the share itself, up to the document at the edge, which the paper's rule leaves out.
        assert (exact <= 0.05 * total).all()
        assert (exact >= 0.05 * total - longest).all()
        assert (np.abs(histogram - exact) <= longest).all()
    assert np.mean(errors) <= 0.001


def test_copies_at_the_clipped_ends_of_a_domain_are_exact() -> None:
    # Clipped scores put great tie groups on the lowest and highest q̄: bins' ends, where a histogram knows the rank.
    rng = np.random.default_rng(4)
    n = 20_000
    scores = np.clip(rng.normal(size=(n, 1)), -1.0, 1.0)
    domains, tokens, ids = rng.integers(0, 3, n), rng.integers(1, 2000, n), np.arange(n)
    ends = np.isin(scores[:, 0], (-1.0, 1.0))
    assert 0.25 < ends.mean() < 0.4
    for ties in ("paper", "mid"):
        for omega in (0.05, 0.158, 0.2, 0.9, 1.0):
            theta = Parameters(np.ones((3, 1)), np.full(3, 9.0), np.full(3, omega), np.ones(3), np.full(3, 0.01))
            got, exact = (count_copies(scores, domains, tokens, ids, theta, method=m, ties=ties) for m in METHODS[:2])
            np.testing.assert_array_equal(got[ends], exact[ends])


def test_a_group_that_straddles_omega_is_dropped_by_the_paper_and_split_by_hash() -> None:
    # 1,000 equal documents and ω = .1: the paper's rule gives all of them rank 1; by hash a tenth is inside.
    n = 1000
    rest = (np.zeros((n, 1)), np.zeros(n, int), np.ones(n, int), np.arange(n))
    theta = Parameters([[1.0]], [1.0], [0.1], [0.0], [0.0])
    for method in ("exact", "histogram"):
        assert count_copies(*rest, theta, method=method).sum() == 0
        assert count_copies(*rest, theta, method=method, ties="mid").sum() == 0
    assert count_copies(*rest, theta, method="exact", ties="hash").sum() == 100
    taken = count_copies(*rest, theta, method="histogram", ties="hash")
    assert abs(taken.sum() - 100) < 5 * math.sqrt(90)
    # Independent of the draw: with ε = 0 and S = 1 inside, who is inside says nothing of u.
    u = unit_interval(hash64(np.arange(n)))
    assert abs(u[taken > 0].mean() - 0.5) < 5 / math.sqrt(12 * 90)
    assert stream_hash(hash64(np.arange(n)), 0).size == n


PROCESS = """
import json
from quadmix_plugin import count_copies, sample_parameters
ids = [f"doc-{i}" for i in range(500)]
theta = sample_parameters(1, 2, 3, seed=5)[0]
scores = [[(i * 37 % 101) / 101, (i * 53 % 97) / 97] for i in range(500)]
copies = count_copies(scores, [i % 3 for i in range(500)], [i % 9 + 1 for i in range(500)], ids, theta, seed=2)
print(json.dumps(copies.tolist()))
"""


def test_another_process_with_another_hash_seed_draws_the_same() -> None:
    results = set()
    for hash_seed in ("0", "1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, check=True
        )
        results.add(run.stdout)
    assert len(results) == 1
    assert sum(json.loads(results.pop())) > 0


THETA = Parameters([[1.0], [1.0]], [1, 1], [0.1, 0.1], [1, 1], [0, 0])


@pytest.mark.parametrize(
    ("rank", "domains", "says"),
    [
        ([0.0, 0.5], [0, 1], r"rank: 1 outside \(0, 1\], first 0.0; give what quality_rank returns"),
        ([1.5], [0], r"rank: 1 outside \(0, 1\], first 1.5"),
        ([math.nan], [0], r"rank: 1 outside \(0, 1\], first nan"),
        ([0.5, math.inf, -math.inf], [0, 1, 0], r"rank: 2 outside \(0, 1\], first inf"),
        ([0.5], [0, 1], r"rank \(1,\) and domain_ids \(2,\) must be one-dimensional and of one length"),
        ([[0.5]], [[0]], r"rank \(1, 1\) and domain_ids \(1, 1\) must be one-dimensional"),
        ([0.5], [-1], "domain_ids: 1 outside the range, first -1; give positions from 0 to 1"),
        ([0.5], [2], "domain_ids: 1 outside the range, first 2; give positions from 0 to 1"),
        ([0.5], [0.0], "domain_ids: type float64; give integers"),
        (["best"], [0], "rank.*numbers"),
    ],
)
def test_bad_ranks_are_refused_with_place_value_and_remedy(rank, domains, says: str) -> None:
    with pytest.raises(InputError, match=says):
        sampling_value(rank, domains, THETA)


@pytest.mark.parametrize(
    ("value", "ids", "says"),
    [
        ([-0.5], [1], "value: 1 are negative, not finite or above int32, first -0.5; give what sampling_value returns"),
        ([math.nan], [1], "first nan"),
        ([math.inf], [1], "first inf"),
        ([1.0, 2.0**40], [1, 2], "value: 1 .* above int32, first 1099511627776"),
        ([0.5], [1, 2], r"value \(1,\) and doc_ids \(2,\) must be of one length"),
        ([[0.5]], [1], r"value \(1, 1\) and doc_ids \(1,\)"),
        ([0.5, 0.5], ["a", 1], "doc_id 1: give all ids as integers or all as strings"),
        ([0.5, 0.5], [1, "a"], "doc_id 1: give all ids as integers or all as strings"),
        ([0.5], [1.5], "doc_id 1.5: give all ids"),
        ([0.5], [None], "doc_id None: give all ids"),
        ([0.5], ["\ud800"], r"doc_id '\\ud800': give all ids .* of valid Unicode"),
        ([0.5, 0.5], pa.array([1, None]), "doc_id: 1 missing; every document needs an id"),
        (["many"], [1], "value.*numbers"),
    ],
)
def test_bad_draws_are_refused_with_place_value_and_remedy(value, ids, says: str) -> None:
    with pytest.raises(InputError, match=says):
        draw_copies(value, ids, 0)


GOOD = {"normalised": np.ones((2, 1)), "domain_ids": [0, 1], "tokens": [3, 4], "doc_ids": [1, 2], "theta": THETA}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (
            {"normalised": [[1.0], [math.nan]]},
            r"normalised: 1 of 2 documents .*first rows \[1\]\); drop them or repair",
        ),
        ({"normalised": np.ones((2, 2))}, r"normalised: shape \(2, 2\); give one row for each of the 2 documents"),
        ({"tokens": [3, 0]}, "tokens: 1 documents have 0 tokens; drop empty documents first"),
        ({"tokens": [3, -1]}, "tokens: 1 documents have -1 tokens"),
        ({"tokens": [3.0, 4.0]}, "tokens: type float64; give integers"),
        ({"tokens": [3]}, r"normalised \(2,\), tokens \(1,\) and doc_ids \(2,\) must be .* of one length"),
        ({"doc_ids": [1]}, r"normalised \(2,\), tokens \(2,\) and doc_ids \(1,\) must be .* of one length"),
        ({"doc_ids": [1, None]}, "doc_id 1: give all ids|doc_id None: give all ids"),
        ({"domain_ids": [0, 2]}, "domain_ids: 1 outside the range, first 2; give positions from 0 to 1"),
        ({"method": "sorted"}, "method='sorted'; choose 'histogram', 'exact' or 'subset'"),
        ({"ties": "best"}, "ties='best'; choose 'paper', 'mid' or 'hash'"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_counts_are_refused_with_place_value_and_remedy(method: str, bad: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        count_copies(**{**GOOD, "method": method, **bad})


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("bins", [0, -3])
def test_a_histogram_without_bins_is_refused(method: str, bins: int) -> None:
    with pytest.raises(InputError, match=f"bins.*{bins}"):
        count_copies(**GOOD, method=method, bins=bins)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("eta", "epsilon"), [(40.0, 0.0), (2000.0, 0.0), (1.0, 1e300), (0.0, 2.0**31)])
def test_more_copies_than_an_int32_holds_are_refused(method: str, eta: float, epsilon: float) -> None:
    theta = Parameters([[1.0]], [1000.0], [1.0], [eta], [epsilon])
    with pytest.raises(InputError, match="int32"):
        count_copies([[0.0], [1.0]], [0, 0], [1, 1], [1, 2], theta, method=method)


@pytest.mark.parametrize("ids", [[], np.empty(0), pa.array([], pa.string()), pa.array([], pa.int64())])
@pytest.mark.parametrize(
    ("method", "ties"),
    [
        *((method, ties) for method in METHODS for ties in TIES if (method, ties) != ("exact", "hash")),
        ("exact", "hash"),
    ],
)
def test_no_documents_give_no_copies(ids, method: str, ties: str) -> None:
    options = {"method": method, "ties": ties}
    assert count_copies(np.empty((0, 1)), [], [], ids, THETA, **options).shape == (0,)


def test_ranks_of_the_plain_loop_are_those_of_the_package() -> None:
    # The plain loop that the tests above trust is itself held against quality_rank.
    rng = np.random.default_rng(1)
    merged, domains, tokens = numbers(rng, (300,), "few"), rng.integers(0, 3, 300), rng.integers(1, 9, 300)
    expected = [float(share) for share in eq_2(merged.tolist(), domains, tokens)]
    np.testing.assert_array_equal(quality_rank(merged, domains, tokens), expected)
