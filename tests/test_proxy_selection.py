"""A proxy's documents: those of its θ or its baseline, thinned by hash alone to the final run's repetition."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quadmix_plugin import count_copies, sample_parameters
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import uniform
from quadmix_plugin.parameters import ParameterSpace
from quadmix_plugin.proxy.selection import (
    Draws,
    MatchedEpochs,
    ProxySelection,
    ProxyTable,
    baselines_table,
    read_baseline,
)

N, M, SCORERS = 20_000, 4, ("a", "b")
DOMAINS = tuple(f"d{m}" for m in range(M))
SPACE = ParameterSpace(omega_max=0.5)


def table_of(n, ids=None):
    rng = np.random.default_rng(2)
    return ProxyTable(
        doc_ids=pa.array(np.arange(n)) if ids is None else ids,
        domain_ids=rng.integers(0, M, n),
        tokens=rng.integers(20, 2000, n),
        normalised=rng.random((n, 2)).astype(np.float32),
        domains=DOMAINS,
        scorers=SCORERS,
    )


@pytest.fixture(scope="module")
def table():
    return table_of(N)


@pytest.fixture(scope="module")
def thetas():
    return sample_parameters(12, len(SCORERS), M, 5, space=SPACE)


def counted(table, theta, **options):
    return count_copies(table.normalised, table.domain_ids, table.tokens, table.doc_ids, theta, **options)


@pytest.mark.parametrize("ids", [pa.array([f"x{i}" for i in range(50)]), pa.array(range(50), pa.uint64())])
def test_a_table_is_the_same_after_parquet(tmp_path, ids):
    before = table_of(50, ids)
    pq.write_table(before.to_arrow(), tmp_path / "table.parquet", row_group_size=7)
    after = ProxyTable.load(tmp_path / "table.parquet")
    assert after.doc_ids.equals(before.doc_ids)
    assert (after.domains, after.scorers) == (before.domains, before.scorers)
    for name in ("domain_ids", "tokens", "normalised"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype
    with pytest.raises(InputError, match=r"other\.parquet: no such file"):
        ProxyTable.load(tmp_path / "other.parquet")


@pytest.mark.parametrize("method", ["histogram", "exact", "subset"])
def test_the_documents_are_those_of_count_copies(table, thetas, method):
    draws = Draws(method=method, ties="mid", bins=64, subset_documents=300, seed=9, thin=0.5)
    selection = ProxySelection(table, draws)
    for theta in thetas[:3]:
        found = selection.copies(theta)
        plain = counted(table, theta, seed=9, method=method, ties="mid", bins=64, subset_documents=300, thin=0.5)
        np.testing.assert_array_equal(found, plain)
        assert found.any()


@pytest.mark.parametrize("method", ["histogram", "exact"])
def test_a_large_corpus_is_indexed_to_the_same_documents(thetas, method):
    table = table_of(200_000)
    selection = ProxySelection(table, Draws(method=method, seed=9, independent=True))
    for stream, theta in enumerate(thetas[:2]):
        found = selection.copies(theta, stream)
        np.testing.assert_array_equal(found, counted(table, theta, seed=9, method=method, stream=stream))


def test_draws_are_common_unless_they_are_independent(table, thetas):
    common, independent = (ProxySelection(table, Draws(seed=9, independent=each)) for each in (False, True))
    one, two = (common.copies(thetas[0], stream) for stream in (0, 7))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, independent.copies(thetas[0], 0))
    assert (one != independent.copies(thetas[0], 7)).mean() > 0.001


def test_a_thinned_pool_has_every_document_that_a_proxy_can_need(table, thetas):
    thin = 0.1
    draws = Draws(seed=9, thin=thin, below=thin * (2**SPACE.eta_max + SPACE.epsilon_max))
    selection, whole = ProxySelection(table, draws), ProxySelection(table, Draws(seed=9))
    assert 0.18 < selection.in_pool.mean() < 0.22
    np.testing.assert_array_equal(selection.in_pool, uniform(table.doc_ids, 9) < draws.below)
    for theta in thetas:
        thinned = selection.copies(theta)
        assert not thinned[~selection.in_pool].any()
        assert thinned.sum() == pytest.approx(whole.copies(theta).sum() * thin, rel=0.1)


def kept_within_luck(drawn, kept, table, share):
    """Whether the tokens kept are share times those drawn, to 4.5 standard deviations of a coin per document."""
    tokens = drawn * table.tokens
    deviation = np.sqrt(share * (1 - share) * (tokens.astype(float) ** 2).sum())
    return abs((kept * table.tokens).sum() - share * tokens.sum()) <= 4.5 * deviation


@pytest.mark.parametrize("target", [None, 4_000_000])
@pytest.mark.parametrize("omega_max", [0.5, 1e-9])  # under the second, documents are drawn by ε alone
def test_a_proxy_repeats_its_documents_as_often_as_the_final_run(table, target, omega_max):
    epsilon = 0.001 if omega_max == 0.5 else 0.9
    thetas = sample_parameters(12, len(SCORERS), M, 5, space=ParameterSpace(omega_max=omega_max, epsilon_max=epsilon))
    matched = MatchedEpochs(proxy_tokens=300_000, final_tokens=8_000_000, selected_tokens=target, seed=11)
    selection, plain = ProxySelection(table, Draws(seed=9), matched), ProxySelection(table, Draws(seed=9))
    for theta in thetas:
        drawn, kept = plain.copies(theta), selection.copies(theta)
        selected = int((drawn * table.tokens).sum())
        epochs = matched.final_tokens / (target or selected)  # of the final run
        share = matched.proxy_tokens / epochs / selected
        assert 0.001 < share < 1
        assert kept.dtype == np.int32
        assert ((kept == drawn) | (kept == 0)).all()  # copies of what is kept are unchanged
        assert kept_within_luck(drawn, kept, table, share)


def test_what_is_left_out_is_the_same_for_all_thetas_and_has_nothing_to_do_with_the_copies(table, thetas):
    matched = MatchedEpochs(proxy_tokens=1, final_tokens=4, selected_tokens=None, seed=11)
    selection, plain = ProxySelection(table, Draws(seed=9), matched), ProxySelection(table, Draws(seed=9))
    out = np.zeros(N, dtype=bool)
    stays = np.zeros(N, dtype=bool)
    for theta in thetas:
        drawn, kept = plain.copies(theta), selection.copies(theta)
        out |= (drawn > 0) & (kept == 0)
        stays |= kept > 0
        for copies in (1, 2):
            rows = drawn == copies
            if rows.sum() > 500:
                assert (kept[rows] > 0).mean() == pytest.approx(0.25, abs=4.5 * np.sqrt(0.25 * 0.75 / rows.sum()))
    assert not (out & stays).any()


@pytest.mark.parametrize(("final", "target"), [(300_000, None), (100_000, None), (1_000_000, 20_000_000)])
def test_where_a_selection_cannot_be_repeated_so_little_all_of_it_is_kept(table, thetas, final, target):
    matched = MatchedEpochs(proxy_tokens=300_000, final_tokens=final, selected_tokens=target, seed=11)
    theta = min(thetas, key=lambda each: int((counted(table, each, seed=9) * table.tokens).sum()))
    selected = int((counted(table, theta, seed=9) * table.tokens).sum())
    assert matched.share(selected) == 1.0
    np.testing.assert_array_equal(
        ProxySelection(table, Draws(seed=9), matched).copies(theta), counted(table, theta, seed=9)
    )


def test_an_empty_selection_stays_empty(table):
    none = sample_parameters(1, len(SCORERS), M, 0, space=ParameterSpace(omega_max=1e-9, epsilon_max=0))[0]
    matched = MatchedEpochs(proxy_tokens=10, final_tokens=100, selected_tokens=None, seed=1)
    assert not ProxySelection(table, Draws(seed=9), matched).copies(none).any()


@pytest.fixture(scope="module")
def baselines():
    rng = np.random.default_rng(4)
    return {name: (rng.random(N) < share).astype(np.int32) for name, share in (("random", 0.3), ("top_k[a]", 0.1))}


def test_baselines_are_the_same_after_parquet(baselines, tmp_path):
    path = tmp_path / "baselines.parquet"
    pq.write_table(baselines_table({**baselines, "none": np.zeros(N, np.int32)}), path, row_group_size=999)
    for name, copies in baselines.items():
        found = read_baseline(path, name, N)
        np.testing.assert_array_equal(found, copies)
        assert found.dtype == np.int32
    assert not read_baseline(path, "none", N).any()
    with pytest.raises(InputError, match=r"other\.parquet: no such file"):
        read_baseline(tmp_path / "other.parquet", "random", N)


def test_a_baseline_has_all_its_documents_unless_some_are_left_out(table, baselines):
    for copies in baselines.values():
        np.testing.assert_array_equal(ProxySelection(table, Draws(seed=9)).of_baseline(copies), copies)


def test_a_thinned_pool_has_what_is_kept_of_a_baseline_as_often_as_of_a_sampling_value_of_one(table, baselines):
    thin = 0.1
    draws = Draws(seed=9, thin=thin, below=thin * (2**SPACE.eta_max + SPACE.epsilon_max))
    selection = ProxySelection(table, draws)
    for copies in baselines.values():
        kept = selection.of_baseline(copies)
        assert kept.dtype == np.int32
        assert not kept[~selection.in_pool].any()
        np.testing.assert_array_equal(kept, copies * (uniform(table.doc_ids, 9) < thin))


def test_a_baseline_leaves_out_the_documents_that_a_theta_does_at_matched_epochs(table, baselines, thetas):
    matched = MatchedEpochs(proxy_tokens=1, final_tokens=4, selected_tokens=None, seed=11)
    selection, plain = ProxySelection(table, Draws(seed=9), matched), ProxySelection(table, Draws(seed=9))
    drawn, left = plain.copies(thetas[0]) > 0, selection.copies(thetas[0]) > 0
    for copies in baselines.values():
        kept = selection.of_baseline(copies)
        assert kept_within_luck(copies, kept, table, 0.25)
        both = drawn & (copies > 0)
        np.testing.assert_array_equal(kept[both] > 0, left[both])
    target = MatchedEpochs(proxy_tokens=100, final_tokens=400, selected_tokens=1_000_000, seed=11)
    share = 100 / (400 / 1_000_000) / (baselines["random"] * table.tokens).sum()
    kept = ProxySelection(table, Draws(seed=9), target).of_baseline(baselines["random"])
    assert kept_within_luck(baselines["random"], kept, table, share)


@pytest.mark.parametrize(
    ("n_scorers", "n_domains", "reason"),
    [
        (3, M, "does not divide into domains of 2 scorer weights"),
        (1, M, "does not divide into domains of 2 scorer weights"),
        (2, M + 1, "4 names"),
        (2, M - 1, "4 names"),
        (4, 3, "weights of a domain must sum to 1"),  # as many numbers as (2, M)
    ],
)
def test_a_theta_of_other_scorers_or_domains_is_refused(table, n_scorers, n_domains, reason):
    selection = ProxySelection(table, Draws())
    right = sample_parameters(1, len(SCORERS), M, 0)[0]
    assert selection.parameters(right.to_vector().tolist()) == type(right).from_vector(
        right.to_vector(), 2, DOMAINS, SCORERS
    )
    with pytest.raises(InputError, match=reason):
        selection.parameters(sample_parameters(1, n_scorers, n_domains, 0)[0].to_vector().tolist())
