"""What the benchmarks share: one engine in one fresh process, its cost, and the report with what it was measured on.

Core-seconds (user + system time of all threads) are the figure to compare: on a shared machine they hardly depend on
what else runs, and an engine that uses every core is not given them for nothing.
"""

import datetime
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import ParamSpec, Self, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_VERSIONS = ("numpy", "numba", "pandas", "polars", "duckdb", "pyarrow", "torch", "transformers", "quadmix-plugin")


@dataclass
class Cost:
    """Of one call: ``core_s``, ``wall_s``; bytes of memory at its ``peak``, above what was held before, and in all."""

    core_s: float = 0.0
    wall_s: float = 0.0
    peak: float = 0.0
    peak_in_all: float = 0.0

    @classmethod
    def median(cls, costs: Sequence[Self]) -> "Cost":
        """The median of each number."""
        return cls(*(median(getattr(cost, number.name) for cost in costs) for number in fields(cls)))


@contextmanager
def metered() -> Iterator[Cost]:
    """Fills the ``Cost`` it gives when the block ends; peaks are NaN where there is no Linux to tell them."""
    cost = Cost()
    before = _reset_peak()
    wall, core = time.perf_counter(), time.process_time()
    yield cost
    cost.wall_s, cost.core_s = time.perf_counter() - wall, time.process_time() - core
    cost.peak_in_all = _memory("VmHWM")
    cost.peak = cost.peak_in_all - before


def in_fresh_process(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """The result of a function of a module, run by an interpreter of its own that ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments, **named).result()


def report(title: str, sections: Sequence[str], out: Path | None) -> None:
    """Prints the sections, and writes them to ``out`` with the command line, machine, versions and date."""
    text = "\n\n".join([f"# {title}", *sections, _provenance()])
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def progress(text: str) -> None:
    """One line to standard error, which no report contains."""
    print(text, file=sys.stderr, flush=True)


def _provenance() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in _VERSIONS)
    command = shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return (
        f"`python {command}` on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}. Machine: {os.cpu_count()} cores, "
        f"{_processor()}, {platform.system()} {platform.machine()}. Python {platform.python_version()}, {versions}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _reset_peak() -> float:
    # Not ru_maxrss: it cannot be reset, and a new process inherits its parent's.
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return float("nan")
    return _memory("VmRSS")


def _memory(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(field)), float("nan"))
