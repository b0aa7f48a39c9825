"""``quadmix plan``: what a recipe would do and cost, what of it is already there, and whether a run would refuse it."""

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq

from quadmix_plugin import registry
from quadmix_plugin.config import Recipe, selector_plugin
from quadmix_plugin.corpus import inspect
from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.pipelines.benchmarks import harness_settings
from quadmix_plugin.pipelines.context import Run, executor_of, refuse_other_recipe, trainer_options
from quadmix_plugin.pipelines.done import step_is_done
from quadmix_plugin.pipelines.label import columns_read, label_stages
from quadmix_plugin.pipelines.preflight import check_before_work
from quadmix_plugin.pipelines.proxy_data import tokenised_rows
from quadmix_plugin.pipelines.proxy_work import number_of_baselines
from quadmix_plugin.pipelines.report import REPORT
from quadmix_plugin.proxy.parts import PARTS
from quadmix_plugin.proxy.trial import measure, trial_options
from quadmix_plugin.proxy.validation import validation_sets
from quadmix_plugin.stages.export_tokens import vocabulary_of
from quadmix_plugin.stages.train_proxies import trainer_resources
from quadmix_plugin.store import RunDirectory

_H200_FLOPS = 990e12 * 0.4
"""An H200's dense bf16 peak at 40 % utilisation, for those who plan on another machine than this."""

_BYTES_PER_TOKEN = 4.0


def make_plan(recipe: Recipe, out: str | Path, trial: bool = True) -> dict[str, Any]:
    """Quantities, and one row per step: its state and its work; ``trial`` measures the cost of training here.

    Raises:
        InputError: a corpus or validation rows that a run would refuse.
        RecipeError: settings that a run would refuse, those of another recipe in ``out`` among them.
    """
    run = Run(recipe, RunDirectory.at(out), lambda: executor_of(recipe))
    refuse_other_recipe(run)
    check_before_work(run, run.steps, fetch=False)
    labelled = run.step("label").is_done and run.step("normalise").is_done
    documents = int(run.summary.documents.sum()) if labelled else _documents(run)
    tokens = int(run.summary.tokens.sum()) if labelled else _estimated_tokens(run)
    runs = (len(recipe.compare.selectors) + 1) * len(recipe.pretrain.seeds)
    proxies, which = _proxies(recipe) if "proxies" in run.steps else (0, "none; select.theta is given")
    work = _work(run, documents, proxies, runs)
    return {
        "name": recipe.name,
        "out": str(out),
        "quantities": {
            "documents": documents,
            "tokens": f"{tokens:,}" if labelled else f"about {round(tokens, 2 - len(str(tokens))):,}",
            "proxies": which,
            "training tokens": f"{proxies * recipe.proxy.tokens:,} of proxies, {runs * recipe.pretrain.tokens:,} of "
            f"the comparison",
            "training": _training(run, proxies, runs, trial),
            "disk": f"about {_disk(recipe, documents, tokens) / 1e9:.3g} GB",
        },
        "steps": [{"step": name, "state": _state(run, name), "work": work[name]} for name in run.steps],
    }


def _work(run: Run, documents: int, proxies: int, runs: int) -> dict[str, str]:
    """What every step does, in words; ``runs``: models trained on selections."""
    recipe = run.recipe
    compared = list(recipe.compare.selectors)
    return {
        "label": f"{documents:,} documents, {len(recipe.scorers)} scorers",
        "normalise": f"σ of {len(recipe.scorers)} scorers",
        "proxies": f"{proxies:,} models × {recipe.proxy.tokens:,} tokens",
        "search": f"{recipe.search.draws:,} draws, mean of the best {recipe.search.top}",
        "select": "θ*" + (f" at {recipe.select.target_tokens:,} tokens" if recipe.select.target_tokens else ""),
        "export": "tokens/train-*.bin and .idx" + (", selected/*.parquet" if recipe.export.text else ""),
        "pretrain": f"{len(recipe.pretrain.seeds)} models × {recipe.pretrain.tokens:,} tokens",
        "evaluate": _benchmarks(run),
        "compare": f"{', '.join(compared) or 'nothing'}: {runs - len(recipe.pretrain.seeds)} models"
        + _mixtures(recipe),
        "report": "report.html",
    }


def _proxies(recipe: Recipe) -> tuple[int, str]:
    """How many models the proxies are, and how many of which kind."""
    settings, rounds = recipe.proxy, recipe.search.rounds
    repeats, baselines = settings.repeated * (settings.repeats - 1), number_of_baselines(recipe)
    number = settings.number + repeats + baselines
    said = [f"{settings.number:,} θ" + (f" in rounds of {', '.join(map(str, rounds))}" if rounds else "")]
    said += [f"{repeats} repeats of {settings.repeated}", f"{baselines} of baselines"]
    return number, f"{number:,} ({', '.join(said)})"


def _benchmarks(run: Run) -> str:
    """The tasks of lm-evaluation-harness, in words."""
    settings = harness_settings(run)
    names = [*(name for name, _ in settings.tasks), *(task.name for task in settings.local)]
    return f"{len(run.recipe.pretrain.seeds)} models: {', '.join(names)}" if names else "no tasks"


