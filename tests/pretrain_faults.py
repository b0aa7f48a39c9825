"""A process that trains a job and meets a fault on the way.

``python pretrain_faults.py FAULT AT -m MODULE JOB`` runs the module as ``python`` itself would, but for the fault at
update ``AT``; so it can be a launcher.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _before_update(at: int, what: Callable[[], Any]) -> None:
    from quadmix_plugin.proxy.megatron_learner import CPULearner

    step, count = CPULearner.step, [0]

    def counting(*given: Any) -> Any:
        count[0] += 1
        if count[0] == at:
            what()
        return step(*given)

    CPULearner.step = counting  # type: ignore[method-assign]


def _signalled(number: signal.Signals) -> Callable[[int], None]:
    return lambda at: _before_update(at, lambda: os.kill(os.getpid(), number))


def _killed_publishing(at: int) -> None:
    """Its files are there, under their temporary name."""
    replace = os.replace

    def killing(source: Any, target: Any) -> None:
        if Path(target).name == f"step-{at:09d}":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = killing


def _orphaned(at: int) -> None:
    """The process that waits for this one is killed, and training would take long."""
    Path(sys.argv[-1]).with_name("pid").write_text(str(os.getpid()), encoding="utf-8")
    _before_update(at, lambda: os.kill(os.getppid(), signal.SIGKILL))


FAULTS = {
    "killed": _signalled(signal.SIGKILL),
    "terminated": _signalled(signal.SIGTERM),
    "interrupted": _signalled(signal.SIGINT),
    "killed-publishing": _killed_publishing,
    "orphaned": _orphaned,
}


if __name__ == "__main__":
    fault, at, _, module, *arguments = sys.argv[1:]
    sys.argv[1:] = arguments
    FAULTS[fault](int(at))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
