"""Selection methods: they meet the budget, do not depend on how the corpus is cut, and take what they say they take."""

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from quadmix_plugin import count_copies, sample_parameters
from quadmix_plugin.budget import scale_to_budget
from quadmix_plugin.errors import InputError
from quadmix_plugin.labelled_corpus import MemoryCorpus, check_selector, select_in_memory
from quadmix_plugin.parameters import Parameters, ParameterSpace
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.stages.selectors.criteria_mix import CriteriaMix
from quadmix_plugin.stages.selectors.quadmix import QuaDMix, Sampled
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
TOTAL = int(TABLE.tokens.sum())
BUDGET = int(0.2 * TOTAL)
THETA = sample_parameters(1, 2, 3, seed=5, space=ParameterSpace(omega_max=0.5), domains=DOMAINS, scorers=TABLE.scorers)[
    0
]
CORPUS = MemoryCorpus.of(TABLE, NORMALISED, searched={(): THETA})
ALL: list[Any] = [
    Random(),
    TopK("edu"),
    TopK(),
    TopK(per_domain=True),
    CriteriaMix(),
    CriteriaMix(["prose"]),
    QuaDMix(),
]


def _copies(selector: Any, corpus: MemoryCorpus = CORPUS, budget: int = BUDGET, seed: int = 7) -> np.ndarray:
    check_selector(selector, corpus.summary, budget)
    return corpus.copies(selector.fit(corpus, budget, seed))


def _tokens(copies: np.ndarray) -> int:
    return int((TABLE.tokens * copies).sum())


@pytest.mark.parametrize("selector", ALL)
def test_neither_partitions_nor_the_order_of_rows_change_a_selection(selector: Any) -> None:
    copies = _copies(selector)
    assert copies.dtype == np.int32
    order = np.random.default_rng(0).permutation(N)
    shuffled = replace(CORPUS, table=CORPUS.table.take(pa.array(order)))
    for partitions in (7, 64):
        np.testing.assert_array_equal(_copies(selector, replace(CORPUS, partitions=partitions)), copies)
        np.testing.assert_array_equal(_copies(selector, replace(shuffled, partitions=partitions)), copies[order])
    assert (_copies(selector, seed=8) != copies).any() or selector == TopK()  # ties alone depend on the seed


@pytest.mark.parametrize("selector", ALL[:-1])
def test_the_budget_is_met_within_a_document_and_none_is_repeated(selector: Any) -> None:
    groups = len(DOMAINS) if getattr(selector, "per_domain", False) else 1
    for budget in (1, BUDGET, TOTAL - 1, TOTAL):
        copies = _copies(selector, budget=budget)
        assert abs(_tokens(copies) - budget) <= groups * TABLE.tokens.max() / 2 + groups
        assert set(copies) <= {0, 1}


@pytest.mark.parametrize("selector", ALL[:-1])
def test_a_budget_beyond_the_corpus_is_refused_where_nothing_is_repeated(selector: Any) -> None:
    with pytest.raises(InputError, match=f"{TOTAL + 1:,} tokens, and the corpus has {TOTAL:,}"):
        _copies(selector, budget=TOTAL + 1)
    with pytest.raises(InputError, match="give at least 1"):
        _copies(selector, budget=0)


def test_top_k_takes_the_best_and_random_does_not() -> None:
    top = _copies(TopK("edu")) > 0
    assert TABLE.scores[top, 0].min() >= TABLE.scores[~top, 0].max()
    random = _copies(Random()) > 0
    assert abs(TABLE.scores[random, 0].mean() - TABLE.scores[:, 0].mean()) < 0.05


def test_per_domain_keeps_the_domain_shares() -> None:
    after = np.bincount(TABLE.domain_ids, weights=TABLE.tokens * _copies(TopK(per_domain=True)))
    np.testing.assert_allclose(after / after.sum(), TABLE.domain_tokens / TOTAL, atol=0.01)


def test_criteria_mix_is_the_union_of_the_best_of_each_scorer_at_one_k() -> None:
    chosen = _copies(CriteriaMix()) > 0
    ranks = np.stack([_token_rank(NORMALISED[:, n]) for n in range(2)])
    worst_taken, best_left = ranks.min(axis=0)[chosen].max(), ranks.min(axis=0)[~chosen].min()
    assert worst_taken <= best_left + 1e-12
    one = _copies(CriteriaMix(["edu"]), seed=1)
    np.testing.assert_array_equal(one, _copies(TopK("edu"), seed=1))
    shares = [(ranks[n] <= worst_taken) @ TABLE.tokens / TOTAL for n in range(2)]
    assert max(shares) - min(shares) < 0.015  # a tie group: scores have two digits
    assert _tokens(chosen) < sum(shares) * TOTAL  # some are among the best of both, and are taken once


