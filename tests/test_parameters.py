"""θ and Algorithm 1: shapes, refusals, statistics of the draw, and what is written to theta.json."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import (
    Parameters,
    ParameterSpace,
    average_parameters,
    sample_parameter_vectors,
    sample_parameters,
)
from quadmix_plugin.sampling import sampling_value

GOOD = {
    "alpha": [[0.25, 0.75], [1.0, 0.0]],
    "lam": [1.0, 1000.0],
    "omega": [0.1, 1.0],
    "eta": [0.0, 1.0],
    "epsilon": [0.0, 0.001],
    "domains": ["Arts", "Science"],
    "scorers": ["edu", "web"],
}


def algorithm_1(uniforms: list[float], n_scorers: int, n_domains: int) -> dict[str, list]:
    """Algorithm 1 in the paper's words, fed with numbers in (0, 1] in the order in which it needs them."""
    stream = iter(uniforms)
    a = [next(stream) for _ in range(n_scorers)]
    global_weights = [value / sum(a) for value in a]
    alpha = []
    for _ in range(n_domains):
        b = [next(stream) for _ in range(n_scorers)]
        products = [global_weights[n] * b[n] for n in range(n_scorers)]
        alpha.append([product / sum(products) for product in products])
    lam = [10 ** (3 * next(stream)) for _ in range(n_domains)]
    omega = [0.1 * next(stream) for _ in range(n_domains)]
    eta = [next(stream) for _ in range(n_domains)]
    epsilon = [next(stream) / 1000 for _ in range(n_domains)]
    return {"alpha": alpha, "lam": lam, "omega": omega, "eta": eta, "epsilon": epsilon}


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**40), st.integers(0, 255))
def test_algorithm_1_is_the_papers(n_scorers: int, n_domains: int, seed: int, draw: int) -> None:
    per_draw = n_scorers + n_scorers * n_domains + 4 * n_domains
    uniforms = 1.0 - np.random.default_rng([seed, 0]).random((256, per_draw))
    theta = sample_parameters(draw + 1, n_scorers, n_domains, seed)[draw]
    for name, values in algorithm_1(uniforms[draw].tolist(), n_scorers, n_domains).items():
        np.testing.assert_allclose(getattr(theta, name), values, rtol=1e-12, err_msg=name)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 2**63))
def test_draws_lie_in_the_ranges_of_the_paper(n_scorers: int, n_domains: int, seed: int) -> None:
    for theta in sample_parameters(5, n_scorers, n_domains, seed):
        assert theta.alpha.shape == (n_domains, n_scorers)
        np.testing.assert_allclose(theta.alpha.sum(axis=1), 1, rtol=1e-12)
        assert ((theta.lam >= 1) & (theta.lam <= 1000 * (1 + 1e-12))).all()
        assert ((theta.omega > 0) & (theta.omega <= 0.1)).all()
        assert ((theta.eta >= 0) & (theta.eta <= 1)).all()
        assert ((theta.epsilon >= 0) & (theta.epsilon <= 0.001)).all()
        assert theta.to_vector().size == (n_scorers + 4) * n_domains


def test_three_scorers_and_26_domains_are_182_numbers() -> None:
    theta = sample_parameters(1, 3, 26, seed=0)[0]
    assert theta.to_vector().size == len(theta.names()) == len(set(theta.names())) == 182


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 600])
def test_a_longer_list_begins_with_the_shorter_one(n: int) -> None:
    vectors = [theta.to_vector() for theta in sample_parameters(n, 2, 3, seed=11)]
    longer = sample_parameter_vectors(700, 2, 3, seed=11, space=ParameterSpace())
    assert len(vectors) == n
    assert all(np.array_equal(vector, row) for vector, row in zip(vectors, longer, strict=False))


def test_draws_and_seeds_differ() -> None:
    rows = [sample_parameter_vectors(600, 2, 3, seed, space=ParameterSpace()) for seed in (0, 1)]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 1200


def test_the_space_replaces_the_papers_ranges() -> None:
    space = ParameterSpace(lam_min=5, lam_max=50, omega_max=1.0, eta_max=3.0, epsilon_max=0.5)
    many = sample_parameters(2000, 1, 2, seed=3, space=space)
    for name, low, high in (("lam", 5, 50), ("omega", 0, 1), ("eta", 0, 3), ("epsilon", 0, 0.5)):
        values = np.concatenate([getattr(theta, name) for theta in many])
        assert values.min() >= low
        assert values.max() <= high * (1 + 1e-12)
        assert values.max() > low + 0.99 * (high - low)
    median = np.median(np.concatenate([theta.lam for theta in many]))
    assert median == pytest.approx(math.sqrt(5 * 50), rel=0.08)  # log-uniform


