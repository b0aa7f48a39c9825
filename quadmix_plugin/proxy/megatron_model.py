"""The decoder as a ``GPTModel`` of Megatron-Core, and the weights of each as those of the other.

The layers are megatron-core's own local ones (SwiGLU, RoPE, RMSNorm, no biases) around PyTorch's attention, so that
neither TransformerEngine nor apex is needed and no matrix of attention scores is kept. A group of one process is
enough: nothing here is split over GPUs. Nothing here trains.
"""

import atexit
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from quadmix_plugin.errors import InputError
from quadmix_plugin.models import first_line

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from quadmix_plugin.proxy.model import Shape

_SOCKETS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_SAME = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc2": "mlp.down_proj",
}
_OF_TRANSFORMER_ENGINE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@contextmanager
def quiet_import() -> Iterator[None]:
    """Without megatron-core's warnings, on import, of GPU libraries that are not needed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def start_parallel_state(device: torch.device) -> None:
    """Makes this process a group of one, if it is not, with megatron-core's parallel state; only loopback is used.

    Raises:
        InputError: the process belongs to another group already.
    """
    with quiet_import():
        from megatron.core import parallel_state
    if device.index is not None:
        torch.cuda.set_device(device)
    group, backend = torch.distributed, _backend(device)
    if not group.is_initialized():
        for name in _SOCKETS:
            os.environ.setdefault(name, "lo")
        store = group.HashStore()  # type: ignore[attr-defined]
        group.init_process_group(backend, store=store, rank=0, world_size=1)
        atexit.register(stop_parallel_state)
    if group.get_world_size() != 1 or backend not in group.get_backend():
        raise InputError(
            f"megatron: this process is in a group of {group.get_world_size()} processes over {group.get_backend()}, "
            f"where one over {backend} is needed; run it in a process of its own"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def stop_parallel_state() -> None:
    """Undoes ``start_parallel_state``; nothing happens where there is no group."""
    if not torch.distributed.is_initialized():
        return
    with quiet_import():
        from megatron.core import parallel_state
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def megatron_config(shape: "Shape", dtype: torch.dtype = torch.float32) -> "TransformerConfig":
    """The layers of ``shape`` with weights of ``dtype``; they are filled in later, not drawn at random."""
    with quiet_import():
        from megatron.core.transformer.transformer_config import TransformerConfig
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_query_groups=shape.n_kv_heads,
        kv_channels=shape.head_width,
        ffn_hidden_size=shape.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        cuda_graph_scope=[],  # the default warns that it is deprecated
    )


def gpt_model(shape: "Shape", device: torch.device, dtype: torch.dtype = torch.float32) -> "GPTModel":
    """A model whose weights are not set yet; the parallel state must have been started.

    Its ``forward(tokens, position_ids, None)`` gives logits [b, t, V]. It asks CUDA for the current device, so it
    runs only where there is one.
    """
    with quiet_import():
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    if shape.vocabulary < 1:
        raise InputError("shape: no vocabulary; give the number of ids of the tokenizer")
    layers: Any = TransformerBlockSubmodules([_layer()] * shape.layers, layer_norm=WrappedTorchNorm)  # type: ignore[arg-type]
    model = GPTModel(
        megatron_config(shape, dtype),
        layers,
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.context,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,  # type: ignore[arg-type]
        share_embeddings_and_output_weights=shape.tied,
    )
    return model.to(device)


def _layer() -> Any:
    """megatron-core's local layer, with the one exchange."""
    with quiet_import():
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    layer: Any = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = _CausalAttention
    return layer


class _CausalAttention(torch.nn.Module):
    """PyTorch's attention in the place of megatron-core's own, which keeps all scores [b, heads, t, t]."""

    def __init__(self, config: "TransformerConfig", **options: Any) -> None:
        super().__init__()
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any) -> Tensor:
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))  # from [t, b, heads, width]
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def to_megatron(state: Mapping[str, Tensor], shape: "Shape") -> dict[str, Tensor]:
    """The weights of ``Decoder`` or ``LlamaForCausalLM`` under the names and in the order of ``GPTModel``.

    Raises:
        InputError: a weight is missing, unknown or of another shape.
    """
    rest = dict(state)
    out = {"embedding.word_embeddings.weight": _take(rest, "model.embed_tokens.weight", shape.vocabulary, shape.width)}
    inner, kv = shape.heads * shape.head_width, shape.n_kv_heads * shape.head_width
    for i in range(shape.layers):
        ours, theirs = f"model.layers.{i}.", f"decoder.layers.{i}."
        for name, own in _SAME.items():
            out[f"{theirs}{name}.weight"] = _take(rest, f"{ours}{own}.weight", *_size(name, shape))
        parts = [
            _take(rest, f"{ours}self_attn.{name}_proj.weight", rows, shape.width).view(
                shape.n_kv_heads, -1, shape.head_width, shape.width
            )
            for name, rows in (("q", inner), ("k", kv), ("v", kv))
        ]
        out[f"{theirs}self_attention.linear_qkv.weight"] = torch.cat(parts, dim=1).flatten(0, 2)
        halves = [_take(rest, f"{ours}mlp.{name}_proj.weight", shape.ffn, shape.width) for name in ("gate", "up")]
        out[f"{theirs}mlp.linear_fc1.weight"] = torch.cat(halves)
    out["decoder.final_layernorm.weight"] = _take(rest, "model.norm.weight", shape.width)
    if shape.tied:
        rest.pop("lm_head.weight", None)
    else:
        out["output_layer.weight"] = _take(rest, "lm_head.weight", shape.vocabulary, shape.width)
    _refuse_rest(rest)
    return out


