"""TopK: the best documents by one scorer, or by the mean of all, up to the budget."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.sampling import hash64
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.stages.selectors import first_to_budget


@dataclass
class TopK:
    """Takes the best documents until the budget of unique tokens is reached; ties are broken by the document hash.

    Args:
        scorer_name: a name under ``scorers`` in the recipe; None takes the mean of all normalised scores.
        per_domain: fills each domain's share of the budget (its share of the corpus) on its own.
    """

    name: ClassVar[str] = "top_k"
    scorer_name: str | None = None
    per_domain: bool = False

    def select(
        self, table: ScoreTable, normalised: NDArray[np.float32], budget_tokens: int, seed: int
    ) -> NDArray[np.int32]:
        """The number of copies (0 or 1) of every document [n].

        Raises:
            InputError: a scorer that the table does not have.
        """
        if self.scorer_name is not None and self.scorer_name not in table.scorers:
            raise InputError(f"scorer_name: {self.scorer_name!r} is not among {', '.join(table.scorers)}")
        column = slice(None) if self.scorer_name is None else [table.scorers.index(self.scorer_name)]
        quality = normalised[:, column].mean(axis=1, dtype=np.float64)
        order = np.lexsort((hash64(table.doc_ids, seed), quality))
        if not self.per_domain:
            return first_to_budget(order, table.tokens, budget_tokens)
        copies = np.zeros(table.n, dtype=np.int32)
        shares = table.domain_tokens / table.domain_tokens.sum()
        for m, share in enumerate(shares):
            in_domain = order[table.domain_ids[order] == m]
            copies += first_to_budget(in_domain, table.tokens, round(share * budget_tokens))
        return copies
