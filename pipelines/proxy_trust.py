"""How far the proxies' losses can be trusted: noise of seeds, ranks before the end, and proxies stopped early."""

import logging
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.proxy.fidelity import HalvingRule, agreement
from quadmix_plugin.proxy.parts import BASELINE, DRAW, LOSS_PREFIX, PROPOSAL, REPEAT, part_path
from quadmix_plugin.proxy.selection import SELECTION
from quadmix_plugin.search.evaluation import noise
from quadmix_plugin.store import Step

logger = logging.getLogger(__name__)

_HALVING = "proxies/halving.json"


def halving_rule(run: Run, step: Step, pilot: list[int]) -> HalvingRule | None:
    """The rule that the proxies ``pilot``, all ended, give; kept as an artifact so that a resumed run has the same.

    None, with a warning, where too few of them could be trained to give one: nothing is stopped then.
    """
    if step.entry(_HALVING) is None:
        parts = [part for n in pilot if "failure" not in (part := step.read_json(part_path(n)))]
        at, final = _losses_at(parts, run.recipe.proxy.curve_at)
        try:
            rule = HalvingRule.fit(at, final, _weights(run, final))
        except InputError as error:
            logger.warning(
                "successive halving stops nothing: %d of %d pilot proxies could be trained: %s",
                len(parts),
                len(pilot),
                error,
            )
            return None
        step.write_json(_HALVING, rule.to_dict())
    return HalvingRule.from_dict(step.read_json(_HALVING))


def baseline_losses(run: Run) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Name of a baseline → task → losses of its proxies, one per seed [k]; one that always failed is not in it."""
    table = run.require("proxies").read_table("proxies/losses.parquet").sort_by("proxy")
    table = table.filter(pa.array(np.array(table["kind"].to_pylist()) == BASELINE))
    names = np.array(table[SELECTION].to_pylist())
    losses = {name.removeprefix(LOSS_PREFIX): table[name].to_numpy() for name in _loss_columns(table)}
    return {str(name): {task: each[names == name] for task, each in losses.items()} for name in dict.fromkeys(names)}


def final_part(part: dict[str, Any], rule: HalvingRule | None) -> dict[str, Any]:
    """A part with its losses at the end: those of a stopped proxy are expected from where it was stopped."""
    if rule is None or part["share"] == 1.0:
        return part
    losses = rule.expected(part["share"], part["losses"])
    bits = {task: b * losses[task] / part["losses"][task] for task, b in part["bits_per_byte"].items()}
    return {**part, "losses": losses, "bits_per_byte": bits}


def noise_report(thetas: pa.Table, losses: pa.Table, pilots: int | None = None) -> dict[str, Any]:
    """Noise per task from the θ trained under several seeds; empty where none of them could be trained.

    ``pilots``: under successive halving the number of the first proxies, which alone stand for all θ.
    """
    identity = {n: str(theta) for n, theta in zip(*(thetas[c].to_pylist() for c in ("proxy", "theta")), strict=True)}
    kinds = np.array(losses["kind"].to_pylist())
    which = np.array([identity[n] for n in losses["proxy"].to_pylist()])
    whole = np.array(losses["share"].to_pylist()) == 1.0
    repeated = sorted(set(which[kinds == REPEAT]))
    report = {}
    for name in _loss_columns(losses):
        task, values = name.removeprefix(LOSS_PREFIX), losses[name].to_numpy()
        groups = [values[(which == theta) & whole] for theta in repeated]
        across = values[(kinds == DRAW) & whole & (np.array(losses["proxy"]) < (pilots or np.inf))]
        if across.size > 1 and any(group.size > 1 for group in groups):
            report[task] = noise(groups, across, task).to_dict()
    return report


def fidelity_report(run: Run, step: Step, numbers: list[int], rule: HalvingRule | None) -> dict[str, Any]:
    """Rank agreement before the end, what stopping saved, and how many models learnt nothing from context.

    ``numbers`` of the proxies with a θ. Ranks are those of the draws alone: what was proposed lies closer together.
    """
    parts = [part for n in numbers if "failure" not in (part := step.read_json(part_path(n)))]
    drawn = [part for part in parts if part["kind"] == DRAW]
    trained = [part for part in parts if part["kind"] in (DRAW, PROPOSAL)]
    fair = drawn if rule is None else [part for part in drawn if part["proxy"] < run.recipe.proxy.pilots]
    at, final = _losses_at(fair, run.recipe.proxy.curve_at)
    stopped = [part for part in trained if part["share"] < 1.0]
    return {
        "agreement": {
            task: {str(share): value for share, value in by_share.items()}
            for task, by_share in agreement(at, final).items()
        },
        "proxies_in_full": len(trained) - len(stopped),
        "stopped": {str(s): sum(p["share"] == s for p in stopped) for s in sorted({p["share"] for p in stopped})},
        "trained_share": float(np.mean([part["share"] for part in trained])) if trained else 1.0,
        "expected_share": rule.expected_cost if rule else 1.0,
        "forecast_errors": _forecast_errors(rule),
        "not_learnt": sum(part["learnt"] is False for part in parts),
        "retried": sum(part["attempts"] > 1 for part in parts),
    }


def _losses_at(
    parts: list[dict[str, Any]], shares: list[float]
) -> tuple[dict[float, dict[str, NDArray[np.float64]]], dict[str, NDArray[np.float64]]]:
    """Losses of these proxies before the end (share → task → [n]) and at the end (task → [n])."""
    tasks = list(parts[0]["losses"]) if parts else []
    points = [{point["share"]: point["losses"] for point in part["curve"] if point["losses"]} for part in parts]
    seen = [share for share in shares if all(share in each for each in points)]
    at = {share: {task: np.array([each[share][task] for each in points]) for task in tasks} for share in seen}
    return at, {task: np.array([part["losses"][task] for part in parts]) for task in tasks}


def _weights(run: Run, tasks: dict[str, Any]) -> dict[str, float] | None:
    given = run.recipe.search.objective
    return {task: given.get(task, 0.0) for task in tasks} if given else None


def _forecast_errors(rule: HalvingRule | None) -> dict[str, Any]:
    if rule is None:
        return {}
    return {str(rung.share): {task: line.error for task, line in rung.forecasts.items()} for rung in rule.rungs}


def _loss_columns(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name.startswith(LOSS_PREFIX)]
