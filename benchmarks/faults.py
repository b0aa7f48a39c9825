"""Counts what faults do: one subcommand per fault, each prints one line of JSON and exits with 1 if a promise broke.

    python benchmarks/faults.py kills --number 100

The rows do not depend on each other and make their own folders below TMPDIR, so they can run side by side and be
repeated; docs/reliability.md has the figures. tests/test_faults.py runs the same functions with small numbers.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Number = Annotated[int, typer.Option(help="how many times")]
Seed = Annotated[int, typer.Option(help="of what is random")]


def _print(row: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("faults").setLevel(logging.INFO)
    started = time.monotonic()
    made = function(*arguments)
    print(json.dumps({"row": row, **made, "seconds": round(time.monotonic() - started)}), flush=True)
    raise typer.Exit(bool(made["faults"]))


@app.command()
def kills(number: Number = 100, seed: Seed = 0) -> None:
    """Runs on two Dask workers of which one is killed while it has work."""
    from fault_workers import kills as count

    _print("kills", count, number, seed)


@app.command()
def crashes(
    step: Annotated[list[str], typer.Option(help="a step; can be repeated")],
    number: Annotated[int, typer.Option(help="at most so many points of a step; 0 is all of them")] = 0,
    seed: Seed = 0,
    each_kind: Annotated[bool, typer.Option(help="each call once per kind of artifact")] = False,
) -> None:
    """The run's process killed at its commit points, and the same command again."""
    from fault_crashes import crashes as count

    _print("crashes", count, step, number, seed, each_kind)


@app.command()
def interrupts(
    number: Number = 50,
    seed: Seed = 0,
    until: Annotated[str, typer.Option(help="last step of the run")] = "export",
    sent: Annotated[list[str] | None, typer.Option("--signal", help="INT, TERM or KILL; can be repeated")] = None,
) -> None:
    """Signals at random times to a run on two Dask workers."""
    from fault_signals import interrupts as count

    _print("interrupts", count, number, seed, until, sent or ["INT", "TERM"])


@app.command()
def races(number: Number = 100, seed: Seed = 0) -> None:
    """Two runs that begin in one folder."""
    from fault_signals import races as count

    _print("races", count, number, seed)


@app.command()
def poison(
    number: Number = 3,
    seed: Seed = 0,
    how: Annotated[str, typer.Option(help="kill or memory")] = "kill",
) -> None:
    """A document that kills every worker."""
    from fault_workers import poison as count

    _print(f"poison by {how}", count, number, seed, how)


@app.command()
def write_errors(
    number: Number = 200,
    seed: Seed = 0,
    means: Annotated[str, typer.Option(help="calls, tmpfs, inodes or limit")] = "calls",
) -> None:
    """Writes that fail, and the same command again when there is space."""
    from fault_storage import PRELOADED, with_shim
    from fault_storage import write_errors as count

    if means == "calls" and PRELOADED not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            again = [sys.executable, *sys.argv]
            ended = subprocess.run(again, env=with_shim(Path(folder)), check=False)  # noqa: S603  itself
            raise typer.Exit(ended.returncode)
    _print(f"write errors by {means}", count, number, seed, means)


@app.command()
def damage(number: Number = 1000, seed: Seed = 0) -> None:
    """Truncations and flipped bits of a finished run, so many of each."""
    from fault_storage import damage as count

    _print("damage", count, number, seed)


@app.command()
def inputs(number: Number = 100, seed: Seed = 0) -> None:
    """Truncated and flipped corpus files of every format, so many of each."""
    from fault_inputs import damaged_corpora as count

    _print("inputs", count, number, seed)


if __name__ == "__main__":
    app()
