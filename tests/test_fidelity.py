"""How early losses can be trusted: rank agreement, and the rule that stops proxies."""

import copy
import json
import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from quadmix_plugin.errors import InputError
from quadmix_plugin.proxy.fidelity import HalvingRule, agreement, rank_agreement

SHARES = (0.125, 0.25, 0.5)
TASKS = ("arc", "mmlu")
SEEDS = st.integers(0, 2**32 - 1)


def proxies(n, seed, sd=0.0, shares=SHARES):
    """Losses at the shares and at the end of proxies whose ranks differ from those at the end by noise of ``sd``."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=n)
    final = {task: 3 + k + 0.2 * (common + 0.3 * sd * rng.normal(size=n)) for k, task in enumerate(TASKS)}
    at = {
        share: {task: 4 - share + (1 + share) * y + sd * rng.normal(size=n) for task, y in final.items()}
        for share in shares
    }
    return at, final


def of_proxy(losses, i):
    return {task: float(values[i]) for task, values in losses.items()}


def kept(rule, share, losses):
    """Which proxies of losses task → [n] the rule leaves running at the share."""
    n = len(next(iter(losses.values())))
    return np.array([not rule.stops(share, of_proxy(losses, i)) for i in range(n)])


def thresholds(rule):
    return [rung.threshold for rung in rule.rungs]


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(3, 30))
def test_rank_agreement_depends_on_ranks_alone(seed, n):
    x, y = np.random.default_rng(seed).normal(size=(2, n))
    found = rank_agreement(x, y)
    assert found == pytest.approx(rank_agreement(np.exp(x), 5 + y**3))
    assert found == pytest.approx(-rank_agreement(-x, y))
    assert rank_agreement(x, np.exp(x)) == pytest.approx(1.0)


def test_rank_agreement_is_that_of_the_textbook():
    assert rank_agreement([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(1 - 6 * 2 / (4 * 15))


@pytest.mark.parametrize(
    ("partial", "final"), [([], []), ([1.0, 2.0], [1.0, 2.0]), ([0.1] * 4, [1, 2, 3, 4]), ([1, 2, 3], [7, 7, 7])]
)
def test_no_rank_agreement_where_there_are_no_ranks(partial, final):
    assert rank_agreement(partial, final) is None


def test_agreement_is_given_per_task_by_ascending_share():
    final = {"arc": [1.0, 2.0, 3.0, 4.0], "mmlu": [5.0, 5.0, 5.0, 5.0]}
    at = {0.5: {"mmlu": [1.0, 2, 3, 4], "arc": [1.0, 2, 3, 4]}, 0.25: {"arc": [4.0, 3, 2, 1], "mmlu": [1.0, 2, 3, 4]}}
    found = agreement(at, final)
    assert found == {"arc": {0.25: pytest.approx(-1), 0.5: pytest.approx(1)}, "mmlu": {0.25: None, 0.5: None}}
    assert list(found["arc"]) == [0.25, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rank_agreement([1, 2, 3], [1, 2, 3, 4]), "3 partial and 4 final losses"),
        (lambda: rank_agreement([1, 2, np.nan], [1, 2, 3]), r"partial losses: 1 are not finite, rows \[2\]"),
        (lambda: rank_agreement([[1, 2, 3]], [1, 2, 3]), r"partial losses: shape \(1, 3\)"),
        (lambda: agreement({0.5: {"arc": [1.0]}}, {"mmlu": [1.0]}), r"share 0.5: tasks \['arc'\]; give losses of mmlu"),
    ],
)
def test_losses_whose_ranks_cannot_be_compared_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_objective_is_the_weighted_mean_of_standardised_losses():
    at, final = proxies(20, seed=1, sd=0.02)
    rule = HalvingRule.fit(at, final, {"arc": 3.0, "mmlu": 1.0})
    for stage, (share, rung) in enumerate(zip(SHARES, rule.rungs, strict=True), start=1):
        mean = {task: statistics.fmean(at[share][task]) for task in TASKS}
        sd = {task: statistics.stdev(at[share][task]) for task in TASKS}
        objective = [
            sum(w * (at[share][t][i] - mean[t]) / sd[t] for t, w in (("arc", 0.75), ("mmlu", 0.25))) for i in range(20)
        ]
        below = sorted(objective)
        position = 21 * 0.5**stage - 1  # between the pilot proxies of these ranks, counted from 0
        low, high = below[int(position)], below[int(position) + 1]
        threshold = low + (position - int(position)) * (high - low)
        assert rung.threshold == pytest.approx(threshold)
        assert kept(rule, share, at[share]).tolist() == [value <= rung.threshold for value in objective]


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(8, 60), st.sampled_from([0.25, 0.5, 0.75]))
def test_agreeing_rungs_each_keep_their_share_of_the_pilot(seed, n, keep):
    at, final = proxies(n, seed)
    rule = HalvingRule.fit(at, final, keep=keep)
    assert [rung.agreement for rung in rule.rungs] == [pytest.approx(1.0)] * 3
    left = [int(kept(rule, share, at[share]).sum()) for share in SHARES]
    # no quantile below the best of the pilot
    assert left == [max(1, int((n + 1) * keep**i)) for i in (1, 2, 3)]


def test_rungs_keep_their_share_of_proxies_that_are_not_in_the_pilot():
    left = []
    for seed in range(150):
        rule = HalvingRule.fit(*proxies(16, seed))
        at, _ = proxies(100, seed + 1000)
        left.append([kept(rule, share, at[share]).mean() for share in SHARES])
    # numpy's own quantile would keep .53, .28 and .17 of them
    np.testing.assert_allclose(np.mean(left, axis=0), [0.5, 0.25, 0.125], atol=0.02)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_rungs_that_do_not_rank_proxies_are_recorded_and_stop_nothing(seed):
    _, final = proxies(40, seed)
    rng = np.random.default_rng([seed, 1])
    at = {share: {task: rng.normal(4, 1, 40) for task in TASKS} for share in SHARES}
    rule = HalvingRule.fit(at, final)
    assert [rung.share for rung in rule.rungs] == list(SHARES)
    assert thresholds(rule) == [None] * 3
    assert all(abs(rung.agreement) < 0.8 for rung in rule.rungs)
    assert all(kept(rule, share, at[share]).all() for share in SHARES)
    assert not rule.stops(0.5, dict.fromkeys(TASKS, 1e6))
    assert rule.expected_cost == 1.0


def test_only_trusted_rungs_are_counted():
    at, final = proxies(41, seed=3)
    at[0.25] = {task: 10 - y for task, y in final.items()}  # the best proxies look worst
    rule = HalvingRule.fit(at, final)
    assert rule.rungs[1].agreement == pytest.approx(-1.0)
    assert rule.rungs[1].threshold is None
    assert [kept(rule, share, at[share]).sum() for share in SHARES] == [21, 41, 10]
    assert rule.expected_cost == pytest.approx(0.125 + 0.5 * 0.375 + 0.25 * 0.5)


def test_trusted_is_the_least_agreement():
    at, final = proxies(40, seed=2, sd=0.15)
    found = HalvingRule.fit(at, final).rungs[0].agreement
    assert 0.5 < found < 0.95
    assert thresholds(HalvingRule.fit(at, final, trusted=found))[0] is not None
    assert thresholds(HalvingRule.fit(at, final, trusted=found + 1e-6))[0] is None


def test_the_agreement_is_that_of_the_objectives_not_of_the_tasks():
    rng = np.random.default_rng(0)
    a, b, swap = rng.normal(size=(3, 200))
    final = {"arc": a, "mmlu": b}
    at = {0.5: {"arc": a + 5 * swap, "mmlu": b - 5 * swap}}  # what one task loses, the other gains
    assert all(each[0.5] < 0.4 for each in agreement(at, final).values())
    unit = {task: (y - y.mean()) / y.std() for task, y in (final | {"early a": at[0.5]["arc"]}).items()}
    early_b = at[0.5]["mmlu"]
    early = unit["early a"] + (early_b - early_b.mean()) / early_b.std()
    rule = HalvingRule.fit(at, final)
    assert rule.rungs[0].agreement == pytest.approx(rank_agreement(early, unit["arc"] + unit["mmlu"]))
    assert rule.rungs[0].agreement > max(each[0.5] for each in agreement(at, final).values())


def test_the_expected_cost_of_halving_at_an_eighth_a_quarter_and_a_half():
    rule = HalvingRule.fit(*proxies(16, seed=0))
    assert rule.expected_cost == pytest.approx(1 / 8 + 1 / 2 * 1 / 8 + 1 / 4 * 1 / 4 + 1 / 8 * 1 / 2)


def trained_share(rule, at):
    running = np.ones(len(at[SHARES[0]]["arc"]), dtype=bool)
    trained = np.full(running.size, SHARES[0])
    for share, until in pairwise([*SHARES, 1.0]):
        running &= kept(rule, share, at[share])
        trained[running] = until
    return trained.mean()


def test_the_cost_is_as_expected_where_rungs_agree_and_lower_where_they_do_not():
    same, differing = HalvingRule.fit(*proxies(400, 5)), HalvingRule.fit(*proxies(400, 5, sd=0.1))
    assert trained_share(same, proxies(2000, 6)[0]) == pytest.approx(same.expected_cost, abs=0.02)
    assert None not in thresholds(differing)
    assert trained_share(differing, proxies(2000, 6, sd=0.1)[0]) < differing.expected_cost


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from(SHARES), st.lists(st.floats(0, 5), min_size=4, max_size=4))
def test_what_is_better_in_every_task_than_a_kept_proxy_is_kept(seed, share, numbers):
    rule = HalvingRule.fit(*proxies(20, seed, sd=0.05), {"arc": 0.2, "mmlu": 0.8})
    proxy = dict(zip(TASKS, numbers[:2], strict=True))
    better = {task: loss - gain for (task, loss), gain in zip(proxy.items(), numbers[2:], strict=True)}
    assert rule.stops(share, proxy) or not rule.stops(share, better)


def test_the_best_of_the_pilot_is_kept_and_the_worst_stopped():
    at, final = proxies(8, seed=4)
    rule = HalvingRule.fit(at, final)
    order = np.argsort(final["arc"])
    for share in SHARES:
        running = kept(rule, share, at[share])
        assert running[order[0]]
        assert not running[order[-1]]


def test_a_task_without_spread_counts_for_nothing():
    at, final = proxies(20, seed=5)
    plain = HalvingRule.fit(at, final, {"arc": 1.0, "mmlu": 1.0})
    for share in SHARES:
        at[share]["flat"] = np.full(20, 0.1)
    rule = HalvingRule.fit(at, final | {"flat": np.full(20, 0.1)}, {"arc": 1.0, "mmlu": 1.0, "flat": 2.0})
    for share in SHARES:
        np.testing.assert_array_equal(kept(rule, share, at[share]), kept(plain, share, proxies(20, seed=5)[0][share]))
        proxy = of_proxy(at[share], int(np.argmin(final["arc"])))
        assert not rule.stops(share, proxy | {"flat": 1e9})
    assert rule.rungs[0].objective.weights == {"arc": 0.25, "mmlu": 0.25, "flat": 0.0}


def test_a_rung_at_which_no_task_has_spread_is_not_trusted():
    at, final = proxies(9, seed=5)
    at[0.25] = {task: np.full(9, 0.1) for task in TASKS}
    rung = HalvingRule.fit(at, final).rungs[1]
    assert (rung.agreement, rung.threshold) == (None, None)
    for task in TASKS:
        assert rung.forecasts[task].slope == 0.0
        assert rung.forecasts[task].intercept == pytest.approx(final[task].mean())


def test_weights_count_by_their_ratio_and_a_task_of_weight_0_not_at_all():
    at, final = proxies(20, seed=6, sd=0.1)
    rule = HalvingRule.fit(at, final, {"arc": 1, "mmlu": 3}, trusted=0)
    np.testing.assert_allclose(
        thresholds(rule), thresholds(HalvingRule.fit(at, final, {"arc": 7, "mmlu": 21}, trusted=0))
    )
    alone = HalvingRule.fit(at, final, {"arc": 1}, trusted=0)
    proxy = of_proxy(at[0.5], 0)
    assert alone.stops(0.5, proxy | {"mmlu": -1e9}) == alone.stops(0.5, proxy | {"mmlu": 1e9})
    assert rule.stops(0.5, proxy | {"mmlu": -1e9}) != rule.stops(0.5, proxy | {"mmlu": 1e9})
    assert HalvingRule.fit(at, final) == HalvingRule.fit(at, final, {"arc": 1, "mmlu": 1})


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(8, 20), st.floats(-5, 5), st.floats(-3, 3))
def test_the_final_loss_expected_of_exactly_linear_losses_is_exact(seed, n, intercept, slope):
    rng = np.random.default_rng(seed)
    early = rng.uniform(3, 5, n)
    rule = HalvingRule.fit({0.25: {"arc": early}}, {"arc": intercept + slope * early})
    unseen = rng.uniform(2, 6)
    assert rule.expected(0.25, {"arc": unseen})["arc"] == pytest.approx(intercept + slope * unseen, abs=1e-9)
    assert rule.rungs[0].forecasts["arc"].error < 1e-10


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-9, 9)), min_size=8, max_size=16))
def test_the_error_is_that_of_leaving_each_pilot_proxy_out(pairs):
    early, late = np.array(pairs, dtype=np.float64).T  # whole numbers: scikit-learn's slope over equal ones is rounding
    rung = HalvingRule.fit({0.5: {"arc": early}}, {"arc": late}).rungs[0]
    left_out = cross_val_predict(LinearRegression(), early[:, None], late, cv=LeaveOneOut())
    assert rung.forecasts["arc"].error == pytest.approx(np.sqrt(np.mean((late - left_out) ** 2)), abs=1e-12)


def test_the_error_of_a_pilot_whose_others_have_no_slope():
    early, late = np.array([3.0] * 9 + [4.0]), np.arange(10.0)
    left_out = cross_val_predict(LinearRegression(), early[:, None], late, cv=LeaveOneOut())
    error = HalvingRule.fit({0.5: {"arc": early}}, {"arc": late}).rungs[0].forecasts["arc"].error
    assert error == pytest.approx(np.sqrt(np.mean((late - left_out) ** 2)))


def test_the_error_is_that_of_proxies_that_are_not_in_the_pilot():
    """And each task is expected from its own loss at that share."""
    promised, met = [], []
    for seed in range(100):
        at, final = proxies(10, seed, sd=0.05)
        rule = HalvingRule.fit(at, final)
        unseen, real = proxies(50, seed + 500, sd=0.05)
        expected = [rule.expected(0.25, of_proxy(unseen[0.25], i))["mmlu"] for i in range(50)]
        met.append(np.mean((expected - real["mmlu"]) ** 2))
        promised.append(rule.rungs[1].forecasts["mmlu"].error ** 2)
    assert np.mean(met) == pytest.approx(np.mean(promised), rel=0.1)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0, 0.5), st.sampled_from([0.3, 0.5, 0.9]))
def test_a_rule_is_the_same_after_json(seed, sd, keep):
    at, final = proxies(12, seed, sd=sd)
    rule = HalvingRule.fit(at, final, {"mmlu": 2.0}, keep=keep)
    content = rule.to_dict()
    text = json.dumps(content, allow_nan=False)
    assert json.loads(text) == content
    assert HalvingRule.from_dict(json.loads(text)) == rule


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("keep"), "keep: Field required"),
        (lambda c: c.update(keep=2), r"keep 2.0; give a share in \(0, 1\)"),
        (lambda c: c.update(rungs=[]), "different shares"),
        (lambda c: c["rungs"].reverse(), "ascending"),
        (lambda c: c["rungs"][0].update(threshold=float("nan")), "Out of range float"),
        (lambda c: c["rungs"][1].update(threshold="0.1"), "rungs.1.threshold: Input should be a valid number"),
        (lambda c: c["rungs"][0]["objective"].pop("sd"), "rungs.0.objective.sd: Field required"),
    ],
)
def test_what_is_no_rule_is_refused(spoil, message):
    content = copy.deepcopy(HalvingRule.fit(*proxies(8, seed=0)).to_dict())
    spoil(content)
    with pytest.raises(InputError, match=f"not a halving rule .*{message}.*; give what HalvingRule.to_dict wrote"):
        HalvingRule.from_dict(content)


def test_a_rule_depends_on_neither_the_order_of_shares_and_tasks_nor_that_of_the_pilot():
    at, final = proxies(20, seed=7, sd=0.02)
    rule = HalvingRule.fit(at, final)
    turned = {share: dict(reversed(at[share].items())) for share in reversed(at)}
    assert HalvingRule.fit(turned, final) == rule
    order = np.random.default_rng(0).permutation(20)
    shuffled = HalvingRule.fit(
        {share: {task: y[order] for task, y in losses.items()} for share, losses in at.items()},
        {task: y[order] for task, y in final.items()},
    )
    np.testing.assert_allclose(thresholds(shuffled), thresholds(rule))


def test_a_share_that_is_no_rung_stops_nothing_and_one_off_by_a_rounding_is_the_rung():
    rule = HalvingRule.fit(*proxies(20, seed=8, shares=(0.3, 0.6)))
    hopeless = dict.fromkeys(TASKS, 100.0)
    assert not rule.stops(0.5, hopeless)
    assert not rule.stops(1.0, hopeless)
    assert rule.stops(0.3, hopeless)
    assert rule.stops(0.1 + 0.2, hopeless)
    assert rule.expected(0.1 + 0.2, hopeless) == rule.expected(0.3, hopeless)
    with pytest.raises(InputError, match=r"the share 0.5 is no rung; give one of 0.3, 0.6"):
        rule.expected(0.5, hopeless)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"arc": 3.0}, r"losses at the share 0.25: tasks \['arc'\]; give losses of arc, mmlu"),
        ({"arc": 3.0, "mmlu": 3.0, "piqa": 3.0}, "tasks"),
        ({"arc": 3.0, "mmlu": float("nan")}, "mmlu: nan is not finite; record the proxy as failed"),
        ({"arc": float("inf"), "mmlu": 3.0}, "arc: inf is not finite"),
    ],
)
def test_a_proxy_that_cannot_be_judged_is_named(losses, message):
    rule = HalvingRule.fit(*proxies(8, seed=0))
    with pytest.raises(InputError, match=message):
        rule.stops(0.25, losses)
    with pytest.raises(InputError, match=message):
        rule.expected(0.25, losses)


GOOD = np.arange(8.0)


@pytest.mark.parametrize(
    ("at", "final", "options", "message"),
    [
        ({0.5: {"arc": GOOD[:7]}}, {"arc": GOOD[:7]}, {}, "7 proxies; train at least 8 in full"),
        ({0.5: {"arc": GOOD[:7]}}, {"arc": GOOD}, {}, "the share 0.5, arc: 7 of 8 proxies"),
        ({0.5: {"arc": np.append(GOOD, 9)}}, {"arc": GOOD}, {}, "arc: 9 of 8 proxies"),
        ({0.5: {"arc": GOOD}}, {"arc": GOOD, "mmlu": GOOD}, {}, r"tasks \['arc'\]; give losses of arc, mmlu"),
        ({0.5: {"arc": GOOD, "mmlu": GOOD}}, {"arc": GOOD}, {}, r"tasks \['arc', 'mmlu'\]"),
        ({0.5: {"arc": np.where(GOOD == 3, np.nan, GOOD)}}, {"arc": GOOD}, {}, r"arc: 1 are not finite, rows \[3\]"),
        ({0.5: {"arc": GOOD}}, {"arc": np.where(GOOD == 3, np.inf, GOOD)}, {}, "final losses of the pilot, arc: 1 are"),
        ({0.5: {"arc": GOOD[None]}}, {"arc": GOOD}, {}, r"shape \(1, 8\)"),
        ({0.5: {"arc": GOOD}}, {"arc": GOOD}, {"weights": {"mmlu": 1.0}}, "no task 'mmlu'"),
        ({0.5: {"arc": GOOD}}, {"arc": GOOD}, {"weights": {"arc": -1.0}}, "give numbers >= 0"),
        ({0.5: {}}, {}, {}, "no task; give losses"),
        ({}, {"arc": GOOD}, {}, r"shares \[\]"),
        ({0.0: {"arc": GOOD}}, {"arc": GOOD}, {}, r"shares \[0.0\]"),
        ({1.0: {"arc": GOOD}}, {"arc": GOOD}, {}, r"shares \[1.0\]"),
        ({-0.5: {"arc": GOOD}}, {"arc": GOOD}, {}, "shares"),
        ({float("nan"): {"arc": GOOD}}, {"arc": GOOD}, {}, "shares"),
        ({0.3: {"arc": GOOD}, 0.1 + 0.2: {"arc": GOOD}}, {"arc": GOOD}, {}, "give different shares"),
        ({0.5: {"arc": GOOD}}, {"arc": GOOD}, {"keep": 1.0}, "keep 1.0"),
        ({0.5: {"arc": GOOD}}, {"arc": GOOD}, {"keep": 0.0}, "keep 0.0"),
        ({0.5: {"arc": GOOD}}, {"arc": GOOD}, {"trusted": 1.5}, "trusted 1.5"),
        ({0.5: {"arc": GOOD}}, {"arc": GOOD}, {"trusted": -0.1}, "trusted -0.1"),
    ],
)
def test_a_pilot_that_gives_no_rule_is_named(at, final, options, message):
    with pytest.raises(InputError, match=message):
        HalvingRule.fit(at, final, **options)