def test_statistics_of_algorithm_1() -> None:
    # 400 draws of 26 domains: the standard error of the first mean is .0004, of the second .005.
    thetas = sample_parameters(400, 3, 26, seed=20250425)
    ranks = (np.arange(2000) + 0.5) / 2000
    ids = np.repeat(np.arange(26), ranks.size)
    selected = [sampling_value(np.tile(ranks, 26), ids, theta).mean() for theta in thetas]
    assert np.mean(selected) == pytest.approx(0.061, abs=0.0015)
    first = [sampling_value(np.full(26, 1e-12), np.arange(26), theta) for theta in thetas]
    assert np.mean(np.concatenate(first) < 1.05) == pytest.approx(0.32, abs=0.015)


def test_vector_and_dictionary_are_inverses() -> None:
    for theta in sample_parameters(20, 3, 4, seed=1, domains="ABCD", scorers=("x", "y", "z")):
        assert Parameters.from_vector(theta.to_vector(), 3, theta.domains, theta.scorers) == theta
        assert Parameters.from_dict(json.loads(json.dumps(theta.to_dict()))) == theta


def test_names_follow_the_vector() -> None:
    theta = Parameters(**GOOD)
    named = dict(zip(theta.names(), theta.to_vector(), strict=True))
    assert named["alpha[web, Arts]"] == 0.75
    assert named["alpha[edu, Science]"] == 1.0
    assert named["lam[Science]"] == 1000.0
    assert named["omega[Arts]"] == 0.1
    assert named["epsilon[Science]"] == 0.001


def test_equality_sees_every_part() -> None:
    theta = Parameters(**GOOD)
    assert theta == Parameters(**GOOD)
    assert theta != Parameters(**{**GOOD, "domains": ()})
    assert theta != Parameters(**{**GOOD, "eta": [0.0, 0.9]})
    assert theta != "theta"


def test_save_and_load_keep_every_bit(tmp_path) -> None:
    generator = random.Random(5)  # noqa: S311
    for i in range(50):
        theta = sample_parameters(1, 3, 26, seed=generator.getrandbits(60))[0]
        path = tmp_path / f"theta{i}.json"
        theta.save(path)
        again = tmp_path / f"again{i}.json"
        Parameters.load(path).save(again)
        assert Parameters.load(path) == theta
        assert path.read_bytes() == again.read_bytes()


