"""The default search against the paper's procedure on a loss that is known."""

import numpy as np
import pytest
from known_loss import KnownLoss, theta_space

from quadmix_plugin.search.evaluation import cross_validate
from quadmix_plugin.search.gain import Prediction
from quadmix_plugin.search.gaussian_process import GaussianProcess
from quadmix_plugin.search.proposals import SearchSettings, propose
from quadmix_plugin.search.regressors import LightGBM


def outcome(seed, *, proxies, draws):
    """True loss by way of searching, and whether the true loss of θ* is in its stated interval."""
    truth, space = KnownLoss.of(seed), theta_space()
    thetas, losses, _ = truth.proxies(proxies, 2.5, seed)
    found = propose(space, thetas, {"y": losses}, GaussianProcess, settings=SearchSettings(draws=draws, seed=seed))
    judged = cross_validate(GaussianProcess, space.features(thetas), {"y": losses}, repeats=1)["y"]
    error = float(np.sqrt(np.mean((judged.real - judged.mean_predicted) ** 2)))
    real = {name: float(truth(way.point[None])[0]) for name, way in found.ways.items()}
    prediction = Prediction(found.best.losses["y"], error, found.best.sd["y"], judged.mean_predicted.min())
    return real, prediction.low <= real["trust_region"] <= prediction.high


def test_the_default_search_beats_the_papers_and_says_how_sure_it_is():
    outcomes = [outcome(seed, proxies=96, draws=10_000) for seed in range(2)]
    assert all(real["trust_region"] < real["paper"] for real, _ in outcomes)
    assert all(inside for _, inside in outcomes)


@pytest.mark.slow
def test_it_does_so_in_nine_of_ten_worlds():
    outcomes = [outcome(seed, proxies=512, draws=100_000) for seed in range(10)]
    assert sum(real["trust_region"] < real["paper"] for real, _ in outcomes) >= 9
    assert sum(inside for _, inside in outcomes) >= 8


def test_the_papers_procedure_is_by_trees():
    truth, space = KnownLoss.of(3), theta_space()
    thetas, losses, _ = truth.proxies(96, 2.5, 3)
    settings = SearchSettings(draws=2000, method="paper", average="paper")
    by_process = propose(space, thetas, {"y": losses}, GaussianProcess, settings=settings)
    by_trees = propose(space, thetas, {"y": losses}, LightGBM, settings=settings)
    np.testing.assert_array_equal(by_process.ways["paper"].point, by_trees.best.point)
    assert not np.array_equal(by_process.best.point, by_trees.best.point)
