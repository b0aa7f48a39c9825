"""σ: direction, scale, its stated error, freezing, and that no cut of the corpus changes it."""

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadmix_plugin.errors import InputError
from quadmix_plugin.kernels.normalise import Interpolation
from quadmix_plugin.normalisation import Normaliser, ScorerMap, _ecdf_error, _Ordered
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.score_sketch import ScoreSketch

METHODS = ("ecdf", "zscore", "minmax")
HALF_ULP = 2.0**-24
"""What rounding a σ of about 1 to float32 can add to its error."""


def _table(scores: list[float], tokens: list[int]) -> ScoreTable:
    n = len(scores)
    column = np.array(scores, dtype=np.float32)[:, None]
    ids = pa.array(range(n), pa.int64())
    return ScoreTable(ids, np.zeros(n, np.int64), np.array(tokens, np.int64), column, ("a",), ("s",))


def _ecdf_by_hand(scores: list[float], tokens: list[int], higher_is_better: bool) -> list[float]:
    """σ(q) = tokens of documents at least as good / all tokens, written out as a loop."""
    values = [float(np.float32(s)) for s in scores]
    result = []
    for q in values:
        as_good = [t for s, t in zip(values, tokens, strict=True) if (s >= q if higher_is_better else s <= q)]
        result.append(sum(as_good) / sum(tokens))
    return result


def _exact(table: ScoreTable, higher_is_better: bool) -> np.ndarray:
    """The token-weighted ECDF by one sort."""
    quality = table.scores[:, 0].astype(np.float64) * (-1 if higher_is_better else 1)
    order = np.argsort(quality)
    upto = np.cumsum(table.tokens[order])
    return upto[np.searchsorted(quality[order], quality, side="right") - 1] / table.tokens.sum()


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 50)), min_size=1, max_size=40), st.booleans())
@settings(deadline=None)
def test_ecdf_is_the_token_share_at_least_as_good(rows: list[tuple[int, int]], higher: bool) -> None:
    scores, tokens = [float(s) / 4 for s, _ in rows], [t for _, t in rows]
    table = _table(scores, tokens)
    sigma = Normaliser.fit(table, {"s": higher}).apply(table.scores)[:, 0]
    np.testing.assert_allclose(sigma, _ecdf_by_hand(scores, tokens, higher), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("higher", [True, False])
def test_best_document_is_smallest(method: str, higher: bool) -> None:
    table = _table([0.1, 0.9, 0.5], [3, 4, 5])
    sigma = Normaliser.fit(table, {"s": higher}, method).apply(table.scores)[:, 0]  # type: ignore[arg-type]
    assert sigma.argmin() == (1 if higher else 0)
    assert sigma.argmax() == (0 if higher else 1)


def test_many_values_are_thinned_within_the_stated_error() -> None:
    rng = np.random.default_rng(0)
    table = _table(rng.normal(size=60_000).tolist(), rng.integers(1, 2000, 60_000).tolist())
    normaliser = Normaliser.fit(table, {"s": True})
    off = np.abs(normaliser.apply(table.scores)[:, 0] - _exact(table, True)).max()
    assert len(normaliser.maps[0].knots) <= 4096 + 2
    assert off <= 1 / 4096
    assert off <= normaliser.maps[0].error + HALF_ULP
    assert normaliser.maps[0].error <= 1 / 4096 + 1 / 60_000


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize(
    "shape",
    ["crowded", "one cell", "clipped", "two clusters", "heavy documents", "heavy at one end", "heavy at the other"],
)
def test_stated_error_bounds_every_document(shape: str, higher: bool) -> None:
    """Where cells hold many values, σ is approximate; the bound must then be honest, and no more than the cells'."""
    rng = np.random.default_rng(3)
    n, tokens = 20_000, rng.integers(1, 50, 20_000)
    if shape == "crowded":  # dozens of scores in each of 17 cells
        scores = 1 + rng.random(n) * 2**-10
    elif shape == "one cell":
        scores = 1 + rng.random(n) * 2**-15
    elif shape == "clipped":
        scores = np.clip(rng.normal(size=n), -0.5, 0.75)
    elif shape == "two clusters":
        scores = np.where(rng.random(n) < 0.6, 5 + rng.random(n) * 2**-13, -rng.random(n) * 2**-9)
    elif shape == "heavy documents":
        scores, tokens = rng.normal(size=n), np.where(rng.random(n) < 0.001, 10**7, tokens)
    else:  # almost all mass of a cell at one of its ends, and a light document right beside it
        scores = 1 + rng.random(n) * 2**-15
        ends = np.argsort(scores)[:: 1 if shape == "heavy at one end" else -1]
        tokens = np.where(np.arange(n) == ends[0], 10**9, tokens)
    table = _table(scores.tolist(), tokens.tolist())
    normaliser = Normaliser.fit(table, {"s": higher})
    sigma = normaliser.apply(table.scores)[:, 0]
    off = np.abs(sigma - _exact(table, higher)).max()
    error = normaliser.maps[0].error
    assert off <= error + HALF_ULP
    (cells,) = ScoreSketch.of_table(table).cells
    widest = (cells.tokens * (cells.low != cells.high)).max() / cells.tokens.sum()
    assert error <= 1 / 4096 + widest
    assert widest < 1e-3 or shape != "clipped"
    order = np.argsort(table.scores[:, 0])
    assert (np.diff(sigma[order]) * (-1 if higher else 1) >= 0).all()


@pytest.mark.parametrize("higher", [True, False])
def test_stated_error_is_the_actual_one_where_scores_have_cells_of_their_own(higher: bool) -> None:
    rng = np.random.default_rng(7)
    scores = np.arange(16_384, 26_384)  # whole numbers between 2^14 and 2^15: one in each cell
    table = _table(scores.tolist(), rng.integers(1, 2000, scores.size).tolist())
    normaliser = Normaliser.fit(table, {"s": higher})
    off = np.abs(normaliser.apply(table.scores)[:, 0] - _exact(table, higher)).max()
    assert 1 / 16384 < off <= 1 / 4096
    assert normaliser.maps[0].error == pytest.approx(off, abs=2 * HALF_ULP)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2**9 - 1), st.integers(0, 20)), min_size=2, max_size=30),
    st.lists(st.booleans(), min_size=6, max_size=6),
)
@settings(deadline=None, max_examples=500)
def test_error_of_any_choice_of_knots_bounds_every_document(rows: list[tuple[int, int, int]], kept: list[bool]) -> None:
    """Documents anywhere in six neighbouring cells, one token or a million: whichever cells get a knot."""
    scores = np.array([2**14 + cell + within * 2**-9 for cell, within, _ in rows])
    table = _table(scores.tolist(), [2**power for _, _, power in rows])
    (cells,) = ScoreSketch.of_table(table).cells
    share = np.cumsum(cells.tokens) / cells.tokens.sum()
    keep = np.array(kept)[: share.size] | (np.arange(share.size) == share.size - 1)
    low, high = cells.low.astype(np.float64), cells.high.astype(np.float64)
    error = _ecdf_error(_Ordered(low, high, cells.tokens, cells.documents), high[keep], share[keep], share)
    off = np.abs(np.interp(scores, high[keep], share[keep]) - _exact(table, False))
    assert off.max() <= error + 1e-12


