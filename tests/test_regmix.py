"""RegMix: it finds the mixture that loses least, fills the shares with random documents, and says what it cannot do."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from quadmix_plugin import registry
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.labelled_corpus import MemoryCorpus, check_selector
from quadmix_plugin.pipelines.mixtures import expected_copies
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.stages.selectors.regmix import RegMix, read_mixture

RNG = np.random.default_rng(9)
N = 4000
DOMAINS = ("books", "code", "forums", "news")
TABLE = ScoreTable(
    pa.array([f"d{i}" for i in range(N)]),
    RNG.choice(4, N, p=[0.1, 0.2, 0.3, 0.4]).astype(np.int64),
    RNG.integers(1, 300, N),
    RNG.random((N, 1)).astype(np.float32),
    DOMAINS,
    ("edu",),
)
NORMALISED = (1 - TABLE.scores).astype(np.float32)
TOTAL = int(TABLE.tokens.sum())
PRIOR = TABLE.domain_tokens / TOTAL
BUDGET = TOTAL // 10
TARGET = np.array([0.3, 0.1, 0.2, 0.4])


@dataclass
class Distance:
    """A trainer whose losses are known: the squared distance of a mixture from one target per task.

    ``failing``: proxies whose losses are NaN. ``seen`` are the mixtures it was asked for.
    """

    targets: dict[str, np.ndarray] = field(default_factory=lambda: {"mmlu": TARGET})
    failing: tuple[int, ...] = ()
    seen: list[np.ndarray] = field(default_factory=list)

    def __call__(self, mixtures: np.ndarray, seed: int) -> dict[str, np.ndarray]:
        self.seen.append(mixtures)
        losses = {task: ((mixtures - target) ** 2).sum(axis=1) for task, target in self.targets.items()}
        for each in losses.values():
            each[list(self.failing)] = np.nan
        return losses


def _corpus(trainer: Callable | None = None, partitions: int = 1, objective: dict[str, float] | None = None) -> Any:
    return MemoryCorpus.of(TABLE, NORMALISED, partitions=partitions, trainer=trainer, objective=objective or {})


def _quick(**options: Any) -> RegMix:
    return RegMix(**{"proxies": 60, "regressor": "gp", "draws": 20_000, "top": 20, **options})


def _copies(selector: RegMix, corpus: MemoryCorpus, budget: int = BUDGET, seed: int = 7) -> np.ndarray:
    check_selector(selector, corpus.summary, budget)
    return corpus.copies(selector.fit(corpus, budget, seed))


def _tokens(copies: np.ndarray) -> np.ndarray:
    return np.bincount(TABLE.domain_ids, weights=TABLE.tokens * copies, minlength=4)


def _mixture(path: Path, content: object) -> RegMix:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return RegMix(mixture=str(path))


def test_it_finds_the_mixture_that_loses_least() -> None:
    trainer = Distance()
    tokens = _tokens(_copies(_quick(), _corpus(trainer)))
    np.testing.assert_allclose(tokens / tokens.sum(), TARGET, atol=0.06)
    assert np.abs(PRIOR - TARGET).max() > 0.15  # so the shares of the corpus are no answer
    assert [each.shape for each in trainer.seen] == [(60, 4)]


def test_trees_find_a_better_mixture_than_the_corpus_is() -> None:
    # Published: LightGBM on 512 proxies; its trees are steps, so it comes near and not as near as a smooth regressor.
    tokens = _tokens(_copies(RegMix(proxies=200, draws=20_000), _corpus(Distance())))
    assert ((tokens / tokens.sum() - TARGET) ** 2).sum() < 0.3 * ((PRIOR - TARGET) ** 2).sum()


def test_tasks_are_weighed_as_in_the_objective() -> None:
    trainer = Distance({"mmlu": TARGET, "hellaswag": np.array([0.05, 0.6, 0.3, 0.05])})
    found = {}
    for weights in ({"mmlu": 1.0}, {"hellaswag": 1.0}, {}):
        tokens = _tokens(_copies(_quick(), _corpus(trainer, objective=weights)))
        found[tuple(weights)] = tokens / tokens.sum()
    np.testing.assert_allclose(found[("mmlu",)], TARGET, atol=0.06)
    np.testing.assert_allclose(found[("hellaswag",)], trainer.targets["hellaswag"], atol=0.1)
    between = np.sort([found[("mmlu",)], found[("hellaswag",)]], axis=0)
    assert ((found[()] > between[0] - 0.05) & (found[()] < between[1] + 0.05)).all()
    assert abs(found[()][1] - 0.35) < 0.1


def test_the_most_that_a_proxy_repeats_a_domain_bounds_the_trained_mixtures() -> None:
    trainer = Distance()
    _copies(_quick(most_repeats=2.0), _corpus(trainer))
    assert (trainer.seen[0] <= 2 * PRIOR * 1.01).all()
    assert (trainer.seen[0].max(axis=0) > 1.2 * PRIOR).all()


def test_proxies_that_failed_are_left_out() -> None:
    failing = tuple(range(0, 60, 7))
    tokens = _tokens(_copies(_quick(), _corpus(Distance(failing=failing))))
    np.testing.assert_allclose(tokens / tokens.sum(), TARGET, atol=0.06)


def test_too_few_trained_proxies_are_refused() -> None:
    with pytest.raises(InputError, match="7 rows to fit on, 8 are needed; train more proxies"):
        _copies(_quick(proxies=20), _corpus(Distance(failing=tuple(range(7, 20)))))


@pytest.mark.parametrize("budget", [1, 5_000, BUDGET, TOTAL])
def test_every_domain_has_its_share_within_a_document(tmp_path: Path, budget: int) -> None:
    copies = _copies(_mixture(tmp_path / "m.json", dict(zip(DOMAINS, TARGET, strict=True))), _corpus(), budget)
    assert (np.abs(_tokens(copies) - budget * TARGET) <= TABLE.tokens.max() / 2 + 1).all()
    assert copies.dtype == np.int32


def test_a_domain_that_is_too_small_is_repeated_whole(tmp_path: Path) -> None:
    selector = _mixture(tmp_path / "m.json", {"books": 0.9, "news": 0.1})
    budget = int(3.5 * TABLE.domain_tokens[0] / 0.9)
    copies = _copies(selector, _corpus(), budget)
    books, news = copies[TABLE.domain_ids == 0], copies[TABLE.domain_ids == 3]
    assert set(books) == {3, 4}
    assert abs((books == 4).mean() - 0.5) < 0.05
    assert set(news) == {0, 1}
    assert not copies[(TABLE.domain_ids == 1) | (TABLE.domain_ids == 2)].any()
    beyond = 3 * TOTAL  # repeats make up what the corpus does not have
    assert abs(_tokens(_copies(selector, _corpus(), beyond)).sum() - beyond) <= 2 * TABLE.tokens.max()


def test_documents_of_a_domain_are_random(tmp_path: Path) -> None:
    selector = _mixture(tmp_path / "m.json", dict.fromkeys(DOMAINS, 1))
    copies = _copies(selector, _corpus(), TOTAL // 5)
    for m in range(4):
        here = TABLE.domain_ids == m
        taken = copies[here] > 0
        assert 0.1 < taken.mean() < 0.9
        for column in (TABLE.scores[here, 0], TABLE.tokens[here], np.flatnonzero(here)):
            assert abs(np.corrcoef(taken, column)[0, 1]) < 4 / np.sqrt(taken.size)
    assert (_copies(selector, _corpus(), TOTAL // 5, seed=8) != copies).any()


@pytest.mark.parametrize("searched", [True, False])
def test_neither_partitions_nor_the_order_of_rows_change_it(tmp_path: Path, searched: bool) -> None:
    selector = _quick(proxies=12) if searched else _mixture(tmp_path / "m.json", {"books": 8, "news": 1, "code": 1})
    corpus = _corpus(Distance())
    copies = _copies(selector, corpus)
    order = np.random.default_rng(0).permutation(N)
    shuffled = replace(corpus, table=corpus.table.take(pa.array(order)))
    for partitions in (7, 64):
        np.testing.assert_array_equal(_copies(selector, replace(corpus, partitions=partitions)), copies)
        np.testing.assert_array_equal(_copies(selector, replace(shuffled, partitions=partitions)), copies[order])
    assert copies.any()


def test_shares_of_a_file_are_normalised_and_absent_domains_have_none(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    _mixture(path, {"news": 30, "books": 10.0})
    np.testing.assert_array_equal(read_mixture(str(path), DOMAINS), [0.25, 0, 0, 0.75])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"books": 1, "poems": 1}, r"'poems' is not among the domains books, code, forums, news"),
        ({"books": -1, "news": 2}, "not an object of shares"),
        ({"books": 0}, "one is above 0"),
        ({}, "one is above 0"),
        ({"books": "0.5"}, "not an object of shares"),
        ({"books": True}, "not an object of shares"),
        ([0.5, 0.5], "not an object of shares"),
        ("books: 1", "cannot be read"),
        ('{"books": NaN}', "not an object of shares"),
        ('{"books": Infinity}', "not an object of shares"),
    ],
)
def test_a_file_that_is_no_mixture_is_refused_before_any_pass(tmp_path: Path, content: object, message: str) -> None:
    selector = _mixture(tmp_path / "m.json", content)
    with pytest.raises(InputError, match=rf"mixture: .*m\.json: .*{message}"):
        check_selector(selector, DomainSummary.of(TABLE, NORMALISED), BUDGET)


def test_what_cannot_be_searched_is_refused_before_any_pass(tmp_path: Path) -> None:
    summary = DomainSummary.of(TABLE, NORMALISED)
    with pytest.raises(InputError, match=r"mixture: .*none\.json: cannot be read .*give a JSON file"):
        check_selector(RegMix(mixture=str(tmp_path / "none.json")), summary, BUDGET)
    alone = ScoreTable(
        TABLE.doc_ids, np.zeros(N, dtype=np.int64), TABLE.tokens, TABLE.scores, ("books",), TABLE.scorers
    )
    with pytest.raises(InputError, match="a single domain, so there is nothing to mix"):
        check_selector(_quick(), DomainSummary.of(alone, NORMALISED), BUDGET)
    with pytest.raises(InputError, match="lightgbm-published needs 45 of them; train more than 44"):
        check_selector(RegMix(proxies=44), summary, BUDGET)
    check_selector(RegMix(proxies=45), summary, BUDGET)
    with pytest.raises(InputError, match="top: 20 of 10 draws"):
        check_selector(_quick(draws=10), summary, BUDGET)
    with pytest.raises(RecipeError, match=r"no plug-in 'lightgbn' .* did you mean"):
        check_selector(_quick(regressor="lightgbn"), summary, BUDGET)
    with pytest.raises(InputError, match="give the mixture itself"):
        _quick().fit(_corpus(), BUDGET, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"proxies": 7}, "regmix.proxies: input should be greater than or equal to 8"),
     ({"most_repeats": 0.5}, "regmix.most_repeats: input should be greater than or equal to 1"),
     ({"draws": 0}, "regmix.draws:"), ({"top": 0}, "regmix.top:")],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        registry.create("selectors", "regmix", options, "regmix")


def test_copies_that_a_proxy_expects_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    sizes = np.array([5_000, 20_000, 1_000, 60_000])
    whole = sum(sizes.tolist())
    mixtures = np.concatenate(
        [rng.dirichlet(np.full(4, 0.5), 60), sizes[None] / whole, [[0, 0, 1, 0]], [[0.5, 0, 0.5, 0]]]
    )
    for tokens in (100, 4_000, 30_000, 200_000):
        copies = expected_copies(mixtures, sizes, tokens)
        for mixture, found in zip(mixtures.tolist(), copies, strict=True):
            without_repeats = min(size / share for size, share in zip(sizes.tolist(), mixture, strict=True) if share)
            # Room for all that it has, but the tokens of a proxy with a tenth to spare where that is more.
            wanted = max(without_repeats, 1.1 * tokens)
            expected = [wanted * share / size for size, share in zip(sizes.tolist(), mixture, strict=True)]
            np.testing.assert_allclose(found, expected, rtol=1e-9)
            drawn = found * sizes
            assert drawn.sum() >= 1.1 * tokens * (1 - 1e-9)
            np.testing.assert_allclose(drawn / drawn.sum(), mixture, atol=1e-12)
            if without_repeats >= 1.1 * tokens:
                assert found.max() <= 1 + 1e-9


def test_shares_that_sum_to_one_but_for_rounding_are_shares_all_the_same() -> None:
    sizes = np.array([100, 300])
    copies = expected_copies(np.array([[0.4999, 0.4999]]), sizes, 50)
    np.testing.assert_allclose(copies * sizes / (copies * sizes).sum(), [[0.5, 0.5]])
    assert copies.max() <= 1.001  # of the domain that is used up
    more = expected_copies(np.array([[0.4, 0.4]]), sizes, 1_000) * sizes
    assert more.sum() == pytest.approx(1_100)


def test_a_domain_without_tokens_is_expected_nothing_of() -> None:
    copies = expected_copies(np.array([[0.5, 0.5, 0.0]]), np.array([100, 300, 0]), 50)
    np.testing.assert_allclose(copies, [[1.0, 1 / 3, 0.0]])
