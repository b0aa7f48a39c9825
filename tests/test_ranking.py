"""Eq. 1 and Eq. 2 against plain loops and fractions, and the properties that make a rank mean the same everywhere."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loops import eq_1, eq_2, hash_of, tie_of

from examples import EXAMPLES, TIES, documents, numbers, parameters
from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters, sample_parameters
from quadmix_plugin.ranking import merge_quality, quality_rank

SEED = st.integers(0, 2**32 - 1)


def rank_of(data, ties: str = "paper", seed: int = 0) -> np.ndarray:
    return quality_rank(data.values, data.domain_ids, data.tokens, ties, data.doc_ids, seed)


@settings(max_examples=EXAMPLES, deadline=None)
@given(documents(30, 5, 3, np.float32) | documents(30, 5, 4) | documents(30, 5, 1), SEED)
def test_eq_1_is_the_weighted_sum(data, seed: int) -> None:
    theta = parameters(np.random.default_rng(seed), data.values.shape[1], 5)
    merged = merge_quality(data.values, data.domain_ids, theta)
    assert merged.dtype == np.float64
    # The same order of the sum, so the same bits.
    np.testing.assert_array_equal(merged, eq_1(data.values, data.domain_ids, theta.alpha))


@settings(max_examples=EXAMPLES, deadline=None)
@given(documents(30, 5, 3, values=["few", "normal", "clipped", "spread"]), SEED)
def test_q_of_a_document_does_not_depend_on_its_neighbours(data, seed: int) -> None:
    theta = parameters(np.random.default_rng(seed), 3, 5)
    merged = merge_quality(data.values, data.domain_ids, theta)
    np.testing.assert_array_equal(merge_quality(data.values[::-1], data.domain_ids[::-1], theta)[::-1], merged)
    i = seed % len(merged)
    assert merge_quality(data.values[i : i + 1], data.domain_ids[i : i + 1], theta)[0] == merged[i]


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), SEED)
def test_eq_1_is_exact_where_numbers_are(n: int, n_scorers: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    eighths = rng.multinomial(8, np.full(n_scorers, 1 / n_scorers), 4)
    theta = Parameters(eighths / 8, np.ones(4), np.full(4, 0.1), np.ones(4), np.zeros(4))
    scores, domain_ids = rng.integers(-(2**20), 2**20, (n, n_scorers)), rng.integers(0, 4, n)
    expected = [
        sum((Fraction(int(a), 8) * Fraction(int(q), 64) for a, q in zip(eighths[m], row, strict=True)), Fraction(0))
        for row, m in zip(scores, domain_ids, strict=True)
    ]
    merged = merge_quality((scores / 64).astype(np.float32), domain_ids, theta)
    assert [Fraction(q) for q in merged.tolist()] == expected


@settings(max_examples=EXAMPLES, deadline=None)
@given(documents(), st.sampled_from(TIES), st.integers(0, 3))
def test_eq_2_is_the_share_of_tokens_at_least_as_good(data, ties: str, seed: int) -> None:
    rank = rank_of(data, ties, seed)
    expected = eq_2(data.values, data.domain_ids, data.tokens, ties, [tie_of(int(i), seed) for i in data.doc_ids])
    assert rank.tolist() == [float(share) for share in expected]  # a fraction's nearest float, to the bit
    assert ((rank > 0) & (rank <= 1)).all()


@settings(max_examples=EXAMPLES, deadline=None)
@given(documents(200), SEED, st.sampled_from(TIES))
def test_rank_depends_on_neither_row_order_nor_other_domains(data, seed: int, ties: str) -> None:
    rank = rank_of(data, ties)
    order = np.random.default_rng(seed).permutation(len(rank))
    np.testing.assert_array_equal(rank_of(data.take(order), ties), rank[order])
    alone = np.flatnonzero(data.domain_ids == data.domain_ids[0])
    np.testing.assert_array_equal(rank_of(data.take(alone), ties), rank[alone])


@settings(max_examples=EXAMPLES, deadline=None)
@given(documents(80), st.sampled_from(["paper", "mid"]))
def test_rank_grows_with_merged_quality_to_one_and_ties_are_one_group(data, ties: str) -> None:
    rank = rank_of(data, ties)
    for domain in np.unique(data.domain_ids):
        q, r = data.values[data.domain_ids == domain], rank[data.domain_ids == domain]
        assert ((q[:, None] < q[None, :]) == (r[:, None] < r[None, :])).all()
        assert ((q[:, None] == q[None, :]) == (r[:, None] == r[None, :])).all()
        # The worst has all the domain's tokens at least as good, and so has a document alone.
        assert ties == "mid" or r[np.argmax(q)] == 1.0
        assert r.size > 1 or r[0] == (1.0 if ties == "paper" else 0.5)


@settings(max_examples=EXAMPLES, deadline=None)
@given(documents(80), st.integers(0, 3))
def test_ties_by_hash_split_the_group_that_the_paper_takes_whole(data, seed: int) -> None:
    paper, mid, hashed = (rank_of(data, ties, seed) for ties in TIES)
    tie = np.array([tie_of(int(i), seed) for i in data.doc_ids], dtype=np.uint64)
    for domain in np.unique(data.domain_ids):
        rows = np.flatnonzero(data.domain_ids == domain)
        order = rows[np.lexsort((tie[rows], data.values[rows]))]
        assert (np.diff(hashed[order]) > 0).all()
        assert hashed[order][-1] == 1.0
    assert (hashed <= paper).all()
    assert (hashed > 2 * mid - paper - 1e-12).all()  # after all that are better
    # The last of a group in the order of the hash has all of it, as every document has under the paper's rule.
    for q, domain in {(q, m) for q, m in zip(data.values.tolist(), data.domain_ids.tolist(), strict=True)}:
        group = (data.values == q) & (data.domain_ids == domain)
        assert hashed[group].max() == paper[group].max()


@pytest.mark.parametrize("kind", ["few", "normal", "crowd", "equal", "neighbours"])
@pytest.mark.parametrize("ties", TIES)
def test_thousands_of_documents_rank_like_a_sort(kind: str, ties: str) -> None:
    # More than a few in a bin, so that the sort within it is the one for long runs.
    rng = np.random.default_rng(5)
    n = 5000
    values, domain_ids, tokens = numbers(rng, (n,), kind), rng.integers(0, 3, n), rng.integers(1, 99, n)
    doc_ids = rng.permutation(n)
    tie = np.array([tie_of(int(i)) for i in doc_ids], dtype=np.uint64)
    expected = np.empty(n)
    for domain in range(3):
        rows = np.flatnonzero(domain_ids == domain)
        q, w, t = values[rows] + 0.0, tokens[rows], tie[rows]
        if ties == "hash":
            order = np.lexsort((t, q))
            expected[rows[order]] = np.cumsum(w[order]) / w.sum()
            continue
        distinct, at = np.unique(q, return_inverse=True)
        mass = np.bincount(at, weights=w, minlength=distinct.size)
        expected[rows] = ((np.cumsum(mass) - (0.5 * mass if ties == "mid" else 0)) / w.sum())[at]
    np.testing.assert_array_equal(quality_rank(values, domain_ids, tokens, ties, doc_ids), expected)


def test_scores_may_lie_in_memory_in_any_way() -> None:
    rng = np.random.default_rng(0)
    scores, domain_ids, theta = rng.normal(size=(50, 3)), rng.integers(0, 4, 50), sample_parameters(1, 3, 4, seed=0)[0]
    expected = merge_quality(scores, domain_ids, theta)
    np.testing.assert_array_equal(
        merge_quality(np.asfortranarray(scores), domain_ids.astype(np.uint8), theta), expected
    )
    np.testing.assert_array_equal(merge_quality(np.repeat(scores, 2, axis=1)[:, ::2], domain_ids, theta), expected)
    np.testing.assert_array_equal(merge_quality(scores.tolist(), domain_ids.tolist(), theta), expected)


def test_ties_by_hand() -> None:
    merged, tokens = [1.0, 2.0, 2.0, 3.0], [1, 2, 3, 4]
    np.testing.assert_allclose(quality_rank(merged, [0] * 4, tokens), [0.1, 0.6, 0.6, 1.0])
    np.testing.assert_allclose(quality_rank(merged, [0] * 4, tokens, "mid"), [0.05, 0.35, 0.35, 0.8])
    ids = [10, 11, 12, 13]
    split = [0.1, 0.3, 0.6, 1.0] if tie_of(11) < tie_of(12) else [0.1, 0.6, 0.4, 1.0]
    np.testing.assert_allclose(quality_rank(merged, [0] * 4, tokens, "hash", ids), split)
    # Another seed orders another way for some ids: not the ids decide, but their hash.
    orders = {tuple(quality_rank([0.0] * 3, [0] * 3, [1] * 3, "hash", [1, 2, 3], seed)) for seed in range(40)}
    assert len(orders) == 6


def test_string_ids_break_ties_by_their_hash() -> None:
    import xxhash

    ids = ["a", "b", "c", "d"]
    tie = [hash_of(xxhash.xxh64(i.encode(), seed=3).intdigest(), 0x71E5) for i in ids]
    expected = [sum(other <= own for other in tie) / 4 for own in tie]
    np.testing.assert_array_equal(quality_rank([0.0] * 4, [0] * 4, [1] * 4, "hash", ids, 3), expected)


def test_minus_zero_and_zero_are_one_value() -> None:
    np.testing.assert_array_equal(quality_rank([-0.0, 0.0, 1.0], [0] * 3, [1, 1, 2]), [0.5, 0.5, 1.0])


def test_the_best_document_has_the_lowest_rank() -> None:
    # Smaller normalised scores are better (DESIGN §3); each domain's best has the lowest quality_rank.
    rng = np.random.default_rng(0)
    scores, domains = rng.random((200, 3)), np.arange(200) % 4
    for best in range(4):
        scores[best] = -1.0
    theta = sample_parameters(1, 3, 4, seed=0)[0]
    rank = quality_rank(merge_quality(scores, domains, theta), domains, rng.integers(1, 99, 200))
    for domain in range(4):
        assert np.argmin(np.where(domains == domain, rank, np.inf)) == domain


def test_tokens_beyond_float_precision_are_summed_as_integers() -> None:
    # In floats 2^53 + 1 + 1 = 2^53, and the middle document would have the rank of the first.
    big = 2**53
    rank = quality_rank([1.0, 2.0, 3.0, 4.0], [0] * 4, [big, 1, 1, 2])
    assert rank.tolist() == [float(Fraction(m, big + 4)) for m in (big, big, big + 2, big + 4)]


def test_scores_from_one_end_of_float64_to_the_other_are_ranked() -> None:
    import subprocess
    import sys

    # In a process of its own: the width of this range overflows, and a bin from NaN once ended the process.
    code = (
        "from quadmix_plugin import quality_rank; from quadmix_plugin.rank_map import RankMap\n"
        "q = [-1.7e308, 1.7e308, 0.0, -1.7e308]\n"
        "print(quality_rank(q, [0] * 4, [1] * 4).tolist())\n"
        "print(RankMap.exact(q, [0] * 4, [1] * 4).rank(q, [0] * 4).tolist())\n"
        "print(RankMap.exact([1e308], [0], [1]).rank([-1e308], [0])[0] < 1e-300)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:3] == ["[0.5, 1.0, 0.75, 0.5]", "[0.5, 1.0, 0.75, 0.5]", "True"]


THETA = Parameters([[0.5, 0.5], [1, 0]], [1, 1], [0.1, 0.1], [1, 1], [0, 0])


@pytest.mark.parametrize(
    ("scores", "domains", "says"),
    [
        (np.ones((2, 3)), [0, 1], r"normalised: shape \(2, 3\); give one row for each of the 2 documents and one colu"),
        (np.ones((3, 2)), [0, 1], r"normalised: shape \(3, 2\); give one row for each of the 2 documents"),
        (np.ones(2), [0, 1], r"normalised: shape \(2,\); give one row"),
        (np.ones((2, 2, 1)), [0, 1], r"normalised: shape \(2, 2, 1\); give one row"),
        (np.ones((2, 2)), [0, 2], "domain_ids: 1 outside the range, first 2; give positions from 0 to 1"),
        (np.ones((2, 2)), [-1, 0], "domain_ids: 1 outside the range, first -1; give positions from 0 to 1"),
        (np.ones((2, 2)), [0.0, 1.0], "domain_ids: type float64; give integers"),
        (np.ones((2, 2)), ["a", "b"], "domain_ids: type <U1; give integers"),
        (np.ones((2, 2)), [[0], [1]], r"domain_ids.*\(2, 1\)"),
        (np.array([[1, np.nan], [1, 1]]), [0, 1], r"normalised: 1 of 2 documents .*first rows \[0\]\); drop them or"),
        (np.array([[1, 1], [np.inf, 1]]), [0, 1], r"normalised: 1 of 2 documents .*first rows \[1\]\)"),
        (np.array([[1, 1], [1, -np.inf]], dtype="f"), [0, 1], r"normalised: 1 of 2 documents .*first rows \[1\]\)"),
        ([["good", "bad"], ["bad", "good"]], [0, 1], "normalised.*numbers"),
        ([[1.0, 2.0], [1.0]], [0, 1], "normalised.*"),
        (np.ones((2, 2), dtype=complex), [0, 1], "normalised: type complex128"),
    ],
)
def test_bad_scores_are_refused_with_place_value_and_remedy(scores, domains, says: str) -> None:
    with pytest.raises(InputError, match=says):
        merge_quality(scores, domains, THETA)


def test_a_score_that_has_no_weight_must_be_finite_all_the_same() -> None:
    with pytest.raises(InputError, match="normalised: 1 of 1 documents"):
        merge_quality([[1.0, np.nan]], [1], THETA)  # the second scorer has weight 0 in domain 1


@pytest.mark.parametrize(
    ("merged", "domains", "tokens", "says"),
    [
        ([1.0], [0, 0], [1, 1], r"merged \(1,\), domain_ids \(2,\) and tokens \(2,\) must be .* of one length"),
        ([[1.0]], [[0]], [[1]], r"merged \(1, 1\), .* must be one-dimensional"),
        ([1.0, np.nan], [0, 0], [1, 1], r"merged: 1 of 2 documents .*\[1\]\); drop"),
        ([-np.inf, 1.0, np.inf], [0] * 3, [1] * 3, r"merged: 2 of 3 documents .*\[0, 2\]\); drop"),
        ([1.0, 2.0], [0, 0], [1, 0], "tokens: 1 documents have 0 tokens; drop empty documents first"),
        ([1.0, 2.0], [0, 0], [-7, 1], "tokens: 1 documents have -7 tokens; drop empty documents first"),
        ([1.0, 2.0], [0, 0], [1.0, 2.0], "tokens: type float64; give integers"),
        ([1.0, 2.0], [0, 0], [True, True], "tokens: type bool; give integers"),
        ([1.0, 2.0], [0, 0], np.array([2**63 + 5, 1], np.uint64), "tokens: "),
        ([1.0, 2.0], [0, -4], [1, 1], "domain_ids: 1 outside the range, first -4; give positions from 0"),
        ([1.0, 2.0], [True, False], [1, 1], "domain_ids: type bool; give integers"),
        (["good", "bad"], [0, 0], [1, 1], "merged.*numbers"),
    ],
)
def test_bad_ranks_are_refused_with_place_value_and_remedy(merged, domains, tokens, says: str) -> None:
    with pytest.raises(InputError, match=says):
        quality_rank(merged, domains, tokens)


def test_ties_that_cannot_be_broken_are_refused() -> None:
    with pytest.raises(InputError, match="ties='best'; choose 'paper', 'mid' or 'hash'"):
        quality_rank([1.0], [0], [1], "best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="ties='hash' needs doc_ids: equal merged quality is ordered by their hash"):
        quality_rank([1.0], [0], [1], "hash")


@pytest.mark.parametrize("ids", [[], [7], list(range(5))])
def test_ids_of_another_number_than_the_documents_are_refused(ids: list[int]) -> None:
    with pytest.raises(InputError, match=rf"doc_ids.*\({len(ids)},\)"):
        quality_rank([1.0, 1.0, 1.0], [0] * 3, [1] * 3, "hash", ids)


def test_no_documents_give_no_ranks() -> None:
    for ties in TIES:
        assert quality_rank([], [], [], ties, []).shape == (0,)
    assert merge_quality(np.empty((0, 2)), [], THETA).shape == (0,)
