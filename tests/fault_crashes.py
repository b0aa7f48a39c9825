"""The process of a run killed at its commit points, and the same command again.

Every function makes its own folder, counts, and returns what it counted; ``benchmarks/faults.py`` prints it.
"""

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fault_storage import EVERY_STEP, EVERYTHING
from faults import (
    SHORT,
    TRAINING,
    command,
    contents,
    is_whole,
    kind_of,
    note,
    require,
    restored,
    run_forked,
    scratch,
    warm_up,
    write_tiny_recipe,
)

from quadmix_plugin.store import RunDirectory


def crashes(steps: Sequence[str], number: int = 0, seed: int = 0, each_kind: bool = False) -> dict[str, Any]:
    """Kills a run of one process before and after every replace, fsync and unlink of these steps, and runs it again.

    ``each_kind``: only the first of those calls on each kind of artifact, and only before it, since nothing is written
    between the end of one and the beginning of the next. ``number``: at most so many points of a step, drawn by seed.
    """
    made: dict[str, Any] = {}
    faults: list[str] = []
    is_short = set(steps) <= {*SHORT, "report"}
    warm_up(*(() if is_short else TRAINING))
    with scratch() as folder:
        recipe = write_tiny_recipe(folder / "tiny", **({} if is_short else EVERYTHING))
        order = [*SHORT, "report"] if is_short else EVERY_STEP
        for step in order[: 1 + max(order.index(step) for step in steps)]:
            before = restored(folder / "next", folder / "before") if made or (folder / "next").exists() else None
            require(run_forked(command, recipe, folder / "next", [step]))
            if step in steps:
                made[step] = _crash(recipe, step, before, folder, (number, seed, each_kind))
                faults += made[step].pop("faults")
                note({step: made[step]}, faults)
    return {"steps": made, "points": sum(each["points"] for each in made.values()), "faults": faults}


def _crash(recipe: Path, step: str, before: Path | None, folder: Path, choice: tuple[int, int, bool]) -> dict[str, Any]:
    wanted, out, log = contents(folder / "next"), folder / "out", folder / "log"
    shards = Counter(kind_of(name) for name in wanted)
    counts: Counter[str] = Counter()
    again, faults = Counter[str](), []
    _prepared(before, out, log)
    require(run_forked(_watched, recipe, out, step, log, -1))
    events = [line for line in _lines(log) if line[0] != "done"]
    for point in _points(events, *choice):
        _prepared(before, out, log)
        what = f"{step}, {' '.join(events[point])}"
        ended = run_forked(_watched, recipe, out, step, log, point)
        if ended.code != -signal.SIGKILL:
            faults.append(f"{what}: not reached, exit code {ended.code}: {ended.out[-300:]}")
            continue
        counts["points"] += 1
        if wrong := is_whole(out):
            faults.append(f"{what}: {wrong}")
        vouched = _vouched(out)
        lost = {_commit(name) for name in _unvouched(out, vouched)}
        counts["most shards in flight"] = max(counts["most shards in flight"], len(lost))
        log.unlink()
        ended = run_forked(_watched, recipe, out, step, log, -1)
        if ended.code or (found := contents(out)) != wanted:
            differing = [] if ended.code else sorted(set(found.items()) ^ set(wanted.items()))[:4]
            faults.append(f"{what}: exit code {ended.code}: {differing} {ended.out[-300:]}")
            continue
        counts["identical"] += 1
        redone = {line[2] for line in _lines(log) if line[0] == "done"} & vouched
        counts["most shards written again"] = max(
            counts["most shards written again"], sum(shards[kind_of(name)] > 1 for name in redone)
        )
        again.update({kind_of(name) for name in redone})
        note({step: dict(counts)}, faults)
    return {**counts, "events": len(events), "written again though there": dict(again), "faults": faults}


def _prepared(before: Path | None, out: Path, log: Path) -> None:
    log.unlink(missing_ok=True)
    if before is None:
        shutil.rmtree(out, ignore_errors=True)
    else:
        restored(before, out)


def _points(events: list[list[str]], number: int, seed: int, each_kind: bool) -> list[int]:
    points, seen = [], set()
    for i, (name, when, path) in enumerate(events):
        what = (name, kind_of(path))
        if each_kind and (when == "after" or what in seen):
            continue
        seen.add(what)
        points.append(i)
    if number and number < len(points):
        points = sorted(random.Random(seed).sample(points, number))  # noqa: S311
    return points


def _lines(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def _watched(recipe: Path, out: Path, step: str, log: Path, point: int) -> None:
    """A step whose process is killed at one of the calls that it notes, counted from 0; -1 is none."""
    notes = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    left = [point]

    def note(name: str, when: str, path: str) -> None:
        os.write(notes, (json.dumps([name, when, path.removeprefix(f"{out}/")]) + "\n").encode())
        if when and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= bool(when)

    def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[-1])
            if not path.startswith(f"{out}/"):
                return function(*args, **named)
            note(name, "before", path)
            result = function(*args, **named)
            if name == "replace":
                note("done", "", path)
            note(name, "after", path)
            return result

        return wrapped

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, around(name, getattr(os, name)))
    command(recipe, out, [step])


def _vouched(out: Path) -> set[str]:
    run = RunDirectory(out)
    steps = [run.step(name, key) for name in run.step_names() for key in run.recorded_keys(name)]
    return {entry.path for step in steps for entry in step.entries()}


def _unvouched(out: Path, vouched: set[str]) -> list[str]:
    names = (path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    inside = [name for name in names if "/" in name and not name.startswith("manifest/") and "/training/" not in name]
    return [name for name in inside if name not in vouched]


def _commit(name: str) -> str:
    """What the files of one commit have in common: folder and name up to the first dot."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.removeprefix('.').split('.')[0]}"
