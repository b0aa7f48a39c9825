"""The domain classifier gives what the published recipe of the format gives, document by document."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.stages.domain_classifiers.nvidia_domain import DOMAINS, NvidiaDomain, build_network, read_labels

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
MODEL = QUICKSTART / "models" / "domain"


SWAPPED = {
    "id2label": {str(i): {0: "Finance", 7: "Adult"}.get(i, label) for i, label in enumerate(DOMAINS)},
    "label2id": None,
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return pq.read_table(QUICKSTART / "corpus.parquet", columns=["text"])["text"].to_pylist()[::22]


@pytest.fixture(scope="module")
def classifier() -> NvidiaDomain:
    made = NvidiaDomain(model=str(MODEL))
    made.setup("cpu")
    return made


def test_label_is_the_argmax_of_the_head_on_the_first_token(classifier, texts):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    config = json.loads((MODEL / "config.json").read_text())
    weights = {name: weight.float() for name, weight in load_file(MODEL / "model.safetensors").items()}
    backbone = AutoModel.from_config(AutoConfig.from_pretrained(MODEL / config["base_model"])).eval()
    backbone.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    expected, probabilities = [], []
    for text in texts:
        inputs = tokenizer(text[:2000], return_tensors="pt", truncation=True)
        with torch.no_grad():
            hidden = backbone(inputs.input_ids, inputs.attention_mask).last_hidden_state
            probability = (hidden @ weights["fc.weight"].T + weights["fc.bias"]).softmax(-1)[0, 0]
        expected.append(config["id2label"][str(int(probability.argmax()))])
        probabilities.append(probability.numpy())
    assert len(texts) >= 500
    assert classifier.classify(texts) == expected
    assert len(set(expected)) > 10
    np.testing.assert_allclose(classifier.probabilities(texts)[1], probabilities, atol=1e-5)


def test_order_and_batches_change_no_label(classifier, texts):
    whole = classifier.classify(texts)
    assert classifier.classify(texts[::-1]) == whole[::-1]
    small = NvidiaDomain(model=str(MODEL), tokens_per_batch=1)
    small.setup("cpu")
    assert small.classify(texts) == whole
    assert classifier.classify([]) == []


def test_only_the_first_2000_characters_count(classifier, texts):
    head = ("word " * 400)[:2000]
    assert classifier.classify([head + texts[0]]) == classifier.classify([head])


def test_it_knows_the_quickstart_corpus(classifier):
    table = pq.read_table(QUICKSTART / "corpus.parquet", columns=["text", "true_domain"]).to_pandas()[::20]
    found = classifier.classify(table.text.tolist())
    assert (table.true_domain == found).mean() > 0.7


def test_odd_documents_get_a_label_and_disturb_no_other(classifier, texts):
    odd = ["", " \n ", "\0", "\ud800\udfff", "x" * 10_000_000, "\u202e"]
    found = classifier.classify([*odd, texts[0]])
    assert set(found) <= set(read_labels(MODEL))
    assert found[-1] == classifier.classify(texts[:1])[0]


def test_labels_are_the_26_of_the_published_model():
    labels = read_labels(MODEL)
    assert len(labels) == 26
    assert labels == sorted(labels)
    assert labels[0] == "Adult"
    assert labels[-1] == "Travel_and_Transportation"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"id2label": {"0": "A", "2": "B"}}, "id2label"),
        ({"id2label": {"0": "A", "1": "A"}}, "id2label"),
        ({"id2label": {"0": "A", "1": "B"}}, "label2id has 'Adult' as 0, id2label has 'A'"),
        ({"id2label": {"0": "A", "1": "B"}, "label2id": None}, "does not fit"),
        (SWAPPED, "another order, first 'Finance' as 0 in place of 'Adult'"),
        ({"base_model": "somebody/backbone"}, "40 hex"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(tmp_path, change, message):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message) as caught:
        NvidiaDomain(model=str(folder)).setup("cpu")
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(tmp_path):
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    shutil.copy(MODEL.parent / "fineweb-edu" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(InputError, match="does not fit"):
        NvidiaDomain(model=str(folder)).setup("cpu")


def test_missing_folder_is_refused_at_once():
    with pytest.raises(RecipeError, match="no such folder"):
        registry.create("domain_classifiers", "nvidia-domain", {"model": "no/such/folder"})


def test_column_domain_takes_labels_as_text_and_refuses_gaps():
    classifier = registry.create("domain_classifiers", "column", {"column": "topic"})
    assert classifier.input_column == "topic"
    assert classifier.classify(["Law", 3]) == ["Law", "3"]
    for gap in (None, "", float("nan")):
        with pytest.raises(InputError, match="topic: row 1"):
            classifier.classify(["Law", gap])


def test_probabilities_are_the_softmax_whose_best_label_is_the_domain(classifier, texts):
    labels, probabilities = classifier.probabilities(texts)
    assert labels == list(DOMAINS)
    assert probabilities.shape == (len(texts), 26)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert [labels[m] for m in probabilities.argmax(axis=1)] == classifier.classify(texts)
    assert classifier.probabilities([])[1].shape == (0, 26)


@pytest.mark.parametrize(
    ("base", "words"), [("microsoft/deberta-v3-base", 128_100), ("microsoft/mdeberta-v3-base", 251_000)]
)
def test_the_published_configs_need_no_other_files(tmp_path, base, words):
    """They name a backbone and do not describe it; the sizes are those of the published weights."""
    import torch

    folder = Path(shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("backbone")))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_model": base}))
    found = NvidiaDomain(model=str(folder))._backbone_config(folder)
    with torch.device("meta"):
        network = build_network(found, 26)
    sizes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    assert sizes["model.embeddings.word_embeddings.weight"] == (words, 768)
    assert sizes["model.encoder.rel_embeddings.weight"] == (512, 768)
    assert sizes["model.encoder.layer.11.intermediate.dense.weight"] == (3072, 768)
    assert "model.encoder.LayerNorm.weight" in sizes
    assert not any("position_embeddings" in name or "token_type" in name or "pos_key" in name for name in sizes)
    assert sizes["fc.weight"] == (26, 768)
    assert sum(int(np.prod(size)) for size in sizes.values()) == {128_100: 183_851_546, 251_000: 278_238_746}[words]


def test_weights_in_several_files_are_read_as_one(tmp_path, classifier, texts):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(names.values()):
        save_file({name: weights[name] for name in weights if names[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    sharded = NvidiaDomain(model=str(folder))
    sharded.check()
    sharded.setup("cpu")
    assert sharded.classify(texts[:50]) == classifier.classify(texts[:50])


def test_weights_that_are_not_numbers_give_no_domain(tmp_path, texts):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors")
    broken = NvidiaDomain(model=str(folder))
    broken.setup("cpu")
    for use in (broken.classify, broken.probabilities):
        with pytest.raises(InputError, match="logits of 3 of 3 documents are not finite"):
            use(texts[:3])
