"""DCLM's quality filter: the probability that a fastText model gives to ``__label__hq``.

Format and text preparation are those of ``mlfoundations/fasttext-oh-eli5``: line breaks become spaces, nothing else
changes. DCLM-Baseline kept documents above 0.018112.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import fasttext_process, models
from quadmix_plugin.errors import InputError

_HIGH = "__label__hq"
_LABELS = {_HIGH, "__label__cc"}


@dataclass
class DCLMFastText:
    """Scores documents with a supervised fastText model of the labels ``hq`` and ``cc``.

    The model runs in a child process, which a damaged file may crash (``fasttext_process``). A file in which the two
    labels are exchanged is sound and reverses every score: only ``sha256`` tells. ``download`` logs the digest of a
    file that has none (level INFO).

    Args:
        model: a ``.bin`` file, a folder that holds one, or a hub id with ``revision``.
        revision: the 40 hex digits of a commit on the hub.
        file: name of the ``.bin`` in the folder or on the hub, where there are several.
        sha256: digest that the file must have; fastText itself checks nothing when it loads.

    Raises:
        InputError: no such file, not a fastText model, damaged, another digest, or other labels.
    """

    name: ClassVar[str] = "dclm-fasttext"
    higher_is_better: ClassVar[bool] = True
    uses_gpu: ClassVar[bool] = False

    model: str = "mlfoundations/fasttext-oh-eli5"
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        models.check_source(self.model, self.revision)
        self._process: Any = None

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
        if (labels := set(process.labels)) != _LABELS:
            process.close()
            raise InputError(
                f"{path}: has the labels {', '.join(sorted(labels)[:5])}; dclm-fasttext needs "
                f"{' and '.join(sorted(_LABELS))}"
            )
        self._process = process

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """P(hq) of each text, float32 [n], clipped to [0, 1] (fastText's own sum can reach 1.00001).

        A text that holds none of the model's words gets 0.
        """
        [ids], [top] = (found.T for found in self._process.predict(texts))
        high = np.where(ids == self._process.labels.index(_HIGH), top, 1 - top)
        return np.clip(np.where(ids < 0, 0, high), 0, 1)
