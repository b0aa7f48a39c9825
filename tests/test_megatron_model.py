"""The decoder and GPTModel of Megatron-Core compute the same from each other's weights, and from nothing else."""

import dataclasses
import gc
import os

import psutil
import pytest
import torch
from cpu_as_cuda import cpu_as_cuda
from transformers import LlamaConfig, LlamaForCausalLM

from quadmix_plugin.errors import InputError
from quadmix_plugin.proxy import megatron_model
from quadmix_plugin.proxy.megatron_checkpoint import load_checkpoint, save_state
from quadmix_plugin.proxy.megatron_model import from_megatron, gpt_model, to_megatron
from quadmix_plugin.proxy.model import Decoder, Shape, hugging_face_config

CUDA = torch.device("cuda")
SMALL = Shape(layers=2, width=32, heads=4, ffn=48, context=64, vocabulary=101)
KINDS = {
    "plain": SMALL,
    "grouped": dataclasses.replace(SMALL, kv_heads=2),
    "tied": dataclasses.replace(SMALL, tied=True, kv_heads=1, rope_theta=5e5, norm_eps=1e-6),
}
every_kind = pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)


@pytest.fixture
def gpu():
    with cpu_as_cuda():
        megatron_model.start_parallel_state(CUDA)
        yield


@pytest.fixture
def ids():
    return torch.randint(0, 101, (3, 40), generator=torch.Generator().manual_seed(1))


def logits(shape, state, ids):
    """Of a GPTModel with these weights, its own names."""
    model = gpt_model(shape, CUDA)
    model.load_state_dict(dict(state))
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


