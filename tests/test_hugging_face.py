"""A trained model loads as any model of transformers does, computes the same there, and ends its texts."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from pretrain_jobs import EOD, QUICKSTART, TOKENIZER, VOCABULARY
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from quadmix_plugin import models
from quadmix_plugin.errors import InputError
from quadmix_plugin.hugging_face import FILES, write_model
from quadmix_plugin.proxy.megatron_model import (
    from_megatron,
    gpt_model,
    set_weights,
    start_parallel_state,
    stop_parallel_state,
    to_megatron,
)
from quadmix_plugin.proxy.model import Decoder, Shape, load_weights
from quadmix_plugin.store import Step

CPU = torch.device("cpu")
PLAIN = Shape(layers=2, width=32, heads=4, ffn=48, context=64, vocabulary=VOCABULARY)
KINDS = {
    "plain": PLAIN,
    "grouped": dataclasses.replace(PLAIN, kv_heads=2),
    "tied": dataclasses.replace(PLAIN, tied=True, rope_theta=5e5, norm_eps=1e-6),
    "grouped-tied": dataclasses.replace(PLAIN, tied=True, kv_heads=1),
}
every_kind = pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
TRANSFORMER_ENGINES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@pytest.fixture
def gpt():
    """Logits of a GPTModel on the CPU with these weights."""
    start_parallel_state(CPU)

    def logits(shape, weights, ids):
        model = gpt_model(shape, CPU)
        set_weights(model, weights)
        with torch.no_grad():
            return model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)

    yield logits
    stop_parallel_state()


@pytest.fixture
def ids():
    return torch.randint(0, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))


def written(root, model, tokenizer=TOKENIZER):
    """The folder of a model in a run directory."""
    step = Step(root, "pretrain", "key")
    write_model(step, "models/m", model, EOD, tokenizer)
    assert {entry.path for entry in step.entries()} == {f"models/m/{name}" for name in FILES}
    return root / "models" / "m"


def loaded(folder) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def theirs(folder, ids):
    with torch.no_grad():
        return loaded(folder)(ids).logits


def named_as_transformer_engine(weights):
    """The weights under the names that its layers have, with the states that it adds."""
    found = {"decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(3)}
    for name, weight in weights.items():
        local = next((local for local in TRANSFORMER_ENGINES if name.endswith(local)), None)
        found[name.removesuffix(local) + TRANSFORMER_ENGINES[local] if local else name] = weight
    assert sum(name.endswith("layer_norm_weight") for name in found) == 4
    return found


@every_kind
@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_logits_of_all_three_agree(shape, layers, gpt, ids, tmp_path):
    ours = Decoder(shape).initialise(3)
    weights = to_megatron(ours.state_dict(), shape)
    trained = named_as_transformer_engine(weights) if layers == "transformer_engine" else weights
    model = Decoder(shape)
    model.load_state_dict(from_megatron(trained, shape))
    found = theirs(written(tmp_path, model), ids)
    with torch.no_grad():
        expected = ours(ids)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4
    assert (found - gpt(shape, weights, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("what", ["qkv in a row", "up before gate"])
def test_plausible_but_wrong_conversions_are_far_off(what, gpt, ids, tmp_path):
    shape = KINDS["grouped"]
    ours = Decoder(shape).initialise(3).state_dict()
    weights = to_megatron(ours, shape)
    if what == "qkv in a row":
        name = "decoder.layers.1.self_attention.linear_qkv.weight"
        wrong = torch.cat([ours[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"])
    else:
        name = "decoder.layers.1.mlp.linear_fc1.weight"
        wrong = torch.cat(weights[name].chunk(2)[::-1])
    model = Decoder(shape)
    model.load_state_dict(from_megatron({**weights, name: wrong}, shape))
    found = theirs(written(tmp_path, model), ids)
    assert (found - gpt(shape, weights, ids)).abs().max() > 0.05
    assert (found - gpt(shape, {**weights, name: wrong}, ids)).abs().max() < 1e-4


@every_kind
def test_the_folder_reads_back_as_the_same_model(shape, tmp_path):
    ours = Decoder(shape).initialise(3)
    again = load_weights(written(tmp_path, ours))
    assert again.shape == shape
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in ours.state_dict().items())
    config = loaded(tmp_path / "models" / "m").config
    assert config.tie_word_embeddings is shape.tied
    assert config.num_key_value_heads == shape.n_kv_heads
    assert config.rope_parameters["rope_theta"] == shape.rope_theta
    assert (config.vocab_size, config.max_position_embeddings) == (VOCABULARY, 64)
    assert (config.bos_token_id, config.eos_token_id) == (EOD, EOD)


def reciting(*tokens):
    """A model that says the next of these tokens after each."""
    model = Decoder(dataclasses.replace(PLAIN, layers=1))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.ndim == 1 else weight.zero_()
        for i, token in enumerate(tokens):
            model.model.embed_tokens.weight[token, i] = 1.0
        for i, following in enumerate(tokens[1:]):
            model.lm_head.weight[following, i] = 1.0
    return model


def test_generation_stops_at_the_end_of_a_document(tmp_path):
    folder = written(tmp_path, reciting(40, 521, 79, EOD, 1464))
    model, start = loaded(folder), torch.tensor([[40]])
    assert model.generate(start, max_new_tokens=9).tolist() == [[40, 521, 79, EOD]]
    both = model.generate(torch.tensor([[40], [79]]), max_new_tokens=9)
    assert both.tolist() == [[40, 521, 79, EOD], [79, EOD, EOD, EOD]]
    model.generation_config.eos_token_id = None
    assert model.generate(start, max_new_tokens=4).tolist() == [[40, 521, 79, EOD, 1464]]
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert settings == {"bos_token_id": EOD, "eos_token_id": EOD, "pad_token_id": EOD, "do_sample": False}


def test_the_tokenizer_encodes_as_that_of_the_data(tmp_path):
    found: Any = AutoTokenizer.from_pretrained(written(tmp_path, reciting(1, 2)))
    ours = models.load_tokenizer(str(TOKENIZER))
    rows = [json.loads(line) for line in (QUICKSTART / "validation.jsonl").read_text("utf-8").splitlines()[:200]]
    texts = [f"{row['prompt']} {row['response']}" for row in rows] + ["", " two  spaces ", "naïve 日本 \n\n\t🙂 ."]
    assert found(texts).input_ids == [ours.encode(text).ids for text in texts]
    assert found(texts, add_special_tokens=False).input_ids == [
        ours.encode(text, add_special_tokens=False).ids for text in texts
    ]
    assert [found.decode(ids) for ids in found(texts).input_ids] == texts
    assert (found.eos_token_id, found.bos_token_id, found.pad_token_id) == (EOD, EOD, EOD)
    assert found.eos_token == ours.id_to_token(EOD)
    assert len(found) == VOCABULARY
    assert found.model_max_length == 64


def test_a_tokenizer_that_adds_tokens_or_cuts_is_the_same_one_afterwards(tmp_path):
    """Nothing is added or lost on the way: its settings are in ``tokenizer.json``."""
    ours = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    ours.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOD)])
    (tmp_path / "tokenizer").mkdir()
    ours.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    found: Any = AutoTokenizer.from_pretrained(written(tmp_path / "run", reciting(1, 2), tmp_path / "tokenizer"))
    assert found("Hello world").input_ids == ours.encode("Hello world").ids == [EOD, 40, 521, 79, 1464]


def test_weights_that_are_no_numbers_leave_no_model(tmp_path):
    model = Decoder(PLAIN).initialise(0)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        written(tmp_path, model)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
