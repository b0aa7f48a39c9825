"""Whatever happens to the process that trains, the same command goes on to the same model; no process is left alone."""

import contextlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from pretrain_jobs import checkpoints, environment, lines, outcome, train, write_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.pretraining import __main__ as program
from quadmix_plugin.pretraining.launch import ERROR, LAUNCHER, OUTPUT, _error
from quadmix_plugin.proxy.megatron_learner import CPULearner
from quadmix_plugin.proxy.megatron_model import stop_parallel_state

FAULTS = Path(__file__).with_name("pretrain_faults.py")
UPDATES = 42


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(autouse=True)
def alone():
    yield
    stop_parallel_state()


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    job = data.job(tmp_path_factory.mktemp("undisturbed"), UPDATES)
    train(job)
    stop_parallel_state()
    return outcome(job)


@pytest.fixture
def job(data, tmp_path):
    return data.job(tmp_path / "run", UPDATES)


@pytest.fixture
def launched(monkeypatch):
    """Trains in a process of its own, as on a GPU, where a fault may be waiting."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def launch(job, *fault):
        script = [str(FAULTS), *map(str, fault)] if fault else []
        with monkeypatch.context() as patch:
            patch.setenv(LAUNCHER, " ".join([sys.executable, *script]))
            train(job)

    return launch


def scalars(job):
    """Name → step → value, as TensorBoard reads them."""
    events = EventAccumulator(str(job.place / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: {each.step: each.value for each in events.Scalars(name)} for name in events.Tags()["scalars"]}


@pytest.mark.slow
def test_killed_after_a_checkpoint_it_goes_on_to_the_same_model(job, undisturbed, launched):
    with pytest.raises(QuadmixError, match=r"quadmix, seed 3: its processes ended with code -9 .*output\.log.*goes on"):
        launched(job, "killed", 28)
    assert checkpoints(job) == [10, 20]
    assert [line["step"] for line in lines(job)][-1] == 24
    launched(job)
    assert outcome(job) == undisturbed
    assert "going on from" in (job.place / OUTPUT).read_text(encoding="utf-8")
    found = scalars(job)
    for name in ("loss", "validation_loss", "learning_rate"):
        expected = {line["step"]: line[name] for line in undisturbed["lines"] if name in line}
        assert found[name] == pytest.approx(expected, rel=1e-6)


def test_killed_at_a_checkpoint_then_stopped_it_goes_on_to_the_same_model(job, undisturbed, launched):
    with pytest.raises(QuadmixError, match="code -9"):
        launched(job, "killed-publishing", 20)
    assert checkpoints(job) == [10]
    assert (job.place / "checkpoints" / ".step-000000020.tmp").is_dir()
    with pytest.raises(QuadmixError, match="seed 3: stopped after update 23, with a checkpoint; the same command goes"):
        launched(job, "terminated", 13)  # counted from update 10
    assert checkpoints(job) == [20, 23]
    assert not list((job.place / "checkpoints").glob(".*"))
    train(job)
    assert outcome(job) == undisturbed
    assert checkpoints(job) == [40, 42]


def test_it_ends_when_the_process_that_began_it_is_killed(data, launched, tmp_path):
    job = data.job(tmp_path / "run", 1_000_000)
    code = (
        "import sys; from quadmix_plugin.pretraining.job import PretrainJob; import pretrain_jobs;"
        "pretrain_jobs.train(PretrainJob.read(sys.argv[1]))"
    )
    launcher = f"{sys.executable} {FAULTS} orphaned 3"
    parent = subprocess.run(
        [sys.executable, "-c", code, str(job.write())], check=False, env=environment(**{LAUNCHER: launcher})
    )
    assert parent.returncode == -9
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int((job.place / "pid").read_text(encoding="utf-8"))).wait(60)
    assert not job.results.entries()


def test_interrupted_at_the_terminal_it_saves_and_without_a_process_that_watches_it_trains_on(job):
    """Batch systems give ``/dev/null`` as standard input."""
    done = subprocess.run(
        [sys.executable, str(FAULTS), "interrupted", "5", "-m", "quadmix_plugin.pretraining", str(job.write())],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(),
    )
    assert done.returncode == 143, done.stderr.decode()
    assert checkpoints(job) == [5]


@pytest.fixture
def process(monkeypatch):
    """The program in this process, which keeps its own handlers of signals and of logs."""
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    monkeypatch.setattr(program.logging, "basicConfig", lambda **_: None)
    return lambda job: program.main(str(job.write()))


def test_an_error_is_left_as_it_was(data, process, tmp_path):
    job = data.job(tmp_path / "run", UPDATES, eod=7)
    assert process(job) == InputError.exit_code
    error = _error(job, 1, job.place / OUTPUT)
    assert type(error) is InputError
    assert "train-0.bin: its first document ends with id 0, this tokenizer's end of a document is 7" in str(error)


def test_a_crash_is_left_with_its_cause_unless_another_process_knew_better(job, process, monkeypatch):
    def crash(*_):
        raise RuntimeError("CUDA error: out of memory\nand many lines more")

    monkeypatch.setattr(CPULearner, "step", crash)
    with pytest.raises(RuntimeError):
        process(job)
    error = _error(job, 1, job.place / OUTPUT)
    assert type(error) is QuadmixError
    assert str(error) == (
        f"pretrain: quadmix, seed 3: RuntimeError: CUDA error: out of memory; {job.place / OUTPUT} has the rest, and "
        f"the same command goes on from the last checkpoint"
    )
    (job.place / ERROR).write_text('{"kind": "StorageError", "message": "the disk is full"}', encoding="utf-8")
    with pytest.raises(RuntimeError):
        process(job)
    assert str(_error(job, 1, job.place / OUTPUT)) == "the disk is full"
