"""Regressors: what each learns, from how many rows, and how sure it says it is."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.search.choice import Auto, _earliest_of_the_best
from quadmix_plugin.search.evaluation import Metrics
from quadmix_plugin.search.gaussian_process import GaussianProcess
from quadmix_plugin.search.regressors import LightGBM, PublishedLightGBM
from quadmix_plugin.search.support_vectors import LinearSVR, RadialSVR
from quadmix_plugin.search.surrogate import knows_its_error

REGMIX = Path(__file__).parents[2] / "shared" / "data" / "regmix"
EVERY = ("auto", "gp", "lightgbm", "svr-linear", "svr-rbf")


def regmix(part):
    if not REGMIX.is_dir():
        pytest.skip(f"the public RegMix tables are not at {REGMIX}")
    mixtures = pd.read_csv(REGMIX / f"{part}_mixture_1m.csv", index_col="index")
    losses = pd.read_csv(REGMIX / f"{part}_pile_loss_1m.csv", index_col="index")
    joined = mixtures.join(losses, how="inner")
    return joined[mixtures.columns].to_numpy(), joined["metric/the_pile_pile_cc_val_loss"].to_numpy()


@pytest.mark.parametrize(("regressor", "least"), [("lightgbm", 0.95), ("lightgbm-published", 0.98)])
def test_trees_rank_the_public_regmix_test_rows(regressor, least):
    x, y = regmix("train")
    unseen, real = regmix("test")
    assert x.shape == (512, 17)
    model = registry.create("regressors", regressor, {})
    model.fit(x, y)
    assert Metrics.of(real, model.predict(unseen)).spearman > least


@pytest.mark.parametrize(("rows", "least"), [(64, 0.97), (128, 0.985)])
def test_the_default_regressor_ranks_regmix_from_few_rows(rows, least):
    x, y = regmix("train")
    unseen, real = regmix("test")
    chosen = np.random.default_rng(0).permutation(len(x))[:rows]
    model = GaussianProcess()
    model.fit(x[chosen], y[chosen])
    assert Metrics.of(real, model.predict(unseen)).spearman > least
    assert json.loads(model.to_text())["transform"] == "sqrt"


def linear(n, f, seed, sd=0.1):
    rng = np.random.default_rng(seed)
    x = rng.random((n, f))
    return x, x[:, 0] - 0.7 * x[:, 1] + sd * rng.normal(size=n)


def test_defaults_learn_from_32_rows_where_lightgbms_own_predict_a_constant():
    x, y = linear(32, 8, seed=0)
    unseen, real = linear(500, 8, seed=1)
    ours, theirs = LightGBM(), PublishedLightGBM(early_stopping=0)
    ours.fit(x, y)
    assert Metrics.of(real, ours.predict(unseen)).spearman > 0.6
    with pytest.raises(InputError, match="32 rows to fit on, 40 are needed; min_child_samples=20 asks for them"):
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


@pytest.mark.parametrize("name", EVERY)
def test_every_regressor_learns_from_32_rows_and_repeats_itself(name):
    x, y = linear(32, 8, seed=0)
    unseen, real = linear(400, 8, seed=1, sd=0.0)
    models = [registry.create("regressors", name, {}) for _ in range(2)]
    for model in models:
        model.fit(x, y)
    predicted = models[0].predict(unseen)
    assert Metrics.of(real, predicted).spearman > 0.6
    assert models[0].to_text() == models[1].to_text()
    np.testing.assert_array_equal(models[1].predict(unseen), predicted)
    with pytest.raises(InputError, match=r"rows \[3\] are not finite"):
        registry.create("regressors", name, {}).fit(x, np.where(np.arange(32) == 3, np.nan, y))


@pytest.mark.parametrize("model", [GaussianProcess, LinearSVR, RadialSVR])
def test_features_that_are_not_finite_are_named(model):
    x, y = linear(20, 3, seed=0)
    x[5, 1] = np.inf
    with pytest.raises(InputError, match=r"features of rows \[5\] are not finite"):
        model().fit(x, y)


def test_the_gaussian_process_covers_the_truth_and_is_less_sure_far_away():
    x, y = linear(60, 5, seed=3)
    unseen, real = linear(500, 5, seed=4, sd=0.0)
    model = GaussianProcess()
    model.fit(x, y)
    mean, sd = model.predict_with_sd(unseen)
    np.testing.assert_allclose(mean, model.predict(unseen))
    assert 0.8 < np.mean(np.abs(mean - real) < 1.96 * sd) <= 1.0
    far = model.predict_with_sd(unseen + 3.0)[1]
    assert np.median(far) > 3 * np.median(sd)


def test_a_length_scale_for_each_column_is_taken_where_few_columns_matter():
    rng = np.random.default_rng(5)
    x = rng.random((80, 12))
    curved = np.sin(6 * x[:, 0]) + 0.05 * rng.normal(size=80)
    model = GaussianProcess()
    model.fit(x, curved)
    assert "length_scale=[" in model.to_text()
    with_one = GaussianProcess(kernel="isotropic")
    with_one.fit(x, curved)
    unseen = rng.random((400, 12))
    real = np.sin(6 * unseen[:, 0])
    errors = [np.abs(each.predict(unseen) - real).mean() for each in (model, with_one)]
    assert errors[0] < 0.5 * errors[1]


def test_more_rows_than_scales_are_fitted_to_still_count():
    x, y = linear(120, 4, seed=6)
    few, all_rows = GaussianProcess(rows_for_scales=40), GaussianProcess(rows_for_scales=40)
    order = np.sort(np.random.default_rng(0).permutation(120)[:40])
    few.fit(x[order], y[order])
    all_rows.fit(x, y)
    unseen, real = linear(300, 4, seed=7, sd=0.0)
    assert np.abs(all_rows.predict(unseen) - real).mean() < np.abs(few.predict(unseen) - real).mean()


def test_auto_takes_what_predicts_best_and_the_earlier_name_of_equals():
    rng = np.random.default_rng(8)
    x = rng.random((60, 6))
    steps = (x[:, 0] > 0.5) * 1.0 + (x[:, 1] > 0.3) * 2.0 + 0.01 * rng.normal(size=60)
    smooth = np.sin(4 * x[:, 0]) * x[:, 1] + 0.01 * rng.normal(size=60)
    chosen = {}
    for name, y in (("steps", steps), ("smooth", smooth)):
        model = Auto(among=["lightgbm", "gp"])
        model.fit(x, y)
        chosen[name] = model.chosen
        assert min(model.errors, key=model.errors.__getitem__) == model.chosen
    assert chosen == {"steps": "lightgbm", "smooth": "gp"}
    squares = rng.chisquare(1, 60)
    equals = {"first": squares + 0.1 * rng.normal(size=60), "second": squares}
    assert _earliest_of_the_best(equals) == "first"
    assert _earliest_of_the_best({"first": squares + 0.5, "second": squares}) == "second"


def test_auto_leaves_out_what_cannot_be_fitted_and_says_when_nothing_can():
    x, y = linear(12, 3, seed=9)
    model = Auto(among=["lightgbm-published", "gp"])
    model.fit(x, y)
    assert model.chosen == "gp"
    assert knows_its_error(model)
    trees = Auto(among=["lightgbm"])
    trees.fit(x, y)
    assert not knows_its_error(trees)
    with pytest.raises(InputError, match=r"none can be fitted; lightgbm-published: .*40 are needed"):
        Auto(among=["lightgbm-published", "lightgbm"]).fit(x[:8], y[:8])
    with pytest.raises(InputError, match="'auto' is among itself"):
        Auto(among=["auto"])
    with pytest.raises(RecipeError, match="did you mean 'lightgbm'"):
        Auto(among=["lightgbn", "gp"])


def test_rows_to_stop_on_can_be_given():
    x, y = linear(80, 6, seed=10)
    model = LightGBM(trees=500, early_stopping=3)
    model.fit(x, y, held=(x, -y))  # nothing improves on reversed losses
    short = model.to_text().count("Tree=")
    model.fit(x, y, held=(x, y))
    assert short < 5 < model.to_text().count("Tree=")
