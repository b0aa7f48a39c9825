"""ScoreIndex against the pure functions: the same documents to the last one, for any θ, table, order and thread."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import EXAMPLES, FEWER, TIES, Documents, documents, numbers, parameters
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64, tie_hash, uniform
from quadmix_plugin.kernels import cpu
from quadmix_plugin.parameters import Parameters, sample_parameters
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.rank_states import BINS, Grid, RankHistogram
from quadmix_plugin.ranking import merge_quality, quality_rank
from quadmix_plugin.sampling import count_copies, draw_copies, sampling_value
from quadmix_plugin.score_index import ScoreIndex
from quadmix_plugin.selections import Selection

SEED = st.integers(0, 2**32 - 1)
SOME_TIES = st.sampled_from(TIES)
METHODS = ("histogram", "exact")
N_DOMAINS = 6
FIELDS = ("alpha", "lam", "omega", "eta", "epsilon")


def index_of(data, seed: int = 0, **options) -> ScoreIndex:
    return ScoreIndex.of(*data, seed=seed, **{"n_domains": N_DOMAINS, **options})


def equal(selection: Selection, expected: np.ndarray) -> None:
    """The selection is exactly the documents of ``expected`` that have copies."""
    assert selection.copies.dtype == np.int32
    assert (selection.copies > 0).all()
    assert np.unique(selection.rows).size == selection.rows.size
    np.testing.assert_array_equal(selection.by_row(expected.size), expected)


def by_pure_functions(
    data, theta: Parameters, seed: int, method: str, ties: str, thin: float, stream: int, bins: int = BINS
) -> np.ndarray:
    merged = merge_quality(data.values, data.domain_ids, theta)
    if method == "exact":
        rank = quality_rank(merged, data.domain_ids, data.tokens, ties, data.doc_ids, seed)
    else:
        grid = Grid(*cpu.reach(data.values, data.domain_ids, theta.alpha), bins)
        histogram = RankHistogram.of(merged, data.domain_ids, data.tokens, grid)
        tie = tie_hash(hash64(data.doc_ids, seed))
        rank = RankMap.of_histogram(histogram, ties).rank(merged, data.domain_ids, tie)
    return draw_copies(sampling_value(rank, data.domain_ids, theta) * thin, data.doc_ids, seed, stream)


SMALL = documents(60, N_DOMAINS, 3, np.float32) | documents(400, N_DOMAINS, 1, np.float32)


@settings(max_examples=EXAMPLES, deadline=None)
@given(SMALL, SEED, SOME_TIES)
def test_a_selection_is_that_of_count_copies(data, seed: int, ties: str) -> None:
    rng = np.random.default_rng(seed)
    index = index_of(data, seed, bins=1 + seed % 300)
    for method in METHODS:
        theta = parameters(rng, data.values.shape[1], N_DOMAINS)
        expected = count_copies(*data, theta, seed=seed, method=method, ties=ties, bins=1 + seed % 300)
        equal(index.select(theta, method, ties), expected)


@settings(max_examples=FEWER, deadline=None)
@given(
    SMALL, SEED, SOME_TIES, st.sampled_from(METHODS), st.sampled_from([1.0, 0.5, 0.02, 1.7, 1e-9]),
    st.sampled_from([0, 1, 77]),
)  # fmt: skip
def test_thinned_and_in_a_stream_of_its_own_it_is_that_of_the_pure_functions(
    data, seed: int, ties: str, method: str, thin: float, stream: int
) -> None:
    theta = parameters(np.random.default_rng(seed), data.values.shape[1], N_DOMAINS)
    expected = by_pure_functions(data, theta, seed, method, ties, thin, stream)
    equal(index_of(data, seed).select(theta, method, ties, thin, stream), expected)


@settings(max_examples=FEWER, deadline=None)
@given(SMALL, SEED, st.sampled_from(METHODS))
def test_a_selection_does_not_depend_on_row_order(data, seed: int, method: str) -> None:
    rng = np.random.default_rng(seed)
    theta, order = parameters(rng, data.values.shape[1], N_DOMAINS), rng.permutation(len(data.tokens))
    one = index_of(data).select(theta, method)
    other = index_of(data.take(order)).select(theta, method)
    assert dict(zip(one.rows.tolist(), one.copies.tolist(), strict=True)) == dict(
        zip(order[other.rows].tolist(), other.copies.tolist(), strict=True)
    )


@settings(max_examples=FEWER, deadline=None)
@given(
    documents(40, N_DOMAINS, 2, np.float32, values=["few", "equal", "normal", "clipped", "integers"]), SEED, SOME_TIES
)
def test_expectations_are_those_of_a_loop_over_the_pure_functions(data, seed: int, ties: str) -> None:
    rng = np.random.default_rng(seed)
    thetas = [parameters(rng, 2, N_DOMAINS) for _ in range(3)]
    index = index_of(data, seed)
    tokens, scores, copies = index.expect(*(np.stack([getattr(t, name) for t in thetas]) for name in FIELDS), ties)
    for t, theta in enumerate(thetas):
        merged = merge_quality(data.values, data.domain_ids, theta)
        rank = quality_rank(merged, data.domain_ids, data.tokens, ties, data.doc_ids, seed)
        value = sampling_value(rank, data.domain_ids, theta)
        mass = data.tokens * value
        np.testing.assert_allclose(tokens[t], np.bincount(data.domain_ids, mass, N_DOMAINS), rtol=1e-11)
        size = mass @ np.abs(data.values.astype(float))
        assert (np.abs(scores[t] - mass @ data.values.astype(float)) <= 1e-11 * size).all()
        np.testing.assert_allclose(copies[t], value.sum(), rtol=1e-11)


def table(seed: int, n: int = 60_000, n_domains: int = 5, n_scorers: int = 3) -> Documents:
    """Domains of more documents than the window's guess takes a sample from, and some of few or none."""
    rng = np.random.default_rng(seed)
    share = np.cumsum(1 / np.arange(1, n_domains) ** 2)
    domain_ids = np.searchsorted(share / share[-1], rng.random(n), side="right")  # none of the last
    common = rng.normal(size=n)[:, None]
    scores = np.clip(0.8 * common + 0.6 * rng.normal(size=(n, n_scorers)), -1.9, 1.6).astype(np.float32)
    tokens = np.maximum(np.rint(rng.lognormal(6.3, 1.1, n)), 1).astype(np.int64)
    return Documents(scores, domain_ids, tokens, rng.permutation(n))