@pytest.mark.parametrize("others", [0, 20_000])
def test_best_documents_keep_their_order_within_one_cell(others: int) -> None:
    scores = [5 - i * 2**-20 for i in range(1, 5)]
    rest = np.random.default_rng(0).random(others).tolist()
    table = _table([*scores, *rest], [3] * (4 + others))
    assert ScoreSketch.of_table(table).cells[0].documents[-1] == 4
    normaliser = Normaliser.fit(table, {"s": True})
    assert len(normaliser.maps[0].knots) < 4200
    sigma = normaliser.apply(table.scores)[:, 0]
    assert (np.diff(sigma[:4]) > 0).all()
    np.testing.assert_allclose(sigma[:4], np.arange(1, 5) / (4 + others), rtol=1e-3)


def test_crowded_cell_behind_a_gap_is_spread_over_its_own_share() -> None:
    """Without a knot at its best score, σ would rise in the gap, where no document is, and be flat in the cell."""
    rng = np.random.default_rng(6)
    scores = np.concatenate([5 + rng.random(20_000), 1 + rng.random(20_000) * 2**-15])
    table = _table(scores.tolist(), rng.integers(50, 60, 40_000).tolist())
    for higher in (True, False):
        sigma = Normaliser.fit(table, {"s": higher}).apply(table.scores)[:, 0]
        np.testing.assert_allclose(sigma, _exact(table, higher), atol=0.01)


def test_rounded_scores_are_exact_and_say_so() -> None:
    rng = np.random.default_rng(1)
    table = _table(rng.normal(size=50_000).round(2).tolist(), rng.integers(1, 2000, 50_000).tolist())
    normaliser = Normaliser.fit(table, {"s": True})
    assert normaliser.maps[0].error == 0
    np.testing.assert_allclose(normaliser.apply(table.scores)[:, 0], _exact(table, True), rtol=1e-7)


