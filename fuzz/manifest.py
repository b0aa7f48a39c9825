"""Fuzzes the readers of manifests: blocks between empty lines, each a file's name and below it what is in the file."""

import contextlib
import json
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from driver import fuzz, instrumented
from structure import changed

with instrumented("quadmix_plugin.store"):
    from quadmix_plugin.store import RunDirectory, Step

BETWEEN = b"\n\n"
LONGEST = 4096


def target(data: bytes, folder: Path) -> None:
    """Asks a run for all that its manifest says, and looks at no file outside it meanwhile."""
    run = _run(folder)
    manifest = run.root / "manifest" / "label"
    for path in manifest.iterdir():
        path.unlink()
    for block in data.split(BETWEEN):
        name, _, content = block.partition(b"\n")
        if name and b"/" not in name and b"\0" not in name and name not in (b".", b"..") and len(name) < 256:
            (manifest / os.fsdecode(name)).write_bytes(content)
    with _looking() as looked:
        _read(run)
    root = os.fspath(run.root)
    if outside := [path for path in looked if os.path.commonpath([root, os.path.abspath(path)]) != root]:
        raise ValueError(f"looked at {outside[0]!r}, which is not in the run directory")


def seeds() -> dict[str, bytes]:
    """What the store writes: each file alone, and all of them."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        manifest = _run(Path(folder)).root / "manifest" / "label"
        paths = sorted(manifest.iterdir())
        blocks = {path.name: os.fsencode(path.name) + b"\n" + path.read_bytes().strip() for path in paths}
    return {**blocks, "all": BETWEEN.join(blocks.values())}


def words() -> list[bytes]:
    """The keys of entries and of ``_SUCCESS.json``, names of files, and what JSON has a meaning for."""
    keys = [f'"{key}": '.encode() for key in ["path", "bytes", "sha256", "key", "facts", "step", "artifacts", "rows"]]
    names = [
        b"_SUCCESS.json",
        b"labels%rows.json.json",
        b"labels.json",
        b'"labels"',
        b"labels/",
        b"../",
        b"/etc/passwd",
    ]
    values = [
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"null",
        b"true",
        b"{}",
        b"[]",
        b'"\\ud800"',
        b"[[[[[[[[",
        b'{"a":',
        b"\\u0000",
    ]
    return [BETWEEN, *keys, *names, *values]


def mutation(data: bytes, generator: random.Random) -> bytes | None:
    """One place of one file changed; every other time under the name that its entry's path asks for."""
    blocks = data.split(BETWEEN)
    at = generator.randrange(len(blocks))
    name, _, content = blocks[at].partition(b"\n")
    try:
        made = changed(json.loads(content), generator)
    except (ValueError, RecursionError):
        return None
    if isinstance(made, dict) and generator.random() < 0.2:
        made |= {"path": generator.choice(["labels", "labels/rows.json", "report.html"]), "bytes": 4096}  # of a folder
    if isinstance(made, dict) and isinstance(path := made.get("path"), str) and generator.random() < 0.5:
        name = f"{path.replace('/', '%')}.json".encode(errors="replace")
    blocks[at] = name + b"\n" + json.dumps(made).encode()
    return BETWEEN.join(blocks)


def _run(folder: Path) -> RunDirectory:
    """A run with two artifacts, made once; a file beside it holds what no reader may see."""
    run = RunDirectory.open(folder / "run")
    if not (folder / "outside.json").exists():
        step = run.step("label", "k")
        step.write_json("labels/rows.json", [1, 2, 3], rows=3, dropped={"empty": 1})
        step.write_text("report.html", "<p>report</p>")
        step.finish(rows=3)
        (folder / "outside.json").write_text("{}", encoding="utf-8")
    return run


def _read(run: RunDirectory) -> None:
    keys: set[Any] = {"k"}
    for name in run.step_names():
        keys |= run.recorded_keys(name)
    for step in (run.step("label", key) for key in keys):
        _ask(step)
    run.verify()


def _ask(step: Step) -> None:
    for entry in step.entries():
        if step.entry(entry.path) != entry:
            raise ValueError(f"{entry.path!r} is another entry when asked for by name")
        step.read_path(entry.path)
    if (step.summary() is not None) != step.is_done:
        raise ValueError("done without a summary")


_looked: list[Any] | None = None


class _Mine(list[Any]):
    """What this thread appends: others, such as monitors of a cluster, look at what they like."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def append(self, item: Any) -> None:
        if threading.get_ident() == self._thread:
            super().append(item)


@contextlib.contextmanager
def _looking() -> Iterator[list[Any]]:
    """The paths that are opened, listed or asked about meanwhile."""
    global _looked  # noqa: PLW0603 - an audit hook stays for good and has no other way to be told
    if not getattr(sys, "_quadmix_fuzz_looks", False):
        sys.addaudithook(_hook)
        sys._quadmix_fuzz_looks = True  # type: ignore[attr-defined]
    real = {name: getattr(os, name) for name in ("stat", "lstat", "access")}  # of which there are no audit events
    _looked = found = _Mine()

    def noted(name: str) -> Any:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            found.append(path)
            return real[name](path, *arguments, **options)

        return call

    try:
        for name in real:
            setattr(os, name, noted(name))
        yield found
    finally:
        _looked = None
        for name, function in real.items():
            setattr(os, name, function)
        found[:] = [os.fsdecode(path) for path in found if isinstance(path, str | bytes | os.PathLike)]


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _looked is not None and event in ("open", "os.listdir", "os.scandir", "os.chdir", "os.readlink"):
        _looked.append(arguments[0])


if __name__ == "__main__":
    fuzz(target, seeds(), words(), LONGEST, mutation)
