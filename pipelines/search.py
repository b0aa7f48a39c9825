"""Step 3: a regressor from parameters to losses, its error on unseen ones, θ*, and the gain to expect of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError, UsageError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.parquet import read_parquet
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.expected_gain import expected_gain, prediction_of
from quadmix_plugin.pipelines.proxy_rounds import token_constraint
from quadmix_plugin.pipelines.search_figures import write_figures
from quadmix_plugin.proxy.parts import DRAW, LOSS_PREFIX, PROPOSAL
from quadmix_plugin.search.evaluation import CrossValidation, Metrics, bootstrap_intervals, cross_validate
from quadmix_plugin.search.features import FeatureMap
from quadmix_plugin.search.gain import weighted
from quadmix_plugin.search.insight import Importance, error_by_rows, importance
from quadmix_plugin.search.objective import gate
from quadmix_plugin.search.optimise import TrustRegion
from quadmix_plugin.search.proposals import Proposal, SearchSettings, propose
from quadmix_plugin.search.regressors import Regressor
from quadmix_plugin.search.spaces import ThetaSpace
from quadmix_plugin.store import Step, content_key

_TRUSTED = 0.4
"""Below this rank correlation the search orders unseen θ hardly better than chance (48 proxies: p = .005)."""

_LONGEST = 80  # characters of a folder's name
_MANY = 1_000  # rows, from which on one cross-validation says enough and takes long enough
_KEPT_DRAWS = 5_000  # predictions that are written; the front is written whole


def search(run: Run) -> None:
    """Writes θ*, its expected gain, the fit's errors and the figures under ``search/``.

    Raises:
        InputError: an objective that names a task without losses, or losses that cannot be learned from.
    """
    step = run.step("search")
    if not step.is_done:
        _Search(run, step, "search", tuple(run.recipe.search.exclude_scorers)).write()


def ablate(run: Run, scorers: Sequence[str]) -> Step:
    """Searches again with these scorers' weights forced to 0, beside the run's own search: the paper's ablation.

    Writes the same files under ``search/without-<scorer>…/``; the proxies are those of the run.

    Raises:
        UsageError: a scorer that the recipe does not have, or all of them.
    """
    recipe = run.recipe
    if unknown := [name for name in scorers if name not in recipe.scorers]:
        raise UsageError(f"--exclude-scorer {unknown[0]}: not among scorers ({', '.join(recipe.scorers)})")
    excluded = tuple(name for name in run.scorers if name in (*scorers, *recipe.search.exclude_scorers))
    if len(excluded) == len(recipe.scorers):
        raise UsageError("--exclude-scorer: every scorer is excluded; leave at least one")
    name = f"without-{'-'.join(excluded)}"
    if len(excluded) > 1:  # names may hold hyphens themselves, and many are long
        name = f"{name[:_LONGEST]}-{content_key(list(excluded))[:8]}"
    step = run.directory.step(f"search-{name}", content_key("ablation", list(excluded), run.keys["search"]))
    if not step.is_done:
        _Search(run, step, f"search/{name}", excluded).write()
    return step


@dataclass(frozen=True)
class _Search:
    """One search and the folder that its artifacts go to."""

    run: Run
    step: Step
    folder: str
    excluded: tuple[str, ...]

    def write(self) -> None:
        """Searches, unless an interrupted command has done so, and draws the figures that are not there yet."""
        step, started, path = self.step, time.monotonic(), f"{self.folder}/metrics.json"
        if step.entry(path) is None:
            self._search(path)
        metrics, theta = step.read_json(path), Parameters.from_dict(step.read_json(f"{self.folder}/theta.json"))
        noise = self.run.step("proxies").read_json("proxies/noise.json")
        write_figures(step, self.folder, theta, noise, self._shares(theta))
        step.finish(seconds=round(time.monotonic() - started, 2), headline=metrics["headline"])

    def _search(self, path: str) -> None:
        """Writes θ* and the tables, and last the metrics to ``path``, which stand for all of them."""
        run, step = self.run, self.step
        numbers, thetas, losses = proxy_losses(run)
        weights, gated = gated_weights(run, losses)
        losses = _varying(losses, weights)
        columns = FeatureMap.of(run.table, run.normalised, run.recipe.search.features)
        points = columns.vectors(thetas)
        x = columns.features(points)
        judged = self._judge(x, losses)
        proposal = self._propose(self._space(columns), points, losses, {task: weights[task] for task in losses})
        objective = proposal.objective.value(losses)
        learning = error_by_rows(_makers(run), x, objective, seed=run.seed_for("learning curve"))
        matters = importance(_chosen(run, proposal), x, objective, columns.names(), seed=run.seed_for("importance"))
        expected = expected_gain(run, proposal, judged, proposal.theta)
        step.write_json(f"{self.folder}/theta.json", proposal.theta.to_dict())
        self._write_tables(proposal, judged, numbers, matters)
        # What was proposed lies close together: ranks are those of the draws alone.
        drawn = np.array(numbers) < (run.recipe.search.rounds[0] if run.recipe.search.rounds else np.inf)
        fair = {task: each.of_rows(drawn) for task, each in judged.items()}
        metrics = _metrics(fair, judged, proposal, numbers)
        metrics |= {"gated_out": gated, "excluded_scorers": list(self.excluded), "gain": expected}
        metrics["error_by_proxies"] = {
            name: {"proxies": sizes.tolist(), "mae": error.tolist()} for name, (sizes, error) in learning.items()
        }
        metrics["headline"] = _headline(fair, proposal, gated, expected)
        step.write_json(path, metrics)

    def _space(self, columns: FeatureMap) -> ThetaSpace:
        recipe = self.run.recipe
        constraint = token_constraint(self.run)
        excluded = tuple(columns.scorers.index(name) for name in self.excluded)
        return ThetaSpace(columns, recipe.space.to_parameter_space(), excluded, constraint)

    def _judge(self, x: NDArray[np.float64], losses: dict[str, Any]) -> dict[str, CrossValidation]:
        settings = self.run.recipe.search
        once = settings.regressor == "auto" or len(x) > _MANY  # auto cross-validates within each fold as well
        seed = self.run.seed_for("folds")
        return cross_validate(_maker(self.run), x, losses, folds=settings.folds, repeats=1 if once else 3, seed=seed)

    def _propose(
        self, space: ThetaSpace, points: NDArray[np.float64], losses: dict[str, Any], weights: dict[str, float]
    ) -> Proposal:
        run, settings = self.run, self.run.recipe.search
        # θ that were trained are features of the fit as they are; only candidates are constrained.
        return propose(
            space,
            points,
            losses,
            _maker(run),
            weights=weights,
            settings=SearchSettings(
                settings.method,
                settings.draws,
                settings.top,
                settings.average,
                TrustRegion(settings.trust_radius, settings.pessimism),
                run.seed_for("search"),
            ),
            progress=lambda done: run.progress("search", done, settings.draws),
        )

    def _shares(self, theta: Parameters) -> tuple[Any, Any, Any]:
        """Domains and their shares of the tokens in percent, of the corpus and as θ* is expected to select."""
        before = self.run.table.domain_tokens
        columns = FeatureMap.of(self.run.table, self.run.normalised)
        after = columns.statistics([theta]).tokens_per_domain[0]
        return theta.domains, 100 * before / before.sum(), 100 * after / after.sum()

    def _write_tables(
        self, proposal: Proposal, judged: dict[str, CrossValidation], numbers: list[int], matters: Importance
    ) -> None:
        self.step.write_table(f"{self.folder}/predictions.parquet", _predictions(judged, numbers))
        self.step.write_table(f"{self.folder}/candidates.parquet", _candidates(proposal))
        columns = {"feature": list(matters.names), "importance": matters.mean, "sd": matters.sd}
        self.step.write_table(f"{self.folder}/importance.parquet", pa.table(columns))
        text = "\n".join(f"# {task}\n{model.to_text()}" for task, model in proposal.surrogate.regressors.items())
        self.step.write_text(f"{self.folder}/regressor.txt", text)


def proxy_losses(run: Run) -> tuple[list[int], list[Parameters], dict[str, NDArray[np.float64]]]:
    """Number, θ and losses (task → [T]) of the drawn and the proposed proxies; repeats and failed ones left out."""
    step, kinds = run.require("proxies"), (DRAW, PROPOSAL)
    drawn = read_parquet(step.read_path("proxies/thetas.parquet"), filters=[("kind", "in", kinds)]).sort_by("proxy")
    table = step.read_table("proxies/losses.parquet")
    table = table.filter(pa.array(np.isin(table["kind"].to_pylist(), kinds))).sort_by("proxy")
    numbers = table["proxy"].to_pylist()
    drawn = drawn.filter(pa.array(np.isin(drawn["proxy"].to_numpy(), numbers)))
    domains, scorers = run.table.domains, run.table.scorers
    thetas = [Parameters.from_vector(v, len(scorers), domains, scorers) for v in drawn["theta"].to_pylist()]
    names = [name for name in table.column_names if name.startswith(LOSS_PREFIX)]
    return numbers, thetas, {name.removeprefix(LOSS_PREFIX): table[name].to_numpy() for name in names}


def gated_weights(run: Run, losses: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Weight of every task that counts, and signal to noise of those that lose theirs for being too low.

    Where all are too low, or the noise is unknown, none is left out.

    Raises:
        InputError: an objective that names a task without losses.
    """
    settings = run.recipe.search
    if unknown := sorted(set(settings.objective) - set(losses)):
        raise InputError(f"search.objective: no losses for {', '.join(unknown)}; tasks are {', '.join(sorted(losses))}")
    weights = {task: settings.objective.get(task, 0.0 if settings.objective else 1.0) for task in losses}
    noise = run.step("proxies").read_json("proxies/noise.json")
    ratios = {task: each["signal_to_noise"] for task, each in noise.items()}
    return gate(weights, ratios, settings.min_signal_to_noise)


