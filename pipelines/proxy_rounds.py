"""Rounds of proxies: the first is drawn, the θ of each later one come from a fit to the losses of all before.

The θ of a round are an artifact before any of its proxies is trained, so that a run which was stopped goes on with
the same ones. What makes a good proposal is decided in ``search.rounds``; nothing here trains.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from quadmix_plugin import registry
from quadmix_plugin.errors import RecipeError
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.lowest_loss import mean_loss
from quadmix_plugin.pipelines.proxy_trust import noise_report
from quadmix_plugin.pipelines.proxy_work import proposals, without_baselines
from quadmix_plugin.proxy.parts import DRAW, LOSS_PREFIX, PROPOSAL, merge_parts, part_path
from quadmix_plugin.search.features import FeatureMap
from quadmix_plugin.search.objective import gate
from quadmix_plugin.search.regressors import Regressor
from quadmix_plugin.search.rounds import next_round
from quadmix_plugin.search.token_constraint import TokenConstraint
from quadmix_plugin.store import Step


def require_first_round(run: Run) -> None:
    """Refuses rounds of which the first is too small for the regressor.

    Raises:
        RecipeError: it has fewer proxies than the regressor needs rows.
    """
    rounds, settings = run.recipe.search.rounds, run.recipe.search
    fewest = getattr(_regressor(run), "fewest_rows", 2)
    if rounds and rounds[0] < fewest:
        raise RecipeError(
            f"search.rounds: the first round has {rounds[0]} proxies to fit on; {settings.regressor} needs {fewest}, "
            f"so make it larger"
        )


def keep_round(step: Step, number: int, make: Callable[[], pa.Table]) -> pa.Table:
    """The work of a round (from 0) as it was kept; made and kept where it is not there yet."""
    path = f"proxies/rounds/{number}.parquet"
    if step.entry(path) is None:
        step.write_table(path, make())
    return step.read_table(path)


def propose_round(run: Run, step: Step, number: int, work: pa.Table) -> pa.Table:
    """The work of round ``number`` (from 1) from the losses of ``work``, all ended; failed proxies are left out.

    Raises:
        QuadmixError: none of the proxies could be trained.
        InputError: fewer of them than can be fitted.
    """
    settings = run.recipe.search
    work = without_baselines(work).sort_by("proxy")
    everything, _, _ = merge_parts(step, [part_path(n) for n in work["proxy"].to_pylist()], ["proxy"])
    noise = noise_report(work, everything)
    table = everything.filter(pa.array(np.isin(everything["kind"].to_pylist(), (DRAW, PROPOSAL))))
    fitted = work.filter(pa.array(np.isin(work["proxy"].to_pylist(), table["proxy"].to_pylist())))
    losses = {name.removeprefix(LOSS_PREFIX): table[name].to_numpy() for name in _losses(table)}
    given = {task: settings.objective.get(task, 0.0 if settings.objective else 1.0) for task in losses}
    ratios = {task: each["signal_to_noise"] for task, each in noise.items()}
    batch = next_round(
        settings.rounds[number],
        np.array(fitted["theta"].to_pylist()),
        losses,
        FeatureMap.of(run.table, run.normalised, settings.features),
        lambda: _regressor(run),
        weights=gate(given, ratios, settings.min_signal_to_noise)[0],
        constraint=token_constraint(run),
        space=run.recipe.space.to_parameter_space(),
        excluded=tuple(run.scorers.index(name) for name in settings.exclude_scorers),
        seed=run.seed_for(f"round {number}"),
    )
    return proposals(run, number, batch.vectors, batch.reasons)


def token_constraint(run: Run) -> TokenConstraint | None:
    """The budget that θ are searched at; None where the recipe has none.

    Raises:
        InputError: one out of reach.
    """
    recipe = run.recipe
    if not recipe.search.at_budget or recipe.select.target_tokens is None:
        return None
    most = 2**recipe.space.eta_max + recipe.space.epsilon_max
    return TokenConstraint.of(run.table.domain_tokens, recipe.select.target_tokens, most)


def round_name(rounds: Sequence[int], number: int) -> str:
    """Such as ``round 2 of 3`` for number 1; empty where there are no rounds."""
    return f"round {number + 1} of {len(rounds)}" if rounds else ""


def lowest_by_round(run: Run, losses: pa.Table) -> str:
    """The lowest mean loss that each round of θ has, in words."""
    theta = losses.filter(pa.array(np.isin(losses["kind"].to_pylist(), (DRAW, PROPOSAL))))
    values = mean_loss(run, {name.removeprefix(LOSS_PREFIX): theta[name].to_numpy() for name in _losses(theta)})
    rounds, lowest = theta["round"].to_numpy(), []
    for number in range(len(run.recipe.search.rounds)):
        here = values[rounds == number]
        lowest.append(f"{here.min():.3f}" if here.size else "none")
    return f"{len(lowest)} round{'s' if len(lowest) > 1 else ''} with lowest loss {', '.join(lowest)}"


def _regressor(run: Run) -> Regressor:
    settings = run.recipe.search
    return registry.create("regressors", settings.regressor, settings.options, "search.options")


def _losses(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name.startswith(LOSS_PREFIX)]
