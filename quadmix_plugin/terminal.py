"""What a command lets appear: on stderr progress as bars or as lines, and nothing of the libraries; tables of a fit."""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from quadmix_plugin.pipelines.context import Progress

_SECONDS_BETWEEN_LINES = 15.0
_SHOWN = 8
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters spelt out: a terminal would obey those of a corpus' column or file name."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


class _Console(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


stdout = _Console(soft_wrap=True)
stderr = _Console(stderr=True, soft_wrap=True)


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
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
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
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Dask's loops: tasks that ended with their connection


def print_fit(metrics: dict[str, Any]) -> None:
    """The errors of ``quadmix fit`` and the best input, as a table and some lines."""
    tests = metrics["measured_on"] == "test rows"
    rows = f"{metrics['test_rows']} test rows" if tests else "cross-validation"
    leak = ", by which early stopping chose" if metrics.get("early_stopped_on_test") else ""
    table = Table(Column("target", overflow="fold"), "Spearman", "95 %", "Pearson", "MAE", "R²")
    table.title = f"measured on {rows}{leak}"
    for name, each in metrics["targets"].items():
        chosen = metrics.get("chosen", {}).get(name)
        low, high = each["interval"]["spearman"]
        numbers = [f"{each['spearman']:.4f}", f"{low:.4f}–{high:.4f}", f"{each['pearson']:.4f}"]
        numbers += [f"{each['mae']:.4f}", f"{each['r2']:.3f}"]
        table.add_row(escape(name + (f" ({chosen})" if chosen else "")), *numbers)
    stdout.print(table)
    counts = [f"{metrics[key]} {key}" for key in ("rows", "failed", "unmatched") if metrics[key]]
    stdout.print(f"{', '.join(counts)}; regressor {metrics['regressor']}", markup=False, highlight=False)
    optimum = sorted(metrics["optimum"].items(), key=lambda item: -item[1])
    more = f" … and {len(optimum) - _SHOWN} more" if len(optimum) > _SHOWN else ""
    said = ", ".join(f"{name} {value:.4g}" for name, value in optimum[:_SHOWN])
    stdout.print(f"optimum, largest first: {said}{more}", markup=False, highlight=False)
    for rival in ("mean_row", "best_row"):
        stdout.print(metrics["gain"][rival]["sentence"], markup=False, highlight=False)
