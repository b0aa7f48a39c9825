"""Benchmark scores of a trained model by lm-evaluation-harness, on tasks of the harness or over files of one's own.

A thin layer: which tasks, which few-shot setting and which model; the harness does the rest.
"""

import contextlib
import io
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.local_tasks import LocalTask, read_questions, task_config
from quadmix_plugin.models import read_config, weight_files

TASK_FOLDER = Path(__file__).parent / "lm_eval_tasks"
"""Tasks that the harness lacks."""

TASK_CODE = "QUADMIX_TASK_CODE"
"""Environment variable, 1 where tasks of ``task_folder`` may run code. A recipe cannot set it."""

FIRST_CHOICE = ("acc_norm", "acc", "exact_match", "bits_per_byte")
"""The measure of a task is the first of these that it has, else its own first."""

_BOOTSTRAPS = 1000
_NEW_TOKENS = 256  # the harness' default for answers that are generated

Result = dict[str, Any]
"""Of one task and model: ``metrics`` (name → value, stderr or None, higher_is_better), ``shots`` (None: not the same in
all its subtasks), ``questions``, ``dropped`` (reason → rows), and of a group ``subtasks`` (name → Result)."""


@dataclass(frozen=True)
class HarnessSettings:
    """What is asked of the harness.

    ``tasks``: names, each with the examples before a question, None: as the task says; ``local``: tasks over files;
    ``task_folder``: YAML files of further tasks, which go before those of the harness; ``limit``: at most so many
    questions of each; ``batch_size`` of requests; ``content``: a hash of what the files hold, since tasks that are
    loaded are kept.
    """

    tasks: tuple[tuple[str, int | None], ...] = ()
    local: tuple[LocalTask, ...] = ()
    task_folder: str | None = None
    limit: int | None = None
    batch_size: int = 8
    content: str = ""

    def check_names(self) -> None:
        """Refuses names before any data is read.

        Raises:
            InputError: the harness is not installed or has no such task, a local task has the name of another, or the
                environment does not allow the code of ``task_folder``.
        """
        known = set(_manager(self.task_folder, self._content_of_folder).all_tasks)
        where = (
            f" and {self.task_folder}" if self.task_folder else "; tasks of your own: evaluate.task_folder and .local"
        )
        own = {task.name for task in self.local}
        for name, _ in self.tasks:
            if name in own:
                raise InputError(
                    f"evaluate.tasks: {name!r} is in evaluate.local, which is evaluated anyway; leave it out"
                )
            if name not in known:
                raise InputError(
                    f"evaluate.tasks: {name!r} is not among the {len(known):,} tasks of lm-evaluation-harness{where}"
                )
        if taken := sorted(own & known):
            raise InputError(
                f"evaluate.local.{taken[0]}: a task of lm-evaluation-harness has this name; choose another"
            )

    def check(self) -> None:
        """Refuses what cannot be evaluated; reads all data and keeps it for ``evaluate_model``.

        Raises:
            InputError: as ``check_names`` and ``local_tasks.read_questions``, or a task is in two of those named.
            QuadmixError: a task's data cannot be had.
        """
        self.check_names()
        _load(self)

    @property
    def _content_of_folder(self) -> str:
        return self.content if self.task_folder else ""

    def only(self, names: Sequence[str]) -> "HarnessSettings":
        """The same with these of its tasks."""
        tasks = tuple((name, shots) for name, shots in self.tasks if name in names)
        return replace(self, tasks=tasks, local=tuple(task for task in self.local if task.name in names))


