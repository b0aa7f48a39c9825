"""Size and range of every domain: the ends that later passes place their bins by must be the ends that occur."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.score_sketch import ScoreSketch

DOMAINS, SCORERS = ("art", "moon", "sport"), ("edu", "noise")
DIRECTIONS = {"edu": True, "noise": False}


def _table(n: int, seed: int, domains: int = 3, digits: int = 9) -> ScoreTable:
    rng = np.random.default_rng(seed)
    scores = (rng.normal(size=(n, 2)) * [1, 1e-3]).round(digits).astype(np.float32)
    tokens = rng.integers(1, 10**6, n)
    return ScoreTable(pa.array(range(n)), rng.integers(0, domains, n), tokens, scores, DOMAINS, SCORERS)


def _same(one: DomainSummary, other: DomainSummary) -> bool:
    return json.dumps(one.to_dict(), sort_keys=True) == json.dumps(other.to_dict(), sort_keys=True)


def test_summary_is_that_of_a_loop_over_domains() -> None:
    table = _table(500, 0, domains=2)
    sigma = Normaliser.fit(table, DIRECTIONS).apply(table.scores)
    summary = DomainSummary.of(table, sigma)
    for m, _ in enumerate(DOMAINS[:2]):
        rows = table.domain_ids == m
        assert (summary.documents[m], summary.tokens[m]) == (rows.sum(), table.tokens[rows].sum())
        np.testing.assert_array_equal(summary.low[m], sigma[rows].min(axis=0))
        np.testing.assert_array_equal(summary.high[m], sigma[rows].max(axis=0))
    assert (summary.documents[2], summary.tokens[2]) == (0, 0)
    assert np.isnan([summary.low[2], summary.high[2]]).all()


@given(
    st.integers(1, 3000), st.integers(0, 10**6), st.sampled_from(["ecdf", "zscore", "minmax"]), st.sampled_from([1, 9])
)
@settings(deadline=None)
def test_ends_by_the_sketch_are_those_of_the_documents(n: int, seed: int, method: str, digits: int) -> None:
    """σ of a domain's raw ends, the directions both ways, must be the ends of the written columns, to the last bit."""
    table = _table(n + 3, seed, digits=9 if method != "ecdf" else digits)
    normaliser = Normaliser.fit(table, DIRECTIONS, method)  # type: ignore[arg-type]
    of_sketch = DomainSummary.of_sketch(ScoreSketch.of_table(table), normaliser)
    of_documents = DomainSummary.of(table, normaliser.apply(table.scores))
    for row, name in enumerate(of_sketch.domains):
        m = DOMAINS.index(name)
        assert of_sketch.documents[row] == of_documents.documents[m]
        np.testing.assert_array_equal(of_sketch.low[row], of_documents.low[m])
        np.testing.assert_array_equal(of_sketch.high[row], of_documents.high[m])
    assert (of_sketch.low <= of_sketch.high).all()


def test_parts_merge_to_the_whole_in_any_order() -> None:
    table = _table(400, 1)
    sigma = Normaliser.fit(table, DIRECTIONS).apply(table.scores)
    whole = DomainSummary.of(table, sigma)
    cut = np.array_split(np.random.default_rng(2).permutation(400), 7)
    parts = []
    for rows in cut:
        ids, scores = table.doc_ids.take(pa.array(rows)), table.scores[rows]
        part = ScoreTable(ids, table.domain_ids[rows], table.tokens[rows], scores, DOMAINS, SCORERS)
        parts.append(DomainSummary.of(part, sigma[rows]))
    assert _same(DomainSummary.merge(parts), whole)
    assert _same(DomainSummary.merge(parts[::-1]), whole)
    one = DomainSummary(("zoo",), SCORERS, np.array([1]), np.array([5]), *np.full((2, 1, 2), 0.5, np.float32))
    more = DomainSummary.merge([one, whole, one])
    assert more.domains == (*DOMAINS, "zoo")
    assert (more.tokens[3], more.documents[3]) == (10, 2)
    np.testing.assert_array_equal(more.low[:3], whole.low)


def test_summary_survives_json_to_the_last_bit() -> None:
    table = _table(50, 3, domains=2)
    summary = DomainSummary.of(table, Normaliser.fit(table, DIRECTIONS).apply(table.scores))
    text = json.dumps(summary.to_dict(), sort_keys=True, allow_nan=False)
    loaded = DomainSummary.from_dict(json.loads(text))
    assert (loaded.domains, loaded.scorers) == (summary.domains, summary.scorers)
    for name in ("documents", "tokens", "low", "high"):
        found, wanted = getattr(loaded, name), getattr(summary, name)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_faults_are_named() -> None:
    table = _table(5, 4)
    with pytest.raises(InputError, match=r"normalised: shape \(5,\); the table has \(5, 2\)"):
        DomainSummary.of(table, np.zeros(5))
    with pytest.raises(InputError, match="normalised: 10 values are not finite"):
        DomainSummary.of(table, np.full((5, 2), np.nan))
    with pytest.raises(InputError, match="nothing to merge"):
        DomainSummary.merge([])
    mine = DomainSummary.of(table, table.scores)
    other = DomainSummary(mine.domains, ("edu",), mine.documents, mine.tokens, mine.low[:, :1], mine.high[:, :1])
    with pytest.raises(InputError, match=r"different scorers \(edu and edu, noise\)"):
        DomainSummary.merge([mine, other])
