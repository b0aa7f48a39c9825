"""What a Dask worker does with a unit of work: one call of one stage, set up once per process.

Errors leave a worker as they are if they survive pickling, else as type and message. Which unit runs when is
decided on the driver, in ``dask_flow``.
"""

import asyncio
import pickle
import threading
from typing import Any

import cloudpickle
from nemo_curator.backends.base import NodeInfo, WorkerMetadata
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import Task

from quadmix_plugin.errors import QuadmixError
from quadmix_plugin.stage_adapter import StageAdapter

Held = tuple[bytes, frozenset[str]]

TOPIC = "quadmix-units"  # a Dask event per finished unit: (run, unit, shards of its outputs)


class _Adapter(StageAdapter):
    """A stage as one worker process holds it; never entered by two threads at once."""

    def __init__(self, stage: ProcessingStage):
        super().__init__(stage)
        self.lock = threading.Lock()
        self.is_set_up = False


_ADAPTERS: dict[tuple[str, int], _Adapter] = {}
_ADAPTERS_LOCK = threading.Lock()


def run_unit(place: tuple[str, int], name: str, held: Held, inputs: list[list[Task]]) -> list[Task]:
    """Runs a stage on its inputs and reports what came out; errors arrive on the driver as they are or flattened."""
    from distributed import get_worker

    worker = get_worker()
    try:
        adapter = _adapter(place, held[0])
        with adapter.lock:
            if not adapter.is_set_up:
                metadata = WorkerMetadata(worker_id=str(worker.name))
                if (host := _host(worker)) not in held[1]:  # a worker that came when the run was under way
                    adapter.setup_on_node(NodeInfo(node_id=host), metadata)
                adapter.setup(metadata)
                adapter.is_set_up = True
            outputs = adapter.process_batch([task for part in inputs for task in part])
    except (Exception, SystemExit) as error:  # a stranger's stage
        if _is_portable(error):
            raise
        raise _flattened(error) from None
    worker.log_event(TOPIC, (place[0], name, [shard_of(task) for task in outputs]))
    return outputs


def _adapter(place: tuple[str, int], blob: bytes) -> _Adapter:
    with _ADAPTERS_LOCK:
        if place not in _ADAPTERS:
            _ADAPTERS[place] = _Adapter(cloudpickle.loads(blob))
        return _ADAPTERS[place]


def _is_portable(error: BaseException) -> bool:
    try:
        back = pickle.loads(cloudpickle.dumps(error))  # noqa: S301  our own bytes
    except Exception:  # whatever a stranger's __reduce__ or __init__ raises
        return False
    return isinstance(error, Exception) and type(back) is type(error)


def _flattened(error: BaseException) -> Exception:
    """An error that survives pickling, with the type, message and exit code of one that does not."""
    if isinstance(error, QuadmixError):
        flat = QuadmixError(str(error))
        flat.exit_code = error.exit_code
        return flat
    return RuntimeError(f"{type(error).__name__}: {error}")


def _host(worker: Any) -> str:
    return worker.address.rpartition("://")[2].rpartition(":")[0]


def set_up_node(held: Held) -> None:
    """Calls ``setup_on_node`` of a stage, for the host of this worker."""
    from distributed import get_worker

    worker = get_worker()
    try:
        metadata = WorkerMetadata(worker_id=str(worker.name))
        StageAdapter(cloudpickle.loads(held[0])).setup_on_node(NodeInfo(node_id=_host(worker)), metadata)
    except (Exception, SystemExit) as error:  # a stranger's stage
        if _is_portable(error):
            raise
        raise _flattened(error) from None


async def tear_down_run(run: str) -> list[str]:
    """Tears a run's stages down in this process, off its event loop; returns what went wrong."""
    return await asyncio.to_thread(_tear_down_adapters, run)


def _tear_down_adapters(run: str) -> list[str]:
    with _ADAPTERS_LOCK:
        adapters = [_ADAPTERS.pop(place) for place in sorted(_ADAPTERS) if place[0] == run]
    messages = []
    for adapter in adapters:
        with adapter.lock:
            try:
                if adapter.is_set_up:
                    adapter.teardown()
            except Exception as error:  # a stranger's teardown
                messages.append(f"stage {adapter.stage.name!r}, teardown: {type(error).__name__}: {error}")
    return messages


def hold(blob: bytes, hosts: frozenset[str]) -> Held:
    """The pickled stage as a task of its own: each worker fetches it once, and Dask can make it again.

    ``hosts`` are those on which ``setup_on_node`` is run before the first unit.
    """
    return blob, hosts


def pick(outputs: list[Task], i: int) -> list[Task]:
    """One output of a fan-out."""
    return [outputs[i]]


def shards_of(outputs: list[Task]) -> list[str]:
    """What to call each task of a unit's outputs."""
    return [shard_of(task) for task in outputs]


def shard_of(task: Task) -> str:
    """What to call a task in a message: its shard, or its id."""
    return str(task._metadata.get("shard") or task.task_id)


def cause(error: BaseException) -> BaseException | None:
    """What to chain an error that is shown to."""
    return error.__cause__ if isinstance(error, QuadmixError) else error
