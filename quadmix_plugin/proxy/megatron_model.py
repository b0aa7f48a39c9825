"""The decoder as a ``GPTModel`` of Megatron-Core, and the weights of each as those of the other.

The layers are TransformerEngine's, or megatron-core's own local ones around PyTorch's attention, so that neither
TransformerEngine nor apex is needed and no matrix of attention scores is kept; SwiGLU, RoPE, RMSNorm and no biases in
both. No model is split over GPUs. Nothing here trains.
"""

import atexit
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from quadmix_plugin.errors import InputError

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from quadmix_plugin.proxy.model import Shape

Layers = Literal["auto", "local", "transformer_engine"]

STORE = "QUADMIX_STORE"
"""Environment variable with the file by which the processes of one machine find each other."""

SOCKETS = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
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


def start_parallel_state(device: torch.device, processes: int = 1) -> None:
    """Puts this process into a group, if it is in none, with megatron-core's parallel state.

    Alone it is a group of one that uses loopback only; ``processes`` above 1 are those that torchrun started and
    described in the environment. They meet over the file that ``STORE`` names, or else as torchrun says.

    Raises:
        InputError: the process belongs to another group already.
    """
    with quiet_import():
        from megatron.core import parallel_state
    if device.index is not None:
        torch.cuda.set_device(device)
    group, backend = torch.distributed, _backend(device)
    if not group.is_initialized():
        if processes > 1 and (store := os.environ.get(STORE)):
            group.init_process_group(backend, f"file://{store}", rank=int(os.environ["RANK"]), world_size=processes)
        elif processes > 1:
            group.init_process_group(backend)
        else:
            for name in SOCKETS:
                os.environ.setdefault(name, "lo")
            store = group.HashStore()  # type: ignore[attr-defined]
            group.init_process_group(backend, store=store, rank=0, world_size=1)
        atexit.register(stop_parallel_state)
    if group.get_world_size() != processes or backend not in group.get_backend():
        raise InputError(
            f"megatron: this process is in a group of {group.get_world_size()} processes over {group.get_backend()}, "
            f"where {processes} over {backend} are needed; run it in a process of its own"
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


def has_transformer_engine() -> bool:
    """Whether TransformerEngine is installed."""
    return find_spec("transformer_engine") is not None


def gpt_model(
    shape: "Shape", device: torch.device, dtype: torch.dtype = torch.float32, layers: Layers = "local"
) -> "GPTModel":
    """A model whose weights are not set yet; the parallel state must have been started.

    Its ``forward(tokens, position_ids, None)`` gives logits [b, t, V]. ``layers``: ``auto`` takes TransformerEngine's
    on a GPU where they are installed.

    Raises:
        InputError: no vocabulary, or TransformerEngine is asked for and not there, or not on a GPU.
    """
    with quiet_import():
        from megatron.core.models.gpt.gpt_model import GPTModel
    if shape.vocabulary < 1:
        raise InputError("shape: no vocabulary; give the number of ids of the tokenizer")
    model = GPTModel(
        megatron_config(shape, dtype),
        _layers(shape, device, layers),
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.context,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,  # type: ignore[arg-type]
        share_embeddings_and_output_weights=shape.tied,
    )
    if device.type == "cpu":
        _rotate_on_the_cpu(model.rotary_pos_emb)
    return model.to(device)


def _layers(shape: "Shape", device: torch.device, kind: Layers) -> Any:
    if kind == "transformer_engine" and not (device.type == "cuda" and has_transformer_engine()):
        what = "needs a GPU" if device.type != "cuda" else "is not installed"
        raise InputError(f"layers: transformer_engine {what}; install it, or give layers: local")
    if kind == "transformer_engine" or (kind == "auto" and device.type == "cuda" and has_transformer_engine()):
        with quiet_import():
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
        return get_gpt_layer_with_transformer_engine_spec()
    return _local_layers(shape)


def _rotate_on_the_cpu(embedding: Any) -> None:
    """Gives RoPE its angles [t, 1, 1, head_width] on the CPU; megatron-core's own sends them to a GPU."""

    def angles(max_seq_len: int, offset: int = 0) -> Tensor:
        half = embedding.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cat((half, half), dim=-1)[:, None, None, :]

    embedding.get_emb = angles


def _local_layers(shape: "Shape") -> Any:
    """megatron-core's local layers, with the one exchange."""
    with quiet_import():
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.torch_norm import WrappedTorchNorm
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    layer: Any = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = _CausalAttention
    return TransformerBlockSubmodules([layer] * shape.layers, layer_norm=WrappedTorchNorm)  # type: ignore[arg-type]


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


def set_weights(model: "GPTModel", state: Mapping[str, Tensor]) -> None:
    """Loads weights under the names of the local layers, as ``to_megatron`` gives them, into layers of either kind."""
    own = {_local_name(name): name for name in model.state_dict() if not name.endswith("_extra_state")}
    if other := own.keys() ^ state.keys():
        raise InputError(f"weights: {min(other)} is in only one of the two; give those of a model of this shape")
    model.load_state_dict({own[name]: weight for name, weight in state.items()}, strict=False)


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
