"""A checkpoint is whole or passed over, belongs to its model or is refused, and never costs the one before it."""

import dataclasses
import json
import logging
import shutil
import subprocess

import numpy as np
import pytest
from pretrain_jobs import OPTIONS, SHAPE, checkpoints, losses, outcome, train, write_data, write_tokens

from quadmix_plugin.errors import InputError, StorageError
from quadmix_plugin.pretraining.checkpoints import Progress, _whole
from quadmix_plugin.proxy.megatron_learner import CPULearner
from quadmix_plugin.proxy.megatron_model import stop_parallel_state

UPDATES = 24
EVERY_8 = {"save_every": 8, "keep": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(autouse=True)
def alone():
    yield
    stop_parallel_state()


class Stopped(Exception):
    """In the place of a power cut."""


def train_until(job, update):
    """Training that ends before this update begins."""
    step, count = CPULearner.step, [0]

    def counting(*given):
        count[0] += 1
        if count[0] == update:
            raise Stopped
        return step(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPULearner, "step", counting)
        with pytest.raises(Stopped):
            train(job)
    stop_parallel_state()


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    job = data.job(tmp_path_factory.mktemp("undisturbed"), UPDATES, options=EVERY_8)
    train(job)
    stop_parallel_state()
    return outcome(job)


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """The run directory of a job with checkpoints after 8 and 16 updates."""
    root = tmp_path_factory.mktemp("begun")
    train_until(data.job(root, UPDATES, options=EVERY_8), 23)
    return root


@pytest.fixture
def job(begun, data, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    return data.job(tmp_path / "run", UPDATES, options=EVERY_8)


def folder(job, update):
    return job.place / "checkpoints" / f"step-{update:09d}"


def test_what_was_saved_is_loaded_bit_by_bit(job, undisturbed):
    assert checkpoints(job) == [8, 16]
    train(job)
    assert outcome(job) == undisturbed
    assert checkpoints(job) == [8, 16, 24]


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_or_a_missing_file_is_noticed(job):
    last, rng = folder(job, 16), np.random.default_rng(0)
    files = sorted(last.iterdir())
    assert len(files) > 3
    for path in files:
        whole = path.read_bytes()
        for at in rng.integers(0, len(whole), 20):
            flip(path, at)
            assert _whole(last) is None, (path.name, at)
            path.write_bytes(whole)
        path.unlink()
        assert _whole(last) is None, path.name
        path.write_bytes(whole)
    found = _whole(last)
    assert found is not None
    assert found["progress"]["update"] == 16


@pytest.mark.parametrize("name", ["quadmix.json", "__0_0.distcp", "common.pt", ".metadata"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(name, job, undisturbed, caplog):
    path = folder(job, 16) / name
    flip(path, path.stat().st_size // 2)
    with caplog.at_level(logging.INFO, logger="quadmix_plugin"):
        train(job)
    assert f"{folder(job, 16)}: damaged, so the checkpoint before it is taken" in caplog.messages
    assert f"going on from {folder(job, 8)}" in caplog.messages
    assert outcome(job) == undisturbed
    assert checkpoints(job) == [8, 16, 24]


def test_where_all_are_damaged_training_begins_anew(job, undisturbed, caplog):
    (folder(job, 8) / "common.pt").unlink()
    (folder(job, 16) / "quadmix.json").write_text("[]", encoding="utf-8")
    train(job)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [message.split(": ")[1][:9] for message in warnings] == ["damaged, ", "damaged, ", "no whole "]
    assert outcome(job) == undisturbed


def test_a_damaged_one_does_not_take_the_place_of_those_that_are_saved_after_it(job, data):
    (folder(job, 16) / "common.pt").unlink()
    job = data.job(job.results.root, UPDATES, options={"save_every": 3, "keep": 1})
    train_until(job, 7)  # of those after 8: saved after 9 and 12
    assert checkpoints(job) == [12]
    train_until(job, 2)
    assert checkpoints(job) == [12]


def test_what_a_killed_process_left_half_written_is_written_anew(job, undisturbed):
    for update in (16, 24):
        half = folder(job, update).with_name(f".step-{update:09d}.tmp")
        shutil.copytree(folder(job, 16), half)
        (half / "quadmix.json").unlink()
    train(job)
    assert outcome(job) == undisturbed
    assert (folder(job, 24) / "quadmix.json").is_file()


@pytest.mark.parametrize(("keep", "there"), [(1, [24]), (2, [18, 24]), (9, [6, 12, 18, 24])])
def test_only_the_last_ones_are_kept(keep, there, data, tmp_path):
    job = data.job(tmp_path, UPDATES, options={"save_every": 6, "keep": keep})
    train(job)
    assert checkpoints(job) == there
    assert sorted(path.name for path in (job.place / "checkpoints").iterdir()) == [f"step-{at:09d}" for at in there]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"shape_options": {**SHAPE, "ffn": 48}}}, "ffn: 64 there, 48 here"),
        ({"options": {"shape_options": {**SHAPE, "kv_heads": 1}}}, "kv_heads: 0 there, 1 here"),
        ({"options": {"shape_options": {**SHAPE, "tied": True}}}, "tied: False there, True here"),
        ({"seed": 4}, "seed: 3 there, 4 here"),
        ({"updates": 30}, "tokens: 6144 there, 7680 here"),
        ({"options": {"schedule": "wsd"}}, "schedule: 'cosine' there, 'wsd' here"),
        (
            {"options": {"learning_rate": 0.02, "batch_size": 8}},
            "batch_size: 4 there, 8 here; learning_rate: 0.01 there, 0.02 here",
        ),
        ({"options": {"betas": (0.8, 0.95)}}, r"betas: \[0.9, 0.95\] there, \[0.8, 0.95\] here"),
        ({"options": {"warmup": 0.1}}, "warmup: 0.05 there, 0.1 here"),
        ({"options": {"weight_decay": 0.0}}, "weight_decay: 0.1 there, 0.0 here"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(str(value).split("'")[1::2]),
)
def test_a_checkpoint_of_another_model_is_refused_with_both_values(changes, said, job, data):
    changes = {"updates": UPDATES, **changes}
    changes["options"] = {**EVERY_8, **changes.get("options", {})}
    other = data.job(job.results.root, **changes)
    with pytest.raises(InputError, match=rf"step-000000016: a checkpoint of another model \({said}\); give the former"):
        train(other)
    assert checkpoints(job) == [8, 16]


def test_a_checkpoint_of_other_data_is_refused(job, tmp_path):
    write_tokens(tmp_path / "t", [list(range(1, 500))] * 40, list(map(str, range(40))))
    other = dataclasses.replace(job, prefixes=(str(tmp_path / "t"),), documents=(f"{tmp_path}/t.documents.parquet",))
    with pytest.raises(InputError, match=r"another model \(data: '[0-9a-f]+' there, '[0-9a-f]+' here\).*or remove"):
        train(other)
    backwards = dataclasses.replace(job, prefixes=job.prefixes[::-1], documents=job.documents[::-1])
    with pytest.raises(InputError, match=r"another model \(data: "):
        train(backwards)


def test_what_does_not_shape_training_may_change(job, data, undisturbed):
    options = {"log_every": 4, "eval_every": 5, "save_every": 11, "keep": 1, "micro_batch_size": 4}
    other = data.job(job.results.root, UPDATES, options=options)
    train(other)
    assert outcome(other)["weights"] == undisturbed["weights"]
    assert losses(other)["losses"] == undisturbed["losses"]["losses"]


def test_losses_since_the_last_line_go_with_a_checkpoint(job):
    content = json.loads((folder(job, 16) / "quadmix.json").read_text(encoding="utf-8"))
    assert Progress(**content["progress"]) == Progress(16, [])
    job = dataclasses.replace(job, options={**OPTIONS, "save_every": 3, "log_every": 8})
    train_until(job, 5)  # saved after 18
    content = json.loads((folder(job, 18) / "quadmix.json").read_text(encoding="utf-8"))
    assert content["progress"]["update"] == 18
    assert len(content["progress"]["losses"]) == 2


def test_a_full_disk_costs_nothing_that_was_saved(data, tmp_path, undisturbed):
    job, small = data.job(tmp_path / "run", UPDATES, options=EVERY_8), tmp_path / "run" / "full"
    job = dataclasses.replace(job, folder="full")
    small.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(small)]  # enough for one of 3.6 MB and the indices
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        with pytest.raises(StorageError, match=r"checkpoints/.*(disk is full|could not be written .*space left)"):
            train(job)
        stop_parallel_state()
        assert checkpoints(job) == [8, 16]
        assert not list((job.place / "checkpoints").glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        train(job)
        assert outcome(job) == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
