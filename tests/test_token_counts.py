"""Token counts and their estimates: right on average, by the document alone, with an error that is stated."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import MODELS, corpus_texts

from quadmix_plugin import models
from quadmix_plugin.token_counts import compare, count_tokens, estimate_error, estimate_tokens, is_checked, sample


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(str(MODELS / "tokenizer"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return corpus_texts(1500)


def test_estimates_of_real_documents_are_near_and_their_sum_is_nearer(tokenizer, texts):
    counted, estimated = count_tokens(tokenizer, texts), estimate_tokens(tokenizer, texts)
    assert abs(estimated.sum() / counted.sum() - 1) <= 0.02
    assert np.abs(estimated - counted).sum() / counted.sum() <= 0.08
    long = np.array([len(text) > 1000 for text in texts])
    assert (estimated[long] != counted[long]).mean() > 0.5  # or it would be no estimate


def test_a_long_document_is_tokenised_in_small_part(texts):
    long = " ".join(texts[:200])
    assert 0.025 * len(long) <= len(sample(long)) <= 0.06 * len(long)


def test_the_estimate_of_a_document_does_not_depend_on_others(tokenizer, texts):
    whole = estimate_tokens(tokenizer, texts[:100])
    alone = [int(estimate_tokens(tokenizer, [text])[0]) for text in texts[:100]]
    assert whole.tolist() == alone


@given(st.text(alphabet=st.characters(), max_size=3000))
def test_a_sample_is_made_of_pieces_of_the_text_in_order_and_never_longer(text):
    found = sample(text)
    assert len(found) <= len(text)
    assert bool(found) == bool(text)
    rest = iter(text)
    assert all(character in rest for character in found)


@pytest.mark.parametrize(
    "text", ["", " ", "a", "x" * 100_000, "\n" * 5000, "\0" * 900, "\ud800 " * 700, "漢字" * 3000, "word " * 200_000]
)
def test_odd_documents_get_a_count_near_their_own(tokenizer, text):
    [estimated], [counted] = estimate_tokens(tokenizer, [text]), count_tokens(tokenizer, [text])
    assert abs(estimated - counted) <= 0.1 * counted + 1


def test_a_document_whose_words_lie_between_the_windows_is_not_empty(tokenizer):
    text = " " * 3000 + "one two three" + " " * 10
    for name in ("tokenizer", "ask-llm", "fineweb-edu"):
        chosen = models.load_tokenizer(str(MODELS / name))
        assert estimate_tokens(chosen, [text])[0] >= 3


def test_texts_to_check_are_about_a_64th_whatever_their_order(texts):
    chosen = [is_checked(text) for text in texts]
    assert 8 <= sum(chosen) <= 45
    assert [is_checked(text) for text in reversed(texts)] == chosen[::-1]


def test_errors_add_up_over_shards():
    parts = [
        compare(np.array([10, 20]), np.array([12, 20])),
        compare(np.array([5]), np.array([3])),
        compare(np.array([], dtype=np.int64), np.array([], dtype=np.int64)),
    ]
    assert estimate_error(parts) == {"documents": 3, "bias": 0.0, "mean_error": 4 / 35}
    assert estimate_error([]) == {"documents": 0, "bias": None, "mean_error": None}