def test_atoms_among_many_values_are_exact() -> None:
    """Clipped and default scores make heavy ties, at the ends and within a continuum that must be thinned."""
    rng = np.random.default_rng(2)
    scores = np.clip(rng.normal(size=80_000), -0.8, 1.1)
    scores = np.where(rng.random(scores.size) < 0.05, rng.choice([0.03125, 0.5, -0.25], scores.size), scores)
    table = _table(scores.tolist(), rng.integers(1, 2000, 80_000).tolist())
    (cells,) = ScoreSketch.of_table(table).cells
    for higher in (True, False):
        normaliser = Normaliser.fit(table, {"s": higher})
        assert len(normaliser.maps[0].knots) < 4200
        sigma, exact = normaliser.apply(table.scores)[:, 0], _exact(table, higher)
        atoms = np.isin(table.scores[:, 0], np.array([-0.8, 1.1, 0.03125, 0.5, -0.25], dtype=np.float32))
        atoms &= np.isin(table.scores[:, 0], cells.low[cells.low == cells.high])  # alone in their cells
        assert np.unique(table.scores[atoms]).size >= 3
        np.testing.assert_allclose(sigma[atoms], exact[atoms], rtol=1e-7)
        assert np.abs(sigma - exact).max() <= 1 / 4096


def test_heavy_tie_before_a_light_value_is_exact() -> None:
    scores = [5.0] * 10 + [3.0] * 40 + [2.5] + [1.0] * 49
    tokens = [100] * 50 + [1] + [100] * 49
    table = _table(scores, tokens)
    sigma = Normaliser.fit(table, {"s": True}).apply(table.scores)[:, 0]
    np.testing.assert_allclose(sigma, _ecdf_by_hand(scores, tokens, True), rtol=1e-6)


def test_frozen_map_survives_json_and_keeps_old_values() -> None:
    table = _table([0.0, 1.0, 2.0], [1, 1, 2])
    normaliser = Normaliser.fit(table, {"s": True})
    loaded = Normaliser.from_dict(json.loads(json.dumps(normaliser.to_dict())))
    assert loaded == normaliser
    new = loaded.apply(np.array([[-1.0], [0.0], [3.0]]))[:, 0]
    np.testing.assert_allclose(new, [1.0, 1.0, 0.5])


def test_zscore_and_minmax_by_hand() -> None:
    table = _table([0.0, 2.0, 4.0], [1, 2, 1])
    zscore = Normaliser.fit(table, {"s": True}, "zscore").apply(table.scores)[:, 0]
    np.testing.assert_allclose(zscore, [2**0.5, 0.0, -(2**0.5)], atol=1e-6)
    minmax = Normaliser.fit(table, {"s": True}, "minmax").apply(table.scores)[:, 0]
    np.testing.assert_allclose(minmax, [1.0, 0.5, 0.0])


def test_faults_are_named() -> None:
    with pytest.raises(InputError, match="score_s: all 2 documents have the score 1, so zscore has no scale"):
        Normaliser.fit(_table([1.0, 1.0], [1, 1]), {"s": True}, "zscore")
    normaliser = Normaliser.fit(_table([1.0, 2.0], [1, 1]), {"s": True})
    with pytest.raises(InputError, match="score_s: 1 scores are not finite"):
        normaliser.apply(np.array([[np.nan]]))
    with pytest.raises(InputError, match="the normaliser was fitted on s"):
        normaliser.apply(np.zeros((2, 3)))
    with pytest.raises(InputError, match="score_s: 2 scores are not finite"):
        normaliser.apply(np.array([[1e300], [-np.inf], [1.0]]))
    with pytest.raises(InputError, match=r"normalise.method: 'rank'; choose one of ecdf, minmax, zscore"):
        Normaliser.fit(_table([1.0], [1]), {"s": True}, "rank")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="higher_is_better: 's' is missing"):
        Normaliser.fit(_table([1.0], [1]), {"edu": True})
    with pytest.raises(InputError, match="labels: no documents"):
        Normaliser.fit(_table([], []), {"s": True})
    with pytest.raises(InputError, match=r"score_s: its scores all lie between 1 and 1.00002.*zscore has no scale"):
        Normaliser.fit(_table([1.0, 1.00002], [1, 1]), {"s": True}, "zscore")


@st.composite
def _partitioned(draw: st.DrawFn) -> tuple[ScoreTable, list[np.ndarray]]:
    n = draw(st.integers(2, 300))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    digits = draw(st.sampled_from([1, 3, 9]))
    scores, tokens = rng.normal(size=n).round(digits).tolist(), rng.integers(1, 10**9, n).tolist()
    parts = draw(st.sampled_from([1, 7, 64]))
    return _table([-2.0, *scores], [1, *tokens]), np.array_split(rng.permutation(n + 1), parts)


