# pyright: reportAttributeAccessIssue=false
# pyarrow makes its compute functions at import; no checker sees them.
"""Step 4: the selection under θ*, scaled to the token budget where the recipe has one."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from nemo_curator.pipeline import Pipeline
from numpy.typing import NDArray

from quadmix_plugin.budget import expected_tokens, scale_to_budget
from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.labelled_corpus import domain_ids
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.parquet import read_parquet
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.rank import FitRankMap, widened
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.schema import (
    COPIES,
    DOC_ID,
    DOMAIN,
    MERGED_QUALITY,
    QUALITY_RANK,
    SAMPLING_VALUE,
    TOKENS,
    ScoreTable,
)
from quadmix_plugin.stages import ReadShards, SelectDocuments, WriteShards
from quadmix_plugin.stages.merge_rank import load_theta
from quadmix_plugin.stages.shards import shard_tasks
from quadmix_plugin.store import Step, merge_counts

QUADMIX = "quadmix"

_ROWS_PER_STATE = 2_000_000  # of batches that share one state; it is some MB at most
_STATES_PER_PASS = 16  # that are made side by side and merged on the driver; so many workers can have one to make
_FEWEST_SHARDS_PER_PASS, _SHARDS_PER_EXACT_PASS = 64, 256

_COLUMNS = [DOC_ID, COPIES, DOMAIN, TOKENS, MERGED_QUALITY, QUALITY_RANK, SAMPLING_VALUE]


def select(run: Run) -> None:
    """Writes ``selection/<shard>.parquet`` and ``selection/summary.json``.

    Raises:
        InputError: parameters of other domains or scorers, a budget out of reach, or an empty selection.
    """
    step = run.step("select")
    if step.is_done:
        return
    started = time.monotonic()
    theta, ranks, scaling = _theta_and_ranks(run)
    step.write_json("selection/theta.json", theta.to_dict())
    step.write_table("selection/rank_map.parquet", ranks.to_table())
    _sample(run, step, theta)
    totals = merge_counts(e.facts for e in step.entries() if "rows_in" in e.facts)
    facts = selected_sizes(run)
    if not facts["documents"]:
        raise InputError(
            "select: no document is selected; the best document of every domain exceeds its ω (widen space.omega_max, "
            "set rank.ties: mid, or merge small domains)"
        )
    expected = _expected(run, theta, ranks)
    step.write_json("selection/summary.json", {"scaling": scaling, "expected": expected, "selection": facts})
    step.finish(**totals, seconds=round(time.monotonic() - started, 2), headline=_headline(facts, scaling))


def selected_copies(run: Run) -> NDArray[np.int32]:
    """The copies of θ*'s selection, one number per row of ``run.table``."""
    step = run.step("select")
    parts = [step.read_table(f"selection/{shard}.parquet", [DOC_ID, COPIES]) for shard in run.label_shards]
    return copies_by_row(run.table, pa.concat_tables(parts))


def selected_sizes(run: Run) -> dict[str, Any]:
    """What ``sizes`` says of θ*'s selection, a shard at a time, so that no one holds a number per document."""
    step, domains = run.step("select"), run.summary.domains
    sums, by_domain = np.zeros(4, dtype=np.int64), np.zeros(len(domains), dtype=np.int64)
    for shard in run.label_shards:
        rows = step.read_table(f"selection/{shard}.parquet", [DOMAIN, TOKENS, COPIES])
        copies, tokens = rows[COPIES].to_numpy(), rows[TOKENS].to_numpy()
        sums += [copies.size, copies.sum(), tokens.sum(), (tokens * copies).sum()]
        np.add.at(by_domain, domain_ids(rows, domains), tokens * copies)
    return _sizes(domains, by_domain, *sums.tolist())


def sizes(table: ScoreTable, copies: NDArray[np.int32]) -> dict[str, Any]:
    """How large a selection is: documents, copies, tokens with and without copies, epochs, tokens of each domain."""
    taken, tokens = copies > 0, table.tokens * copies
    by_domain = np.zeros(len(table.domains), dtype=np.int64)
    np.add.at(by_domain, table.domain_ids, tokens)
    sums = (taken.sum(), copies.sum(), table.tokens[taken].sum(), tokens.sum())
    return _sizes(table.domains, by_domain, *map(int, sums))


def _sizes(
    domains: tuple[str, ...], by_domain: NDArray[np.int64], documents: int, copies: int, unique: int, tokens: int
) -> dict[str, Any]:
    return {
        "documents": documents,
        "copies": copies,
        "unique_tokens": unique,
        "tokens": tokens,
        "epochs": tokens / unique if unique else 0.0,
        "domain_tokens": dict(zip(domains, by_domain.tolist(), strict=True)),
    }


def copies_by_row(table: ScoreTable, selection: pa.Table) -> NDArray[np.int32]:
    """Copies [n] in the order of ``table`` from a table of doc_id and copies; absent documents have none."""
    where = pc.index_in(selection[DOC_ID].combine_chunks(), value_set=table.doc_ids).to_numpy(zero_copy_only=False)
    copies = np.zeros(table.n, dtype=np.int32)
    copies[where.astype(np.int64)] = selection[COPIES].to_numpy()
    return copies


def _theta_and_ranks(run: Run) -> tuple[Parameters, RankMap, dict[str, Any] | None]:
    """θ scaled to the budget, the rank map, and what the scaling was."""
    theta = _theta(run)
    target, tokens = run.recipe.select.target_tokens, run.summary.in_order(theta.domains, theta.scorers).tokens
    ranks = frozen_rank_map(run, theta) if run.recipe.rank.frozen else _fit_ranks(run, theta, target, tokens)
    ranks = replace(ranks, domains=theta.domains)
    if target is None:
        return theta, ranks, None
    budget = scale_to_budget(theta, ranks, target, tokens)
    facts = {"target_tokens": target, "factor": budget.factor, "expected_tokens": budget.expected_tokens}
    return budget.theta, ranks, facts


