"""Eq. 1 and Eq. 2 against plain loops, and the properties that make a rank mean the same everywhere."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters, sample_parameters
from quadmix_plugin.ranking import RankMap, merge_quality, quality_rank

GRID = [0.0, -0.0, 0.25, 0.5, 1.0, -3.0, 1e-300, 1e6]


@st.composite
def ranked(draw):
    """Documents with many ties, domains without documents, and domains of one document."""
    n = draw(st.integers(1, 40))
    values = st.sampled_from(GRID) | st.floats(-1e6, 1e6)
    merged = np.array(draw(st.lists(values, min_size=n, max_size=n)))
    domains = np.array(draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)))
    tokens = np.array(draw(st.lists(st.integers(1, 10_000), min_size=n, max_size=n)))
    return merged, domains, tokens


def eq_2(merged, domains, tokens, ties: str) -> list[float]:
    """Eq. 2 in the paper's words, by exact fractions."""
    result = []
    for i in range(len(merged)):
        below = same = total = 0
        for j in range(len(merged)):
            if domains[j] == domains[i]:
                total += int(tokens[j])
                below += int(tokens[j]) if merged[j] < merged[i] else 0
                same += int(tokens[j]) if merged[j] == merged[i] else 0
        share = Fraction(below + same, total) if ties == "paper" else Fraction(2 * below + same, 2 * total)
        result.append(float(share))
    return result


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32), st.sampled_from("fd"))
def test_eq_1_is_the_weighted_sum(n: int, n_scorers: int, n_domains: int, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, n_scorers)).astype(dtype)
    domains = rng.integers(0, n_domains, n)
    theta = sample_parameters(1, n_scorers, n_domains, seed)[0]
    expected = []
    for i in range(n):
        total = 0.0
        for scorer in range(n_scorers):
            total += float(theta.alpha[domains[i], scorer]) * float(scores[i, scorer])
        expected.append(total)
    merged = merge_quality(scores, domains, theta)
    assert merged.dtype == np.float64
    np.testing.assert_array_equal(merged, expected)  # same order of the sum, so the same bits
    np.testing.assert_array_equal(merge_quality(scores[::-1], domains[::-1], theta)[::-1], merged)
    alone = [merge_quality(scores[i : i + 1], domains[i : i + 1], theta)[0] for i in range(n)]
    np.testing.assert_array_equal(alone, merged)


@settings(max_examples=300, deadline=None)
@given(ranked(), st.sampled_from(["paper", "mid"]))
def test_eq_2_is_the_share_of_tokens_at_least_as_good(data, ties: str) -> None:
    rank = quality_rank(*data, ties)
    np.testing.assert_allclose(rank, eq_2(*data, ties), rtol=1e-15, atol=0)
    assert ((rank > 0) & (rank <= 1)).all()


@settings(max_examples=200, deadline=None)
@given(ranked(), st.randoms(use_true_random=False), st.sampled_from(["paper", "mid"]))
def test_rank_does_not_depend_on_row_order(data, random, ties: str) -> None:
    order = list(range(len(data[0])))
    random.shuffle(order)
    shuffled = quality_rank(*(column[order] for column in data), ties)
    np.testing.assert_array_equal(shuffled, quality_rank(*data, ties)[order])


@settings(max_examples=200, deadline=None)
@given(ranked(), st.sampled_from(["paper", "mid"]))
def test_rank_grows_with_merged_quality_and_ties_are_one_group(data, ties: str) -> None:
    merged, domains, _ = data
    rank = quality_rank(*data, ties)
    for domain in np.unique(domains):
        q, r = merged[domains == domain], rank[domains == domain]
        assert ((q[:, None] < q[None, :]) == (r[:, None] < r[None, :])).all()
        assert ((q[:, None] == q[None, :]) == (r[:, None] == r[None, :])).all()


@settings(max_examples=200, deadline=None)
@given(ranked())
def test_the_worst_document_has_rank_one_and_one_document_alone_too(data) -> None:
    merged, domains, _ = data
    rank = quality_rank(*data)
    for domain in np.unique(domains):
        assert rank[domains == domain][np.argmax(merged[domains == domain])] == 1.0


def test_ties_by_hand() -> None:
    merged, tokens = [1.0, 2.0, 2.0, 3.0], [1, 2, 3, 4]
    np.testing.assert_allclose(quality_rank(merged, [0] * 4, tokens), [0.1, 0.6, 0.6, 1.0])
    np.testing.assert_allclose(quality_rank(merged, [0] * 4, tokens, "mid"), [0.05, 0.35, 0.35, 0.8])


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


@settings(max_examples=200, deadline=None)
@given(ranked(), st.sampled_from([1, 2, 7]), st.integers(0, 2**32), st.sampled_from(["paper", "mid"]))
def test_maps_of_random_partitions_merge_to_the_map_of_all(data, parts: int, seed: int, ties: str) -> None:
    rng = np.random.default_rng(seed)
    part = rng.integers(0, parts, len(data[0]))
    whole = RankMap.fit(*data)
    pieces = [RankMap.fit(*(column[part == p] for column in data)) for p in rng.permutation(parts)]
    merged = RankMap.merge(pieces)
    assert merged.to_table().equals(whole.to_table())
    np.testing.assert_array_equal(merged.rank(*data[:2], ties), quality_rank(*data, ties))
    for p in range(parts):
        rows = part == p
        np.testing.assert_array_equal(merged.rank(data[0][rows], data[1][rows], ties), quality_rank(*data, ties)[rows])


