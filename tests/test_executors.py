"""Every executor gives the rows and task ids of one process; faults are survived or named; nothing is left behind."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path

import pandas as pd
import psutil
import pytest
from dask.system import CPU_COUNT
from distributed import Nanny
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.stages.text.io.reader import ParquetReader
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.errors import InputError, QuadmixError, RecipeError
from quadmix_plugin.executors import DaskExecutor, InlineExecutor, make_executor

Batch = DocumentBatch


def _like(task: Batch, data: pd.DataFrame, **metadata) -> Batch:
    return Batch(
        dataset_name=task.dataset_name,
        data=data,
        _metadata={**task._metadata, **metadata},
        _stage_perf=list(task._stage_perf),
    )


def _note(path: str, line: str) -> None:
    with open(path, "a") as file:  # a short O_APPEND write is atomic
        file.write(line + "\n")


def _notes(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _first_id(task: Batch) -> int:
    return int(task.to_pandas()["doc_id"].iloc[0])


@dataclass
class Halve(ProcessingStage[Batch, Batch]):
    """Fan-out: two tasks of one; the earliest documents take longest, so tasks finish out of order."""

    name: str = "halve"

    def process(self, task: Batch) -> list[Batch]:
        sum(range(4_000_000 if _first_id(task) == 0 else 1000))
        data = task.to_pandas()
        middle = len(data) // 2
        return [_like(task, data[:middle]), _like(task, data[middle:])]


@dataclass
class KeepEven(ProcessingStage[Batch, Batch]):
    """Filter: drops every second task of those that ``Halve`` made."""

    name: str = "keep_even"

    def process(self, task: Batch) -> Batch | None:
        return task if _first_id(task) // 5 % 3 else None


@dataclass
class Together(ProcessingStage[Batch, Batch]):
    """Writes into each task which tasks shared its batch."""

    name: str = "together"
    batch_size: int = 4

    def process(self, task: Batch) -> Batch:
        raise NotImplementedError

    def process_batch(self, tasks: list[Batch]) -> list[Batch]:
        ids = " ".join(task.task_id for task in tasks)
        return [_like(task, task.to_pandas().assign(batch=ids)) for task in tasks]


@dataclass
class Touch(ProcessingStage[Batch, Batch]):
    """Passes tasks on; notes its set-up, its calls and its end."""

    log: str = ""
    name: str = "touch"

    def setup_on_node(self, node_info=None, worker_metadata=None) -> None:
        _note(self.log, f"node {node_info.node_id}")

    def setup(self, worker_metadata=None) -> None:
        _note(self.log, f"setup {os.getpid()}")

    def process(self, task: Batch) -> Batch:
        _note(self.log, f"call {os.getpid()} {_first_id(task)}")
        return task

    def teardown(self) -> None:
        _note(self.log, f"teardown {os.getpid()}")


class OddError(InputError):
    """Cannot be unpickled: its arguments are not its message."""

    exit_code = 7

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


@dataclass
class Fail(ProcessingStage[Batch, Batch]):
    """Fails on the task that starts with document ``at``, in one of several ways."""

    at: int = 20
    how: str = ""
    marker: str = ""
    name: str = "fail"

    def process(self, task: Batch) -> Batch:
        if _first_id(task) != self.at:
            return task
        if self.how == "exit":
            os._exit(9)
        if self.how == "exit once":
            try:
                os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return task
            os._exit(9)
        raise {
            "own": InputError("part-2: no text"),
            "odd": OddError("part-2", "no text"),
            "other": ValueError("boom"),
        }[self.how]


@dataclass
class Shard(ProcessingStage[Batch, Batch]):
    """Names the shard as our own readers do."""

    name: str = "shard"

    def process(self, task: Batch) -> Batch:
        return _like(task, task.to_pandas(), shard=f"part-{_first_id(task) // 10}")


@dataclass
class Environment(ProcessingStage[Batch, Batch]):
    """Returns environment variables of its process, and its id."""

    names: tuple[str, ...] = ()
    name: str = "environment"

    def process(self, task: Batch) -> Batch:
        return _like(task, pd.DataFrame([{**{n: os.environ.get(n) for n in self.names}, "pid": os.getpid()}]))


@dataclass
class Listeners(ProcessingStage[Batch, Batch]):
    """Returns where the descendants of a process listen."""

    pid: int = 0
    name: str = "listeners"

    def process(self, task: Batch) -> Batch:
        processes = psutil.Process(self.pid).children(recursive=True)
        return _like(task, pd.DataFrame({"ip": [ip for process in processes for ip in _listeners(process)]}))


@dataclass
class Payload:
    """Notes every process that unpickles it."""

    log: str
    bulk: bytes = field(default=b"", repr=False)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _note(self.log, str(os.getpid()))


@dataclass
class Load(ProcessingStage[Batch, Batch]):
    log: str = ""
    name: str = "load"

    def process(self, task: Batch) -> Batch:
        _note(self.log, f"made {os.getpid()}")
        return _like(task, task.to_pandas(), payload=Payload(self.log, bytes(100_000)))


@dataclass
class Unload(ProcessingStage[Batch, Batch]):
    log: str = ""
    name: str = "unload"

    def process(self, task: Batch) -> Batch:
        sum(range(200_000))
        _note(self.log, f"used {os.getpid()}")
        return Batch(dataset_name="", data=pd.DataFrame({"bytes": [len(task._metadata["payload"].bulk)]}))


@dataclass
class Wait(ProcessingStage[Batch, Batch]):
    """The task that starts with document 0 waits until a later stage has had another task."""

    pipe: str = ""
    name: str = "wait"

    def process(self, task: Batch) -> Batch:
        if _first_id(task) == 0:
            descriptor = os.open(self.pipe, os.O_RDWR)
            if not select.select([descriptor], [], [], 20)[0]:
                raise TimeoutError("no other task reached the next stage")
        return task


@dataclass
class Signal(ProcessingStage[Batch, Batch]):
    pipe: str = ""
    name: str = "signal"

    def process(self, task: Batch) -> Batch:
        descriptor = os.open(self.pipe, os.O_RDWR)
        os.write(descriptor, b"x")
        return task


@pytest.fixture
def corpus(tmp_path):
    return _write_corpus(tmp_path / "corpus", files=9)


def _write_corpus(folder: Path, files: int) -> str:
    folder.mkdir()
    for i in range(files):
        ids = range(10 * i, 10 * i + 10)
        pd.DataFrame({"doc_id": ids, "text": [f"document {j}" for j in ids]}).to_parquet(folder / f"{i:02d}.parquet")
    return str(folder)


def _run(executor, corpus: str, *stages) -> list[Batch]:
    reader = ParquetReader(file_paths=corpus, files_per_partition=1)
    return Pipeline(name="test", stages=[reader, *stages]).run(executor=executor)


def _content(tasks: list[Batch]) -> list[tuple]:
    return [
        (task.task_id, task.to_pandas().to_dict("list"), [perf.stage_name for perf in task._stage_perf])
        for task in tasks
    ]


def test_dask_gives_the_tasks_of_one_process_in_its_order(corpus, dask_executor):
    stages = [Halve(), KeepEven(), Together(), Shard(), Together(name="again", batch_size=3)]
    inline = _content(_run(InlineExecutor(), corpus, *stages))
    assert 6 < len(inline) < 18
    assert len({row[0] for row in inline}) == len(inline)
    assert _content(_run(dask_executor, corpus, *stages)) == inline


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ray_data", "xenna"])
def test_ray_gives_the_rows_of_one_process_on_loopback(corpus, name, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # Ray's workers import the stages
    stages = [Halve(), KeepEven(), Shard()]
    executor = make_executor(name, {"num_cpus": 4 if name == "xenna" else 2})
    inline, ray = (_content(_run(ex, corpus, *stages)) for ex in (InlineExecutor(), executor))
    assert sorted(row[:2] for row in ray) == sorted(row[:2] for row in inline)
    (seen,) = _run(executor, _write_corpus(tmp_path / "one", files=1), Listeners(pid=os.getpid()))
    assert {ip.removeprefix("::ffff:") for ip in seen.to_pandas()["ip"]} == {"127.0.0.1"}


@pytest.mark.parametrize("where", ["inline", "dask"])
def test_given_tasks_come_back_in_their_order_and_none_is_nothing(where, dask_executor):
    executor = InlineExecutor() if where == "inline" else dask_executor
    tasks = [Batch(dataset_name="d", data=pd.DataFrame({"doc_id": [i]})) for i in (7, 0, 9, 3, 5)]
    done = Pipeline(name="p", stages=[Halve()]).run(executor=executor, initial_tasks=tasks)
    assert [len(task.data) for task in done] == [0, 1] * 5
    assert [_first_id(task) for task in done[1::2]] == [7, 0, 9, 3, 5]
    assert Pipeline(name="p", stages=[KeepEven()]).run(executor=executor, initial_tasks=tasks[1:2]) == []
    assert executor.execute([KeepEven()], []) == []


@pytest.mark.parametrize("where", ["inline", "dask"])
def test_an_error_of_ours_arrives_as_it_is_and_any_other_names_stage_and_shard(where, corpus, dask_executor):
    executor = InlineExecutor() if where == "inline" else dask_executor
    with pytest.raises(InputError, match=r"^part-2: no text$"):
        _run(executor, corpus, Shard(), Fail(how="own"))
    with pytest.raises(QuadmixError, match=r"^stage 'fail', shard part-2: ValueError: boom$") as caught:
        _run(executor, corpus, Shard(), Fail(how="other"))
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(QuadmixError, match=r"^part-2: no text$") as caught:
        _run(executor, corpus, Shard(), Fail(how="odd"))
    assert caught.value.exit_code == 7


def test_a_lost_worker_costs_nothing_but_time(corpus, dask_executor, tmp_path):
    stages = [Halve(), Shard(), Fail(how="exit once", marker=str(tmp_path / "marker")), Together()]
    tasks = _content(_run(dask_executor, corpus, *stages))
    assert (tmp_path / "marker").exists()
    assert tasks == _content(_run(InlineExecutor(), corpus, *stages))


def test_a_shard_that_kills_its_workers_is_named_and_the_executor_goes_on(corpus):
    names = ("OMP_NUM_THREADS", "QUADMIX_TEST")
    before = {name: os.environ.get(name) for name in names}
    resource_tracker.ensure_running()  # Python's own, which stays
    children = set(psutil.Process().children(recursive=True))
    with DaskExecutor(n_workers=2, lost_worker_retries=0, worker_env={"QUADMIX_TEST": 1}) as executor:
        with pytest.raises(QuadmixError, match=r"^stage 'fail', shard part-2: the worker process was lost 2 times"):
            _run(executor, corpus, Shard(), Fail(how="exit"))
        rows = [task.data.iloc[0] for task in _run(executor, corpus, Environment(names))]
        assert {(row["OMP_NUM_THREADS"], row["QUADMIX_TEST"]) for row in rows} == {("1", "1")}
        assert os.getpid() not in {row["pid"] for row in rows}
        ours = set(psutil.Process().children(recursive=True)) - children
        addresses = {address for process in (psutil.Process(), *ours) for address in _listeners(process)}
        assert ours
        assert addresses == {"127.0.0.1"}
    assert psutil.wait_procs(ours, timeout=10)[1] == []
    assert {name: os.environ.get(name) for name in names} == before


@pytest.mark.parametrize("given", [{}, {"RAYON_NUM_THREADS": "7"}])
def test_one_worker_has_the_tokenizer_threads_of_all_cores(corpus, given, monkeypatch):
    names = ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    for name in names:  # what the user's own environment says goes first
        monkeypatch.delenv(name, raising=False)
    with DaskExecutor(n_workers=1, worker_env=given) as executor:
        [row] = [task.data.iloc[0] for task in _run(executor, corpus, Environment(names))][:1]
    share = {"RAYON_NUM_THREADS": str(CPU_COUNT), "TOKENIZERS_PARALLELISM": "true"} if CPU_COUNT > 1 else {}
    assert {name: row[name] for name in {**share, **given}} == {**share, **given}


def _listeners(process: psutil.Process) -> list[str]:
    connections = process.net_connections(kind="inet")
    return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]


def test_stages_are_set_up_once_per_worker_and_torn_down(corpus, dask_executor, tmp_path):
    log = str(tmp_path / "log")
    _run(dask_executor, corpus, Touch(log=log))
    notes = Counter(line.rsplit(" ", 1)[0] if line.startswith("call") else line for line in _notes(log))
    workers = {note.split()[1] for note in notes if note.startswith("call")}
    expected = Counter(["node 127.0.0.1", *(f"{what} {pid}" for pid in workers for what in ("setup", "teardown"))])
    assert {note: n for note, n in notes.items() if not note.startswith("call")} == expected
    assert str(os.getpid()) not in workers


def test_payloads_stay_on_the_workers_and_few_are_alive_at_a_time(tmp_path, dask_executor):
    corpus, log = _write_corpus(tmp_path / "many", files=40), str(tmp_path / "log")
    done = _run(dask_executor, corpus, Load(log=log), Unload(log=log))
    assert [task.data["bytes"].tolist() for task in done] == [[100_000]] * 40
    notes = _notes(log)
    assert str(os.getpid()) not in notes
    alive = peak = 0
    for note in notes:
        alive += note.startswith("made") - note.startswith("used")
        peak = max(peak, alive)
    assert peak <= 8  # two workers, a window of four


def test_a_task_goes_on_while_another_is_still_in_the_stage_before(corpus, dask_executor, tmp_path):
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    assert len(_run(dask_executor, corpus, Wait(pipe=pipe), Signal(pipe=pipe))) == 9


@pytest.mark.parametrize("where", ["inline", "dask"])
def test_progress_counts_every_task_of_every_stage(where, corpus, dask_executor):
    executor, events = InlineExecutor() if where == "inline" else dask_executor, []
    executor.on_progress = lambda *event: events.append(event)
    _run(executor, corpus, Halve(), KeepEven())
    last = {name: (done, total) for name, done, total in events}
    counts = {"file_partitioning": 1, "parquet_reader": 9, "halve": 9, "keep_even": 18}
    assert last == {name: (n, n) for name, n in counts.items()}
    assert Counter(name for name, _, _ in events) == counts
    assert all(total is None or done <= total for _, done, total in events)


@pytest.mark.parametrize("name", ["inline", "dask"])
def test_what_cannot_run_is_refused_before_anything_starts(name, corpus, tmp_path):
    log = str(tmp_path / "log")
    executor = make_executor(name)
    gpus = Touch(log=log).with_(resources=Resources(gpus=2000))
    with pytest.raises(QuadmixError, match=r"^stage 'touch': needs 2000 GPU, .*device: cpu"):
        _run(executor, corpus, Touch(log=log), gpus)
    shuffle = Touch(log=log).with_(name="shuffle", ray_stage_spec={"is_shuffle_stage": True})
    with pytest.raises(QuadmixError, match=r"^stage 'shuffle' \(Touch\): needs Curator's Ray actors"):
        _run(executor, corpus, Touch(log=log), shuffle)
    reader = ParquetReader(file_paths=corpus, _generate_ids=True)
    with pytest.raises(QuadmixError, match=r"^stage 'parquet_reader'.*_generate_ids"):
        Pipeline(name="p", stages=[reader]).run(executor=executor)
    assert _notes(log) == []
    assert getattr(executor, "_client", None) is None


def test_the_existing_cluster_is_asked_for_gpus_and_left_open(corpus, dask_client, dask_executor):
    with pytest.raises(QuadmixError, match=r"^stage 'halve': needs 1 GPU, 0 offered"):
        _run(dask_executor, corpus, Halve().with_(resources=Resources(gpus=1)))
    with DaskExecutor(address=dask_client.scheduler.address) as executor:
        assert len(_run(executor, corpus, Halve())) == 18
    assert dask_client.submit(sum, [1, 2]).result() == 3


def test_make_executor_suggests_the_nearest_name():
    with pytest.raises(RecipeError, match=r"^executor: no executor 'dsk'; did you mean 'dask'\?$"):
        make_executor("dsk")
    with pytest.raises(RecipeError, match=r"^executor.n_worker: unknown option of 'dask'; did you mean 'n_workers'\?$"):
        make_executor("dask", {"n_worker": 2})
    with pytest.raises(RecipeError, match=r"n_workers: the workers behind 'address' are there already"):
        make_executor("dask", {"address": "tcp://127.0.0.1:1", "n_workers": 2})


_SCRIPT = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from quadmix_plugin.executors import DaskExecutor
    from test_executors import Hang, Shard, _run

    {guard}
        executor = DaskExecutor(n_workers=1)
        print(len(_run(executor, {corpus!r}, Shard(), *{stages})), flush=True)
"""


