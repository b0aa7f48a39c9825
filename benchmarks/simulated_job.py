"""A job of any number of shards and documents whose columns are made where they are used: no text, no files.

A part of benchmarks/scaling.py. ``MakeShard`` stands for reading: each worker draws 8 tables once, and shard i is table
i mod 8 with ids of its own. All else is real: the Dask executor over a scheduler and two workers that are processes of
their own, the stages of normalise and select, and their merged states. Not simulated: files, manifests, text, models.
"""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch, Task
from synthetic import DOMAINS, SCORERS, chunks

from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.executors import DaskExecutor
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.parameters import Parameters, sample_parameters
from quadmix_plugin.pipelines.rank import FitRankMap
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.schema import DOC_ID, DOMAIN, TOKENS, normalised_column, score_column
from quadmix_plugin.score_sketch import ScoreSketch
from quadmix_plugin.stages import FitNormaliser, SelectDocuments
from quadmix_plugin.stages.shards import shard_tasks

TABLES = 8
PASSES = ("sigma", "rank", "select")
ROWS_PER_STATE = {"sigma": 250_000, "rank": 2_000_000}  # as pipelines.normalise and pipelines.select have them
ROWS_PER_PASS = 4_000_000
STATES_AT_ONCE = 16
_NONE, _RANGE = np.zeros(len(DOMAINS), dtype=np.int64), np.zeros((len(DOMAINS), len(SCORERS)), dtype=np.float32)
SUMMARY = DomainSummary(DOMAINS, SCORERS, _NONE, _NONE, _RANGE, _RANGE + 1)
DIRECTIONS = dict.fromkeys(SCORERS, True)


@lru_cache(maxsize=TABLES)
def _table(seed: int, rows: int) -> pa.Table:
    part = next(chunks(rows, seed)) if rows <= 1 << 20 else None
    if part is None:
        raise ValueError(f"rows={rows}: at most {1 << 20} in a shard")
    domain = pa.DictionaryArray.from_arrays(part.domain_ids.astype(np.int32), pa.array(DOMAINS)).cast(pa.string())
    columns: dict[str, Any] = {DOMAIN: domain, TOKENS: part.tokens}
    for n, scorer in enumerate(SCORERS):
        columns[score_column(scorer)] = columns[normalised_column(scorer)] = part.normalised[:, n]
    return pa.table(columns)


@dataclass
class MakeShard(ProcessingStage[DocumentBatch, DocumentBatch]):
    """In place of ``ReadShards``: ``rows`` documents of the shard, with distinct ids."""

    rows: int
    columns: list[str]
    name: str = "make_shard"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """A shard's name."""
        return ["data"], ["shard"]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The columns asked for."""
        return ["data"], list(self.columns)

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The shard's rows."""
        number = int(str(task._metadata["shard"]).removeprefix("shard-"))
        table = _table(number % TABLES, self.rows)
        ids = pa.array(np.arange(number * self.rows, (number + 1) * self.rows, dtype=np.int64))
        table = table.append_column(DOC_ID, ids).select(self.columns)
        facts = {"shard": task._metadata["shard"], "rows_in": self.rows, "dropped": {}}
        return DocumentBatch(
            dataset_name=task.dataset_name, data=table, _metadata=facts, _stage_perf=list(task._stage_perf)
        )


@dataclass
class CountShard(ProcessingStage[DocumentBatch, DocumentBatch]):
    """In place of ``WriteShards``: passes on what that passes on, the shard's name and counts."""

    name: str = "count_shard"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Anything."""
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """The shard's name and counts."""
        return ["data"], ["shard", "rows_in", "rows_kept"]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Counts one shard."""
        table = task.to_pyarrow()
        counts = {"shard": [task._metadata["shard"]], "rows_in": [task._metadata["rows_in"]], "rows_kept": [len(table)]}
        return DocumentBatch(
            dataset_name=task.dataset_name, data=pa.table(counts), _metadata=task._metadata,
            _stage_perf=list(task._stage_perf),
        )  # fmt: skip


class MostTasks(SchedulerPlugin):
    """Remembers how many tasks the scheduler has held at once."""

    name = "most-tasks"

    def __init__(self) -> None:
        self.most = 0

    def start(self, scheduler: Any) -> None:
        """Keeps the scheduler."""
        self.scheduler = scheduler

    def transition(self, *_: Any, **__: Any) -> None:
        """Looks at every change of a task."""
        self.most = max(self.most, len(self.scheduler.tasks))


def traffic() -> tuple[int, int]:
    """Bytes that this process' open TCP connections have sent and received, as the kernel counts them."""
    sent = received = 0
    for connection in psutil.Process().net_connections("tcp"):
        if connection.fd < 0 or connection.status != psutil.CONN_ESTABLISHED:
            continue
        with socket.socket(fileno=os.dup(connection.fd)) as twin:
            facts = twin.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
        acknowledged, arrived = struct.unpack_from("=QQ", facts, 120)  # tcpi_bytes_acked, tcpi_bytes_received
        sent, received = sent + acknowledged, received + arrived
    return sent, received


