"""Checkpoints of Megatron-Core as folders of Hugging Face's Llama format, and the reverse.

Whoever trains by Megatron-LM's own script converts what that saved (``--ckpt-format torch_dist``). Weights are not
changed, only named and ordered otherwise; both run on a CPU.
"""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from quadmix_plugin.atomic import storage_errors
from quadmix_plugin.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from quadmix_plugin.proxy.model import Shape

_OWN = "quadmix.json"
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_QKV, _FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"


def convert(source: Path, out: Path, tokenizer: Path | None, eod: str | None, **shape: Any) -> str:
    """Writes ``out``, a new folder, in the other format than ``source`` has; returns what it made.

    Args:
        source: a checkpoint's folder (with ``.metadata``), or one of Hugging Face's format (with ``config.json``).
        out: a folder that is not there yet; nothing of it is seen until it is whole.
        tokenizer: folder of the tokenizer, for the folder of Hugging Face's format.
        eod: the token that ends a document.
        shape: numbers of ``Shape`` that a checkpoint of another program does not say: ``heads`` and ``context``, and
            ``rope_theta`` and ``norm_eps`` where they are not the usual ones.

    Raises:
        InputError: ``source`` is neither, ``out`` is there, or the numbers do not fit the weights.
        StorageError: ``out`` cannot be written.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; give a new folder")
    if (source / "config.json").is_file():
        _whole_or_not_at_all(out, lambda folder: _to_checkpoint(source, folder))
        return "a checkpoint of Megatron-Core"
    if not (source / ".metadata").is_file():
        raise InputError(f"{source}: neither a model (config.json) nor a checkpoint (.metadata); give one of the two")
    if tokenizer is None or eod is None:
        raise InputError(f"{out}: a model goes with its tokenizer; give --tokenizer, its folder, and --eod, its token")
    _whole_or_not_at_all(out, lambda folder: _to_hugging_face(source, folder, tokenizer, eod, shape))
    return "a model of Hugging Face's Llama format"


def _to_hugging_face(source: Path, folder: Path, tokenizer: Path, eod: str, given: dict[str, Any]) -> None:
    from quadmix_plugin.hugging_face import FILES, save_model
    from quadmix_plugin.models import load_tokenizer
    from quadmix_plugin.proxy.checkpoint_files import read_weights
    from quadmix_plugin.proxy.megatron_model import from_megatron
    from quadmix_plugin.proxy.model import Decoder
    from quadmix_plugin.stages.export_tokens import end_of_document

    weights = read_weights(source)
    shape = _shape(source, weights, given)
    end = end_of_document(load_tokenizer(str(tokenizer)), eod, str(tokenizer))
    model = Decoder(shape)
    model.load_state_dict(from_megatron({name: each.float() for name, each in weights.items()}, shape))
    save_model({name: folder / name for name in FILES}, model, end, tokenizer)


def _to_checkpoint(source: Path, folder: Path) -> None:
    import torch

    from quadmix_plugin.proxy.megatron_checkpoint import save_state
    from quadmix_plugin.proxy.megatron_model import (
        gpt_model,
        set_weights,
        start_parallel_state,
        stop_parallel_state,
        to_megatron,
    )
    from quadmix_plugin.proxy.model import load_weights

    decoder, cpu = load_weights(source), torch.device("cpu")
    start_parallel_state(cpu)
    try:
        model = gpt_model(decoder.shape, cpu)
        set_weights(model, to_megatron(decoder.state_dict(), decoder.shape))
        save_state(model.sharded_state_dict(), folder, cpu)
    finally:
        stop_parallel_state()


def _shape(source: Path, weights: "dict[str, Tensor]", given: dict[str, Any]) -> "Shape":
    """Of a checkpoint of our own, or from the sizes of the weights and what is given.

    Raises:
        InputError: heads or context are not known, or do not fit the weights.
    """
    from quadmix_plugin.proxy.model import Shape

    known = {name: value for name, value in given.items() if value is not None}
    if (source / _OWN).is_file():
        identity = json.loads((source / _OWN).read_text(encoding="utf-8"))["identity"]
        return Shape(**{each.name: identity[each.name] for each in fields(Shape)} | known)
    if lacking := [name for name in ("heads", "context") if name not in known]:
        raise InputError(f"{source}: does not say its {' and '.join(lacking)}; give --{' and --'.join(lacking)}")
    if missing := [name for name in (_EMBEDDING, f"decoder.layers.0.{_QKV}") if name not in weights]:
        raise InputError(f"{source}: no {missing[0]}; give a checkpoint of a GPTModel")
    vocabulary, width = weights[_EMBEDDING].shape
    groups, left = divmod(
        weights[f"decoder.layers.0.{_QKV}"].shape[0] * known["heads"] - width * known["heads"], 2 * width
    )
    if left or groups < 1 or width % known["heads"]:
        raise InputError(f"{source}: the weights of attention are not of {known['heads']} heads; give another --heads")
    return Shape(
        layers=sum(name.endswith(_QKV) for name in weights),
        width=width,
        ffn=weights[f"decoder.layers.0.{_FC1}"].shape[0] // 2,
        vocabulary=vocabulary,
        kv_heads=0 if groups == known["heads"] else groups,
        tied=_OUTPUT not in weights,
        **known,
    )


def _whole_or_not_at_all(out: Path, write: "Callable[[Path], None]") -> None:
    with storage_errors(out):
        temporary = out.absolute().with_name(f".{out.name}.{uuid4().hex}.tmp")
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