def _maker(run: Run) -> Callable[[], Regressor]:
    settings = run.recipe.search
    return lambda: registry.create("regressors", settings.regressor, settings.options, "search.options")


def _chosen(run: Run, proposal: Proposal) -> Callable[[], Regressor]:
    """The recipe's regressor; where that is ``auto``, the one chosen for the task of the largest weight."""
    weights = proposal.objective.weights
    name = getattr(proposal.surrogate.regressors[max(weights, key=weights.__getitem__)], "chosen", "")
    return registry.load("regressors", name) if name else _maker(run)


def _makers(run: Run) -> dict[str, Callable[[], Regressor]]:
    """Those whose error is compared; the recipe's own has its options."""
    settings = run.recipe.search
    loaded = {name: registry.load("regressors", name, "search.compared") for name in settings.compared}
    return {name: _maker(run) if name == settings.regressor else make for name, make in loaded.items()}


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


def _candidates(proposal: Proposal) -> pa.Table:
    """Predicted losses of the first draws and of the Pareto front; NaN where a draw selects nothing."""
    drawn = proposal.drawn
    rows = np.union1d(np.arange(min(_KEPT_DRAWS, drawn.value.size)), proposal.front)
    front = np.isin(rows, proposal.front)
    losses = {f"{LOSS_PREFIX}{task}": values[rows] for task, values in drawn.losses.items()}
    return pa.table({"draw": rows, "objective": drawn.value[rows], "on_front": front, **losses})


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


