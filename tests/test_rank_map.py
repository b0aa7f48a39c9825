"""Frozen ranks: equal to Eq. 2 where they claim to be, near it elsewhere, and the same whatever the partitioning."""

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loops import eq_2

from examples import EXAMPLES, FEWER, TIES, Documents, documents
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64, tie_hash
from quadmix_plugin.rank_map import RankMap, exact_ranks
from quadmix_plugin.rank_states import Grid, RankHistogram, RankSample
from quadmix_plugin.ranking import quality_rank

SEED = st.integers(0, 2**32 - 1)
SOME_TIES = st.sampled_from(TIES)
N_DOMAINS = 6


def tie_of(data) -> np.ndarray:
    return tie_hash(hash64(data.doc_ids))


def exact_map(data, ties: str) -> RankMap:
    return RankMap.exact(data.values, data.domain_ids, data.tokens, ties, tie_of(data))


def exact_rank(data, ties: str) -> np.ndarray:
    return quality_rank(data.values, data.domain_ids, data.tokens, ties, data.doc_ids)


def histogram_of(data, n_bins: int) -> RankHistogram:
    grid = Grid.of_values(data.values, data.domain_ids, N_DOMAINS, n_bins)
    return RankHistogram.of(data.values, data.domain_ids, data.tokens, grid)


def sample_of(data, limit: int, per_domain: bool) -> RankSample:
    return RankSample.of(data.values, data.domain_ids, data.tokens, hash64(data.doc_ids), limit, per_domain)


def ranks_in(ranks: RankMap, data) -> np.ndarray:
    return ranks.rank(data.values, data.domain_ids, tie_of(data))


def same_bits(a: pa.Table, b: pa.Table) -> bool:
    """Whether two tables would be written to the same file."""
    names = a.column_names
    if names != b.column_names or a.schema.metadata != b.schema.metadata:
        return False
    return all(a[name].to_numpy().tobytes() == b[name].to_numpy().tobytes() for name in names)


def pieces(data, parts: int, seed: int) -> list:
    """The table cut into ``parts`` at random, some of them empty, in random order."""
    rng = np.random.default_rng(seed)
    part = rng.integers(0, parts, len(data.tokens))
    return [data.take(rng.permutation(np.flatnonzero(part == p))) for p in rng.permutation(parts)]


# Exact


@settings(max_examples=FEWER, deadline=None)
@given(documents(), SOME_TIES)
def test_an_exact_map_gives_the_ranks_of_eq_2(data, ties: str) -> None:
    ranks = exact_map(data, ties)
    expected = eq_2(data.values, data.domain_ids, data.tokens, ties, tie_of(data).tolist())
    assert ranks_in(ranks, data).tolist() == [float(share) for share in expected]
    without = exact_ranks(data.values, data.domain_ids, data.tokens, ties, tie_of(data))
    np.testing.assert_array_equal(without, ranks_in(ranks, data))
    assert ranks.method == "exact"


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), SOME_TIES, st.sampled_from([1, 3]), SEED)
def test_exact_maps_merge_to_the_same_bits_in_any_order(data, ties: str, parts: int, seed: int) -> None:
    whole = exact_map(data, ties).to_table()
    maps = [exact_map(part, ties) for part in pieces(data, parts, seed)]
    merged = RankMap.merge(iter(maps))
    assert same_bits(merged.to_table(), whole)
    half = seed % (parts + 1)
    tree = RankMap.merge([RankMap.merge([exact_map(data.take([]), ties), *maps[half:]]), *maps[:half]])
    assert same_bits(tree.to_table(), whole)
    np.testing.assert_array_equal(ranks_in(merged, data), exact_rank(data, ties))


def test_merging_no_maps_gives_a_map_of_nothing() -> None:
    assert RankMap.merge([]).to_table().num_rows == 0
    assert RankMap.merge([]).rank([], []).shape == (0,)


@pytest.mark.parametrize("ties", TIES)
def test_an_exact_map_of_tokens_beyond_float_precision_sums_integers(ties: str) -> None:
    big, tie = 2**53, tie_hash(hash64([5]))
    maps = [
        RankMap.exact([1.0], [0], [big], ties, tie),
        RankMap.exact([1.0, 2.0], [0, 0], [1, 1], ties, np.concatenate([tie, tie])),
    ]
    assert RankMap.merge(maps).cells["tokens"].tolist() == [big + 1, 1]


