"""What people write to train the same decoder: a plain loop, Megatron-Core, several models stacked, other losses.

Each gives a function of (batch, learning rate) that takes one update and returns the mean loss before it, as
``Learner.step`` does. All start from the weights of the same seed and decay the same weights.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from quadmix_plugin.proxy.model import Decoder, Shape, _rotate
from quadmix_plugin.proxy.output_loss import output_loss
from quadmix_plugin.proxy.training import Trainer

Step = Callable[[Tensor, float], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Mean loss of states [n, d], output weight [V, d] and targets [n]."""


def full_logits(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once, as a plain loop has them; on a GPU bfloat16 by autocast, and their loss float32."""
    with torch.autocast(states.device.type, torch.bfloat16, enabled=states.is_cuda):
        return functional.cross_entropy(functional.linear(states, weight), targets)


def liger_loss() -> Loss:
    """Liger's fused linear and cross-entropy.

    Raises:
        ImportError: liger-kernel is not installed.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda states, weight, targets: fused(weight.to(torch.bfloat16), states.to(torch.bfloat16), targets)


def cut_loss() -> Loss:
    """Apple's cut cross-entropy.

    Raises:
        ImportError: cut-cross-entropy is not installed.
    """
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return lambda states, weight, targets: linear_cross_entropy(
        states.to(torch.bfloat16), weight.to(torch.bfloat16), targets
    )


def decoder_step(
    model: Decoder,
    options: Trainer,
    loss: Loss = full_logits,
    hidden: Callable[[Tensor], Tensor] | None = None,
    pieces: int = 1 << 30,
    fused: bool | None = None,
) -> Step:
    """A loop in plain PyTorch, with ``hidden`` in the place of ``model.hidden``; on a GPU in bfloat16 by autocast.

    ``pieces`` per pass; ``fused`` None leaves AdamW as torch gives it.
    """
    states, device = hidden or model.hidden, model.lm_head.weight.device
    optimizer = _adamw(model.parameters(), options, fused=fused)

    def step(batch: Tensor, learning_rate: float) -> Tensor:
        total = torch.zeros((), device=device)
        for part in batch.split(pieces):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                found = states(part[:, :-1]).flatten(0, 1)
            here = loss(found, model.lm_head.weight, part[:, 1:].reshape(-1)) * (part.shape[0] / batch.shape[0])
            here.backward()
            total = total + here.detach()
        clip_grad_norm_(model.parameters(), options.grad_clip)
        _update(optimizer, learning_rate)
        return total

    return step


def graphed_step(
    model: Decoder, options: Trainer, loss: Loss, hidden: Callable[[Tensor], Tensor], pieces: int = 1 << 30
) -> Step:
    """A whole update, optimizer included, as one CUDA graph; the first call captures it for its size of batch.

    Capturing needs updates to warm up; weights and optimizer are put back afterwards. On a CPU there is no graph.
    """
    device = model.lm_head.weight.device
    is_gpu = device.type == "cuda"
    rate = torch.tensor(options.learning_rate, device=device)
    optimizer = _adamw(model.parameters(), options, lr=rate, capturable=is_gpu, fused=True)
    held: dict[str, Tensor] = {}
    graph = torch.cuda.CUDAGraph() if is_gpu else None

    def update() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for part in held["batch"].split(pieces):
            with torch.autocast(device.type, torch.bfloat16, enabled=is_gpu):
                found = hidden(part[:, :-1]).flatten(0, 1)
            share = part.shape[0] / held["batch"].shape[0]
            here = loss(found, model.lm_head.weight, part[:, 1:].reshape(-1)) * share
            here.backward()
            total += here.detach()
        clip_grad_norm_(model.parameters(), options.grad_clip)
        optimizer.step()
        return total

    def capture(graph: torch.cuda.CUDAGraph) -> None:
        before = [weight.detach().clone() for weight in model.parameters()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                update()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            held["loss"] = update()
        with torch.no_grad():
            for weight, value in zip(model.parameters(), before, strict=True):
                weight.copy_(value)
                for state in optimizer.state[weight].values():
                    state.zero_()

    def step(batch: Tensor, learning_rate: float) -> Tensor:
        rate.fill_(learning_rate)
        if graph is None:
            held["batch"] = batch
            return update()
        if not held:
            held["batch"] = batch.clone()
            capture(graph)
        held["batch"].copy_(batch)
        graph.replay()
        return held["loss"].clone()

    return step


def megatron_on_cpu(shape: Shape, seed: int, options: Trainer) -> Step:
    """``GPTModel`` of Megatron-Core's local layers with its own loss; its optimizer needs CUDA, so torch's AdamW.

    Raises:
        ImportError: megatron-core is not installed.
    """
    from quadmix_plugin.proxy import megatron_model

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]  # asked by its rotary embedding
    megatron_model.start_parallel_state(cpu)
    model = megatron_model.gpt_model(shape, cpu)
    model.load_state_dict(megatron_model.to_megatron(Decoder(shape).initialise(seed).state_dict(), shape))
    optimizer = _adamw(model.parameters(), options)

    def step(batch: Tensor, learning_rate: float) -> Tensor:
        tokens, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        loss = model(tokens, positions, None, labels=labels).mean()
        loss.backward()
        clip_grad_norm_(model.parameters(), options.grad_clip)
        _update(optimizer, learning_rate)
        return loss.detach()

    return step


class StackedDecoders(nn.Module):
    """K decoders of one shape, every weight [K, ...]: one batched product in the place of K; no grouped heads."""

    def __init__(self, shape: Shape, seeds: Iterable[int], device: torch.device) -> None:
        super().__init__()
        models = [Decoder(shape).initialise(seed) for seed in seeds]
        self.shape = shape
        self.cos, self.sin = models[0].model.cos.to(device), models[0].model.sin.to(device)
        states = [model.state_dict() for model in models]
        self.stacks = nn.ParameterDict(
            {name.replace(".", "/"): torch.stack([state[name] for state in states]).to(device) for name in states[0]}
        )

    def hidden(self, ids: Tensor) -> Tensor:
        """Ids [K, b, t] to states [K, b, t, width]."""
        cos, sin = self.cos[: ids.shape[2]], self.sin[: ids.shape[2]]
        n, width = ids.shape[0], self.shape.width
        own = torch.arange(n, device=ids.device).view(n, 1, 1) * self.shape.vocabulary
        x = functional.embedding(ids + own, self.stacks["model/embed_tokens/weight"].flatten(0, 1))
        for i in range(self.shape.layers):
            layer = f"model/layers/{i}"
            x = x + self._attention(f"{layer}/self_attn", self._norm(x, f"{layer}/input_layernorm"), cos, sin)
            y = self._norm(x, f"{layer}/post_attention_layernorm")
            gate, up = self._linear(y, f"{layer}/mlp/gate_proj"), self._linear(y, f"{layer}/mlp/up_proj")
            x = x + self._linear(functional.silu(gate) * up, f"{layer}/mlp/down_proj")
        return self._norm(x, "model/norm").view(*ids.shape, width)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        flat = torch.bmm(x.flatten(1, 2), self.stacks[f"{name}/weight"].transpose(1, 2))
        return flat.view(*x.shape[:3], -1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return (
            functional.rms_norm(x, x.shape[-1:], eps=self.shape.norm_eps) * self.stacks[f"{name}/weight"][:, None, None]
        )

    def _attention(self, name: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (*x.shape[:3], self.shape.heads, self.shape.head_width)
        q, k, v = (self._linear(x, f"{name}/{part}_proj").view(heads).flatten(0, 1).transpose(1, 2) for part in "qkv")
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        mixed = functional.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        return self._linear(mixed.transpose(1, 2).reshape(*x.shape[:3], -1), f"{name}/o_proj")


def stacked_step(
    models: StackedDecoders,
    options: Trainer,
    hidden: Callable[[Tensor], Tensor] | None = None,
    low: torch.dtype | None = None,
) -> Step:
    """An update of all K models on batches [K, b, context + 1]: losses [K]; gradients are clipped for each alone."""
    weights = list(models.stacks.values())
    device, head = weights[0].device, models.stacks["lm_head/weight"]
    optimizer = _adamw(weights, options, vector=2, fused=True)
    states = hidden or models.hidden

    def step(batches: Tensor, learning_rate: float) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = states(batches[:, :, :-1]).flatten(1, 2)
        losses = [
            output_loss(own, weight, batch[:, 1:].reshape(-1), low)
            for own, weight, batch in zip(found.unbind(), head.unbind(), batches, strict=True)
        ]
        torch.stack(losses).sum().backward()
        _clip_each(weights, options.grad_clip)
        _update(optimizer, learning_rate)
        return torch.stack(losses).detach()

    return step


def _clip_each(weights: list[nn.Parameter], largest: float) -> None:
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
    factor = (largest / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))


def _adamw(weights: Iterable[nn.Parameter], options: Trainer, vector: int = 1, **adamw: Any) -> torch.optim.AdamW:
    """Over matrices, which decay, and vectors, which have ``vector`` dimensions; ``adamw``: beside its defaults."""
    given = list(weights)
    groups = [
        {"params": [weight for weight in given if weight.ndim > vector], "weight_decay": options.weight_decay},
        {"params": [weight for weight in given if weight.ndim == vector], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **{"lr": options.learning_rate, "betas": options.betas, **adamw})


def _update(optimizer: torch.optim.AdamW, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
