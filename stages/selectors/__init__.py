"""Selection methods: from a score table and a token budget to a number of copies per document."""

import numpy as np
from numpy.typing import NDArray


def first_to_budget(order: NDArray[np.integer], tokens: NDArray[np.int64], budget_tokens: int) -> NDArray[np.int32]:
    """One copy of each document in ``order`` while their tokens fit: the total is the nearest to the budget.

    Shapes: ``order`` [k] row numbers, ``tokens`` [n]. Returns int32 [n].
    """
    total = np.concatenate([[0], np.cumsum(tokens[order])])
    taken = int(np.argmin(np.abs(total - budget_tokens)))
    copies = np.zeros(tokens.size, dtype=np.int32)
    copies[order[:taken]] = 1
    return copies