def test_minus_zero_and_zero_are_one_value_in_any_partition() -> None:
    whole = RankMap.exact([-0.0, 0.0], [0, 0], [1, 1])
    for other in ([0.0, -0.0], [0.0, 0.0], [-0.0, -0.0]):
        assert same_bits(whole.to_table(), RankMap.exact(other, [0, 0], [1, 1]).to_table())
    apart = RankMap.merge([RankMap.exact([-0.0], [0], [1]), RankMap.exact([0.0], [0], [1])])
    assert same_bits(whole.to_table(), apart.to_table())
    np.testing.assert_array_equal(apart.rank([-0.0, 0.0], [0, 0]), [1, 1])


# Histogram


def histogram_rank(data, i: int, grid: Grid, ties: str) -> float:
    """The rank of document i when only each bin's tokens and ends are known, in plain words."""
    q, m = float(data.values[i]), int(data.domain_ids[i])
    low, scale = float(grid.low[m]), float(grid.scale[m])

    def bin_of(j: int) -> int:
        return min(max(int((float(data.values[j]) - low) * scale), 0), grid.n_bins - 1)

    mates = [j for j in range(len(data.tokens)) if data.domain_ids[j] == m]
    total = sum(int(data.tokens[j]) for j in mates)
    before = sum(int(data.tokens[j]) for j in mates if bin_of(j) < bin_of(i))
    bin_mates = [j for j in mates if bin_of(j) == bin_of(i)]
    tokens = sum(int(data.tokens[j]) for j in bin_mates)
    lowest, highest = (end(float(data.values[j]) for j in bin_mates) for end in (min, max))
    at_lowest, at_highest = (
        sum(int(data.tokens[j]) for j in bin_mates if data.values[j] == e) for e in (lowest, highest)
    )
    if q == highest:
        better, group = before + tokens - at_highest, float(at_highest)
    elif q == lowest:
        better, group = before, float(at_lowest)
    else:  # a document of mean length, at its place among tokens that lie evenly
        inner = tokens - at_lowest - at_highest
        group = min(total / len(mates), inner)
        better = before + at_lowest + (inner - group) * ((q - lowest) / (highest - lowest))
    share = {"paper": 1.0, "mid": 0.5, "hash": (int(tie_of(data)[i]) >> 11) / 2**53}[ties]
    return (better + share * group) / total


@settings(max_examples=FEWER, deadline=None)
@given(documents(25), SOME_TIES, st.sampled_from([1, 2, 5, 64, 4096]))
def test_a_histogram_ranks_by_the_ends_of_bins_and_evenly_between(data, ties: str, n_bins: int) -> None:
    histogram = histogram_of(data, n_bins)
    found = ranks_in(RankMap.of_histogram(histogram, ties), data)
    expected = [max(histogram_rank(data, i, histogram.grid, ties), 1e-300) for i in range(len(data.tokens))]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert ((found > 0) & (found <= 1)).all()


@settings(max_examples=EXAMPLES, deadline=None)
@given(documents(60), st.sampled_from(["paper", "mid"]), st.sampled_from([1, 2, 5, 64, 4096]))
def test_a_histograms_ranks_never_fall_as_q_grows(data, ties: str, n_bins: int) -> None:
    ranks = RankMap.of_histogram(histogram_of(data, n_bins), ties)
    found = ranks_in(ranks, data)
    for m in set(data.domain_ids.tolist()):
        own = data.domain_ids == m
        order = np.argsort(data.values[own], kind="stable")
        q, r = data.values[own][order], found[own][order]
        assert (np.diff(r) >= -1e-15).all()
        assert (r[1:][np.diff(q) == 0] == r[:-1][np.diff(q) == 0]).all()
        # Anywhere on the line, not only at documents.
        with np.errstate(over="ignore"):
            line = np.sort(np.concatenate([q, (q[1:] / 2 + q[:-1] / 2), [q[0] - 1, q[-1] + 1]]))
        assert (np.diff(ranks.rank(line, np.full(line.size, m))) >= -1e-15).all()
    if ties == "paper":
        worst = [np.flatnonzero(data.domain_ids == m) for m in set(data.domain_ids.tolist())]
        assert all(found[rows[np.argmax(data.values[rows])]] == 1.0 for rows in worst)


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), st.sampled_from([1, 2, 5, 64, 4096]))
def test_a_histograms_rank_is_off_by_less_than_the_inside_of_its_bin(data, n_bins: int) -> None:
    histogram = histogram_of(data, n_bins)
    found, exact = ranks_in(RankMap.of_histogram(histogram), data), exact_rank(data, "paper")
    inner = histogram.bins["tokens"] - histogram.bins["at_lowest"] - histogram.bins["at_highest"]
    for i, (q, m) in enumerate(zip(data.values.tolist(), data.domain_ids.tolist(), strict=True)):
        place = (q - float(histogram.grid.low[m])) * float(histogram.grid.scale[m])
        b = min(max(int(place), 0), n_bins - 1)
        if q in (histogram.bins["lowest"][m, b], histogram.bins["highest"][m, b]):
            assert found[i] == exact[i]  # also where tie groups are clipped to an end
        else:
            assert abs(found[i] - exact[i]) <= inner[m, b] / histogram.totals.tokens[m] + 1e-12


