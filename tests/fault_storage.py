"""Faults of the disk: writes that fail, artifacts that are damaged, and what a run makes of a damaged corpus.

Every function makes its own folder, counts, and returns what it counted; ``benchmarks/faults.py`` prints it.
"""

import contextlib
import ctypes
import errno
import os
import random
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import (
    SHORT,
    TRAINING,
    command,
    contents,
    is_whole,
    kind_of,
    note,
    quadmix,
    require,
    run_forked,
    scratch,
    undisturbed,
    warm_up,
    write_tiny_recipe,
)

from quadmix_plugin.store import RunDirectory

SHIM = Path(__file__).with_name("failing_calls.c")
PRELOADED = "QUADMIX_TEST_SHIM"
"""Names the compiled library in the environment of a process that has it."""
_ERRORS = ((errno.ENOSPC, True), (errno.EIO, False), (errno.EDQUOT, True))


class Unavailable(Exception):
    """This machine has no means for the fault; says why."""


# --- write errors


def write_errors(number: int, seed: int, means: str = "calls") -> dict[str, Any]:
    """Lets writes of ``quadmix run --until export`` fail, frees the disk, and runs the same command again.

    ``means``: ``calls`` (the n-th call of the C library, needs the shim of ``preloaded``), ``tmpfs``, ``inodes`` (real
    full file systems of so many bytes or files) or ``limit`` (RLIMIT_FSIZE).
    """
    warm_up()
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with scratch() as folder:
        recipe, _, wanted = undisturbed(folder)
        for case, place in _cases(means, number, seed, recipe, folder):
            out = place / "out"
            what = f"{means} {case[0]}"
            ended = run_forked(case[1], "run", recipe, "--out", out, "--until", "export", "--executor", "inline")
            counts["cases"] += 1
            counts["exit code " + str(ended.code)] += 1
            if ended.code == 0:
                counts["without effect"] += 1
            elif ended.code != 74 or "Traceback" in ended.out or not _names_remedy(ended.out, out):
                faults.append(f"{what}: exit code {ended.code}: {ended.out[-600:]}")
            if wrong := is_whole(out):
                counts["corrupt visible files"] += 1
                faults.append(f"{what}: {wrong}")
            counts["false completions"] += _false_completions(out, wanted)
            counts["steps finished before the error"] += len(list(out.glob("manifest/*/_SUCCESS.json")))
            case[2]()
            again = run_forked(quadmix, "run", recipe, "--out", out, "--until", "export", "--executor", "inline")
            if again.code or contents(out) != wanted:
                faults.append(f"{what}: again: {again.code} {_differing(contents(out), wanted)} {again.out[-600:]}")
            else:
                counts["identical after the same command"] += 1
            shutil.rmtree(out, ignore_errors=True)
            note(counts, faults)
    return {"counts": dict(counts), "faults": faults}


def _names_remedy(text: str, out: Path) -> bool:
    return f"error: {out}" in text and any(word in text for word in ("give another --out", "check it"))


def _false_completions(out: Path, wanted: dict[str, str]) -> int:
    """Steps that say they are finished and lack an artifact of the undisturbed run."""
    found = contents(out) if out.exists() else {}
    false = 0
    for path in out.glob("manifest/*/_SUCCESS.json"):
        needed = [name for name in wanted if name.startswith(f"manifest/{path.parent.name}/")]
        false += any(found.get(name) != wanted[name] for name in needed)
    return false


def _differing(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    return [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)][:5]


