"""CriteriaMix: the union of the best documents by each of several scorers, without duplicates, up to the budget.

The baseline "Criteria Mix" of QuaDMix' Table 1 (arXiv 2504.16511), there with a fixed number of tokens per scorer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError
from quadmix_plugin.labelled_corpus import LabelledCorpus, Law, require_scorers
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.rank_states import Grid, RankHistogram
from quadmix_plugin.schema import TOKENS, normalised_column
from quadmix_plugin.stages.score_columns import read_numbers
from quadmix_plugin.threshold import up_to_budget

_BINS = 1 << 16


def _stacked(batch: pa.Table, columns: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """σ of every scorer one after the other [N·n], and the scorer's number in place of a domain."""
    values = np.concatenate([read_numbers(batch, name).astype(np.float64) for name in columns])
    return values, np.repeat(np.arange(len(columns)), batch.num_rows)


@dataclass(frozen=True)
class _Histograms:
    """Fold: the tokens of every bin of every scorer's σ."""

    columns_of_scores: tuple[str, ...]
    grid: Grid

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.columns_of_scores, TOKENS)

    def of(self, batch: pa.Table) -> pa.Table:
        values, scorers = _stacked(batch, self.columns_of_scores)
        tokens = np.tile(batch[TOKENS].to_numpy(), len(self.columns_of_scores))
        return RankHistogram.of(values, scorers, tokens, self.grid).to_table()

    def merge(self, states: Sequence[pa.Table]) -> pa.Table:
        return RankHistogram.merge(map(RankHistogram.from_table, states)).to_table()


@dataclass(frozen=True)
class BestRank:
    """The key of a document: its best rank by any of the scorers, as a share of the corpus' tokens."""

    columns: tuple[str, ...]
    ranks: RankMap

    def of(self, batch: pa.Table) -> NDArray[np.float64]:
        """The lowest of the ranks of every document [n]."""
        values, scorers = _stacked(batch, self.columns)
        return self.ranks.rank(values, scorers).reshape(len(self.columns), batch.num_rows).min(axis=0)


@dataclass
class CriteriaMix:
    """Takes documents that are among the best by any scorer, each once, the same share of tokens by every scorer.

    A document's rank by a scorer is the share of the corpus' tokens with a better score (half of its tie group
    included); documents are taken in the order of their best rank, so what is taken is the union of the top-k of all
    scorers at one k, which is as large as the budget allows. k is the same for all scorers to within one of 65,536
    bins of σ, or a tie group. Ties are broken by the document hash.

    Args:
        scorer_names: names under ``scorers`` in the recipe; None takes all of them.
    """

    name: ClassVar[str] = "criteria_mix"
    scorer_names: list[str] | None = None

    def __post_init__(self) -> None:
        if self.scorer_names is not None and len(set(self.scorer_names)) < max(len(self.scorer_names), 1):
            raise InputError(f"scorer_names: {self.scorer_names}; give at least one, none of them twice")

    def check(self, summary: DomainSummary, budget_tokens: int) -> None:
        """Raises InputError for a scorer that the corpus does not have."""
        del budget_tokens
        require_scorers(self.scorer_names or [], summary.scorers, "scorer_names")

    def fit(self, corpus: LabelledCorpus, budget_tokens: int, seed: int) -> Law:
        """The law of the threshold on the best rank; errors as ``up_to_budget``."""
        summary = corpus.summary
        names = summary.scorers if self.scorer_names is None else tuple(self.scorer_names)
        columns = tuple(map(normalised_column, names))
        at = [summary.scorers.index(name) for name in names]
        low, high = (np.asarray(f(ends[:, at], axis=0), dtype=np.float64)
                     for f, ends in ((np.nanmin, summary.low), (np.nanmax, summary.high)))  # fmt: skip
        state = corpus.fold(_Histograms(columns, Grid(low, high, _BINS)))
        ranks = RankMap.of_histogram(RankHistogram.from_table(state), "mid")
        return up_to_budget(corpus, BestRank(columns, ranks), budget_tokens, seed)
