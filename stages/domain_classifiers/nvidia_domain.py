"""Domain labels by a model in the format of ``nvidia/domain-classifier``: DeBERTa, dropout, a linear head.

The head reads the first token. The model's ``config.json`` names the backbone and the labels; the weights hold the
backbone under ``model.`` and the head under ``fc.``. The multilingual sibling has the same format.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from quadmix_plugin import models
from quadmix_plugin.errors import InputError
from quadmix_plugin.inference import DocumentModel

if TYPE_CHECKING:
    import torch

DOMAINS = (
    "Adult", "Arts_and_Entertainment", "Autos_and_Vehicles", "Beauty_and_Fitness", "Books_and_Literature",
    "Business_and_Industrial", "Computers_and_Electronics", "Finance", "Food_and_Drink", "Games", "Health",
    "Hobbies_and_Leisure", "Home_and_Garden", "Internet_and_Telecom", "Jobs_and_Education", "Law_and_Government",
    "News", "Online_Communities", "People_and_Society", "Pets_and_Animals", "Real_Estate", "Science",
    "Sensitive_Subjects", "Shopping", "Sports", "Travel_and_Transportation",
)  # fmt: skip
"""The labels of the published classifiers, in the order of their ids."""

# The published configs name a backbone and do not describe it. These are its architecture, so that a folder with the
# published files is enough. Sizes are checked by the weights; what they do not check is what DeBERTa-v3 is.
DEBERTA_V3_BASE = {
    "model_type": "deberta-v2",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "max_relative_positions": -1,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
_BACKBONES = {
    "microsoft/deberta-v3-base": {**DEBERTA_V3_BASE, "vocab_size": 128_100},
    "microsoft/mdeberta-v3-base": {**DEBERTA_V3_BASE, "vocab_size": 251_000},
}


@dataclass
class NvidiaDomain(DocumentModel):
    """Labels each document with the most probable domain, from its first 2000 characters and 512 tokens.

    ``nvidia/domain-classifier`` and ``nvidia/multilingual-domain-classifier`` are of this format. Further options are
    those of ``DocumentModel``.

    Args:
        base_revision: the commit of the backbone whose architecture the config names (``base_model``), needed where
            it is none of the published ones and neither the config nor a folder inside the model describes it.
        characters: of a document that are read.

    Raises:
        InputError: no such model, or labels that do not fit its head.
    """

    name: ClassVar[str] = "nvidia-domain"

    model: str = "nvidia/domain-classifier"
    base_revision: str | None = None
    characters: int = 2000

    def download(self) -> None:
        """Fetches the model into the hub's cache, once per machine."""
        self._backbone_config(models.model_folder(self.model, self.revision))

    def read_folder(self, folder: Path) -> None:
        """The labels, and the backbone's architecture."""
        self._labels = read_labels(folder)
        self._config = self._backbone_config(folder)
        self.limit_positions(self._config, folder)
        shapes = {
            name: shape for file in models.weight_files(folder) for name, shape in models.weight_shapes(file).items()
        }
        outputs = shapes.get("fc.weight", (0,))[0]
        if outputs != len(self._labels):
            raise InputError(
                f"{folder}: its head has {outputs} outputs and does not fit the {len(self._labels)} labels of "
                f"id2label; fetch the config and the weights of one model"
            )

    def load_network(self, folder: Path) -> Any:
        """Backbone and head, with as many outputs as there are labels."""
        network = build_network(self._config, len(self._labels))
        _load_weights(network, models.weight_files(folder))
        return models.on_device(network.eval(), folder, self._device)

    def forward(self, ids: Any, mask: Any) -> Any:
        """The logits, [b, number of labels]."""
        return self._network(ids, mask)

    def classify(self, texts: Sequence[str]) -> list[str]:
        """The domain of each text."""
        return [self._labels[m] for m in self._logits(texts).argmax(axis=1)]

    def probabilities(self, texts: Sequence[str]) -> tuple[list[str], NDArray[np.float32]]:
        """The labels, and the probability of each for every text, float32 [n, number of labels]."""
        return self._labels, softmax(self._logits(texts), axis=1)

    def _logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if not len(texts):
            return np.empty((0, len(self._labels)), dtype=np.float32)
        logits = self.run([text[: self.characters] for text in texts])
        if bad := int((~np.isfinite(logits)).any(axis=1).sum()):
            raise InputError(
                f"{self.model}: logits of {bad} of {len(texts)} documents are not finite; its weights are damaged, or "
                f"too large for bfloat16 (device: cpu computes in float32)"
            )
        return logits

    def _backbone_config(self, folder: Path) -> Any:
        """The backbone's architecture: in the model's own config, in a folder beside it, known, or on the hub."""
        from transformers import AutoConfig

        config = models.read_config(folder)
        base = str(config.get("base_model") or "")
        place = folder
        if "hidden_size" not in config:
            if not base:
                raise InputError(f"{folder}/config.json: neither describes a backbone nor names one (base_model)")
            inside = folder / base
            if not inside.is_dir() and base in _BACKBONES:
                return AutoConfig.for_model(**_BACKBONES[base])
            place = inside if inside.is_dir() else models.model_folder(base, self.base_revision)
        return models.load_config(place)


def read_labels(folder: Path) -> list[str]:
    """The labels of a model by their id, from ``id2label``.

    Raises:
        InputError: none, ids that are not 0, 1, 2, …, a ``label2id`` that says otherwise, or the published labels in
            another order, which would give every document a wrong domain.
    """
    config, place = models.read_config(folder), f"{folder}/config.json"
    labels = config.get("id2label") or {}
    try:
        by_id = {int(key): str(value) for key, value in labels.items()}
    except ValueError as error:
        raise InputError(f"{place}: id2label has a key that is no number ({error})") from error
    if sorted(by_id) != list(range(len(by_id))) or not by_id or len(set(by_id.values())) != len(by_id):
        raise InputError(f"{place}: id2label must name labels 0, 1, 2, … once each, not {labels}")
    found = [by_id[i] for i in range(len(by_id))]
    for label, i in (config.get("label2id") or {}).items():
        if by_id.get(i) != label:
            raise InputError(f"{place}: label2id has {label!r} as {i}, id2label has {by_id.get(i)!r}; mend the config")
    if set(found) == set(DOMAINS) and tuple(found) != DOMAINS:
        first = next(i for i, label in enumerate(found) if label != DOMAINS[i])
        raise InputError(
            f"{place}: the labels of nvidia/domain-classifier in another order, first {found[first]!r} as {first} in "
            f"place of {DOMAINS[first]!r}; fetch the config again, or rename the labels if the head was trained so"
        )
    return found


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


def _load_weights(network: Any, files: Sequence[Path]) -> None:
    from safetensors.torch import load_file

    try:
        weights = {name: weight.float() for file in files for name, weight in load_file(file).items()}
        network.load_state_dict({k: v for k, v in weights.items() if not k.endswith("position_ids")})
    except Exception as error:  # safetensors, key and shape errors have no common class
        lines = " ".join(str(error).split())[:300]
        raise InputError(f"{files[0]}: does not fit the config ({lines}); fetch the model again") from error
