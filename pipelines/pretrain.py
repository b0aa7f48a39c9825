"""Step 6: the recipe's model trained on θ*'s selection, once per seed, and judged on unseen questions."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
from nemo_curator.backends.base import BaseExecutor
from nemo_curator.pipeline import Pipeline

from quadmix_plugin import registry
from quadmix_plugin.errors import QuadmixError
from quadmix_plugin.hugging_face import write_tokenizer
from quadmix_plugin.models import choose_device, load_tokenizer, model_folder
from quadmix_plugin.pipelines.context import Run, trainer_options
from quadmix_plugin.pipelines.export import TokenFiles, exported, validation_prefix
from quadmix_plugin.pipelines.proxy_data import write_validation
from quadmix_plugin.pipelines.select import QUADMIX
from quadmix_plugin.pretraining.launch import needs_the_machine
from quadmix_plugin.pretraining.megatron_lm import command
from quadmix_plugin.pretraining.metrics import FILE, read
from quadmix_plugin.proxy.parts import merge_parts
from quadmix_plugin.proxy.training import tokens_per_batch
from quadmix_plugin.stages.export_tokens import end_of_document, vocabulary_of
from quadmix_plugin.stages.pretrain_selections import PretrainSelections, pretrain_tasks
from quadmix_plugin.store import Step

MEGATRON = "megatron"

COMMAND = "pretrain/megatron_lm.sh"
"""The same training by Megatron-LM's own script."""

_SECONDS = 1.0  # between looks at the metrics


@dataclass(frozen=True)
class Trained:
    """A selection to train models on: ``selector`` is its name in the tables; results and models go to ``folder``."""

    selector: str
    files: TokenFiles
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
    files = exported(run, run.require("export"))
    _write_command(run, step)
    results, curves = train_selections(run, step, [Trained(QUADMIX, files, "pretrain")])
    step.write_table("pretrain/results.parquet", results)
    step.write_table("pretrain/curves.parquet", curves)
    step.finish(
        seconds=round(time.monotonic() - started, 2),
        headline=f"{results.num_rows} models × {run.recipe.pretrain.tokens:,} tokens on the selection of θ*",
    )


def _write_command(run: Run, step: Step) -> None:
    """A shell script that trains the same model by Megatron-LM, and the tokenizer that it names."""
    section, tokenizer = run.recipe.pretrain, run.recipe.tokenizer
    if section.trainer != MEGATRON:
        return
    trainer = registry.create("trainers", section.trainer, section.options, "pretrain.options")
    loaded = load_tokenizer(tokenizer.model, tokenizer.revision)
    shape = trainer.model_shape(vocabulary_of(loaded))
    eod = end_of_document(loaded, tokenizer.eod, tokenizer.model)
    folder = model_folder(tokenizer.model, tokenizer.revision)
    write_tokenizer(step, "pretrain/tokenizer", folder, eod, shape.context)
    step.write_text(COMMAND, command(trainer, shape, section.tokens, section.seeds[0]))


def train_selections(run: Run, step: Step, selections: Sequence[Trained]) -> tuple[pa.Table, pa.Table]:
    """Results and learning curves of the models of every selection and seed; what is there is not trained again.

    Raises:
        QuadmixError: a model could not be trained.
    """
    recipe, path = run.recipe, f"{step.name}/validation.parquet"
    work = _work(recipe.pretrain.seeds, selections)
    vocabulary, eod = write_validation(run, step, "pretrain", path)
    options = trainer_options(run, recipe.pretrain.trainer, recipe.pretrain.options)
    stage = PretrainSelections(
        step=step,
        validation=str(step.read_path(path)),
        validation_tokens=validation_prefix(run),
        tokens=recipe.pretrain.tokens,
        vocabulary=vocabulary,
        eod=eod,
        tokenizer=str(model_folder(recipe.tokenizer.model, recipe.tokenizer.revision)),
        trainer=recipe.pretrain.trainer,
        options=options,
    )
    parts = work["part"].to_pylist()
    todo = work.filter(pa.array([step.entry(part) is None for part in parts]))
    if todo.num_rows:
        with _watched(run, step, stage, todo) as executor:
            Pipeline("pretrain", stages=[stage]).run(executor, initial_tasks=list(pretrain_tasks(todo)))
    results, curves, failures = merge_parts(step, parts, ["selector", "seed"])
    if failures:
        part, reason = next(iter(failures.items()))
        raise QuadmixError(f"{part}: {reason}")
    return results, curves


@contextmanager
def _watched(run: Run, step: Step, stage: PretrainSelections, work: pa.Table) -> Iterator[BaseExecutor]:
    """The executor, and the progress of trainers that write metrics: updates of all models, and the last loss.

    A model that takes more than one GPU is trained from here, one after the other.
    """
    from quadmix_plugin.executors import InlineExecutor

    trainer = registry.create("trainers", stage.trainer, stage.options, "pretrain.options")
    if not hasattr(trainer, "pretrain"):
        yield run.executor
        return
    folders = [step.root / folder for folder in work["folder"].to_pylist()]
    total = len(folders) * -(-stage.tokens // tokens_per_batch(trainer))
    ended = threading.Event()

    def look() -> None:
        before = 0
        while not ended.wait(_SECONDS):
            last = [lines[-1] for folder in folders if (lines := read(folder / FILE))]
            if (updates := sum(line["step"] for line in last)) > before:
                before, newest = updates, last[-1]
                note = f"loss {newest['loss']:.3f}, {newest.get('tokens_per_second', 0):,.0f} tokens/s"
                run.progress(stage.name, updates, total, note=note)

    with run.watched_by(lambda *_, **__: None) as executor:
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield InlineExecutor() if needs_the_machine(trainer, choose_device(trainer.device)) else executor
        finally:
            ended.set()
            thread.join()


def _work(seeds: Sequence[int], selections: Sequence[Trained]) -> pa.Table:
    rows = [
        {
            "selector": each.selector,
            "seed": seed,
            "prefixes": list(each.files.prefixes),
            "documents": list(each.files.documents),
            "selected_tokens": each.files.tokens,
            "unique_tokens": each.files.unique_tokens,
            "part": f"{each.folder}/parts/{each.selector}-{seed}.json",
            "model": f"{each.folder}/models/{each.selector}-{seed}",
            "folder": f"{each.folder}/training/{each.selector}-{seed}",
        }
        for each in selections
        for seed in seeds
    ]
    return pa.Table.from_pylist(rows)