@dataclass
class Hang(ProcessingStage[Batch, Batch]):
    """Says which process it is in, and stays there."""

    pipe: str = ""
    name: str = "hang"

    def process(self, task: Batch) -> Batch:
        with open(self.pipe, "w") as file:
            file.write(str(os.getpid()))
        select.select([], [], [], 60)
        return task


def _script(tmp_path: Path, corpus: str, stages: str, guard: str = 'if __name__ == "__main__":') -> subprocess.Popen:
    text = textwrap.dedent(_SCRIPT).format(tests=str(Path(__file__).parent), corpus=corpus, stages=stages, guard=guard)
    path = tmp_path / "script.py"
    path.write_text(text)
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_interrupt_stops_every_process(number, corpus, tmp_path):
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    process = _script(tmp_path, corpus, f"[Hang({pipe!r})]")
    worker = int(Path(pipe).read_text())  # returns when a worker is in the stage
    children = psutil.Process(process.pid).children(recursive=True)
    assert worker in {child.pid for child in children}
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    if number == signal.SIGTERM:
        assert process.returncode == 143
    else:
        assert errors.rstrip().endswith("KeyboardInterrupt")
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_a_script_that_closes_nothing_ends_and_leaves_nothing(corpus, tmp_path):
    process = _script(tmp_path, corpus, "[]")
    out, _ = process.communicate(timeout=50)
    assert (process.returncode, out) == (0, "9\n")
    mine = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert mine == []


def test_workers_that_do_not_end_in_time_are_killed_and_the_work_stands(monkeypatch):
    async def late(*_, **__):
        raise TimeoutError

    before = set(multiprocessing.active_children())
    with DaskExecutor(n_workers=2) as executor:
        executor._connect().wait_for_workers(2)
        workers = set(multiprocessing.active_children()) - before
        assert len(workers) == 2
        monkeypatch.setattr(Nanny, "kill", late)
    assert psutil.wait_procs([psutil.Process(each.pid) for each in workers if each.is_alive()], timeout=10)[1] == []
    assert all(each.is_alive() for each in before)
