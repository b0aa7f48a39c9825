"""Megatron-Core trains a proxy to the losses of the built-in trainer: same batches, same initial weights.

What needs CUDA runs on the CPU as it is (``cpu_as_cuda``): the parallel state, both wrappers of the model, the
optimizers and the schedule of passes are megatron-core's own.
"""

import gc
import weakref
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from cpu_as_cuda import cpu_as_cuda

from quadmix_plugin import models
from quadmix_plugin.corpus import list_files
from quadmix_plugin.errors import InputError
from quadmix_plugin.megatron import write_documents
from quadmix_plugin.proxy.megatron_checkpoint import load_checkpoint, load_state, save_state
from quadmix_plugin.proxy.megatron_learner import GPULearner, PassDataset
from quadmix_plugin.proxy.megatron_model import from_megatron, gpt_model, quiet_import, stop_parallel_state
from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer
from quadmix_plugin.proxy.model import Decoder
from quadmix_plugin.proxy.pieces import cut_pieces
from quadmix_plugin.proxy.pool import TokenPool
from quadmix_plugin.proxy.trainer import TorchTrainer
from quadmix_plugin.proxy.validation import choose_rows, read_rows, tokenise_rows, validation_sets
from quadmix_plugin.stages.train_proxies import trainer_resources

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
CUDA = torch.device("cuda")
SHAPE = {"width": 32, "ffn": 64, "heads": 2, "context": 64}
PLAIN = {"shape_options": SHAPE}
GROUPED = {
    "shape_options": {**SHAPE, "heads": 4, "kv_heads": 2, "tied": True},
    "weight_decay": 0.3,
    "betas": (0.8, 0.97),
    "grad_clip": 0.4,
    "schedule": "linear",
}


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(str(QUICKSTART / "models" / "tokenizer"))


@pytest.fixture(scope="module")
def sets(tokenizer):
    rows = read_rows(list_files(str(QUICKSTART / "validation.jsonl")), "prompt", "response", "task")
    return validation_sets(tokenise_rows(choose_rows(rows, 20), tokenizer, 0, 64), "search")


@pytest.fixture(scope="module")
def pool_prefix(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    texts = pq.read_table(QUICKSTART / "corpus.parquet", columns=["text"]).slice(0, 200)["text"].to_pylist()
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    write_documents((e.ids for e in encodings), folder / "p.bin", folder / "p.idx", 4096, 0)
    return str(folder / "p")


@pytest.fixture(scope="module")
def pieces(pool_prefix):
    """158 of them: 39 batches of 4, and one of 2."""
    return cut_pieces(TokenPool.open([pool_prefix]), None, None, 64, 158 * 64, 1)[:]


@pytest.fixture(scope="module")
def expected(pieces, sets):
    """What the built-in trainer makes of them, in float32."""
    return [
        TorchTrainer(**options, dtype="float32").train(pieces, sets, 5, 4096, eval_at=(0.5,))
        for options in (PLAIN, GROUPED)
    ]


@pytest.fixture
def gpu():
    with cpu_as_cuda():
        yield


def farthest(one, other):
    """The largest difference of two results in any loss of the curve."""
    assert [point.step for point in one.curve] == [point.step for point in other.curve]
    assert [point.losses.keys() for point in one.curve] == [point.losses.keys() for point in other.curve]
    return max(
        abs(a - b)
        for p, q in zip(one.curve, other.curve, strict=True)
        for a, b in zip((p.train_loss, *p.losses.values()), (q.train_loss, *q.losses.values()), strict=True)
    )


@pytest.mark.parametrize(
    ("i", "options"),
    [(0, PLAIN), (1, {**GROUPED, "device": "cuda:0", "micro_batch_size": 3})],
    ids=["plain", "grouped-tied"],
)
def test_losses_agree_with_the_built_in_trainer(i, options, expected, pieces, sets, gpu):
    trainer = MegatronTrainer(**options, dtype="float32")
    found = trainer.train(pieces, sets, 5, 4096, eval_at=(0.5,))
    assert len(found.curve) == 20
    assert sum(bool(point.losses) for point in found.curve) == 2
    assert found.curve[0].train_loss - found.curve[-1].train_loss > 0.3
    assert farthest(found, expected[i]) < 2e-5
    for name, weight in expected[i].model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], weight, atol=2e-4, rtol=0)
    assert found.tokens_seen == 158 * 64


