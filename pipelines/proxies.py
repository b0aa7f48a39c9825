"""Step 2: the token pool, parameters drawn by Algorithm 1, one proxy model for each, and the noise of their losses."""

import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
from nemo_curator.pipeline import Pipeline

from quadmix_plugin import registry
from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.parameters import sample_parameter_vectors
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.label import run_over_documents
from quadmix_plugin.pipelines.search import LOSS_PREFIX
from quadmix_plugin.proxy.validation import choose_rows, read_rows, tokenise_rows
from quadmix_plugin.search.evaluation import noise
from quadmix_plugin.search.features import FeatureMap
from quadmix_plugin.stages import ExportTokens, TrainProxies
from quadmix_plugin.stages.export_tokens import end_of_document, pair_entry, vocabulary_of
from quadmix_plugin.stages.train_proxies import Draws, ProxyTable, merge_parts, part_path, proxy_tasks
from quadmix_plugin.store import Step

POOL, THINNING = "proxies/pool", "proxies/thinning.json"
_SPARE = 1.05  # of the tokens of the smallest selection over those of a proxy, for the luck of the draw
_DRAW, _REPEAT = "draw", "repeat"


def proxies(run: Run) -> None:
    """Writes ``proxies/losses.parquet``, ``curves.parquet`` and ``noise.json``; every proxy is kept as it ends.

    Raises:
        InputError: validation rows that cannot be used, or no proxy that could be trained.
    """
    step = run.step("proxies")
    if step.is_done:
        return
    started = time.monotonic()
    run.require("normalise")
    recipe = run.recipe
    vocabulary, _ = write_validation(run, step)
    thetas = _thetas(run)
    if step.entry("proxies/thetas.parquet") is None:
        step.write_table("proxies/thetas.parquet", thetas)
    draws = _draws(run, step, thetas)
    write_pool(run, step, draws.below)
    if step.entry("proxies/table.parquet") is None:
        step.write_table("proxies/table.parquet", ProxyTable.of(run.table, run.normalised).to_arrow())
    train = TrainProxies(
        step=step,
        table=str(step.read_path("proxies/table.parquet")),
        pool=pool_prefixes(run),
        validation=str(step.read_path("proxies/validation.parquet")),
        tokens=recipe.proxy.tokens,
        vocabulary=vocabulary,
        trainer=recipe.proxy.trainer,
        options=trainer_options(run, recipe.proxy.options),
        draws=draws,
        weights_seed=recipe.seed,
    )
    numbers = thetas["proxy"].to_pylist()
    todo = thetas.filter(pa.array([step.entry(part_path(n)) is None for n in numbers]))
    if todo.num_rows:
        Pipeline("proxies", stages=[train]).run(run.executor, initial_tasks=list(proxy_tasks(todo)))
    _finish(run, step, thetas, started)


def write_validation(run: Run, step: Step) -> tuple[int, int]:
    """Tokenises the validation rows once, as ``<step>/validation.parquet``; returns vocabulary and end-of-document id.

    Raises:
        InputError: as ``read_rows`` and ``tokenise_rows``.
    """
    recipe = run.recipe
    tokenizer = load_tokenizer(recipe.tokenizer.model, recipe.tokenizer.revision)
    eod = end_of_document(tokenizer, recipe.tokenizer.eod, recipe.tokenizer.model)
    if step.entry(f"{step.name}/validation.parquet") is None:
        section = recipe.validation
        settings = getattr(recipe, "pretrain" if step.name == "pretrain" else "proxy")
        context = registry.create("trainers", settings.trainer, settings.options, f"{step.name}.options").context
        rows = choose_rows(
            read_rows(run.validation_files, section.prompt, section.response, section.task), section.rows_per_task
        )
        table = tokenise_rows(rows, tokenizer, eod, context, section.mask_prompt)
        step.write_table(f"{step.name}/validation.parquet", table)
    return vocabulary_of(tokenizer), eod


def write_pool(run: Run, step: Step, below: float = 1.0) -> None:
    """Tokenises every document of the score table whose u is ``below``, once; one pair of token files per shard."""
    tokenizer, normalised = run.recipe.tokenizer, run.require("normalise")
    export = ExportTokens(
        step=step,
        tokenizer=tokenizer.model,
        revision=tokenizer.revision,
        eod=tokenizer.eod,
        folder=POOL,
        kept=normalised if (normalised.summary() or {}).get("dropped") else None,
        below=below,
        seed=run.recipe.seed,
    )
    done = frozenset(shard for shard in run.label_shards if pair_entry(step, f"{POOL}/{shard}") is not None)
    if len(done) < len(run.label_shards):
        run_over_documents(run, [export], done)


