"""The figures of a search, made from its artifacts: for the report, and as SVG and PNG beside them."""

from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from quadmix_plugin.figures import (
    Drawing,
    error_by_proxies,
    importance,
    merge_weights,
    pareto_front,
    predicted_candidates,
    predicted_real,
)
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.search import optimise
from quadmix_plugin.store import Step

WAYS = {"trust_region": "trust region", "draws": "mean of the best draws", "paper": "paper's procedure"}

_LOSS = "loss_"
_NATS = "nats per token"


def search_drawings(step: Step, folder: str = "search") -> list[Drawing]:
    """What the regressors predict, where the ways to θ* stand among it, what the error depends on, what matters."""
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
    drawings = [predicted_candidates(drawn, marks)]
    if curves:
        noise = _noise_mae(metrics, sd)
        drawings.append(error_by_proxies(tasks[0] if sd else "objective", curves, unit=unit, noise_mae=noise))
    if len(tasks) > 1:
        first, second = _most_opposed(drawn)
        pair = np.stack([drawn[first], drawn[second]], axis=1)
        on_front = np.isin(np.arange(len(pair)), optimise.pareto_front(pair))
        drawings.append(pareto_front(first, second, drawn[first], drawn[second], on_front, marks))
    table = step.read_table(f"{folder}/importance.parquet")
    values = table["importance"].to_numpy() * (sd or 1.0), table["sd"].to_numpy() * (sd or 1.0)
    drawings.append(importance(table["feature"].to_pylist(), *values, unit=f"increase of the error ({unit})"))
    return drawings


def write_figures(step: Step, folder: str, theta: Parameters, noise: dict[str, dict[str, Any]]) -> None:
    """Writes every figure of the search as ``<folder>/figures/<name>.svg`` and ``.png``."""
    metrics = step.read_json(f"{folder}/metrics.json")
    predictions = step.read_table(f"{folder}/predictions.parquet").to_pandas()
    drawings = search_drawings(step, folder)
    for task, rows in predictions.groupby("task", sort=False):
        rho = metrics["targets"][task]["spearman"]
        noise_sd = noise.get(str(task), {}).get("noise_sd")
        drawings.append(predicted_real(str(task), rows["real"], rows["predicted"], noise_sd, f"Spearman {rho:.2f}"))
    drawings.append(merge_weights(theta))
    with TemporaryDirectory() as scratch:
        for drawing in drawings:
            files = drawing.save(Path(scratch))
            with step.writing(*(f"{folder}/figures/{file.name}" for file in files)) as temporaries:
                for file, temporary in zip(files, temporaries, strict=True):
                    temporary.write_bytes(file.read_bytes())


def _tasks(metrics: dict[str, Any]) -> list[str]:
    weights = metrics["optimum"]["objective_of"]["weights"]
    return sorted((task for task in weights if weights[task] > 0), key=lambda task: -weights[task])


def _marks(metrics: dict[str, Any], tasks: list[str]) -> dict[str, dict[str, float]]:
    optimum = metrics["optimum"]
    ours = "trust_region" if optimum["method"] == "trust_region" else "draws"
    losses = {"θ*": optimum["ways"][ours]["losses"]}
    losses |= {WAYS[name]: way["losses"] for name, way in optimum["ways"].items() if name != ours}
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