def _lognormal(n: int, n_domains: int, seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    merged, domain_ids = rng.normal(size=n), rng.integers(0, n_domains, n)
    return merged, domain_ids, np.maximum(np.rint(rng.lognormal(6.8, 0.5, n)), 1).astype(np.int64)


@pytest.mark.parametrize("ties", ["paper", "mid"])
@pytest.mark.parametrize("n_bins", [64, 512])
def test_a_histograms_error_is_the_one_it_expects(ties: str, n_bins: int) -> None:
    # 100,000 documents a table, and errors of 4 domains at three ω: as many normal deviations, about.
    deviations = []
    for seed in range(20):
        merged, domain_ids, tokens = _lognormal(100_000, 4, seed)
        grid = Grid.of_values(merged, domain_ids, 4, n_bins)
        ranks = RankMap.of_histogram(RankHistogram.of(merged, domain_ids, tokens, grid), ties)
        found, exact = ranks.rank(merged, domain_ids), quality_rank(merged, domain_ids, tokens, ties)
        for omega in (0.02, 0.05, 0.3):
            got, wanted = (np.bincount(domain_ids, tokens * (r <= omega), 4) for r in (found, exact))
            expected = ranks.expected_error(np.full(4, omega)) * omega * np.bincount(domain_ids, tokens, 4)
            assert (np.abs(got - wanted) <= 5 * expected + tokens.max()).all()  # and a document at the edge
            deviations += ((got - wanted)[expected > 0] / expected[expected > 0]).tolist()
    assert len(deviations) > 200
    # Within a 64th of the range the density of q̄ is not quite even, which adds to the error.
    assert 0.6 < np.sqrt(np.mean(np.square(deviations))) < (1.2 if n_bins == 512 else 1.7)


def test_expected_error_falls_with_bins_and_is_none_at_bins_ends() -> None:
    merged, domain_ids, tokens = _lognormal(100_000, 4, 0)
    errors = []
    for n_bins in (16, 256, 4096):
        grid = Grid.of_values(merged, domain_ids, 4, n_bins)
        ranks = RankMap.of_histogram(RankHistogram.of(merged, domain_ids, tokens, grid))
        errors.append(ranks.expected_error(np.full(4, 0.05)).mean())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    few = RankMap.of_histogram(
        RankHistogram.of([1.0, 2.0, 1.0], [0, 0, 0], [5, 6, 7], Grid(np.ones(1), np.ones(1) * 2, 1))
    )
    assert few.expected_error([0.5]).tolist() == [0.0]
    assert RankMap.exact(merged, domain_ids, tokens).expected_error(np.full(4, 0.05)).tolist() == [0.0] * 4


# Exact in the window


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), SOME_TIES, st.sampled_from([1, 2, 5, 64, 4096]), SEED)
def test_an_exact_tail_is_the_exact_map_wherever_the_window_can_be(data, ties: str, n_bins: int, seed: int) -> None:
    omega = np.random.default_rng(seed).choice([1e-9, 0.05, 0.3, 0.8, 1.0], N_DOMAINS)
    histogram = histogram_of(data, n_bins)
    last = histogram.last_bins(omega)
    rows = histogram.grid.rows_upto(last, data.values, data.domain_ids)
    ranks = RankMap.of_histogram(histogram, ties).with_exact_tail(exact_map(data.take(rows), ties), last)
    found, exact = ranks_in(ranks, data), exact_rank(data, ties)
    inside = exact <= omega[data.domain_ids]
    np.testing.assert_array_equal(found[inside], exact[inside])
    assert (found[~inside] > omega[data.domain_ids][~inside]).all()
    np.testing.assert_array_equal(found[rows], exact[rows])
    assert ranks.method == "exact"
    assert same_bits(RankMap.from_table(ranks.to_table()).to_table(), ranks.to_table())
    np.testing.assert_array_equal(ranks_in(RankMap.from_table(ranks.to_table()), data), found)


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), SOME_TIES, st.sampled_from([1, 5, 4096]), SEED, st.booleans())
def test_beyond_the_cut_no_document_is_in_the_window(data, ties: str, n_bins: int, seed: int, exact: bool) -> None:
    omega = np.random.default_rng(seed).choice([1e-9, 0.05, 0.3, 0.8, 1.0], N_DOMAINS)
    ranks = exact_map(data, ties) if exact else RankMap.of_histogram(histogram_of(data, n_bins), ties)
    cut, found = ranks.cut(omega), ranks_in(ranks, data)
    beyond = data.values > cut[data.domain_ids]
    assert (found[beyond] > omega[data.domain_ids][beyond]).all()
    if exact and ties == "paper":  # and it lies no further than one group of equal q̄
        for m in set(data.domain_ids.tolist()):
            own = data.domain_ids == m
            outside = own & ~beyond & (found > omega[m])
            assert len(set(data.values[outside].tolist())) <= 1


