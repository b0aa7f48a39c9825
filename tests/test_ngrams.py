"""Hashed n-grams: the counts of the package ``data-selection``, in any company, whatever is remembered."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import pytest
from data_selection.hashed_ngram_dsir import get_ngram_counts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_run import corpus_texts

from quadmix_plugin import ngrams
from quadmix_plugin.errors import InputError
from quadmix_plugin.ngrams import NgramBuckets, log_ratio

TEXTS = [*corpus_texts(40), "", "word", "two words", " \n", "...", "ΑΣ", "naïve İstanbul ½ हिन्दी 𝔘𝔫𝔦"]
VALUES = np.random.default_rng(5).normal(size=10_000)


def test_buckets_are_those_of_sha256() -> None:
    words = NgramBuckets(ngrams=1)
    assert np.flatnonzero(words.counts(["Alice"])).tolist() == [6720]
    assert np.flatnonzero(NgramBuckets().counts(["alice went"]) - words.counts(["alice went"])).tolist() == [114]
    assert NgramBuckets().counts(["Alice went to the store"]).sum() == 9


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(st.text(max_size=60) | st.text("aB1.,!_ \n'", max_size=60), max_size=5),
    n=st.integers(1, 4),
    n_buckets=st.sampled_from([1, 7, 10_000]),
)
@example(texts=["ΟΔΟΣ", "Σ", "a\x1cb\x85c\u2028d", "e\u0301\u200d_½²"], n=2, n_buckets=10_000)
def test_counts_are_those_of_the_package(texts: list[str], n: int, n_buckets: int) -> None:
    expected = sum((get_ngram_counts(text, n, n_buckets) for text in texts), np.zeros(n_buckets, dtype=int))
    np.testing.assert_array_equal(NgramBuckets(n_buckets, n).counts(texts), expected)


def test_every_code_point_splits_words_as_in_the_package() -> None:
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    text = "a" + "a".join(characters) + "a"
    np.testing.assert_array_equal(NgramBuckets(ngrams=1).counts([text]), get_ngram_counts(text, n=1))


def test_two_words_of_one_hash_stay_two_words() -> None:
    text = "\u7377\u8d50\u7721\u71d4\u8d34\u4e00 \u86c4\u4e65\u55c0\u7204\u53c4\U00024ccf"  # found by a search
    hashes = set()
    for word in text.split():
        key = 0xCBF29CE484222325
        for character in word:
            key = (key ^ ord(character)) * 0x100000001B3 % (1 << 64)
        hashes.add(key)
    assert len(hashes) == 1
    np.testing.assert_array_equal(NgramBuckets().counts([text]), get_ngram_counts(text))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_sums_are_the_products_of_the_package(n: int) -> None:
    sums, words = NgramBuckets(ngrams=n).sums(TEXTS, VALUES)
    expected = [float(VALUES @ get_ngram_counts(text, n)) for text in TEXTS]
    np.testing.assert_allclose(sums, expected, rtol=1e-10, atol=1e-9)
    assert words.tolist() == [int(get_ngram_counts(text, 1).sum()) for text in TEXTS]


def test_a_sum_is_the_same_to_the_bit_in_any_company() -> None:
    features = NgramBuckets()
    together = features.sums(TEXTS, VALUES)[0]
    alone = np.concatenate([features.sums([text], VALUES)[0] for text in TEXTS])
    backwards = features.sums(TEXTS[::-1], VALUES)[0][::-1]
    assert together.tobytes() == alone.tobytes() == backwards.tobytes()


@pytest.mark.parametrize("n", [2, 3])
def test_what_is_remembered_and_read_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    features = NgramBuckets(9_999, n)
    counts, (sums, words) = features.counts(TEXTS), features.sums(TEXTS, VALUES)
    monkeypatch.setattr(ngrams, "_AT_ONCE", 300)
    monkeypatch.setattr(ngrams, "_REMEMBERED", 100)
    np.testing.assert_array_equal(features.counts(iter(TEXTS)), counts)
    again = features.sums(TEXTS, VALUES)
    assert again[0].tobytes() == sums.tobytes()
    np.testing.assert_array_equal(again[1], words)
    assert max(length.size for length in ngrams._memory(features).lengths) <= 100


def test_only_new_ngrams_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    features = NgramBuckets(9_998)
    hashed: list[bytes] = []
    monkeypatch.setattr(ngrams, "sha256", lambda text: hashed.append(text) or sha256(text))
    features.counts(["the cat and the cat"])
    assert sorted(hashed) == [b"and", b"and the", b"cat", b"cat and", b"the", b"the cat"]
    features.counts(["the cat sat"])
    assert hashed[6:] == [b"sat", b"cat sat"]


def test_nothing_is_hashed_twice_however_much_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    features, hashed = NgramBuckets(9_997), []
    monkeypatch.setattr(ngrams, "_AT_ONCE", 1)
    monkeypatch.setattr(ngrams, "sha256", lambda text: hashed.append(text) or sha256(text))
    features.counts(TEXTS)
    assert len(hashed) == len(set(hashed)) > 10_000


def test_threads_do_not_share_what_they_remember() -> None:
    features = NgramBuckets()
    parts = [TEXTS[i::8] for i in range(8)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(features.counts, parts))
        elsewhere = threads.submit(ngrams._memory, features).result()
    for part, counts in zip(parts, found, strict=True):
        np.testing.assert_array_equal(counts, sum(get_ngram_counts(text) for text in part))
    assert ngrams._memory(features) is not elsewhere


def test_log_ratio_is_smoothed_as_in_the_package() -> None:
    found = log_ratio(np.array([3, 1, 0]), np.array([0, 5, 5]))
    np.testing.assert_allclose(found, np.log([0.75 + 1e-8, 0.25 + 1e-8, 1e-8]) - np.log([1e-8, 0.5 + 1e-8, 0.5 + 1e-8]))


def test_features_pickle_without_what_they_remember() -> None:
    features = NgramBuckets(123, 3)
    features.counts(TEXTS)
    assert pickle.loads(pickle.dumps(features)) == features  # noqa: S301 - our own bytes
    assert len(pickle.dumps(features)) < 200


@pytest.mark.parametrize(
    ("options", "message"),
    [((0, 2), "n_buckets: 0; give 1 to"), ((1 << 31, 2), "n_buckets"), ((10, 0), "ngrams: 0; give at least 1")],
)
def test_options_out_of_range_are_refused(options: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NgramBuckets(*options)


def test_half_a_surrogate_pair_is_named() -> None:
    with pytest.raises(InputError, match=r"'before \\ud800 after': half a surrogate pair"):
        NgramBuckets().counts(["before \ud800 after"])
