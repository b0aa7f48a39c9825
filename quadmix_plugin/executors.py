"""Executors for Curator pipelines: in this process, on Dask, or on Curator's own Ray back ends.

``Pipeline.run(executor=DaskExecutor())`` is all that a script needs. Stages, tasks, task ids and performance
records are Curator's; what is here decides where stages run, refuses what cannot run there before anything starts,
and stops every process that it started. How work flows over a Dask cluster is in ``dask_flow``.
"""

import contextlib
import difflib
import inspect
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Self

from nemo_curator.backends.base import BaseExecutor, NodeInfo, WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import EmptyTask, Task

from quadmix_plugin.dask_flow import Flow, Progress, expected_totals, named_error
from quadmix_plugin.dask_worker import shard_of
from quadmix_plugin.errors import QuadmixError, RecipeError
from quadmix_plugin.ray_executor import RayExecutor
from quadmix_plugin.stage_adapter import StageAdapter

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

# Worker processes are the parallelism, so libraries get one thread each (tokenizers their share of the cores). glibc's
# default thresholds return large arrays to the system after every use: torch trains at little more than half the speed
# then.
_WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 29),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 29),
    "LOGURU_LEVEL": "WARNING",
}
_GUARD = 'put the script under `if __name__ == "__main__":`'
_RAY_ONLY = ("is_raft_actor", "is_lsh_stage", "is_shuffle_stage")
_ID_OPTIONS = ("_generate_ids", "_assign_ids", "generate_ids", "assign_id", "use_id_generator")


def make_executor(name: str, options: Mapping[str, Any] | None = None) -> BaseExecutor:
    """The executor that a recipe names: ``inline``, ``dask``, ``ray_data`` or ``xenna``.

    Raises:
        RecipeError: unknown name or option, with the nearest one.
    """
    makers = {"inline": InlineExecutor, "dask": DaskExecutor, "ray_data": RayExecutor, "xenna": RayExecutor}
    if name not in makers:
        raise RecipeError(f"executor: no executor {name!r}; {_nearest(name, makers)}")
    given = dict(options or {})
    known = [key for key in inspect.signature(makers[name]).parameters if key != "backend"]
    for key in given:
        if key not in known:
            raise RecipeError(f"executor.{key}: unknown option of {name!r}; {_nearest(key, known)}")
    return RayExecutor(name, **given) if makers[name] is RayExecutor else makers[name](**given)


class InlineExecutor(BaseExecutor):
    """Runs a pipeline in this process, task after task; memory holds one task per stage."""

    def __init__(self) -> None:
        super().__init__()
        self.on_progress: Progress | None = None

    def execute(  # pyright: ignore[reportIncompatibleMethodOverride]  Curator annotates None and returns tasks
        self, stages: list[ProcessingStage], initial_tasks: list[Task] | None = None
    ) -> list[Task]:
        """Takes the tasks through all stages; returns the last stage's outputs.

        Raises:
            QuadmixError: the one that a stage raised, or one that names stage and shard; a stage needs Ray, or a
                GPU where there is none.
        """
        tasks = [EmptyTask()] if initial_tasks is None else initial_tasks
        refuse_ray_only(stages, "the inline executor")
        if any(stage.resources.requires_gpu for stage in stages):
            import torch

            _refuse_missing_gpus(stages, torch.cuda.device_count(), "use a machine with a GPU, or device: cpu")
        counts = _Counts(stages, len(tasks), self.on_progress)
        with contextlib.ExitStack() as teardowns:
            stream: Iterable[Task] = tasks
            for i, stage in enumerate(stages):
                stream = _through(stage, i, iter(stream), counts, teardowns)
            return list(stream)


