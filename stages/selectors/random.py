"""Random: documents uniformly at random up to the budget; the baseline that every method has to beat."""

from dataclasses import dataclass
from typing import ClassVar

from quadmix_plugin.labelled_corpus import LabelledCorpus, Law
from quadmix_plugin.threshold import ByHash, up_to_budget


@dataclass
class Random:
    """Takes documents in the order of their hash until the budget is reached, each once."""

    name: ClassVar[str] = "random"

    def fit(self, corpus: LabelledCorpus, budget_tokens: int, seed: int) -> Law:
        """The law of the threshold; errors as ``up_to_budget``."""
        return up_to_budget(corpus, ByHash(), budget_tokens, seed)
