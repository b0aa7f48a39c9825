"""Cross-validation, metrics and noise: how far a regressor and a loss can be trusted."""

import json

import numpy as np
import pytest

from quadmix_plugin.errors import InputError
from quadmix_plugin.search.evaluation import Metrics, cross_validate, noise
from quadmix_plugin.search.regressors import LightGBM


def linear(n, f, seed, sd=0.1):
    rng = np.random.default_rng(seed)
    x = rng.random((n, f))
    return x, x[:, 0] - 0.7 * x[:, 1] + sd * rng.normal(size=n)


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
