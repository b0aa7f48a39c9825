"""Step 3: a regressor from parameters to losses, its cross-validated error, and θ*."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.proxy.parts import DRAW, LOSS_PREFIX
from quadmix_plugin.search.evaluation import CrossValidation, Metrics, cross_validate
from quadmix_plugin.search.features import features
from quadmix_plugin.search.proposals import Proposal, propose
from quadmix_plugin.search.regressors import Regressor

_TRUSTED = 0.4
"""Below this rank correlation the search orders unseen θ hardly better than chance (48 proxies: p = .005)."""


def search(run: Run) -> None:
    """Writes ``search/theta.json``, ``predictions.parquet``, ``metrics.json`` and ``regressor.txt``.

    Raises:
        InputError: an objective that names a task without losses, or losses that cannot be learned from.
    """
    step = run.step("search")
    if step.is_done:
        return
    started = time.monotonic()
    settings = run.recipe.search
    numbers, thetas, losses = proxy_losses(run)
    if unknown := sorted(set(settings.objective) - set(losses)):
        raise InputError(f"search.objective: no losses for {', '.join(unknown)}; tasks are {', '.join(sorted(losses))}")
    x, _ = features(thetas, run.table, run.normalised, settings.features)
    judged = cross_validate(_maker(run), x, losses, folds=settings.folds, seed=run.seed_for("folds"))
    proposal = propose(
        thetas,
        losses,
        run.table,
        run.normalised,
        _maker(run),
        weights=settings.objective or None,
        features=settings.features,
        space=run.recipe.space.to_parameter_space(),
        draws=settings.draws,
        top=settings.top,
        average=settings.average,
        seed=run.seed_for("search"),
        progress=lambda done: run.progress("search", done, settings.draws),
    )
    step.write_json("search/theta.json", proposal.theta.to_dict())
    step.write_table("search/predictions.parquet", _predictions(judged, numbers))
    step.write_json("search/metrics.json", _metrics(judged, proposal, numbers))
    text = "\n".join(f"# {task}\n{regressor.to_text()}" for task, regressor in proposal.regressors.items())
    step.write_text("search/regressor.txt", text)
    objective = _objective_metrics(judged, proposal)
    guess = objective.spearman < _TRUSTED
    doubt = " — little better than a guess: train more proxies, or on more tokens" if guess else ""
    step.finish(
        seconds=round(time.monotonic() - started, 2),
        headline=f"θ* from {settings.draws:,} draws; cross-validated Spearman {objective.spearman:.2f}{doubt}",
    )


def proxy_losses(run: Run) -> tuple[list[int], list[Parameters], dict[str, NDArray[np.float64]]]:
    """Number, θ and losses (task → [T]) of the drawn proxies, in their order; repeats and failed ones left out."""
    step = run.require("proxies")
    drawn = pq.read_table(step.read_path("proxies/thetas.parquet"), filters=[("kind", "=", DRAW)]).sort_by("proxy")
    table = step.read_table("proxies/losses.parquet")
    table = table.filter(pa.array(np.array(table["kind"].to_pylist()) == DRAW)).sort_by("proxy")
    numbers = table["proxy"].to_pylist()
    drawn = drawn.filter(pa.array(np.isin(drawn["proxy"].to_numpy(), numbers)))
    domains, scorers = run.table.domains, run.table.scorers
    thetas = [Parameters.from_vector(v, len(scorers), domains, scorers) for v in drawn["theta"].to_pylist()]
    names = [name for name in table.column_names if name.startswith(LOSS_PREFIX)]
    return numbers, thetas, {name.removeprefix(LOSS_PREFIX): table[name].to_numpy() for name in names}


def _maker(run: Run) -> Callable[[], Regressor]:
    settings = run.recipe.search
    return lambda: registry.create("regressors", settings.regressor, settings.options, "search.options")


def _predictions(judged: dict[str, CrossValidation], numbers: list[int]) -> pa.Table:
    parts = [
        pa.table(
            {
                "proxy": pa.array(numbers, pa.int32()),
                "task": pa.array([task] * each.real.size),
                "real": each.real,
                "predicted": each.mean_predicted,
            }
        )
        for task, each in judged.items()
    ]
    return pa.concat_tables(parts)


def _objective_metrics(judged: dict[str, CrossValidation], proposal: Proposal) -> Metrics:
    """The metrics of the weighted objective, in standardised losses; the mean over the repeats, as for the tasks."""
    objective = proposal.objective
    real = objective.value({task: judged[task].real for task in objective.tasks})
    repeats = len(judged[objective.tasks[0]].predicted)
    each = [
        Metrics.of(real, objective.value({task: judged[task].predicted[i] for task in objective.tasks})).to_dict()
        for i in range(repeats)
    ]
    return Metrics(**{name: float(np.mean([metrics[name] for metrics in each])) for name in each[0]})


def _metrics(judged: dict[str, CrossValidation], proposal: Proposal, numbers: list[int]) -> dict[str, Any]:
    tasks = {
        task: {**each.metrics.to_dict(), "spread_over_repeats": each.spread.to_dict()} for task, each in judged.items()
    }
    objective = {**_objective_metrics(judged, proposal).to_dict(), "mae_loss": _mean_loss_error(judged, proposal)}
    optimum = proposal.to_dict()
    for best in ("best_proxy", "best_proxy_predicted"):  # a row of the fit; proxies that failed are not in it
        optimum[best]["number"] = numbers[optimum[best]["number"]]
    return {"targets": tasks, "objective": objective, "optimum": optimum}


def _mean_loss_error(judged: dict[str, CrossValidation], proposal: Proposal) -> float:
    """The mean absolute error of the weighted mean loss, in nats per token rather than standardised."""
    weights = proposal.objective.weights
    errors = [weights[task] * (judged[task].predicted - judged[task].real) for task in proposal.objective.tasks]
    return float(np.abs(np.sum(errors, axis=0)).mean())
