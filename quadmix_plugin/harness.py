"""Benchmark scores of a trained model by lm-evaluation-harness, on tasks of the harness or of a folder of one's own.

A thin layer: which tasks, which few-shot setting and which model; the harness does the rest.
"""

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from quadmix_plugin.errors import InputError, QuadmixError

_BOOTSTRAPS = 1000


@dataclass(frozen=True)
class HarnessSettings:
    """What is asked of the harness.

    ``tasks``: names; ``task_folder``: YAML files of further ones; ``fewshot`` examples, None: as each task says;
    ``limit``: at most so many questions of each; ``batch_size`` of requests.
    """

    tasks: tuple[str, ...]
    task_folder: str | None = None
    fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8

    def manager(self) -> Any:
        """The harness' task manager, which takes seconds to make, so a process makes one.

        Raises:
            InputError: the harness is not installed, or it has no such task.
        """
        return _manager(self)


def evaluate_model(
    model: str | Path, tokenizer: str | Path, settings: HarnessSettings, device: str, seed: int = 0
) -> dict[str, dict[str, float]]:
    """The scores of a model in Hugging Face's format: task → metric (such as ``acc``, ``acc_norm``) → value.

    Standard errors are metrics of their own, ``<metric>_stderr``. Few-shot examples are drawn with ``seed``.

    Raises:
        InputError: as ``HarnessSettings.manager``.
        QuadmixError: a task's data cannot be had, or it fails.
    """
    manager = settings.manager()
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    make_model, run_tasks = cast("Any", HFLM), cast("Any", lm_eval.simple_evaluate)  # no checker sees their arguments
    try:
        with _quiet():
            loaded = make_model(
                pretrained=str(model), tokenizer=str(tokenizer), device=device, batch_size=settings.batch_size
            )
            results = run_tasks(
                model=loaded,
                tasks=list(settings.tasks),
                task_manager=manager,
                num_fewshot=settings.fewshot,
                limit=settings.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:  # whatever a task or its data set raises
        raise QuadmixError(
            f"evaluate.tasks: {', '.join(settings.tasks)}: {type(error).__name__}: {error}; tasks whose data must be "
            f"downloaded need the network once, local ones a data_files path that exists"
        ) from error
    return {task: _scores(found) for task, found in (results or {})["results"].items()}


@lru_cache(maxsize=1)
def _manager(settings: HarnessSettings) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"evaluate.tasks: lm-evaluation-harness is not installed ({error}); pip install 'quadmix-plugin[eval]'"
        ) from error
    with _quiet():
        manager = TaskManager(include_path=settings.task_folder)
    known = manager.all_tasks
    if unknown := [name for name in settings.tasks if name not in known]:
        raise InputError(
            f"evaluate.tasks: {unknown[0]!r} is not among the {len(known):,} tasks of lm-evaluation-harness"
            + (
                f" and {settings.task_folder}"
                if settings.task_folder
                else "; give evaluate.task_folder for tasks of your own"
            )
        )
    return manager


def _scores(found: dict[str, Any]) -> dict[str, float]:
    """Plain numbers: ``acc,none`` becomes ``acc``; what is not a finite number is left out."""
    plain = {name.removesuffix(",none"): value for name, value in found.items()}
    numbers = {
        name: float(value) for name, value in plain.items() if type(value) in (int, float) and name != "sample_len"
    }
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def score_columns(scores: dict[str, dict[str, float]], tasks: Sequence[str]) -> dict[str, float]:
    """One number per task, the normalised accuracy where there is one, as the columns ``<task> (<metric>)``."""
    columns = {}
    for task in tasks:
        found = {name: value for name, value in scores.get(task, {}).items() if not name.endswith("_stderr")}
        metric = next((name for name in ("acc_norm", "acc", "exact_match") if name in found), next(iter(found), None))
        if metric is not None:
            columns[f"{task} ({metric})"] = found[metric]
    return columns


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
