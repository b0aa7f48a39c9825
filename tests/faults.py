"""What the tests and counts of faults share: a run that takes a second, its content without times, forked processes.

A child is forked from a process that has imported everything and started no thread, so that a hundred real processes
with real kills cost no more than their own work.
"""

import hashlib
import importlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from small_run import MODELS, corpus_texts, write_small_recipe

from quadmix_plugin.parameters import Parameters
from quadmix_plugin.store import RunDirectory

SHORT = ("label", "normalise", "select", "export")
"""The steps of a run whose parameters are given and that trains nothing."""

WARM = ("megatron.core.datasets.indexed_dataset", *(f"quadmix_plugin.pipelines.{name}" for name in ("run", *SHORT)))
"""Modules that a child finds imported."""

TRAINING = (
    "lightgbm",
    "lm_eval",
    *(f"quadmix_plugin.pipelines.{name}" for name in ("proxies", "search", "pretrain", "evaluate", "compare")),
)
"""Further ones, for the other steps."""

logger = logging.getLogger("faults")

DOCUMENTS, PER_SHARD = 160, 40
_WITH_SECONDS = r"/parts/[^/]+\.json|proxies/losses\.parquet|(pretrain|compare)/results\.parquet"
_TIMED = ("provenance.json", "report.html", ".lock", ".lock.holder")


def warm_up(*further: str) -> None:
    """Imports what a run needs, in this process."""
    for name in (*WARM, *further):
        importlib.import_module(name)


def note(counts: dict[str, Any], faults: Sequence[str]) -> None:
    """Logs how far a count is; the last fault in full."""
    logger.info("%s %d faults %s", json.dumps(counts), len(faults), faults[-1:])


def write_tiny_recipe(folder: Path, **sections: Any) -> Path:
    """Corpus of two files, parameters and recipe: labels are columns, θ is given, nothing is trained or compared."""
    recipe = write_small_recipe(folder, corpus={"path": "corpus", "documents_per_shard": PER_SHARD})
    (folder / "corpus.parquet").unlink()
    (folder / "corpus").mkdir()
    texts = [text[:400] for text in corpus_texts(DOCUMENTS)]
    numbers = np.random.default_rng(1).normal(size=(2, DOCUMENTS))
    rows = {
        "doc_id": [f"d{i}" for i in range(DOCUMENTS)],
        "text": texts,
        "domain": ["ab"[i % 2] for i in range(DOCUMENTS)],
        "s": numbers[0],
        "t": numbers[1],
    }
    half = DOCUMENTS // 2
    for i in range(2):
        pq.write_table(pa.table(rows).slice(i * half, half), folder / "corpus" / f"{i}.parquet")
    theta = Parameters(
        alpha=np.full((2, 2), 0.5),
        lam=np.full(2, 10.0),
        omega=np.full(2, 0.4),
        eta=np.full(2, 1.0),
        epsilon=np.full(2, 0.01),
        domains=("a", "b"),
        scorers=("s", "t"),
    )
    theta.save(folder / "theta.json")
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content |= {
        "name": "tiny",
        "tokenizer": {"model": str(MODELS / "tokenizer")},
        "domain": {"classifier": "column", "column": "domain"},
        "scorers": {name: {"scorer": "column", "column": name} for name in "st"},
        "rank": {"merge_small_domains": 0},
        "select": {"theta": "theta.json"},
        "pretrain": {"tokens": 2_000, "seeds": [1]},
        "compare": {"selectors": {}},
    }
    for name, section in sections.items():
        if section is None:
            content.pop(name)
        else:
            content[name] = {**content.get(name, {}), **section}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return recipe


def contents(out: Path) -> dict[str, str]:
    """The sha256 of every file of a run but those that say when, how long or by whom; of _SUCCESS all but the time."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or path.name in _TIMED or "/training/" in f"/{name}":
            continue
        found[name] = hashlib.sha256(_without_times(path, name)).hexdigest()
    return found


def _without_times(path: Path, name: str) -> bytes:
    """A file's content, and of the few that say how long something took all but that."""
    is_entry = name.startswith("manifest/")
    if not is_entry and re.search(_WITH_SECONDS, name):
        if name.endswith(".parquet"):
            table = pq.read_table(path, partitioning=None)  # pyright: ignore[reportArgumentType]
            return json.dumps(table.drop_columns("seconds").to_pylist()).encode()
        return json.dumps(_without_seconds(json.loads(path.read_bytes())), sort_keys=True).encode()
    if path.name == "_SUCCESS.json" or (is_entry and re.search(_WITH_SECONDS, name.replace("%", "/"))):
        content = _without_seconds(json.loads(path.read_bytes()))
        for key in ("sha256", "bytes"):
            content.pop(key, None)
        return json.dumps(content, sort_keys=True).encode()
    return path.read_bytes()


