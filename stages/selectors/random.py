"""Random: documents uniformly at random up to the budget; the baseline that every method has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.sampling import hash64
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.stages.selectors import first_to_budget


@dataclass
class Random:
    """Takes documents in the order of their hash until the budget of unique tokens is reached."""

    name: ClassVar[str] = "random"

    def select(
        self, table: ScoreTable, normalised: NDArray[np.float32], budget_tokens: int, seed: int
    ) -> NDArray[np.int32]:
        """The number of copies (0 or 1) of every document [n]."""
        del normalised
        return first_to_budget(np.argsort(hash64(table.doc_ids, seed), kind="stable"), table.tokens, budget_tokens)
