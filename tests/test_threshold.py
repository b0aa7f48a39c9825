"""The threshold of a budget: exactly the documents that a sort of all would give, whatever the passes."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadmix_plugin import threshold
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64
from quadmix_plugin.labelled_corpus import MemoryCorpus
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.threshold import Coded, Interval, ordered_bits, up_to_budget, up_to_budgets


@dataclass(frozen=True)
class _Score:
    columns: tuple[str, ...] = ("score_q",)

    def of(self, batch: pa.Table) -> np.ndarray:
        return batch["score_q"].to_numpy().astype(np.float64)


def _corpus(
    scores: np.ndarray, tokens: np.ndarray, domains: np.ndarray | None = None, partitions: int = 3
) -> MemoryCorpus:
    n = scores.size
    ids = np.zeros(n, np.int64) if domains is None else domains
    table = ScoreTable(
        pa.array([f"d{i}" for i in range(n)]), ids, tokens, scores[:, None].astype(np.float32), ("a", "b", "c"), ("q",)
    )
    finite = np.nan_to_num(scores[:, None]).astype(np.float32)
    return MemoryCorpus.of(table, finite, partitions=partitions)


def _by_sorting(corpus: MemoryCorpus, rows: np.ndarray, budget: int, seed: int) -> np.ndarray:
    """Copies by definition: sort by key and hash, and take as many as bring the total nearest to the budget."""
    keys, tokens = corpus.table["score_q"].to_numpy().astype(np.float64), corpus.table["tokens"].to_numpy()
    rows = rows[~np.isnan(keys[rows])]
    order = rows[np.lexsort((hash64(corpus.table["doc_id"], seed)[rows], keys[rows]))]
    total = np.concatenate([[0], np.cumsum(tokens[order])])
    copies = np.zeros(keys.size, dtype=np.int32)
    if total[-1]:
        copies[order] = budget // total[-1]
        copies[order[: int(np.argmin(np.abs(total - budget % total[-1])))]] += 1
    return copies


keys = st.lists(
    st.floats(width=32, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1.0, float("nan")]), min_size=1, max_size=60
)


@given(keys, st.integers(0, 2**32), st.floats(0, 1), st.integers(1, 8), st.sampled_from([0, 3, 1 << 17]))
def test_the_threshold_is_that_of_a_sort(
    scores: list[float], seed: int, part: float, partitions: int, limit: int
) -> None:
    values = np.array(scores)
    tokens = np.random.default_rng(seed).integers(1, 1000, values.size)
    corpus = _corpus(values, tokens, partitions=partitions)
    budget = round(part * int(tokens[~np.isnan(values)].sum()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "_SORTED_AT_ONCE", limit)  # 0 and 3: as many passes as it takes to tell codes apart
        law = up_to_budget(corpus, _Score(), budget, seed) if budget else None
    if law is not None:
        wanted = _by_sorting(corpus, np.arange(values.size), budget, seed)
        np.testing.assert_array_equal(corpus.copies(law), wanted)


@given(st.integers(0, 2**32), st.sampled_from([0, 5, 1 << 17]))
def test_every_group_has_its_budget_and_repeats_what_is_too_small(seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 80))
    domains = rng.integers(0, 3, n)
    corpus = _corpus(rng.random(n).round(1), rng.integers(1, 100, n), domains)
    budgets = rng.integers(0, 4000, 3).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "_SORTED_AT_ONCE", limit)
        law = up_to_budgets(corpus, Coded(_Score(), seed, ("a", "b", "c")), budgets)
    each = [_by_sorting(corpus, np.flatnonzero(domains == m), budgets[m], seed) for m in range(3)]
    np.testing.assert_array_equal(corpus.copies(law), np.sum(each, axis=0))


def test_more_passes_are_made_where_more_documents_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    corpus = _corpus(rng.random(5000), rng.integers(1, 50, 5000))
    passes = []
    fold = MemoryCorpus.fold
    monkeypatch.setattr(MemoryCorpus, "fold", lambda self, of: passes.append(type(of).__name__) or fold(self, of))
    monkeypatch.setattr(threshold, "_SORTED_AT_ONCE", 10)
    up_to_budget(corpus, _Score(), 20_000, 0)
    assert passes[0] == "_Extent"
    assert passes[-1] == "_Candidates"
    assert 1 <= passes.count("_Places") <= 3


@given(st.lists(st.floats(allow_nan=False), min_size=2))
def test_bits_are_in_the_order_of_the_numbers(numbers: list[float]) -> None:
    values = np.array(numbers)
    bits = ordered_bits(values)
    order = np.argsort(bits, kind="stable")
    assert (np.diff(values[order]) >= 0).all() or np.isinf(values).any()
    assert (np.argsort(values, kind="stable") == order).all()


@given(st.integers(0, 2**128 - 1), st.integers(0, 2**128 - 1))
def test_an_interval_holds_both_ends_and_its_parts_tile_it(a: int, b: int) -> None:
    interval = Interval.around(min(a, b), max(a, b))
    assert interval.start <= min(a, b) <= max(a, b) < interval.end
    parts = [interval.part(place) for place in (0, min((1 << interval.width), 1 << 16) - 1)]
    assert parts[0].start == interval.start
    assert parts[-1].end == interval.end


def test_too_large_a_budget_is_refused_with_what_may_be_taken() -> None:
    corpus = _corpus(np.array([1.0, np.nan]), np.array([10, 90]))
    with pytest.raises(InputError, match="a budget of 11 tokens, and the documents that may be taken have 10"):
        up_to_budget(corpus, _Score(), 11, 0)