def _metrics(
    fair: dict[str, CrossValidation], judged: dict[str, CrossValidation], proposal: Proposal, numbers: list[int]
) -> dict[str, Any]:
    """Errors are those of ``fair``, the rows that were drawn; intervals of predictions rest on all of ``judged``."""
    tasks = {
        task: {**each.metrics.to_dict(), "spread_over_repeats": each.spread.to_dict(), "interval": _intervals(each)}
        for task, each in fair.items()
    }
    weights, optimum = proposal.objective.weights, proposal.to_dict()
    error = np.abs(weighted({task: each.predicted - each.real for task, each in fair.items()}, weights)).mean()
    for best in ("best_proxy", "best_proxy_predicted"):  # a row of the fit; proxies that failed are not in it
        optimum[best]["number"] = numbers[optimum[best]["number"]]
    for name, way in optimum["ways"].items():
        way["interval"] = prediction_of(proposal.ways[name], judged, proposal.objective).to_dict()
    for best in ("best_proxy", "best_proxy_predicted"):
        optimum[best]["measure"] = float(proposal.objective.measure(optimum[best]["losses"]))
    optimum["unit"] = proposal.objective.unit
    chosen = {
        task: model.chosen  # type: ignore[attr-defined]
        for task, model in proposal.surrogate.regressors.items()
        if hasattr(model, "chosen")
    }
    objective = {**_objective_metrics(fair, proposal).to_dict(), "mae_loss": float(error)}
    return {"targets": tasks, "objective": objective, "optimum": optimum, "chosen": chosen}


def _intervals(judged: CrossValidation) -> dict[str, Any]:
    return bootstrap_intervals(judged.real, judged.predicted, 0)


def _varying(losses: dict[str, Any], weights: dict[str, float]) -> dict[str, Any]:
    """The losses without tasks of no weight that are the same for all proxies, of which nothing can be learned."""
    return {task: y for task, y in losses.items() if weights[task] > 0 or np.ptp(y) > 0}


def _headline(
    judged: dict[str, CrossValidation], proposal: Proposal, gated: dict[str, float], expected: dict[str, Any]
) -> str:
    spearman = _objective_metrics(judged, proposal).spearman
    doubt = " — little better than a guess: train more proxies, or on more tokens" if spearman < _TRUSTED else ""
    left = f"; without {', '.join(gated)} (all noise)" if gated else ""
    return (
        f"θ* from {proposal.drawn.value.size:,} draws{left}; cross-validated Spearman {spearman:.2f}{doubt}. "
        f"{expected['verdict']}"
    )
