"""Which proxies there are: one row of work each, whose number and seed depend on the recipe alone.

Draws of Algorithm 1 come first, after them the proposals of later rounds, then repeats, then baselines. Nothing here
trains; the copies of the baselines are made here, those of a θ by the worker that trains on them.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin import registry
from quadmix_plugin.config import Recipe
from quadmix_plugin.labelled_corpus import select_in_memory
from quadmix_plugin.parameters import sample_parameter_vectors
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.proxy.parts import BASELINE, DRAW, PROPOSAL, REPEAT
from quadmix_plugin.proxy.selection import SELECTION, baselines_table
from quadmix_plugin.store import Step

BASELINES = "proxies/baselines.parquet"

SCHEMA = pa.schema(
    [
        ("proxy", pa.int32()),
        ("kind", pa.string()),
        ("seed", pa.int64()),
        ("stream", pa.int64()),
        ("theta", pa.list_(pa.float64())),
        ("round", pa.int32()),
        ("reason", pa.string()),
        (SELECTION, pa.string()),
    ]
)
"""Rows of work: ``theta`` is null in those of a baseline, which ``selection`` names; ``round`` counts from 0;
``reason`` is why a proposal was made, null elsewhere."""


def first_round(run: Run) -> pa.Table:
    """The work that no loss is needed for: the draws, some of them under other seeds again, and the baselines."""
    return _table([*_draws(run), *_repeats(run), *_baselines(run)])


def proposals(run: Run, number: int, vectors: NDArray[np.float64], reasons: Sequence[str]) -> pa.Table:
    """The work of round ``number`` (from 1): one row for each of the θ [n, width] that a fit proposed."""
    begin = sum(run.recipe.search.rounds[:number])
    rows = [
        _row(begin + i, PROPOSAL, _data_order(run), theta=vector, round=number, reason=reason)
        for i, (vector, reason) in enumerate(zip(vectors.tolist(), reasons, strict=True))
    ]
    return _table(rows)


def without_baselines(work: pa.Table) -> pa.Table:
    """The rows that have a θ."""
    return work.filter(pa.array(np.array(work["kind"].to_pylist()) != BASELINE))


def with_work(losses: pa.Table, work: pa.Table) -> pa.Table:
    """Losses, one row per proxy, with the ``round`` and the ``selection`` that its row of work has."""
    place = {number: i for i, number in enumerate(work["proxy"].to_pylist())}
    rows = work.take([place[number] for number in losses["proxy"].to_pylist()])
    for name in ("round", SELECTION):
        losses = losses.append_column(SCHEMA.field(name), rows[name])
    return losses


def baseline_selectors(scorers: Sequence[str]) -> dict[str, tuple[str, dict[str, str]]]:
    """The name of every baseline, with the selector and its options: Random, and the top-k of each scorer."""
    best = {f"top_k[{scorer}]": ("top_k", {"scorer_name": scorer}) for scorer in scorers}
    return {"random": ("random", {}), **best}


def number_of_baselines(recipe: Recipe) -> int:
    """How many proxies are trained on baselines."""
    return recipe.proxy.baselines * len(baseline_selectors(tuple(recipe.scorers)))


def write_baselines(run: Run, step: Step, selected_tokens: Callable[[], NDArray[np.float64]]) -> str | None:
    """Keeps the copies of every baseline as ``proxies/baselines.parquet``; returns its path, None where there are none.

    A baseline has as many unique tokens as the θ of the first round select in the median, copies counted, or the whole
    corpus where that is less. ``selected_tokens`` gives what each of these θ is expected to select.
    """
    if not number_of_baselines(run.recipe):
        return None
    if step.entry(BASELINES) is None:
        budget = min(round(float(np.median(selected_tokens()))), int(run.table.tokens.sum()))
        copies = {}
        for name, (plugin, options) in baseline_selectors(run.scorers).items():
            selector = registry.create("selectors", plugin, options, f"baseline {name}")
            seed = run.seed_for(f"baseline {name}")
            copies[name] = select_in_memory(selector, run.table, run.normalised, budget, seed)
        step.write_table(BASELINES, baselines_table(copies), budget_tokens=budget)
    return str(step.read_path(BASELINES))


def _draws(run: Run) -> Iterator[dict]:
    for number, theta in enumerate(_vectors(run)):
        yield _row(number, DRAW, _data_order(run), theta=theta)


def _repeats(run: Run) -> Iterator[dict]:
    """The first θ again; under independent draws each has the documents of its first proxy."""
    settings = run.recipe.proxy
    again = [(theta, i + 1) for theta in range(settings.repeated) for i in range(settings.repeats - 1)]
    vectors = _vectors(run)
    for number, (theta, i) in enumerate(again, settings.number):
        yield _row(number, REPEAT, _data_order(run, i), stream=theta, theta=vectors[theta])


def _baselines(run: Run) -> Iterator[dict]:
    settings = run.recipe.proxy
    begin = settings.number + settings.repeated * (settings.repeats - 1)
    work = [(name, i) for name in baseline_selectors(run.scorers) for i in range(settings.baselines)]
    for number, (name, i) in enumerate(work, begin):
        yield _row(number, BASELINE, _data_order(run, i), stream=0, selection=name)


def _vectors(run: Run) -> NDArray[np.float64]:
    """The θ of the first round: the first of as many draws as there are proxies."""
    recipe = run.recipe
    vectors = sample_parameter_vectors(
        recipe.proxy.number,
        len(run.table.scorers),
        len(run.table.domains),
        recipe.seed,
        space=recipe.space.to_parameter_space(),
    )
    return vectors[: recipe.search.rounds[0]] if recipe.search.rounds else vectors


def _data_order(run: Run, repeat: int = 0) -> int:
    """The seed of the order of the data: one for all proxies, and others for their repeats."""
    return run.seed_for(f"data order {repeat}" if repeat else "data order")


def _row(number: int, kind: str, seed: int, **others: object) -> dict:
    return {"proxy": number, "kind": kind, "seed": seed, "stream": number, "round": 0, **others}


def _table(rows: Sequence[dict]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)