def from_megatron(state: Mapping[str, Any], shape: "Shape") -> dict[str, Tensor]:
    """The weights of ``GPTModel`` under the names of ``Decoder`` and ``LlamaForCausalLM``.

    The norms may have their names of the local layers or of TransformerEngine's; its extra states are left out.

    Raises:
        InputError: a weight is missing, unknown or of another shape.
    """
    rest = {_local_name(name): weight for name, weight in state.items() if not name.endswith("_extra_state")}
    out = {"model.embed_tokens.weight": _take(rest, "embedding.word_embeddings.weight", shape.vocabulary, shape.width)}
    per_group = shape.heads // shape.n_kv_heads
    for i in range(shape.layers):
        ours, theirs = f"model.layers.{i}.", f"decoder.layers.{i}."
        for name, own in _SAME.items():
            out[f"{ours}{own}.weight"] = _take(rest, f"{theirs}{name}.weight", *_size(name, shape))
        rows = (shape.heads + 2 * shape.n_kv_heads) * shape.head_width
        mixed = _take(rest, f"{theirs}self_attention.linear_qkv.weight", rows, shape.width)
        groups = mixed.view(shape.n_kv_heads, per_group + 2, shape.head_width, shape.width)
        for name, part in zip("qkv", groups.split([per_group, 1, 1], dim=1), strict=True):
            out[f"{ours}self_attn.{name}_proj.weight"] = part.flatten(0, 2)
        both = _take(rest, f"{theirs}mlp.linear_fc1.weight", 2 * shape.ffn, shape.width)
        out[f"{ours}mlp.gate_proj.weight"], out[f"{ours}mlp.up_proj.weight"] = both.chunk(2)
    out["model.norm.weight"] = _take(rest, "decoder.final_layernorm.weight", shape.width)
    if shape.tied:
        rest.pop("output_layer.weight", None)
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    else:
        out["lm_head.weight"] = _take(rest, "output_layer.weight", shape.vocabulary, shape.width)
    _refuse_rest(rest)
    return out


def _size(name: str, shape: "Shape") -> tuple[int, ...]:
    """Of the weights that are the same in both."""
    inner = {"self_attention.linear_proj": shape.heads * shape.head_width, "mlp.linear_fc2": shape.ffn}
    return (shape.width, inner[name]) if name in inner else (shape.width,)


def _local_name(name: str) -> str:
    for theirs, local in _OF_TRANSFORMER_ENGINE.items():
        if name.endswith(theirs):
            return name.removesuffix(theirs) + local
    return name


def _take(rest: dict[str, Any], name: str, *size: int) -> Tensor:
    if name not in rest:
        raise InputError(f"weights: {name} is missing; give those of a model of this shape")
    weight = rest.pop(name)
    if tuple(weight.shape) != size:
        raise InputError(f"weights: {name} is {list(weight.shape)}, not {list(size)}; give those of this shape")
    return weight


def _refuse_rest(rest: dict[str, Any]) -> None:
    if rest:
        raise InputError(f"weights: {min(rest)} has no place in the model; give those of a model of this shape")


def save_checkpoint(model: "GPTModel", folder: Path, optimizer: Any = None) -> None:
    """Writes weights, and the state of megatron-core's optimizer if given, as its distributed checkpoint.

    megatron-core writes in processes of its own: a script needs a ``__main__`` guard, and a daemon cannot do it. It
    also asks CUDA for the current device.

    Raises:
        InputError: the folder holds files.
    """
    with quiet_import():
        from megatron.core import dist_checkpointing
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; give a new folder for the checkpoint")
    state: dict[str, Any] = model.sharded_state_dict()
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(model.sharded_state_dict())
    dist_checkpointing.save(state, str(folder))


def load_checkpoint(model: "GPTModel", folder: Path) -> None:
    """Reads the weights of a distributed checkpoint, of these layers or of TransformerEngine's, into ``model``.

    The state of an optimizer is left out. Metadata are pickled: read only checkpoints that you trust.

    Raises:
        InputError: no checkpoint, or one of another model.
    """
    with quiet_import():
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.core import CheckpointingException
    wanted = {name: part for name, part in model.sharded_state_dict().items() if not name.endswith("_extra_state")}
    try:
        found = dist_checkpointing.load_tensors_metadata(str(folder))
        _check_sizes(wanted, found)
        state: Any = dist_checkpointing.load(dict(wanted), str(folder))
        model.load_state_dict({name: state[name] for name in wanted})
    except (CheckpointingException, CheckpointException, OSError, RuntimeError) as error:
        raise InputError(
            f"{folder}: no checkpoint of this model ({first_line(error)}); give the folder of one"
        ) from error


def _check_sizes(wanted: dict[str, Any], found: Mapping[str, Any]) -> None:
    """megatron-core itself would fill up or cut a vocabulary of another size."""
    keys = {part.key for part in wanted.values()}
    if other := {key for key in keys ^ found.keys() if not key.startswith("optimizer.")}:
        raise RuntimeError(f"{min(other)} is in only one of the two")
    for part in wanted.values():
        size, there = getattr(part, "global_shape", None), found[part.key].global_shape
        if size is not None and size != there:
            raise RuntimeError(f"{part.key} is {list(there)}, not {list(size)}")
