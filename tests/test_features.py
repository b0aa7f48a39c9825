"""Features of the search: θ as columns, and the expected selection of many θ against the plain functions."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters, ParameterSpace, sample_parameter_vectors, sample_parameters
from quadmix_plugin.ranking import merge_quality, quality_rank
from quadmix_plugin.sampling import sampling_value
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.search.features import (
    FeatureMap,
    derived_features,
    features,
    selection_statistics,
    theta_features,
)


def make_table(domain_ids, tokens, n_domains, n_scorers):
    n = len(tokens)
    return ScoreTable(
        pa.array(range(n)),
        np.asarray(domain_ids, dtype=np.int64),
        np.asarray(tokens, dtype=np.int64),
        np.zeros((n, n_scorers), dtype=np.float32),
        tuple(f"domain{m}" for m in range(n_domains)),
        tuple(f"scorer{k}" for k in range(n_scorers)),
    )


def loop(table, normalised, theta):
    """The same statistics from the public functions, one θ at a time."""
    rank = quality_rank(merge_quality(normalised, table.domain_ids, theta), table.domain_ids, table.tokens)
    value = sampling_value(rank, table.domain_ids, theta)
    weight = table.tokens * value
    per_domain = np.array([weight[table.domain_ids == m].sum() for m in range(len(table.domains))])
    basis = weight if weight.sum() > 0 else table.tokens
    return per_domain, (basis[:, None] * normalised).sum(axis=0) / basis.sum(), value.mean()


@st.composite
def cases(draw):
    n_domains, n_scorers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n, number = draw(st.integers(1, 40)), draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    domain_ids = rng.integers(0, n_domains, n)  # with few documents some domain is empty
    tokens = rng.integers(1, 5, n) if draw(st.booleans()) else np.ones(n, dtype=np.int64)
    levels = draw(st.sampled_from([1, 2, 4, 1000]))  # few levels: many ties
    normalised = (rng.integers(0, levels, (n, n_scorers)) / levels - draw(st.sampled_from([0.0, 0.5]))).astype("f4")
    omega_max = draw(st.sampled_from([0.1, 0.5, 1.0]))
    vectors = sample_parameter_vectors(number, n_scorers, n_domains, 3, space=ParameterSpace(omega_max=omega_max))
    rest = vectors[:, n_domains * n_scorers :].reshape(number, 4, n_domains)
    if draw(st.booleans()):  # ω that r̄ can hit exactly
        rest[:, 1] = rng.integers(1, 9, (number, n_domains)) / 8
    if draw(st.booleans()):
        rest[:, 3] = 0.0
    if draw(st.booleans()) and n_scorers > 1:  # a scorer left out
        vectors[:, : n_domains * n_scorers] = np.tile([1.0] + [0.0] * (n_scorers - 1), n_domains)
    table = make_table(domain_ids, tokens, n_domains, n_scorers)
    return table, normalised, vectors


@settings(max_examples=300, deadline=None)
@given(cases())
def test_statistics_equal_the_loop_over_eq_1_to_3(case):
    table, normalised, vectors = case
    fast = selection_statistics(table, normalised, vectors)
    for t, vector in enumerate(vectors):
        theta = Parameters.from_vector(vector, len(table.scorers), table.domains, table.scorers)
        tokens, score, copies = loop(table, normalised, theta)
        np.testing.assert_allclose(fast.tokens_per_domain[t], tokens, rtol=1e-12)
        np.testing.assert_allclose(fast.mean_score[t], score, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(fast.selected_tokens[t], tokens.sum(), rtol=1e-12)
        np.testing.assert_allclose(fast.mean_sampling_value[t], copies, rtol=1e-12)


@pytest.fixture
def corpus():
    rng = np.random.default_rng(5)
    table = make_table(rng.integers(0, 5, 3000), rng.lognormal(5, 1, 3000).astype(int) + 1, 5, 3)
    return table, rng.random((3000, 3)).astype("f4")


def test_statistics_do_not_depend_on_row_order_or_on_the_other_thetas(corpus):
    table, normalised = corpus
    thetas = sample_parameters(40, 3, 5, seed=2, domains=table.domains, scorers=table.scorers)
    whole = selection_statistics(table, normalised, thetas)
    order = np.random.default_rng(0).permutation(table.n)
    shuffled = make_table(table.domain_ids[order], table.tokens[order], 5, 3)
    again = selection_statistics(shuffled, normalised[order], thetas)
    np.testing.assert_allclose(again.tokens_per_domain, whole.tokens_per_domain, rtol=1e-12)
    alone = selection_statistics(table, normalised, thetas[17:18])
    np.testing.assert_allclose(alone.mean_score[0], whole.mean_score[17], rtol=1e-12)


def test_the_selection_is_better_than_the_corpus(corpus):
    table, normalised = corpus
    drawn = selection_statistics(table, normalised, sample_parameters(50, 3, 5, seed=1))
    mean = np.average(normalised, axis=0, weights=table.tokens)
    assert (drawn.mean_score.mean(axis=0) < mean - 0.1).all()
    assert (drawn.mean_score.mean(axis=1) < mean.mean()).all()


def test_theta_features_are_the_vector_with_log10_lambda():
    thetas = sample_parameters(6, 2, 3, seed=0, domains=("a", "b", "c"), scorers=("p", "q"))
    x, names = theta_features(thetas)
    assert x.shape == (6, 18)
    assert names[:2] == ["alpha[p, a]", "alpha[q, a]"]
    for name, values in (
        ("log10_lam[b]", np.log10([t.lam[1] for t in thetas])),
        ("omega[c]", [t.omega[2] for t in thetas]),
    ):
        np.testing.assert_allclose(x[:, names.index(name)], values, rtol=1e-15)
    zero = Parameters(np.ones((1, 1)), np.zeros(1), np.full(1, 0.1), np.ones(1), np.zeros(1))
    assert theta_features([zero])[0][0, 1] == -6.0


def test_features_hold_theta_then_what_is_derived(corpus):
    table, normalised = corpus
    thetas = sample_parameters(4, 3, 5, seed=9, domains=table.domains, scorers=table.scorers)
    x, names = features(thetas, table, normalised)
    own, own_names = theta_features(thetas)
    more, more_names = derived_features(selection_statistics(table, normalised, thetas))
    assert names == own_names + more_names
    assert names[-10:] == [
        *(f"sqrt_share[domain{m}]" for m in range(5)),
        "log_selected_tokens",
        "mean_sampling_value",
        *(f"mean_score[scorer{k}]" for k in range(3)),
    ]
    np.testing.assert_array_equal(x, np.concatenate([own, more], axis=1))
    np.testing.assert_allclose((more[:, :5] ** 2).sum(axis=1), 1.0)
    only_theta, theta_names = features(thetas, table, normalised, "theta")
    np.testing.assert_array_equal(only_theta, own)
    assert theta_names == own_names
    np.testing.assert_array_equal(
        FeatureMap.of(table, normalised).features(np.stack([t.to_vector() for t in thetas])), x
    )


def test_an_empty_selection_has_finite_features(corpus):
    table, normalised = corpus
    nothing = Parameters(np.full((5, 3), 1 / 3), np.ones(5), np.full(5, 1e-9), np.ones(5), np.zeros(5))
    statistics = selection_statistics(table, normalised, [nothing])
    assert statistics.selected_tokens[0] == 0
    np.testing.assert_allclose(statistics.mean_score[0], np.average(normalised, axis=0, weights=table.tokens))
    x, names = derived_features(statistics)
    assert (x[0, :5] == 0).all()
    assert x[0, names.index("log_selected_tokens")] == 0
    assert np.isfinite(x).all()


def test_what_belongs_to_another_corpus_is_refused(corpus):
    table, normalised = corpus
    columns = FeatureMap.of(table, normalised)
    with pytest.raises(InputError, match="domain4; use parameters drawn for this corpus"):
        columns.features(sample_parameters(1, 3, 5, seed=0, domains=("v", "w", "x", "y", "z")))
    with pytest.raises(InputError, match="make 35 numbers"):
        columns.features(sample_parameters(1, 3, 4, seed=0))
    with pytest.raises(InputError, match=r"shape \(3000, 2\).*scorer2"):
        FeatureMap.of(table, normalised[:, :2])
    with pytest.raises(InputError, match="2 of 3000 documents"):
        FeatureMap.of(table, np.where(np.arange(3000)[:, None] < 2, np.nan, normalised))
    with pytest.raises(InputError, match="'raw'"):
        FeatureMap.of(table, normalised, "raw")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="parameters 1 and 0 differ"):
        theta_features([*sample_parameters(1, 3, 4, seed=0), *sample_parameters(1, 3, 5, seed=0)])
