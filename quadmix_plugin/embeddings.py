"""Vectors for texts: of hashed words, which need no model, or of any encoder in the format of Hugging Face.

An embedder is a small value that is pickled to the workers. A text's vector depends on that text alone: to the bit for
words, and for a model on a CPU.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from math import log1p
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin import models
from quadmix_plugin.errors import InputError
from quadmix_plugin.inference import DocumentModel

Vectors = NDArray[np.float32]

WORD_DIMENSIONS = 512
"""Measured on 5,000 documents of 15 domains, K-means with K=32: purity .60, .66, .68 and .69 at 128, 256, 512 and 1,024
dimensions; a random projection of many more words to as few did no better, and neither did inverse frequencies."""


class Embedder(Protocol):
    """Turns texts into vectors; instances are pickled. One with a field ``device`` can be told where to run."""

    def check(self) -> None:
        """Raises InputError for what is known to be wrong before the first text."""
        ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of length one [n, d], float32; zero where a text has nothing to embed."""
        ...


@dataclass(frozen=True)
class HashedWords:
    """The words of a text, counted in ``dimensions`` buckets by hash and with signs, damped as ±log(1 + count).

    Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (ICML 2009). Words are runs of at least two
    letters or digits, in lower case; a script without spaces has few of them, and wants ``ModelEmbeddings``.

    Raises:
        InputError: fewer than one dimension.
    """

    dimensions: int = WORD_DIMENSIONS

    def __post_init__(self) -> None:
        if self.dimensions < 1:
            raise InputError(f"dimensions: {self.dimensions}; give at least 1, such as {WORD_DIMENSIONS}")

    def check(self) -> None:
        """Nothing can be wrong."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of length one [n, dimensions]; zero for a text without words."""
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.preprocessing import normalize

        if not texts:
            return np.empty((0, self.dimensions), dtype=np.float32)
        unscaled: Any = None  # scikit-learn declares a word
        counts: Any = HashingVectorizer(n_features=self.dimensions, norm=unscaled).transform(texts)
        sizes, at = np.unique(np.abs(counts.data), return_inverse=True)
        damped = np.array([log1p(size) for size in sizes])  # one by one: in arrays, rounding may depend on the position
        counts.data = np.sign(counts.data) * damped[at]
        scaled: Any = normalize(counts)
        return scaled.toarray().astype(np.float32)


@dataclass
class ModelEmbeddings(DocumentModel):
    """The mean of an encoder's last hidden states over a text's tokens, scaled to length one.

    Options are those of ``DocumentModel``, and ``device``. The model is loaded at the first text, once per process.

    Raises:
        InputError: no such model, or one that has a decoder of its own.
    """

    device: str = "auto"

    def __reduce__(self) -> tuple[Any, ...]:
        return _one_per_process, astuple(self)

    def read_folder(self, folder: Path) -> None:
        """An encoder, or a decoder alone."""
        config = models.load_config(folder)
        if config.is_encoder_decoder:
            raise InputError(f"{folder}: {config.model_type} is an encoder with a decoder; give a model without one")
        self.limit_positions(config, folder)

    def load_network(self, folder: Path) -> Any:
        """The model without any head."""
        return models.load_pretrained(_WithoutPooler, folder, self._device)

    def forward(self, ids: Any, mask: Any) -> Any:
        """Vectors of length one [b, d]."""
        import torch

        states = self._network(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        mean = (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=1)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Vectors of length one [n, d]; zero for a blank text."""
        if self._runner is None:
            self.setup(self.device)
        if not texts:
            return np.empty((0, self._network.config.hidden_size), dtype=np.float32)
        vectors = self.run(texts)
        vectors[[not text.strip() for text in texts]] = 0
        return vectors


@lru_cache(maxsize=1)
def _one_per_process(*options: Any) -> ModelEmbeddings:
    """What a pickle becomes: every batch brings one, and the model shall not be loaded for each."""
    return ModelEmbeddings(*options)


class _WithoutPooler:
    """Loads a transformers model whose pooler, which is not used here, may lack its weights."""

    @staticmethod
    def from_pretrained(folder: Path, **options: Any) -> Any:
        from transformers import AutoModel

        model, info = AutoModel.from_pretrained(folder, **options)
        missing = {key for key in info["missing_keys"] if not key.startswith("pooler.")}
        return model, {**info, "missing_keys": missing}


def to_column(vectors: Vectors) -> pa.FixedSizeListArray:
    """Vectors [n, d] as an Arrow column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1])


def from_column(column: pa.ChunkedArray) -> Vectors:
    """The inverse of ``to_column``."""
    flat = column.combine_chunks().flatten()
    return flat.to_numpy().reshape(-1, column.type.list_size)
