"""Educational value as the FineWeb-Edu classifier gives it: a BERT with one regression logit, about 0 to 5.

The raw logit is the score. It is neither clipped nor rounded: clipping would put many documents into one tie group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import models
from quadmix_plugin.errors import InputError


@dataclass
class FineWebEdu:
    """Scores documents with a model in the format of ``HuggingFaceFW/fineweb-edu-classifier``.

    Args:
        model: a local folder, or a hub id with ``revision``.
        revision: the 40 hex digits of a commit on the hub.
        max_length: tokens of a document that the model sees; by default the tokenizer's limit, at most 512.
        tokens_per_batch: upper bound of padded tokens in one forward pass.

    Raises:
        InputError: no such model, or one that is not a regression with one output.
    """

    name: ClassVar[str] = "fineweb-edu"
    higher_is_better: ClassVar[bool] = True

    model: str = "HuggingFaceFW/fineweb-edu-classifier"
    revision: str | None = None
    max_length: int | None = None
    tokens_per_batch: int = 16384

    def __post_init__(self) -> None:
        models.check_source(self.model, self.revision)
        self._model: Any = None
        self._tokenizer: Any = None
        self._device = "cpu"

    def download(self) -> None:
        """Fetches the model into the hub's cache, once per machine."""
        models.model_folder(self.model, self.revision)

    def setup(self, device: str) -> None:
        """Loads the model onto ``device``."""
        from transformers import AutoModelForSequenceClassification

        folder = models.model_folder(self.model, self.revision)
        self._device = models.choose_device(device)
        self._tokenizer = models.load_transformers_tokenizer(folder)
        self._model = models.load_pretrained(AutoModelForSequenceClassification, folder, self._device)
        if (outputs := self._model.config.num_labels) != 1:
            raise InputError(f"{folder}: has {outputs} outputs; fineweb-edu needs a regression model with one")

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The raw logit of each text, float32 [n]."""
        ids = models.token_ids(self._tokenizer, texts, models.input_length(self._tokenizer, self.max_length))
        return models.run_batches(
            ids,
            lambda inputs, mask: self._model(input_ids=inputs, attention_mask=mask).logits,
            pad_id=self._tokenizer.pad_token_id or 0,
            device=self._device,
            tokens_per_batch=self.tokens_per_batch,
        )[:, 0]
