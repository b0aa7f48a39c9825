"""The token budget: reached by one factor on ω, or refused with what can be reached."""

import numpy as np
import pytest

from quadmix_plugin import merge_quality, quality_rank, sample_parameters, sampling_value
from quadmix_plugin.budget import expected_tokens, scale_to_budget
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64, tie_hash
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.rank_states import Grid, RankHistogram

RNG = np.random.default_rng(1)
N = 4000
IDS = RNG.integers(0, 5, N)
TOKENS = RNG.integers(1, 900, N)
SCORES = RNG.random((N, 3))
THETA = sample_parameters(1, 3, 5, seed=2)[0]
MERGED = merge_quality(SCORES, IDS, THETA)
EXACT = RankMap.exact(MERGED, IDS, TOKENS)
HISTOGRAM = RankMap.of_histogram(RankHistogram.of(MERGED, IDS, TOKENS, Grid.of_values(MERGED, IDS, 5, 64)))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_expected_tokens_meet_the_target_within_one_document(share: float) -> None:
    target = int(share * TOKENS.sum())
    budget = scale_to_budget(THETA, EXACT, target)
    expected = float((TOKENS * sampling_value(EXACT.rank(MERGED, IDS), IDS, budget.theta)).sum())
    assert expected == pytest.approx(budget.expected_tokens)
    assert abs(expected - target) <= 2 * TOKENS.max()
    np.testing.assert_array_equal(budget.theta.lam, THETA.lam)
    np.testing.assert_array_equal(budget.theta.alpha, THETA.alpha)
    np.testing.assert_allclose(budget.theta.omega, np.minimum(THETA.omega * budget.factor, 1.0))


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_a_histogram_reaches_the_target_to_a_token(share: float) -> None:
    target = int(share * TOKENS.sum())
    budget = scale_to_budget(THETA, HISTOGRAM, target)
    assert budget.expected_tokens == pytest.approx(target, abs=1)
    real = float((TOKENS * sampling_value(HISTOGRAM.rank(MERGED, IDS), IDS, budget.theta)).sum())
    assert real == pytest.approx(target, rel=0.05)  # a dozen documents in a bin


@pytest.mark.parametrize("ties", ["paper", "mid", "hash"])
def test_the_map_expects_what_the_documents_have(ties: str) -> None:
    scores = np.round(SCORES, 1)  # many ties
    merged = merge_quality(scores, IDS, THETA)
    hashes = tie_hash(hash64(np.arange(N)))
    rank = quality_rank(merged, IDS, TOKENS, ties, np.arange(N))  # pyright: ignore[reportArgumentType]
    by_document = np.bincount(IDS, TOKENS * sampling_value(rank, IDS, THETA), minlength=5)
    exact = RankMap.exact(merged, IDS, TOKENS, ties, hashes)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(expected_tokens(exact, THETA), by_document, rtol=1e-12)
    doubled = expected_tokens(exact, THETA, 2 * exact.totals.tokens)
    np.testing.assert_allclose(doubled, 2 * by_document, rtol=1e-12)


def test_unreachable_budget_names_the_maximum() -> None:
    with pytest.raises(InputError, match=r"10,000,000,000 cannot be reached.*between [\d,]+ and [\d,]+ tokens"):
        scale_to_budget(THETA, EXACT, 10_000_000_000)