def test_another_weight_decay_shows_in_the_losses(expected, pieces, sets, gpu):
    found = MegatronTrainer(**PLAIN, dtype="float32", weight_decay=0.0).train(pieces, sets, 5, 4096, eval_at=(0.5,))
    assert farthest(found, expected[0]) > 2e-4


def test_only_matrices_decay(gpu):
    trainer = MegatronTrainer(**PLAIN, weight_decay=0.3)
    learner = trainer.learner(trainer.model_shape(4096), 0, CUDA)
    decay = {}
    for group in learner._optimizer.param_groups:
        for weight in group["params"]:
            decay.setdefault(weight.ndim, set()).add(group["weight_decay"])
    assert decay == {1: {0.0}, 2: {0.3}}


def test_bfloat16_keeps_exact_weights_and_stays_close(expected, pieces, sets, gpu):
    trainer = MegatronTrainer(**PLAIN)
    learner = trainer.learner(trainer.model_shape(4096), 5, CUDA)
    assert {(weight.dtype, weight.main_grad.dtype) for weight in learner._gpt.parameters()} == {
        (torch.bfloat16, torch.float32)
    }
    exact = Decoder(trainer.model_shape(4096)).initialise(5).state_dict()
    assert all(torch.equal(weight, exact[name]) for name, weight in learner.decoder().state_dict().items())
    found = trainer.train(pieces, sets, 5, 4096, eval_at=(0.5,))
    assert {weight.dtype for weight in found.model.parameters()} == {torch.float32}
    assert 1e-5 < farthest(found, expected[0]) < 0.03


def test_models_follow_one_another_in_one_process_and_are_let_go(pieces, gpu, request):
    trainer = MegatronTrainer(**PLAIN, dtype="float32")
    batch = torch.from_numpy(pieces[:4].astype("int64"))
    former, groups, losses = [], set(), []
    gc.disable()  # or it might come by chance
    request.addfinalizer(gc.enable)
    for seed in (0, 1, 0):
        learner = trainer.learner(trainer.model_shape(4096), seed, CUDA)
        losses.append([float(learner.step(batch, 1e-2)) for _ in range(3)])
        former += [weakref.ref(learner._gpt), weakref.ref(next(learner._gpt.parameters()))]
        groups.add(id(torch.distributed.group.WORLD))
        del learner
        assert not any(one() is not None for one in former)
    assert len(groups) == 1
    assert losses[0] == losses[2] != losses[1]
    assert losses[0][0] > losses[0][1] > losses[0][2]


def test_items_are_those_of_megatrons_own_data_set(pool_prefix):
    import numpy as np

    with quiet_import():
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        split="1",
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    source = IndexedDataset(pool_prefix)
    theirs = GPTDataset(source, pool_prefix, np.arange(200, dtype=np.int32), None, Split.train, config)
    items = [theirs[i] for i in range(5)]
    whole = torch.stack([torch.cat([item["tokens"], item["labels"][-1:]]) for item in items])
    ours = list(PassDataset(whole, 3))
    assert [len(item["tokens"]) for item in ours] == [3, 2]
    for key in items[0]:
        together = torch.cat([item[key] for item in ours])
        assert torch.equal(together, torch.stack([item[key] for item in items]))
        assert together.dtype == items[0][key].dtype
    assert all(item.keys() == items[0].keys() for item in ours)


class _Tokenizer:
    eod, pad, vocab_size, unique_identifiers = 0, -1, 4096, {"class": "tokenizer"}