def test_merging_is_associative() -> None:
    rng = np.random.default_rng(3)
    maps = [RankMap.fit(rng.integers(0, 9, 50) / 8, rng.integers(0, 3, 50), rng.integers(1, 9, 50)) for _ in range(3)]
    left = RankMap.merge([RankMap.merge(maps[:2]), maps[2]])
    right = RankMap.merge([maps[0], RankMap.merge(maps[1:])])
    assert left.to_table().equals(right.to_table())
    assert RankMap.merge([]).to_table().num_rows == 0


def test_minus_zero_and_zero_are_one_value_in_any_partition() -> None:
    whole = RankMap.fit([-0.0, 0.0], [0, 0], [1, 1])
    assert whole.merged.tobytes() == RankMap.fit([0.0, -0.0], [0, 0], [1, 1]).merged.tobytes()
    apart = RankMap.merge([RankMap.fit([-0.0], [0], [1]), RankMap.fit([0.0], [0], [1])])
    assert whole.to_table().equals(apart.to_table())
    np.testing.assert_array_equal(apart.rank([-0.0, 0.0], [0, 0]), [1, 1])


def test_a_map_survives_its_table() -> None:
    rng = np.random.default_rng(4)
    merged, domains, tokens = rng.random(100), rng.integers(0, 5, 100), rng.integers(1, 99, 100)
    again = RankMap.from_table(RankMap.fit(merged, domains, tokens).to_table())
    np.testing.assert_array_equal(again.rank(merged, domains), quality_rank(merged, domains, tokens))


def test_later_documents_get_the_rank_they_would_have_had() -> None:
    known = RankMap.fit([1.0, 2.0], [0, 0], [30, 70])
    np.testing.assert_allclose(known.rank([1.0, 1.5, 2.0, 9.0], [0] * 4), [0.3, 0.3, 1.0, 1.0])
    better = known.rank([0.5], [0])[0]
    assert 0 < better < 1e-300


def test_token_sums_beyond_float_precision_are_exact() -> None:
    big = 2**53
    rank = RankMap.merge([RankMap.fit([1.0], [0], [big]), RankMap.fit([1.0, 2.0], [0, 0], [1, 1])])
    np.testing.assert_array_equal(rank.tokens, [big + 1, 1])


THETA = Parameters([[0.5, 0.5], [1, 0]], [1, 1], [0.1, 0.1], [1, 1], [0, 0])


@pytest.mark.parametrize(
    ("scores", "domains", "says"),
    [
        (np.ones((2, 3)), [0, 1], r"normalised: shape \(2, 3\); give one row for each of the 2 documents and one colu"),
        (np.ones((3, 2)), [0, 1], r"normalised: shape \(3, 2\); give one row for each of the 2 documents"),
        (np.ones(2), [0, 1], r"normalised: shape \(2,\); give one row"),
        (np.ones((2, 2)), [0, 2], "domain_ids: 1 outside the range, first 2; give positions from 0 to 1"),
        (np.ones((2, 2)), [-1, 0], "domain_ids: 1 outside the range, first -1; give positions from 0 to 1"),
        (np.ones((2, 2)), [0.0, 1.0], "domain_ids: type float64; give integers"),
        (np.array([[1, np.nan], [1, 1]]), [0, 1], r"normalised: 1 of 2 documents .*first rows \[0\]\); drop them or"),
        (np.array([[1, 1], [np.inf, 1]]), [0, 1], r"normalised: 1 of 2 documents .*first rows \[1\]\)"),
    ],
)
def test_bad_scores_are_refused_with_place_value_and_remedy(scores, domains, says: str) -> None:
    with pytest.raises(InputError, match=says):
        merge_quality(scores, domains, THETA)


@pytest.mark.parametrize(
    ("merged", "domains", "tokens", "says"),
    [
        ([1.0], [0, 0], [1, 1], r"merged \(1,\), domain_ids \(2,\) and tokens \(2,\) must be .* of one length"),
        ([1.0, np.nan], [0, 0], [1, 1], r"merged: 1 of 2 documents .*\[1\]\); drop"),
        ([1.0, 2.0], [0, 0], [1, 0], "tokens: 1 documents have 0 tokens; drop empty documents first"),
        ([1.0, 2.0], [0, 0], [1.0, 2.0], "tokens: type float64; give integers"),
        ([1.0, 2.0], [0, -4], [1, 1], "domain_ids: 1 outside the range, first -4; give positions from 0"),
        ([1.0, 2.0], [True, False], [1, 1], "domain_ids: type bool; give integers"),
    ],
)
def test_bad_ranks_are_refused_with_place_value_and_remedy(merged, domains, tokens, says: str) -> None:
    with pytest.raises(InputError, match=says):
        quality_rank(merged, domains, tokens)


def test_a_map_refuses_what_it_cannot_rank() -> None:
    known = RankMap.fit([1.0], [0], [1])
    with pytest.raises(InputError, match="domain id 3: the rank map has no document of it; fit it on this corpus"):
        known.rank([1.0], [3])
    with pytest.raises(InputError, match="ties='best'; choose 'paper' or 'mid'"):
        known.rank([1.0], [0], "best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"merged \(2,\) and domain_ids \(1,\) must be .* of one length"):
        known.rank([1.0, 2.0], [0])
    with pytest.raises(InputError, match="merged: 1 of 1 documents"):
        known.rank([np.nan], [0])


def test_no_documents_give_no_ranks() -> None:
    assert quality_rank([], [], []).shape == (0,)
    assert merge_quality(np.empty((0, 2)), [], THETA).shape == (0,)
