"""Several processes train the model that one trains, and either goes on from the checkpoints of the other.

Processes are real ones under torchrun, and what megatron-core does on GPUs runs as it is: the wrappers of the model,
the distributed optimizer, which keeps a part of its state in each process, and the checkpoints. gloo takes the place of
NCCL.
"""

import shlex
import sys
from pathlib import Path

import psutil
import pytest
from cpu_as_cuda import cpu_as_cuda
from pretrain_jobs import checkpoints, environment, lines, losses, train, write_data

from quadmix_plugin.errors import QuadmixError
from quadmix_plugin.pretraining.launch import LAUNCHER
from quadmix_plugin.pretraining.loop import pretrain
from quadmix_plugin.proxy.megatron_learner import GPULearner
from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer

SCRIPT = Path(__file__).with_name("pretrain_as_cuda.py")
UPDATES = 30
AS_CUDA = {"device": "cuda", "dtype": "float32", "micro_batch_size": 1}  # several passes for each process
NEVER = 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A job that one process has done."""
    job = data.job(tmp_path_factory.mktemp("one"), UPDATES, options=AS_CUDA)
    train_in_one(job)
    return job


def train_in_one(job):
    """In this process, as the one that is started for a single GPU."""
    with cpu_as_cuda():
        pretrain(MegatronTrainer(**job.options), job)


def train_in_two(job, monkeypatch, at):
    with monkeypatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        patch.setenv(LAUNCHER, shlex.join([sys.executable, *torchrun, str(SCRIPT), str(at)]))
        with cpu_as_cuda():
            train(job)


def same_training(job, other):
    """All losses, norms and measurements, but for rounding in another order."""
    found, expected = lines(job), lines(other)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    assert len(found) == 8
    for line, wanted in zip(found, expected, strict=True):
        assert line == pytest.approx(wanted, abs=1e-4)
    assert losses(job)["losses"] == pytest.approx(losses(other)["losses"], abs=1e-4)
    assert losses(job)["learnt"] == losses(other)["learnt"]


def test_saving_leaves_no_process_behind(data, tmp_path):
    """Those that megatron-core and the data sets use are ended, or they would outlive a job that is killed."""
    before = set(psutil.Process().children(recursive=True))
    train_in_one(data.job(tmp_path, 4, options=AS_CUDA))
    assert set(psutil.Process().children(recursive=True)) <= before


def test_two_processes_stop_together_and_one_goes_on(data, undisturbed, tmp_path, monkeypatch):
    """Only the second is asked to stop; they agree on it where they write a line of metrics."""
    job = data.job(tmp_path, UPDATES, options=AS_CUDA)
    with pytest.raises(QuadmixError, match="stopped after update 16, with a checkpoint; the same command goes on"):
        train_in_two(job, monkeypatch, 14)
    assert checkpoints(job) == [10, 16]
    assert [line["step"] for line in lines(job)] == [4, 8, 12, 16]
    train_in_one(job)
    same_training(job, undisturbed)


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_stopped(data, undisturbed, tmp_path, monkeypatch):
    job = data.job(tmp_path, UPDATES, options=AS_CUDA)
    step, count = GPULearner.step, [0]

    def stopping(*given):
        count[0] += 1
        if count[0] == 13:
            raise KeyboardInterrupt
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(GPULearner, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_in_one(job)
    assert checkpoints(job) == [10]
    train_in_two(job, monkeypatch, NEVER)
    same_training(job, undisturbed)
    assert checkpoints(job) == [20, 30]