@pytest.mark.parametrize("n_scorers", [1, 2, 3, 6])
def test_large_domains_of_which_only_the_best_leaves_are_read(n_scorers: int) -> None:
    data = table(n_scorers, n_scorers=n_scorers)
    assert np.bincount(data.domain_ids).max() > 4 * 2048
    index = index_of(data, 3, n_domains=5)
    rng = np.random.default_rng(n_scorers)
    thetas = [*sample_parameters(4, n_scorers, 5, seed=1), *(parameters(rng, n_scorers, 5) for _ in range(12))]
    for i, theta in enumerate(thetas):
        for method in METHODS:
            ties = TIES[i % 3]
            expected = count_copies(*data, theta, seed=3, method=method, ties=ties)
            equal(index.select(theta, method, ties), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_window_guessed_too_short_is_read_again(method: str) -> None:
    # Documents that lie where the sample is taken have their tokens among the best, all others among the worst.
    n = 40_000
    scores = np.linspace(0, 1, n, dtype=np.float32)[:, None]
    tokens = np.where(scores[:, 0] < 0.5, 1, 1000)
    sampled = np.linspace(0, n - 1, 2048).astype(np.int64)
    tokens[sampled] = np.where(scores[sampled, 0] < 0.5, 1000, 1)
    data = Documents(scores, np.zeros(n, int), tokens, np.arange(n))
    index = index_of(data, n_domains=1)
    for omega in (0.01, 0.05, 0.1, 0.3, 0.6, 0.99):
        theta = Parameters([[1.0]], [20.0], [omega], [1.0], [0.001])
        equal(index.select(theta, method), count_copies(*data, theta, method=method))
        if method == "exact":
            value = sampling_value(quality_rank(scores[:, 0], data.domain_ids, tokens), data.domain_ids, theta)
            found = index.expect(*(getattr(theta, name)[None] for name in FIELDS))
            assert found[0][0, 0] == pytest.approx(float(tokens @ value), rel=1e-11)


@pytest.mark.parametrize(
    "epsilon", [0.0, 1e-6, 0.001, 1 / 256, np.nextafter(1 / 256, 1), 0.01, 0.999, 1.0, 1.0003, 2.5]
)
@pytest.mark.parametrize("thin", [1.0, 0.3, 2.0])
def test_documents_outside_the_window_are_drawn_by_epsilon(epsilon: float, thin: float) -> None:
    data = table(9, 30_000)
    index = index_of(data, 5, n_domains=5)
    drawn = sample_parameters(1, 3, 5, seed=4)[0]
    theta = Parameters(drawn.alpha, drawn.lam, drawn.omega, drawn.eta, np.full(5, epsilon))
    for method in METHODS:
        for stream in (0, 3):
            expected = by_pure_functions(data, theta, 5, method, "paper", thin, stream)
            equal(index.select(theta, method, thin=thin, stream=stream), expected)


@pytest.mark.parametrize("limit", [1 / 256, 0.4])
def test_outside_the_window_a_document_is_drawn_exactly_where_u_is_below_epsilon(limit: float) -> None:
    # To the last bit, whether the index lists the documents of low u or scans for them.
    data = table(9, 20_000)
    index = index_of(data, n_domains=5)
    drawn = sample_parameters(1, 3, 5, seed=4)[0]
    worst = data.values.min(axis=1) > 0.5  # far from every window
    u = uniform(data.doc_ids)
    for i in np.flatnonzero(worst & (u < limit) & (u > limit / 2))[:10]:
        for epsilon in (u[i], u[i] + 2.0**-54, u[i] + 2.0**-53):
            theta = Parameters(drawn.alpha, drawn.lam, drawn.omega, drawn.eta, np.full(5, epsilon))
            copies = index.select(theta).by_row(20_000)
            assert copies[i] == (u[i] < epsilon)
            np.testing.assert_array_equal(copies[worst], u[worst] < epsilon)


@pytest.mark.parametrize(
    ("lam", "omega", "eta"), [(0, 1, 1), (1000, 1, 2), (1000, 1e-6, 1), (1, 0.5, 0), (1000, 0.05, 1), (50, 1, 3.7)]
)
def test_the_corners_of_theta_are_selected_exactly(lam: float, omega: float, eta: float) -> None:
    data = table(2, 30_000)
    index = index_of(data, n_domains=5)
    alpha = np.tile([0.0, 1.0, 0.0], (5, 1))
    theta = Parameters(alpha, np.full(5, lam), np.full(5, omega), np.full(5, eta), np.zeros(5))
    for method in METHODS:
        for ties in TIES:
            expected = count_copies(*data, theta, method=method, ties=ties)
            equal(index.select(theta, method, ties), expected)


@pytest.mark.parametrize("n_domains", [257, 3000])
def test_hundreds_of_domains_are_told_apart(n_domains: int) -> None:
    rng = np.random.default_rng(n_domains)
    n = 5000
    data = Documents(
        rng.normal(size=(n, 2)).astype(np.float32), rng.integers(0, n_domains, n), rng.integers(1, 99, n),
        rng.permutation(n),
    )  # fmt: skip
    index = index_of(data, n_domains=n_domains)
    theta = parameters(rng, 2, n_domains)
    for method in METHODS:
        equal(index.select(theta, method), count_copies(*data, theta, method=method))


def test_more_scorers_than_a_key_has_bits_are_all_read() -> None:
    rng = np.random.default_rng(0)
    data = Documents(
        rng.normal(size=(3000, 40)).astype(np.float32), rng.integers(0, 3, 3000), rng.integers(1, 99, 3000),
        np.arange(3000),
    )  # fmt: skip
    theta = sample_parameters(1, 40, 3, seed=0)[0]
    equal(index_of(data, n_domains=3).select(theta), count_copies(*data, theta))


@pytest.mark.parametrize("kind", ["equal", "few", "neighbours", "tiny", "huge"])
def test_scores_of_few_or_extreme_values_are_selected_exactly(kind: str) -> None:
    rng = np.random.default_rng(1)
    n = 12_000  # one domain, large enough for a guess
    data = Documents(numbers(rng, (n, 2), kind, np.float32), np.zeros(n, int), rng.integers(1, 99, n), np.arange(n))
    index = index_of(data, n_domains=1)
    for _ in range(6):
        theta = parameters(rng, 2, 1)
        for method in METHODS:
            for ties in TIES:
                expected = count_copies(*data, theta, method=method, ties=ties)
                equal(index.select(theta, method, ties), expected)


@pytest.mark.parametrize("ids", ["strings", "duplicates"])
def test_ids_may_be_strings_and_may_repeat(ids: str) -> None:
    data = table(4, 3000)
    doc_ids = [f"doc-{i}" for i in range(3000)] if ids == "strings" else np.arange(3000) // 7
    index = ScoreIndex.of(data.values, data.domain_ids, data.tokens, doc_ids, 2, n_domains=5)
    for theta in sample_parameters(5, 3, 5, seed=2):
        for ties in TIES:
            expected = count_copies(*data[:3], doc_ids, theta, 2, "exact", ties)
            equal(index.select(theta, "exact", ties), expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("streams", [None, [0, 1, 2, 3] * 5])
def test_many_theta_are_answered_in_their_order_by_any_number_of_threads(
    threads: int, streams: list[int] | None
) -> None:
    data = table(7, 20_000)
    index = index_of(data, n_domains=5)
    thetas = sample_parameters(20, 3, 5, seed=7)
    many = list(index.select_many(thetas, "exact", "mid", 0.5, streams, threads))
    assert len(many) == 20
    for t, (theta, selection) in enumerate(zip(thetas, many, strict=True)):
        alone = index.select(theta, "exact", "mid", 0.5, 0 if streams is None else streams[t])
        np.testing.assert_array_equal(selection.rows, alone.rows)
        np.testing.assert_array_equal(selection.copies, alone.copies)
    backwards = list(index.select_many(thetas[::-1], "exact", "mid", 0.5, streams and streams[::-1], threads))
    for selection, other in zip(many, backwards[::-1], strict=True):
        np.testing.assert_array_equal(selection.by_row(20_000), other.by_row(20_000))


def test_a_selection_is_not_changed_by_the_next() -> None:
    data = table(7, 20_000)
    index = index_of(data, n_domains=5)
    first, second = sample_parameters(2, 3, 5, seed=7)
    selection = index.select(first)
    before = selection.by_row(20_000)
    index.select(second)
    np.testing.assert_array_equal(selection.by_row(20_000), before)


def test_no_theta_give_no_selections_and_no_expectations() -> None:
    index = index_of(table(7, 100), n_domains=5)
    assert list(index.select_many([])) == []
    tokens, scores, copies = index.expect(np.empty((0, 5, 3)), *np.empty((4, 0, 5)))
    assert (tokens.shape, scores.shape, copies.shape) == ((0, 5), (0, 3), (0,))


def test_the_callers_arrays_stay_as_they_are() -> None:
    data = table(7, 3000)
    before = [column.copy() for column in data]
    index = index_of(data, n_domains=5)
    theta = sample_parameters(1, 3, 5, seed=1)[0]
    copies = index.select(theta).by_row(3000)
    for column, copy in zip(data, before, strict=True):
        np.testing.assert_array_equal(column, copy)
    data.values[:], data.tokens[:], data.domain_ids[:] = 0, 1, 0  # and the index is its own
    np.testing.assert_array_equal(index.select(theta).by_row(3000), copies)


def test_an_index_of_nothing_and_of_one_document() -> None:
    theta = Parameters([[0.5, 0.5]] * 2, [1, 1], [1, 1], [1, 1], [0, 0.01])
    empty = ScoreIndex.of(np.empty((0, 2), np.float32), [], [], [], n_domains=2)
    assert empty.select(theta).by_row(0).shape == (0,)
    assert [each.tolist() for each in empty.expect(*(getattr(theta, name)[None] for name in FIELDS))] == [
        [[0, 0]],
        [[0, 0]],
        [0],
    ]
    one = ScoreIndex.of(np.zeros((1, 2), np.float32), [0], [7], [5], n_domains=2)
    assert one.select(theta).by_row(1).tolist() == count_copies(np.zeros((1, 2)), [0], [7], [5], theta).tolist() == [1]


GOOD = {"normalised": np.ones((2, 2), np.float32), "domain_ids": [0, 1], "tokens": [3, 4], "doc_ids": [1, 2]}
HOLES = np.ones((4, 2), np.float32)
HOLES[1, 1], HOLES[3, :] = np.nan, np.inf


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"normalised": np.ones((2, 2))}, "normalised: type float64; an index holds float32, so convert the scores fi"),
        ({"normalised": np.ones((2, 2), int)}, "normalised: type int64; an index holds float32"),
        ({"normalised": np.ones((3, 2), np.float32)}, r"normalised: shape \(3, 2\); give a row for each of the 2 docu"),
        ({"normalised": np.ones(2, np.float32)}, r"normalised: shape \(2,\); give a row for each of the 2 documents"),
        ({"normalised": np.ones((2, 0), np.float32)}, r"normalised: shape \(2, 0\)"),
        (
            {"normalised": np.array([[1, 1], [np.nan, 1]], np.float32)},
            r"normalised: 1 of 2 documents .*first rows \[1\]",
        ),
        ({"domain_ids": [0, -1]}, "domain_ids: 1 outside the range, first -1; give positions from 0"),
        (
            {"domain_ids": [0, 2], "n_domains": 2},
            "domain_ids: 1 outside the range, first 2; give positions from 0 to 1",
        ),
        ({"domain_ids": [0.0, 1.0]}, "domain_ids: type float64; give integers"),
        ({"tokens": [0, 4]}, "tokens: 1 documents have 0 tokens; drop empty documents first"),
        ({"tokens": [3.0, 4.0]}, "tokens: type float64; give integers"),
        ({"tokens": [3]}, r"domain_ids \(2,\), tokens \(1,\) and doc_ids \(2,\) must be .* of one length"),
        ({"doc_ids": [1]}, r"domain_ids \(2,\), tokens \(2,\) and doc_ids \(1,\) must be .* of one length"),
        ({"doc_ids": ["a", 1]}, "doc_id 1: give all ids as integers or all as strings"),
        ({"bins": 0}, "bins.*0"),
        ({"bins": -1}, "bins.*-1"),
    ],
)
def test_a_bad_table_is_refused_with_place_value_and_remedy(bad: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ScoreIndex.of(**{**GOOD, **bad})


def test_rows_that_are_not_finite_are_counted_as_documents() -> None:
    with pytest.raises(
        InputError, match=r"normalised: 2 of 4 documents .* \(first rows \[1, 3\]\); drop them or repair"
    ):
        ScoreIndex.of(HOLES, [0] * 4, [1] * 4, [1, 2, 3, 4])


THETA = Parameters([[0.5, 0.5]] * 2, [1, 1], [0.1, 0.1], [1, 1], [0, 0])


def test_theta_of_another_corpus_and_unknown_rules_are_refused() -> None:
    index = ScoreIndex.of(**GOOD)
    for theta in (sample_parameters(1, 2, 3, seed=0)[0], sample_parameters(1, 3, 2, seed=0)[0]):
        says = rf"{theta.n_domains} domains and {theta.n_scorers} scorers, the index 2 and 2; use parameters of this c"
        with pytest.raises(InputError, match=says):
            index.select(theta)
        with pytest.raises(InputError, match=says):
            list(index.select_many([THETA, theta]))
        with pytest.raises(InputError, match=says):
            index.expect(*(getattr(theta, name)[None] for name in FIELDS))
    with pytest.raises(InputError, match="method='subset'; choose 'histogram' or 'exact'"):
        index.select(THETA, "subset")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="ties='best'; choose 'paper', 'mid' or 'hash'"):
        index.select(THETA, ties="best")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("thin", [-1.0, float("nan"), float("inf")])
def test_a_factor_that_is_no_factor_is_refused(thin: float) -> None:
    with pytest.raises(InputError, match="thin"):
        ScoreIndex.of(**GOOD).select(THETA, thin=thin)


def test_streams_of_another_number_than_theta_are_refused() -> None:
    with pytest.raises(InputError, match="streams"):
        list(ScoreIndex.of(**GOOD).select_many([THETA, THETA], streams=[1]))


@pytest.mark.parametrize(("eta", "epsilon"), [(40.0, 0.0), (1.0, 1e300)])
def test_more_copies_than_an_int32_holds_are_refused(eta: float, epsilon: float) -> None:
    theta = Parameters([[0.5, 0.5]] * 2, [1000, 1000], [1, 1], [eta, 0], [epsilon, 0])
    with pytest.raises(InputError, match="int32"):
        ScoreIndex.of(np.zeros((2, 2), np.float32), [0, 1], [1, 1], [1, 2]).select(theta)
