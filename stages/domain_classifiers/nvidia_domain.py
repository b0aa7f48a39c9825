"""Domain labels by a model in the format of ``nvidia/domain-classifier``: DeBERTa, dropout, a linear head.

The head reads the first token. The model's ``config.json`` names the backbone and the labels; the weights hold the
backbone under ``model.`` and the head under ``fc.``. The multilingual sibling has the same format.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from quadmix_plugin import models
from quadmix_plugin.errors import InputError

if TYPE_CHECKING:
    import torch

_CHARACTERS = 2000  # of a document that the published classifier was made to read


@dataclass
class NvidiaDomain:
    """Labels each document with the most probable domain, from its first 2000 characters and 512 tokens.

    Args:
        model: a local folder, or a hub id with ``revision``.
        revision: the 40 hex digits of a commit on the hub.
        base_revision: the commit of the backbone whose architecture the config names (``base_model``), needed where
            neither the config nor a folder inside the model describes it.
        max_length: tokens of a document that the model sees; by default the tokenizer's limit, at most 512.
        tokens_per_batch: upper bound of padded tokens in one forward pass.

    Raises:
        InputError: no such model, or labels that do not fit its head.
    """

    name: ClassVar[str] = "nvidia-domain"

    model: str = "nvidia/domain-classifier"
    revision: str | None = None
    base_revision: str | None = None
    max_length: int | None = None
    tokens_per_batch: int = 16384

    def __post_init__(self) -> None:
        models.check_source(self.model, self.revision)
        self._network: Any = None
        self._tokenizer: Any = None
        self._labels: list[str] = []
        self._device = "cpu"

    def download(self) -> None:
        """Fetches the model into the hub's cache, once per machine."""
        self._backbone_config(models.model_folder(self.model, self.revision))

    def setup(self, device: str) -> None:
        """Loads the model onto ``device``."""
        folder = models.model_folder(self.model, self.revision)
        self._device = models.choose_device(device)
        self._tokenizer = models.load_transformers_tokenizer(folder)
        self._labels = read_labels(folder)
        network = build_network(self._backbone_config(folder), len(self._labels))
        _load_weights(network, models.weights_path(folder))
        self._network = network.eval().to(self._device, models.model_dtype(self._device))

    def classify(self, texts: Sequence[str]) -> list[str]:
        """The domain of each text."""
        ids = models.token_ids(
            self._tokenizer,
            [text[:_CHARACTERS] for text in texts],
            models.input_length(self._tokenizer, self.max_length),
        )
        logits = models.run_batches(
            ids,
            self._network,
            pad_id=self._tokenizer.pad_token_id or 0,
            device=self._device,
            tokens_per_batch=self.tokens_per_batch,
        )
        return [self._labels[m] for m in logits.argmax(axis=1)] if len(ids) else []

    def _backbone_config(self, folder: Path) -> Any:
        """The backbone's architecture: in the model's own config, in a folder beside it, or on the hub."""
        from transformers import AutoConfig

        config = models.read_config(folder)
        base = str(config.get("base_model", ""))
        place = folder
        if "hidden_size" not in config:
            inside = folder / base
            place = inside if base and inside.is_dir() else models.model_folder(base, self.base_revision)
            models.read_config(place)
        return AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)


def read_labels(folder: Path) -> list[str]:
    """The labels of a model by their id, from ``id2label``.

    Raises:
        InputError: none, or ids that are not 0, 1, 2, …
    """
    labels = models.read_config(folder).get("id2label") or {}
    try:
        by_id = {int(key): str(value) for key, value in labels.items()}
    except ValueError as error:
        raise InputError(f"{folder}/config.json: id2label has a key that is no number ({error})") from error
    if sorted(by_id) != list(range(len(by_id))) or not by_id or len(set(by_id.values())) != len(by_id):
        raise InputError(f"{folder}/config.json: id2label must name labels 0, 1, 2, … once each, not {labels}")
    return [by_id[i] for i in range(len(by_id))]


def build_network(config: Any, n_labels: int, dropout: float = 0.0) -> "torch.nn.Module":
    """The untrained network: ``(ids [b, t], mask [b, t]) -> logits [b, n_labels]``."""
    import torch
    from transformers import AutoModel

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
            self.dropout = torch.nn.Dropout(dropout)
            self.fc = torch.nn.Linear(config.hidden_size, n_labels)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            features = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return self.fc(self.dropout(features[:, 0]))

    return Network()


def _load_weights(network: Any, path: Path) -> None:
    from safetensors.torch import load_file

    try:
        weights = {k: v for k, v in load_file(path).items() if not k.endswith("position_ids")}
        network.load_state_dict({k: v.float() for k, v in weights.items()})
    except Exception as error:  # safetensors, key and shape errors have no common class
        lines = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: does not fit the config ({lines}); fetch the model again") from error