def _mixtures(recipe: Recipe) -> str:
    """The proxies that selectors train, in words."""
    made = {name: selector_plugin(name, given) for name, given in recipe.compare.selectors.items()}
    selectors = {name: registry.create("selectors", plugin, options) for name, (plugin, options) in made.items()}
    trained = [f"{each.proxies} proxies of {name}" for name, each in selectors.items() if hasattr(each, "proxies")]
    return f", {', '.join(trained)}" if trained else ""


def _state(run: Run, name: str) -> str:
    step = run.step(name)
    if step.is_done and not step_is_done(run, name):
        other = {"compare": "for other selectors", "evaluate": "for other tasks"}
        return f"done {other.get(name, 'without the text')}"
    if name == "report":
        return "done" if run.directory.place.sizes([REPORT]) else "to do"
    if step.is_done:
        return "done"
    made = len(step.entries())
    return f"begun, {made} artifacts" if made else "to do"


def _documents(run: Run) -> int:
    """The rows of the corpus, which is checked as a run would check it."""
    corpus = run.recipe.corpus
    columns = columns_read(label_stages(run))
    return inspect(run.corpus_files, corpus.text, corpus.id, corpus.invalid_rows, columns).documents


def _estimated_tokens(run: Run) -> int:
    """From the bytes of the text: its uncompressed size in Parquet footers, or the size of the files."""
    total = 0
    for file in run.corpus_files:
        if not file.is_parquet:
            total += file.bytes
            continue
        with fsspec.open(file.path, "rb") as stream:
            metadata = pq.ParquetFile(stream).metadata
        columns = [
            metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
        ]
        total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == run.recipe.corpus.text)
    return int(total / _BYTES_PER_TOKEN)


def _training(run: Run, proxies: int, runs: int, trial: bool) -> str:
    """Hours of training: from a trial here, or from the proxies that are trained already, and on an H200."""
    recipe = run.recipe
    flops = {section: _flops_per_token(recipe, section) for section in ("proxy", "pretrain")}
    work = {
        "proxy": proxies * recipe.proxy.tokens * flops["proxy"],
        "pretrain": runs * recipe.pretrain.tokens * flops["pretrain"],
    }
    there = f"about {sum(work.values()) / _H200_FLOPS / 3600:.2g} GPU-hours on an H200 at 40 % of its bf16 peak"
    if not trial or not proxies:
        return there
    options = trainer_options(run, recipe.proxy.trainer, recipe.proxy.options)
    unit = "GPU" if trainer_resources(recipe.proxy.trainer, options).gpus else "core"
    each, how = _seconds_of_a_proxy(run, options, unit == "GPU")
    hours = proxies * each / 3600
    compared = each * work["pretrain"] / (recipe.proxy.tokens * flops["proxy"]) / 3600
    return f"{hours:.2g} {unit}-hours of proxies, {compared:.2g} of the comparison here ({how}); {there}"


def _seconds_of_a_proxy(run: Run, options: dict[str, Any], on_gpu: bool) -> tuple[float, str]:
    """Seconds of one proxy on one GPU, or core-seconds; and how they are known."""
    settings, step = run.recipe.proxy, run.step("proxies")
    made = [entry.path for entry in step.entries() if entry.path.startswith(PARTS)]
    seconds = [part["seconds"] for path in made if (part := step.read_json(path)).get("share") == 1.0]
    made_as_given = registry.create("trainers", settings.trainer, options, "proxy.options")
    scale = 1 / settings.per_gpu if on_gpu else getattr(made_as_given, "threads", 1)
    if seconds:
        return float(np.median(seconds)) * scale, f"median of {len(seconds)} that are trained"
    given = {**options, "batch_size": made_as_given.batch_size} if hasattr(made_as_given, "batch_size") else options
    tried = trial_options(given, made_as_given.context, on_gpu)
    trainer = registry.create("trainers", settings.trainer, tried, "proxy.options")
    sets = validation_sets(tokenised_rows(run, trainer.context), "search")
    found = measure(trainer, sets, _vocabulary(run.recipe))
    each = found.seconds(settings.tokens, len(settings.curve_at) + 1)
    return each * (1 if on_gpu else scale), f"measured: {found.tokens_per_second:,.0f} tokens/s for one model alone"


def _flops_per_token(recipe: Recipe, section: str) -> float:
    """6 × the weights that a token passes through: all but the input embedding."""
    settings = getattr(recipe, section)
    shape = registry.create("trainers", settings.trainer, settings.options, f"{section}.options").model_shape(
        _vocabulary(recipe)
    )
    return 6.0 * (shape.parameters - (0 if shape.tied else shape.vocabulary * shape.width))


def _vocabulary(recipe: Recipe) -> int:
    return vocabulary_of(load_tokenizer(recipe.tokenizer.model, recipe.tokenizer.revision))


def _disk(recipe: Recipe, documents: int, tokens: int) -> float:
    """Labels, the pool, the selections (at most the window of each domain) and their token files."""
    labels = documents * (24 + 4 * len(recipe.scorers))
    selected = min(1.0, recipe.space.omega_max) * tokens * 4.0 * (len(recipe.compare.selectors) + 1)
    return labels * 2 + tokens * 4.0 + selected
