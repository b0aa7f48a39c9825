"""DCLM's quality filter: the probability that a fastText model gives to ``__label__hq``.

Format and text preparation are those of ``mlfoundations/fasttext-oh-eli5``: line breaks become spaces, nothing else
changes. DCLM-Baseline kept documents above 0.018112.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import models
from quadmix_plugin.errors import InputError

logger = logging.getLogger(__name__)

_MAGIC = (793712314).to_bytes(4, "little")  # the first bytes of every fastText model
_LABELS = {"__label__hq", "__label__cc"}


@dataclass
class DCLMFastText:
    """Scores documents with a supervised fastText model of the labels ``hq`` and ``cc``.

    Args:
        model: a ``.bin`` file, a folder that holds one, or a hub id with ``revision``.
        revision: the 40 hex digits of a commit on the hub.
        file: name of the ``.bin`` in the folder or on the hub, where there are several.
        sha256: digest that the file must have; fastText itself checks nothing when it loads.

    Raises:
        InputError: no such file, not a fastText model, another digest, or other labels.
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
        self._model: Any = None

    def download(self) -> None:
        """Fetches the model into the hub's cache, once per machine."""
        self._path()

    def setup(self, device: str) -> None:
        """Loads the model; ``device`` is of no consequence, fastText runs on the CPU."""
        import fasttext

        path = self._path()
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise InputError(f"{path}: not a fastText model; give the .bin that fastText wrote")
            file.seek(0)
            if self.sha256 and (found := hashlib.file_digest(file, "sha256").hexdigest()) != self.sha256:
                raise InputError(f"{path}: sha256 is {found}, not {self.sha256}; fetch it again")
        try:
            self._model = fasttext.load_model(str(path))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise InputError(f"{path}: damaged ({models.first_line(error)}); fetch it again") from error
        if (labels := set(self._model.get_labels())) != _LABELS:
            raise InputError(
                f"{path}: has the labels {', '.join(sorted(labels)[:5])}; dclm-fasttext needs "
                f"{' and '.join(sorted(_LABELS))}"
            )

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """P(hq) of each text, float32 [n], clipped to [0, 1] (fastText's own sum can reach 1.00001).

        A text that holds none of the model's words gets 0.
        """
        if not texts:
            return np.empty(0, dtype=np.float32)
        lines = [" ".join(models.encodable(text).strip().splitlines()) for text in texts]
        labels, probabilities = self._model.predict(lines, k=1)
        high = np.zeros(len(lines))
        for i, (label, probability) in enumerate(zip(labels, probabilities, strict=True)):
            if len(label):
                high[i] = probability[0] if label[0] == "__label__hq" else 1.0 - probability[0]
        return np.clip(high, 0.0, 1.0).astype(np.float32)

    def _path(self) -> Path:
        path = Path(self.model)
        if path.is_file():
            return path
        if path.is_dir():
            found = [path / self.file] if self.file else sorted(path.glob("*.bin"))
            if len(found) != 1 or not found[0].is_file():
                names = ", ".join(p.name for p in found) or "no .bin"
                raise InputError(f"{path}: holds {names}; give file: the name of the fastText model")
            return found[0]
        return self._fetched()

    def _fetched(self) -> Path:
        from huggingface_hub import hf_hub_download

        if not self.file:
            raise InputError(f"model {self.model!r}: give file: the name of the .bin on the hub")
        try:
            return Path(hf_hub_download(self.model, self.file, revision=self.revision))
        except Exception as error:  # the hub's client raises many kinds
            raise InputError(
                f"model {self.model!r}, {self.file} at {self.revision}: cannot be fetched ({type(error).__name__}: "
                f"{models.first_line(error)}); check the network, or download it and give its path"
            ) from error
