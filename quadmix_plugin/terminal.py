"""What a command lets appear on stderr: progress as bars or as lines, and nothing of the libraries."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from quadmix_plugin.pipelines.context import Progress

_SECONDS_BETWEEN_LINES = 15.0

stderr = Console(stderr=True, soft_wrap=True)


@contextmanager
def show_progress(as_json: bool) -> Iterator["Progress | None"]:
    """Progress of the stages with time left, on stderr; without a terminal one line when a stage ends."""
    if as_json:
        yield None
        return
    if not stderr.is_terminal:
        yield _Lines()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int | None, /, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(escape(stage), total=total, note="")
            if done < bars.tasks[tasks[stage]].completed:  # the same stage again, with other work
                bars.reset(tasks[stage], total=total)
            bars.update(tasks[stage], completed=done, total=total, note=escape(note))

        yield update


class _Lines:
    """Progress without a terminal: a line when a stage ends, and every quarter of a minute while one goes on."""

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, int]] = {}
        self._done: dict[str, int] = {}
        self._last: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int | None, /, note: str = "") -> None:
        ended = total is not None and done >= total
        now = time.monotonic()
        if stage not in self._begun or done < self._done[stage]:  # or the same stage again, with other work
            self._begun[stage] = (now, done)
        self._done[stage] = done
        if ended or now - self._last.setdefault(stage, now) > _SECONDS_BETWEEN_LINES:
            self._last[stage] = now
            of = "" if total is None or ended else f" of {total}"
            said = [f"{stage}: {done}{of} done", self._left(stage, done, total, now), note]
            stderr.print(", ".join(filter(None, said)), markup=False, highlight=False)

    def _left(self, stage: str, done: int, total: int | None, now: float) -> str:
        """The time that what is left takes at the rate until now."""
        begun, before = self._begun[stage]
        if total is None or done >= total or done == before:
            return ""
        left = timedelta(seconds=round((now - begun) / (done - before) * (total - done)))
        return f"{left} left"


def quiet_libraries(verbose: bool) -> None:
    """Libraries log errors only; set before they are imported, and inherited by worker processes.

    Dask's processes not even those: what goes wrong there is raised here, and the rest is of connections that end.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    defaults = {
        "DASK_LOGGING__DISTRIBUTED": "info" if verbose else "critical",
        "TRANSFORMERS_VERBOSITY": "warning" if verbose else "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "0" if verbose else "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not verbose:
        from loguru import logger

        logger.disable("nemo_curator")  # LOGURU_LEVEL has no effect: a dependency adds a handler of its own
        for name in ("megatron", "transformers", "matplotlib"):
            logging.getLogger(name).setLevel(logging.ERROR)
