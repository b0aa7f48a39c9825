"""The token budget: reached by one factor on ω, or refused with what can be reached."""

import numpy as np
import pytest

from quadmix_plugin import merge_quality, quality_rank, sample_parameters, sampling_value
from quadmix_plugin.budget import scale_to_budget
from quadmix_plugin.errors import InputError

RNG = np.random.default_rng(1)
N = 4000
IDS = RNG.integers(0, 5, N)
TOKENS = RNG.integers(1, 900, N)
SCORES = RNG.random((N, 3))
THETA = sample_parameters(1, 3, 5, seed=2)[0]
RANK = quality_rank(merge_quality(SCORES, IDS, THETA), IDS, TOKENS)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_expected_tokens_meet_the_target_within_one_document(share: float) -> None:
    target = int(share * TOKENS.sum())
    budget = scale_to_budget(THETA, RANK, IDS, TOKENS, target)
    expected = float((TOKENS * sampling_value(RANK, IDS, budget.theta)).sum())
    assert expected == pytest.approx(budget.expected_tokens)
    assert abs(expected - target) <= 2 * TOKENS.max()
    np.testing.assert_array_equal(budget.theta.lam, THETA.lam)
    np.testing.assert_array_equal(budget.theta.alpha, THETA.alpha)
    np.testing.assert_allclose(budget.theta.omega, np.minimum(THETA.omega * budget.factor, 1.0))


def test_unreachable_budget_names_the_maximum() -> None:
    with pytest.raises(InputError, match=r"10,000,000,000 cannot be reached.*between [\d,]+ and [\d,]+ tokens"):
        scale_to_budget(THETA, RANK, IDS, TOKENS, 10_000_000_000)
