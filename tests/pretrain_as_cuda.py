"""One of the processes that torchrun starts, with a CPU in the place of its GPU and gloo in that of NCCL.

``pretrain_as_cuda.py AT -m MODULE JOB`` runs the module; the last process is asked to stop before its update ``AT``.
"""

import os
import runpy
import signal
import sys
from typing import Any

from cpu_as_cuda import cpu_as_cuda

from quadmix_plugin.pretraining.launch import rank_and_processes
from quadmix_plugin.proxy.megatron_learner import GPULearner


def stop_last_before(at: int) -> None:
    rank, processes = rank_and_processes()
    step, count = GPULearner.step, [0]

    def counting(*given: Any) -> Any:
        count[0] += 1
        if count[0] == at and rank == processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*given)

    GPULearner.step = counting  # type: ignore[method-assign]


if __name__ == "__main__":  # megatron-core writes checkpoints in processes of its own
    at, _, module, *arguments = sys.argv[1:]
    sys.argv[1:] = arguments
    stop_last_before(int(at))
    with cpu_as_cuda():
        runpy.run_module(module, run_name="__main__")
