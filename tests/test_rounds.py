"""Rounds: which θ are trained next, and that they teach more than draws do."""

import numpy as np
import pytest
from known_loss import KnownLoss, theta_space

from quadmix_plugin.parameters import ParameterSpace, sample_parameter_vectors
from quadmix_plugin.search import rounds
from quadmix_plugin.search.gaussian_process import GaussianProcess
from quadmix_plugin.search.rounds import next_round


@pytest.fixture(scope="module", autouse=True)
def fewer_draws():
    """A tenth of the candidates, which leaves the shares and their order as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "_DRAWS", 2048)
        patch.setattr(rounds, "_NEAR", 256)
        yield


@pytest.fixture(scope="module")
def batch():
    truth, space = KnownLoss.of(0), theta_space()
    thetas, losses, _ = truth.proxies(64, 2.5, 0)
    return next_round(32, thetas, {"y": losses}, space.columns, GaussianProcess, seed=5), thetas, losses


def test_the_next_round_is_better_than_draws_and_still_looks_around(batch):
    found, thetas, _ = batch
    truth, space = KnownLoss.of(0), theta_space()
    reasons = np.array(found.reasons)
    assert {name: int((reasons == name).sum()) for name in sorted(set(reasons))} == {
        "best": 16, "diverse": 4, "lcb": 8, "random": 4,
    }  # fmt: skip
    assert len(np.unique(found.vectors, axis=0)) == 32
    draws = truth(sample_parameter_vectors(4000, 3, 26, 9, space=ParameterSpace()))
    assert (truth(found.vectors[reasons == "best"]) < np.quantile(draws, 0.02)).all()

    def nearest(rows):
        known = space.to_unit(thetas)
        return np.array([np.linalg.norm(known - row, axis=1).min() for row in space.to_unit(rows)])

    assert nearest(found.vectors[reasons == "diverse"]).min() > np.median(nearest(found.vectors[reasons == "random"]))


def test_the_next_round_is_the_same_again_and_another_under_another_seed(batch):
    found, thetas, losses = batch
    space = theta_space()
    again = next_round(32, thetas, {"y": losses}, space.columns, GaussianProcess, seed=5)
    np.testing.assert_array_equal(again.vectors, found.vectors)
    other = next_round(8, thetas, {"y": losses}, space.columns, GaussianProcess, seed=6)
    assert not np.array_equal(other.vectors, found.vectors[:8])


def test_an_excluded_scorer_is_not_proposed(batch):
    _, thetas, losses = batch
    found = next_round(8, thetas, {"y": losses}, theta_space().columns, GaussianProcess, excluded=(1,), seed=5)
    alpha = found.vectors[:, :78].reshape(-1, 26, 3)
    assert (alpha[:, :, 1] == 0).all()
