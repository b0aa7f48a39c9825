"""Step 6: the same model trained on every selection, with the same tokens and seeds, judged on unseen questions."""

import time

import pyarrow as pa
from nemo_curator.pipeline import Pipeline

from quadmix_plugin.errors import QuadmixError
from quadmix_plugin.pipelines.context import Run, trainer_options
from quadmix_plugin.pipelines.export import TRAIN
from quadmix_plugin.pipelines.proxy_data import write_validation
from quadmix_plugin.pipelines.select import QUADMIX
from quadmix_plugin.proxy.parts import merge_parts
from quadmix_plugin.stages.pretrain_selections import PretrainSelections, pretrain_part_path, pretrain_tasks


def pretrain(run: Run) -> None:
    """Writes ``pretrain/results.parquet`` and ``curves.parquet``, and every model in Hugging Face's Llama format.

    Raises:
        QuadmixError: a model could not be trained.
    """
    step = run.step("pretrain")
    if step.is_done:
        return
    started = time.monotonic()
    recipe, work = run.recipe, _work(run)
    vocabulary, eod = write_validation(run, step)
    stage = PretrainSelections(
        step=step,
        validation=str(step.read_path("pretrain/validation.parquet")),
        tokens=recipe.pretrain.tokens,
        vocabulary=vocabulary,
        eod=eod,
        trainer=recipe.pretrain.trainer,
        options=trainer_options(run, recipe.pretrain.trainer, recipe.pretrain.options),
    )
    parts = [pretrain_part_path(row["selector"], row["seed"]) for row in work.to_pylist()]
    todo = work.filter(pa.array([step.entry(path) is None for path in parts]))
    if todo.num_rows:
        Pipeline("pretrain", stages=[stage]).run(run.executor, initial_tasks=list(pretrain_tasks(todo)))
    results, curves, failures = merge_parts(step, parts, ["selector", "seed"])
    if failures:
        path, reason = next(iter(failures.items()))
        raise QuadmixError(f"{path}: {reason}")
    step.write_table("pretrain/results.parquet", results)
    step.write_table("pretrain/curves.parquet", curves)
    step.finish(
        seconds=round(time.monotonic() - started, 2),
        headline=f"{results.num_rows} models × {recipe.pretrain.tokens:,} tokens",
    )


def _work(run: Run) -> pa.Table:
    export = run.require("export")
    facts = (export.summary() or {})["selections"]
    rows = []
    for name in (QUADMIX, *run.recipe.select.compare):
        prefix = export.read_path(f"tokens/{TRAIN if name == QUADMIX else name}.idx").with_suffix("")
        unique = facts[name]["unique_tokens"]
        rows += [
            {"selector": name, "seed": seed, "prefix": str(prefix), "unique_tokens": unique}
            for seed in run.recipe.pretrain.seeds
        ]
    return pa.Table.from_pylist(rows)