@given(_partitioned(), st.sampled_from(METHODS), st.booleans())
@settings(deadline=None)
def test_any_cut_of_the_corpus_gives_the_same_map(
    case: tuple[ScoreTable, list[np.ndarray]], method: str, higher: bool
) -> None:
    table, cut = case
    whole = Normaliser.fit(table, {"s": higher}, method)  # type: ignore[arg-type]
    columns = table.scores[:, 0]
    states = [ScoreSketch.of(("s",), [columns[r]], table.tokens[r], ("a",), table.domain_ids[r]) for r in cut]
    merged = ScoreSketch.merge(states[::-1])
    assert repr(Normaliser.fit(merged, {"s": higher}, method)) == repr(whole)  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(1, 99)), min_size=3, max_size=80),
    st.booleans(),
)
@settings(deadline=None)
def test_zscore_is_within_its_stated_error_of_the_moments(rows: list[tuple[float, int]], higher: bool) -> None:
    scores, tokens = [11.0, *(score for score, _ in rows)], [1, *(t for _, t in rows)]
    table = _table(scores, tokens)
    mean = math.fsum(s * t for s, t in zip(scores, tokens, strict=True)) / sum(tokens)
    deviation = math.sqrt(math.fsum((s - mean) ** 2 * t for s, t in zip(scores, tokens, strict=True)) / sum(tokens))
    normaliser = Normaliser.fit(table, {"s": higher}, "zscore")
    wanted = (mean - np.array(scores)) / deviation * (1 if higher else -1)
    off = np.abs(normaliser.apply(table.scores)[:, 0] - wanted).max()
    assert off <= normaliser.maps[0].error + 1e-6
    assert normaliser.maps[0].error < 2e-3


def test_zscore_of_crowded_cells_is_within_its_stated_error() -> None:
    rng = np.random.default_rng(8)
    scores = (1 + rng.integers(0, 40, 5000) * 2**-14 + rng.random(5000) ** 8 * 2**-15).astype(np.float32)
    table = _table(scores.tolist(), [1] * 5000)
    normaliser = Normaliser.fit(table, {"s": True}, "zscore")
    exact = scores.astype(np.float64)
    off = np.abs(normaliser.apply(table.scores)[:, 0] - (exact.mean() - exact) / exact.std()).max()
    assert 1e-3 < off <= normaliser.maps[0].error < 20 * off


def test_minmax_is_exact_at_both_ends() -> None:
    rng = np.random.default_rng(4)
    table = _table(rng.normal(size=5000).tolist(), [1] * 5000)
    sigma = Normaliser.fit(table, {"s": False}, "minmax").apply(table.scores)[:, 0]
    assert (sigma[table.scores[:, 0].argmin()], sigma[table.scores[:, 0].argmax()]) == (0, 1)


def _knots(rng: np.random.Generator, kind: str, n: int) -> np.ndarray:
    draws = {
        "normal": lambda: rng.normal(size=n),
        "share": lambda: rng.beta(0.3, 8, n),
        "wide": lambda: np.exp(rng.normal(-8, 20, n)) * rng.choice([-1, 1], n),
        "narrow": lambda: 3 + rng.random(n) * 1e-4,
        "tiny": lambda: rng.integers(-2000, 2000, n) * 1e-45,
    }
    return np.unique(draws[kind]().astype(np.float32) + np.float32(0))


