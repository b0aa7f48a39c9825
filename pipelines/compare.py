"""Step 8: selections by other methods at one token budget, the same models trained on each, and one table.

A selection is named by all that it is made from, so another selector in the recipe leaves the others as they are.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin import registry
from quadmix_plugin.benchmark_scores import BySeed, columns, lower_is_better
from quadmix_plugin.comparison import Selected, comparison_rows, to_csv, to_markdown
from quadmix_plugin.config import selector_plugin
from quadmix_plugin.drawn_tokens import sd_tokens
from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.labelled_corpus import check_selector
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.pipelines.benchmarks import asked, evaluate_models
from quadmix_plugin.pipelines.context import Run, fingerprint, foreign
from quadmix_plugin.pipelines.evaluate import scores_of_theta
from quadmix_plugin.pipelines.export import export_selection
from quadmix_plugin.pipelines.pretrain import Trained, train_selections
from quadmix_plugin.pipelines.run_corpus import RunCorpus
from quadmix_plugin.pipelines.select import QUADMIX, copies_by_row, selected_copies, sizes
from quadmix_plugin.proxy.parts import LOSS_PREFIX
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.schema import COPIES, DOC_ID
from quadmix_plugin.search.gain import jaccard
from quadmix_plugin.stages.selectors.quadmix import Sampled
from quadmix_plugin.store import Step, content_key

logger = logging.getLogger(__name__)

_DIGITS = 12  # of the hash that names a selection

RESULTS, CURVES, TABLE = "compare/results.parquet", "compare/curves.parquet", "compare/comparison"


@dataclass(frozen=True)
class Contestant:
    """One entry of ``compare.selectors``: its plug-in and options, its budget in tokens, and the folder it works in."""

    name: str
    plugin: str
    selector: Any
    budget: int
    folder: str


def compare(run: Run) -> None:
    """Writes ``compare/<name>-<hash>/`` for every selection, and ``comparison.md``, ``.csv`` and ``.json`` over all.

    Raises:
        RecipeError: options that do not fit the corpus, or a budget that cannot be met; before any work.
        QuadmixError: a model could not be trained.
    """
    step, contestants = run.step("compare"), contestants_of(run)
    if is_done(run, contestants):
        return
    check(run, contestants)
    started = time.monotonic()
    for done, each in enumerate(contestants):
        run.progress("compare: select", done, len(contestants), each.name)
        _select(run, step, each)
    run.progress("compare: select", len(contestants), len(contestants))
    copies = {QUADMIX: selected_copies(run), **{each.name: copies_of(run, step, each) for each in contestants}}
    results, curves = _train(run, step, contestants, copies)
    step.write_table(RESULTS, results)
    step.write_table(CURVES, curves)
    others = evaluate_models(run, step, {each.name: each.folder for each in contestants})
    rows = _write_table(run, step, contestants, copies, results, {QUADMIX: scores_of_theta(run), **others})
    best = min((row for row in rows if row["objective"] is not None), key=lambda row: row["objective"], default=None)
    step.finish(
        seconds=round(time.monotonic() - started, 2),
        compared=_asked(run, contestants),
        headline=f"{len(rows)} selections × {len(run.recipe.pretrain.seeds)} models × {run.recipe.pretrain.tokens:,} "
        f"tokens" + (f"; lowest objective: {best['selector']}" if best else ""),
    )


def contestants_of(run: Run) -> list[Contestant]:
    """What θ*'s selection is compared with; where the recipe gives no budget, the tokens of that selection are it."""
    budget = run.recipe.compare.tokens
    if budget is None:
        budget = int(run.require("select").read_json("selection/summary.json")["selection"]["tokens"])
    found = []
    for name, given in run.recipe.compare.selectors.items():
        plugin, options = selector_plugin(name, given)
        place, tokens = f"compare.selectors.{name}", round(budget * given.get("times", 1))
        selector = registry.create("selectors", plugin, options, place)
        key = content_key(plugin, foreign("selectors", plugin), fingerprint(options), tokens)
        found.append(Contestant(name, plugin, selector, tokens, f"compare/{name}-{key[:_DIGITS]}"))
    return found


def check(run: Run, contestants: Sequence[Contestant]) -> None:
    """Refuses what is known to be wrong of any selection before the first is made.

    Raises:
        RecipeError: names the place in the recipe.
    """
    for each in contestants:
        try:
            check_selector(each.selector, run.summary, each.budget)
            if tasks := getattr(each.selector, "tasks", None):
                RunCorpus(run, run.step("compare"), each.folder).target_texts(tasks)
        except InputError as error:
            raise RecipeError(f"compare.selectors.{each.name}: {error}") from error


def is_done(run: Run, contestants: Sequence[Contestant]) -> bool:
    """Whether the last comparison was of these selections."""
    facts = run.step("compare").summary()
    return facts is not None and facts["compared"] == _asked(run, contestants)


def _asked(run: Run, contestants: Sequence[Contestant]) -> dict[str, Any]:
    """What a finished comparison must have been of, to be the one that the recipe asks for."""
    return {"folders": {each.name: each.folder for each in contestants}, "evaluate": asked(run)}


