"""Signals at random times, and two runs in one folder.

Every function makes its own folder, counts, and returns what it counted; ``benchmarks/faults.py`` prints it.
"""

import contextlib
import gc
import os
import random
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from fault_storage import executable
from faults import (
    Ended,
    contents,
    forked,
    is_whole,
    note,
    quadmix,
    run_forked,
    scratch,
    undisturbed,
    warm_up,
    write_tiny_recipe,
)

_QUADMIX = "from quadmix_plugin.cli import main; print('begun', flush=True); main()"
_ORPHAN_SECONDS = 10


# --- signals


def interrupts(
    number: int, seed: int, steps: str = "export", numbers: Sequence[str] = ("INT", "TERM")
) -> dict[str, Any]:
    """Sends signals at random times to ``quadmix run`` on two Dask workers, again and again until it is finished.

    The process group gets SIGINT, as from a terminal; the command alone gets SIGTERM or SIGKILL.
    """
    counts = Counter({"signals": 0, "orphans": 0, "tracebacks": 0})
    faults: list[str] = []
    generator, longest, orphans = random.Random(seed), 0.0, 0.0  # noqa: S311
    with scratch() as folder:
        warm_up()
        recipe, _, wanted = undisturbed(folder, executor={"name": "dask", "workers": 2})
        out, took = folder / "out", _seconds_of(recipe, folder / "timed", steps)
        while counts["signals"] < number:
            sent = signal.Signals[f"SIG{numbers[counts['signals'] % len(numbers)]}"]
            is_new = not out.exists()
            ended = _interrupted(recipe, out, steps, sent, generator.uniform(0, took))
            if isinstance(ended, float):
                took = ended if is_new else took  # a machine may have less to do than when it was measured first
                counts["ended before the signal"] += 1
                faults += _finished(out, wanted, counts)
                continue
            counts["signals"] += 1
            code, seconds, left, errors = ended
            counts[f"{sent.name} exit code {code}"] += 1
            longest, orphans = max(longest, seconds), max(orphans, left)
            counts["orphans"] += left == float("inf")
            counts["tracebacks"] += (trace := "Traceback" in errors)
            expected = -signal.SIGKILL if sent == signal.SIGKILL else 128 + sent
            if code != expected or trace:
                faults.append(f"{sent.name}: exit code {code} after {seconds:.1f} s: {errors[-1500:]}")
            if out.exists() and (wrong := is_whole(out)):
                faults.append(f"{sent.name}: {wrong}")
            note(counts, faults)
        require_run(recipe, out, steps)
        faults += _finished(out, wanted, counts)
    return {
        "counts": dict(counts),
        "undisturbed_seconds": round(took, 1),
        "longest_to_exit_s": round(longest, 2),
        "longest_to_last_process_s": round(orphans, 2),
        "faults": faults,
    }


def _finished(out: Path, wanted: dict[str, str], counts: Counter[str]) -> list[str]:
    """Compares a finished run, and removes it."""
    found = contents(out)
    counts["finished and identical"] += found == wanted
    shutil.rmtree(out)
    return [] if found == wanted else [f"finished: {sorted(set(found.items()) ^ set(wanted.items()))[:4]}"]


def quadmix_command(recipe: Path, out: Path, steps: str) -> list[str]:
    """The command line, in a process of its own; says when it has begun."""
    return executable("-c", _QUADMIX, "run", str(recipe), "--out", str(out), "--until", steps)


def require_run(recipe: Path, out: Path, steps: str) -> None:
    """Runs the command to its end."""
    subprocess.run(quadmix_command(recipe, out, steps), check=True, capture_output=True, timeout=1800)


def _seconds_of(recipe: Path, out: Path, steps: str) -> float:
    started = time.monotonic()
    require_run(recipe, out, steps)
    return time.monotonic() - started


def _interrupted(
    recipe: Path, out: Path, steps: str, sent: signal.Signals, delay: float
) -> tuple[int, float, float, str] | float:
    """Exit code, seconds from the signal to the exit, and to the end of the last process, and standard error.

    Where the command ended before the signal, the seconds that it took.
    """
    marker = uuid.uuid4().hex
    environment = {**os.environ, "QUADMIX_TEST_RUN": marker}
    with subprocess.Popen(
        quadmix_command(recipe, out, steps), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        begun = time.monotonic()
        try:
            _, errors = process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            pass
        else:
            if process.returncode:
                raise AssertionError(errors)
            return time.monotonic() - begun
        started = time.monotonic()
        (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
        process.wait(timeout=120)
        seconds = time.monotonic() - started
        while (left := _marked(marker)) and time.monotonic() - started - seconds < _ORPHAN_SECONDS:
            psutil.wait_procs(left, timeout=0.2)
        gone = float("inf") if left else time.monotonic() - started
        for each in left:
            each.kill()
        assert process.stderr is not None
        return process.returncode, seconds, gone, process.stderr.read()


def _marked(marker: str) -> list[psutil.Process]:
    """Processes that were started with this marker in their environment and have not ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.environ().get("QUADMIX_TEST_RUN") == marker
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def signal_in_a_callback(number: signal.Signals) -> Ended:
    """How a run ends that gets a signal while Python's garbage collector calls a library back."""
    warm_up()
    with scratch() as folder:
        return run_forked(_run_with_callback, write_tiny_recipe(folder / "tiny"), folder / "out", number)


def _run_with_callback(recipe: Path, out: Path, number: signal.Signals) -> None:
    def call_back(phase: str, info: dict[str, Any]) -> None:
        if out.exists():
            gc.callbacks.remove(call_back)
            os.kill(os.getpid(), number)

    gc.callbacks.append(call_back)
    gc.set_threshold(100)
    quadmix("run", recipe, "--out", out, "--until", "export", "--executor", "inline")


# --- two runs in one folder


def races(number: int, seed: int) -> dict[str, Any]:
    """Two processes that begin the same run in one folder, at once or some time apart."""
    warm_up()
    counts: Counter[str] = Counter()
    faults: list[str] = []
    generator = random.Random(seed)  # noqa: S311
    with scratch() as folder:
        recipe, _, wanted = undisturbed(folder, ("label", "normalise"))
        for i in range(number):
            out = folder / str(i)
            first, second = _race(recipe, out, 0.0 if i % 2 else generator.uniform(0, 0.3))
            ends = sorted((first.code, second.code))
            refused = first if first.code else second
            if ends == [0, 1] and re.search(r"in use by (process \d+ on|another process)", refused.out):
                counts["one works, the other is refused"] += 1
            elif ends == [0, 0]:
                counts["one after the other"] += 1
            else:
                faults.append(f"race {i}: {first} {second}")
            if contents(out) == wanted:
                counts["identical"] += 1
            else:
                faults.append(f"race {i}: {sorted(set(contents(out).items()) ^ set(wanted.items()))[:4]}")
            shutil.rmtree(out)
            note(counts, faults)
    return {"counts": dict(counts), "faults": faults}


def _race(recipe: Path, out: Path, delay: float) -> tuple[Any, Any]:
    """How two runs end that a closed pipe lets go at once, the second after a delay."""
    gate = os.pipe()

    def racer(wait: float) -> None:
        os.close(gate[1])
        os.read(gate[0], 1)
        time.sleep(wait)
        quadmix("label", recipe, "--out", out, "--executor", "inline")

    with forked(racer, 0.0) as (_, first), forked(racer, delay) as (_, second):
        for end in gate:
            os.close(end)
        return first(), second()
