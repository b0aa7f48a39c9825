"""The output layer and its cross-entropy in one, so that the logits of all tokens never exist at once.

With a small model most time and memory goes here. Rows are taken in chunks whose logits stay in cache; loss and
gradients come out of the same pass. Only for training: evaluation uses plain float32 logits.
"""

from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}
_FEWEST_ROWS = 128  # fewer make the products of wide models slow (benchmarks/proxies.py --only chunks)


def output_loss(hidden: Tensor, weight: Tensor, targets: Tensor, low: torch.dtype | None = None) -> Tensor:
    """Mean cross-entropy of ``hidden`` [n, d] · ``weight`` [V, d]ᵀ against ``targets`` [n], in nats.

    ``low`` is the type of the matrix products and of the softmax, None that of ``weight``.
    """
    return _OutputLoss.apply(hidden, weight, targets, low or weight.dtype)  # type: ignore[return-value]


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        n, vocabulary = hidden.shape[0], weight.shape[0]
        chunk = max(_CHUNK_ELEMENTS.get(hidden.device.type, 1 << 20) // vocabulary, _FEWEST_ROWS)
        states, matrix = hidden.to(dtype), weight.to(dtype)
        state_gradient = torch.empty_like(states)
        weight_gradient: Tensor | None = None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        minus_one = torch.full((), -1.0, dtype=dtype, device=hidden.device)  # torch.tensor would wait for a GPU
        rows = torch.arange(min(chunk, n), device=hidden.device)
        for start in range(0, n, chunk):
            state, target = states[start : start + chunk], targets[start : start + chunk]
            probability = torch.softmax(state @ matrix.t(), dim=1)
            here = rows[: target.numel()]
            loss -= probability[here, target].float().clamp_min(1e-38).log().sum()
            probability.index_put_((here, target), minus_one, accumulate=True)  # scatter_add_ takes 2 ms here
            torch.mm(probability, matrix, out=state_gradient[start : start + chunk])
            if weight_gradient is None:
                weight_gradient = (probability.t() @ state).to(weight.dtype)
            elif dtype == weight.dtype:
                weight_gradient.addmm_(probability.t(), state)
            else:  # a sum of many chunks in bfloat16 would lose them
                weight_gradient += probability.t() @ state
        assert weight_gradient is not None  # noqa: S101 - n > 0
        ctx.save_for_backward(state_gradient, weight_gradient)
        ctx.n, ctx.types = n, (hidden.dtype, weight.dtype)
        return loss / n

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        state_gradient, weight_gradient = ctx.saved_tensors
        scale = outputs[0] / ctx.n
        return state_gradient.to(ctx.types[0]) * scale, weight_gradient.to(ctx.types[1]) * scale, None, None
