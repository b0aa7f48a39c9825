"""Domain labels by any supervised fastText model: ``__label__Science`` becomes the domain ``Science``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.fasttext_model import FastTextModel

_PREFIX = "__label__"
_NO_LABEL = "other"


@dataclass
class FastTextDomain(FastTextModel):
    """Labels each document with the most probable label of a fastText model; line breaks become spaces.

    A document to which the model gives no label, because it knows none of its words, is of the domain ``other``. (A
    model that knows the end of a line, ``</s>``, gives even an empty document a label: what it expects of any.)
    Options are those of ``FastTextModel``.

    Raises:
        InputError: no such file, not a fastText model, damaged, another digest, or labels that do not name domains.
    """

    name: ClassVar[str] = "fasttext"
    uses_gpu: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._labels: list[str] = []

    def read_labels(self, path: Path, labels: list[str]) -> None:
        """The domains' names."""
        names = [label.removeprefix(_PREFIX) for label in labels]
        if not all(name.strip() for name in names) or len(set(names)) < len(names):
            raise InputError(f"{path}: labels that are empty or the same without {_PREFIX}; train it with other labels")
        self._labels = names if _NO_LABEL in names else [*names, _NO_LABEL]

    def classify(self, texts: Sequence[str]) -> list[str]:
        """The domain of each text."""
        ids, _ = self._process.predict(texts)
        return [self._labels[i] if i >= 0 else _NO_LABEL for i in ids[:, 0].tolist()]

    def probabilities(self, texts: Sequence[str]) -> tuple[list[str], NDArray[np.float32]]:
        """The domains, and the probability of each for each text: float32 [n, domains], clipped to [0, 1].

        The columns are the model's labels in its order, then ``other`` where that is not one of them. A text without
        a label has 1 there, all others 0. Each text sums to 1, but to anything for a one-versus-all model.
        """
        n_model = len(self._process.labels)
        ids, values = self._process.predict(texts, k=n_model)
        found = np.zeros((len(ids), n_model + 1), dtype=np.float32)
        np.put_along_axis(found, ids, np.clip(values, 0, 1), axis=1)  # the 0 of a missing label, -1, goes to the end
        found[ids[:, 0] < 0, self._labels.index(_NO_LABEL)] = 1
        return self._labels, found[:, : len(self._labels)]
