"""Embedders: a text's vector is its own, whatever its batch, and says what the text is about."""

import json
import pickle
import shutil
from collections import Counter
from math import copysign, log1p

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.feature_extraction import FeatureHasher
from small_run import MODELS, corpus_texts
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

from quadmix_plugin.clusters import _Embed
from quadmix_plugin.embeddings import HashedWords, ModelEmbeddings, from_column, to_column
from quadmix_plugin.errors import InputError

TEXTS = corpus_texts(300)
ENCODER = str(MODELS / "fineweb-edu")


@pytest.fixture(scope="module")
def encoder() -> ModelEmbeddings:
    return ModelEmbeddings(ENCODER)


@pytest.fixture(params=["words", "model"])
def embedder(request, encoder):
    return HashedWords() if request.param == "words" else encoder


def test_a_vector_does_not_depend_on_its_batch(embedder):
    whole = embedder.embed(TEXTS)
    order = np.random.default_rng(1).permutation(len(TEXTS))
    np.testing.assert_array_equal(embedder.embed([TEXTS[i] for i in order]), whole[order])
    np.testing.assert_array_equal(np.concatenate([embedder.embed([text]) for text in TEXTS[:40]]), whole[:40])
    np.testing.assert_array_equal(np.concatenate([embedder.embed(TEXTS[:7]), embedder.embed(TEXTS[7:])]), whole)


def test_vectors_have_length_one_or_zero(embedder):
    vectors = embedder.embed([*TEXTS[:20], "", " \n\t"])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors[:20].astype(float), axis=1), 1, atol=1e-6)
    assert not vectors[20:].any()
    assert embedder.embed([]).shape == (0, vectors.shape[1])


def test_words_are_signed_counts_damped():
    text = "The cat saw the other cat; the CAT fled at 10 (a 2nd time)."
    words = Counter(["the", "cat", "saw", "the", "other", "cat", "the", "cat", "fled", "at", "10", "2nd", "time"])
    sums = FeatureHasher(16).transform([words]).toarray()[0]
    expected = np.array([copysign(log1p(abs(x)), x) for x in sums])
    found = HashedWords(16).embed([text])[0]
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-6)


def test_texts_of_the_same_words_are_nearer():
    a, b, c = HashedWords().embed(["wheat barley rye harvest", "rye and barley harvest", "court judge appeal verdict"])
    assert a @ b > 0.6
    assert abs(a @ c) < 0.3


def test_a_model_gives_the_mean_of_its_last_hidden_states(encoder):
    tokenizer, network = AutoTokenizer.from_pretrained(ENCODER), AutoModel.from_pretrained(ENCODER).float().eval()
    texts = [text[: 40 * (i + 1)] for i, text in enumerate(TEXTS[:12])]  # with and without padding
    for text, vector in zip(texts, encoder.embed(texts), strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=encoder.length)
        with torch.inference_mode():
            mean = network(**inputs).last_hidden_state[0].mean(dim=0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_pickles_are_small_and_load_the_model_once(encoder):
    expected = encoder.embed(TEXTS[:5])
    content = pickle.dumps(encoder)
    assert len(content) < 1000
    first, second = pickle.loads(content), pickle.loads(content)  # noqa: S301 - our own
    assert first is second
    assert first is not encoder
    np.testing.assert_array_equal(first.embed(TEXTS[:5]), expected)
    assert pickle.loads(pickle.dumps(HashedWords(64))) == HashedWords(64)  # noqa: S301


def test_a_masked_language_model_without_pooler_will_do(tmp_path, encoder):
    shutil.copytree(ENCODER, tmp_path / "mlm")
    config = BertConfig.from_pretrained(ENCODER)
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    del encoder
    assert ModelEmbeddings(str(tmp_path / "mlm")).embed(TEXTS[:3]).shape == (3, 64)


def test_weights_of_another_kind_are_refused(tmp_path):
    shutil.copytree(ENCODER, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 2}))
    with pytest.raises(InputError, match="weights are missing"):
        ModelEmbeddings(str(tmp_path / "model")).embed(TEXTS[:1])


def test_what_cannot_embed_is_refused_before_the_first_text(tmp_path):
    with pytest.raises(InputError, match="needs a pinned revision"):
        ModelEmbeddings("someone/encoder")
    with pytest.raises(InputError, match="encoder with a decoder"):
        ModelEmbeddings(str(MODELS / "ask-llm")).check()
    with pytest.raises(InputError, match="dimensions: 0"):
        HashedWords(0)


def test_columns_give_the_vectors_back(tmp_path):
    vectors = HashedWords(8).embed(TEXTS[:50])
    table = pa.table({"embedding": to_column(vectors)})
    pq.write_table(table, tmp_path / "t.parquet")
    read = pq.read_table(tmp_path / "t.parquet")
    for each in (table, read, pa.concat_tables([read.slice(0, 20), read.slice(20)])):
        np.testing.assert_array_equal(from_column(each["embedding"]), vectors)
        np.testing.assert_array_equal(from_column(each.slice(13, 9)["embedding"]), vectors[13:22])
        assert from_column(each.slice(0, 0)["embedding"]).shape == (0, 8)


def test_a_pass_that_embeds_by_a_model_can_be_told_its_device():
    by_model = _Embed(ModelEmbeddings(str(MODELS / "fineweb-edu"))).on_device("cpu")
    assert by_model.embedder.device == "cpu"  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(by_model.embedder)).device == "cpu"  # noqa: S301
    by_words = _Embed(HashedWords())
    assert by_words.on_device("cuda") is by_words
