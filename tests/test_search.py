"""The search for θ*: regressor, cross-validation, noise, and the paper's procedure."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.parameters import ParameterSpace, sample_parameter_vectors, sample_parameters
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.search.evaluation import Metrics, cross_validate, noise
from quadmix_plugin.search.features import FeatureMap
from quadmix_plugin.search.objective import Objective
from quadmix_plugin.search.proposals import propose
from quadmix_plugin.search.regressors import LightGBM

REGMIX = Path(__file__).parents[2] / "shared" / "data" / "regmix"
PUBLISHED = {"trees": 1000, "learning_rate": 0.01, "leaves": 31, "min_child_samples": 20, "colsample": 1.0, "seed": 42}
DOMAINS, SCORERS = tuple("abcdef"), ("p", "q")


def regmix(part):
    if not REGMIX.is_dir():
        pytest.skip(f"the public RegMix tables are not at {REGMIX}")
    mixtures = pd.read_csv(REGMIX / f"{part}_mixture_1m.csv", index_col="index")
    losses = pd.read_csv(REGMIX / f"{part}_pile_loss_1m.csv", index_col="index")
    joined = mixtures.join(losses, how="inner")
    return joined[mixtures.columns].to_numpy(), joined["metric/the_pile_pile_cc_val_loss"].to_numpy()


@pytest.mark.parametrize(
    ("options", "least"), [(PUBLISHED, 0.985), ({}, 0.95), ({"early_stopping": 3, **PUBLISHED}, 0.98)]
)
def test_lightgbm_ranks_the_public_regmix_test_rows(options, least):
    x, y = regmix("train")
    unseen, real = regmix("test")
    assert x.shape == (512, 17)
    regressor = registry.create("regressors", "lightgbm", options)
    regressor.fit(x, y)
    assert Metrics.of(real, regressor.predict(unseen)).spearman > least


def linear(n, f, seed, sd=0.1):
    rng = np.random.default_rng(seed)
    x = rng.random((n, f))
    return x, x[:, 0] - 0.7 * x[:, 1] + sd * rng.normal(size=n)


def test_defaults_learn_from_32_rows_where_lightgbms_own_predict_a_constant():
    x, y = linear(32, 8, seed=0)
    unseen, real = linear(500, 8, seed=1)
    ours, theirs = LightGBM(), LightGBM(**PUBLISHED)
    ours.fit(x, y)
    assert Metrics.of(real, ours.predict(unseen)).spearman > 0.6
    with pytest.raises(InputError, match="32 rows to fit on, but min_child_samples=20 needs 40"):
        theirs.fit(x, y)


def test_the_same_rows_and_options_give_the_same_model_byte_for_byte():
    import lightgbm

    x, y = linear(60, 12, seed=2)
    models = [LightGBM(seed=s) for s in (3, 3, 4)]
    for model in models:
        model.fit(x, y)
    texts = [model.to_text() for model in models]
    assert texts[0] == texts[1] != texts[2]
    np.testing.assert_array_equal(lightgbm.Booster(model_str=texts[0]).predict(x), models[0].predict(x))


def test_regressor_options_and_rows_are_checked():
    with pytest.raises(RecipeError, match=r"search\.options\.tres: unknown key; did you mean 'trees'"):
        registry.create("regressors", "lightgbm", {"tres": 5}, "search.options")
    with pytest.raises(RecipeError, match="trees: input should be greater than or equal to 1, not 0"):
        registry.create("regressors", "lightgbm", {"trees": 0})
    with pytest.raises(InputError, match=r"rows \[3\] are not finite"):
        LightGBM().fit(np.zeros((12, 2)), np.where(np.arange(12) == 3, np.nan, 1.0))
    with pytest.raises(InputError, match="call fit first"):
        LightGBM().predict(np.zeros((1, 2)))


class Memory:
    """A regressor that knows the rows it was fitted on by heart and says 0 for all others."""

    def fit(self, x, y):
        self.known = {row.tobytes(): value for row, value in zip(x, y, strict=True)}

    def predict(self, x):
        return np.array([self.known.get(row.tobytes(), 0.0) for row in x])

    def to_text(self):
        return ""


def test_no_row_is_predicted_by_a_model_that_saw_it():
    x, y = linear(30, 3, seed=0)
    result = cross_validate(Memory, x, {"task": y + 5}, folds=4, repeats=2)["task"]
    assert (result.predicted == 0).all()
    assert result.predicted.shape == (2, 30)
    assert result.metrics.spearman == 0.0


def test_cross_validation_finds_a_signal_and_none_in_permuted_targets():
    x, y = linear(64, 10, seed=4)
    shuffled = np.random.default_rng(1).permutation(y)
    tasks = cross_validate(LightGBM, x, {"real": y, "permuted": shuffled}, folds=5, repeats=4, seed=2**62)
    assert tasks["real"].metrics.spearman > 0.75
    assert tasks["real"].metrics.r2 > 0.4
    assert abs(tasks["permuted"].metrics.spearman) < 0.25
    assert tasks["permuted"].metrics.r2 < 0.1
    again = cross_validate(LightGBM, x, {"real": y}, folds=5, repeats=4, seed=2**62)
    np.testing.assert_array_equal(again["real"].predicted, tasks["real"].predicted)
    assert 0 < tasks["real"].spread.mae < tasks["real"].metrics.mae


def test_metrics_are_those_of_their_definitions():
    real, predicted = np.array([1.0, 2.0, 4.0, 8.0]), np.array([2.0, 1.0, 5.0, 9.0])
    metrics = Metrics.of(real, predicted)
    assert metrics.spearman == pytest.approx(0.8)
    assert metrics.mae == 1.0
    assert metrics.r2 == pytest.approx(1 - 4 / ((real - 3.75) ** 2).sum())
    assert metrics.pearson == pytest.approx(np.corrcoef(real, predicted)[0, 1])
    assert Metrics.of(real, np.full(4, 6.3)).spearman == 0.0


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"hella": np.full(20, 2.5)}, "losses of hella: all 20 rows have the same loss"),
        (
            {"arc": np.where(np.arange(20) % 7 == 6, np.nan, np.arange(20))},
            r"losses of arc: 2 are not finite, rows \[6, 13\]",
        ),
        ({"arc": np.arange(19.0)}, r"losses of arc: shape \(19,\) for 20 rows"),
        ({}, "no task"),
    ],
)
def test_losses_that_cannot_be_learned_are_named(losses, message):
    with pytest.raises(InputError, match=message):
        cross_validate(LightGBM, np.random.default_rng(0).random((20, 3)), losses)


def test_rows_that_cannot_be_cross_validated_are_named():
    x = np.random.default_rng(0).random((20, 3))
    with pytest.raises(InputError, match="3 rows, 5 folds"):
        cross_validate(LightGBM, x[:3], {"arc": np.arange(3.0)})
    x[11] = x[4]
    with pytest.raises(InputError, match=r"rows \[4, 11\] have the same features"):
        cross_validate(LightGBM, x, {"arc": np.arange(20.0)})


def test_noise_is_pooled_over_the_seeds_of_each_theta():
    # variances 0.04 with 2 degrees of freedom and 0.02 with 1, whatever the means: (2 · 0.04 + 1 · 0.02) / 3
    measured = noise([[5.0, 5.2, 4.8], [7.3], [9.0, 9.2], []], [4.0, 5.0, 6.0])
    assert measured.noise_sd == pytest.approx((0.1 / 3) ** 0.5)
    assert measured.theta_sd == pytest.approx(1.0)
    assert measured.signal_to_noise == pytest.approx(30**0.5)
    assert measured.reliability == pytest.approx(1 - 0.1 / 3)
    assert (measured.degrees, measured.repeats, measured.thetas) == (3, 5, 2)
    # the chi-square table has 0.2158 and 9.3484 for 2.5 and 97.5 % at 3 degrees of freedom
    assert measured.noise_sd_low == pytest.approx((0.1 / 9.3484) ** 0.5, rel=1e-4)
    assert measured.noise_sd_high == pytest.approx((0.1 / 0.2158) ** 0.5, rel=1e-3)


def test_noise_of_one_theta_is_its_standard_deviation_over_seeds(caplog):
    measured = noise(np.array([[5.0, 5.2, 4.8]]), [4.0, 5.0, 6.0])
    assert measured.noise_sd == pytest.approx(0.2)
    assert measured.signal_to_noise == pytest.approx(5.0)
    assert (measured.repeats, measured.thetas) == (3, 1)
    assert not caplog.text
    json.dumps(measured.to_dict(), allow_nan=False)


def test_repeats_that_do_not_differ_are_warned_of(caplog):
    same = noise([[0.1] * 3, [0.7] * 3], [4.0, 6.0], "arc")  # the mean of three times 0.1 is not 0.1
    assert (same.noise_sd, same.noise_sd_low, same.noise_sd_high) == (0.0, 0.0, 0.0)
    assert same.signal_to_noise is None
    assert same.reliability == 1.0
    assert "arc: all 6 repeats have the same loss; does the trainer use its seed" in caplog.text
    assert noise([[5.0, 5.2]], [4.0, 4.0]).reliability == 0.0
    assert noise([[5.0, 5.2]], [4.0, 4.1]).reliability == 0.0  # less spread over θ than over seeds


def test_the_interval_of_the_noise_holds_the_real_one_in_95_of_100_measurements():
    rng = np.random.default_rng(4)
    losses = 3 + rng.normal(size=(1000, 4, 1)) + 0.3 * rng.normal(size=(1000, 4, 3))
    measured = [noise(repeats, [1.0, 2.0]) for repeats in losses]
    assert all(m.noise_sd_low < m.noise_sd < m.noise_sd_high for m in measured)
    assert np.mean([m.noise_sd_low < 0.3 < m.noise_sd_high for m in measured]) == pytest.approx(0.95, abs=0.02)


def test_reliability_is_the_r2_of_the_real_loss_against_that_of_single_seeds():
    rng = np.random.default_rng(5)
    real = rng.normal(3.0, 0.2, 4000)
    seeds = real[:, None] + rng.normal(0.0, 0.1, (4000, 3))
    measured = noise(seeds[:1000], seeds[:, 0])
    assert measured.reliability == pytest.approx(0.8, abs=0.02)
    assert Metrics.of(seeds[:, 0], real).r2 == pytest.approx(measured.reliability, abs=0.02)


@pytest.mark.parametrize(
    ("repeats", "across", "message"),
    [
        ([[5.0], [4.0]], [4.0, 6.0], r"noise of arc: repeats of each θ: \[1, 1\]; at least 2 of one θ are needed"),
        ([], [4.0, 6.0], r"repeats of each θ: \[\]"),
        ([5.0, 5.1], [4.0, 6.0], r"losses of repeats of one θ have the shape \(\); give a list of losses"),
        ([[5.0, np.inf]], [4.0, 6.0], "losses of repeats of one θ are not finite"),
        ([[5.0, 5.1]], [4.0, np.nan], "losses of θ are not finite"),
        ([[5.0, 5.1]], [4.0], "noise of arc: 1 θ; at least 2 are needed"),
    ],
)
def test_losses_without_a_noise_are_named(repeats, across, message):
    with pytest.raises(InputError, match=message):
        noise(repeats, across, "arc")


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

    def propose(self, losses=None, **options):
        chosen = {"weights": {"first": 1.0}, "draws": 5000, "seed": 3, **options}
        return propose(self.thetas, losses or self.losses, self.table, self.normalised, LightGBM, **chosen)


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def proposal(world):
    return world.propose()


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
    assert again.regressors["first"].to_text() == proposal.regressors["first"].to_text()


def test_the_top_draws_are_those_with_the_lowest_prediction(world):
    everything = world.propose(draws=5000, top=5000).top
    values = [candidate.objective for candidate in everything]
    assert values == sorted(values)
    assert sorted(candidate.number for candidate in everything) == list(range(5000))
    assert len({candidate.theta.to_vector().tobytes() for candidate in everything}) == 5000
    ten = world.propose(draws=5000, top=10)
    assert [c.number for c in ten.top] == [c.number for c in everything[:10]]
    assert ten.quantiles[0.0] == values[0]
    assert ten.quantiles[0.5] == pytest.approx(np.median(values))
    shorter = world.propose(draws=600, top=600).top
    longer = {c.number: c.theta for c in everything}
    assert all(c.theta == longer[c.number] for c in shorter)


def test_draws_differ_from_the_proxies_under_the_same_seed(world):
    drawn = world.propose(draws=64, top=64, seed=11).top
    proxies = {theta.to_vector().tobytes() for theta in world.thetas}
    assert not proxies & {candidate.theta.to_vector().tobytes() for candidate in drawn}


@pytest.mark.parametrize("average", ["unit", "paper"])
def test_lambda_is_averaged_in_the_space_asked_for(world, average):
    found = world.propose(draws=500, average=average)
    lam = np.array([candidate.theta.lam for candidate in found.top])
    expected = np.exp(np.log(lam).mean(axis=0)) if average == "unit" else lam.mean(axis=0)
    np.testing.assert_allclose(found.theta.lam, expected)
    np.testing.assert_allclose(found.theta.omega, np.mean([c.theta.omega for c in found.top], axis=0))
    np.testing.assert_allclose(found.theta.alpha.sum(axis=1), 1.0)


def test_predictions_of_the_proposal_come_from_its_regressors(world, proposal):
    x = world.columns.features([proposal.theta])
    for task, model in proposal.regressors.items():
        assert proposal.losses[task] == model.predict(x)[0]
    y = world.losses["first"]
    assert proposal.objective_value == pytest.approx((proposal.losses["first"] - y.mean()) / y.std(ddof=1))
    best = proposal.best_proxy
    assert best.number == int(np.argmin(y))
    assert best.theta == world.thetas[best.number]
    assert best.losses["first"] == y.min()
    seen = world.columns.features([best.theta])
    assert proposal.best_proxy_predicted.losses["second"] == proposal.regressors["second"].predict(seen)[0]


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
    assert (world.columns.statistics([c.theta for c in found.top]).selected_tokens > 1).all()
    with pytest.raises(InputError, match=r"none of 100 draws selects a token.*omega_max"):
        world.propose(space=ParameterSpace(omega_max=1e-9, epsilon_max=0.0), draws=100)


class Diverging(LightGBM):
    def predict(self, x):
        return np.full(len(np.asarray(x)), np.nan)


def test_a_regressor_that_predicts_nan_is_refused(world):
    with pytest.raises(InputError, match="predicts losses that are not finite"):
        propose(world.thetas, world.losses, world.table, world.normalised, Diverging, draws=100)


def test_a_search_that_cannot_start_says_why(world):
    with pytest.raises(InputError, match="top 10 of 5 draws"):
        world.propose(draws=5)
    with pytest.raises(InputError, match=r"losses of first: 1 are not finite, rows \[9\]"):
        world.propose({"first": np.where(np.arange(64) == 9, np.inf, world.losses["first"])})
    other = sample_parameters(64, 2, 6, seed=11, domains=tuple("ghijkl"), scorers=SCORERS)
    search = partial(propose, other, world.losses, world.table, world.normalised, LightGBM)
    with pytest.raises(InputError, match="domains g, h, i, j, k, l, but those of the corpus are a, b"):
        search(draws=100)


def test_progress_counts_all_draws(world):
    done = []
    world.propose(draws=5000, features="theta", progress=done.append)
    assert done == [4096, 5000]
