"""One pipeline run on a Dask cluster: which unit of work starts when, and what follows from its end.

A unit is one call of one stage on ``stage.batch_size`` tasks. Its outputs stay on the worker as the result of a
future; the driver learns only how many there are and what their shards are called. A task goes on to its next
stage as soon as it is there, the deepest stage first, and a window bounds how many units are under way, so memory
follows the number of workers and not the corpus. Batches are formed in input order, whatever finishes first, so
they are those of one process. What a worker does
with a unit is in ``dask_worker``, what starts and stops a cluster in ``executors``.
"""

import contextlib
import heapq
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import cloudpickle
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import Task

from quadmix_plugin.dask_worker import (
    TOPIC,
    cause,
    hold,
    pick,
    run_unit,
    set_up_node,
    shard_of,
    shards_of,
    tear_down_run,
)
from quadmix_plugin.errors import QuadmixError

if TYPE_CHECKING:
    from distributed import Client, Future

Progress = Callable[[str, int, int | None], None]
Key = tuple[int, ...]

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 5.0
_LOST = "executor: the connection to the Dask scheduler was lost; run the command again, and it goes on"
_MOST_SECONDS_PAUSED = 120.0
_MOST_SECONDS_ALONE = 600.0
_URGENT = 1_000_000  # priority of the small tasks that only hand payloads on


@dataclass(eq=False)
class _Unit:
    """One call of a stage: its place in input order, its inputs, and what follows it from the same fan-out."""

    stage: int
    key: Key
    inputs: list[Any]
    shards: list[str]
    rest: Iterator[tuple[Key, Any, str]]
    name: str = ""
    ran_alone: bool = False


@dataclass
class _Buffer:
    """Tasks that wait in front of a stage with ``batch_size`` > 1 until their batch is full and in order."""

    waiting: list[tuple[Key, Any, str]] = field(default_factory=list)
    batch: list[tuple[Key, Any, str]] = field(default_factory=list)
    formed: int = 0