# Later documents


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), documents(20), SOME_TIES, st.sampled_from(["exact", "histogram", "subset"]))
def test_later_documents_leave_old_ranks_as_they_are(data, later, ties: str, method: str) -> None:
    if method == "exact":
        ranks = exact_map(data, ties)
    elif method == "histogram":
        ranks = RankMap.of_histogram(histogram_of(data, 16), ties)
    else:
        ranks = RankMap.of_sample(sample_of(data, 5, True), ties)
    before, frozen = ranks_in(ranks, data), ranks.to_table()
    later = later.take(np.isin(later.domain_ids, data.domain_ids))
    alone = ranks_in(ranks, later)
    assert ((alone > 0) & (alone <= 1)).all()
    together = ranks_in(ranks, type(data)(*(np.concatenate(pair) for pair in zip(data, later, strict=True))))
    np.testing.assert_array_equal(together, np.concatenate([before, alone]))
    assert same_bits(ranks.to_table(), frozen)


@settings(max_examples=FEWER, deadline=None)
@given(documents(40), documents(10))
def test_a_later_document_gets_the_share_that_is_at_least_as_good(data, later) -> None:
    later = later.take(np.isin(later.domain_ids, data.domain_ids))
    found = exact_map(data, "paper").rank(later.values, later.domain_ids)
    for q, m, r in zip(later.values, later.domain_ids, found, strict=True):
        own = data.domain_ids == m
        mass = int(data.tokens[own & (data.values <= q)].sum())
        assert r == max(mass / int(data.tokens[own].sum()), np.finfo(float).tiny)


def test_later_documents_by_hand() -> None:
    known = RankMap.exact([1.0, 2.0], [0, 0], [30, 70])
    np.testing.assert_allclose(known.rank([1.0, 1.5, 2.0, 9.0], [0] * 4), [0.3, 0.3, 1.0, 1.0])
    better = known.rank([0.5], [0])[0]
    assert 0 < better < 1e-300
    mid = RankMap.exact([1.0, 2.0], [0, 0], [30, 70], "mid")
    np.testing.assert_allclose(mid.rank([1.0, 1.5, 2.0, 9.0], [0] * 4), [0.15, 0.3, 0.65, 1.0])


def test_a_later_tie_falls_into_its_place_in_the_order_of_the_hash() -> None:
    tie = np.array([100, 200], dtype=np.uint64)
    known = RankMap.exact([1.0, 1.0], [0, 0], [30, 70], "hash", tie)
    later = known.rank([1.0] * 5, [0] * 5, np.array([50, 100, 150, 200, 300], dtype=np.uint64))
    np.testing.assert_allclose(later, [0, 0.3, 0.3, 1, 1], atol=1e-300)


