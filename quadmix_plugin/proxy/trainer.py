"""``TorchTrainer``: trains one decoder on given pieces and measures its loss on validation sets.

One plain loop with torch's AdamW. It knows nothing of θ, documents or run directories: pieces come from ``pool``,
validation sets from ``validation``. On the CPU it uses one thread, so that a result has the same bits whatever the
executor and the number of workers; several models train in several processes.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.megatron import check_tokens
from quadmix_plugin.models import choose_device
from quadmix_plugin.proxy.validation import ValidationSet, evaluate

if TYPE_CHECKING:
    import torch

    from quadmix_plugin.proxy.model import Decoder, Shape

logger = logging.getLogger(__name__)

_ENOUGH_STEPS = 150  # after so many updates a model that learns is below the unigram entropy


@dataclass(frozen=True)
class CurvePoint:
    """Mean training loss (nats per token) since the point before, at ``step`` updates."""

    step: int
    tokens_seen: int
    train_loss: float


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A trained model and what was measured; losses in nats per token, ``seconds`` of training and evaluation."""

    losses: dict[str, float]
    curve: tuple[CurvePoint, ...]
    tokens_seen: int
    seconds: float
    unigram_entropy: float
    model: "Decoder"


@dataclass
class TorchTrainer:
    """The built-in trainer; its fields are the ``options`` of a recipe.

    Args:
        shape: a name of ``SHAPES``.
        shape_options: numbers of the shape to replace, such as ``context``.
        learning_rate: the highest, after ``warmup``.
        batch_size: pieces per update.
        warmup: share of the updates in which the learning rate rises.
        schedule: how it falls afterwards, to ``final_learning_rate`` times the highest.
        final_learning_rate: share of ``learning_rate`` at the end; unused by ``constant``.
        weight_decay: of AdamW, on matrices only.
        betas: of AdamW.
        grad_clip: largest norm of the gradient.
        dtype: of the matrix products: ``auto`` is bfloat16 on a GPU, and on a CPU with AMX in the output layer, which
            is where most of a small model's time goes; weights, attention and evaluation stay float32.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    shape: str = "proxy-tiny"
    shape_options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 4e-3
    batch_size: int = 4
    warmup: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_learning_rate: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not self.learning_rate > 0 or not 0 <= self.warmup <= 1:
            raise InputError(
                f"trainer: batch_size {self.batch_size}, learning_rate {self.learning_rate}, warmup {self.warmup}; "
                f"give a batch of at least 1, a positive learning rate and a warmup between 0 and 1"
            )

    @property
    def context(self) -> int:
        """Tokens of a piece, less its last target."""
        return self.model_shape(0).context

    def model_shape(self, vocabulary: int) -> "Shape":
        """The shape with the vocabulary of the data."""
        from quadmix_plugin.proxy.model import named_shape

        return named_shape(self.shape, **{**self.shape_options, "vocabulary": vocabulary})

    def train(
        self,
        pieces: NDArray[Any],
        validation_sets: Sequence[ValidationSet],
        seed: int,
        vocabulary: int,
        eval_points: int = 20,
    ) -> TrainResult:
        """Trains once over ``pieces`` [k, context + 1] in their order; ``seed`` draws the initial weights.

        Raises:
            InputError: fewer pieces than a batch, ids outside the vocabulary, constant data, or no validation sets.
            QuadmixError: the loss is not finite.
        """
        import torch

        if not validation_sets:
            raise InputError("validation: no sets; a model without validation loss says nothing")
        if len(pieces) < self.batch_size:
            raise InputError(f"{len(pieces)} pieces; a batch has {self.batch_size}, so give more training tokens")
        check = check_tokens(pieces, vocabulary, "training data")
        started = time.perf_counter()
        with _one_thread():
            model, curve = self._fit(torch.device(choose_device(self.device)), pieces, seed, vocabulary, eval_points)
            losses = {each.task: evaluate(model, each) for each in validation_sets}
        _check_losses(losses, curve, check.entropy)
        tokens_seen = len(pieces) * (pieces.shape[1] - 1)
        return TrainResult(losses, curve, tokens_seen, time.perf_counter() - started, check.entropy, model)

    def _fit(
        self, device: "torch.device", pieces: NDArray[Any], seed: int, vocabulary: int, points: int
    ) -> tuple["Decoder", tuple[CurvePoint, ...]]:
        import torch

        from quadmix_plugin.proxy.model import Decoder
        from quadmix_plugin.proxy.output_loss import output_loss

        model = Decoder(self.model_shape(vocabulary)).initialise(seed).to(device)
        optimizer = self._optimizer(model)
        low = self._low_precision(device)
        steps = -(-len(pieces) // self.batch_size)
        marks = {round(steps * (i + 1) / points) for i in range(max(points, 1))}
        data = torch.from_numpy(np.ascontiguousarray(pieces.astype(np.int32)))
        data = data.to(device) if device.type == "cuda" else data
        curve: list[CurvePoint] = []
        total, count, seen = torch.zeros((), device=device), 0, 0
        for step in range(steps):
            batch = data[step * self.batch_size : (step + 1) * self.batch_size].long()
            inputs, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
            with torch.autocast(device.type, low, enabled=low is not None and device.type == "cuda"):
                hidden = model.hidden(inputs).flatten(0, 1)
            loss = output_loss(hidden, model.lm_head.weight, targets, low)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = self._learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total, count, seen = total + loss.detach(), count + 1, seen + targets.numel()
            if step + 1 in marks or step + 1 == steps:
                curve.append(CurvePoint(step + 1, seen, float(total) / count))
                if not math.isfinite(curve[-1].train_loss):
                    break
                total, count = torch.zeros_like(total), 0
        return model, tuple(curve)

    def _optimizer(self, model: "Decoder") -> "torch.optim.AdamW":
        import torch

        matrices = [weight for weight in model.parameters() if weight.ndim > 1]
        vectors = [weight for weight in model.parameters() if weight.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, fused=True)

    def _learning_rate(self, step: int, steps: int) -> float:
        rising = max(round(self.warmup * steps), 1)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step + 1 - rising) / max(steps - rising, 1)
        left = 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (self.final_learning_rate + (1 - self.final_learning_rate) * left)

    def _low_precision(self, device: "torch.device") -> "torch.dtype | None":
        import torch

        if self.dtype == "float32":
            return None
        if self.dtype == "auto" and device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
            return None
        return torch.bfloat16


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One intra-op thread inside, as many as before outside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_losses(losses: dict[str, float], curve: Sequence[CurvePoint], entropy: float) -> None:
    last = curve[-1]
    if not all(map(math.isfinite, [last.train_loss, *losses.values()])):
        raise QuadmixError(
            f"training diverged at step {last.step}: loss {last.train_loss:.4g}; lower learning_rate or grad_clip"
        )
    if last.step >= _ENOUGH_STEPS and last.train_loss >= entropy:
        logger.warning(
            "after %d tokens the training loss %.3f is not below the unigram entropy %.3f: the model has learnt "
            "nothing from context; check learning_rate, and the data",
            last.tokens_seen,
            last.train_loss,
            entropy,
        )
