"""DCLM's quality filter: the probability that a fastText model gives to ``__label__hq``.

Format and text preparation are those of ``mlfoundations/fasttext-oh-eli5``: line breaks become spaces, nothing else
changes. DCLM-Baseline kept documents above 0.018112.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.fasttext_model import FastTextModel

_HIGH = "__label__hq"
_LABELS = {_HIGH, "__label__cc"}


@dataclass
class DCLMFastText(FastTextModel):
    """Scores documents with a supervised fastText model of the labels ``hq`` and ``cc``.

    Options are those of ``FastTextModel``. A file in which the two labels are exchanged reverses every score.

    Raises:
        InputError: no such file, not a fastText model, damaged, another digest, or other labels.
    """

    name: ClassVar[str] = "dclm-fasttext"
    higher_is_better: ClassVar[bool] = True
    uses_gpu: ClassVar[bool] = False

    model: str = "mlfoundations/fasttext-oh-eli5"

    def read_labels(self, path: Path, labels: list[str]) -> None:
        """Exactly hq and cc."""
        if set(labels) != _LABELS:
            raise InputError(
                f"{path}: has the labels {', '.join(sorted(labels)[:5])}; dclm-fasttext needs "
                f"{' and '.join(sorted(_LABELS))}"
            )

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """P(hq) of each text, float32 [n], clipped to [0, 1] (fastText's own sum can reach 1.00001).

        A text that holds none of the model's words gets 0.
        """
        [ids], [top] = (found.T for found in self._process.predict(texts))
        high = np.where(ids == self._process.labels.index(_HIGH), top, 1 - top)
        return np.clip(np.where(ids < 0, 0, high), 0, 1)