def _fit_ranks(run: Run, theta: Parameters, target: int | None, tokens: NDArray[np.int64]) -> RankMap:
    settings, tasks = run.recipe.rank, shard_tasks(run.label_shards)
    rows = sum(int(entry.facts.get("rows_kept", 0)) for entry in run.require("normalise").entries())
    per_state = max(1, min(_ROWS_PER_STATE * len(tasks) // max(rows, 1), len(tasks) // _STATES_PER_PASS))
    per_pass = max(_FEWEST_SHARDS_PER_PASS, _STATES_PER_PASS * per_state)
    fit = FitRankMap(
        read=[], theta=theta, method=settings.method, ties=settings.ties, summary=run.summary, bins=settings.bins,
        documents=settings.subset_documents, per_domain=settings.subset_per_domain, seed=run.recipe.seed,
        batches_per_state=per_state,
        tasks_per_pass=_SHARDS_PER_EXACT_PASS if settings.method == "exact" else per_pass,  # exact states are large
    )  # fmt: skip
    fit.read = [ReadShards(step=run.require("normalise"), folder="normalise", columns=fit.columns())]
    if settings.method != "exact":
        return fit.run(run.executor, tasks).get_metadata("rank_map")
    histogram = fit.histogram(run.executor, tasks)
    omega = theta.omega
    if target is not None:
        rough = RankMap.of_histogram(histogram, settings.ties)
        omega = widened(scale_to_budget(theta, rough, target, tokens).theta.omega)
    while True:
        ranks = fit.exact(histogram, omega, run.executor, tasks)
        needed = theta.omega if target is None else scale_to_budget(theta, ranks, target, tokens).theta.omega
        if (needed <= omega).all():
            return ranks
        omega = widened(np.maximum(needed, omega))


def frozen_rank_map(run: Run, theta: Parameters) -> RankMap:
    """The rank map that the recipe gives.

    Raises:
        RecipeError: no such file, it is something else, of other domains, or of another rule for ties.
    """
    path, ties = str(run.recipe.rank.frozen), run.recipe.rank.ties
    try:
        ranks = RankMap.from_table(read_parquet(path))
    except (InputError, OSError, pa.ArrowException, KeyError) as error:
        raise RecipeError(f"rank.frozen: {path}: not a rank map ({error}); give a run's rank_map.parquet") from error
    if ranks.domains != theta.domains:
        raise RecipeError(
            f"rank.frozen: {path} is of the domains {', '.join(ranks.domains)}, the parameters of "
            f"{', '.join(theta.domains)}; give the two files of one run"
        )
    if ranks.ties != ties:
        raise RecipeError(f"rank.frozen: {path} has ties {ranks.ties!r}; set rank.ties to that, found {ties!r}")
    return ranks


def _theta(run: Run) -> Parameters:
    path = run.recipe.select.theta
    theta = load_theta(path) if path else Parameters.from_dict(run.require("search").read_json("search/theta.json"))
    where = path or "search/theta.json"
    if theta.scorers != run.scorers:
        raise InputError(
            f"{where}: made for the scorers {', '.join(theta.scorers)}; this recipe has {', '.join(run.scorers)}"
        )
    domains = run.summary.domains
    if (absent := sorted(set(theta.domains) - set(domains))) and not run.recipe.rank.frozen:
        raise InputError(
            f"{where}: domains {', '.join(absent[:5])} are in the parameters but not in the corpus; give parameters of "
            f"this corpus, or label it with the classifier they were made with"
        )
    if unknown := sorted(set(domains) - set(theta.domains)):
        raise InputError(
            f"{where}: domains {', '.join(unknown[:5])} of the corpus are not in the parameters; give parameters of "
            f"this corpus"
        )
    return theta


def _sample(run: Run, step: Step, theta: Parameters) -> None:
    todo = [shard for shard in run.label_shards if step.entry(f"selection/{shard}.parquet") is None]
    if not todo:
        return
    stages = [
        ReadShards(step=run.require("normalise"), folder="normalise"),
        SelectDocuments(
            theta=theta,
            rank_map=RankMap.from_table(step.read_table("selection/rank_map.parquet")),
            seed=run.recipe.seed,
        ),
        WriteShards(step=step, folder="selection", columns=_COLUMNS),
    ]
    Pipeline("select", stages=stages).run(run.executor, initial_tasks=shard_tasks(todo))


def _expected(run: Run, theta: Parameters, ranks: RankMap) -> dict[str, Any]:
    """What was to be expected of the selection, and how far the rank method can have moved it."""
    tokens = run.summary.in_order(theta.domains, theta.scorers).tokens
    each, error = expected_tokens(ranks, theta, tokens), ranks.expected_error(theta.omega)
    total = float(each.sum())
    return {
        "expected_tokens": total,
        "rank_method": ranks.method,
        "rank_error": float((each * error).sum() / total) if total else 0.0,
        "domain_rank_error": dict(zip(theta.domains, error.tolist(), strict=True)),
    }


def _headline(chosen: dict[str, Any], scaling: dict[str, Any] | None) -> str:
    text = f"{chosen['documents']:,} documents, {chosen['unique_tokens']:,} tokens, {chosen['tokens']:,} with copies"
    return text if scaling is None else f"{text}; every ω × {scaling['factor']:.4g} for {scaling['target_tokens']:,}"
