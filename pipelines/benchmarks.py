"""The benchmark scores of trained models, one artifact each, named by what was asked."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
from nemo_curator.pipeline import Pipeline

from quadmix_plugin.harness import HarnessSettings, score_columns
from quadmix_plugin.models import model_folder
from quadmix_plugin.pipelines.context import Run, fingerprint
from quadmix_plugin.stages.evaluate_models import EvaluateModels, evaluation_tasks
from quadmix_plugin.store import Step, content_key

_DIGITS = 12


def harness_settings(run: Run) -> HarnessSettings:
    """The section ``evaluate`` of the recipe."""
    section = run.recipe.evaluate
    return HarnessSettings(
        tuple(section.tasks), section.task_folder, section.fewshot, section.limit, section.batch_size
    )


def evaluate_models(run: Run, step: Step, folders: Mapping[str, str]) -> dict[str, dict[str, list[float]]]:
    """Selector → ``<task> (<metric>)`` → one score per seed; models that have their scores are not evaluated again.

    ``folders``: selector → the folder of the run directory that its ``models`` are in.

    Raises:
        InputError: the harness, or a task, is not there.
        QuadmixError: a task cannot be evaluated.
    """
    settings = harness_settings(run)
    if not settings.tasks:
        return {}
    content = run.recipe.evaluate.model_dump(mode="json")
    asked = content_key({name: value for name, value in fingerprint(content).items() if name != "batch_size"})[:_DIGITS]
    paths = {
        (selector, seed): f"compare/benchmarks/{asked}/{Path(folder).name}-{seed}.json"
        for selector, folder in folders.items()
        for seed in run.recipe.pretrain.seeds
    }
    root = run.directory.root
    work = [
        {"model": str(root / folders[selector] / "models" / f"{selector}-{seed}"), "scores": path}
        for (selector, seed), path in paths.items()
        if step.entry(path) is None
    ]
    if work:
        settings.manager()  # an unknown task is said once, here
        tokenizer = str(model_folder(run.recipe.tokenizer.model, run.recipe.tokenizer.revision))
        stage = EvaluateModels(step, tokenizer, settings, run.recipe.executor.device, run.recipe.seed % (1 << 32))
        tasks = evaluation_tasks(pa.Table.from_pylist(work))
        Pipeline("evaluate", stages=[stage]).run(run.executor, initial_tasks=list(tasks))
    scores: dict[str, dict[str, list[float]]] = {}
    for (selector, _), path in paths.items():
        for name, value in score_columns(step.read_json(path), settings.tasks).items():
            scores.setdefault(selector, {}).setdefault(name, []).append(value)
    return scores
