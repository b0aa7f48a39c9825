"""A trained model as a folder that transformers loads: weights, configuration, generation settings and tokenizer.

Weights are safetensors in float32. Conversion to and from Megatron-Core is in ``proxy.megatron_model``.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.proxy.model import save_weights
from quadmix_plugin.store import Step

if TYPE_CHECKING:
    from quadmix_plugin.proxy.model import Decoder

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_GENERATION, _TOKENIZER, _TOKENIZER_CONFIG = "generation_config.json", "tokenizer.json", "tokenizer_config.json"
_TOKENIZER_FILES = (_TOKENIZER, _TOKENIZER_CONFIG)
FILES = (WEIGHTS, CONFIG, _GENERATION, *_TOKENIZER_FILES)


def write_model(step: Step, folder: str, model: "Decoder", eod: int, tokenizer: str | Path) -> None:
    """Enters the files of a model in ``folder``, a name in the run directory; all of them or none.

    ``eod`` ends a text; ``tokenizer`` is the folder of the tokenizer, which goes with the model.

    Raises:
        InputError: weights that are not finite.
        StorageError: they cannot be written.
    """
    with step.writing(*(f"{folder}/{name}" for name in FILES)) as paths:
        save_model(dict(zip(FILES, paths, strict=True)), model, eod, Path(tokenizer))


def save_model(paths: dict[str, Path], model: "Decoder", eod: int, tokenizer: Path) -> None:
    """Writes the files of a model at these paths, by their names in ``FILES``; raises as ``write_model``."""
    save_weights(model, paths[WEIGHTS], paths[CONFIG], eod)
    _write_json(paths[_GENERATION], {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod, "do_sample": False})
    save_tokenizer(paths, tokenizer, eod, model.shape.context)


def write_tokenizer(step: Step, folder: str, tokenizer: str | Path, eod: int, context: int) -> None:
    """Enters a tokenizer alone in ``folder``, a name in the run directory, as it goes with a model."""
    with step.writing(*(f"{folder}/{name}" for name in _TOKENIZER_FILES)) as paths:
        save_tokenizer(dict(zip(_TOKENIZER_FILES, paths, strict=True)), Path(tokenizer), eod, context)


def save_tokenizer(paths: dict[str, Path], tokenizer: Path, eod: int, context: int) -> None:
    """Writes a fast tokenizer, whatever the class of that in the folder was, which adds no tokens of its own."""
    loaded = load_tokenizer(str(tokenizer))
    loaded.save(str(paths[_TOKENIZER]))
    end = loaded.id_to_token(eod)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(paths[_TOKENIZER_CONFIG], content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