@dataclass(frozen=True)
class _Loaded:
    """One of the names that are asked for, with its data.

    ``tasks`` and ``groups`` as the harness takes them; ``rows``: what is reported, the name itself, or each task of a
    tag; ``dropped`` of a local task.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any]
    rows: tuple[str, ...]
    dropped: dict[str, int] = field(default_factory=dict)


def evaluate_model(
    model: str | Path, tokenizer: str | Path, settings: HarnessSettings, device: str, seed: int = 0
) -> dict[str, dict[str, Result]]:
    """The scores of a model in Hugging Face's format, as name → row → Result.

    A name that is asked for has one row of the same name; a tag of the harness has one for each of its tasks. Few-shot
    examples are drawn with ``seed``.

    Raises:
        InputError: as ``HarnessSettings.check``, ``models.read_config`` and ``models.weight_files``.
        QuadmixError: no model there, a task's data cannot be had, or it fails.
    """
    if not (Path(model) / "config.json").exists():
        raise QuadmixError(f"{model}: no model in Hugging Face's format there (no config.json); train it again")
    read_config(Path(model))
    weight_files(Path(model))  # the harness would load pickles and adapters
    loaded = _load(settings)
    try:
        with _quiet():
            found = _run(model, tokenizer, settings, loaded, device, seed)
    except QuadmixError:
        raise
    except Exception as error:  # whatever a task raises
        said = str(error) or "perhaps a text that is longer than the model's context"
        raise QuadmixError(
            f"evaluate: {', '.join(loaded)}: {type(error).__name__}: {said}; evaluate fewer tasks to see which one "
            f"fails, and lower evaluate.batch_size if memory is short"
        ) from error
    results = {name: {row: _result(row, found, each) for row in each.rows} for name, each in loaded.items()}
    if lacking := [row for by_row in results.values() for row, result in by_row.items() if not result["metrics"]]:
        raise QuadmixError(f"evaluate: {model}: {lacking[0]} has no finite score; look at the losses of this model")
    return results


def _run(
    model: str | Path,
    tokenizer: str | Path,
    settings: HarnessSettings,
    loaded: Mapping[str, _Loaded],
    device: str,
    seed: int,
) -> dict[str, Any]:
    """The harness' own results."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    make_model, run_tasks = cast("Any", HFLM), cast("Any", lm_eval.evaluate)  # no checker sees their arguments
    tasks = {name: task for each in loaded.values() for name, task in each.tasks.items()}
    groups = {name: group for each in loaded.values() for name, group in each.groups.items()}
    lm = make_model(pretrained=str(model), tokenizer=str(tokenizer), device=device, batch_size=settings.batch_size)
    for task in tasks.values():
        _prepare(task, lm.max_length, seed)
    for task in settings.local:
        _require_room(tasks[task.name], lm, settings.limit, task.place)
    return run_tasks(
        lm=lm,
        task_dict={"tasks": tasks, "groups": groups},
        limit=settings.limit,
        bootstrap_iters=_BOOTSTRAPS,
        log_samples=False,
    )


def measure_of(result: Result) -> str:
    """The metric by which a task is told: normalised accuracy where there is one."""
    return next((name for name in FIRST_CHOICE if name in result["metrics"]), next(iter(result["metrics"])))


@lru_cache(maxsize=2)
def _manager(task_folder: str | None, content: str) -> Any:
    """The harness' task manager, which takes seconds to make, so a process makes one."""
    if task_folder and os.environ.get(TASK_CODE) != "1":
        raise InputError(
            f"evaluate.task_folder: {task_folder}: tasks of the harness can run code of their own (!function, "
            f"templates, metrics); read them, and set {TASK_CODE}=1 in the environment if they may"
        )
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"evaluate: lm-evaluation-harness is not installed ({error}); pip install 'quadmix-plugin[eval]'"
        ) from error
    with _quiet():
        return TaskManager(include_path=[str(TASK_FOLDER), *([task_folder] if task_folder else [])])


def _load(settings: HarnessSettings) -> dict[str, _Loaded]:
    """Every name that is asked for with its data."""
    loaded: dict[str, _Loaded] = {}
    for name, shots in settings.tasks:
        found = _load_task(name, shots, settings.task_folder, settings._content_of_folder)
        for other, each in loaded.items():
            if twice := sorted(found.tasks.keys() & each.tasks.keys()):
                raise InputError(f"evaluate.tasks: {twice[0]!r} is in {other!r} and in {name!r}; leave one of them out")
        loaded[name] = found
    return loaded | {task.name: _load_local(task, settings.content) for task in settings.local}


@lru_cache(maxsize=128)
def _load_task(name: str, shots: int | None, task_folder: str | None, content: str) -> _Loaded:
    """A task, group or tag of the harness.

    In 0.4.13 the harness takes a task with changed settings, ``{"task": name, "num_fewshot": k}``, for a new one
    without data, and a group given so for an empty one. So they are loaded by name and then changed.
    """
    manager = _manager(task_folder, content)
    try:
        with _quiet():
            found = manager.load([name])
    except Exception as error:  # whatever a data set raises
        raise QuadmixError(
            f"evaluate.tasks: {name}: its data cannot be had ({type(error).__name__}: {error}); fetch it once where "
            f"there is a network and take the cache along (docs/evaluate.md), or use files of your own: evaluate.local"
        ) from error
    tasks, groups = found["tasks"], found.get("groups", {})
    for task in tasks.values():
        task.set_config("num_fewshot", (task.get_config("num_fewshot") or 0) if shots is None else shots)
    return _Loaded(tasks, groups, (name,) if name in groups or name in tasks else tuple(tasks))