# States of a corpus, and tables


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), SOME_TIES, st.sampled_from(["exact", "histogram", "subset"]), st.sampled_from([1, 3]), SEED)
def test_any_partitioning_gives_the_map_of_the_whole(data, ties: str, method: str, parts: int, seed: int) -> None:
    data = data._replace(values=data.values + 0.0)
    grid = histogram_of(data, 16).grid
    make = {
        "exact": lambda part: exact_map(part, ties),
        "histogram": lambda part: RankHistogram.of(part.values, part.domain_ids, part.tokens, grid),
        "subset": lambda part: sample_of(part, 1 + seed % 9, seed % 2 == 0),
    }[method]
    whole = RankMap.of_states([make(data).to_table()], ties)
    states = (make(part).to_table() for part in pieces(data, parts, seed))
    merged = RankMap.of_states(states, ties)
    assert (merged.method, merged.ties) == (method, ties)
    assert same_bits(merged.to_table(), whole.to_table())
    np.testing.assert_array_equal(ranks_in(merged, data), ranks_in(whole, data))
    again = RankMap.from_table(merged.to_table())
    assert same_bits(again.to_table(), merged.to_table())
    np.testing.assert_array_equal(ranks_in(again, data), ranks_in(whole, data))


@pytest.mark.parametrize("parts", [1, 7, 64])
@pytest.mark.parametrize("ties", TIES)
def test_thousands_of_documents_have_the_same_map_in_any_partitioning(ties: str, parts: int) -> None:
    rng = np.random.default_rng(parts)
    n = 5000
    values = np.where(rng.random(n) < 0.5, rng.integers(0, 20, n), rng.normal(size=n))
    data = Documents(values, rng.integers(0, N_DOMAINS, n), rng.integers(1, 999, n), rng.permutation(n))
    cut = pieces(data, parts, parts)
    merged = RankMap.of_states([exact_map(part, ties).to_table() for part in cut], ties)
    assert same_bits(merged.to_table(), exact_map(data, ties).to_table())
    for part in cut:
        own = np.isin(data.doc_ids, part.doc_ids)
        order = np.argsort(part.doc_ids)
        expected = exact_rank(data, ties)[own][np.argsort(data.doc_ids[own])]
        np.testing.assert_array_equal(ranks_in(merged, part)[order], expected)


@pytest.mark.parametrize("ties", TIES)
def test_a_map_survives_a_parquet_file(ties: str, tmp_path) -> None:
    import pyarrow.parquet as pq

    rng = np.random.default_rng(4)
    merged, domain_ids, tokens = rng.integers(0, 9, 100) / 9, rng.integers(0, 5, 100), rng.integers(1, 99, 100)
    tie = tie_hash(hash64(np.arange(100)))
    ranks = RankMap.exact(merged, domain_ids, tokens, ties, tie)
    pq.write_table(ranks.to_table(), tmp_path / "rank_map.parquet")
    again = RankMap.from_table(pq.read_table(tmp_path / "rank_map.parquet"))
    assert (again.ties, again.method, again.domains) == (ties, "exact", ())
    np.testing.assert_array_equal(again.rank(merged, domain_ids, tie), ranks.rank(merged, domain_ids, tie))
    assert again.totals.as_rows().tolist() == ranks.totals.as_rows().tolist()


# Subset


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), SOME_TIES, st.integers(1, 70), st.booleans())
def test_a_subset_ranks_by_its_own_documents_alone(data, ties: str, limit: int, per_domain: bool) -> None:
    sample = sample_of(data, limit, per_domain)
    ranks = RankMap.of_sample(sample, ties)
    found = ranks_in(ranks, data)
    chosen = np.isin(hash64(data.doc_ids), sample.hashes)
    np.testing.assert_array_equal(found[chosen], exact_rank(data.take(chosen), ties))
    absent = ~np.isin(data.domain_ids, sample.domain_ids)
    assert (found[absent] == 1.0).all()
    assert ((found > 0) & (found <= 1)).all()
    if limit >= len(data.tokens):
        np.testing.assert_array_equal(found, exact_rank(data, ties))


