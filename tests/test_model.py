"""The decoder computes what transformers' Llama computes, and its files load there."""

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from quadmix_plugin.errors import InputError
from quadmix_plugin.proxy.model import SHAPES, Decoder, Shape, named_shape, save_weights
from quadmix_plugin.proxy.output_loss import output_loss

SMALL = Shape(layers=2, width=32, heads=4, ffn=48, context=64, vocabulary=101)
KINDS = {
    "plain": SMALL,
    "grouped": dataclasses.replace(SMALL, kv_heads=2),
    "tied": dataclasses.replace(SMALL, tied=True),
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
