"""Rank states against plain loops, and that merging them in any order and partitioning gives the same bits."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import FEWER, Documents, documents, numbers, parameters
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64, tie_hash, unit_interval
from quadmix_plugin.parameters import sample_parameters
from quadmix_plugin.rank_states import Grid, RankHistogram, RankSample, Totals
from quadmix_plugin.ranking import merge_quality

SEED = st.integers(0, 2**32 - 1)
N_DOMAINS = 6
PARTS = st.sampled_from([1, 3])  # and 7 and 64 in tests of their own, with documents for all of them
FIELDS = ("tokens", "lowest", "highest", "at_lowest", "at_highest")


def grid_of(data, n_bins: int) -> Grid:
    return Grid.of_values(data.values, data.domain_ids, N_DOMAINS, n_bins)


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


def in_any_tree(states: list, seed: int):
    """Merges in pairs of a random tree."""
    rng = np.random.default_rng(seed)
    states = list(states)
    while len(states) > 1:
        i, j = rng.choice(len(states), 2, replace=False)
        merged = type(states[0]).merge([states[i], states[j]])
        states = [state for k, state in enumerate(states) if k not in (i, j)] + [merged]
    return states[0]


# Grid


@settings(max_examples=FEWER, deadline=None)
@given(documents(40, 5, 3, np.float32), SEED, st.sampled_from([1, 7, 4096]))
def test_a_grid_holds_every_q_that_eq_1_gives(data, seed: int, n_bins: int) -> None:
    theta = parameters(np.random.default_rng(seed), 3, 5)
    merged = merge_quality(data.values, data.domain_ids, theta)
    low, high = np.full((2, 5, 3), np.nan, dtype=np.float32)
    for m in set(data.domain_ids.tolist()):
        rows = data.values[data.domain_ids == m]
        low[m], high[m] = rows.min(axis=0), rows.max(axis=0)
    counts = np.bincount(data.domain_ids, minlength=5)
    names = tuple("abcde")
    grid = Grid.of(theta, DomainSummary(names, ("x", "y", "z"), counts, counts, low, high), n_bins)
    assert grid.n_bins == n_bins
    assert (grid.low[data.domain_ids] <= merged).all()
    assert (merged <= grid.high[data.domain_ids]).all()
    assert np.isfinite(grid.scale).all()
    assert (grid.scale >= 0).all()
    for m in set(data.domain_ids.tolist()):  # the ends are q̄ of the ends of the scores, so no bin is wasted
        ends = merge_quality(np.stack([low[m], high[m]]), [m, m], theta)
        assert [grid.low[m], grid.high[m]] == ends.tolist()


def test_a_grid_of_other_domains_or_scorers_is_refused() -> None:
    theta = sample_parameters(1, 2, 3, seed=0)[0]
    ends = np.zeros((2, 2), dtype=np.float32)
    summary = DomainSummary(("a", "b"), ("x", "y"), np.ones(2, int), np.ones(2, int), ends, ends)
    with pytest.raises(InputError, match=r"3 domains and 2 scorers, the summary .* 2 and 2; use parameters of this co"):
        Grid.of(theta, summary)


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), st.sampled_from([1, 2, 7, 64, 4096]), SEED)
def test_bins_never_fall_as_q_grows_and_rows_upto_are_those_in_them(data, n_bins: int, seed: int) -> None:
    grid = grid_of(data, n_bins)
    histogram = RankHistogram.of(data.values, data.domain_ids, data.tokens, grid)
    last = np.random.default_rng(seed).integers(-1, n_bins, N_DOMAINS)
    rows = grid.rows_upto(last, data.values, data.domain_ids)
    inside = np.zeros(len(data.tokens), dtype=bool)
    inside[rows] = True
    assert (np.diff(rows) > 0).all()
    for m in range(N_DOMAINS):
        upto, mine = last[m] + 1, data.domain_ids == m
        assert data.tokens[inside & mine].sum() == histogram.bins["tokens"][m, :upto].sum()
        if (inside & mine).any() and (mine & ~inside).any():
            assert data.values[inside & mine].max() < data.values[mine & ~inside].min()


def test_documents_outside_the_grid_are_in_the_end_bins() -> None:
    grid = Grid(np.array([0.0]), np.array([1.0]), 4)
    bins = RankHistogram.of([-9.0, -1e300, 0.3, 1.0, 7.0, 1e300], [0] * 6, [1, 2, 4, 8, 16, 32], grid).bins
    assert bins["tokens"][0].tolist() == [3, 4, 0, 56]
    assert bins["lowest"][0, [0, 3]].tolist() == [-1e300, 1.0]
    assert bins["highest"][0, [0, 3]].tolist() == [-9.0, 1e300]


def test_grids_are_the_same_when_all_bins_are() -> None:
    low, high = np.array([0.0, 1.0]), np.array([1.0, 1.0])
    assert Grid(low, high, 4).same(Grid(low.copy(), high.copy(), 4))
    for other in (Grid(low, high, 5), Grid(low - 1, high, 4), Grid(low, high + 1, 4), Grid(low[:1], high[:1], 4)):
        assert not Grid(low, high, 4).same(other)


# Totals


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), PARTS, SEED)
def test_totals_are_sums_and_merge_to_those_of_all(data, parts: int, seed: int) -> None:
    data = data._replace(tokens=data.tokens % (1 << 20) + 1)
    whole = Totals.of(data.domain_ids, data.tokens, N_DOMAINS)
    # A part may know of fewer domains than the whole, as it has none of the last.
    states = [
        Totals.of(part.domain_ids, part.tokens, int(part.domain_ids.max(initial=-1)) + 1)
        for part in pieces(data, parts, seed)
    ]
    merged = Totals.merge([*states, Totals.of(data.domain_ids[:0], data.tokens[:0], N_DOMAINS)])
    assert merged.as_rows().tolist() == whole.as_rows().tolist()
    for m in range(N_DOMAINS):
        tokens = [int(w) for w in data.tokens[data.domain_ids == m]]
        squares = int(whole.squares[m]) + (int(whole.large_squares[m]) << 32)
        found = [int(whole.documents[m]), int(whole.tokens[m]), squares]
        assert found == [len(tokens), sum(tokens), sum(w * w for w in tokens)]
        if tokens:
            assert whole.mean[m] == pytest.approx(sum(tokens) / len(tokens))
            effect = len(tokens) * sum(w * w for w in tokens) / sum(tokens) ** 2
            assert whole.design_effect[m] == pytest.approx(effect)
            assert whole.design_effect[m] >= 1 - 1e-12


def test_totals_of_nothing_and_of_equal_lengths() -> None:
    assert Totals.merge([]).documents.size == 0
    totals = Totals.of(np.array([0, 0, 2]), np.array([5, 5, 9]), 3)
    assert totals.design_effect.tolist() == [1.0, 0.0, 1.0]
    assert totals.mean.tolist() == [5.0, 0.0, 9.0]


def test_the_design_effect_of_whole_books_is_still_that() -> None:
    # 10 million documents of a million tokens each: Σ tokens² is beyond int64.
    books = Totals.merge([Totals.of(np.zeros(10, int), np.full(10, 10**9), 1)] * 4)
    assert books.design_effect[0] == pytest.approx(1.0)


# RankHistogram


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), st.sampled_from([1, 3, 16, 4096]))
def test_a_histogram_is_the_plain_loops(data, n_bins: int) -> None:
    grid = grid_of(data, n_bins)
    bins = RankHistogram.of(data.values, data.domain_ids, data.tokens, grid).bins
    members: dict[tuple[int, int], list[int]] = {}
    for i, (q, m) in enumerate(zip(data.values.tolist(), data.domain_ids.tolist(), strict=True)):
        place = (q - float(grid.low[m])) * float(grid.scale[m])
        members.setdefault((m, min(max(int(place), 0), n_bins - 1)), []).append(i)
    assert {tuple(at) for at in np.argwhere(bins["tokens"]).tolist()} == set(members)
    for at, rows in members.items():
        q, w = data.values[rows], data.tokens[rows]
        found = [bins[name][at] for name in FIELDS]
        assert found == [w.sum(), q.min(), q.max(), w[q == q.min()].sum(), w[q == q.max()].sum()]


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), st.sampled_from([1, 3, 64]), PARTS, SEED)
def test_histograms_merge_to_the_same_bits_in_any_order(data, n_bins: int, parts: int, seed: int) -> None:
    data = data._replace(values=data.values + 0.0)  # for -0.0 there is a test of its own
    grid = grid_of(data, n_bins)
    whole = RankHistogram.of(data.values, data.domain_ids, data.tokens, grid).to_table()
    states = [RankHistogram.of(p.values, p.domain_ids, p.tokens, grid) for p in pieces(data, parts, seed)]
    before = [state.bins.tobytes() for state in states]
    assert same_bits(RankHistogram.merge(iter(states)).to_table(), whole)
    assert same_bits(in_any_tree(states, seed).to_table(), whole)
    again = RankHistogram.merge([RankHistogram.from_table(state.to_table()) for state in states])
    assert same_bits(again.to_table(), whole)
    assert before == [state.bins.tobytes() for state in states]  # what is merged stays as it was


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), st.sampled_from([1, 3, 16, 4096]), SEED)
def test_beyond_the_last_bin_no_document_is_in_the_window(data, n_bins: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = grid_of(data, n_bins)
    histogram = RankHistogram.of(data.values, data.domain_ids, data.tokens, grid)
    share = rng.choice([1e-9, 0.05, 0.5, 1.0, rng.random()], N_DOMAINS)
    last = histogram.last_bins(share)
    assert ((last >= 0) & (last < n_bins)).all()
    inside = np.zeros(len(data.tokens), dtype=bool)
    inside[grid.rows_upto(last, data.values, data.domain_ids)] = True
    for m in set(data.domain_ids.tolist()):
        mine = data.domain_ids == m
        through = histogram.bins["tokens"][m, : last[m] + 1].sum() / data.tokens[mine].sum()
        # All beyond have a greater share before them; and no bin more than needed is read.
        assert through > share[m] or inside[mine].all()
        assert histogram.bins["tokens"][m, : last[m]].sum() / data.tokens[mine].sum() <= share[m]


@pytest.mark.parametrize("n_bins", [1, 64])
def test_zero_of_either_sign_leaves_the_same_bits(n_bins: int) -> None:
    grid = Grid(np.zeros(1), np.ones(1), n_bins)
    states = [RankHistogram.of(q, [0, 0], [1, 1], grid) for q in ([0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0])]
    assert same_bits(states[0].to_table(), states[1].to_table())
    assert same_bits(states[0].to_table(), states[2].to_table())


def test_histograms_of_different_bins_do_not_merge() -> None:
    grids = [Grid(np.zeros(1), np.ones(1), 4), Grid(np.zeros(1), np.ones(1), 5), Grid(np.zeros(1), np.full(1, 2.0), 4)]
    states = [RankHistogram.of([0.5], [0], [1], grid) for grid in grids]
    for other in states[1:]:
        with pytest.raises(InputError, match="states of different bins; fit them with one θ, one σ and one summary"):
            RankHistogram.merge([states[0], other])
    with pytest.raises(InputError, match="nothing to merge; give at least one state"):
        RankHistogram.merge([])


# RankSample


def sample_of(data, limit: int, per_domain: bool) -> RankSample:
    return RankSample.of(data.values, data.domain_ids, data.tokens, hash64(data.doc_ids), limit, per_domain)


def ids_of(sample: RankSample) -> set[int]:
    return set(sample.hashes.tolist())


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), st.integers(1, 70), st.booleans())
def test_a_subset_is_of_so_many_documents_with_all_their_columns(data, limit: int, per_domain: bool) -> None:
    sample = sample_of(data, limit, per_domain)
    counts = np.bincount(data.domain_ids, minlength=N_DOMAINS)
    if per_domain:
        taken = np.bincount(sample.domain_ids, minlength=N_DOMAINS)
        assert taken.tolist() == np.minimum(counts, limit).tolist()
    else:
        assert sample.tokens.size == min(limit, counts.sum())
    row = {h: i for i, h in enumerate(hash64(data.doc_ids).tolist())}
    at = [row[h] for h in sample.hashes.tolist()]
    assert len(set(at)) == len(at)
    for name, column in (("merged", data.values), ("domain_ids", data.domain_ids), ("tokens", data.tokens)):
        np.testing.assert_array_equal(getattr(sample, name), column[at])
    assert ids_of(sample) >= ids_of(sample_of(data, max(1, limit // 2), per_domain))  # a larger one holds a smaller


@settings(max_examples=FEWER, deadline=None)
@given(documents(60), st.sampled_from([1, 3, 20]), st.booleans(), PARTS, SEED)
def test_subsets_merge_to_the_same_bits_in_any_order(data, limit: int, per_domain: bool, parts: int, seed: int) -> None:
    whole = sample_of(data, limit, per_domain).to_table()
    states = [sample_of(part, limit, per_domain) for part in pieces(data, parts, seed)]
    assert same_bits(RankSample.merge(iter(states)).to_table(), whole)
    assert same_bits(in_any_tree(states, seed).to_table(), whole)
    again = RankSample.merge([RankSample.from_table(state.to_table()) for state in states])
    assert same_bits(again.to_table(), whole)
    assert (again.limit, again.per_domain) == (limit, per_domain)


def test_who_is_in_the_subset_says_nothing_of_the_draw_or_of_ties() -> None:
    hashes = hash64(np.arange(100_000), 3)
    for per_domain in (True, False):
        sample = RankSample.of(
            np.zeros(100_000), np.zeros(100_000, int), np.ones(100_000, int), hashes, 2000, per_domain
        )
        for u in (unit_interval(sample.hashes), unit_interval(tie_hash(sample.hashes))):
            assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * 2000)
            assert u.min() < 0.01
            assert u.max() > 0.99


def test_no_subsets_do_not_merge() -> None:
    with pytest.raises(InputError, match="rank subset: nothing to merge; give at least one state"):
        RankSample.merge([])


def test_subsets_of_different_rules_do_not_merge() -> None:
    states = [RankSample.of([1.0], [0], [1], hash64([i]), *how) for i, how in enumerate([(5, True), (3, True)])]
    with pytest.raises(InputError, match=r"subset.*5.*3"):
        RankSample.merge(states)
    states = [RankSample.of([1.0], [0], [1], hash64([i]), 5, how) for i, how in enumerate([True, False])]
    with pytest.raises(InputError, match="subset"):
        RankSample.merge(states)


@pytest.mark.parametrize("parts", [1, 7, 64])
@pytest.mark.parametrize("kind", ["few", "normal", "clipped"])
def test_thousands_of_documents_leave_the_same_states_in_any_partitioning(kind: str, parts: int) -> None:
    rng = np.random.default_rng(parts)
    n = 5000
    values = numbers(rng, (n,), kind) + 0.0
    data = Documents(values, rng.integers(0, N_DOMAINS, n), rng.integers(1, 999, n), rng.permutation(n))
    grid = grid_of(data, 256)
    cut = pieces(data, parts, parts)
    for make in (
        lambda part: RankHistogram.of(part.values, part.domain_ids, part.tokens, grid),
        lambda part: sample_of(part, 100, True),
        lambda part: sample_of(part, 100, False),
    ):
        whole, states = make(data).to_table(), [make(part) for part in cut]
        assert same_bits(type(states[0]).merge(states).to_table(), whole)
        assert same_bits(in_any_tree(states, parts).to_table(), whole)


# Bad input


@pytest.mark.parametrize(
    ("merged", "domains", "tokens", "says"),
    [
        ([1.0], [0, 0], [1, 1], r"merged \(1,\), domain_ids \(2,\) and tokens \(2,\) must be .* of one length"),
        ([1.0, np.nan], [0, 0], [1, 1], r"merged: 1 of 2 documents .*\[1\]\); drop"),
        ([np.inf, 1.0], [0, 0], [1, 1], r"merged: 1 of 2 documents .*\[0\]\); drop"),
        ([1.0, 2.0], [0, 0], [1, 0], "tokens: 1 documents have 0 tokens; drop empty documents first"),
        ([1.0, 2.0], [0, 0], [1, -2], "tokens: 1 documents have -2 tokens"),
        ([1.0, 2.0], [0, 0], [1.0, 2.0], "tokens: type float64; give integers"),
        ([1.0, 2.0], [0, -1], [1, 1], "domain_ids: 1 outside the range, first -1; give positions from 0"),
        ([1.0, 2.0], [0.0, 1.0], [1, 1], "domain_ids: type float64; give integers"),
    ],
)
def test_bad_documents_are_refused_with_place_value_and_remedy(merged, domains, tokens, says: str) -> None:
    with pytest.raises(InputError, match=says):
        RankHistogram.of(merged, domains, tokens, Grid(np.zeros(3), np.ones(3), 4))
    with pytest.raises(InputError, match=says):
        RankSample.of(merged, domains, tokens, hash64([1, 2]))


def test_a_domain_outside_the_grid_is_refused() -> None:
    with pytest.raises(InputError, match="domain_ids: 1 outside the range, first 3; give positions from 0 to 2"):
        RankHistogram.of([1.0, 1.0], [0, 3], [1, 1], Grid(np.zeros(3), np.ones(3), 4))


def test_hashes_of_another_number_than_the_documents_are_refused() -> None:
    with pytest.raises(InputError, match=r"merged \(1,\) and doc_ids \(2,\) must be .* of one length"):
        RankSample.of([1.0], [0], [1], hash64([1, 2]))


@pytest.mark.parametrize("n_bins", [0, -1])
def test_a_grid_without_bins_is_refused(n_bins: int) -> None:
    with pytest.raises(InputError, match=f"bins.*{n_bins}"):
        Grid(np.zeros(1), np.ones(1), n_bins)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_subset_of_no_documents_is_refused(limit: int) -> None:
    with pytest.raises(InputError, match=f"{limit}"):
        RankSample.of([1.0], [0], [1], hash64([1]), limit)


def test_a_table_of_something_else_is_refused() -> None:
    with pytest.raises(InputError, match=r"the table does not say of what; give a rank_map.parquet of a run"):
        RankHistogram.from_table(pa.table({"a": [1]}))
    histogram = RankHistogram.of([1.0], [0], [1], Grid(np.zeros(1), np.ones(1), 4)).to_table()
    with pytest.raises(InputError, match="the table holds a histogram, not a subset; give one of the same method"):
        RankSample.from_table(histogram)