def test_a_domain_that_the_subset_lacks_gets_rank_1_and_an_error_of_all() -> None:
    ranks = RankMap.of_sample(RankSample.of([1.0, 2.0], [0, 2], [1, 1], hash64([1, 2])))
    np.testing.assert_array_equal(ranks.rank([5.0, 0.0, 1.0], [1, 7, 0]), [1.0, 1.0, 1.0])
    assert ranks.expected_error([0.1, 0.1, 0.1])[1] == 1.0


@pytest.mark.parametrize("method", ["exact", "subset"])
def test_a_map_that_lacks_the_last_domains_of_theta_has_an_error_for_each(method: str) -> None:
    # θ has four domains, the corpus or its subset documents of two of them.
    if method == "exact":
        ranks = RankMap.exact([1.0, 2.0], [0, 1], [1, 1])
    else:
        ranks = RankMap.of_sample(RankSample.of([1.0, 2.0], [0, 1], [1, 1], hash64([1, 2])))
    error = ranks.expected_error(np.full(4, 0.1))
    assert error.shape == (4,)
    assert error[2:].tolist() == ([1.0, 1.0] if method == "subset" else [0.0, 0.0])
    assert ranks.cut(np.full(4, 0.1)).shape[0] >= 2


@pytest.mark.parametrize("omega", [0.02, 0.05, 0.3])
def test_a_subsets_expected_error_is_its_spread_over_seeds(omega: float) -> None:
    rng = np.random.default_rng(8)
    n, k = 20_000, 500
    merged, zeros = rng.normal(size=n), np.zeros(n, int)
    tokens = np.maximum(np.rint(rng.lognormal(6.3, 0.8, n)), 1).astype(np.int64)
    selected, expected = [], []
    for seed in range(300):
        ranks = RankMap.of_sample(RankSample.of(merged, zeros, tokens, hash64(np.arange(n), seed), k))
        selected.append(tokens[ranks.rank(merged, zeros) <= omega].sum() / tokens.sum())
        expected.append(ranks.expected_error([omega])[0])
    spread = np.std(selected) / omega
    # The estimate of a standard deviation from 300 draws is itself within 5/√600 of it.
    assert spread == pytest.approx(np.mean(expected), rel=5 / math.sqrt(600))
    assert np.mean(selected) == pytest.approx(omega, rel=0.1)


def test_ten_thousand_documents_in_all_leave_small_domains_to_chance() -> None:
    # The design's figures: a domain of 1 % has some 100 documents of the subset, and an error of tens of per cent.
    rng = np.random.default_rng(2)
    n = 200_000
    domain_ids = (rng.random(n) < 0.01).astype(np.int64)
    columns = (rng.normal(size=n), domain_ids, np.maximum(np.rint(rng.lognormal(6.3, 1.1, n)), 1).astype(np.int64))
    in_all, each = (
        RankMap.of_sample(RankSample.of(*columns, hash64(np.arange(n)), 10_000, per_domain)).expected_error([0.05] * 2)
        for per_domain in (False, True)
    )
    assert in_all[0] < 0.12
    assert in_all[1] > 0.4
    assert each[1] < 0.25


# Bad input


def test_a_map_refuses_what_it_cannot_rank() -> None:
    known = RankMap.exact([1.0], [0], [1])
    with pytest.raises(InputError, match="domain id 3: the rank map has no document of it; fit it on this corpus"):
        known.rank([1.0], [3])
    with pytest.raises(InputError, match=r"merged \(2,\) and domain_ids \(1,\) must be .* of one length"):
        known.rank([1.0, 2.0], [0])
    with pytest.raises(InputError, match=r"merged \(1, 1\)"):
        known.rank([[1.0]], [[0]])
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(InputError, match=r"merged: 1 of 2 documents .*first rows \[1\]\); drop them"):
            known.rank([1.0, bad], [0, 0])
    with pytest.raises(InputError, match="domain_ids: type float64; give integers"):
        known.rank([1.0], [0.0])
    with pytest.raises(InputError, match="domain_ids: 1 outside the range, first -1"):
        known.rank([1.0], [-1])
    gap = RankMap.exact([1.0, 1.0], [0, 2], [1, 1])
    with pytest.raises(InputError, match="domain id 1: the rank map has no document of it"):
        gap.rank([1.0], [1])