@every_kind
def test_our_weights_give_a_gpt_model_the_same_logits(shape, ids, gpu):
    ours = Decoder(shape).initialise(3)
    with torch.no_grad():
        expected = ours(ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(
        logits(shape, to_megatron(ours.state_dict(), shape), ids), expected, atol=1e-5, rtol=1e-4
    )


@every_kind
def test_weights_come_back_bit_by_bit(shape, gpu):
    ours = Decoder(shape).initialise(3).state_dict()
    model = gpt_model(shape, CUDA)
    model.load_state_dict(to_megatron(ours, shape))
    assert equal(from_megatron(model.state_dict(), shape), dict(ours))


@every_kind
def test_llama_of_transformers_converts_both_ways(shape, ids, gpu):
    torch.manual_seed(0)
    config = LlamaConfig(**{**hugging_face_config(shape), "initializer_range": 0.2})
    llama, other = (LlamaForCausalLM(config).eval() for _ in range(2))
    state = to_megatron(llama.state_dict(), shape)
    other.load_state_dict(from_megatron(state, shape))
    with torch.no_grad():
        expected, back = llama(ids).logits, other(ids).logits
    assert torch.equal(expected, back)
    torch.testing.assert_close(logits(shape, state, ids), expected, atol=1e-5, rtol=1e-4)


def test_plausible_but_wrong_layouts_give_other_logits(ids, gpu):
    shape = KINDS["grouped"]
    ours = Decoder(shape).initialise(3)
    state = to_megatron(ours.state_dict(), shape)
    prefix = "model.layers.0.self_attn."
    in_a_row = torch.cat([ours.state_dict()[f"{prefix}{name}_proj.weight"] for name in "qkv"])
    fc1 = state["decoder.layers.0.mlp.linear_fc1.weight"]
    with torch.no_grad():
        expected = ours(ids)
    for name, wrong in (("self_attention.linear_qkv", in_a_row), ("mlp.linear_fc1", torch.cat(fc1.chunk(2)[::-1]))):
        name = f"decoder.layers.0.{name}.weight"  # noqa: PLW2901
        assert wrong.shape == state[name].shape
        assert (logits(shape, {**state, name: wrong}, ids) - expected).abs().max() > 0.05
    naive = from_megatron({**state, "decoder.layers.0.self_attention.linear_qkv.weight": in_a_row}, shape)
    assert not equal(naive, dict(ours.state_dict()))


@every_kind
def test_names_of_transformer_engine_are_known(shape):
    ours = Decoder(shape).initialise(3).state_dict()
    names = {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    }
    theirs = {}
    for name, weight in to_megatron(ours, shape).items():
        local = next((local for local in names if name.endswith(local)), None)
        theirs[name.removesuffix(local) + names[local] if local else name] = weight
    assert sum("layer_norm_weight" in name for name in theirs) == 2 * shape.layers
    theirs["decoder.layers.0.self_attention.core_attention._extra_state"] = torch.zeros(3)
    theirs["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
    assert equal(from_megatron(theirs, shape), dict(ours))


@pytest.mark.parametrize("convert", [to_megatron, from_megatron])
def test_weights_of_another_model_are_refused(convert):
    ours = Decoder(SMALL).initialise(3).state_dict()
    state = dict(ours) if convert is to_megatron else to_megatron(ours, SMALL)
    last = next(reversed(state))
    for wrong, reason in (
        ({name: weight for name, weight in state.items() if name != last}, f"{last} is missing"),
        ({**state, "model.bias": torch.zeros(1)}, "model.bias has no place"),
        ({**state, last: torch.zeros(100, 32)}, r"\[100, 32\], not \[101, 32\]"),
    ):
        with pytest.raises(InputError, match=reason):
            convert(wrong, SMALL)
    with pytest.raises(InputError):
        convert(state, dataclasses.replace(SMALL, kv_heads=2))


def test_a_distributed_checkpoint_is_read_back_bit_by_bit(gpu, tmp_path):
    for kind, shape in KINDS.items():
        ours = Decoder(shape).initialise(3).state_dict()
        model, other = gpt_model(shape, CUDA), gpt_model(shape, CUDA)
        model.load_state_dict(to_megatron(ours, shape))
        other.load_state_dict(to_megatron(Decoder(shape).initialise(4).state_dict(), shape))
        save_state(model.sharded_state_dict(), tmp_path / kind, CUDA)
        load_checkpoint(other, tmp_path / kind)
        assert equal(from_megatron(other.state_dict(), shape), dict(ours))
        with pytest.raises(InputError, match="not empty"):
            save_state(model.sharded_state_dict(), tmp_path / kind, CUDA)
        for change in ({"vocabulary": 100}, {"layers": 3}, {"ffn": 64}, {"tied": not shape.tied}):
            with pytest.raises(InputError, match="no checkpoint of this model"):
                load_checkpoint(gpt_model(dataclasses.replace(shape, **change), CUDA), tmp_path / kind)
    with pytest.raises(InputError, match="no table of contents"):
        load_checkpoint(other, tmp_path / "none")


def test_one_group_on_loopback_is_kept_and_leaves_nothing():
    def listening():
        return {found.laddr for found in psutil.Process().net_connections("inet") if found.status == "LISTEN"}

    gc.collect()
    before = listening()
    with cpu_as_cuda():
        assert not torch.distributed.is_initialized()
        for _ in range(2):
            megatron_model.start_parallel_state(CUDA)
            group = torch.distributed.group.WORLD
        new = listening() - before
        assert len(new) > 1
        assert {address.ip for address in new} == {"127.0.0.1"}
        assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"  # which cannot be seen here
        megatron_model.start_parallel_state(CUDA)
        assert torch.distributed.group.WORLD is group
        assert listening() - before == new
        del group
    assert not torch.distributed.is_initialized()
    assert not listening() - before


def test_a_process_of_another_group_is_refused(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(InputError, match="1 processes over gloo, where 1 over nccl"):
            megatron_model.start_parallel_state(CUDA)
    finally:
        megatron_model.stop_parallel_state()
    assert not torch.distributed.is_initialized()


def test_a_model_without_vocabulary_is_refused():
    with pytest.raises(InputError, match="vocabulary"):
        gpt_model(dataclasses.replace(SMALL, vocabulary=0), CUDA)
