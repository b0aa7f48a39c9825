"""Two Dask workers against one in steps that compute: wall time, and the seconds of cores that the workers took.

A part of benchmarks/scaling.py. Both clusters are up, set up and warm before anything is timed, and are timed in turn.
A machine that others use as well gives less than two cores; ``cores_had`` says how many the two workers got.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch, Task
from simulated_job import SUMMARY, CountShard, MakeShard
from soak import QUICKSTART
from synthetic import DOMAINS, SCORERS

from quadmix_plugin.executors import DaskExecutor
from quadmix_plugin.parameters import sample_parameters
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.schema import COPIES, DOC_ID, TEXT, TOKENS, normalised_column
from quadmix_plugin.stages import ExportTokens, FitRank, QualityScore, SelectDocuments
from quadmix_plugin.stages.shards import shard_tasks
from quadmix_plugin.store import RunDirectory

ROWS = 250_000
_WARM = 4  # shards
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"}  # else a single worker's tokenizer takes both cores


@dataclass
class ReadText(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Documents of the quickstart corpus; ``per_shard`` of them, from a place that the shard's number gives."""

    per_shard: int
    name: str = "read_text"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def inputs(self) -> tuple[list[str], list[str]]:
        """A shard's name."""
        return ["data"], ["shard"]

    def outputs(self) -> tuple[list[str], list[str]]:
        """Id and text, and a copy of each."""
        return ["data"], [DOC_ID, TEXT, COPIES]

    def setup(self, worker_metadata: Any = None) -> None:
        """Reads the corpus."""
        table = pq.read_table(QUICKSTART / "corpus.parquet", columns=["doc_id", "text"])
        self._table = table.append_column(COPIES, pa.array([1] * len(table), pa.int32())).rename_columns(
            [DOC_ID, TEXT, COPIES]
        )

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The shard's rows."""
        number = int(str(task._metadata["shard"]).removeprefix("shard-"))
        start = number * self.per_shard % (self._table.num_rows - self.per_shard)
        facts = {"shard": task._metadata["shard"], "rows_in": self.per_shard, "dropped": {}}
        data = self._table.slice(start, self.per_shard)
        return DocumentBatch(
            dataset_name=task.dataset_name, data=data, _metadata=facts, _stage_perf=list(task._stage_perf)
        )


class Job:
    """A pipeline over so many shards, timed on either cluster."""

    def __init__(self, name: str, shards: int, documents: int) -> None:
        self.name, self.shards, self.documents = name, shards, documents

    def stages(self, folder: Path, run: int) -> list[ProcessingStage]:
        """The stages; ``run`` is another number each time, so that nothing is there already."""
        if self.name == "label":
            ask = QualityScore(
                scorer="ask-llm", options={"model": str(QUICKSTART / "models" / "ask-llm")}, device="cpu"
            )
            return [ReadText(self.documents), ask, CountShard()]
        if self.name == "select":
            return [MakeShard(self.documents, [DOC_ID, *_READ]), _select(), CountShard()]
        step = RunDirectory.open(folder / f"run-{run}").step("export", "0")
        tokenizer = str(QUICKSTART / "models" / "tokenizer")
        return [ReadText(self.documents), ExportTokens(step, tokenizer, folder="tokens", copies_field=COPIES)]

    def tasks(self, number: int) -> list[Task]:
        """The shards."""
        return shard_tasks([f"shard-{i:06d}" for i in range(number)])


_READ = ["domain", TOKENS, *(normalised_column(scorer) for scorer in SCORERS)]
JOBS = {
    "label": Job("label", 40, 120),
    "select": Job("select", 200, ROWS),
    "export": Job("export", 20, 1000),
}


def _select() -> SelectDocuments:
    theta = sample_parameters(1, len(SCORERS), len(DOMAINS), 0, domains=DOMAINS, scorers=SCORERS)[0]
    batch = MakeShard(ROWS, _READ).process(shard_tasks(["shard-000000"])[0])  # type: ignore[arg-type]
    state = FitRank(theta=theta, summary=SUMMARY).process(batch).to_pyarrow()
    return SelectDocuments(theta=theta, rank_map=RankMap.of_states(iter([state])), seed=0)


class _Cluster:
    """An executor with the processor time of its workers."""

    def __init__(self, executor: DaskExecutor) -> None:
        self.executor, self._workers = executor, []

    def start(self, stages: Sequence[ProcessingStage], tasks: list[Task]) -> None:
        before = set(psutil.Process().children(recursive=True))
        self._time(stages, tasks)
        self._workers = self._workers or [p for p in psutil.Process().children(recursive=True) if p not in before]

    def _time(self, stages: Sequence[ProcessingStage], tasks: list[Task]) -> float:
        started = time.monotonic()
        Pipeline("timed", stages=list(stages)).run(self.executor, initial_tasks=tasks)
        return time.monotonic() - started

    def timed(self, stages: Sequence[ProcessingStage], tasks: list[Task]) -> tuple[float, float]:
        """Seconds on the wall, and of cores in the workers."""
        core = self._core()
        wall = self._time(stages, tasks)
        return wall, self._core() - core

    def _core(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._workers)


@contextlib.contextmanager
def _clusters() -> Iterator[dict[int, _Cluster]]:
    with contextlib.ExitStack() as stack:
        made = {}
        for n in (1, 2):
            made[n] = _Cluster(stack.enter_context(DaskExecutor(n_workers=n, worker_env=_ONE_THREAD)))
        yield made


def compare(names: Sequence[str], repeats: int) -> Iterator[dict[str, Any]]:
    """Of every job the medians of one and two workers, taken in turn, and their ratio."""
    with tempfile.TemporaryDirectory() as scratch, _clusters() as clusters:
        run = 0
        for name in names:
            job, found = JOBS[name], {n: [] for n in clusters}
            for n, cluster in clusters.items():
                cluster.start(job.stages(Path(scratch), -n - 10 * len(found)), job.tasks(_WARM * n))
            for _ in range(repeats):
                for n, cluster in clusters.items():
                    run += 1
                    found[n].append(cluster.timed(job.stages(Path(scratch), run), job.tasks(job.shards)))
            wall = {n: median(each[0] for each in found[n]) for n in found}
            core = {n: median(each[1] for each in found[n]) for n in found}
            had = {n: median(each[1] / each[0] for each in found[n]) for n in found}
            yield {
                "job": name,
                "shards": job.shards,
                "documents": job.shards * job.documents,
                "repeats": repeats,
                "wall_s": {n: round(seconds, 2) for n, seconds in wall.items()},
                "worker_core_s": {n: round(seconds, 2) for n, seconds in core.items()},
                "cores_had": {n: round(cores, 2) for n, cores in had.items()},
                "ratio_of_wall": round(wall[1] / wall[2], 2),
                "ratio_of_rate_per_core": round(core[1] / core[2], 2),
            }
