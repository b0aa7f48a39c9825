"""Curator's Ray back ends as executors that work on a small machine: enough logical cores, loopback only."""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
from nemo_curator.backends.base import BaseExecutor
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import Task

from quadmix_plugin.dask_flow import Progress

_SECONDS_TO_END = 5.0


class RayExecutor(BaseExecutor):
    """Curator's own Ray back ends with settings that work on a small machine, on loopback.

    Where RAY_ADDRESS is set, that cluster is used as it is.

    Args:
        backend: "ray_data" or "xenna"; xenna runs in batch mode unless ``config`` says otherwise.
        num_cpus: what Ray counts as cores; by default the machine's, or more where the stages ask for more together
            (each holds its own while it waits, so with fewer they would wait for one another for ever).
        config: handed to Curator's executor.
    """

    def __init__(self, backend: str, num_cpus: int | None = None, config: Mapping[str, Any] | None = None) -> None:
        mode = {"execution_mode": "batch"} if backend == "xenna" else {}
        super().__init__({**mode, **(config or {})})
        self.backend, self.num_cpus = backend, num_cpus
        self.on_progress: Progress | None = None  # Curator's executors report nothing

    def execute(  # pyright: ignore[reportIncompatibleMethodOverride]  Curator annotates None and returns tasks
        self, stages: list[ProcessingStage], initial_tasks: list[Task] | None = None
    ) -> list[Task]:
        """Takes the tasks through all stages; results come in the back end's order; errors are the back end's."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if self.backend == "xenna":
            from nemo_curator.backends.xenna import XennaExecutor as Backend
        else:
            from nemo_curator.backends.ray_data import RayDataExecutor as Backend
        before, is_own = set(psutil.Process().children()), False
        if not os.environ.get("RAY_ADDRESS") and not ray.is_initialized():
            is_own = True
            with _ray_on_loopback():
                ray.init(
                    num_cpus=self.num_cpus or _logical_cores(stages),
                    include_dashboard=self.backend == "xenna",  # Xenna asks it for the state of its actors
                    dashboard_host="127.0.0.1",
                    _node_ip_address="127.0.0.1",
                    log_to_driver=False,
                )
        try:
            return list(Backend(self.config).execute(stages, initial_tasks) or [])
        finally:
            ours = [each for each in psutil.Process().children() if is_own and each not in before]
            started = [*ours, *(child for each in ours for child in each.children(recursive=True))]
            ray.shutdown()
            for left in psutil.wait_procs(started, timeout=_SECONDS_TO_END)[1]:  # Xenna's monitor never ends by itself
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()


def _logical_cores(stages: Sequence[ProcessingStage]) -> int:
    wanted = 1 + math.ceil(sum(stage.resources.cpus for stage in stages))
    return max(wanted, len(os.sched_getaffinity(0)))


@contextlib.contextmanager
def _ray_on_loopback() -> Iterator[None]:
    """Lets Ray listen on 127.0.0.1: on Linux it puts the machine's own address in its place, and has no option."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