def test_a_checkpoint_holds_weights_and_optimizer(pieces, gpu, tmp_path):
    batches = torch.from_numpy(pieces[:12].astype("int64")).split(4)
    for dtype in ("float32", "bfloat16"):
        trainer, folder = MegatronTrainer(**GROUPED, dtype=dtype), tmp_path / dtype
        shape = trainer.model_shape(4096)
        learner, other = (trainer.learner(shape, seed, CUDA) for seed in (0, 1))
        for batch in batches:
            learner.step(batch, 1e-2)
        save_state(learner.state(), folder, CUDA)
        model = gpt_model(shape, CUDA, learner._gpt.config.params_dtype)
        load_checkpoint(model, folder)
        read, trained = (from_megatron(each.state_dict(), shape) for each in (model, learner._gpt))
        assert all(torch.equal(weight, trained[name]) for name, weight in read.items())
        other.load(load_state(other.state(loading=True), folder))
        onwards = [[float(each.step(batch, 1e-2)) for batch in batches] for each in (learner, other)]
        assert onwards[0] == onwards[1]


@pytest.fixture
def alone():
    yield
    stop_parallel_state()


@pytest.mark.parametrize(
    ("i", "options"), [(0, PLAIN), (1, {**GROUPED, "micro_batch_size": 3})], ids=["plain", "grouped-tied"]
)
def test_on_a_cpu_losses_agree_too_and_cuda_is_not_asked_for(i, options, expected, pieces, sets, alone):
    found = MegatronTrainer(**options, device="cpu").train(pieces, sets, 5, 4096, eval_at=(0.5,))
    assert farthest(found, expected[i]) < 2e-5
    assert not torch.cuda.is_initialized()


def test_the_distributed_optimizer_takes_the_same_steps_and_goes_on_from_its_checkpoint(pieces, gpu, tmp_path):
    trainer, batches = (
        MegatronTrainer(**GROUPED, dtype="float32"),
        torch.from_numpy(pieces[:24].astype("int64")).split(4),
    )
    shape = trainer.model_shape(4096)
    plain = trainer.learner(shape, 0, CUDA)
    learner, other = (GPULearner(trainer, shape, seed, CUDA, distributed=True) for seed in (0, 1))
    for batch in batches[:3]:
        losses = [float(each.step(batch, 1e-2)) for each in (plain, learner)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    save_state(learner.state(), tmp_path / "checkpoint", CUDA)
    other.load(load_state(other.state(loading=True), tmp_path / "checkpoint"))
    onwards = [[float(each.step(batch, 1e-2)) for batch in batches[3:]] for each in (learner, other)]
    assert onwards[0] == onwards[1]
    assert all(torch.equal(a, b) for a, b in zip(learner.gpt.parameters(), other.gpt.parameters(), strict=True))


@pytest.mark.parametrize("options", [PLAIN, GROUPED], ids=["plain", "grouped-tied"])
def test_on_a_cpu_a_checkpoint_goes_on_bit_by_bit(options, pieces, tmp_path, alone):
    batches = torch.from_numpy(pieces[:24].astype("int64")).split(4)
    trainer, cpu = MegatronTrainer(**options), torch.device("cpu")
    learner, other = (trainer.learner(trainer.model_shape(4096), seed, cpu) for seed in (0, 1))
    for batch in batches[:3]:
        learner.step(batch, 1e-2)
    save_state(learner.state(), tmp_path / "checkpoint", cpu)
    other.load(load_state(other.state(loading=True), tmp_path / "checkpoint"))
    onwards = [[float(each.step(batch, 1e-2)) for batch in batches[3:]] for each in (learner, other)]
    assert onwards[0] == onwards[1]
    weights = zip(learner.gpt.parameters(), other.gpt.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in weights)


def test_what_the_device_cannot_do_is_refused_before_any_work():
    for options, reason in (
        ({"device": "cuda"}, "0 usable"),
        ({"dtype": "bfloat16"}, "bfloat16 on device 'auto', a CPU here; give float32"),
        ({"gpus": 2}, "gpus 2, the device is a CPU"),
    ):
        with pytest.raises(InputError, match=reason):
            trainer_resources("megatron", options)  # as a run asks before it starts
    for name in ("micro_batch_size", "gpus", "save_every", "keep", "log_every"):
        with pytest.raises(InputError, match=f"{name} -1"):
            MegatronTrainer(**{name: -1})
    with cpu_as_cuda(), pytest.raises(InputError, match="gpus 2, this machine has 1"):
        MegatronTrainer(gpus=2).require_device()
