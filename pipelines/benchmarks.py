"""The benchmark scores of trained models, one artifact each, named by what was asked."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
from nemo_curator.pipeline import Pipeline

from quadmix_plugin.benchmark_scores import BySeed
from quadmix_plugin.harness import TASK_FOLDER, HarnessSettings
from quadmix_plugin.local_tasks import LocalTask
from quadmix_plugin.models import model_folder
from quadmix_plugin.paper_tasks import PAPER_TASKS, SUITE
from quadmix_plugin.pipelines.context import Run, files_fingerprint, fingerprint
from quadmix_plugin.sections import Evaluate
from quadmix_plugin.stages.evaluate_models import EvaluateModels, evaluation_tasks
from quadmix_plugin.store import Step, content_key

_DIGITS, _LETTERS = 12, 80
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")


def harness_settings(run: Run) -> HarnessSettings:
    """The section ``evaluate`` of the recipe, with the content of the files that it names."""
    section = run.recipe.evaluate
    return HarnessSettings(
        _tasks(section), _local(section), section.task_folder, section.limit, section.batch_size, asked(run)
    )


def asked(run: Run) -> str:
    """A hash of all that the scores depend on beside the models."""
    return content_key(sorted(task_keys(run).values()))[:_DIGITS]


def task_keys(run: Run) -> dict[str, str]:
    """Every task → a hash of what its scores depend on beside the model: examples, limit, the content of its files."""
    section = run.recipe.evaluate
    shared = [section.limit, fingerprint(section.task_folder)]
    own = fingerprint(str(TASK_FOLDER)) if section.tasks else None
    keys = {name: content_key("task", name, shots, own, *shared) for name, shots in _tasks(section)}
    for task in _local(section):
        paths = files_fingerprint(list(task.paths), f"{task.place}.path")
        keys[task.name] = content_key("local", {**asdict(task), "paths": paths}, section.limit)
    return keys


def evaluate_models(run: Run, step: Step, folders: Mapping[str, str]) -> dict[str, BySeed]:
    """Selector → seed → task → what is known; scores that are there are not made again.

    ``folders``: selector → the folder of the run directory that its ``models`` are in.

    Raises:
        InputError: the harness, a task or a file is not there, or holds what cannot be used; before any model.
        QuadmixError: a task's data cannot be had, or it cannot be evaluated.
    """
    if run.recipe.evaluate.is_empty or not folders:
        return {}
    root, work = run.directory.root, []
    for name, folder in folders.items():
        for seed, paths in score_paths(run, step, name, folder).items():
            todo = {task: path for task, path in paths.items() if step.entry(path) is None}
            model = str(root / folder / "models" / f"{name}-{seed}")
            work += [{"model": model, "tasks": list(todo), "scores": list(todo.values())}] if todo else []
    if work:
        _evaluate(run, step, pa.Table.from_pylist(work))
    return {name: read_scores(run, step, name, folder) for name, folder in folders.items()}


def _evaluate(run: Run, step: Step, work: pa.Table) -> None:
    todo = {name for names in work["tasks"].to_pylist() for name in names}
    settings = harness_settings(run)
    run.progress("evaluate: read the questions", 0, 1)
    settings.check_names()
    settings.only(sorted(todo)).check()  # what is wrong is said once, here
    run.progress("evaluate: read the questions", 1, 1)
    tokenizer = str(model_folder(run.recipe.tokenizer.model, run.recipe.tokenizer.revision))
    stage = EvaluateModels(step, tokenizer, settings, run.recipe.executor.device, run.recipe.seed % (1 << 32))
    Pipeline("evaluate", stages=[stage]).run(run.executor, initial_tasks=list(evaluation_tasks(work)))


def score_paths(run: Run, step: Step, selector: str, folder: str) -> dict[int, dict[str, str]]:
    """Seed → task → the artifact with the scores of that model of a selection."""
    last = Path(folder).name
    name = last if last.startswith(selector) else selector  # compared ones are named by a hash as well
    folders = {
        task: f"{step.name}/benchmarks/{_NOT_IN_NAMES.sub('_', task)[:_LETTERS]}-{key[:_DIGITS]}"
        for task, key in task_keys(run).items()
    }
    return {
        seed: {task: f"{prefix}/{name}-{seed}.json" for task, prefix in folders.items()}
        for seed in run.recipe.pretrain.seeds
    }


def read_scores(run: Run, step: Step, selector: str, folder: str) -> BySeed:
    """The scores of one selection's models, tasks in the order of the recipe."""
    return {
        seed: {row: result for path in paths.values() for row, result in step.read_json(path).items()}
        for seed, paths in score_paths(run, step, selector, folder).items()
    }


def _tasks(section: Evaluate) -> tuple[tuple[str, int | None], ...]:
    """Names and examples, the suite written out; a task that is named beside it keeps what is said of it there."""
    tasks: dict[str, int | None] = {}
    for name, shots in section.tasks.items():
        if name == SUITE:
            tasks |= {each.task: each.shots if shots is None else shots for each in PAPER_TASKS}
    return tuple((tasks | {name: shots for name, shots in section.tasks.items() if name != SUITE}).items())


def _local(section: Evaluate) -> tuple[LocalTask, ...]:
    found = []
    for name, each in section.local.items():
        options = each.model_dump(exclude={"path", "fewshot"})
        shots = section.fewshot if each.fewshot is None else each.fewshot
        paths = (each.path,) if isinstance(each.path, str) else tuple(each.path)
        found.append(LocalTask(name, paths, shots=shots, **options))
    return tuple(found)
