"""TopK: the best documents by one scorer, or by the mean of all, up to the budget."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.labelled_corpus import LabelledCorpus, Law, require_scorers
from quadmix_plugin.schema import normalised_column
from quadmix_plugin.stages.score_columns import read_numbers
from quadmix_plugin.threshold import Coded, up_to_budget, up_to_budgets


@dataclass(frozen=True)
class MeanQuality:
    """The key of a document: the mean of σ of these scorers, smaller = better."""

    scorers: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The normalised scores."""
        return tuple(map(normalised_column, self.scorers))

    def of(self, batch: pa.Table) -> NDArray[np.float64]:
        """The mean of every document [n]."""
        return np.mean([read_numbers(batch, name).astype(np.float64) for name in self.columns], axis=0)


@dataclass
class TopK:
    """Takes the best documents until the budget is reached, each once; ties are broken by the document hash.

    Args:
        scorer_name: a name under ``scorers`` in the recipe; None takes the mean of all normalised scores.
        per_domain: fills each domain's share of the budget (its share of the corpus) on its own.
    """

    name: ClassVar[str] = "top_k"
    scorer_name: str | None = None
    per_domain: bool = False

    def check(self, summary: DomainSummary, budget_tokens: int) -> None:
        """Raises InputError for a scorer that the corpus does not have."""
        del budget_tokens
        require_scorers([self.scorer_name] if self.scorer_name else [], summary.scorers, "scorer_name")

    def fit(self, corpus: LabelledCorpus, budget_tokens: int, seed: int) -> Law:
        """The law of the threshold, or of one in every domain; errors as ``up_to_budget``."""
        summary = corpus.summary
        key = MeanQuality((self.scorer_name,) if self.scorer_name else summary.scorers)
        if not self.per_domain:
            return up_to_budget(corpus, key, budget_tokens, seed)
        shares = [int(tokens) / int(summary.tokens.sum()) for tokens in summary.tokens]
        return up_to_budgets(corpus, Coded(key, seed, summary.domains), [round(budget_tokens * s) for s in shares])
