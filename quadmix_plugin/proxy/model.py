"""The one language model of the project: a decoder in the Llama layout, in plain PyTorch.

SwiGLU, RoPE, RMSNorm and scaled dot-product attention. Parameter names are those of ``LlamaForCausalLM`` in
transformers, so what ``save_weights`` writes loads with ``AutoModelForCausalLM``, and what that saves with
``load_weights``. Nothing here trains.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quadmix_plugin.errors import InputError
from quadmix_plugin.models import load_config, weight_files


@dataclass(frozen=True)
class Shape:
    """The size of a model; ``kv_heads`` 0 means as many as ``heads``, ``vocabulary`` 0 that the data sets it."""

    layers: int
    width: int
    heads: int
    ffn: int
    context: int
    vocabulary: int = 0
    kv_heads: int = 0
    tied: bool = False
    """Whether input and output embedding are one matrix."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "ffn", "context"):
            if getattr(self, name) < 1:
                raise InputError(f"shape.{name} = {getattr(self, name)}; give a positive number")
        if self.vocabulary < 0 or self.kv_heads < 0:
            raise InputError(f"shape: vocabulary {self.vocabulary}, kv_heads {self.kv_heads}; give numbers >= 0")
        if self.width % (2 * self.heads):
            raise InputError(f"shape: width {self.width} does not divide into {self.heads} heads of even size")
        if self.kv_heads and self.heads % self.kv_heads:
            raise InputError(f"shape: {self.heads} heads do not divide into groups of {self.kv_heads} kv_heads")

    @property
    def head_width(self) -> int:
        """Numbers per attention head."""
        return self.width // self.heads

    @property
    def n_kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    @property
    def parameters(self) -> int:
        """Number of weights, embeddings included."""
        attention = 2 * self.width * self.head_width * (self.heads + self.n_kv_heads)
        layer = attention + 3 * self.width * self.ffn + 2 * self.width
        return self.layers * layer + self.width + (1 if self.tied else 2) * self.vocabulary * self.width


SHAPES = {
    "proxy-tiny": Shape(layers=2, width=64, heads=2, ffn=176, context=128),
    "tiny": Shape(layers=4, width=128, heads=4, ffn=352, context=128),
    "proxy-1m": Shape(layers=2, width=256, heads=8, ffn=512, context=2048),
    "530m": Shape(layers=20, width=1280, heads=20, ffn=3520, context=2048),
}
"""``proxy-1m`` is the 1M model of RegMix; ``proxy-tiny`` and, for ``pretrain``, ``tiny`` are for two CPU cores."""


def named_shape(name: str, **overrides: Any) -> Shape:
    """A shape of ``SHAPES`` with some numbers replaced.

    Raises:
        InputError: an unknown name, or numbers that do not fit together.
    """
    if name not in SHAPES:
        raise InputError(f"shape {name!r}: unknown; choose one of {', '.join(SHAPES)}")
    known = {field.name for field in fields(Shape)}
    if unknown := sorted(set(overrides) - known):
        raise InputError(f"shape: unknown number {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return replace(SHAPES[name], **overrides)


class Decoder(nn.Module):
    """A causal language model; ``forward`` maps ids [b, t] to logits [b, t, V]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        if shape.vocabulary < 1:
            raise InputError("shape: no vocabulary; give the number of ids of the tokenizer")
        self.shape = shape
        self.model = _Trunk(shape)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, ids: Tensor) -> Tensor:
        """The state before the output embedding: ids [b, t] → [b, t, width]."""
        return self.model(ids)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [b, t, V] for ids [b, t]."""
        return self.lm_head(self.model(ids))

    def initialise(self, seed: int) -> "Decoder":
        """Draws all weights from ``seed``, on the CPU and in float32 whatever the device; returns itself.

        Matrices have standard deviation 1/√(fan-in), those that write into the residual stream less by √(2·layers);
        input embeddings .05·√width, so that the first updates of the layers do not drown them (measured at width 64).
        """
        generator = torch.Generator().manual_seed(seed)
        residual = (2 * self.shape.layers) ** -0.5
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.ndim == 1:
                    weight.fill_(1.0)
                    continue
                std = weight.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= residual
                elif name.endswith("lm_head.weight"):
                    std = 0.05
                elif name.endswith("embed_tokens.weight"):
                    std = 0.05 if self.shape.tied else 0.05 * self.shape.width**0.5
                weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))
        return self


