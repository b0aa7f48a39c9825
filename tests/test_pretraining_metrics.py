"""The metrics read as if training had never been interrupted, and speed is measured against the right numbers."""

import json
import sys
from types import SimpleNamespace

import pytest
from pretrain_jobs import PER_UPDATE, train, write_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from quadmix_plugin.errors import InputError, StorageError
from quadmix_plugin.pretraining import loop
from quadmix_plugin.pretraining.metrics import FILE, Metrics, flops_per_token, peak_flops, read
from quadmix_plugin.proxy.megatron_learner import CPULearner
from quadmix_plugin.proxy.megatron_model import stop_parallel_state
from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer
from quadmix_plugin.proxy.model import named_shape
from quadmix_plugin.stages.train_proxies import trainer_resources


def scalars(folder):
    """Name → [(step, value)], as TensorBoard reads them from all files of events."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


def write(folder, first, end, by=1.0, update=0):
    with Metrics.open(folder, update, None, "run") as metrics:
        for step in range(first, end):
            metrics.write(step, {"loss": by * step, "validation_loss": 0.5 if step % 2 else None})


def test_a_line_for_each_step_and_what_is_not_measured_is_left_out(tmp_path):
    write(tmp_path, 1, 4)
    assert read(tmp_path / FILE) == [
        {"step": 1, "loss": 1.0, "validation_loss": 0.5},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 3.0, "validation_loss": 0.5},
    ]
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0)], "validation_loss": [(1, 0.5), (3, 0.5)]}


def test_lines_after_a_checkpoint_are_dropped_where_training_goes_on_from_it(tmp_path):
    write(tmp_path, 1, 8, by=-1.0)
    write(tmp_path, 5, 11, update=4)
    expected = [-1.0, -2.0, -3.0, -4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]
    assert [(line["step"], line["loss"]) for line in read(tmp_path / FILE)] == list(enumerate(expected, start=1))
    assert scalars(tmp_path)["loss"] == list(enumerate(expected, start=1))


@pytest.mark.parametrize("cut", ['{"step": 4, "lo', "{", '"loss": 3}', "3", "\0\0\0", '{"loss": 4.0}'])
def test_a_last_line_that_a_crash_has_cut_off_is_left_out(cut, tmp_path):
    write(tmp_path, 1, 4)
    with (tmp_path / FILE).open("a", encoding="utf-8") as file:
        file.write(cut)
    assert [line["step"] for line in read(tmp_path / FILE)] == [1, 2, 3]
    write(tmp_path, 4, 6, update=3)
    text = (tmp_path / FILE).read_text(encoding="utf-8")
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3, 4, 5]


def test_what_was_written_is_there_although_the_process_is_killed(tmp_path):
    metrics = Metrics.open(tmp_path, 0, None, "run")
    try:  # not closed yet
        for step in (1, 2, 3):
            metrics.write(step, {"loss": step / 2})
            assert read(tmp_path / FILE)[-1] == {"step": step, "loss": step / 2}
            assert scalars(tmp_path)["loss"][-1] == (step, step / 2)
    finally:
        metrics.board.close()


def test_there_are_no_lines_before_the_first(tmp_path):
    assert read(tmp_path / FILE) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with Metrics.open(tmp_path, 0, None, "run") as metrics:
        (tmp_path / FILE).unlink()
        (tmp_path / FILE).mkdir()
        with pytest.raises((StorageError, IsADirectoryError), match=FILE):
            metrics.write(1, {"loss": 1.0})


@pytest.fixture
def without_wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(without_wandb, tmp_path):
    for ask in (
        lambda: trainer_resources("megatron", {"device": "cpu", "wandb": "selection"}),  # as a run asks first
        lambda: Metrics.open(tmp_path, 0, "selection", "run"),
    ):
        with pytest.raises(InputError, match="trainer: wandb 'selection': wandb is not installed; pip install wandb"):
            ask()
    assert not list(tmp_path.iterdir())
    MegatronTrainer(device="cpu").require_device()


def test_a_tracker_gets_every_line_under_the_name_of_the_run(tmp_path, monkeypatch):
    calls = []

    class Tracker:
        def init(self, **options):
            calls.append(options)
            return self

        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", Tracker())
    monkeypatch.setattr("quadmix_plugin.pretraining.metrics.require_tracker", lambda project: None)
    with Metrics.open(tmp_path, 0, "selection", "quadmix-3") as metrics:
        metrics.write(2, {"loss": 1.5, "mfu": None})
    named = {"project": "selection", "name": "quadmix-3", "id": "quadmix-3", "resume": "allow"}
    assert calls == [named, (2, {"loss": 1.5}), "finished"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name, peak):
    assert peak_flops(name) == peak


def test_the_work_of_a_token_is_counted_by_hand_for_530m():
    shape = named_shape("530m", vocabulary=50_432)
    assert shape.parameters == 530_566_400
    matrices = 20 * (4 * 1280 * 1280 + 3 * 1280 * 3520) + 50_432 * 1280  # of the layers, and the output embedding
    norms = (2 * 20 + 1) * 1280
    attention = 20 * 2 * (2048 / 2) * 1280  # scores and sums over half of the context: multiplications
    assert flops_per_token(shape) == 3 * 2 * (matrices + norms + attention)
    assert flops_per_token(shape) == pytest.approx(3.11e9, rel=1e-3)


def test_tied_and_grouped_shapes_are_counted_too():
    sizes = {"layers": 2, "width": 64, "heads": 4, "ffn": 96, "context": 128, "vocabulary": 1000}
    untied, tied = (named_shape("tiny", **sizes, tied=tied) for tied in (False, True))
    assert flops_per_token(tied) == flops_per_token(untied)  # the input embedding is a look-up
    grouped = named_shape("tiny", **sizes, kv_heads=1)
    assert flops_per_token(untied) - flops_per_token(grouped) == 6 * 2 * (2 * 64 * 48)


def test_a_job_counts_its_own_tokens_per_second(tmp_path, monkeypatch):
    """By a clock that goes on by two seconds in an update; time for checkpoints and validation does not count."""
    now = [0.0]

    def taking(seconds, work):
        def timed(*given):
            now[0] += seconds
            return work(*given)

        return timed

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(CPULearner, "step", taking(2.0, CPULearner.step))
    monkeypatch.setattr(loop.Checkpoints, "save", taking(100.0, loop.Checkpoints.save))
    monkeypatch.setattr(loop._Training, "_validation_loss", taking(1000.0, loop._Training._validation_loss))
    (tmp_path / "tokens").mkdir()
    job = write_data(tmp_path / "tokens").job(tmp_path / "run", 16, options={"eval_every": 4})
    try:
        train(job)
    finally:
        stop_parallel_state()
    speeds = [line["tokens_per_second"] for line in read(job.place / FILE)]
    assert speeds[1:] == pytest.approx([PER_UPDATE / 2.0] * 3)  # the first began by the real clock
