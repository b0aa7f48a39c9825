"""What every trainer of proxies shares: options, the learning rate, the loop over pieces, the curve, the guards.

A trainer brings a ``Learner``, which holds a model and its optimizer and takes one step at a time. Nothing here knows
θ, documents or run directories: pieces come from ``pieces``, validation sets from ``validation``. On the CPU a model
trains on a fixed number of threads, so that a result has the same bits whatever the executor and its workers.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.megatron import check_tokens
from quadmix_plugin.models import choose_device
from quadmix_plugin.proxy.validation import ValidationSet, evaluate

if TYPE_CHECKING:
    import torch

    from quadmix_plugin.proxy.model import Decoder, Shape

Stop = Callable[[float, dict[str, float]], bool]
"""Whether to stop here: the share of the steps taken, and the validation losses now."""

ENOUGH_STEPS = 150
"""After so many updates a model that learns is below the unigram entropy."""

_CURVE_POINTS = 20
_CHECKED = 1 << 20  # ids looked at before training


class PieceSource(Protocol):
    """Training pieces [k, context + 1]: a NumPy array, or ``Pieces``, which gathers them when asked."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class CurvePoint:
    """At ``step`` updates: mean training loss (nats per token) since the point before, and validation losses if any.

    ``share``: of all updates; where ``eval_at`` asked for losses, as it says.
    """

    step: int
    share: float
    tokens_seen: int
    train_loss: float
    losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A trained model and what was measured.

    ``losses``: nats per token by task, at the end or where training was stopped; ``share`` of the steps taken (1.0
    unless stopped); ``learnt``: whether the training loss ended below ``unigram_entropy`` (nats), None after too few
    steps to expect that.
    """

    losses: dict[str, float]
    curve: tuple[CurvePoint, ...]
    tokens_seen: int
    unigram_entropy: float
    model: "Decoder"
    share: float = 1.0
    learnt: bool | None = None


class Learner(ABC):
    """A model in training: its weights, gradients and optimizer."""

    @abstractmethod
    def step(self, batch: "torch.Tensor", learning_rate: float) -> "torch.Tensor":
        """One update on ``batch`` [b, context + 1] (ids, on the learner's device); returns the mean loss before it."""

    @abstractmethod
    def decoder(self) -> "Decoder":
        """The model as it is now, for evaluation; training may go on afterwards."""


@dataclass
class Trainer(ABC):
    """The options that all built-in trainers share; they are the ``options`` of a recipe.

    Args:
        shape: a name of ``SHAPES``.
        shape_options: numbers of the shape to replace, such as ``context``.
        learning_rate: the highest, after ``warmup``.
        batch_size: pieces per update.
        warmup: share of the updates in which the learning rate rises.
        schedule: how it falls afterwards, to ``final_learning_rate`` times the highest; ``wsd`` stays there and falls
            linearly over the last ``decay`` of the updates.
        final_learning_rate: share of ``learning_rate`` at the end; unused by ``constant``.
        decay: share of the updates in which ``wsd`` falls.
        weight_decay: of AdamW, on matrices only.
        betas: of AdamW.
        grad_clip: largest norm of the gradient.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: cores of one model on a CPU; another number gives losses that differ by rounding.
    """

    shape: str = "proxy-tiny"
    shape_options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 4e-3
    batch_size: int = 4
    warmup: float = 0.05
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    final_learning_rate: float = 0.1
    decay: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not self.learning_rate > 0 or not 0 <= self.warmup <= 1 or self.threads < 1:
            raise InputError(
                f"trainer: batch_size {self.batch_size}, learning_rate {self.learning_rate}, warmup {self.warmup}, "
                f"threads {self.threads}; give a batch and threads of at least 1, a positive learning rate and a "
                f"warmup between 0 and 1"
            )
        if not 0 < self.decay <= 1 - self.warmup and self.schedule == "wsd":
            raise InputError(
                f"trainer: decay {self.decay} with warmup {self.warmup}; give shares that are positive and add up to 1 "
                f"at most"
            )
        rates = (self.weight_decay, self.final_learning_rate)
        if not self.grad_clip > 0 or min(rates) < 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(
                f"trainer: grad_clip {self.grad_clip}, weight_decay {self.weight_decay}, final_learning_rate "
                f"{self.final_learning_rate}, betas {self.betas}; give a positive grad_clip, betas from 0 to below 1, "
                f"and nothing negative"
            )

    def require_device(self) -> None:  # noqa: B027 - most trainers run anywhere
        """Raises InputError where this machine lacks the device that training needs."""

    @abstractmethod
    def learner(self, shape: "Shape", seed: int, device: "torch.device") -> Learner:
        """A model with the initial weights of ``seed``, ready to learn."""

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
        pieces: PieceSource,
        validation_sets: Sequence[ValidationSet],
        seed: int,
        vocabulary: int,
        eval_at: Sequence[float] = (),
        stop: Stop | None = None,
    ) -> TrainResult:
        """Trains once over ``pieces`` [k, context + 1] in their order; ``seed`` draws the initial weights.

        ``eval_at``: shares of the updates, in (0, 1), after which the validation losses are measured too and ``stop``
        is asked.

        Raises:
            InputError: fewer pieces than a batch, ids outside the vocabulary, constant data, or no validation sets.
            QuadmixError: the loss is not finite.
        """
        import torch

        if not validation_sets:
            raise InputError("validation: no sets; a model without validation loss says nothing")
        if len(pieces) < self.batch_size:
            raise InputError(f"{len(pieces)} pieces; a batch has {self.batch_size}, so give more training tokens")
        entropy = _check(pieces, vocabulary)
        device = torch.device(choose_device(self.device))
        with on_threads(self.threads):
            learner = self.learner(self.model_shape(vocabulary), seed, device)
            curve = self._run(learner, pieces, validation_sets, device, eval_at, stop)
            model = learner.decoder()
        last = curve[-1]
        return TrainResult(
            losses=last.losses,
            curve=tuple(curve),
            tokens_seen=last.tokens_seen,
            unigram_entropy=entropy,
            model=model,
            share=last.share,
            learnt=last.train_loss < entropy if last.step >= ENOUGH_STEPS else None,
        )

    def _run(
        self,
        learner: Learner,
        pieces: PieceSource,
        sets: Sequence[ValidationSet],
        device: "torch.device",
        eval_at: Sequence[float],
        stop: Stop | None,
    ) -> list[CurvePoint]:
        """The loop; the curve ends where training ends, with the validation losses there."""
        import torch

        from quadmix_plugin.proxy.feed import batches

        steps = -(-len(pieces) // self.batch_size)
        marks = {round(steps * (i + 1) / _CURVE_POINTS) for i in range(_CURVE_POINTS)}
        judged: dict[int, list[float]] = {steps: [1.0]}
        for share in sorted(set(eval_at), reverse=True):
            judged.setdefault(max(round(steps * share), 1), []).insert(0, share)
        curve: list[CurvePoint] = []
        total, since, seen = torch.zeros((), device=device), 0, 0
        for step, batch in enumerate(batches(pieces, self.batch_size, device), start=1):
            total = total + learner.step(batch, self.learning_rate_at(step - 1, steps))
            since, seen = since + 1, seen + batch.shape[0] * (batch.shape[1] - 1)
            if step not in marks and step not in judged:
                continue
            losses = _judge(learner, sets) if step in judged else {}
            shares = judged.get(step, [step / steps])
            curve += [_finite(CurvePoint(step, share, seen, float(total) / since, losses)) for share in shares]
            total, since = torch.zeros_like(total), 0
            if losses and step < steps and stop is not None and any(stop(share, losses) for share in shares):
                break
        return curve

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of update ``step`` (from 0) of ``steps``."""
        rising = max(round(self.warmup * steps), 1)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "wsd":
            rising = max(steps - max(round(self.decay * steps), 1), rising)
        progress = max(step + 1 - rising, 0) / max(steps - rising, 1)
        left = 1 - progress if self.schedule in ("linear", "wsd") else (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (self.final_learning_rate + (1 - self.final_learning_rate) * left)


def tokens_per_batch(trainer: Any) -> int:
    """Training tokens of one update of a trainer, whoever wrote it."""
    return getattr(trainer, "batch_size", 1) * trainer.context


def _check(pieces: PieceSource, vocabulary: int) -> float:
    """Unigram entropy (nats) of evenly spaced pieces; refuses data that no model should be trained on."""
    width = pieces[0:1].shape[1]
    stride = max(1, len(pieces) * width // _CHECKED)
    return check_tokens(pieces[np.arange(0, len(pieces), stride)], vocabulary, "training data").entropy


def _judge(learner: Learner, sets: Sequence[ValidationSet]) -> dict[str, float]:
    model = learner.decoder()
    return {each.task: evaluate(model, each) for each in sets}


def _finite(point: CurvePoint) -> CurvePoint:
    if not all(map(math.isfinite, [point.train_loss, *point.losses.values()])):
        raise QuadmixError(
            f"training diverged at step {point.step}: loss {point.train_loss:.4g}; lower learning_rate or grad_clip"
        )
    return point


@contextlib.contextmanager
def on_threads(number: int) -> Iterator[None]:
    """So many intra-op threads inside, as many as before outside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