class DaskExecutor(BaseExecutor):
    """Runs a pipeline on Dask: on a cluster of its own on this machine, or on one that is there already.

    Its own cluster listens on loopback only, starts with the first pipeline, serves further ones, and is stopped
    by ``close``, by leaving a ``with`` block, by a failure and by an interrupt. Scripts need
    ``if __name__ == "__main__":``, since workers import the script. A failed stage is not tried again; work of a
    lost worker process is, ``lost_worker_retries`` times.

    Args:
        n_workers: worker processes; one per core by default.
        threads_per_worker: how many different stages one worker may run at a time.
        memory_limit: bytes (or "4GiB") per worker; "auto" shares the machine's memory.
        address: an existing scheduler, for instance "tcp://127.0.0.1:8786".
        client: a connected client; it is left open.
        worker_env: environment of the worker processes, over the defaults.
        worker_resources: what each worker offers, for instance {"GPU": 1}.
        lost_worker_retries: how often a unit of work may lose its worker process.
    """

    def __init__(
        self,
        n_workers: int | None = None,
        threads_per_worker: int = 1,
        memory_limit: str | int | float = "auto",
        address: str | None = None,
        client: "Client | None" = None,
        worker_env: Mapping[str, Any] | None = None,
        worker_resources: Mapping[str, float] | None = None,
        lost_worker_retries: int = 3,
    ) -> None:
        super().__init__()
        existing = "address" if address else "client" if client is not None else ""
        own = {"n_workers": n_workers, "worker_env": worker_env, "worker_resources": worker_resources}
        for key, value in own.items():
            if existing and value is not None:
                raise RecipeError(f"executor.{key}: the workers behind {existing!r} are there already; leave it out")
        if address and client is not None:
            raise RecipeError("executor.address: a client is given too; leave one of them out")
        if (n_workers is not None and n_workers < 1) or threads_per_worker < 1 or lost_worker_retries < 0:
            raise RecipeError("executor: n_workers and threads_per_worker are at least 1, lost_worker_retries 0")
        self.on_progress: Progress | None = None
        self._n_workers, self._threads, self._memory_limit = n_workers, threads_per_worker, memory_limit
        self._address, self._given_client, self._retries = address, client, lost_worker_retries
        self._given_env = {key: str(value) for key, value in (worker_env or {}).items()}
        self._env = {**_WORKER_ENV, **self._given_env}
        self._resources = dict(worker_resources or {})
        self._is_own = not existing
        self._client: Any = client  # Dask annotates its methods for asynchronous clients too
        self._open = contextlib.ExitStack()

    def execute(  # pyright: ignore[reportIncompatibleMethodOverride]  Curator annotates None and returns tasks
        self, stages: list[ProcessingStage], initial_tasks: list[Task] | None = None
    ) -> list[Task]:
        """Takes the tasks through all stages; returns the last stage's outputs in input order.

        Raises:
            QuadmixError: the one that a stage raised, or one that names stage and shard; a stage needs Ray, or a
                GPU that no worker offers; the cluster cannot be started or reached.
        """
        tasks = [EmptyTask()] if initial_tasks is None else initial_tasks
        refuse_ray_only(stages, "Dask")
        if self._is_own:
            self._refuse_missing_gpus(stages, self._resources.get("GPU", 0))
        flow = None
        with _sigterm_as_exit():
            try:
                client = self._connect()
                offers = client.scheduler_info()["workers"].values()
                self._refuse_missing_gpus(
                    stages, max((worker["resources"].get("GPU", 0) for worker in offers), default=0)
                )
                flow = Flow(client, stages, 2 * sum(client.nthreads().values()), self.on_progress)
                return flow.run(tasks)
            except BaseException as error:
                if flow is not None and not self._is_own and isinstance(error, Exception):
                    flow.abandon()
                try:
                    self.close()
                except (OSError, RuntimeError, TimeoutError) as late:  # must not take the place of the first error
                    logger.warning("the Dask cluster did not close in time: %s", late)
                raise

    def close(self) -> None:
        """Stops the cluster if it is this executor's own; a further ``execute`` starts another."""
        self._client = self._given_client
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> Any:
        from distributed import Client

        if self._client is None:
            if getattr(multiprocessing.current_process(), "_inheriting", False):
                raise QuadmixError(f"executor: a worker process runs the script again; {_GUARD}")
            try:
                target = self._address or self._open.enter_context(self._start())
                self._client = self._open.enter_context(Client(target, set_as_default=False))
            except (OSError, RuntimeError, TimeoutError) as error:
                if self._address:
                    what = f"no Dask scheduler at {self._address} ({error}); check the address"
                else:
                    what = f"the Dask workers did not start ({error}); {_GUARD}"
                raise QuadmixError(f"executor: {what}") from error
            logger.info("Dask dashboard: %s", self._client.dashboard_link)
        try:
            self._client.wait_for_workers(1, timeout=60)
        except TimeoutError as error:
            raise QuadmixError("executor: the Dask scheduler has no workers after 60 s; start some") from error
        return self._client

    @contextlib.contextmanager
    def _start(self) -> "Iterator[Any]":
        """A cluster of worker processes on this machine, reachable from this machine only."""
        from dask import config as dask_config
        from dask.system import CPU_COUNT
        from distributed import LocalCluster

        n_workers = self._n_workers or CPU_COUNT
        env = dict(self._env)
        if n_workers < CPU_COUNT:  # a GPU's one worker must not wait for its tokenizer
            env |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(CPU_COUNT // n_workers)}
            env |= self._given_env
        config = {
            "distributed.nanny.pre-spawn-environ": env,
            "distributed.scheduler.allowed-failures": self._retries,
        }
        # A worker's environment passes through this process' own (Dask starts workers that way): put it back.
        before = {key: os.environ.get(key) for key in (*env, "PYTHONHASHSEED")}
        scratch = tempfile.TemporaryDirectory(prefix="quadmix-dask-", ignore_cleanup_errors=True)
        try:
            with scratch, dask_config.set(config), contextlib.ExitStack() as stack:
                with _sigint_blocked():
                    cluster = LocalCluster(
                        n_workers=n_workers,
                        threads_per_worker=self._threads,
                        memory_limit=self._memory_limit,
                        host="127.0.0.1",
                        dashboard_address="127.0.0.1:0",
                        local_directory=scratch.name,
                        resources=self._resources,
                    )
                stack.enter_context(_killed_if_late(cluster))
                yield stack.enter_context(cluster)
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value

    def _refuse_missing_gpus(self, stages: Sequence[ProcessingStage], offered: float) -> None:
        remedy = 'use device: cpu, the inline executor, or workers with resources {"GPU": 1} (worker_resources)'
        _refuse_missing_gpus(stages, offered, remedy)


@contextlib.contextmanager
def _killed_if_late(cluster: Any) -> "Iterator[None]":
    """Kills a cluster's workers that do not end in time, on a machine with much else to do: their work is written."""
    try:
        yield
    except TimeoutError:
        logger.info("the Dask workers did not end in time and are killed")
        for nanny in cluster.workers.values():
            with contextlib.suppress(AttributeError, ProcessLookupError, TypeError):  # one that has ended
                os.kill(nanny.process.process.pid, signal.SIGKILL)


def refuse_ray_only(stages: Sequence[ProcessingStage], where: str) -> None:
    """Refuses the stages of Curator that only work with Ray actors around them.

    Raises:
        QuadmixError: names the stage.
    """
    for stage in stages:
        needs = [key for key in _RAY_ONLY if stage.ray_stage_spec().get(key)]
        needs += [key for key in _ID_OPTIONS if getattr(stage, key, False) is True]
        if needs:
            raise QuadmixError(
                f"stage {stage.name!r} ({type(stage).__name__}): needs Curator's Ray actors ({needs[0]}) and cannot "
                f"run on {where}; run that pipeline with executor 'ray_data' or Curator's RayActorPoolExecutor"
            )


class _Counts:
    """How many tasks each stage has had, and the callback that hears of it."""

    def __init__(self, stages: Sequence[ProcessingStage], first: int, on_progress: Progress | None):
        self.received, self.done = [first] + [0] * (len(stages) - 1), [0] * len(stages)
        self._stages, self._on_progress = stages, on_progress
        self._fans_out = [stage.is_fanout_stage() for stage in stages]

    def add(self, stage: int, inputs: int, outputs: int) -> None:
        self.done[stage] += inputs
        if stage + 1 < len(self.received):
            self.received[stage + 1] += outputs
        if self._on_progress:
            total = expected_totals(self._fans_out, self.received, self.done)[stage]
            self._on_progress(self._stages[stage].name, self.done[stage], total)


def _through(
    stage: ProcessingStage, i: int, tasks: Iterator[Task], counts: _Counts, teardowns: contextlib.ExitStack
) -> Iterator[Task]:
    """One stage as a stream; it is set up when its first task comes."""
    adapter, place = None, "setup"
    while batch := list(islice(tasks, max(1, stage.batch_size or 1))):
        try:
            if adapter is None:
                adapter, worker = StageAdapter(stage), WorkerMetadata(worker_id="inline")
                adapter.setup_on_node(NodeInfo(node_id="127.0.0.1"), worker)
                adapter.setup(worker)
                teardowns.callback(adapter.teardown)
            place = f"shard {', '.join(shard_of(task) for task in batch[:3])}"
            outputs = adapter.process_batch(batch)
        except Exception as error:  # a stranger's stage
            if isinstance(error, QuadmixError):
                raise
            raise named_error(stage, place, error) from error
        counts.add(i, len(batch), len(outputs))
        yield from outputs


def _refuse_missing_gpus(stages: Sequence[ProcessingStage], offered: float, remedy: str) -> None:
    for stage in stages:
        needed = stage.resources.gpus
        if stage.resources.requires_gpu and needed > offered:
            raise QuadmixError(f"stage {stage.name!r}: needs {needed:g} GPU, {offered:g} offered; {remedy}")


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Processes and threads started here never see SIGINT: Ctrl-C in a terminal is for the driver alone to handle."""
    resource_tracker.ensure_running()  # started later, it would unblock the signal in the thread that starts workers
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, so that workers are stopped; leaves a handler that is there already."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known)) or 'none'}"