def memory() -> dict[str, int]:
    """Resident bytes of this process: now, and at their peak since it was started or ``reset``."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "VmRSS"))}
    return {"now": found["VmRSS"], "peak": found["VmHWM"], "traffic": sum(traffic())}


def reset() -> None:
    """Forgets the peak of this process."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def seen(dask_scheduler: Any) -> dict[str, Any]:
    """What the scheduler says of itself."""
    (sent, received), most = traffic(), dask_scheduler.plugins["most-tasks"].most
    return {**memory(), "most_tasks": most, "core_s": time.process_time(), "sent": sent, "received": received}


@contextlib.contextmanager
def dask_processes(folder: Path, workers: int) -> Iterator[Path]:
    """A scheduler and workers on loopback, a process each; gives the scheduler's file."""
    file = folder / "scheduler.json"
    where = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(file)]
    worker = ["--nthreads", "1", "--no-nanny", "--memory-limit", "4GiB", "--local-directory", str(folder)]
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    processes = []
    try:
        for command in [["dask_scheduler", "--port", "0"], *[["dask_worker", *worker]] * workers]:
            arguments = [sys.executable, "-m", f"distributed.cli.{command[0]}", *command[1:], *where]
            quiet = subprocess.DEVNULL
            process = subprocess.Popen(arguments, env=environment, stdout=quiet, stderr=quiet)  # noqa: S603
            processes.append(process)
            while not file.exists():
                time.sleep(0.1)
        yield file
    finally:
        for process in reversed(processes):  # a worker does not end well without its scheduler
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def connected() -> Iterator[Client]:
    """A client of a scheduler and two workers, all processes of their own."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        dask_processes(Path(scratch), 2) as file,
        Client(scheduler_file=str(file), set_as_default=False) as client,
    ):
        client.wait_for_workers(2, timeout=300)
        client.register_plugin(MostTasks())
        yield client


def run_cell(shards: int, rows: int, passes: Sequence[str]) -> dict[str, Any]:
    """One job in a process that was made for it: what driver, scheduler and workers held and sent."""
    with connected() as client:
        executor = DaskExecutor(client=client)
        _work(executor, 4, 1000, passes)  # imports and compilation
        before, there = memory(), client.run_on_scheduler(seen)
        reset()
        client.run_on_scheduler(reset)
        started, core = time.monotonic(), time.process_time()
        made = _work(executor, shards, rows, passes)
        wall, core = time.monotonic() - started, time.process_time() - core
        after, scheduler = memory(), client.run_on_scheduler(seen)
        sent, received = traffic()
        workers = list(client.run(memory).values())
    first = before["traffic"], there["traffic"]
    return {
        "shards": shards,
        "documents": shards * rows,
        "passes": list(passes),
        "wall_s": round(wall, 1),
        "driver_core_s": round(core, 1),
        "scheduler_core_s": round(scheduler["core_s"] - there["core_s"], 1),
        "driver_peak_mib": round(after["peak"] / 2**20, 1),
        "driver_growth_mib": round((after["peak"] - before["now"]) / 2**20, 1),
        "scheduler_peak_mib": round(scheduler["peak"] / 2**20, 1),
        "scheduler_growth_mib": round((scheduler["peak"] - there["now"]) / 2**20, 1),
        "worker_peak_mib": round(max(worker["peak"] for worker in workers) / 2**20, 1),
        "most_tasks_held": scheduler["most_tasks"],
        "driver_mib_on_the_wire": round((sent + received - first[0]) / 2**20, 2),
        "scheduler_mib_on_the_wire": round((scheduler["sent"] + scheduler["received"] - first[1]) / 2**20, 2),
        "workers_mib_on_the_wire": round(sum(worker["traffic"] for worker in workers) / 2**20, 1),
        **made,
    }


def _work(executor: DaskExecutor, shards: int, rows: int, passes: Sequence[str]) -> dict[str, Any]:
    """The passes of normalise and select over the job; sizes of what they leave on the driver."""
    tasks = shard_tasks([f"shard-{i:06d}" for i in range(shards)])
    theta = sample_parameters(1, len(SCORERS), len(DOMAINS), 0, domains=DOMAINS, scorers=SCORERS)[0]
    made: dict[str, Any] = {"seconds": {}}
    ranks: RankMap | None = None
    for name in passes:
        started = time.monotonic()
        if name == "sigma":
            sketch = _sketch(executor, tasks, rows)
            Normaliser.fit(sketch, DIRECTIONS, "ecdf")
            made["sigma_state_bytes"] = sketch.to_table().nbytes
        elif name == "rank":
            histogram = _fit(theta, rows, shards).histogram(executor, tasks)
            ranks = RankMap.of_histogram(histogram, "paper")
            made["rank_state_bytes"] = histogram.to_table().nbytes
            made["documents_counted"] = int(histogram.totals.documents.sum())
        elif ranks is not None:
            made |= _select(executor, tasks, rows, theta, ranks)
        made["seconds"][name] = round(time.monotonic() - started, 1)
    return made


def _sketch(executor: DaskExecutor, tasks: list[Task], rows: int) -> ScoreSketch:
    columns = [DOC_ID, DOMAIN, TOKENS, *map(score_column, SCORERS)]
    per_state, per_pass = max(1, ROWS_PER_STATE["sigma"] // rows), max(1, ROWS_PER_PASS // rows)
    stages = [MakeShard(rows, columns), FitNormaliser(scorers=list(SCORERS), batch_size=min(per_state, len(tasks)))]
    held: list[ScoreSketch] = []
    for i in range(0, len(tasks), per_pass):
        states = Pipeline("sigma", stages=stages).run(executor, initial_tasks=tasks[i : i + per_pass]) or []
        held = [ScoreSketch.merge([*held, *(ScoreSketch.from_table(state.to_pyarrow()) for state in states)])]
    return held[0]


def _fit(theta: Parameters, rows: int, shards: int) -> FitRankMap:
    per_state = max(1, min(ROWS_PER_STATE["rank"] // rows, shards // STATES_AT_ONCE))
    read = MakeShard(rows, [DOMAIN, TOKENS, *map(normalised_column, SCORERS)])
    return FitRankMap(
        read=[read],
        theta=theta,
        summary=SUMMARY,
        batches_per_state=per_state,
        tasks_per_pass=max(64, STATES_AT_ONCE * per_state),
    )


def _select(executor: DaskExecutor, tasks: list[Task], rows: int, theta: Parameters, ranks: RankMap) -> dict[str, Any]:
    read = MakeShard(rows, [DOC_ID, DOMAIN, TOKENS, *map(normalised_column, SCORERS)])
    stages = [read, SelectDocuments(theta=theta, rank_map=ranks, seed=0), CountShard()]
    results = Pipeline("select", stages=stages).run(executor, initial_tasks=tasks) or []
    kept = sum(result.to_pyarrow()["rows_kept"][0].as_py() for result in results)
    return {"selected": kept}


def units_per_second(shards: int, stages: int) -> dict[str, Any]:
    """How many calls of stages that do nothing two workers get through: the ceiling that the driver sets."""
    with connected() as client:
        executor = DaskExecutor(client=client)
        line = [PassOn(name=f"pass-{i}") for i in range(stages)]
        for n in (10, shards):
            before = client.run_on_scheduler(seen)["core_s"]
            started, core = time.monotonic(), time.process_time()
            Pipeline("empty", stages=line).run(executor, initial_tasks=shard_tasks([f"{i}" for i in range(n)]))
            wall, core = time.monotonic() - started, time.process_time() - core
        scheduler = client.run_on_scheduler(seen)
    units, both = shards * stages, core + scheduler["core_s"] - before
    return {
        "shards": shards, "stages": stages, "units": units, "wall_s": round(wall, 2), "driver_core_s": round(core, 2),
        "scheduler_core_s": round(both - core, 2), "units_per_s": round(units / wall, 1),
        "units_per_core_s_of_both": round(units / both, 1), "most_tasks_held": scheduler["most_tasks"],
    }  # fmt: skip


@dataclass
class PassOn(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Hands its task on."""

    name: str = "pass_on"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """Anything."""
        return ["data"], []

    def outputs(self) -> tuple[list[str], list[str]]:
        """Nothing new."""
        return ["data"], []

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The same task."""
        return task
