"""``python -m quadmix_plugin.pretraining JOB.json``: one process of a job, alone or under torchrun.

It ends when its standard input does, which is when the process that began the job is gone. A termination signal makes
it save a checkpoint first.
"""

import json
import logging
import os
import signal
import stat
import sys
import threading

from quadmix_plugin import registry
from quadmix_plugin.atomic import atomic_path
from quadmix_plugin.errors import QuadmixError
from quadmix_plugin.models import first_line
from quadmix_plugin.pretraining.job import PretrainJob
from quadmix_plugin.pretraining.launch import ERROR, OUTPUT, rank_and_processes
from quadmix_plugin.pretraining.loop import Interrupted, pretrain


def main(path: str) -> int:
    """Trains; returns the exit code and leaves ``error.json`` where something is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    job = PretrainJob.read(path)
    options = registry.create("trainers", job.trainer, job.options, "pretrain.options")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())
    rank, processes = rank_and_processes()
    try:
        pretrain(options, job, rank, processes, stop)
    except Interrupted as error:
        _leave(job, QuadmixError(
            f"pretrain: {job.selector}, seed {job.seed}: {error}; the same command goes on from there"
        ))  # fmt: skip
        return 128 + signal.SIGTERM
    except QuadmixError as error:
        _leave(job, error)
        return error.exit_code
    except Exception as error:
        if not (job.place / ERROR).exists():  # another process may have ended first, and this one for want of it
            _leave(job, QuadmixError(
                f"pretrain: {job.selector}, seed {job.seed}: {type(error).__name__}: {first_line(error)}; "
                f"{job.place / OUTPUT} has the rest, and the same command goes on from the last checkpoint"
            ))  # fmt: skip
        raise
    return 0


def _leave(job: PretrainJob, error: QuadmixError) -> None:
    """The error for the process that waits; torchrun's own last words say nothing of it."""
    with atomic_path(job.place / ERROR) as temporary:
        content = {"kind": type(error).__name__, "message": str(error)}
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _has_a_parent_that_watches() -> bool:
    """Whether standard input is a pipe; a batch system gives ``/dev/null``, which ends at once and says nothing."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _end_with_the_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    if _has_a_parent_that_watches():
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
    sys.exit(main(sys.argv[1]))
