"""Educational value as the FineWeb-Edu classifier gives it: a BERT with one regression logit, about 0 to 5.

The raw logit is the score. It is neither clipped nor rounded: clipping would put many documents into one tie group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import models
from quadmix_plugin.errors import InputError
from quadmix_plugin.inference import DocumentModel


@dataclass
class FineWebEdu(DocumentModel):
    """Scores documents with a model in the format of ``HuggingFaceFW/fineweb-edu-classifier``.

    Options are those of ``DocumentModel``.

    Raises:
        InputError: no such model, or one that is not a regression with one output.
    """

    name: ClassVar[str] = "fineweb-edu"
    higher_is_better: ClassVar[bool] = True

    model: str = "HuggingFaceFW/fineweb-edu-classifier"

    def read_folder(self, folder: Path) -> None:
        """A sequence classifier with one output."""
        config = models.load_config(folder)
        kinds = config.architectures or []
        if config.num_labels != 1 or not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            raise InputError(
                f"{folder}: a {', '.join(kinds) or config.model_type} with {config.num_labels} outputs; fineweb-edu "
                f"needs a regression model with one"
            )
        if config.pad_token_id != self._tokenizer.pad_token_id:  # decoders find a document's end by it
            raise InputError(
                f"{folder}: pad_token_id is {config.pad_token_id} in the config and {self._tokenizer.pad_token_id} in "
                f"the tokenizer; give both the same"
            )
        self.limit_positions(config, folder)

    def load_network(self, folder: Path) -> Any:
        """Encoder and head."""
        from transformers import AutoModelForSequenceClassification

        return models.load_pretrained(AutoModelForSequenceClassification, folder, self._device)

    def forward(self, ids: Any, mask: Any) -> Any:
        """The logit, [b, 1]."""
        return self._network(input_ids=ids, attention_mask=mask).logits

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The raw logit of each text, float32 [n]."""
        return self.run(texts)[:, 0]