def copies_of(run: Run, step: Step, contestant: Contestant) -> NDArray[np.int32]:
    """The copies of a finished selection [n], rows as in ``run.table``."""
    parts = [
        step.read_table(f"{contestant.folder}/selection/{shard}.parquet", [DOC_ID, COPIES])
        for shard in run.label_shards
    ]
    return copies_by_row(run.table, pa.concat_tables(parts))


def _select(run: Run, step: Step, contestant: Contestant) -> None:
    """Writes the selection and what is known of it, unless it is there."""
    path = f"{contestant.folder}/summary.json"
    if step.entry(path) is not None:
        return
    started = time.monotonic()
    corpus = RunCorpus(run, step, contestant.folder)
    try:
        law = contestant.selector.fit(corpus, contestant.budget, run.seed_for(f"select.{contestant.plugin}"))
    except InputError as error:
        raise InputError(f"compare.selectors.{contestant.name}: {error}") from error
    corpus.write(law)
    facts = sizes(run.table, copies_of(run, step, contestant))
    if not facts["copies"]:
        raise InputError(f"compare.selectors.{contestant.name}: no document is selected; raise compare.tokens")
    expected = {name: getattr(law, name, None) for name in ("expected_tokens", "sd_tokens", "facts")}
    seconds = round(time.monotonic() - started, 2)
    summary = {"plugin": contestant.plugin, "budget_tokens": contestant.budget, "seconds": seconds, **facts, **expected}
    step.write_json(path, summary)
    logger.info("%s: %s tokens of a budget of %s", contestant.name, facts["tokens"], contestant.budget)


def _train(
    run: Run, step: Step, contestants: Sequence[Contestant], copies: dict[str, NDArray[np.int32]]
) -> tuple[pa.Table, pa.Table]:
    """Results and curves of the models of all selections, θ*'s first."""
    pretrain = run.require("pretrain")
    results, curves = (pretrain.read_table(f"pretrain/{name}.parquet") for name in ("results", "curves"))
    if not contestants:
        return results, curves
    selections = []
    for each in contestants:
        files = export_selection(run, step, f"{each.folder}/tokens", step, f"{each.folder}/selection")
        selections.append(Trained(each.name, files, each.folder))
    others, other_curves = train_selections(run, step, selections)
    return (
        pa.concat_tables([results, others], promote_options="default"),
        pa.concat_tables([curves, other_curves], promote_options="default"),
    )


def _write_table(
    run: Run,
    step: Step,
    contestants: Sequence[Contestant],
    copies: dict[str, NDArray[np.int32]],
    results: pa.Table,
    scores: dict[str, BySeed],
) -> list[dict[str, Any]]:
    """The comparison as JSON, Markdown and CSV; returns its rows."""
    table = run.table
    facts = {QUADMIX: {**sizes(table, copies[QUADMIX]), "plugin": QUADMIX}}
    budget = run.recipe.compare.tokens or run.recipe.select.target_tokens
    facts[QUADMIX] |= {"budget_tokens": budget, **_draws_of_theta(run, step)}
    facts |= {each.name: step.read_json(f"{each.folder}/summary.json") for each in contestants}
    overlap = {a: {b: jaccard(table.tokens, copies[a], copies[b]) for b in copies} for a in copies}
    losses = losses_of(results)
    largest = int(table.tokens.max())
    selected = [
        Selected(name, facts[name], losses[name], overlap[name][QUADMIX], columns(found := scores.get(name, {})),
                 lower_is_better(found))
        for name in copies
    ]  # fmt: skip
    rows = comparison_rows(selected, weights_of(run), run.recipe.pretrain.tokens, largest)
    benchmarks = list(dict.fromkeys(name for each in selected for name in each.scores))
    content = {"rows": rows, "overlap": overlap, "facts": facts, "benchmarks": benchmarks}
    step.write_json(f"{TABLE}.json", content)
    step.write_text(f"{TABLE}.md", to_markdown(rows, facts, overlap, benchmarks))
    step.write_text(f"{TABLE}.csv", to_csv(rows, facts))
    return rows


def _draws_of_theta(run: Run, step: Step) -> dict[str, float]:
    """Mean and standard deviation of the tokens of θ*'s selection over the draws of copies."""
    select = run.require("select")
    expected = float(select.read_json("selection/summary.json")["expected"]["expected_tokens"])
    theta = Parameters.from_dict(select.read_json("selection/theta.json"))
    ranks = RankMap.from_table(select.read_table("selection/rank_map.parquet"))
    law = Sampled(theta, ranks, run.recipe.seed, expected)
    return {"expected_tokens": expected, "sd_tokens": sd_tokens(RunCorpus(run, step, "compare"), law)}


def losses_of(results: pa.Table) -> dict[str, dict[str, list[float]]]:
    """Selector → task → one loss per seed, from ``results.parquet``."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in results.to_pylist():
        for name in row:
            if name.startswith(LOSS_PREFIX):
                task = found.setdefault(row["selector"], {}).setdefault(name.removeprefix(LOSS_PREFIX), [])
                task.append(row[name])
    return found


def weights_of(run: Run) -> dict[str, float]:
    """The weight of every task: those of the search, or of the recipe where none was made; empty: all equally."""
    if "search" in run.steps and run.step("search").is_done:
        return run.step("search").read_json("search/metrics.json")["optimum"]["objective_of"]["weights"]
    return dict(run.recipe.search.objective)
