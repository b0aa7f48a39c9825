"""Mixtures for proxies: shares of one whole, within their bounds, all different, and the same for the same seed."""

import numpy as np
import pytest

from quadmix_plugin.errors import InputError
from quadmix_plugin.search.mixture_draws import MixtureDraws

PRIOR = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01])
FLAT = np.sqrt(PRIOR) / np.sqrt(PRIOR).sum()


@pytest.mark.parametrize("prior", [PRIOR, np.full(20, 0.05), np.array([0.7, 0.3])])
def test_shares_are_multiples_of_the_least_that_sum_to_one_within_their_bounds(prior: np.ndarray) -> None:
    draws = MixtureDraws()
    mixtures = draws.draw(prior, 200, seed=1)
    assert mixtures.shape == (200, prior.size)
    rounding = draws.least / 2
    np.testing.assert_allclose(mixtures.sum(axis=1), 1, atol=rounding * prior.size + 1e-12)
    np.testing.assert_allclose(mixtures / draws.least, np.round(mixtures / draws.least), atol=1e-6)
    # What the small shares had is spread over the rest, so a share at its bound may grow by that much.
    spread = 1 + draws.least * prior.size
    assert (mixtures <= np.minimum(15 * prior, 1) * spread + rounding).all()
    assert (mixtures >= 0).all()


def test_a_bound_that_is_never_met_by_chance_holds() -> None:
    mixtures = MixtureDraws(most_repeats=2).draw(PRIOR, 100, seed=1)
    assert (mixtures <= 2 * PRIOR * 1.002 + 1e-4).all()
    assert (MixtureDraws().draw(PRIOR, 100, seed=1) > 2 * PRIOR + 0.01).any()


def test_no_mixture_is_drawn_twice() -> None:
    for number in (8, 500):
        mixtures = MixtureDraws().draw(PRIOR, number, seed=2)
        apart = np.abs(mixtures[:, None] - mixtures[None]).sum(axis=2) + np.eye(number)
        assert apart.min() > 1e-5


def test_few_mixtures_of_coarse_shares_are_all_found_and_no_more() -> None:
    coarse = MixtureDraws(least=0.25, oversample=50)
    found = coarse.draw(np.array([0.5, 0.5]), 5, seed=0)  # 0, 1/4, 1/2, 3/4 and 1 of the first domain
    assert sorted(found[:, 0].tolist()) == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(InputError, match=r"only 5 different mixtures of 2 domains were found .* 6 are wanted"):
        coarse.draw(np.array([0.5, 0.5]), 6, seed=0)


def test_the_seed_decides_the_mixtures() -> None:
    first = MixtureDraws().draw(PRIOR, 50, seed=3)
    np.testing.assert_array_equal(MixtureDraws().draw(PRIOR, 50, seed=3), first)
    other = MixtureDraws().draw(PRIOR, 50, seed=4)
    assert np.abs(first[:, None] - other[None]).sum(axis=2).min(axis=1).mean() > 0.01


def test_shares_below_the_least_are_nothing() -> None:
    mixtures = MixtureDraws(least=0.01).draw(PRIOR, 300, seed=5)
    positive = mixtures[mixtures > 0]
    assert positive.min() == pytest.approx(0.01)
    assert (mixtures == 0).mean() > 0.1
    alike = MixtureDraws(temperature=1, least=0.01, weakest=1e6, strongest=1e6)
    np.testing.assert_array_equal(alike.draw(np.array([0.993, 0.007]), 1, seed=5), [[1, 0]])  # not rounded up to .01


@pytest.mark.parametrize("number", [16, 64])
def test_mixtures_that_cannot_be_are_refused_with_what_to_do(number: int) -> None:
    with pytest.raises(InputError, match=rf"{number} are wanted; train fewer proxies or raise most_repeats"):
        MixtureDraws(most_repeats=1).draw(np.array([0.7, 0.3]), number, seed=0)


def test_more_concentrated_draws_are_nearer_the_flattened_prior() -> None:
    distances = [
        np.abs(MixtureDraws(weakest=s / 5, strongest=s).draw(PRIOR, 200, seed=6) - FLAT).sum(axis=1).mean()
        for s in (2, 20, 200)
    ]
    assert distances[0] > 1.5 * distances[1] > 2 * distances[2]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_the_mean_of_many_alike_is_the_prior_to_the_power_of_the_temperature(temperature: float) -> None:
    mixtures = MixtureDraws(temperature=temperature, most_repeats=100, weakest=200, strongest=200).draw(
        PRIOR, 1000, seed=7
    )
    expected = PRIOR**temperature / (PRIOR**temperature).sum()
    np.testing.assert_allclose(mixtures.mean(axis=0), expected, atol=0.006)


def test_a_domain_without_tokens_has_no_share() -> None:
    prior = np.append(PRIOR, 0.0)
    mixtures = MixtureDraws().draw(prior, 50, seed=8)
    assert (mixtures[:, -1] == 0).all()
