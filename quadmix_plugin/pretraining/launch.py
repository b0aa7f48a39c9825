"""In which processes a job trains: this one on a CPU, one per GPU under torchrun otherwise.

``QUADMIX_LAUNCHER`` replaces torchrun on this machine by another command, such as ``srun`` with torchrun on several.
A recipe cannot set it, for it is a command.
"""

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quadmix_plugin import errors
from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.models import choose_device

if TYPE_CHECKING:
    from quadmix_plugin.pretraining.job import PretrainJob
    from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer

logger = logging.getLogger(__name__)

LAUNCHER = "QUADMIX_LAUNCHER"
"""Environment variable with the command that starts ``python -m quadmix_plugin.pretraining JOB`` in every process."""

ERROR, OUTPUT = "error.json", "output.log"

_GRACE = 120  # seconds for the last checkpoint


def require_gpus(gpus: int, device: str) -> None:
    """Refuses a number of GPUs that this machine does not have, unless another command starts the processes.

    Raises:
        InputError: too few.
    """
    if gpus == 0 or os.environ.get(LAUNCHER):
        return
    if device == "cpu":
        raise InputError(f"trainer: gpus {gpus}, the device is a CPU; leave gpus out, or give device: cuda")
    there = gpus_here(device)
    if gpus > there:
        raise InputError(
            f"trainer: gpus {gpus}, this machine has {there}; give fewer, or start the processes of several machines "
            f"by --launcher"
        )


def gpus_here(device: str) -> int:
    """GPUs of this machine that a job may use: one where the device names one, none on a CPU."""
    import torch

    if device == "cpu":
        return 0
    return 1 if ":" in device else torch.cuda.device_count()


def rank_and_processes() -> tuple[int, int]:
    """Number of this process and of all, as torchrun says; 0 of 1 without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def needs_the_machine(options: "MegatronTrainer", device: str) -> bool:
    """Whether a job takes more than one GPU, or processes that another command starts."""
    return bool(os.environ.get(LAUNCHER)) or (device != "cpu" and (options.gpus or gpus_here(device)) > 1)


def launch(options: "MegatronTrainer", job: "PretrainJob") -> None:
    """Trains a job where its device says; raises as ``MegatronTrainer.pretrain``."""
    device = choose_device(options.device)
    command = _command(options, device)
    if command is None:
        from quadmix_plugin.pretraining.loop import pretrain

        pretrain(options, job)
        return
    path = job.write()
    (job.place / ERROR).unlink(missing_ok=True)
    _run([*command, "-m", "quadmix_plugin.pretraining", str(path)], job)


def _command(options: "MegatronTrainer", device: str) -> list[str] | None:
    """The command before ``-m``; None where this process trains itself."""
    if launcher := os.environ.get(LAUNCHER):
        try:
            return shlex.split(os.path.expandvars(launcher))
        except ValueError as error:
            raise _no_start(launcher, error) from error
    if device == "cpu":
        return None
    processes = options.gpus or gpus_here(device)
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def _run(command: list[str], job: "PretrainJob") -> None:
    """Runs it to its end; it ends when this process does, for it watches its standard input."""
    logger.info("starting %s", shlex.join(command))
    output = job.place / OUTPUT
    with output.open("ab") as log:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)  # noqa: S603
        except OSError as error:
            raise _no_start(command[0], error) from error
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if code:
        raise _error(job, code, output)


def _no_start(launcher: str, error: Exception) -> InputError:
    return InputError(f"launcher {launcher!r}: cannot be started ({error}); give a command of this machine")


def _error(job: "PretrainJob", code: int, output: Path) -> Exception:
    """What ended a job, in its own words where it left some."""
    try:
        said: dict[str, Any] = json.loads((job.place / ERROR).read_text(encoding="utf-8"))
        kind = getattr(errors, said["kind"])
        return kind(said["message"])
    except (OSError, ValueError, KeyError, AttributeError):
        last = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return QuadmixError(
            f"pretrain: {job.selector}, seed {job.seed}: its processes ended with code {code} "
            f"({last[0] if last else 'nothing was said'}); {output} has the rest, and the same command goes on from "
            f"the last checkpoint"
        )
