"""The figures of a search, made from its artifacts: for the report, and as SVG and PNG beside them."""

import re
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from quadmix_plugin.figures import (
    Drawing,
    domain_shares,
    error_by_proxies,
    importance,
    merge_weights,
    pareto_front,
    predicted_candidates,
    predicted_real,
)
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.report import sampling_curves
from quadmix_plugin.search import optimise
from quadmix_plugin.store import Step

Shares = tuple[Sequence[str], ArrayLike, ArrayLike]
"""Domains [M], and the percent of all tokens that each has before and after selection."""

_WAYS = {
    "trust_region": {
        "trust_region": "trust region (θ*)",
        "draws": "mean of the best draws",
        "paper": "paper's procedure (LightGBM)",
    },
    "paper": {"draws": "mean of the best draws (θ*)", "paper": "same by LightGBM's defaults"},
}
_LOSS = "loss_"
_NATS = "nats per token"


def named_ways(optimum: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The ways to θ that were computed, as ``metrics.json`` has them, by what they are called; that of θ* first."""
    names = _WAYS[optimum["method"]]
    return {name: optimum["ways"][way] for way, name in names.items() if way in optimum["ways"]}


def search_drawings(step: Step, folder: str = "search") -> dict[str, Drawing]:
    """What the regressors predict, where the ways to θ* stand among it, what the error depends on, what matters.

    Keys are names of files without suffix.
    """
    metrics = step.read_json(f"{folder}/metrics.json")
    candidates = step.read_table(f"{folder}/candidates.parquet")
    tasks = _tasks(metrics)
    optimum = metrics["optimum"]
    sd = optimum["objective_of"]["sd"][tasks[0]] if len(tasks) == 1 else None
    unit = _NATS if sd else "standard deviations over proxies"
    drawn = {task: candidates[_LOSS + task].to_numpy() for task in tasks}
    usable = np.all([np.isfinite(values) for values in drawn.values()], axis=0)
    drawn = {task: values[usable] for task, values in drawn.items()}
    marks = _marks(metrics, tasks)
    curves = {
        name: (np.array(curve["proxies"]), np.array(curve["mae"]) * (sd or 1.0))
        for name, curve in metrics["error_by_proxies"].items()
    }
    drawings = {"candidates": predicted_candidates(drawn, marks)}
    if curves:
        noise, of = _noise_mae(metrics, sd), tasks[0] if sd else "objective"
        drawings["error_by_proxies"] = error_by_proxies(of, curves, unit=unit, noise_mae=noise)
    if len(tasks) > 1:
        first, second = _most_opposed(drawn)
        pair = np.stack([drawn[first], drawn[second]], axis=1)
        on_front = np.isin(np.arange(len(pair)), optimise.pareto_front(pair))
        drawings["pareto"] = pareto_front(first, second, drawn[first], drawn[second], on_front, marks)
    table = step.read_table(f"{folder}/importance.parquet")
    values = table["importance"].to_numpy() * (sd or 1.0), table["sd"].to_numpy() * (sd or 1.0)
    unit = f"increase of the error ({unit})"
    drawings["importance"] = importance(table["feature"].to_pylist(), *values, unit=unit)
    return drawings


def write_figures(
    step: Step, folder: str, theta: Parameters, noise: dict[str, dict[str, Any]], shares: Shares | None = None
) -> None:
    """Writes every figure of the search as ``<folder>/figures/<name>.svg`` and ``.png``.

    ``candidates``, ``error_by_proxies``, ``pareto``, ``importance``, ``predicted_real-<task>``, ``weights``,
    ``shares`` (of what θ* is expected to select, where they are given) and ``curve-<number>-<domain>``.
    """
    drawings = search_drawings(step, folder)
    drawings |= _predicted(step, folder, noise)
    drawings["weights"] = merge_weights(theta)
    if shares is not None:
        drawings["shares"] = _shares(shares)
    drawings |= _curves(theta)
    with TemporaryDirectory() as scratch:
        for stem, drawing in drawings.items():
            if all(step.entry(f"{folder}/figures/{stem}.{kind}") for kind in ("svg", "png")):
                continue
            files = drawing.save(Path(scratch), stem)
            with step.writing(*(f"{folder}/figures/{file.name}" for file in files)) as temporaries:
                for file, temporary in zip(files, temporaries, strict=True):
                    temporary.write_bytes(file.read_bytes())


def _predicted(step: Step, folder: str, noise: dict[str, dict[str, Any]]) -> dict[str, Drawing]:
    metrics = step.read_json(f"{folder}/metrics.json")
    table = step.read_table(f"{folder}/predictions.parquet").to_pandas()
    drawn = {}
    for name, rows in table.groupby("task", sort=False):
        task = str(name)
        note = f"Spearman {metrics['targets'][task]['spearman']:.2f}"
        noise_sd = noise.get(task, {}).get("noise_sd")
        drawn[task] = predicted_real(task, rows["real"], rows["predicted"], noise_sd, note)
    return dict(zip(_stems("predicted_real", drawn), drawn.values(), strict=True))


def _shares(shares: Shares) -> Drawing:
    """The domain with most tokens on top, as in the report."""
    domains, before, after = shares
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    order = sorted(range(len(domains)), key=lambda m: (-old[m], domains[m]))
    return domain_shares([domains[m] for m in order], old[order], new[order])


def _curves(theta: Parameters) -> dict[str, Drawing]:
    drawn = sampling_curves(theta)
    width = max(2, len(str(len(drawn) - 1)))
    names = theta.domains or [""] * len(drawn)
    stems = ("-".join(filter(None, ("curve", f"{m:0{width}d}", _safe(name)))) for m, name in enumerate(names))
    return dict(zip(stems, drawn, strict=True))


def _stems(kind: str, names: Iterable[str]) -> list[str]:
    """``<kind>-<name>`` of each as a file name; what differs only in letters that are left out is numbered."""
    stems: list[str] = []
    taken: set[str] = set()  # some file systems do not tell capitals apart
    for name in names:
        first = stem = f"{kind}-{_safe(name) or 'task'}"
        number = 1
        while stem.casefold() in taken:
            number += 1
            stem = f"{first}-{number}"
        stems.append(stem)
        taken.add(stem.casefold())
    return stems


def _safe(name: str) -> str:
    """What of a name can be in the name of a file; empty where nothing can."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:80]


def _tasks(metrics: dict[str, Any]) -> list[str]:
    weights = metrics["optimum"]["objective_of"]["weights"]
    return sorted((task for task in weights if weights[task] > 0), key=lambda task: -weights[task])


def _marks(metrics: dict[str, Any], tasks: list[str]) -> dict[str, dict[str, float]]:
    optimum = metrics["optimum"]
    losses = {name: way["losses"] for name, way in named_ways(optimum).items()}
    losses["best observed proxy"] = optimum["best_proxy"]["losses"]
    losses |= {f"{name} (measured)": each for name, each in metrics["gain"]["losses"].items() if name == "random"}
    return {name: {task: each[task] for task in tasks} for name, each in losses.items()}


def _noise_mae(metrics: dict[str, Any], sd: float | None) -> float | None:
    """The mean absolute error of a perfect prediction of one training; known here for a single task only."""
    noise = metrics["gain"]["noise_sd"]
    return None if noise is None or sd is None else noise * float(np.sqrt(2 / np.pi))


def _most_opposed(drawn: dict[str, Any]) -> tuple[str, str]:
    """The two tasks whose predicted losses go together least, where a front says most."""
    pairs = list(combinations(drawn, 2))
    with np.errstate(invalid="ignore"):
        together = [np.nan_to_num(np.corrcoef(drawn[a], drawn[b])[0, 1], nan=1.0) for a, b in pairs]
    return pairs[int(np.argmin(together))]