def pool_prefixes(run: Run) -> list[str]:
    """The pool's pairs in the order of the score table."""
    step = run.step("proxies")
    return [str(step.read_path(f"{POOL}/{shard}.idx").with_suffix("")) for shard in run.label_shards]


def _draws(run: Run, step: Step, thetas: pa.Table) -> Draws:
    """How documents are drawn; under ``pool: thinned``, the factor on every S and the share of documents it leaves."""
    proxy, rank = run.recipe.proxy, run.recipe.rank
    draws = Draws(
        rank.method, rank.ties, rank.bins, rank.subset_documents, rank.subset_per_domain, run.recipe.seed,
        independent=proxy.draws == "independent",
    )  # fmt: skip
    if proxy.pool == "whole":
        return draws
    if step.entry(THINNING) is None:
        vectors = np.array(thetas["theta"].to_pylist())
        fewest = float(FeatureMap.of(run.table, run.normalised).statistics(vectors).selected_tokens.min())
        thin = min(1.0, _SPARE * proxy.tokens / max(fewest, 1.0))
        below = min(1.0, thin * (2**run.recipe.space.eta_max + run.recipe.space.epsilon_max))
        step.write_json(THINNING, {"thin": thin, "below": below, "fewest_selected_tokens": fewest})
    facts = step.read_json(THINNING)
    return replace(draws, thin=facts["thin"], below=facts["below"])


def trainer_options(run: Run, options: dict) -> dict:
    """The trainer's options, with the device of the recipe unless they name one."""
    return {"device": run.recipe.executor.device, **options}


def _thetas(run: Run) -> pa.Table:
    """θ of every proxy: the draws, all under one seed of the data order, then repeats of draw 0 under others."""
    recipe = run.recipe
    seed = run.seed_for("data order")
    vectors = sample_parameter_vectors(
        recipe.proxy.number,
        len(run.table.scorers),
        len(run.table.domains),
        recipe.seed,
        space=recipe.space.to_parameter_space(),
    )
    repeats = recipe.proxy.repeats - 1
    seeds = [seed] * len(vectors) + [run.seed_for(f"data order {i + 1}") for i in range(repeats)]
    return pa.table(
        {
            "proxy": pa.array(range(len(seeds)), pa.int32()),
            "kind": [_DRAW] * len(vectors) + [_REPEAT] * repeats,
            "seed": pa.array(seeds, pa.int64()),
            "theta": pa.array(list(np.concatenate([vectors, vectors[[0] * repeats]])), pa.list_(pa.float64())),
        }
    )


def _finish(run: Run, step: Step, thetas: pa.Table, started: float) -> None:
    paths = [part_path(number) for number in thetas["proxy"].to_pylist()]
    losses, curves, failures = merge_parts(step, paths, ["proxy"])
    step.write_table("proxies/losses.parquet", losses)
    step.write_table("proxies/curves.parquet", curves)
    kinds = np.array(losses["kind"].to_pylist())
    first = np.array(losses["proxy"].to_pylist()) == 0
    report = {}
    for name in losses.column_names:
        if name.startswith(LOSS_PREFIX):
            task, values = name.removeprefix(LOSS_PREFIX), losses[name].to_numpy()
            same, across = values[(kinds == _REPEAT) | first], values[kinds == _DRAW]
            if min(same.size, across.size) > 1:  # all repeats fail where their one θ selects too little to train on
                report[task] = noise(same, across, task).to_dict()
    step.write_json("proxies/noise.json", report)
    failed = f", {len(failures)} failed" if failures else ""
    ratios = {task: each["signal_to_noise"] or 0.0 for task, each in report.items()}
    clearest = max(ratios, key=ratios.__getitem__) if ratios else None
    signal = f"clearest signal to noise {ratios[clearest]:.1f} ({clearest})" if clearest else "noise unknown"
    step.finish(
        seconds=round(time.monotonic() - started, 2),
        failures=failures,
        headline=f"{losses.num_rows} proxies × {run.recipe.proxy.tokens:,} tokens{failed}; {signal}",
    )
