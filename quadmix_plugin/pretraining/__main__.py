"""``python -m quadmix_plugin.pretraining JOB.json``: one process of a job, alone or under torchrun.

It ends when its standard input does, which is when the process that began the job is gone. A termination signal makes
it save a checkpoint first.
"""

import json
import logging
import os
import signal
import sys
import threading

from quadmix_plugin import registry
from quadmix_plugin.errors import QuadmixError
from quadmix_plugin.pretraining.job import PretrainJob
from quadmix_plugin.pretraining.launch import ERROR, rank_and_processes
from quadmix_plugin.pretraining.loop import Interrupted, pretrain
from quadmix_plugin.store import atomic_path


def main(path: str) -> int:
    """Trains; returns the exit code and leaves ``error.json`` where something is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    job = PretrainJob.read(path)
    options = registry.create("trainers", job.trainer, job.options, "pretrain.options")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.set())
    rank, processes = rank_and_processes()
    try:
        pretrain(options, job, rank, processes, stop)
    except Interrupted as error:
        logging.getLogger(__name__).info("%s", error)
        return 128 + signal.SIGTERM
    except QuadmixError as error:
        with atomic_path(job.place / ERROR) as temporary:
            content = {"kind": type(error).__name__, "message": str(error)}
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        return error.exit_code
    return 0


def _end_with_the_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    if not sys.stdin.isatty():
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
    sys.exit(main(sys.argv[1]))