@lru_cache(maxsize=128)
def _load_local(task: LocalTask, content: str) -> _Loaded:
    from lm_eval.api.task import ConfigurableTask

    questions = read_questions(task)
    with _quiet():
        made = ConfigurableTask(config=task_config(task, questions))
    return _Loaded({task.name: made}, {}, (task.name,), questions.dropped)


def _prepare(task: Any, max_length: int, seed: int) -> None:
    """Seeds the draw of examples, and leaves room for the question where an answer is generated."""
    task.set_fewshot_seed(seed=seed)
    if task.get_config("output_type") == "generate_until":
        given = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", _NEW_TOKENS)
        task.set_config("generation_kwargs", {"max_gen_toks": min(given, max_length // 2)}, update=True)


def _require_room(task: Any, lm: Any, limit: int | None, place: str) -> None:
    """Refuses a text to be scored that is longer than the model's context, of which the harness asserts only."""
    key = {"multiple_choice": "choices", "loglikelihood": "response"}.get(task.get_config("output_type"))
    for row in list(task.eval_docs)[:limit] if key else ():
        for text in row[key] if isinstance(row[key], list) else [row[key]]:
            if len(text.encode()) <= lm.max_length:  # a token is at least a byte
                continue
            if (n := len(lm.tok_encode(text, add_special_tokens=False))) >= lm.max_length:
                raise QuadmixError(
                    f"{place}: a text of {n:,} tokens, {text[:40]!r}…, has no room in the model's context of "
                    f"{lm.max_length:,}; shorten it, remove the row, or count whole texts: mask_prompt: false"
                )


def _result(name: str, found: Mapping[str, Any], loaded: _Loaded) -> Result:
    if name not in loaded.groups:
        return {**_leaf(name, found), "dropped": loaded.dropped}
    leaves = {task.task_name: _leaf(task.task_name, found) for task in loaded.groups[name].get_all_tasks()}
    shots = {leaf["shots"] for leaf in leaves.values()}
    return {
        "metrics": _pooled(list(leaves.values())),
        "shots": shots.pop() if len(shots) == 1 else None,
        "questions": sum(leaf["questions"] for leaf in leaves.values()),
        "dropped": {},
        "subtasks": leaves,
    }


def _leaf(name: str, found: Mapping[str, Any]) -> Result:
    """One task's numbers; ``acc,none`` becomes ``acc``, and so does the only filter of a metric."""
    values = {key: value for key, value in found["results"][name].items() if "," in key}
    direct = Counter(key.split(",")[0] for key in values)
    metrics = {}
    for key, value in values.items():
        metric, which = key.split(",", 1)
        score = _finite(value)
        if metric.endswith("_stderr") or score is None:
            continue
        metrics[metric if direct[metric] == 1 or which == "none" else f"{metric} ({which})"] = {
            "value": score,
            "stderr": _finite(values.get(f"{metric}_stderr,{which}")),
            "higher_is_better": bool(found["higher_is_better"].get(name, {}).get(metric, True)),
        }
    return {
        "metrics": metrics,
        "shots": int(found["n-shot"].get(name) or 0),
        "questions": int(found["n-samples"][name]["effective"]),
    }


def _pooled(leaves: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """The metrics that all parts of a group have: over all questions, each counted once."""
    total = sum(leaf["questions"] for leaf in leaves)
    pooled = {}
    for name in [name for name in leaves[0]["metrics"] if all(name in leaf["metrics"] for leaf in leaves)]:
        parts = [(leaf["questions"] / total, leaf["metrics"][name]) for leaf in leaves]
        known = all(metric["stderr"] is not None for _, metric in parts)
        pooled[name] = {
            "value": sum(share * metric["value"] for share, metric in parts),
            "stderr": math.sqrt(sum((share * metric["stderr"]) ** 2 for share, metric in parts)) if known else None,
            "higher_is_better": parts[0][1]["higher_is_better"],
        }
    return pooled


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness' progress bars and remarks kept from the terminal; its warnings stay."""
    names = ("lm_eval", "lm-eval")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