def test_parameters_do_not_change_after_construction() -> None:
    alpha = np.array([[0.5, 0.5], [1.0, 0.0]])
    theta = Parameters(**{**GOOD, "alpha": alpha})
    alpha[0] = 9
    assert theta.alpha[0, 0] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        theta.omega[0] = 0.7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"alpha": [0.5, 0.5]}, r"alpha: shape \(2,\); give one row per domain"),
        ({"alpha": [[], []]}, r"alpha: shape \(2, 0\); give one row"),
        ({"alpha": [[0.5, 0.5], [1.0]]}, "alpha: .*; give numbers, in rows of one length"),
        ({"lam": [1.0]}, r"lam: shape \(1,\); alpha has 2 rows, so give 2 numbers"),
        ({"eta": ["much", 1]}, "eta: .*'much'; give numbers"),
        ({"omega": [[0.1], [0.1]]}, r"omega: shape \(2, 1\).*give 2 numbers"),
        ({"domains": ["Arts"]}, r"domains: 1 names \(Arts\); give 2 different names"),
        ({"domains": ["Arts", "Arts"]}, "domains: 2 names .*; give 2 different names"),
        ({"domains": "ab"}, "domains: 'ab'; give a list of names"),
        ({"scorers": [1, 2]}, r"scorers: \[1, 2\]; give a list of names"),
        ({"lam": [1.0, math.nan]}, r"lam\[1\] = nan; give a finite number >= 0"),
        ({"epsilon": [math.inf, 0]}, r"epsilon\[0\] = inf; give a finite"),
        ({"eta": [0, -0.5]}, r"eta\[1\] = -0\.5; give a finite number >= 0"),
        ({"alpha": [[0.5, 0.5], [1.5, -0.5]]}, r"alpha\[1, 1\] = -0\.5; give"),
        ({"alpha": [[0.5, 0.5], [0.5, 0.4]]}, r"alpha\[Science\] sums to 0\.9; .*must sum to 1"),
        ({"omega": [0.1, 0.0]}, r"omega\[Science\] = 0; give a share in \(0, 1\]"),
        ({"omega": [1.5, 0.1]}, r"omega\[Arts\] = 1\.5; give a share in \(0, 1\]"),
    ],
)
def test_bad_parameters_are_refused_with_place_value_and_remedy(change: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Parameters(**{**GOOD, **change})


def test_files_that_are_not_parameters_are_refused_by_name(tmp_path) -> None:
    cases = {
        "none.json": (None, "no such file; give the theta.json"),
        "text.json": ("alpha", "not JSON .*; give the theta.json"),
        "list.json": ("[1]", "found list; parameters have the keys alpha"),
        "missing.json": (json.dumps({"alpha": [[1]]}), r"found \['alpha'\]; parameters have the keys"),
        "extra.json": (json.dumps({**GOOD, "gamma": 1}), "found .*gamma.*; parameters have the keys"),
        "value.json": (json.dumps({**GOOD, "omega": [2, 1]}), r"omega\[Arts\] = 2; give a share"),
        "null.json": (json.dumps({**GOOD, "domains": None}), "domains: None; give a list of names"),
        "nan.json": (json.dumps({**GOOD, "eta": [math.nan, 0]}), r"eta\[0\] = nan"),
    }
    for name, (content, says) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=f"{name}: {says}"):
            Parameters.load(path)
    with pytest.raises(InputError, match=r"cannot be read .*; give a theta.json"):
        Parameters.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((-1, 1, 1, 0), "n=-1.*give n >= 0"),
        ((1, 0, 1, 0), "n_scorers=0.*at least one of each"),
        ((1, 1, 0, 0), "n_domains=0.*at least one of each"),
        ((1, 1, 1, -7), "seed=-7; give an integer >= 0"),
    ],
)
def test_impossible_draws_are_refused(arguments: tuple, says: str) -> None:
    with pytest.raises(InputError, match=says):
        sample_parameters(*arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"lam_min": 0},
        {"lam_max": 0.5},
        {"lam_max": math.inf},
        {"omega_max": 1.2},
        {"omega_max": 0},
        {"eta_max": -1},
        {"epsilon_max": math.nan},
    ],
)
def test_impossible_spaces_are_refused_by_key_and_value(change: dict) -> None:
    ((key, value),) = change.items()
    with pytest.raises(InputError, match=f"space.{key}: {value}; give"):
        ParameterSpace(**change)


@pytest.mark.parametrize(("size", "n_scorers"), [(0, 3), (13, 3), (15, 3)])
def test_a_vector_of_the_wrong_length_is_refused(size: int, n_scorers: int) -> None:
    with pytest.raises(InputError, match=r"shape .* does not divide .*give \(N \+ 4\)·M numbers"):
        Parameters.from_vector(np.ones(size), n_scorers)
    with pytest.raises(InputError, match="does not divide"):
        Parameters.from_vector(np.ones((2, 7)), n_scorers)


def test_averages_differ_only_in_lambda() -> None:
    low, high = (Parameters(**{**GOOD, "lam": [x, x], "omega": [w, w]}) for x, w in ((1.0, 0.1), (100.0, 0.3)))
    unit, paper = (average_parameters([low, high], kind) for kind in ("unit", "paper"))
    np.testing.assert_allclose(unit.lam, 10)
    np.testing.assert_allclose(paper.lam, 50.5)
    np.testing.assert_allclose(unit.omega, 0.2)
    np.testing.assert_array_equal(unit.omega, paper.omega)
    assert unit.domains == ("Arts", "Science")
    np.testing.assert_allclose(average_parameters(sample_parameters(10, 3, 4, 0)).alpha.sum(axis=1), 1)


@pytest.mark.filterwarnings("error")
def test_an_average_with_a_lambda_of_zero_is_zero_without_a_warning() -> None:
    assert average_parameters([Parameters(**{**GOOD, "lam": [0, 4]}), Parameters(**GOOD)]).lam[0] == 0


def test_averages_that_have_no_meaning_are_refused() -> None:
    with pytest.raises(InputError, match="no parameters to average; give at least one"):
        average_parameters([])
    with pytest.raises(InputError, match=r"'mean'; choose 'unit' or 'paper'"):
        average_parameters([Parameters(**GOOD)], "mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"parameters 1 have other domains .*; average those of one search"):
        average_parameters([Parameters(**GOOD), Parameters(**{**GOOD, "domains": ["Arts", "Games"]})])
