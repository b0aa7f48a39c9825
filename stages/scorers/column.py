"""A score that the corpus already has: another tool's output, used as it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError


@dataclass
class ColumnScore:
    """Takes a numeric column as the raw score, such as ``fineweb-edu-score-float`` of Curator's own classifier.

    Args:
        column: the column's name.
        higher_is_better: the direction of its values.

    Raises:
        InputError: a value that is not a number; a missing one is NaN, as ``QualityScore`` allows it or not.
    """

    name: ClassVar[str] = "column"
    uses_gpu: ClassVar[bool] = False

    column: str
    higher_is_better: bool = True

    @property
    def input_column(self) -> str:
        """The column that ``score`` is given."""
        return self.column

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def score(self, texts: Sequence[Any]) -> NDArray[np.float32]:
        """The values of the column as float32 [n]."""
        scores = np.empty(len(texts), dtype=np.float32)
        for i, value in enumerate(texts):
            try:
                scores[i] = np.nan if value is None else float(value)
            except (TypeError, ValueError) as error:
                raise InputError(f"{self.column}: row {i} is {value!r}; a score must be a number") from error
        return scores
