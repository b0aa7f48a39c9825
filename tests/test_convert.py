"""Checkpoints and Llama folders become one another without a change of weights; a checkpoint brings no code with it."""

import dataclasses
import os
import pickle
import subprocess
import sys

import pytest
import torch
from pretrain_jobs import TOKENIZER
from transformers import AutoModelForCausalLM, AutoTokenizer

from quadmix_plugin.convert import convert
from quadmix_plugin.errors import InputError
from quadmix_plugin.proxy.checkpoint_files import read_table, read_weights
from quadmix_plugin.proxy.megatron_checkpoint import load_checkpoint, save_state
from quadmix_plugin.proxy.megatron_model import (
    from_megatron,
    gpt_model,
    set_weights,
    start_parallel_state,
    stop_parallel_state,
    to_megatron,
)
from quadmix_plugin.proxy.model import Decoder, Shape, load_weights

CPU = torch.device("cpu")
SMALL = Shape(layers=2, width=32, heads=4, ffn=48, context=64, vocabulary=4096)
KINDS = {
    "plain": SMALL,
    "grouped": dataclasses.replace(SMALL, kv_heads=2),
    "tied": dataclasses.replace(SMALL, tied=True, kv_heads=1, rope_theta=5e5, norm_eps=1e-6),
}
EOD = "<|endoftext|>"


@pytest.fixture
def group():
    start_parallel_state(CPU)
    yield
    stop_parallel_state()


def save(shape, folder):
    """A checkpoint of a GPTModel with weights of seed 3, and a file of an optimizer's state beside them."""
    model = gpt_model(shape, CPU)
    set_weights(model, to_megatron(Decoder(shape).initialise(3).state_dict(), shape))
    save_state({**model.sharded_state_dict(), "iteration": 7}, folder, CPU)
    return model


@pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
def test_a_checkpoint_becomes_a_model_that_transformers_loads_and_comes_back(shape, tmp_path, group):
    megatron = save(shape, tmp_path / "iter_0000007")
    given = {"heads": 4, "context": 64, "rope_theta": shape.rope_theta, "norm_eps": shape.norm_eps}
    convert(tmp_path / "iter_0000007", tmp_path / "model", TOKENIZER, EOD, **given)
    ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(1))
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = megatron(ids, torch.arange(40).expand(2, -1), None), llama(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert load_weights(tmp_path / "model").shape == shape
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == EOD
    stop_parallel_state()
    convert(tmp_path / "model", tmp_path / "back", None, None)
    assert not torch.distributed.is_initialized()
    start_parallel_state(CPU)
    other = gpt_model(shape, CPU)
    load_checkpoint(other, tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(megatron.parameters(), other.parameters(), strict=True))


def test_weights_are_read_without_megatron_or_a_group(tmp_path, group):
    save(SMALL, tmp_path / "checkpoint")
    stop_parallel_state()
    found = from_megatron(read_weights(tmp_path / "checkpoint"), SMALL)
    expected = Decoder(SMALL).initialise(3).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_what_cannot_be_converted_is_named_and_nothing_is_left(tmp_path, group):
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    save(SMALL, checkpoint)
    (tmp_path / "empty").mkdir()
    shape = {"heads": 4, "context": 64}
    for source, tokenizer, numbers, reason in (
        (tmp_path / "empty", TOKENIZER, shape, "neither a model .* nor a checkpoint"),
        (checkpoint, None, shape, "give --tokenizer"),
        (checkpoint, TOKENIZER, {}, "heads and context; give --heads and --context"),
        (checkpoint, TOKENIZER, {"context": 64}, "does not say its heads"),
        (checkpoint, TOKENIZER, {"heads": 5, "context": 64}, "not of 5 heads"),
    ):
        with pytest.raises(InputError, match=reason):
            convert(source, out, tokenizer, EOD, **numbers)
    with pytest.raises(InputError, match="no token '</s>'"):
        convert(checkpoint, out, TOKENIZER, "</s>", **shape)
    with pytest.raises(InputError, match="exists already"):
        convert(checkpoint, tmp_path / "empty", TOKENIZER, EOD, **shape)
    data = next(checkpoint.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        convert(checkpoint, out, TOKENIZER, EOD, **shape)
    data.unlink()
    with pytest.raises(InputError, match="damaged"):
        convert(checkpoint, out, TOKENIZER, EOD, **shape)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "empty"]


class _Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function",
    [os.system, eval, torch.load, getattr, __import__, subprocess.Popen, torch.hub.load],
    ids=lambda each: each.__name__,
)
def test_a_table_that_calls_anything_is_refused_before_it_does(function, tmp_path, group):
    marker = tmp_path / "marker"
    save(SMALL, tmp_path / "checkpoint")
    argument = f"open({str(marker)!r}, 'w')" if function is eval else f"touch {marker}"
    (tmp_path / "checkpoint" / ".metadata").write_bytes(pickle.dumps(_Attack(function, argument)))
    model = gpt_model(SMALL, CPU)
    for read in (read_table, read_weights, lambda folder: load_checkpoint(model, folder)):
        with pytest.raises(InputError, match="which no checkpoint needs"):
            read(tmp_path / "checkpoint")
    assert not marker.exists()


def test_what_is_no_table_is_refused(tmp_path):
    for content in (b"", b"text", pickle.dumps({"a": 1}), pickle.dumps(torch.float32)):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(InputError, match="table of contents"):
            read_table(tmp_path)


def test_the_command_converts(tmp_path, group):
    save(SMALL, tmp_path / "checkpoint")
    command = [sys.executable, "-m", "quadmix_plugin", "convert", str(tmp_path / "checkpoint"), str(tmp_path / "model")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "give --tokenizer" in refused.stderr
    command += ["--tokenizer", str(TOKENIZER), "--heads", "4", "--context", "64", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert '"made": "a model' in done.stdout
    assert load_weights(tmp_path / "model").shape == SMALL
