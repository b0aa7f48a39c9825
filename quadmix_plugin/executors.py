"""Executors for Curator pipelines: in this process, on Dask, or on Curator's own Ray back ends.

``Pipeline.run(executor=DaskExecutor())`` is all that a script needs. Stages, tasks, task ids and performance
records are Curator's; what is here decides where stages run, refuses what cannot run there before anything starts,
and stops every process that it started. How work flows over a Dask cluster is in ``dask_flow``.
"""

import contextlib
import difflib
import inspect
import logging
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

from nemo_curator.backends.base import BaseExecutor, NodeInfo, WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import EmptyTask, Task

from quadmix_plugin.dask_cluster import OwnCluster, Scheduler, Tls, dashboard
from quadmix_plugin.dask_flow import Flow, Progress, expected_totals, named_error
from quadmix_plugin.dask_worker import shard_of
from quadmix_plugin.errors import QuadmixError, RecipeError
from quadmix_plugin.ray_executor import RayExecutor
from quadmix_plugin.signals import raise_surely
from quadmix_plugin.stage_adapter import StageAdapter

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

_GPU_REMEDY = 'use device: cpu, the inline executor, or workers with resources {"GPU": 1} (worker_resources)'
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
        n_workers: worker processes; by default one per core, or per GPU with ``gpu_workers``.
        max_workers: Dask starts further workers, up to so many, while there is work for them, and ends them after.
        threads_per_worker: how many different stages one worker may run at a time.
        memory_limit: bytes (or "4GiB") per worker; "auto" shares the machine's memory.
        gpu_workers: one worker per GPU, by dask-cuda's LocalCUDACluster.
        rmm_pool_size: of each GPU worker, for cupy: bytes, a size or a share of its memory; None has no pool.
        protocol: "ucx" or "tcp" between GPU workers.
        address: an existing scheduler: "tls://host:8786", or "tcp://127.0.0.1:8786" on this machine.
        scheduler_file: the file that an existing scheduler wrote, in place of its address.
        tls_ca, tls_cert, tls_key: PEM files for a ``tls`` address; Dask's own configuration by default.
        client: a connected client; it is left open.
        worker_env: environment of the worker processes, over the defaults.
        worker_resources: what each worker offers, for instance {"GPU": 1}.
        lost_worker_retries: how often a unit of work may lose its worker process; an existing scheduler has its own
            setting (``distributed.scheduler.allowed-failures``).

    Raises:
        RecipeError: options that do not go together, a certificate that cannot be read, an address off loopback
            without TLS.
    """

    def __init__(
        self,
        n_workers: int | None = None,
        max_workers: int | None = None,
        threads_per_worker: int = 1,
        memory_limit: str | int | float = "auto",
        gpu_workers: bool = False,
        rmm_pool_size: str | int | float | None = None,
        protocol: str = "tcp",
        address: str | None = None,
        scheduler_file: str | None = None,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        client: "Client | None" = None,
        worker_env: Mapping[str, Any] | None = None,
        worker_resources: Mapping[str, float] | None = None,
        lost_worker_retries: int = 3,
    ) -> None:
        super().__init__()
        existing = "address" if address else "scheduler_file" if scheduler_file else "client" if client else ""
        own = {
            "n_workers": n_workers,
            "max_workers": max_workers,
            "gpu_workers": gpu_workers or None,
            "rmm_pool_size": rmm_pool_size,
            "worker_env": worker_env,
            "worker_resources": worker_resources,
        }
        for key, value in own.items():
            if existing and value is not None:
                raise RecipeError(f"executor.{key}: the workers behind {existing!r} are there already; leave it out")
        if client is not None and (address or scheduler_file):
            raise RecipeError("executor.address: a client is given too; leave one of them out")
        if (n_workers is not None and n_workers < 1) or threads_per_worker < 1 or lost_worker_retries < 0:
            raise RecipeError("executor: n_workers and threads_per_worker are at least 1, lost_worker_retries 0")
        self.on_progress: Progress | None = None
        tls = Tls(tls_ca, tls_cert, tls_key)
        self._place: OwnCluster | Scheduler | None = None
        if address or scheduler_file:
            self._place = Scheduler(address, scheduler_file, tls)
        elif client is None:
            self._place = OwnCluster(
                n_workers=n_workers,
                max_workers=max_workers,
                threads_per_worker=threads_per_worker,
                memory_limit=memory_limit,
                env={key: str(value) for key, value in (worker_env or {}).items()},
                resources=dict(worker_resources or ({"GPU": 1} if gpu_workers else {})),
                lost_worker_retries=lost_worker_retries,
                gpu_workers=gpu_workers,
                rmm_pool_size=rmm_pool_size,
                protocol=protocol,
            )
        self._given_client = client
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
        own = self._place if isinstance(self._place, OwnCluster) else None
        if own:
            _refuse_missing_gpus(stages, own.resources.get("GPU", 0), _GPU_REMEDY)
        flow = None
        with _sigterm_as_exit():
            try:
                client = self._connect()
                offers = client.scheduler_info()["workers"].values()
                offered = max((worker["resources"].get("GPU", 0) for worker in offers), default=0)
                _refuse_missing_gpus(stages, offered, _GPU_REMEDY)
                flow = Flow(client, stages, self.on_progress, own.most_threads if own else 1)
                return flow.run(tasks)
            except BaseException as error:
                if flow is not None and not own and isinstance(error, Exception):
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
        if self._place is not None and self._client is None:
            self._client = self._open.enter_context(self._place.client())
            logger.info("Dask dashboard: %s", dashboard(self._client))
        try:
            self._client.wait_for_workers(1, timeout=60)
        except TimeoutError as error:
            raise QuadmixError("executor: the Dask scheduler has no workers after 60 s; start some") from error
        return self._client


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
def _sigterm_as_exit() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, so that workers are stopped; leaves a handler that is there already."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _: object) -> None:
        raise_surely(SystemExit(128 + number))

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known)) or 'none'}"
