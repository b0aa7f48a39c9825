"""Domain labels by any supervised fastText model: ``__label__Science`` becomes the domain ``Science``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import fasttext_process, models
from quadmix_plugin.errors import InputError

_PREFIX = "__label__"
_NO_LABEL = "other"


@dataclass
class FastTextDomain:
    """Labels each document with the most probable label of a fastText model; line breaks become spaces.

    A document to which the model gives no label, because it knows none of its words, is of the domain ``other``. (A
    model that knows the end of a line, ``</s>``, gives even an empty document a label: what it expects of any.) The
    model runs in a child process, which a damaged file may crash (``fasttext_process``). A file with exchanged labels
    is sound: only ``sha256`` tells. ``download`` logs the digest of a file that has none (level INFO).

    Args:
        model: a ``.bin`` or ``.ftz`` file, a folder that holds one ``.bin``, or a hub id with ``revision``.
        revision: the 40 hex digits of a commit on the hub.
        file: name of the file in the folder or on the hub, where there are several.
        sha256: digest that the file must have; fastText itself checks nothing when it loads.

    Raises:
        InputError: no such file, not a fastText model, damaged, another digest, or labels that do not name domains.
    """

    name: ClassVar[str] = "fasttext"
    uses_gpu: ClassVar[bool] = False

    model: str
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        models.check_source(self.model, self.revision)
        self._process: Any = None
        self._labels: list[str] = []

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has the options and no process
        return type(self), (self.model, self.revision, self.file, self.sha256)

    def download(self) -> None:
        """Fetches the model into the hub's cache, once per machine."""
        fasttext_process.download(self.model, self.revision, self.file, self.sha256)

    def check(self) -> None:
        """Loads the model for a moment, so that a fault shows before the first document."""
        self.setup("cpu")
        self._process.close()
        self._process = None

    def setup(self, device: str) -> None:
        """Loads the model; ``device`` is of no consequence, fastText runs on the CPU."""
        path = fasttext_process.model_path(self.model, self.revision, self.file)
        process = fasttext_process.FastTextProcess(path, self.sha256)
        labels = [label.removeprefix(_PREFIX) for label in process.labels]
        if not all(label.strip() for label in labels) or len(set(labels)) < len(labels):
            process.close()
            raise InputError(f"{path}: labels that are empty or the same without {_PREFIX}; train it with other labels")
        self._labels = labels if _NO_LABEL in labels else [*labels, _NO_LABEL]
        self._process = process

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
