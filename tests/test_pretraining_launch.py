"""A job runs in the processes that its device and the environment ask for; what ended them comes back as an error."""

import json
import os
import shlex
import sys

import pytest
import torch
from pretrain_jobs import write_data

from quadmix_plugin import errors
from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.pretraining import launch, loop
from quadmix_plugin.pretraining.job import PretrainJob
from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer

FIRST = "import json, os, sys; place = os.path.dirname(sys.argv[-1]); "


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def job(data, tmp_path):
    return data.job(tmp_path / "run")


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many GPUs."""

    def have(number):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return have


@pytest.fixture
def launcher(monkeypatch):
    def be(code):
        monkeypatch.setenv(launch.LAUNCHER, shlex.join([sys.executable, "-c", FIRST + code]))

    return be


@pytest.mark.parametrize(
    ("options", "there", "said"),
    [
        ({"device": "cpu", "gpus": 1}, 0, "gpus 1, the device is a CPU; leave gpus out, or give device: cuda"),
        ({"device": "auto", "gpus": 2}, 0, "gpus 2, the device is a CPU"),
        ({"gpus": 9}, 8, "gpus 9, this machine has 8; give fewer, or start .* by --launcher"),
        ({"device": "cuda:1", "gpus": 2}, 8, "gpus 2, this machine has 1"),
        ({"device": "cuda"}, 0, "0 usable GPUs"),
    ],
)
def test_more_gpus_than_there_are_are_refused(options, there, said, gpus, monkeypatch):
    gpus(there)
    with pytest.raises(InputError, match=said):
        MegatronTrainer(**options).require_device()
    if there:  # several machines may have them
        monkeypatch.setenv(launch.LAUNCHER, "srun torchrun")
        MegatronTrainer(**options).require_device()


@pytest.mark.parametrize(
    ("options", "there", "processes"),
    [
        ({"device": "cpu"}, 8, None),
        ({"device": "auto"}, 0, None),
        ({}, 1, 1),
        ({}, 8, 8),
        ({"gpus": 3}, 8, 3),
        ({"gpus": 1}, 8, 1),
        ({"device": "cuda:2"}, 8, 1),
    ],
)
def test_one_process_for_each_gpu_and_none_for_a_cpu(options, there, processes, gpus, job, monkeypatch):
    gpus(there)
    commands, here = [], []
    monkeypatch.setattr(launch, "_run", lambda command, job, variables: commands.append(command))
    monkeypatch.setattr(loop, "pretrain", lambda *given: here.append(given))
    trainer = MegatronTrainer(**options)
    launch.launch(trainer, job)
    assert launch.needs_the_machine(trainer, launch.choose_device(trainer.device)) == ((processes or 0) > 1)
    if processes is None:
        assert (commands, here) == ([], [(trainer, job)])
        return
    path = job.place / "job.json"
    last = ["-m", "quadmix_plugin.pretraining", str(path)]
    torchrun = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file"]
    [[python, *words]] = commands
    assert python == sys.executable
    assert words[-3:] == last
    assert words[:-3] == ([*torchrun, words[4], f"--nproc-per-node={processes}"] if processes > 1 else [])
    assert here == []
    assert PretrainJob.read(path) == job


def test_the_launcher_of_the_environment_starts_the_job_anywhere(job, monkeypatch):
    commands = []
    monkeypatch.setattr(launch, "_run", lambda command, job, variables: commands.append(command))
    monkeypatch.setenv("NODES", "4")
    monkeypatch.setenv(launch.LAUNCHER, 'srun --nodes $NODES --comment "two words" torchrun')
    trainer = MegatronTrainer(device="cpu")
    launch.launch(trainer, job)
    path = str(job.place / "job.json")
    assert commands == [
        ["srun", "--nodes", "4", "--comment", "two words", "torchrun", "-m", "quadmix_plugin.pretraining", path]
    ]
    assert launch.needs_the_machine(trainer, "cpu")


@pytest.mark.parametrize(
    ("command", "said"), [("no-such-launcher -n 4", "no-such-launcher"), ("/", "Permission"), ("'x", "No closing")]
)
def test_a_launcher_that_cannot_be_started_is_named(command, said, job, monkeypatch):
    monkeypatch.setenv(launch.LAUNCHER, command)
    with pytest.raises(InputError, match=f"launcher .*{command.split()[0]}.*: cannot be started .*{said}.*; give a co"):
        launch.launch(MegatronTrainer(**job.options), job)


def test_a_process_that_ends_well_is_told_the_job_and_holds_a_pipe(job, launcher):
    launcher("import stat; open(f'{place}/seen', 'w').write(f'{sys.argv[1:]} {stat.S_ISFIFO(os.fstat(0).st_mode)}')")
    launch.launch(MegatronTrainer(**job.options), job)
    seen = (job.place / "seen").read_text(encoding="utf-8")
    assert seen == f"{['-m', 'quadmix_plugin.pretraining', str(job.place / 'job.json')]} True"


@pytest.mark.parametrize("kind", ["InputError", "StorageError", "QuadmixError"])
def test_an_error_comes_back_as_what_it_was(kind, job, launcher):
    said = json.dumps({"kind": kind, "message": f"a {kind}, and what to do"})
    launcher(f"open(f'{{place}}/error.json', 'w').write({said!r}); print('torchrun: ===='); sys.exit(3)")
    with pytest.raises(QuadmixError, match=f"^a {kind}, and what to do$") as caught:
        launch.launch(MegatronTrainer(**job.options), job)
    assert type(caught.value) is getattr(errors, kind)


def test_without_one_the_last_line_is_said_and_an_old_one_is_not(job, launcher):
    job.write()
    (job.place / launch.ERROR).write_text('{"kind": "InputError", "message": "of another time"}', encoding="utf-8")
    launcher("print('first'); print('NCCL: no route to host', file=sys.stderr); sys.exit(7)")
    with pytest.raises(QuadmixError) as caught:
        launch.launch(MegatronTrainer(**job.options), job)
    assert str(caught.value) == (
        f"pretrain: quadmix, seed 3: its processes ended with code 7 (NCCL: no route to host); "
        f"{job.place / launch.OUTPUT} has the rest, and the same command goes on from the last checkpoint"
    )
    launcher("sys.exit(9)")
    (job.place / launch.OUTPUT).unlink()
    with pytest.raises(QuadmixError, match=r"code 9 \(nothing was said\)"):
        launch.launch(MegatronTrainer(**job.options), job)


@pytest.mark.parametrize("content", ["", '{"kind": "Exception", "message": "m"}', '{"kind": "InputError"}', "nul"])
def test_an_error_that_cannot_be_read_is_none(content, job, launcher):
    launcher(f"open(f'{{place}}/error.json', 'w').write({content!r}); print('the cause'); sys.exit(1)")
    with pytest.raises(QuadmixError, match=r"ended with code 1 \(the cause\)"):
        launch.launch(MegatronTrainer(**job.options), job)


def test_an_interruption_stops_the_process_and_waits_for_it(job, launcher, monkeypatch):
    """As by Ctrl-C; it may save a checkpoint."""
    launcher(
        "import signal; signal.signal(signal.SIGTERM, lambda *_: (open(f'{place}/saved', 'w'), sys.exit(143)));"
        "open(f'{place}/ready', 'w').close(); signal.pause()"
    )
    started = []

    class Interrupted(launch.subprocess.Popen):
        def wait(self, timeout=None):
            if not started:
                started.append(self)
                while not (job.place / "ready").exists():
                    assert self.poll() is None
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(launch.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch.launch(MegatronTrainer(**job.options), job)
    assert (job.place / "saved").exists()
    assert started[0].returncode == 143


def test_rank_and_processes_are_those_of_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launch.rank_and_processes() == (0, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launch.rank_and_processes() == (5, 8)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"prefixes": [], "documents": [], "sort": 1}'])
def test_a_file_that_is_no_job_is_refused_by_name(content, tmp_path):
    path = tmp_path / "job.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"job\.json: no job of a run .*give the job.json that a run has written"):
        PretrainJob.read(path)
    assert os.listdir(tmp_path) == ([] if content is None else ["job.json"])