class _Trunk(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        cos, sin = _rotations(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        if length > self.cos.shape[0]:
            raise InputError(f"{length} tokens in a row; the model has a context of {self.cos.shape[0]}")
        x = self.embed_tokens(ids)
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _SwiGLU(shape)
        self.input_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.grouped = shape.n_kv_heads != shape.heads
        inner, kv = shape.heads * shape.head_width, shape.n_kv_heads * shape.head_width
        self.q_proj = nn.Linear(shape.width, inner, bias=False)
        self.k_proj = nn.Linear(shape.width, kv, bias=False)
        self.v_proj = nn.Linear(shape.width, kv, bias=False)
        self.o_proj = nn.Linear(inner, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            projection(x).view(b, t, -1, self.head_width).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(
            _rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True, enable_gqa=self.grouped
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(b, t, -1))


class _SwiGLU(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


def _rotations(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE [context, head_width], the two halves of a head rotating together."""
    half = torch.arange(0, shape.head_width, 2, dtype=torch.float64) / shape.head_width
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float64), shape.rope_theta**-half)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().float(), angles.sin().float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def hugging_face_config(shape: Shape, eod_id: int | None = None) -> dict[str, Any]:
    """``config.json`` of the same model for transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "torch_dtype": "float32",
    }


def save_weights(model: Decoder, weights: Path, config: Path, eod_id: int | None = None) -> None:
    """Writes ``model.safetensors`` (float32) and ``config.json`` at the given paths, and reads the weights back.

    Raises:
        InputError: a weight that is not finite, or a file that does not read back equal.
    """
    from safetensors.torch import load_file, save_file

    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.shape.tied:
        del state["lm_head.weight"]
    if bad := [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]:
        raise InputError(f"model: {bad[0]} is not finite; lower the learning rate")
    save_file(state, weights, metadata={"format": "pt"})  # one key: more come in random order
    back = load_file(weights)
    if back.keys() != state.keys() or not all(torch.equal(back[name], state[name]) for name in state):
        raise InputError(f"{weights}: does not read back as written; check the disk")
    config.write_text(json.dumps(hugging_face_config(model.shape, eod_id), indent=1) + "\n", encoding="utf-8")


def load_weights(folder: Path) -> Decoder:
    """The model of a folder with ``config.json`` and safetensors of a ``LlamaForCausalLM``, in float32 on the CPU.

    Raises:
        InputError: another architecture or variant of it, a weight that is missing, unknown or of another size, or
            as ``models.load_config`` and ``models.weight_files``.
    """
    from safetensors.torch import load_file

    model = Decoder(_shape_of(load_config(folder), folder))
    state: dict[str, Tensor] = {}
    for path in weight_files(folder):
        state.update(load_file(path))
    wanted = model.state_dict()
    if model.shape.tied:
        del wanted["lm_head.weight"]
    if other := wanted.keys() ^ state.keys():
        what = "has no" if min(other) in wanted else "has an unknown"
        raise InputError(f"{folder}: {what} weight {min(other)}; give a model that LlamaForCausalLM has saved")
    for name, weight in state.items():
        if weight.shape != wanted[name].shape or not weight.is_floating_point():
            raise InputError(
                f"{folder}: {name} is {list(weight.shape)} of {weight.dtype}, where config.json means "
                f"{list(wanted[name].shape)} of a floating type; fetch or save the model again"
            )
    if model.shape.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def _shape_of(config: Any, folder: Path) -> Shape:
    """The shape of a model that transformers' ``config`` describes, where it is one that ``Decoder`` computes."""
    if config.model_type != "llama" or (config.architectures or []) != ["LlamaForCausalLM"]:
        raise InputError(
            f"{folder}/config.json: a {config.model_type} with architectures {config.architectures}; give a model "
            f"of LlamaForCausalLM"
        )
    rope = dict(config.rope_parameters)
    theta = float(rope.pop("rope_theta"))
    found = {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_act,
        "head_dim": config.head_dim,
        "rope_parameters": rope,
    }
    known = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "head_dim": config.hidden_size // config.num_attention_heads,
        "rope_parameters": {"rope_type": "default"},
    }
    if other := [name for name in known if found[name] != known[name]]:
        raise InputError(
            f"{folder}/config.json: {other[0]} is {found[other[0]]}, where only {known[other[0]]} is known; give "
            f"another model"
        )
    kv_heads = config.num_key_value_heads
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        ffn=config.intermediate_size,
        context=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        kv_heads=0 if kv_heads == config.num_attention_heads else kv_heads,
        tied=config.tie_word_embeddings,
        rope_theta=theta,
        norm_eps=config.rms_norm_eps,
    )