def _without_seconds(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_seconds(value) for key, value in content.items() if key not in ("seconds", "headline")}
    return [_without_seconds(each) for each in content] if isinstance(content, list) else content


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code, negative for a signal, and what it printed."""

    code: int
    out: str


@contextmanager
def forked(function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[int, Callable[[], Ended]]]:
    """A child process that runs a function with its output in a file: its id, and what waits for its end.

    A child that is still there at the end of the block is killed.
    """
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _run_child(function, arguments, output.fileno())
        ended: list[Ended] = []

        def wait() -> Ended:
            if not ended:
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                output.seek(0)
                ended.append(Ended(code, output.read().decode(errors="replace")))
            return ended[0]

        try:
            yield child, wait
        finally:
            if not ended:
                os.kill(child, signal.SIGKILL)
                wait()


def _run_child(function: Callable[..., Any], arguments: Sequence[Any], output: int) -> None:
    """Never returns."""
    code = 1
    try:
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        # What the parent's streams are does not matter: a test runner replaces them.
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, "w", closefd=False), "utf-8", write_through=True)
                                  for fd in (1, 2))  # fmt: skip
        function(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_forked(function: Callable[..., Any], *arguments: Any) -> Ended:
    """Runs a function in a child to its end."""
    with forked(function, *arguments) as (_, wait):
        return wait()


def quadmix(*arguments: object) -> None:
    """The command line, in this process."""
    from quadmix_plugin import cli, terminal

    sys.argv = ["quadmix", *map(str, arguments)]
    for console, stream in ((terminal.stdout, sys.stdout), (terminal.stderr, sys.stderr)):
        console.file = stream
        console.width = 2000
    cli.main()


def command(recipe: Path, out: Path, steps: Sequence[str] = SHORT) -> None:
    """Runs these steps of a recipe under the run directory's lock, in this process."""
    from quadmix_plugin.config import load_recipe
    from quadmix_plugin.pipelines.context import open_run
    from quadmix_plugin.pipelines.run import run_steps

    with open_run(load_recipe(recipe), out) as run:
        run_steps(run, steps)


def require(ended: Ended, code: int = 0) -> Ended:
    """The child's end where it is as it must be.

    Raises:
        AssertionError: with what the child printed.
    """
    if ended.code != code:
        raise AssertionError(f"exit code {ended.code}, not {code}:\n{ended.out}")
    return ended


@contextmanager
def scratch(folder: Path | None = None) -> Iterator[Path]:
    """A folder that is removed in the end."""
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as name:
        yield Path(name)


def undisturbed(folder: Path, steps: Sequence[str] = SHORT, **sections: Any) -> tuple[Path, Path, dict[str, str]]:
    """A recipe in this folder, the finished run of it, and its content."""
    recipe = write_tiny_recipe(folder / "tiny", **sections)
    require(run_forked(command, recipe, folder / "whole", steps))
    return recipe, folder / "whole", contents(folder / "whole")


def restored(source: Path, out: Path) -> Path:
    """A copy of a run directory in place of another."""
    shutil.rmtree(out, ignore_errors=True)
    return shutil.copytree(source, out)


def is_whole(out: Path) -> list[str]:
    """What is wrong with what a run directory shows: entries that do not verify, and a finished step without all."""
    return RunDirectory(out).verify()[1]


def kind_of(name: str) -> str:
    """An artifact's name without its numbers."""
    return re.sub(r"\d+", "#", re.sub(r"[0-9a-f]{8,}", "#", name))


def in_clean_process(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The result of a function of a module in a process without threads, forked from one that is warm."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faults", *WARM])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments, named))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"{function.__name__} ended with exit code {process.exitcode}") from None
    process.join()
    if isinstance(result, BaseException):
        raise result
    return result


def _send_result(sender: Any, function: Callable[..., Any], arguments: Any, named: Any) -> None:
    try:
        sender.send(function(*arguments, **named))
    except Exception as error:
        sender.send(AssertionError("".join(traceback.format_exception(error))))
