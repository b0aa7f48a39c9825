"""Training learns from real text, measures what it says it measures, and ends with a reason where it must."""

import dataclasses
import json
import math

import pytest
import torch
from pretrain_jobs import (
    CONTEXT,
    EOD,
    OPTIONS,
    PER_UPDATE,
    VOCABULARY,
    checkpoints,
    lines,
    losses,
    outcome,
    train,
    write_data,
)

from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.pretraining import loop, result
from quadmix_plugin.pretraining.data import TrainingData
from quadmix_plugin.proxy.megatron_learner import CPULearner
from quadmix_plugin.proxy.megatron_model import start_parallel_state, stop_parallel_state
from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer
from quadmix_plugin.proxy.model import load_weights
from quadmix_plugin.proxy.validation import evaluate, load_validation_sets

CPU = torch.device("cpu")
RATE = OPTIONS["learning_rate"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(autouse=True)
def alone():
    yield
    stop_parallel_state()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A job of 42 updates that is done, and the loss of every update."""
    seen = []
    step = CPULearner.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPULearner, "step", lambda *given: seen.append(float(loss := step(*given))) or loss)
        job = data.job(tmp_path_factory.mktemp("run"), 42, options={"eval_every": 10})
        train(job)
    stop_parallel_state()
    return job, seen


@pytest.fixture
def samples(trained):
    """The batches of the job and its validation split, read once more."""
    job, _ = trained
    start_parallel_state(CPU)
    return TrainingData.open(dataclasses.replace(job, folder="elsewhere"), CONTEXT, OPTIONS["batch_size"], 42)


def trainer(job):
    return MegatronTrainer(**job.options)


def mean_loss(model, batch):
    with torch.no_grad():
        logits = model(batch[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), batch[:, 1:].flatten())


def test_the_loss_falls_below_the_entropy_of_single_tokens(data, tmp_path):
    job = data.job(tmp_path, 400, options={"batch_size": 8, "eval_every": 50, "save_every": 1000})
    train(job)
    found = losses(job)
    last = [line["loss"] for line in lines(job)[-5:]]
    assert max(last) < found["unigram_entropy"] - 0.1
    assert lines(job)[0]["loss"] > found["unigram_entropy"] + 1
    assert found["learnt"] is True
    validation = [line["validation_loss"] for line in lines(job) if "validation_loss" in line]
    assert validation == sorted(validation, reverse=True)
    assert len(validation) == 4


def test_a_line_says_what_happened_since_the_one_before(trained):
    job, seen = trained
    found = lines(job)
    ends = [*range(4, 41, 4), 42]
    assert [line["step"] for line in found] == ends
    for line, first in zip(found, [0, *ends], strict=False):
        assert line["tokens"] == line["step"] * PER_UPDATE
        assert line["loss"] == pytest.approx(sum(seen[first : line["step"]]) / (line["step"] - first), abs=1e-12)
        assert line["grad_norm"] > 0
    assert len({line["grad_norm"] for line in found}) == len(found)
    # due after 10, 20, 30 and 40 updates and at the end
    assert [line["step"] for line in found if "validation_loss" in line] == [12, 20, 32, 40, 42]
    assert checkpoints(job) == [40, 42]


def test_the_first_loss_is_that_of_the_initial_model_on_the_first_batch(trained, samples):
    job, seen = trained
    learner = CPULearner(trainer(job), trainer(job).model_shape(VOCABULARY), job.seed, CPU)
    (batch,) = samples.batches(0, 1, 0, 1, CPU)
    assert seen[0] == pytest.approx(float(mean_loss(learner.decoder(), batch)), abs=1e-5)
    assert seen[0] == pytest.approx(math.log(VOCABULARY), abs=0.2)


def test_the_validation_loss_is_the_mean_over_all_pairs_of_the_split(trained, samples):
    job, _ = trained
    model = load_weights(job.results.root / job.model)
    pairs = torch.cat(list(samples.validation_batches(5, 0, 1, CPU)))
    assert len(pairs) > 40
    found = lines(job)[-1]["validation_loss"]
    assert found == pytest.approx(float(mean_loss(model, pairs)), abs=1e-5)
    assert found != pytest.approx(float(mean_loss(model, pairs[:-1])), abs=1e-5)


def test_the_result_is_measured_on_the_model_that_is_written(trained):
    job, _ = trained
    found = losses(job)
    model = load_weights(job.results.root / job.model)
    sets = load_validation_sets(job.validation, "report")
    assert len(sets) == 4
    assert found["losses"] == {each.task: pytest.approx(evaluate(model, each), abs=1e-12) for each in sets}
    for each in sets:
        bits = found["losses"][each.task] * each.n_targets / each.n_bytes / math.log(2)
        assert found["bits_per_byte"][each.task] == pytest.approx(bits)
    search = load_validation_sets(job.validation, "search")
    assert evaluate(model, search[0]) != pytest.approx(found["losses"][search[0].task], abs=1e-6)
    assert (found["selector"], found["seed"], found["learnt"]) == ("quadmix", 3, None)
    assert found["tokens_seen"] == 42 * PER_UPDATE
    assert found["epochs"] == found["tokens_seen"] / 200_000
    assert [point["step"] for point in found["curve"]] == [*range(4, 41, 4), 42]
    assert [point["train_loss"] for point in found["curve"]] == [line["loss"] for line in lines(job)]
    assert found["curve"][-1]["losses"] == found["losses"]
    assert not (job.place / "indices").exists()


def test_how_often_it_is_looked_at_does_not_change_training(trained, data, tmp_path):
    job = data.job(tmp_path, 42, options={"eval_every": 7, "log_every": 3, "save_every": 5, "keep": 3})
    train(job)
    before = outcome(trained[0])
    assert outcome(job)["weights"] == before["weights"]
    assert losses(job)["losses"] == before["losses"]["losses"]
    assert checkpoints(job) == [35, 40, 42]


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"schedule": "cosine"}, {1: 0.25, 4: 1, 12: 0.55, 20: 0.1}),
        ({"schedule": "cosine", "final_learning_rate": 0}, {4: 1, 12: 0.5, 20: 0}),
        ({"schedule": "linear"}, {2: 0.5, 4: 1, 8: 0.775, 12: 0.55, 20: 0.1}),
        ({"schedule": "constant"}, {1: 0.25, 3: 0.75, 4: 1, 12: 1, 20: 1}),
        ({"schedule": "wsd", "decay": 0.25}, {1: 0.25, 4: 1, 12: 1, 15: 1, 16: 0.82, 18: 0.46, 20: 0.1}),
    ],
    ids=["cosine", "cosine-to-0", "linear", "constant", "wsd"],
)
def test_the_learning_rate_rises_stays_and_falls_as_its_schedule_says(options, shares, data, tmp_path, monkeypatch):
    used = {}
    step = CPULearner.step

    def watched(learner, batch, rate):
        loss = step(learner, batch, rate)
        used[len(used) + 1] = {group["lr"] for group in learner._optimizer.param_groups}
        return loss

    monkeypatch.setattr(CPULearner, "step", watched)
    job = data.job(tmp_path, 20, options={"log_every": 1, "warmup": 0.2, "batch_size": 1, **options})
    job = dataclasses.replace(job, tokens=20 * CONTEXT)
    train(job)
    logged = {line["step"]: line["learning_rate"] for line in lines(job)}
    assert used == {update: {rate} for update, rate in logged.items()}
    assert {update: logged[update] / RATE for update in shares} == pytest.approx(shares)


def spoil_weights(monkeypatch, at):
    """After so many updates a weight is not a number."""
    step, count = CPULearner.step, [0]

    def spoiling(learner, batch, rate):
        loss = step(learner, batch, rate)
        count[0] += 1
        if count[0] == at:
            learner.gpt.decoder.final_layernorm.weight.data[3] = math.nan
        return loss

    monkeypatch.setattr(CPULearner, "step", spoiling)


def spoil_gradient(monkeypatch, at):
    """The gradient of this update is not a number, its loss is."""
    clip, count = torch.nn.utils.clip_grad_norm_, [0]

    def spoiling(weights, limit):
        weights = list(weights)
        count[0] += 1
        if count[0] == at:
            weights[0].grad[0, 0] = math.nan
        return clip(weights, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiling)


@pytest.mark.parametrize(
    ("spoil", "at", "update", "what"),
    [(spoil_weights, 7, 8, "loss"), (spoil_gradient, 10, 10, "norm of the gradient"), (spoil_gradient, 5, 6, "loss")],
    ids=["weight", "gradient-as-a-checkpoint-is-due", "gradient"],
)
def test_what_is_not_a_number_ends_training_with_the_documents(
    spoil, at, update, what, data, trained, samples, tmp_path, monkeypatch
):
    job = data.job(tmp_path, 42, options={"save_every": 5, "eval_every": 10})
    with monkeypatch.context() as patch:
        spoil(patch, at)
        if at == 5:
            patch.setattr(loop.Checkpoints, "save", lambda *_: pytest.fail("a checkpoint of a spoilt model"))
            job = data.job(tmp_path, 42, options={"save_every": 6, "eval_every": 10, "log_every": 6})
        with pytest.raises(QuadmixError, match=f"quadmix, seed 3: the {what} of update {update} is nan") as caught:
            train(job)
    assert not isinstance(caught.value, InputError)
    bad = json.loads((job.place / "bad_batch.json").read_text(encoding="utf-8"))
    documents = samples.documents_of(update - 1)
    assert bad == {"update": update, "what": what, "value": "nan", "documents": documents}
    assert len(documents) >= 4
    assert all(name in str(caught.value) for name in documents[:20])
    assert "lower learning_rate or grad_clip" in str(caught.value)
    assert str(job.place / "bad_batch.json") in str(caught.value)
    assert checkpoints(job) == ([] if at == 5 else [5])
    assert not (job.results.root / job.model).exists()
    if at != 5:  # without the fault it goes on as if nothing had been
        train(job)
        assert outcome(job)["weights"] == outcome(trained[0])["weights"]
        assert losses(job) == losses(trained[0])


def test_a_learning_rate_without_bounds_is_named(data, tmp_path):
    job = data.job(tmp_path, 42, options={"learning_rate": 1e30, "save_every": 6})
    with pytest.raises(QuadmixError, match=r"the loss of update \d is (nan|inf).*lower learning_rate"):
        train(job)
    assert checkpoints(job) == []


@pytest.mark.parametrize(("first", "refused"), [(3.3, True), (3.6, False)])
def test_a_first_loss_far_below_the_entropy_is_refused(first, refused, data, tmp_path, monkeypatch):
    """As of a model that sees what it predicts; half of 6.87 is the bound."""
    step = CPULearner.step
    monkeypatch.setattr(CPULearner, "step", lambda *given: step(*given) * 0 + first)
    job = data.job(tmp_path, 4)
    if not refused:
        train(job)
        assert lines(job)[0]["loss"] == pytest.approx(3.6)
        return
    with pytest.raises(InputError, match=r"quadmix: the first loss is 3\.300 nats.*8\.318.*6\.873.*export them again"):
        train(job)
    assert checkpoints(job) == []


def test_a_batch_that_processes_cannot_share_is_refused(data, tmp_path):
    job = data.job(tmp_path)
    with pytest.raises(InputError, match="batch_size 4 does not divide among 3 processes"):
        loop.pretrain(trainer(job), job, 0, 3)


def test_a_model_that_is_trained_is_only_measured_again(data, trained, tmp_path, monkeypatch):
    job = data.job(tmp_path, 42, options={"eval_every": 10})
    with monkeypatch.context() as patch:
        patch.setattr(result, "write_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(job)
    assert job.results.entry(job.part) is None
    monkeypatch.setattr(CPULearner, "step", lambda *_: pytest.fail("trained again"))
    train(job)
    assert outcome(job) == outcome(trained[0])


def test_the_model_ends_a_text_as_the_data_do(trained):
    job, _ = trained
    config = json.loads((job.results.root / job.model / "config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == EOD
    assert config["vocab_size"] == VOCABULARY