def _cases(means: str, number: int, seed: int, recipe: Path, folder: Path) -> Iterator[tuple[Any, Path]]:
    """(name, command that fails, what frees the disk), and where it runs."""
    if means == "calls":
        shim = preloaded()
        n = _calls_of(recipe, folder, shim)
        for i in range(number):
            at = 1 + (i * n) // number
            error, lasts = _ERRORS[(i + seed) % len(_ERRORS)]
            name = f"{at} of {n} {errno.errorcode[error]}"
            yield (name, _Failing(shim, str(folder / "disk"), at, error, lasts), lambda: None), _made(folder / "disk")
    elif means == "limit":
        generator = random.Random(seed)  # noqa: S311
        for _ in range(number):
            limit = int(2 ** generator.uniform(0, 15.5))
            yield (f"{limit} bytes", _Limited(limit), lambda: None), _made(folder / "disk")
    else:
        option, least, most = ("size", 4096, 480 * 1024) if means == "tmpfs" else ("nr_inodes", 2, 115)
        for i in range(number):
            amount = least + (most - least) * i // max(1, number - 1)
            with mounted(folder / "disk", f"{option}={amount}") as disk:
                free = ["mount", "-o", "remount,size=64m,nr_inodes=10000", str(disk)]
                yield (f"{amount} {option}", quadmix, lambda free=free: subprocess.run(free, check=True)), disk


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system in memory.

    Raises:
        Unavailable: mounting is not permitted.
    """
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Unavailable(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class _Limited:
    """The command line with RLIMIT_FSIZE."""

    def __init__(self, limit: int):
        self.limit = limit

    def __call__(self, *arguments: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
        quadmix(*arguments)


class _Failing:
    """The command line whose n-th call that writes below a folder fails."""

    def __init__(self, shim: ctypes.CDLL, below: str, n: int, error: int, lasts: bool):
        self.shim, self.arguments = shim, (below.encode(), n, error, int(lasts))

    def __call__(self, *arguments: object) -> None:
        self.shim.arm(*self.arguments)
        try:
            quadmix(*arguments)
        finally:
            print(f"calls {self.shim.counted()}")


def _calls_of(recipe: Path, folder: Path, shim: ctypes.CDLL) -> int:
    """How many calls an undisturbed run makes."""
    disk = _made(folder / "disk")
    failing = _Failing(shim, str(disk), 0, 0, False)
    ended = require(
        run_forked(failing, "run", recipe, "--out", disk / "out", "--until", "export", "--executor", "inline")
    )
    shutil.rmtree(disk / "out")
    return int(ended.out.rsplit("calls ", 1)[1])


def preloaded() -> ctypes.CDLL:
    """The library whose calls fail, in a process that was started with it.

    Raises:
        Unavailable: it was not; see ``with_shim``.
    """
    library = os.environ.get(PRELOADED)
    if library is None:
        raise Unavailable("this process was not started with the library whose calls fail")
    shim = ctypes.CDLL(library)
    shim.counted.restype = ctypes.c_long
    shim.arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int)
    return shim


def with_shim(folder: Path) -> dict[str, str]:
    """The environment of a process that has the shim, which is compiled into this folder.

    Raises:
        Unavailable: there is no C compiler.
    """
    compiler, library = shutil.which("cc"), folder / "failing_calls.so"
    if compiler is None:
        raise Unavailable("no C compiler (cc) to make the library whose calls fail")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM), "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), PRELOADED: str(library)}


# --- damage


def damage(number: int, seed: int, full: bool = True) -> dict[str, Any]:
    """Cuts and flips one bit of files of a finished run, ``number`` times each; what ``quadmix verify`` finds.

    ``full``: of a run of every step; else of those up to the export. Where a file lies is drawn by its kind first, so
    that a kind with many files has no more weight.
    """
    warm_up(*(TRAINING if full else ()))
    with scratch() as folder:
        recipe = write_tiny_recipe(folder / "tiny", **(EVERYTHING if full else {}))
        require(run_forked(command, recipe, folder / "out", EVERY_STEP if full else SHORT))
        return damage_of(folder / "out", number, seed)


EVERY_STEP = (
    "label", "normalise", "proxies", "search", "select", "export", "pretrain", "evaluate", "compare", "report",
)  # fmt: skip
EVERYTHING: dict[str, Any] = {
    "select": None,
    "proxy": {"number": 13, "tokens": 2_000, "repeated": 1, "repeats": 2, "baselines": 1, "curve_at": [0.5]},
    "space": {"omega_max": 0.5},
    "validation": {"path": "validation.jsonl", "rows_per_task": 8},
    "search": {"draws": 200, "regressor": "lightgbm", "compared": ["lightgbm"], "objective": {"hellaswag": 1.0}},
    "compare": {"selectors": {"random": {}}},
    "evaluate": {"local": {"own": {"path": "validation.jsonl"}}, "limit": 2},
}
"""Sections of a recipe that goes through every step in some seconds each."""


def damage_of(out: Path, number: int, seed: int) -> dict[str, Any]:
    """As ``damage``, of this finished run; it is as before in the end."""
    run, generator = RunDirectory(out), random.Random(seed)  # noqa: S311
    before, kinds = contents(out), _covered(run)
    if wrong := run.verify()[1]:
        raise AssertionError(wrong)
    counts, misses = Counter[str](), Counter[str]()
    for way in ("cut", "flip"):
        for i in range(number):
            paths = kinds[sorted(kinds)[i % len(kinds)]]
            path = paths[generator.randrange(len(paths))]
            whole = path.read_bytes()
            path.write_bytes(_damaged(whole, way, generator))
            counts[way] += 1
            if run.verify()[1]:
                counts[f"{way} found"] += 1
            else:
                misses[f"{way} {kind_of(path.relative_to(out).as_posix())}"] += 1
            path.write_bytes(whole)
            if i % 100 == 0:
                note(counts, sorted(misses))
    if contents(out) != before:
        raise AssertionError("the run is not as it was")
    files = [path for path in out.rglob("*") if path.is_file()]
    covered = {path for paths in kinds.values() for path in paths}
    return {
        "counts": dict(counts),
        "kinds": len(kinds),
        "misses": dict(misses),
        "not covered": sorted({kind_of(path.relative_to(out).as_posix()) for path in files if path not in covered}),
        "faults": sorted(misses),
    }


def _damaged(content: bytes, way: str, generator: random.Random) -> bytes:
    if way == "cut":
        return content[: generator.randrange(len(content))]
    changed = bytearray(content)
    changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def last_bytes(out: Path) -> dict[str, Any]:
    """Cuts the last byte of every file that is covered, and lengthens it by one; what ``quadmix verify`` finds."""
    run, counts, misses = RunDirectory(out), Counter[str](), []
    for paths in _covered(run).values():
        for path in paths:
            whole = path.read_bytes()
            for way, content in (("cut", whole[:-1]), ("longer", whole + b"\n")):
                path.write_bytes(content)
                counts[way] += 1
                if not run.verify()[1]:
                    misses.append(f"{way} {kind_of(path.relative_to(out).as_posix())}")
            path.write_bytes(whole)
    return {"counts": dict(counts), "faults": sorted(set(misses)), "misses": len(misses)}


def _covered(run: RunDirectory) -> dict[str, list[Path]]:
    """Files that manifests vouch for and the manifests themselves, by kind."""
    found: dict[str, list[Path]] = {}
    for path in sorted((run.root / "manifest").glob("*/*.json")):
        paths = [path]
        if path.name != "_SUCCESS.json":
            paths.append(run.root / path.name.removesuffix(".json").replace("%", "/"))
        for each in paths:
            found.setdefault(kind_of(each.relative_to(run.root).as_posix()), []).append(each)
    return found


def executable(*arguments: str) -> list[str]:
    """A command of this Python."""
    return [sys.executable, "-W", "ignore", *arguments]
