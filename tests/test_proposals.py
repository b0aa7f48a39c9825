"""The search for θ*: draws, the trust region, the paper's procedure, and what constrains them."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters, ParameterSpace, sample_parameter_vectors, sample_parameters
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.search.features import FeatureMap
from quadmix_plugin.search.gaussian_process import GaussianProcess
from quadmix_plugin.search.objective import Objective, gate
from quadmix_plugin.search.optimise import TrustRegion, pareto_front, refine
from quadmix_plugin.search.proposals import SearchSettings, propose
from quadmix_plugin.search.regressors import LightGBM
from quadmix_plugin.search.spaces import BoxSpace, MixtureSpace, ThetaSpace, mixture_or_box
from quadmix_plugin.search.surrogate import Surrogate
from quadmix_plugin.search.token_constraint import TokenConstraint

DOMAINS, SCORERS = tuple("abcdef"), ("p", "q")


class World:
    """A corpus of 1,500 documents and a known loss: domains a and b help, so do better documents by scorer p."""

    def __init__(self):
        rng = np.random.default_rng(8)
        self.table = ScoreTable(
            pa.array(range(1500)),
            rng.integers(0, 6, 1500),
            rng.lognormal(5, 1, 1500).astype(np.int64) + 1,
            np.zeros((1500, 2), dtype=np.float32),
            DOMAINS,
            SCORERS,
        )
        self.normalised = rng.random((1500, 2)).astype(np.float32)
        self.columns = FeatureMap.of(self.table, self.normalised)
        self.thetas = sample_parameters(64, 2, 6, seed=11, domains=DOMAINS, scorers=SCORERS)
        chance = rng.normal(size=(2, 64))
        clean = self.loss(self.thetas)
        self.losses = {"first": clean + 0.02 * chance[0], "second": 9 - 3 * clean + 0.05 * chance[1]}

    def loss(self, thetas):
        """Lower is better."""
        drawn = self.columns.statistics(thetas)
        share = drawn.tokens_per_domain / drawn.selected_tokens[:, None]
        return 5 - np.sqrt(share[:, :2]).sum(axis=1) + 2 * drawn.mean_score[:, 0]

    def propose(self, losses=None, *, make=LightGBM, thetas=None, features: Any = "theta+derived", **options):
        columns = self.columns if features == "theta+derived" else FeatureMap.of(self.table, self.normalised, features)
        around = {name: options.pop(name) for name in ("space", "excluded", "constraint") if name in options}
        outside = {name: options.pop(name) for name in ("weights", "progress", "surrogate") if name in options}
        settings = {"draws": 5000, "seed": 3, "method": "paper", "region": TrustRegion(evaluations=720), **options}
        return propose(
            ThetaSpace(columns, **around), columns.vectors(thetas or self.thetas), losses or self.losses, make,
            settings=SearchSettings(**settings), **{"weights": {"first": 1.0}, **outside},
        )  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def proposal(world):
    return world.propose()


@pytest.fixture(scope="module")
def bold(world):
    return world.propose(method="trust_region")


def test_the_proposal_is_among_the_best_of_fresh_draws(world, proposal):
    fresh = world.loss(sample_parameter_vectors(5000, 2, 6, 77, space=ParameterSpace()))
    assert world.loss([proposal.theta])[0] < np.quantile(fresh, 0.03)
    assert proposal.theta.domains == DOMAINS
    assert proposal.theta.scorers == SCORERS


def test_the_search_is_deterministic_and_its_result_is_plain_json(world, proposal):
    again = world.propose()
    assert again.theta == proposal.theta
    assert json.dumps(again.to_dict(), allow_nan=False) == json.dumps(proposal.to_dict(), allow_nan=False)
    assert world.propose(seed=4).theta != proposal.theta
    assert again.surrogate.regressors["first"].to_text() == proposal.surrogate.regressors["first"].to_text()


def test_the_top_draws_are_those_with_the_lowest_prediction(world):
    everything = world.propose(draws=5000, top=5000).top
    values = [candidate.objective for candidate in everything]
    assert values == sorted(values)
    assert sorted(candidate.number for candidate in everything) == list(range(5000))
    assert len({candidate.point.tobytes() for candidate in everything}) == 5000
    ten = world.propose(draws=5000, top=10)
    assert [c.number for c in ten.top] == [c.number for c in everything[:10]]
    assert ten.quantiles[0.0] == values[0]
    assert ten.quantiles[0.5] == pytest.approx(np.median(values))
    shorter = world.propose(draws=600, top=600).top
    longer = {c.number: c.point.tobytes() for c in everything}
    assert all(c.point.tobytes() == longer[c.number] for c in shorter)


def test_draws_differ_from_the_proxies_under_the_same_seed(world):
    drawn = world.propose(draws=64, top=64, seed=11).top
    proxies = {theta.to_vector().tobytes() for theta in world.thetas}
    assert not proxies & {candidate.point.tobytes() for candidate in drawn}


@pytest.mark.parametrize("average", ["unit", "paper"])
def test_lambda_is_averaged_in_the_space_asked_for(world, average):
    found = world.propose(draws=500, average=average)
    lam = np.array([found.space.parameters(c.point).lam for c in found.top])
    expected = np.exp(np.log(lam).mean(axis=0)) if average == "unit" else lam.mean(axis=0)
    np.testing.assert_allclose(found.theta.lam, expected)
    np.testing.assert_allclose(
        found.theta.omega, np.mean([found.space.parameters(c.point).omega for c in found.top], axis=0)
    )
    np.testing.assert_allclose(found.theta.alpha.sum(axis=1), 1.0)


def test_predictions_of_the_proposal_come_from_its_regressors(world, proposal):
    x = world.columns.features([proposal.theta])
    for task, model in proposal.surrogate.regressors.items():
        assert proposal.best.losses[task] == model.predict(x)[0]
    y = world.losses["first"]
    assert proposal.best.objective == pytest.approx((proposal.best.losses["first"] - y.mean()) / y.std(ddof=1))
    best = proposal.best_proxy
    assert best.number == int(np.argmin(y))
    np.testing.assert_array_equal(best.point, world.thetas[best.number].to_vector())
    assert best.losses["first"] == y.min()
    seen = world.columns.features(best.point[None])
    assert proposal.best_proxy_predicted.losses["second"] == proposal.surrogate.regressors["second"].predict(seen)[0]


def test_tasks_count_by_their_standardised_loss_and_weight(world):
    both = Objective.of(world.losses)
    assert both.weights == {"first": 0.5, "second": 0.5}
    standard = [(y - y.mean()) / y.std(ddof=1) for y in world.losses.values()]
    np.testing.assert_allclose(both.value(world.losses), np.mean(standard, axis=0))
    np.testing.assert_allclose(
        Objective.of(world.losses, {"second": 3, "first": 1}).value(world.losses),
        0.25 * standard[0] + 0.75 * standard[1],
    )
    # The second task wants the opposite of the first: its θ* is bad for the first.
    opposite = world.propose(weights={"second": 1.0})
    assert world.loss([opposite.theta])[0] > np.quantile(world.loss(world.thetas), 0.9)
    with pytest.raises(InputError, match="no task 'third'; the proxies have losses of first, second"):
        Objective.of(world.losses, {"third": 1.0})
    with pytest.raises(InputError, match="at least one above 0"):
        Objective.of(world.losses, {"first": 0.0})


def test_draws_that_select_nothing_are_left_out_and_counted(world):
    tiny = ParameterSpace(omega_max=0.004, epsilon_max=0.0)
    found = world.propose(space=tiny, draws=500)
    assert 0 < found.empty < 500
    assert (world.columns.statistics(np.array([c.point for c in found.top])).selected_tokens > 1).all()
    with pytest.raises(InputError, match=r"none of 100 draws selects a token.*omega_max"):
        world.propose(space=ParameterSpace(omega_max=1e-9, epsilon_max=0.0), draws=100)


class Diverging(LightGBM):
    def predict(self, x):
        return np.full(len(np.asarray(x)), np.nan)


def test_a_regressor_that_predicts_nan_is_refused(world):
    with pytest.raises(InputError, match="predicts losses that are not finite"):
        world.propose(make=Diverging, draws=100)


def test_a_search_that_cannot_start_says_why(world):
    with pytest.raises(InputError, match="top 10 of 5 draws"):
        world.propose(draws=5)
    with pytest.raises(InputError, match=r"losses of first: 1 are not finite, rows \[9\]"):
        world.propose({"first": np.where(np.arange(64) == 9, np.inf, world.losses["first"])})
    other = sample_parameters(64, 2, 6, seed=11, domains=tuple("ghijkl"), scorers=SCORERS)
    with pytest.raises(InputError, match="domains g, h, i, j, k, l, but those of the corpus are a, b"):
        world.propose(thetas=other, draws=100)


def test_progress_counts_all_draws(world):
    done = []
    world.propose(draws=5000, features="theta", progress=done.append)
    assert done == [4096, 5000]


def test_the_trust_region_finds_what_the_draws_do_not(world, proposal, bold):
    ways = {name: world.loss(way.point[None])[0] for name, way in bold.ways.items()}
    assert ways["trust_region"] < ways["draws"]
    assert ways["trust_region"] < ways["paper"]
    np.testing.assert_array_equal(bold.best.point, bold.ways["trust_region"].point)
    assert list(proposal.ways) == ["draws", "paper"]
    np.testing.assert_array_equal(proposal.best.point, proposal.ways["draws"].point)
    # The paper's procedure is by its trees, whatever regressor the recipe names, and averages arithmetically.
    arithmetic = world.propose(average="paper")
    np.testing.assert_array_equal(arithmetic.ways["draws"].point, proposal.ways["paper"].point)


def test_the_search_stays_in_its_ball_and_grows_with_it(world, bold):
    space, surrogate, start = bold.space, bold.surrogate, bold.ways["draws"].point
    centre, found = space.to_unit(start[None])[0], []
    for radius in (0.02, 0.1, 0.4):
        point = refine(space, surrogate, start, TrustRegion(radius=radius, pessimism=0.0), seed=1)
        distance = np.linalg.norm(space.to_unit(point[None])[0] - centre)
        assert distance <= 1.35 * radius * np.sqrt(centre.size / 12)  # α is known up to a factor, which moves it a bit
        found.append(surrogate.value(space.features(point[None]))[0])
    assert found[2] < found[1] < found[0]


def test_pessimism_prefers_what_is_known(world, bold):
    space, surrogate, start = bold.space, bold.surrogate, bold.ways["draws"].point
    sds = []
    for pessimism in (0.0, 5.0):
        point = refine(space, surrogate, start, TrustRegion(pessimism=pessimism), seed=1)
        sds.append(surrogate.value_with_sd(space.features(point[None]))[1][0])
    assert sds[1] < sds[0]


def test_the_cube_and_the_parameters_are_each_others_inverse(world):
    space = ThetaSpace(world.columns)
    points = sample_parameter_vectors(50, 2, 6, 5, space=ParameterSpace())
    unit = space.to_unit(points)
    assert ((unit >= 0) & (unit <= 1)).all()
    np.testing.assert_allclose(space.from_unit(unit), points, rtol=1e-6, atol=1e-9)


def test_an_excluded_scorer_has_no_weight_anywhere(world):
    found = world.propose(excluded=(0,), method="trust_region", draws=1000)
    for way in found.ways.values():
        theta = found.space.parameters(way.point)
        assert (theta.alpha[:, 0] == 0).all()
        np.testing.assert_allclose(theta.alpha[:, 1], 1.0)
    with pytest.raises(InputError, match="every scorer is excluded"):
        ThetaSpace(world.columns, excluded=(0, 1))


def test_every_candidate_has_the_tokens_of_the_constraint(world):
    tokens = np.bincount(world.table.domain_ids, world.table.tokens, minlength=6)
    constraint = TokenConstraint.of(tokens, 0.1 * tokens.sum())
    found = world.propose(constraint=constraint, method="trust_region", draws=1000)
    points = np.array([*(way.point for way in found.ways.values()), *(c.point for c in found.top)])
    np.testing.assert_allclose(constraint.expected_tokens(points, 2), 0.1 * tokens.sum(), rtol=1e-5)
    # The integral is over ranks that lie evenly; documents make the selection coarser.
    selected = world.columns.statistics(points).selected_tokens
    np.testing.assert_allclose(selected, 0.1 * tokens.sum(), rtol=0.15)


def test_the_constraints_integral_is_that_of_equation_3():
    from quadmix_plugin.sampling import sampling_value

    points = sample_parameter_vectors(20, 2, 6, 9, space=ParameterSpace(omega_max=0.6))
    tokens = np.arange(1.0, 7.0)
    rank = (np.arange(200_000) + 0.5) / 200_000
    for point, expected in zip(points, TokenConstraint(tokens, 1.0).expected_tokens(points, 2), strict=True):
        theta = Parameters.from_vector(point, 2)
        each = [sampling_value(rank, np.full(rank.size, m), theta).mean() for m in range(6)]
        assert expected == pytest.approx(np.dot(each, tokens), rel=1e-3)


def test_a_budget_out_of_reach_is_said():
    with pytest.raises(InputError, match=r"select.target_tokens: 25 .*takes each 2 times at most"):
        TokenConstraint.of([5.0, 5.0], 25)
    narrow = TokenConstraint.of([5.0, 5.0], 19.9)  # only η near 1 gives nearly two copies
    points = sample_parameter_vectors(50, 1, 2, 9, space=ParameterSpace())
    assert np.isnan(narrow.apply(points, 1)).all(axis=1).all()


def test_the_front_is_what_no_other_beats():
    losses = np.random.default_rng(0).normal(size=(300, 3))
    losses[7] = np.nan
    front = pareto_front(losses)
    beaten = [any((other <= row).all() and (other < row).any() for other in losses) for row in losses]
    assert sorted(front) == [i for i in range(300) if not beaten[i] and i != 7]
    assert list(pareto_front(np.array([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0]]))) == [0, 1]


def test_mixtures_and_boxes_are_told_apart():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet([1.0, 2.0, 3.0], 40)
    mixture = mixture_or_box("abc", shares)
    assert isinstance(mixture, MixtureSpace)
    drawn = next(mixture.draw(1000, 1))[1]
    np.testing.assert_allclose(drawn.sum(axis=1), 1.0)
    np.testing.assert_allclose(drawn.mean(axis=0), shares.mean(axis=0), atol=0.05)
    np.testing.assert_allclose(mixture.from_unit(mixture.to_unit(shares)), shares)
    box = mixture_or_box("abc", 10 * shares)
    assert isinstance(box, BoxSpace)
    drawn = next(box.draw(1000, 1))[1]
    assert ((drawn >= box.low) & (drawn <= box.high)).all()
    np.testing.assert_allclose(box.from_unit(box.to_unit(drawn)), drawn)
    with pytest.raises(InputError, match="features that are not mixtures"):
        mixture_or_box("abc", 10 * shares, prior=[1, 1, 1])
    with pytest.raises(InputError, match="give 3 numbers >= 0"):
        mixture_or_box("abc", shares, prior=[1, 1])


def test_a_mixture_is_searched_as_parameters_are():
    rng = np.random.default_rng(1)
    shares = rng.dirichlet(np.ones(5), 120)

    def loss(x):
        return 3 - np.sqrt(x[:, 0] * 0.6) - np.sqrt(x[:, 2] * 0.4)

    losses = {"y": loss(shares) + 0.01 * rng.normal(size=120)}
    settings = SearchSettings(draws=4000)
    found = propose(mixture_or_box("abcde", shares), shares, losses, GaussianProcess, settings=settings)
    best = loss(found.best.point[None])[0]
    assert best < loss(found.ways["paper"].point[None])[0]
    assert best < np.quantile(loss(rng.dirichlet(np.ones(5), 5000)), 0.02)
    assert found.to_dict()["theta"]["a"] == found.best.point[0]


def test_a_surrogate_without_an_error_of_its_own_is_refitted(world):
    x, y = world.columns.features(world.thetas), world.losses
    surrogate = Surrogate.fit(LightGBM, x, y, Objective.of(y, {"first": 1.0}))
    assert list(surrogate.refits) == ["first"]
    value, sd = surrogate.value_with_sd(np.concatenate([x[:5], np.full((1, x.shape[1]), np.nan)]))
    assert (sd[:5] > 0).all()
    assert value[5] == np.inf
    np.testing.assert_array_equal(value[:5], surrogate.value(x[:5]))


def test_a_wide_budget_does_not_lose_the_ratios_of_the_windows(world):
    tokens = np.bincount(world.table.domain_ids, world.table.tokens, minlength=6)
    space = ThetaSpace(world.columns, constraint=TokenConstraint.of(tokens, 0.3 * tokens.sum()))
    points = np.concatenate([block for _, block in space.draw(40, 2)])
    assert (points[:, 12 + 6 : 12 + 12] > space.space.omega_max).any()
    np.testing.assert_allclose(space.from_unit(space.to_unit(points)), points, rtol=1e-5)


def test_the_search_never_ends_worse_than_it_began(world, bold):
    tokens = np.bincount(world.table.domain_ids, world.table.tokens, minlength=6)
    for share in (0.05, 0.3, 0.6):
        constraint = TokenConstraint.of(tokens, share * tokens.sum())
        found = world.propose(constraint=constraint, method="trust_region", draws=500)
        points = np.array([found.ways[name].point for name in ("trust_region", "draws")])
        value, sd = found.surrogate.value_with_sd(found.space.features(points))
        assert (value + sd)[0] <= (value + sd)[1]


def test_a_comparison_that_cannot_be_fitted_is_left_out(world):
    few = {task: y[:9] for task, y in world.losses.items()}
    found = world.propose(few, thetas=world.thetas[:9], make=GaussianProcess, draws=500)
    assert list(found.ways) == ["draws"]


def test_a_task_that_is_only_noise_loses_its_weight():
    weights = {"a": 1.0, "b": 2.0, "c": 0.0, "d": 1.0}
    kept, low = gate(weights, {"a": 3.0, "b": 0.9, "c": 0.1, "d": None}, 1.2)
    assert kept == {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0}
    assert low == {"b": 0.9}
    assert gate({"a": 1.0, "c": 0.0}, {"a": 0.9, "c": 5.0}, 1.2) == ({"a": 1.0, "c": 0.0}, {})
