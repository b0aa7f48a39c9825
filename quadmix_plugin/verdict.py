"""The verdict of a comparison: is QuaDMix better than a baseline by more than the seeds scatter?

Pure functions over losses per seed. The rule is stated once, in ``RULE``, and shown in the report. Nothing here
trains, reads files or writes HTML.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Outcome = Literal["better", "worse", "near-tie", "unclear", "unknown"]
Tone = Literal["gain", "none", "worse", "unknown"]

OBJECTIVE = "objective"

RULE = (
    "Lower loss is better. The difference is the baseline's mean loss minus that of QuaDMix. It counts as outside "
    "the noise when the 95 % Welch t interval of the difference excludes zero and the difference is at least one "
    "pooled standard deviation over seeds. A difference below one pooled standard deviation is a near-tie; one in "
    "between is a lean that these seeds do not settle. At least two seeds on each side are needed. The strongest "
    "baseline is the one with the lowest mean here. Each interval stands alone: nothing corrects for the number of "
    "comparisons. Seeds vary the training, not the search for θ*."
)


@dataclass(frozen=True)
class Comparison:
    """QuaDMix against one baseline on one measure (a task, or the objective).

    ``difference`` = baseline mean − QuaDMix mean, so positive favours QuaDMix; ``pooled_sd`` and the Welch interval
    ``low``..``high`` are NaN when ``outcome`` is "unknown", and ``reason`` then says why.
    """

    rival: str
    measure: str
    mean: float
    rival_mean: float
    difference: float
    pooled_sd: float
    low: float
    high: float
    seeds: int
    rival_seeds: int
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the comparison shows, in words; ``objective`` and ``tasks`` hold all the numbers behind it.

    ``numbers`` puts those against the strongest baseline (lowest mean objective) into words; ``objective`` begins
    with it.
    """

    tone: Tone
    headline: str
    numbers: str = ""
    objective: tuple[Comparison, ...] = ()
    tasks: tuple[Comparison, ...] = ()


def compare(ours: ArrayLike, theirs: ArrayLike, rival: str = "baseline", measure: str = OBJECTIVE) -> Comparison:
    """Compares losses over seeds, ``ours`` [n] and ``theirs`` [k], by ``RULE``."""
    from scipy import stats

    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    mean, rival_mean = (float(values.mean()) if values.size else np.nan for values in (a, b))
    difference = rival_mean - mean

    def result(outcome: Outcome, sd: float, low: float, high: float, reason: str = "") -> Comparison:
        return Comparison(rival, measure, mean, rival_mean, difference, sd, low, high, a.size, b.size, outcome, reason)

    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return result("unknown", np.nan, np.nan, np.nan, "a run has no finite loss")
    if min(a.size, b.size) < 2:
        return result("unknown", np.nan, np.nan, np.nan, "fewer than two seeds")
    pooled = float(np.sqrt(((a.size - 1) * a.var(ddof=1) + (b.size - 1) * b.var(ddof=1)) / (a.size + b.size - 2)))
    # Below the rounding of float64 sums the seeds did not vary at all, and t is meaningless.
    if pooled <= 1e-12 * max(abs(mean), abs(rival_mean), 1e-300):
        return result("unknown", np.nan, np.nan, np.nan, "all seeds gave the same loss, so the noise is unknown")
    with warnings.catch_warnings():  # of one side whose seeds agree, which the interval takes as it is
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    low, high = float(interval.low), float(interval.high)
    if abs(difference) < pooled:
        return result("near-tie", pooled, low, high)
    if low > 0:
        return result("better", pooled, low, high)
    return result("worse" if high < 0 else "unclear", pooled, low, high)


def judge(losses: Mapping[str, Mapping[str, Sequence[float]]], quadmix: str = "quadmix") -> Verdict:
    """Judges QuaDMix against every other selector on the objective and on each task.

    ``losses``: selector → measure → one loss per seed; every selector has the same measures, one of them
    ``OBJECTIVE``. ``quadmix`` names the selector that is judged.
    """
    rivals = [name for name in losses if name != quadmix]
    if quadmix not in losses or not rivals:
        lacking = f"no run of {quadmix!r}" if quadmix not in losses else "no baseline"
        return Verdict("unknown", f"No verdict: the comparison has {lacking}.")
    ours = losses[quadmix]
    objective = [compare(ours[OBJECTIVE], losses[name][OBJECTIVE], name) for name in rivals]
    objective.sort(key=lambda c: (np.isnan(c.rival_mean), c.rival_mean, c.rival))
    tasks = tuple(
        compare(ours[task], losses[c.rival][task], c.rival, task)
        for task in ours
        if task != OBJECTIVE
        for c in objective
    )
    tone, headline = _headline(objective)
    return Verdict(tone, headline, _numbers(objective[0]), tuple(objective), tasks)


def _headline(objective: Sequence[Comparison]) -> tuple[Tone, str]:
    """The verdict on the objective; ``objective`` begins with the strongest baseline."""
    strongest = objective[0]
    by = {kind: [c.rival for c in objective if c.outcome == kind] for kind in ("better", "worse", "unknown")}
    if by["worse"]:
        lost = _listed(by["worse"]) if len(by["worse"]) < len(objective) else _every(objective)
        return "worse", f"Worse: QuaDMix θ* loses to {lost} on the objective, outside the noise."
    if strongest.outcome == "unknown":
        return "unknown", f"No verdict against the strongest baseline, {strongest.rival}: {strongest.reason}."
    also = f" It does beat {_listed(by['better'])} outside the noise." if by["better"] else ""
    if strongest.outcome == "near-tie":
        return "none", (
            f"No evidence of gain: QuaDMix θ* and the strongest baseline, {strongest.rival}, are a near-tie.{also}"
        )
    if strongest.outcome == "unclear":
        way = "ahead of" if strongest.difference > 0 else "behind"
        return "none", (
            f"No evidence of gain: QuaDMix θ* is {way} the strongest baseline, {strongest.rival}, but not outside "
            f"the noise of {strongest.seeds} and {strongest.rival_seeds} seeds.{also}"
        )
    if len(by["better"]) == len(objective):
        return "gain", f"Gain: QuaDMix θ* beats {_every(objective)} on the objective, outside the noise."
    rest = [c.rival for c in objective if c.outcome != "better"]
    return "gain", (
        f"Gain: QuaDMix θ* beats the strongest baseline, {strongest.rival}, on the objective, outside the noise; "
        f"against {_listed(rest)} it is not shown."
    )


def _numbers(c: Comparison) -> str:
    text = f"Mean objective {c.mean:.4f} against {c.rival_mean:.4f} of {c.rival}, the strongest baseline"
    if c.outcome == "unknown":
        return f"{text} ({c.seeds} and {c.rival_seeds} seeds)."
    way = "lower" if c.difference > 0 else "higher"
    low, high = sorted((c.low, c.high)) if c.difference > 0 else sorted((-c.low, -c.high))
    interval = f"{low:.4f} to {high:.4f}".replace("-", "−")
    return (
        f"{text}: {abs(c.difference):.4f} {way} (95 % interval {interval}), where one pooled standard "
        f"deviation over {c.seeds} and {c.rival_seeds} seeds is {c.pooled_sd:.4f}."
    )


def _every(objective: Sequence[Comparison]) -> str:
    return "the only baseline" if len(objective) == 1 else f"all {len(objective)} baselines"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
