"""``TorchTrainer``: the built-in trainer, one decoder in plain PyTorch with AdamW.

The output layer and its loss are one chunked operation (``output_loss``), and a batch larger than memory allows is
taken in several passes, so that neither the logits nor the states of a whole batch exist at once.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from quadmix_plugin.proxy.training import Learner, Trainer

if TYPE_CHECKING:
    import torch

    from quadmix_plugin.proxy.model import Decoder, Shape

_CPU_BYTES = 1 << 30  # of the states of one pass


@dataclass
class TorchTrainer(Trainer):
    """The built-in trainer; its fields, those of ``Trainer`` among them, are the ``options`` of a recipe.

    Args:
        dtype: of the matrix products: ``auto`` is bfloat16 on a GPU, and on a CPU with AMX in the output layer, which
            is where most of a small model's time goes; weights, attention and evaluation stay float32.
        compile: whether torch.compile fuses the layers; ``auto``: on a GPU, where a run of minutes repays the
            compilation.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"

    def learner(self, shape: "Shape", seed: int, device: "torch.device") -> Learner:
        """A decoder with the initial weights of ``seed``, and AdamW."""
        return _TorchLearner(self, shape, seed, device)


class _TorchLearner(Learner):
    def __init__(self, options: TorchTrainer, shape: "Shape", seed: int, device: "torch.device"):
        import torch

        from quadmix_plugin.proxy.model import Decoder

        self._model = Decoder(shape).initialise(seed).to(device)
        self._optimizer = _adamw(self._model, options)
        self._clip, self._device = options.grad_clip, device
        self._low = _low_precision(options.dtype, device)
        self._pieces = max(_tokens_per_pass(shape, device) // shape.context, 1)
        compiled = options.compile == "on" or (options.compile == "auto" and device.type == "cuda")
        self._hidden = torch.compile(self._model.hidden, dynamic=False) if compiled else self._model.hidden

    def step(self, batch: "torch.Tensor", learning_rate: float) -> "torch.Tensor":
        import torch

        loss = torch.zeros((), device=self._device)
        passes = -(-batch.shape[0] // self._pieces)
        for part in batch.split(-(-batch.shape[0] // passes)):  # of one size: each size is compiled apart
            share = part.shape[0] / batch.shape[0]
            here = self._loss(part) * share if share < 1 else self._loss(part)
            here.backward()
            loss = loss + here.detach()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def decoder(self) -> "Decoder":
        return self._model

    def _loss(self, batch: "torch.Tensor") -> "torch.Tensor":
        import torch

        from quadmix_plugin.proxy.output_loss import output_loss

        with torch.autocast(
            self._device.type, self._low, enabled=self._low is not None and self._device.type == "cuda"
        ):
            hidden = self._hidden(batch[:, :-1]).flatten(0, 1)
        return output_loss(hidden, self._model.lm_head.weight, batch[:, 1:].reshape(-1), self._low)


def _adamw(model: "Decoder", options: TorchTrainer) -> "torch.optim.AdamW":
    import torch

    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, fused=True)


def _tokens_per_pass(shape: "Shape", device: "torch.device") -> int:
    """How many tokens' states fit: per layer about twelve of the width and four of the ffn wait for the gradient."""
    import torch

    per_token = 4 * shape.layers * (12 * shape.width + 4 * shape.ffn)
    if device.type != "cuda":
        return _CPU_BYTES // per_token
    mine = torch.cuda.get_per_process_memory_fraction(device)  # less than all where proxies share the GPU
    return int(torch.cuda.get_device_properties(device).total_memory * mine / 4) // per_token


def _low_precision(dtype: str, device: "torch.device") -> "torch.dtype | None":
    import torch

    if dtype == "float32":
        return None
    if dtype == "auto" and device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return None
    return torch.bfloat16
