"""The state that σ is fitted from: what a cell holds, and that no cut of the corpus changes it."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quadmix_plugin.errors import InputError
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.score_sketch import ScoreSketch, ordered_bits

DOMAINS = ("Zoo", "Art", "Moon")
SCORES = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 0.5, 0.50001, -3.0])
)


def _table(scores: np.ndarray, tokens: np.ndarray, domain_ids: np.ndarray) -> ScoreTable:
    ids = pa.array(range(tokens.size), pa.int64())
    names = tuple(f"s{n}" for n in range(scores.shape[1]))
    return ScoreTable(ids, domain_ids, tokens, scores.astype(np.float32), DOMAINS, names)


def _rows(table: ScoreTable, rows: np.ndarray) -> ScoreTable:
    ids = table.doc_ids.take(pa.array(rows))
    return ScoreTable(ids, table.domain_ids[rows], table.tokens[rows], table.scores[rows], DOMAINS, table.scorers)


@st.composite
def _tables(draw: st.DrawFn) -> ScoreTable:
    n = draw(st.integers(1, 120))
    scores = draw(arrays(np.float32, (n, 2), elements=SCORES))
    tokens = draw(arrays(np.int64, n, elements=st.integers(1, 10**12)))
    return _table(scores, tokens, draw(arrays(np.int64, n, elements=st.integers(0, 2))))


def _by_hand(table: ScoreTable, n: int) -> dict[int, tuple[int, int, float, float]]:
    """Cells as a dictionary, one document at a time; the cell of a float is its bits without the last nine."""
    cells: dict[int, tuple[int, int, float, float]] = {}
    for score, tokens in zip((table.scores[:, n] + 0.0).tolist(), table.tokens.tolist(), strict=True):
        bits = int(np.float32(abs(score)).view(np.int32))
        key = (bits if score >= 0 else -bits - 1) >> 9
        documents, mass, low, high = cells.get(key, (0, 0, np.inf, -np.inf))
        cells[key] = (documents + 1, mass + tokens, min(low, score), max(high, score))
    return cells


@given(_tables())
@settings(deadline=None)
def test_cells_are_those_of_a_loop_over_documents(table: ScoreTable) -> None:
    sketch = ScoreSketch.of_table(table)
    for n, cells in enumerate(sketch.cells):
        found = {
            int(key): (int(documents), int(tokens), float(low), float(high))
            for key, documents, tokens, low, high in zip(
                cells.key, cells.documents, cells.tokens, cells.low, cells.high, strict=True
            )
        }
        assert found == _by_hand(table, n)
        assert (np.diff(cells.key) > 0).all()
        assert (cells.high[:-1] < cells.low[1:]).all()


@given(_tables())
@settings(deadline=None)
def test_domains_hold_their_documents_and_the_range_of_their_scores(table: ScoreTable) -> None:
    sketch = ScoreSketch.of_table(table)
    assert sketch.domains == tuple(sorted({DOMAINS[m] for m in table.domain_ids}))
    for row, name in enumerate(sketch.domains):
        of_domain = table.domain_ids == DOMAINS.index(name)
        assert sketch.documents[row] == of_domain.sum()
        assert sketch.tokens[row] == table.tokens[of_domain].sum()
        np.testing.assert_array_equal(sketch.low[row], table.scores[of_domain].min(axis=0))
        np.testing.assert_array_equal(sketch.high[row], table.scores[of_domain].max(axis=0))
    assert sketch.n == table.n


@given(_tables(), st.sampled_from([1, 2, 7, 64]), st.integers(0, 10**6))
@settings(deadline=None)
def test_any_cut_in_any_order_gives_the_same_bytes(table: ScoreTable, parts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cut = np.array_split(rng.permutation(table.n), parts)  # some are empty
    states = [ScoreSketch.of_table(_rows(table, rows)) for rows in cut]
    travelled = [ScoreSketch.from_table(state.to_table()) for state in states]
    middle = int(rng.integers(0, parts))
    nested = [ScoreSketch.merge([part]) for part in travelled[:middle]] + [ScoreSketch.merge(travelled[middle:])]
    for merged in (ScoreSketch.merge(travelled), ScoreSketch.merge(nested[::-1])):
        assert merged.to_table().equals(ScoreSketch.of_table(table).to_table())


def test_both_zeros_are_one_value_and_one_bit_pattern() -> None:
    table = _table(np.array([[-0.0], [0.0]]), np.array([1, 2]), np.array([0, 0]))
    (cells,) = ScoreSketch.of_table(table).cells
    assert cells.tokens.tolist() == [3]
    assert not np.signbit([cells.low[0], cells.high[0]]).any()
    assert not np.signbit(ScoreSketch.of_table(table).low).any()


def test_cells_are_one_part_in_16384_wide_at_every_magnitude() -> None:
    scale = (2.0 ** np.arange(-126, 127)).astype(np.float32)
    apart, together = scale * np.float32(1 + 2**-14), scale * np.float32(1 + 2**-15)
    for factor in (1, -1):
        key = ordered_bits(np.stack([scale, together, apart]) * np.float32(factor)) >> 9
        inside = np.abs(key[0] - key[1])
        assert inside.max() <= (1 if factor == -1 else 0)  # below zero a cell begins at the other end
        assert (np.abs(key[2] - key[0]) == 1).all()


def test_ordered_bits_have_the_order_of_the_scores() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(-(2**31), 2**31, 50_000, dtype=np.int64).astype(np.int32).view(np.float32)
    scores = np.sort(scores[np.isfinite(scores)]) + np.float32(0)
    assert (np.diff(ordered_bits(scores)) >= 0).all()


def test_small_domains_become_other_which_may_be_there_already() -> None:
    table = _table(np.array([[1.0], [2.0], [5.0], [3.0]]), np.array([9, 5, 6, 4]), np.array([0, 1, 2, 1]))
    sketch = ScoreSketch.of_table(table)
    assert sketch.fold_small_domains(6) is sketch
    folded = sketch.fold_small_domains(9)
    assert sketch.tokens.tolist() == [9, 6, 9]
    assert folded.domains == ("Art", "Zoo", "other")
    assert folded.tokens.tolist() == [9, 9, 6]
    everything = sketch.fold_small_domains(10)
    assert (everything.domains, everything.tokens.tolist()) == (("other",), [24])
    assert (everything.low.tolist(), everything.high.tolist()) == ([[1.0]], [[5.0]])
    with_other = ScoreSketch.of(("s0",), [table.scores[:, 0]], table.tokens, ("Zoo", "other", "Moon"), table.domain_ids)
    assert with_other.fold_small_domains(9).tokens.tolist() == [9, 15]
    assert with_other.fold_small_domains(9).documents.tolist() == [1, 3]


def test_parts_of_other_scorers_are_refused_and_empty_ones_pass() -> None:
    table = _table(np.array([[1.0]]), np.array([2]), np.array([0]))
    mine = ScoreSketch.of_table(table)
    empty = ScoreSketch.from_table(ScoreSketch.of_table(_rows(table, np.array([], dtype=np.int64))).to_table())
    assert ScoreSketch.merge([empty, mine, empty]).to_table().equals(mine.to_table())
    assert ScoreSketch.merge([empty, empty]).n == 0
    other = ScoreSketch.of(("edu",), [table.scores[:, 0]], table.tokens, DOMAINS, table.domain_ids)
    with pytest.raises(InputError, match="parts of the scorers s0 and of edu; merge parts of one corpus"):
        ScoreSketch.merge([mine, other])
    with pytest.raises(InputError, match="nothing to merge"):
        ScoreSketch.merge([])
