"""Expected gain: its interval, its words, the overlap of selections; and what a fit's error depends on."""

import numpy as np
import pytest

from quadmix_plugin.search.gain import Prediction, gain_over, jaccard, verdict, weighted
from quadmix_plugin.search.insight import error_by_rows, importance
from quadmix_plugin.search.regressors import LightGBM, PublishedLightGBM


def test_a_gain_is_in_units_of_the_noise_and_its_interval_holds_all_errors():
    prediction = Prediction(loss=5.0, error=0.03, sd=0.04, checked=4.9)
    assert (prediction.low, prediction.high) == pytest.approx((5 - 1.96 * 0.05, 5 + 1.96 * 0.05))
    gain = gain_over("random", [5.3, 5.1], prediction, noise_sd=0.1, overlap=0.2)
    assert gain.gain == pytest.approx(0.2)
    assert gain.in_noise == pytest.approx(2.0)
    half = 1.96 * np.sqrt(0.05**2 + 0.1**2 / 2)
    assert (gain.low, gain.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert gain_over("random", [5.3], prediction, noise_sd=None).in_noise is None


def test_beyond_what_was_checked_the_interval_reaches_back_to_it():
    bold = Prediction(loss=5.0, error=0.03, sd=0.04, checked=5.6)
    assert bold.low == pytest.approx(5 - 1.96 * 0.05)
    assert bold.high == pytest.approx(5.6 + 1.96 * 0.05)
    gain = gain_over("random", [5.65], bold, noise_sd=None)
    assert gain.gain == pytest.approx(0.65)
    assert gain.low == pytest.approx(0.05 - 1.96 * np.sqrt(0.05**2 + 0.03**2))  # a noise unknown is the error
    assert not verdict([gain])[0]


def test_the_verdict_is_on_the_strongest_rival():
    sure, unsure = Prediction(5.0, 0.01, 0.0, 5.0), Prediction(5.0, 0.5, 0.0, 5.0)
    both = {"random": [6.0], "top_k[edu]": [5.2]}
    evidence, text = verdict([gain_over(name, losses, sure, 0.05) for name, losses in both.items()])
    assert evidence
    assert text.startswith("A gain is to be expected over the strongest baseline proxy, top_k[edu] (+0.2000, 4.0 ×")
    evidence, text = verdict([gain_over(name, losses, unsure, 0.05) for name, losses in both.items()])
    assert not evidence
    assert text.startswith("No evidence of gain over the strongest baseline proxy, top_k[edu]")
    assert text.endswith("the interval holds 0. One is to be expected over random.")
    evidence, text = verdict([gain_over("top_k[edu]", [4.0], sure, 0.05)])
    assert not evidence
    assert text.startswith("No gain: θ* is predicted to be worse")
    assert verdict([]) == (False, "No evidence of gain over a baseline: none was trained; set proxy.baselines.")
    assert "random could not be trained." in verdict([], ["random"])[1]
    gains = [gain_over("random", [6.0], sure, 0.05)]
    assert verdict(gains, ["top_k[edu]"])[1].endswith("top_k[edu] could not be trained and may be stronger.")


def test_overlap_is_weighed_by_tokens_and_counts_documents_once():
    tokens = np.array([10, 20, 30, 40])
    assert jaccard(tokens, [1, 2, 0, 0], [0, 1, 3, 0]) == 20 / 60
    assert jaccard(tokens, [1, 1, 0, 0], [5, 7, 0, 0]) == 1.0
    assert jaccard(tokens, [0, 0, 0, 0], [0, 0, 0, 0]) == 1.0


def test_losses_are_weighed():
    assert weighted({"a": 2.0, "b": 4.0}, {"a": 1.0, "b": 3.0}) == 3.5
    np.testing.assert_allclose(weighted({"a": np.array([1.0, 2.0])}, {"a": 0.5}), [1.0, 2.0])


def test_more_rows_make_a_smaller_error_and_what_cannot_be_fitted_is_left_out():
    rng = np.random.default_rng(0)
    x = rng.random((160, 6))
    y = 3 * x[:, 0] + x[:, 1] + 0.01 * rng.normal(size=160)
    curves = error_by_rows({"trees": LightGBM, "published": PublishedLightGBM}, x, y, repeats=3)
    sizes, errors = curves["trees"]
    assert sizes.tolist() == [32, 64, 96, 128]
    assert errors.shape == (4, 3)
    assert errors[-1].mean() < 0.7 * errors[0].mean()
    assert curves["published"][0].tolist() == [64, 96, 128]  # 40 rows are the fewest for it


def test_what_matters_is_what_the_loss_is_made_of():
    rng = np.random.default_rng(1)
    x = rng.random((120, 8))
    y = 3 * x[:, 2] + x[:, 5] + 0.01 * rng.normal(size=120)
    found = importance(LightGBM, x, y, [f"f{i}" for i in range(8)])
    assert np.argsort(-found.mean)[:2].tolist() == [2, 5]
    assert found.mean[2] > 5 * np.abs(np.delete(found.mean, [2, 5])).max()
