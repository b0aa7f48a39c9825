"""In which processes a job trains: this one on a CPU, one per GPU under torchrun otherwise.

``QUADMIX_LAUNCHER`` replaces torchrun on this machine by another command, such as ``srun`` with torchrun on several.
A recipe cannot set it, for it is a command.
"""

import contextlib
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
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
    launcher = os.environ.get(LAUNCHER)
    if not launcher and device == "cpu":
        from quadmix_plugin.pretraining.loop import pretrain

        pretrain(options, job)
        return
    path = job.write()
    (job.place / ERROR).unlink(missing_ok=True)
    with (
        _own_command(launcher) if launcher else processes_here(options.gpus or gpus_here(device)) as (start, variables)
    ):
        _run([*start, "-m", "quadmix_plugin.pretraining", str(path)], job, variables)


@contextlib.contextmanager
def processes_here(number: int) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The command, before ``-m``, that starts so many processes on this machine, and variables of their environment.

    They find each other by a file. torchrun itself would listen on every address of the machine, and it unpickles what
    it is told there.
    """
    if number == 1:
        yield [sys.executable], {}
        return
    from quadmix_plugin.proxy.megatron_model import SOCKETS, STORE

    with tempfile.TemporaryDirectory(prefix="quadmix-") as folder:  # on a local disk, unlike the run directory perhaps
        meeting = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file", f"--rdzv-endpoint={folder}/rendezvous"]
        command = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={number}"]
        sockets = {name: os.environ.get(name, "lo") for name in SOCKETS}
        yield command, {**sockets, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", STORE: f"{folder}/store"}


@contextlib.contextmanager
def _own_command(launcher: str) -> Iterator[tuple[list[str], dict[str, str]]]:
    try:
        words = shlex.split(os.path.expandvars(launcher))
    except ValueError as error:
        raise _no_start(launcher, error) from error
    yield words, {}


def _run(command: list[str], job: "PretrainJob", variables: Mapping[str, str]) -> None:
    """Runs it to its end; it ends when this process does, for it watches its standard input."""
    logger.info("starting %s", shlex.join(command))
    output = job.place / OUTPUT
    with output.open("ab") as log:
        try:
            process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **variables}
            )
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
