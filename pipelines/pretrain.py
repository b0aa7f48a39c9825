"""Step 6: the recipe's model trained on θ*'s selection, once per seed, and judged on unseen questions."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from nemo_curator.pipeline import Pipeline

from quadmix_plugin.errors import QuadmixError
from quadmix_plugin.pipelines.context import Run, trainer_options
from quadmix_plugin.pipelines.export import TRAIN
from quadmix_plugin.pipelines.proxy_data import write_validation
from quadmix_plugin.pipelines.select import QUADMIX
from quadmix_plugin.proxy.parts import merge_parts
from quadmix_plugin.stages.pretrain_selections import PretrainSelections, pretrain_tasks
from quadmix_plugin.store import Step


@dataclass(frozen=True)
class Trained:
    """A selection to train models on: its token files are ``prefix`` with ``.bin`` and ``.idx``.

    Results and models go to ``folder``; ``selector`` is its name in the tables.
    """

    selector: str
    prefix: str
    unique_tokens: int
    folder: str


def pretrain(run: Run) -> None:
    """Writes ``pretrain/results.parquet`` and ``curves.parquet``, and every model in Hugging Face's Llama format.

    Raises:
        QuadmixError: a model could not be trained.
    """
    step = run.step("pretrain")
    if step.is_done:
        return
    started = time.monotonic()
    export = run.require("export")
    unique = (export.summary() or {})["selection"]["unique_tokens"]
    prefix = str(export.read_path(f"{TRAIN}.idx").with_suffix(""))
    results, curves = train_selections(run, step, [Trained(QUADMIX, prefix, unique, "pretrain")])
    step.write_table("pretrain/results.parquet", results)
    step.write_table("pretrain/curves.parquet", curves)
    step.finish(
        seconds=round(time.monotonic() - started, 2),
        headline=f"{results.num_rows} models × {run.recipe.pretrain.tokens:,} tokens on the selection of θ*",
    )


def train_selections(run: Run, step: Step, selections: Sequence[Trained]) -> tuple[pa.Table, pa.Table]:
    """Results and learning curves of the models of every selection and seed; what is there is not trained again.

    Raises:
        QuadmixError: a model could not be trained.
    """
    recipe, path = run.recipe, f"{step.name}/validation.parquet"
    work = _work(recipe.pretrain.seeds, selections)
    vocabulary, eod = write_validation(run, step, "pretrain", path)
    stage = PretrainSelections(
        step=step,
        validation=str(step.read_path(path)),
        tokens=recipe.pretrain.tokens,
        vocabulary=vocabulary,
        eod=eod,
        trainer=recipe.pretrain.trainer,
        options=trainer_options(run, recipe.pretrain.trainer, recipe.pretrain.options),
    )
    parts = work["part"].to_pylist()
    todo = work.filter(pa.array([step.entry(part) is None for part in parts]))
    if todo.num_rows:
        Pipeline("pretrain", stages=[stage]).run(run.executor, initial_tasks=list(pretrain_tasks(todo)))
    results, curves, failures = merge_parts(step, parts, ["selector", "seed"])
    if failures:
        part, reason = next(iter(failures.items()))
        raise QuadmixError(f"{part}: {reason}")
    return results, curves


def _work(seeds: Sequence[int], selections: Sequence[Trained]) -> pa.Table:
    rows = [
        {
            "selector": each.selector,
            "seed": seed,
            "prefix": each.prefix,
            "unique_tokens": each.unique_tokens,
            "part": f"{each.folder}/parts/{each.selector}-{seed}.json",
            "model": f"{each.folder}/models/{each.selector}-{seed}",
        }
        for each in selections
        for seed in seeds
    ]
    return pa.Table.from_pylist(rows)