class Flow:
    """One run of ``stages`` on a client's workers; use once.

    Args:
        client: a connected Dask client.
        stages: stages as ``Pipeline.build`` leaves them.
        on_progress: called with (stage name, tasks done, tasks expected or None while unknown).
        slots: threads of workers that may yet come, as an adaptive cluster only grows for work that it has been given.
    """

    def __init__(
        self, client: "Client", stages: Sequence[ProcessingStage], on_progress: Progress | None, slots: int = 1
    ):
        self._client: Any = client  # Dask annotates its methods for asynchronous clients too
        self._stages, self._on_progress = stages, on_progress
        self._slots, self._window, self._window_until = slots, 0, 0.0
        self._run = uuid.uuid4().hex
        self._starts = [i for i, stage in enumerate(stages) if _batch_size(stage) > 1]
        self._segment = [sum(start <= i for start in self._starts) for i in range(len(stages))]
        self._outstanding: list[set[Key]] = [set() for _ in range(len(self._starts) + 1)]
        self._buffers = {start: _Buffer() for start in self._starts}
        self._ready: list[tuple[int, Key, _Unit]] = []
        self._flying: dict[Any, tuple[_Unit, Any]] = {}
        self._suspects: list[tuple[_Unit, Any]] = []
        self._reports: dict[str, list[str]] = {}
        self._results: list[tuple[Key, list[Task]]] = []
        self._received, self._done = [0] * len(stages), [0] * len(stages)
        self._fans_out = [stage.is_fanout_stage() for stage in stages]
        self._submitted = 0
        self._blobs: list[Any] = []
        self._ended: SimpleQueue[Any] = SimpleQueue()
        self._moved = self._had_workers = time.monotonic()

    def run(self, tasks: Sequence[Task]) -> list[Task]:
        """Takes ``tasks`` through all stages; returns the last stage's outputs in input order.

        Raises:
            QuadmixError: the one that a stage raised; or one that names stage and shard, when a stage raised
                anything else or a worker process was lost once too often.
        """
        self._client.subscribe_topic(TOPIC, self._on_report)
        try:
            self._look_at_workers()
            self._prepare()
            self._received[0] = len(tasks)
            self._hand_on(0, ((((i,), [task], shard_of(task)) for i, task in enumerate(tasks))), len(tasks))
            while self._dispatch():
                for future in self._next():
                    self._finish(future)
            self._end()
        except (OSError, TimeoutError) as error:  # of Dask's client: what stages raise has become a QuadmixError
            raise QuadmixError(_LOST) from error
        finally:
            with contextlib.suppress(OSError, TimeoutError):  # of a scheduler that is gone
                self._client.unsubscribe_topic(TOPIC)
                self._client.cancel([future for _, future in (*self._flying.values(), *self._suspects)])
        return [task for _, outputs in sorted(self._results, key=lambda item: item[0]) for task in outputs]

    def abandon(self) -> None:
        """After a failed run on workers that live on: tears its stages down; what they raise is only logged."""
        with contextlib.suppress(OSError, TimeoutError):  # of a scheduler that is gone
            for message in self._tear_down():
                logger.warning("%s", message)

    def _look_at_workers(self) -> None:
        """Fits the window to the workers that there are now: some come, go or start again while work goes on."""
        if time.monotonic() > self._window_until:
            self._window = 2 * max(self._slots, sum(self._client.nthreads().values()))
            self._window_until = time.monotonic() + _SECONDS_BETWEEN_LOOKS

    def _next(self) -> list[Any]:
        """The futures that have ended, at least one."""
        while True:
            try:
                ended = [self._ended.get(timeout=_SECONDS_BETWEEN_LOOKS)]
                break
            except Empty:
                self._look_at_workers()
                if time.monotonic() - self._moved > _MOST_SECONDS_PAUSED:
                    self._refuse_idle_workers()
        while not self._ended.empty():
            ended.append(self._ended.get())
        self._moved = self._had_workers = time.monotonic()
        return ended

    def _refuse_idle_workers(self) -> None:
        """Ends a run that cannot go on: no workers, or all paused, which would end only if their processes shrank."""
        workers = self._client.scheduler_info()["workers"].values()
        if workers:
            self._had_workers = time.monotonic()
        elif time.monotonic() - self._had_workers > _MOST_SECONDS_ALONE:
            raise QuadmixError(
                f"executor: the Dask scheduler has had no workers for {_MOST_SECONDS_ALONE:.0f} s; start some, and run "
                "the command again"
            )
        if workers and all(worker["status"] == "paused" for worker in workers):
            raise QuadmixError(
                f"executor: Dask has paused all {len(workers)} workers, each near its memory limit; raise the limit, "
                "lower corpus.documents_per_shard, or set distributed.worker.memory.pause: false for the workers"
            )
        self._moved = time.monotonic()

    def _prepare(self) -> None:
        """Puts the stages on the cluster and runs ``setup_on_node`` once per host; late hosts do it themselves."""
        hosts: dict[str, str] = {}
        for address, worker in self._client.scheduler_info()["workers"].items():
            hosts.setdefault(worker["host"], address)
        for i, stage in enumerate(self._stages):
            name = f"{stage.name}-stage-{i}-{self._run}"
            parts = cloudpickle.dumps(stage), frozenset(hosts)
            self._blobs.append(self._client.submit(hold, *parts, key=name, priority=_URGENT, pure=False))
        for stage, blob in zip(self._stages, self._blobs, strict=True):
            if type(stage).setup_on_node is ProcessingStage.setup_on_node:
                continue
            on_hosts = [
                self._client.submit(
                    set_up_node, blob, workers=[address], allow_other_workers=True, priority=_URGENT, pure=False
                )
                for address in hosts.values()
            ]
            for future in on_hosts:
                error = future.exception()
                if error is not None:
                    raise named_error(stage, "setup_on_node", error) from error

    def _hand_on(self, stage: int, parts: Iterator[tuple[Key, Any, str]], count: int) -> None:
        """Gives a stage its next inputs: all that it has to batch, else only as many as are needed soon."""
        if stage in self._buffers:
            for part in parts:
                heapq.heappush(self._buffers[stage].waiting, part)
            return
        for key, payload, shard in islice(parts, min(count, 2 * self._window)):
            self._enqueue(_Unit(stage, key, [payload], [shard], parts))

    def _enqueue(self, unit: _Unit) -> None:
        heapq.heappush(self._ready, (-unit.stage, unit.key, unit))
        self._outstanding[self._segment[unit.stage]].add(unit.key)

    def _form_batches(self) -> None:
        """Turns waiting tasks into units once no earlier task can still arrive."""
        for segment, stage in enumerate(self._starts):
            buffer, size = self._buffers[stage], _batch_size(self._stages[stage])
            earliest = min(self._outstanding[segment], default=None)
            while buffer.waiting and (earliest is None or buffer.waiting[0][0] < earliest):
                buffer.batch.append(heapq.heappop(buffer.waiting))
                if len(buffer.batch) == size:
                    self._close_batch(stage)
            if buffer.batch and self._is_drained(segment):
                self._close_batch(stage)

    def _close_batch(self, stage: int) -> None:
        buffer = self._buffers[stage]
        _, payloads, shards = zip(*buffer.batch, strict=True)
        self._enqueue(_Unit(stage, (buffer.formed,), list(payloads), list(shards), iter(())))
        buffer.formed += 1
        buffer.batch = []

    def _is_drained(self, segment: int) -> bool:
        """Whether nothing more can come out of this segment of stages."""
        before = [self._buffers[stage] for stage in self._starts[:segment]]
        return not any(self._outstanding[: segment + 1]) and not any(b.waiting or b.batch for b in before)

    def _dispatch(self) -> bool:
        """Starts what may start; False when everything is finished."""
        self._look_at_workers()
        self._form_batches()
        if self._suspects:
            # Dask blames every task that a lost worker had been given: run each alone before calling it guilty.
            if not self._flying:
                unit, future = self._suspects.pop()
                unit.ran_alone = True
                self._client.retry([future])
                self._fly(unit, future)
            return True
        while self._ready and (not self._flying or self._may_start(self._ready[0][2])):
            self._submit(heapq.heappop(self._ready)[2])
        return bool(self._flying)

    def _may_start(self, unit: _Unit) -> bool:
        segment = self._segment[unit.stage]
        if len(self._flying) >= self._window:
            return False
        if segment == len(self._starts):
            return True
        stage = self._starts[segment]  # it must not run far ahead of the batches that its outputs wait for
        return len(self._buffers[stage].waiting) < 2 * self._window + _batch_size(self._stages[stage])

    def _submit(self, unit: _Unit) -> None:
        stage = self._stages[unit.stage]
        self._submitted += 1
        unit.name = f"{stage.name}-{unit.stage}-{self._run}-{self._submitted}"
        future = self._client.submit(
            run_unit,
            (self._run, unit.stage),
            unit.name,
            self._blobs[unit.stage],
            unit.inputs,
            key=unit.name,
            priority=unit.stage,
            resources={"GPU": stage.resources.gpus} if stage.resources.requires_gpu else None,
            pure=False,
        )
        self._fly(unit, future)
        self._hand_on(unit.stage, unit.rest, 1)

    def _fly(self, unit: _Unit, future: "Future") -> None:
        self._flying[future.key] = unit, future
        future.add_done_callback(self._ended.put)

    def _finish(self, future: "Future") -> None:
        unit, future = self._flying.pop(future.key)
        if future.cancelled():
            raise QuadmixError(_LOST)
        try:
            if future.status != "finished":
                future.result()
            if unit.stage == len(self._stages) - 1:
                outputs = future.result()
                self._results.append((unit.key, outputs))
                count = len(outputs)
            else:
                count = self._follow(unit, future)
        except Exception as error:
            self._failed(unit, future, error)
            return
        self._reports.pop(unit.name, None)
        self._outstanding[self._segment[unit.stage]].discard(unit.key)
        self._report_progress(unit, count)

    def _follow(self, unit: _Unit, future: "Future") -> int:
        """Hands a unit's outputs to the next stage; returns how many there are."""
        # Workers report through the same ordered stream as their results, so the report is there; if a scheduler
        # was restarted and it is not, ask for it.
        shards = self._reports.pop(unit.name, None)
        if shards is None:
            shards = self._client.submit(shards_of, future, priority=_URGENT, pure=False).result()
        if shards:
            self._hand_on(unit.stage + 1, self._parts(unit, future, shards), len(shards))
        return len(shards)

    def _parts(self, unit: _Unit, future: "Future", shards: list[str]) -> Iterator[tuple[Key, Any, str]]:
        """The outputs of a unit, each a future of its own."""
        if len(shards) == 1:
            yield (*unit.key, 0), future, shards[0]
            return
        for i, shard in enumerate(shards):
            name = f"{unit.name}-output-{i}"
            yield (*unit.key, i), self._client.submit(pick, future, i, key=name, priority=_URGENT), shard

    def _failed(self, unit: _Unit, future: "Future", error: Exception) -> None:
        from distributed import CancelledError, KilledWorker
        from distributed.comm.core import CommClosedError

        if isinstance(error, CommClosedError | CancelledError):
            raise QuadmixError(_LOST) from error
        stage, shards = self._stages[unit.stage], ", ".join(unit.shards[:3])
        if not isinstance(error, KilledWorker):
            raise named_error(stage, f"shard {shards}", error) from cause(error)
        if not unit.ran_alone:
            self._suspects.append((unit, future))
            return
        raise QuadmixError(
            f"stage {stage.name!r}, shard {shards}: the worker process was lost {error.allowed_failures + 2} times "
            "over it, killed or out of memory; raise memory_limit, lower n_workers, or leave this shard out"
        ) from error

    def _report_progress(self, unit: _Unit, count: int) -> None:
        self._done[unit.stage] += len(unit.inputs)
        if unit.stage + 1 < len(self._stages):
            self._received[unit.stage + 1] += count
        if self._on_progress:
            totals = expected_totals(self._fans_out, self._received, self._done)
            self._on_progress(self._stages[unit.stage].name, self._done[unit.stage], totals[unit.stage])

    def _on_report(self, event: tuple[float, Any]) -> None:
        run, unit, shards = event[1]
        if run == self._run:
            self._reports[unit] = list(shards)

    def _end(self) -> None:
        """Tears the stages down on every worker that set them up."""
        messages = self._tear_down()
        if messages:
            raise QuadmixError(messages[0])

    def _tear_down(self) -> list[str]:
        answers = self._client.run(tear_down_run, self._run, on_error="return")
        return [message for answer in answers.values() if isinstance(answer, list) for message in answer]


def expected_totals(fans_out: Sequence[bool], received: Sequence[int], done: Sequence[int]) -> list[int | None]:
    """How many tasks each stage will have had: None while a fan-out before it is not finished."""
    totals: list[int | None] = [received[0]]
    for i in range(1, len(fans_out)):
        before = totals[i - 1]
        if before is None or (done[i - 1] < before and fans_out[i - 1]):
            totals.append(None)
        else:
            totals.append(received[i] + before - done[i - 1])
    return totals


def named_error(stage: ProcessingStage, place: str, error: BaseException) -> QuadmixError:
    """A stage's own ``QuadmixError`` as it is, anything else as one that names stage and place."""
    if isinstance(error, QuadmixError):
        return error
    return QuadmixError(f"stage {stage.name!r}, {place}: {type(error).__name__}: {error}")


def _batch_size(stage: ProcessingStage) -> int:
    return max(1, stage.batch_size or 1)
