"""Selection methods: they meet the budget, do not depend on row order, and take what they say they take."""

import numpy as np
import pyarrow as pa
import pytest

from quadmix_plugin import sample_parameters
from quadmix_plugin.errors import InputError
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.stages.selectors.quadmix import QuaDMix
from quadmix_plugin.stages.selectors.random import Random
from quadmix_plugin.stages.selectors.top_k import TopK

RNG = np.random.default_rng(3)
N = 3000
DOMAINS = ("a", "b", "c")
TABLE = ScoreTable(
    pa.array([f"d{i}" for i in range(N)]),
    RNG.choice(3, N, p=[0.6, 0.3, 0.1]).astype(np.int64),
    RNG.integers(1, 500, N),
    RNG.random((N, 2)).astype(np.float32).round(2),
    DOMAINS,
    ("edu", "prose"),
)
NORMALISED = (1 - TABLE.scores).astype(np.float32)
BUDGET = int(0.2 * TABLE.tokens.sum())


def _shuffled(order: np.ndarray) -> ScoreTable:
    return ScoreTable(
        TABLE.doc_ids.take(pa.array(order)),
        TABLE.domain_ids[order],
        TABLE.tokens[order],
        TABLE.scores[order],
        DOMAINS,
        TABLE.scorers,
    )


@pytest.mark.parametrize("selector", [Random(), TopK("edu"), TopK("prose"), TopK(), TopK(per_domain=True)])
def test_budget_is_met_within_one_document_per_group_and_row_order_does_not_matter(selector: Random | TopK) -> None:
    copies = selector.select(TABLE, NORMALISED, BUDGET, seed=7)
    groups = len(DOMAINS) if getattr(selector, "per_domain", False) else 1
    assert abs(int((TABLE.tokens * copies).sum()) - BUDGET) <= groups * TABLE.tokens.max()
    assert set(copies) == {0, 1}
    order = RNG.permutation(N)
    again = selector.select(_shuffled(order), NORMALISED[order], BUDGET, seed=7)
    np.testing.assert_array_equal(again, copies[order])


def test_top_k_takes_the_best_and_random_does_not() -> None:
    top = TopK("edu").select(TABLE, NORMALISED, BUDGET, seed=0) > 0
    assert TABLE.scores[top, 0].min() >= TABLE.scores[~top, 0].max()
    random = Random().select(TABLE, NORMALISED, BUDGET, seed=0) > 0
    assert abs(TABLE.scores[random, 0].mean() - TABLE.scores[:, 0].mean()) < 0.05


def test_per_domain_keeps_the_domain_shares() -> None:
    copies = TopK(per_domain=True).select(TABLE, NORMALISED, BUDGET, seed=0)
    after = np.bincount(TABLE.domain_ids, weights=TABLE.tokens * copies)
    np.testing.assert_allclose(after / after.sum(), TABLE.domain_tokens / TABLE.tokens.sum(), atol=0.01)


def test_unknown_scorer_is_named() -> None:
    with pytest.raises(InputError, match="'nope' is not among edu, prose"):
        TopK("nope").select(TABLE, NORMALISED, BUDGET, seed=0)


def test_quadmix_meets_the_budget_and_prefers_quality(tmp_path) -> None:
    theta = sample_parameters(1, 2, 3, seed=5, domains=DOMAINS, scorers=TABLE.scorers)[0]
    theta.save(tmp_path / "theta.json")
    copies = QuaDMix(str(tmp_path / "theta.json")).select(TABLE, NORMALISED, BUDGET, seed=0)
    assert int((TABLE.tokens * copies).sum()) == pytest.approx(BUDGET, rel=0.05)
    taken = copies > 0
    assert NORMALISED[taken].mean() < NORMALISED[~taken].mean()