def _token_rank(values: np.ndarray) -> np.ndarray:
    """The share of tokens with a better score, half of the tie group included, by definition."""
    better = np.array([TABLE.tokens[values < v].sum() for v in values])
    equal = np.array([TABLE.tokens[values == v].sum() for v in values])
    return (better + equal / 2) / TOTAL


def test_quadmix_selects_what_the_pure_functions_say_under_the_scaled_parameters(tmp_path) -> None:
    law = QuaDMix().fit(CORPUS, BUDGET, seed=4)
    assert isinstance(law, Sampled)
    wanted = count_copies(NORMALISED, TABLE.domain_ids, TABLE.tokens, TABLE.doc_ids, law.theta, 4)
    np.testing.assert_array_equal(CORPUS.copies(law), wanted)
    value = law.expected(CORPUS.table)
    rest = value - np.floor(value)
    assert law.sd_tokens == pytest.approx(np.sqrt((TABLE.tokens**2 * rest * (1 - rest)).sum()), rel=1e-5)
    assert abs(_tokens(wanted) - (TABLE.tokens * value).sum()) <= 3 * law.sd_tokens
    assert law.expected_tokens == pytest.approx(BUDGET, abs=float(TABLE.tokens.max()))
    assert law.theta.omega / THETA.omega == pytest.approx(law.theta.omega[0] / THETA.omega[0])
    assert scale_to_budget(THETA, law.ranks, BUDGET).theta.omega == pytest.approx(law.theta.omega)
    THETA.save(tmp_path / "theta.json")
    given = QuaDMix(theta=str(tmp_path / "theta.json"))
    np.testing.assert_array_equal(_copies(given, replace(CORPUS, searched=None), seed=4), wanted)


def test_quadmix_takes_the_parameters_of_the_search_without_a_scorer() -> None:
    alpha = np.tile([0.0, 1.0], (3, 1))
    without = Parameters(alpha, THETA.lam, THETA.omega, THETA.eta, THETA.epsilon, DOMAINS, TABLE.scorers)
    corpus = replace(CORPUS, searched={(): THETA, ("edu",): without})
    law = QuaDMix(exclude_scorers=["edu"]).fit(corpus, BUDGET, 0)
    assert isinstance(law, Sampled)
    assert (law.theta.alpha[:, 0] == 0).all()
    with pytest.raises(InputError, match="nothing has been searched"):
        QuaDMix(exclude_scorers=["prose"]).fit(corpus, BUDGET, 0)


def test_quadmix_repeats_documents_up_to_what_the_parameters_allow() -> None:
    most = int(QuaDMix().fit(CORPUS, TOTAL, 0).expected_tokens)  # type: ignore[attr-defined]
    assert most == pytest.approx(TOTAL, rel=0.01)
    with pytest.raises(InputError, match="cannot be reached; under these parameters"):
        QuaDMix().fit(CORPUS, 3 * TOTAL, 0)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (TopK("nope"), "scorer_name: 'nope' is not among edu, prose"),
        (CriteriaMix(["edu", "nope"]), "scorer_names: 'nope' is not among edu, prose"),
        (QuaDMix(exclude_scorers=["nope"]), "exclude_scorers: 'nope' is not among"),
        (QuaDMix(exclude_scorers=["edu", "prose"]), "every scorer is excluded"),
    ],
)
def test_what_the_corpus_lacks_is_named_before_any_pass(selector: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_selector(selector, CORPUS.summary, BUDGET)


@pytest.mark.parametrize("selector", ALL)
def test_a_law_can_be_sent_to_another_process(selector: Any) -> None:
    law = selector.fit(CORPUS, BUDGET, 0)
    np.testing.assert_array_equal(CORPUS.copies(pickle.loads(pickle.dumps(law))), CORPUS.copies(law))  # noqa: S301


def test_a_score_table_in_memory_is_enough_for_selectors_without_text() -> None:
    copies = select_in_memory(TopK("edu"), TABLE, NORMALISED, BUDGET, 7)
    np.testing.assert_array_equal(copies, _copies(TopK("edu")))
