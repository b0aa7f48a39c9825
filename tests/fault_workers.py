"""Workers that are killed at random times, or by a document.

Every function makes its own folder, counts, and returns what it counted; ``benchmarks/faults.py`` prints it.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fault_signals import quadmix_command
from faults import (
    SHORT,
    WARM,
    contents,
    is_whole,
    note,
    scratch,
    undisturbed,
    warm_up,
    write_tiny_recipe,
)

from quadmix_plugin.store import RunDirectory

_CONFIG = {
    "distributed.worker.multiprocessing-method": "forkserver",
    "distributed.deploy.lost-worker-timeout": "10 minutes",  # else a cluster gives up a worker that starts slowly
}

# --- workers killed


def kills(number: int, seed: int) -> dict[str, Any]:
    """``number`` runs on a cluster of two workers of which a random one is killed at a random moment."""
    warm_up()
    counts: Counter[str] = Counter()
    faults: list[str] = []
    generator = random.Random(seed)  # noqa: S311
    with scratch() as folder:
        recipe, _, wanted = undisturbed(folder)
        with _cluster(folder / "dask") as (cluster, client):
            took = [_run_on(client, recipe, folder / "warm-up", None) for _ in range(2)][-1]
            for i in range(number):
                out = folder / str(i)
                killer = _Killer(cluster, generator.uniform(0, took), generator)
                _run_on(client, recipe, out, killer)
                counts["complete"] += 1
                counts["killed"] += killer.killed
                counts["killed while it had work"] += killer.was_busy
                counts["temporary files left"] += (swept := RunDirectory(out).sweep())
                counts["runs with temporary files"] += swept > 0
                if contents(out) == wanted:
                    counts["identical"] += 1
                else:
                    faults.append(f"run {i}: {sorted(set(contents(out).items()) ^ set(wanted.items()))[:4]}")
                shutil.rmtree(out)
                client.wait_for_workers(2)
                note(counts, faults)
    return {"counts": dict(counts), "undisturbed_seconds": round(took, 2), "faults": faults}


@contextlib.contextmanager
def _cluster(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Two worker processes, each with a nanny that starts another in place of a lost one; forked, to be there soon."""
    import dask
    from distributed import Client, LocalCluster
    from distributed.utils import get_mp_context

    with (
        dask.config.set(_CONFIG),
        _preloading(get_mp_context),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit="2GiB",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            local_directory=str(folder),
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield cluster, client


@contextlib.contextmanager
def _preloading(context: Callable[[], Any]) -> Iterator[None]:
    """Has the process that workers are forked from import what they need."""
    context().set_forkserver_preload(["distributed", *WARM])
    yield


def _run_on(client: Any, recipe: Path, out: Path, killer: "_Killer | None") -> float:
    """Seconds of a run up to the export on these workers, into a new folder."""
    from quadmix_plugin.config import load_recipe
    from quadmix_plugin.executors import DaskExecutor
    from quadmix_plugin.pipelines.context import open_run
    from quadmix_plugin.pipelines.run import run_steps

    shutil.rmtree(out, ignore_errors=True)
    with open_run(load_recipe(recipe), out, make_executor=lambda: DaskExecutor(client=client)) as run:
        started = time.monotonic()
        with killer or contextlib.nullcontext():
            run_steps(run, SHORT)
        return time.monotonic() - started


class _Killer(threading.Thread):
    """After ``delay`` seconds waits for a worker that has work, and kills it; ends with the block."""

    def __init__(self, cluster: Any, delay: float, generator: random.Random):
        super().__init__(daemon=True)
        self.cluster, self.delay, self.generator = cluster, delay, generator
        self.ended = threading.Event()
        self.killed = self.was_busy = False

    def run(self) -> None:
        if self.ended.wait(self.delay):
            return
        while not self.ended.wait(0.001):
            workers = list(self.cluster.scheduler.workers.values())
            busy = [worker for worker in workers if worker.processing]
            if busy:
                worker = self.generator.choice(busy)
                self._kill(worker)
                return

    def _kill(self, worker: Any) -> None:
        for nanny in self.cluster.workers.values():
            if nanny.worker_address == worker.address and nanny.process is not None:
                os.kill(nanny.process.process.pid, signal.SIGKILL)
                self.killed, self.was_busy = True, bool(worker.processing)

    def __enter__(self) -> "_Killer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


# --- documents that kill


POISON = """
import os, signal, time
from dataclasses import dataclass
import numpy as np

@dataclass
class Poison:
    how: str = "kill"
    higher_is_better = True
    uses_gpu = False
    def setup(self, device): ...
    def score(self, texts):
        held = []
        for text in texts:
            if "POISON" in text and self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while "POISON" in text and len(held) < 200:
                held.append(np.ones(1 << 22))
                time.sleep(0.02)
        return np.zeros(len(texts), dtype=np.float32)
"""


def poison(number: int, seed: int, how: str = "kill") -> dict[str, Any]:
    """Runs over a corpus with one document that kills every worker, by signal or by taking all memory."""
    counts: Counter[str] = Counter()
    faults: list[str] = []
    generator, longest = random.Random(seed), 0.0  # noqa: S311
    with scratch() as folder:
        path = _installed(folder / "site")
        for i in range(number):
            place, at = folder / str(i), generator.randrange(160)
            section = {"p": {"scorer": "poison", "how": how}}
            limit = {"memory_limit": "1200MiB"} if how == "memory" else {}
            recipe = write_tiny_recipe(place, scorers=section, executor={"name": "dask", "workers": 2, **limit})
            shard = _poisoned(place, at)
            started = time.monotonic()
            ended = subprocess.run(
                quadmix_command(recipe, place / "out", "label"),
                capture_output=True,
                text=True,
                timeout=1800,
                check=False,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])},
            )
            longest = max(longest, time.monotonic() - started)
            counts["runs"] += 1
            counts[f"exit code {ended.returncode}"] += 1
            said = " ".join(ended.stderr.split())
            if re.search(rf"error: stage 'quality_score_p', shard {shard}: the worker process was lost", said):
                counts["stage and shard named"] += 1
            else:
                faults.append(f"document {at}, shard {shard}: {said[-800:]}")
            if "Traceback" in ended.stderr:
                faults.append(f"document {at}: traceback: {ended.stderr[-1500:]}")
            counts["corrupt"] += bool(is_whole(place / "out"))
            note(counts, faults)
            counts["other shards done"] += len(list((place / "out" / "labels").glob("*.parquet")))
    return {"counts": dict(counts), "longest_s": round(longest, 1), "faults": faults}


def _installed(site: Path) -> Path:
    """A folder for PYTHONPATH in which the scorer is installed."""
    info = site / "poison-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "poison.py").write_text(POISON, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: poison\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[quadmix_plugin.scorers]\npoison = poison:Poison\n", encoding="utf-8")
    return site


def _poisoned(place: Path, at: int) -> str:
    """Writes the word into one document; the beginning of its shard's name and the end."""
    path = place / "corpus" / f"{at // 80}.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[at % 80]["text"] += " POISON"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return rf"{at // 80}-[0-9a-f]+-{at % 80 // 40:05d}"
