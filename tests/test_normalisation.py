"""σ: direction, scale, freezing."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadmix_plugin.errors import InputError
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.schema import ScoreTable


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


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 50)), min_size=1, max_size=40), st.booleans())
def test_ecdf_is_the_token_share_at_least_as_good(rows: list[tuple[int, int]], higher: bool) -> None:
    scores, tokens = [float(s) / 4 for s, _ in rows], [t for _, t in rows]
    table = _table(scores, tokens)
    sigma = Normaliser.fit(table, {"s": higher}).apply(table.scores)[:, 0]
    np.testing.assert_allclose(sigma, _ecdf_by_hand(scores, tokens, higher), rtol=1e-6)


@pytest.mark.parametrize("method", ["ecdf", "zscore", "minmax"])
@pytest.mark.parametrize("higher", [True, False])
def test_best_document_is_smallest(method: str, higher: bool) -> None:
    table = _table([0.1, 0.9, 0.5], [3, 4, 5])
    sigma = Normaliser.fit(table, {"s": higher}, method).apply(table.scores)[:, 0]  # type: ignore[arg-type]
    assert sigma.argmin() == (1 if higher else 0)
    assert sigma.argmax() == (0 if higher else 1)


def test_many_values_are_thinned_within_the_stated_error() -> None:
    rng = np.random.default_rng(0)
    scores, tokens = rng.normal(size=60_000), rng.integers(1, 2000, 60_000)
    table = _table(scores.tolist(), tokens.tolist())
    normaliser = Normaliser.fit(table, {"s": True})
    order = np.argsort(-table.scores[:, 0], kind="stable")
    exact = np.empty(60_000)
    exact[order] = np.cumsum(tokens[order]) / tokens.sum()
    assert len(normaliser.maps[0].knots) <= 4096 + 2
    assert np.abs(normaliser.apply(table.scores)[:, 0] - exact).max() <= 1 / 4096


def test_heavy_tie_before_a_light_value_is_exact() -> None:
    scores = [5.0] * 10 + [3.0] * 40 + [2.5] + [1.0] * 49
    tokens = [100] * 50 + [1] + [100] * 49
    table = _table(scores, tokens)
    sigma = Normaliser.fit(table, {"s": True}).apply(table.scores)[:, 0]
    np.testing.assert_allclose(sigma, _ecdf_by_hand(scores, tokens, True), atol=1 / 4096)


def test_frozen_map_survives_json_and_keeps_old_values() -> None:
    table = _table([0.0, 1.0, 2.0], [1, 1, 2])
    normaliser = Normaliser.fit(table, {"s": True})
    loaded = Normaliser.from_dict(normaliser.to_dict())
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
