"""The decoder computes what transformers' Llama computes, and its files load there."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from quadmix_plugin.errors import InputError
from quadmix_plugin.proxy.model import SHAPES, Decoder, Shape, load_weights, named_shape, save_weights
from quadmix_plugin.proxy.output_loss import output_loss

SMALL = Shape(layers=2, width=32, heads=4, ffn=48, context=64, vocabulary=101)
KINDS = {
    "plain": SMALL,
    "grouped": dataclasses.replace(SMALL, kv_heads=2),
    "tied": dataclasses.replace(SMALL, tied=True),
}

LLAMA = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def saved(model, folder):
    save_weights(model, folder / "model.safetensors", folder / "config.json", 0)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 101, (3, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
def test_logits_and_gradients_equal_those_of_transformers(shape, ids, tmp_path):
    ours = Decoder(shape).initialise(3)
    theirs = saved(ours, tmp_path)
    assert theirs.config.model_type == "llama"
    for model in (ours, theirs):
        out = model(ids)
        logits = out if torch.is_tensor(out) else out.logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-5, rtol=1e-4)
    expected = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name].grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("pair", [("mlp.gate_proj", "mlp.up_proj"), ("self_attn.q_proj", "self_attn.k_proj")])
def test_swapped_weights_give_other_logits(pair, ids, tmp_path):
    ours = Decoder(SMALL).initialise(3)
    theirs = saved(ours, tmp_path)
    state = theirs.state_dict()
    one, two = (f"model.layers.0.{name}.weight" for name in pair)
    state[one], state[two] = state[two].clone(), state[one].clone()
    theirs.load_state_dict(state)
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() > 1e-2


def test_a_position_sees_only_the_past(ids):
    model = Decoder(SMALL).initialise(0)
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 101
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().max() > 0.1


@pytest.mark.parametrize(("low", "near"), [(None, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_chunked_loss_equals_the_plain_one_with_its_gradients(low, near):
    generator = torch.Generator().manual_seed(0)
    n, width, vocabulary = 300, 16, 9000  # several chunks, the last one not full
    hidden = torch.randn(n, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator).mul_(0.3).requires_grad_()
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    plain = functional.cross_entropy(hidden @ weight.t(), targets)
    expected = torch.autograd.grad(plain, (hidden, weight))
    chunked = output_loss(hidden, weight, targets, low)
    found = torch.autograd.grad(3 * chunked, (hidden, weight))
    assert chunked.item() == pytest.approx(plain.item(), rel=near)
    for one, other in zip(found, expected, strict=True):
        assert float((one - 3 * other).norm() / (3 * other).norm()) < near


def test_initial_weights_depend_on_the_seed_alone():
    one, two, other = (torch.cat([w.flatten() for w in Decoder(SMALL).initialise(s).parameters()]) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", SHAPES)
def test_the_stated_number_of_parameters_is_the_real_one(name):
    shape = named_shape(name, vocabulary=50_432)
    with torch.device("meta"):
        assert sum(w.numel() for w in Decoder(shape).parameters()) == shape.parameters
    assert named_shape("530m", vocabulary=50_432).parameters == 530_566_400
    assert 27.0e6 < named_shape("proxy-1m", vocabulary=50_432).parameters < 27.2e6


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [({"layers": 0}, "layers"), ({"heads": 3}, "heads"), ({"kv_heads": 3}, "groups"), ({"depth": 2}, "depth")],
)
def test_impossible_shapes_are_refused(numbers, reason):
    with pytest.raises(InputError, match=reason):
        named_shape("proxy-tiny", **numbers)
    with pytest.raises(InputError, match="proxy-1m"):
        named_shape("proxy-2m")


def test_too_long_a_row_is_refused():
    with pytest.raises(InputError, match="context of 64"):
        Decoder(SMALL)(torch.zeros(1, 65, dtype=torch.long))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = Decoder(SMALL).initialise(0)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        saved(model, tmp_path)


@pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
def test_saved_weights_are_read_back_bit_by_bit(shape, tmp_path):
    ours = Decoder(dataclasses.replace(shape, rope_theta=5e5, norm_eps=1e-6)).initialise(3)
    saved(ours, tmp_path)
    back = load_weights(tmp_path)
    assert back.shape == ours.shape
    assert back.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(weight, back.state_dict()[name]) for name, weight in ours.state_dict().items())


@pytest.mark.parametrize(
    ("numbers", "shard", "dtype"),
    [
        ({}, "10KB", torch.float32),
        ({"tie_word_embeddings": True}, "5GB", torch.float32),
        ({"num_key_value_heads": 2}, "5GB", torch.bfloat16),
    ],
    ids=["sharded", "tied", "grouped"],
)
def test_a_model_that_transformers_saved_has_the_same_logits(numbers, shard, dtype, ids, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA, **numbers)).to(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "10KB")
    ours, theirs = load_weights(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"head_dim": 16}, "head_dim is 16"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters"),
        ({"intermediate_size": 64}, r"down_proj.*\[32, 48\].*\[32, 64\]"),
        ({"num_hidden_layers": 3}, r"no weight model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"unknown weight model\.layers\.1"),
        ({"tie_word_embeddings": True}, r"unknown weight lm_head"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_model_than_ours_is_refused(changed, reason, tmp_path):
    saved(Decoder(SMALL).initialise(0), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(InputError, match=reason):
        load_weights(tmp_path)


def test_weights_that_are_no_floating_numbers_are_refused(tmp_path):
    saved(Decoder(SMALL).initialise(0), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.int8)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight.*int8"):
        load_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_weights(tmp_path)
