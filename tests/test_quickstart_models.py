"""The committed models of the quickstart are what their script makes: small, safe, honest and in published formats."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
MODELS = QUICKSTART / "models"


@pytest.mark.parametrize("name", ["domain", "fineweb-edu", "dclm-fasttext", "ask-llm"])
def test_each_is_small_without_pickles_and_has_a_card_with_figures(name):
    files = [path for path in (MODELS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    allowed = {".json", ".md", ".safetensors"} | ({".bin"} if name == "dclm-fasttext" else set())
    assert {path.suffix for path in files} <= allowed
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    assert "unseen sources" in card
    assert "random documents" in card
    assert "not a quality model" in card


def test_configs_name_the_published_architectures():
    configs = {name: json.loads((MODELS / name / "config.json").read_text()) for name in ("fineweb-edu", "ask-llm")}
    assert configs["fineweb-edu"]["architectures"] == ["BertForSequenceClassification"]
    assert configs["ask-llm"]["architectures"] == ["T5ForConditionalGeneration"]
    domain = json.loads((MODELS / "domain" / "config.json").read_text())
    assert {"base_model", "fc_dropout", "id2label", "label2id"} <= set(domain)
    assert json.loads((MODELS / "domain" / "backbone" / "config.json").read_text())["model_type"] == "deberta-v2"


def test_tokenizer_loads_with_both_libraries_and_restores_any_text():
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    plain = Tokenizer.from_file(str(MODELS / "tokenizer" / "tokenizer.json"))
    wrapped = AutoTokenizer.from_pretrained(MODELS / "tokenizer")
    text = "Call me Ishmael.  Ünï©ode\tand\n\n日本語 🙂 = 0.5e-3"
    assert plain.encode(text).ids == wrapped(text)["input_ids"]
    assert plain.decode(plain.encode(text).ids) == text
    assert plain.get_vocab_size() == len(wrapped) == 4096
    assert plain.token_to_id("<|endoftext|>") == wrapped.eos_token_id


@pytest.mark.slow
def test_script_makes_the_committed_tokenizer_again(tmp_path):
    script = ROOT / "scripts" / "train_quickstart_models.py"
    subprocess.run([sys.executable, script, "tokenizer", "--out", tmp_path], check=True, timeout=120)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        made, committed = ((folder / "tokenizer" / name).read_bytes() for folder in (tmp_path, MODELS))
        assert hashlib.sha256(made).hexdigest() == hashlib.sha256(committed).hexdigest()


@pytest.mark.parametrize("train", ["train_wordpiece(f, t, 900, 64)", "train_word_start_bpe(f, t, 900, 64, t5=True)"])
def test_tokenizers_of_the_models_are_the_same_in_every_process(tmp_path, train):
    texts = pq.read_table(QUICKSTART / "corpus.parquet", columns=["text"])["text"].to_pylist()[:200]
    texts += [chr(code) for code in range(0x4E00, 0x4F00)]  # once each: more letters than the alphabet takes
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    program = (
        f"import json, pathlib, tiny_tokenizers; f = pathlib.Path('.'); t = json.load(open('texts.json')); "
        f"tiny_tokenizers.{train}"
    )
    made = set()
    for _ in range(2):
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=120)
        made.add((tmp_path / "tokenizer.json").read_bytes())
    assert len(made) == 1


def test_three_scorers_measure_different_things():
    from scipy.stats import spearmanr

    from quadmix_plugin import registry

    texts = pq.read_table(QUICKSTART / "corpus.parquet", columns=["text"])["text"].to_pylist()[::12]
    scores = []
    for name in ("fineweb-edu", "dclm-fasttext", "ask-llm"):
        scorer = registry.create("scorers", name, {"model": str(MODELS / name)})
        scorer.setup("cpu")
        scores.append(scorer.score(texts))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs(spearmanr(scores[first], scores[second])[0]) < 0.7