@pytest.mark.parametrize("n", [1, 2, 3, 50, 4096])
@pytest.mark.parametrize("kind", ["normal", "share", "wide", "narrow", "tiny"])
def test_interpolation_is_that_of_numpy_and_monotone(kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    knots = _knots(rng, kind, n)
    scores = np.concatenate([_knots(rng, kind, 20_000), knots, rng.normal(size=3000).astype(np.float32)])
    edges = np.array([-0.0, 0.0, -3e38, 3e38, 1e-45, -1e-45], dtype=np.float32)
    beside = [np.nextafter(knots, np.float32(end)) for end in (-np.inf, np.inf)]
    scores = np.sort(np.concatenate([scores, edges, *beside])).astype(np.float32)
    for value in (np.sort(rng.random(knots.size)), np.sort(rng.random(knots.size))[::-1]):
        found, bad = Interpolation.of(knots, np.ascontiguousarray(value))(scores)
        assert bad == 0
        wanted = np.interp(scores.astype(np.float64), knots.astype(np.float64), value).astype(np.float32)
        np.testing.assert_array_equal(found, wanted)
        assert (np.diff(found) * (1 if value[-1] >= value[0] else -1) >= 0).all()


def _halfway(rng: np.random.Generator, n: int) -> np.ndarray:
    """Ascending values midway between two float32: the last bit of a float64 decides how each is rounded."""
    bits = np.unique(rng.integers(0x30000000, 0x3F800000, n)).astype(np.int32)
    below, above = bits.view(np.float32).astype(np.float64), (bits + 1).view(np.float32).astype(np.float64)
    return (below + above) / 2


@pytest.mark.parametrize("falling", [False, True])
def test_rounding_never_carries_a_value_past_the_next_knot(falling: bool) -> None:
    """Right before a knot near zero, at the far end of a wide segment, the plain formula passes the knot's value."""
    rng = np.random.default_rng(0)
    plain_passes = 0
    for _ in range(3000):
        knots = np.array([-rng.random() - 0.1, 1e-40], dtype=np.float32)
        value = _halfway(rng, 2)[:: -1 if falling else 1].copy()
        plain = np.float32(np.interp(0.0, knots.astype(np.float64), value))
        found = Interpolation.of(knots, value)(np.zeros(1, dtype=np.float32))[0][0]
        end = np.float32(value[1])
        plain_passes += plain < end if falling else plain > end
        assert found >= end if falling else found <= end
    assert plain_passes > 0


@pytest.mark.parametrize("kind", ["normal", "share", "wide", "narrow", "tiny"])
def test_value_at_a_knot_is_the_knots_own(kind: str) -> None:
    rng = np.random.default_rng(1)
    for n in [3000] + [4] * 500:  # with few knots, the last bit of the plain formula is often another
        knots = np.union1d(_knots(rng, kind, n), np.float32(0))
        value = _halfway(rng, knots.size + 9)[-knots.size :].copy()
        interpolation = Interpolation.of(knots, value)
        np.testing.assert_array_equal(interpolation(knots)[0], value.astype(np.float32))
        np.testing.assert_array_equal(interpolation(-knots[knots == 0])[0], value[knots == 0].astype(np.float32))


def test_apply_takes_read_only_columns_and_travels_without_its_tables() -> None:
    normaliser = Normaliser.fit(_table([1.0, 2.0, 4.0], [1, 1, 1]), {"s": True})
    column = pa.array([4.0, 2.0], pa.float32()).to_numpy()
    assert not column.flags.writeable
    np.testing.assert_allclose(normaliser.maps[0].apply(column), [1 / 3, 2 / 3])
    for travelled in (pickle.loads(pickle.dumps(normaliser)), copy.deepcopy(normaliser)):  # noqa: S301 - our own
        assert travelled == normaliser
        assert set(vars(travelled.maps[0])) == {"scorer", "higher_is_better", "knots", "value", "error"}
        np.testing.assert_array_equal(travelled.maps[0].apply(column), normaliser.maps[0].apply(column))


def _map(**changes: object) -> dict:
    content = {"scorer": "s", "higher_is_better": True, "knots": [0.0, 1.0], "value": [1.0, 0.5], "error": 0.0}
    return {"method": "ecdf", "maps": [content | changes]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_map(knots=[1.0, 0.0]), "s: knots must ascend"),
        (_map(knots=[1.0, 1.0 + 1e-12]), "s: knots must ascend"),
        (_map(value=[0.5, 1.0]), "better scores have smaller values"),
        (_map(value=[0.5]), "s: 2 knots with 1 values"),
        (_map(knots=[], value=[]), "s: 0 knots with 0 values"),
        (_map(knots=[0.0, float("nan")]), "s: 2 knots with 2 values; as many finite"),
        (_map(surplus=1), "TypeError"),
        (_map() | {"method": "rank"}, "method 'rank' with 1 scorers"),
        (_map() | {"maps": []}, "method 'ecdf' with 0 scorers"),
        ({"theta": 1}, "KeyError: 'maps'"),
        (_map(knots=["a", "b"]), "ValueError"),
    ],
)
def test_file_that_is_no_normaliser_is_named_with_the_reason(tmp_path: Path, content: dict, expected: str) -> None:
    path = tmp_path / "normaliser.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match="not a normaliser") as caught:
        Normaliser.load(path)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert isinstance(Normaliser.from_dict(_map()).maps[0], ScorerMap)


def test_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.json: no such file; give the normaliser.json"):
        Normaliser.load(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"broken.json: not JSON"):
        Normaliser.load(tmp_path / "broken.json")