@pytest.mark.parametrize(
    ("merged", "domains", "tokens", "says"),
    [
        ([1.0], [0, 0], [1, 1], r"merged \(1,\), domain_ids \(2,\) and tokens \(2,\) must be .* of one length"),
        ([1.0, np.nan], [0, 0], [1, 1], r"merged: 1 of 2 documents .*\[1\]\); drop"),
        ([1.0, 2.0], [0, 0], [1, 0], "tokens: 1 documents have 0 tokens; drop empty documents first"),
        ([1.0, 2.0], [0, 0], [1.0, 2.0], "tokens: type float64; give integers"),
        ([1.0, 2.0], [0, -4], [1, 1], "domain_ids: 1 outside the range, first -4; give positions from 0"),
    ],
)
def test_bad_documents_are_refused_with_place_value_and_remedy(merged, domains, tokens, says: str) -> None:
    with pytest.raises(InputError, match=says):
        RankMap.exact(merged, domains, tokens)


def test_an_unknown_rule_for_ties_is_refused_by_every_way_to_a_map() -> None:
    histogram = RankHistogram.of([1.0], [0], [1], Grid(np.zeros(1), np.ones(1), 4))
    sample = RankSample.of([1.0], [0], [1], hash64([1]))
    for make in (
        lambda: RankMap.exact([1.0], [0], [1], "best"),  # pyright: ignore[reportArgumentType]
        lambda: RankMap.of_histogram(histogram, "best"),  # pyright: ignore[reportArgumentType]
        lambda: RankMap.of_sample(sample, "best"),  # pyright: ignore[reportArgumentType]
        lambda: RankMap.of_states([histogram.to_table()], "best"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(InputError, match="ties='best'; choose 'paper', 'mid' or 'hash'"):
            make()


def test_ties_by_hash_need_a_hash_of_every_document() -> None:
    tie = tie_hash(hash64([1, 2, 3]))
    with pytest.raises(InputError, match="ties='hash' needs the hashes of the documents' ids; give tie_hash"):
        RankMap.exact([1.0], [0], [1], "hash")
    known = RankMap.exact([1.0] * 3, [0] * 3, [1] * 3, "hash", tie)
    with pytest.raises(InputError, match="ties='hash' needs the hashes of the documents' ids; give tie_hash"):
        known.rank([1.0], [0])


@pytest.mark.parametrize("given_hashes", [0, 1, 5])
def test_hashes_of_another_number_than_the_documents_are_refused(given_hashes: int) -> None:
    tie, wrong = tie_hash(hash64([1, 2, 3])), tie_hash(hash64(np.arange(given_hashes)))
    with pytest.raises(InputError, match=rf"hashes.*\({given_hashes},\)"):
        RankMap.exact([1.0] * 3, [0] * 3, [1] * 3, "hash", wrong)
    known = RankMap.exact([1.0] * 3, [0] * 3, [1] * 3, "hash", tie)
    with pytest.raises(InputError, match=rf"hashes.*\({given_hashes},\)"):
        known.rank([1.0] * 3, [0] * 3, wrong)


def test_what_does_not_merge_is_refused() -> None:
    paper, mid = (RankMap.exact([1.0], [0], [1], ties) for ties in ("paper", "mid"))
    grid = Grid(np.zeros(1), np.ones(1), 4)
    histogram = RankHistogram.of([1.0], [0], [1], grid)
    sample = RankSample.of([1.0], [0], [1], hash64([1]))
    for first, second in pairwise(
        [paper, mid, paper, RankMap.of_histogram(histogram), paper, RankMap.of_sample(sample)]
    ):
        with pytest.raises(InputError, match="only exact maps of one rule for ties merge; merge histograms before"):
            RankMap.merge([first, second])
    with pytest.raises(InputError, match="rank map: no states; the corpus is empty"):
        RankMap.of_states([])
    kinds = [histogram.to_table(), sample.to_table(), paper.to_table()]
    for i in range(3):
        with pytest.raises(InputError, match="rank map: the table holds a "):
            RankMap.of_states([kinds[i], kinds[i - 1]])
    with pytest.raises(InputError, match=r"the table does not say of what; give a rank_map.parquet of a run"):
        RankMap.from_table(pa.table({"domain_id": [1]}))


def test_states_of_another_rule_for_ties_than_asked_for_are_refused() -> None:
    mid = RankMap.exact([1.0], [0], [1], "mid").to_table()
    with pytest.raises(InputError, match="ties"):
        RankMap.of_states([mid], "paper")
