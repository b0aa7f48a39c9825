"""The training loop of a job: updates, metrics, checkpoints, and the guards that end it with a reason."""

import contextlib
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quadmix_plugin.atomic import sha256_file, write_json
from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.models import choose_device
from quadmix_plugin.pretraining.checkpoints import Checkpoints, Progress
from quadmix_plugin.pretraining.data import TrainingData
from quadmix_plugin.pretraining.metrics import FILE, Metrics, flops_per_token, peak_flops, read
from quadmix_plugin.pretraining.result import write_result
from quadmix_plugin.proxy.megatron_learner import CPULearner, GPTLearner, GPULearner
from quadmix_plugin.proxy.training import ENOUGH_STEPS, CurvePoint, TrainResult, on_threads
from quadmix_plugin.proxy.validation import evaluate, load_validation_sets
from quadmix_plugin.store import content_key

if TYPE_CHECKING:
    from quadmix_plugin.pretraining.job import PretrainJob
    from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer
    from quadmix_plugin.proxy.model import Shape

logger = logging.getLogger(__name__)

_EVALUATIONS = 20
_CURVE_POINTS = 100
_DIGITS = 12
_NAMED = 20  # documents in a message
_VALIDATION_TOKENS = 1 << 14  # per pass
_OF_IDENTITY = ("learning_rate", "batch_size", "warmup", "schedule", "final_learning_rate", "decay", "weight_decay",
                "betas", "grad_clip")  # fmt: skip


class Interrupted(Exception):
    """Training was asked to stop and has saved a checkpoint."""


@dataclass
class _Training:
    """One process of a job that trains."""

    options: "MegatronTrainer"
    job: "PretrainJob"
    shape: "Shape"
    updates: int
    device: torch.device
    rank: int
    processes: int
    stop: threading.Event
    learner: GPTLearner = field(init=False)
    data: TrainingData = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    progress: Progress = field(init=False)

    def open(self) -> None:
        """Model, data and the last checkpoint."""
        job, options = self.job, self.options
        if self.device.type == "cpu":
            self.learner = CPULearner(options, self.shape, job.seed, self.device)
        else:
            self.learner = GPULearner(options, self.shape, job.seed, self.device, self.processes, distributed=True)
        self.data = TrainingData.open(job, self.shape.context, options.batch_size, self.updates)
        self.checkpoints = Checkpoints(
            job.place / "checkpoints", identity_of(options, job, self.shape), options.keep, self.device, self.rank
        )
        self.progress = self.checkpoints.resume(self.learner)

    def run(self) -> None:
        """Trains to the end, or until it is asked to stop."""
        with self._metrics() as metrics:
            first, since = self.progress.update, _Since(self.progress.losses)
            batches = self.data.batches(first, self.updates, self.rank, self.processes, self.device)
            for update, batch in enumerate(batches, start=first + 1):
                rate = self.options.learning_rate_at(update - 1, self.updates)
                since.losses.append(self.learner.step(batch, rate))
                self.progress.update = update
                logs = update % self.options.log_every == 0 or update == self.updates
                saves = update % self.options.save_every == 0 or update == self.updates
                stops = self._stops(logs)
                if logs or saves or stops:
                    self._guard(losses := since.values())
                    self.progress.losses = losses
                if logs:
                    self._log(metrics, since, rate)
                if saves or stops:
                    with since.paused():
                        self.checkpoints.save(self.learner, self.progress)
                if stops and update < self.updates:
                    raise Interrupted(f"stopped after update {update}, with a checkpoint")

    def _metrics(self) -> Any:
        if self.rank:
            return contextlib.nullcontext()
        name = f"{self.job.selector}-{self.job.seed}-{self.job.key[:_DIGITS]}"  # no other run of the project has it
        return Metrics.open(self.job.place, self.progress.update, self.options.wandb, name)

    def _stops(self, together: bool) -> bool:
        """Whether any process was asked to stop; several agree on it when they log."""
        if self.processes == 1:
            return self.stop.is_set()
        if not together:
            return False
        asked = torch.tensor(float(self.stop.is_set()), device=self.device)
        torch.distributed.all_reduce(asked)
        return bool(asked > 0)

    def _log(self, metrics: "Metrics | None", since: "_Since", rate: float) -> None:
        update, loss = self.progress.update, math.fsum(self.progress.losses) / len(self.progress.losses)
        tokens = self.options.batch_size * self.shape.context
        speed = since.count * tokens / since.seconds if since.count else None
        with since.paused():
            validation = self._validation_loss() if self._validates() else None
        if metrics is not None:
            values = {"tokens": update * tokens, "loss": loss, "learning_rate": rate, "validation_loss": validation}
            values |= {"grad_norm": float(self.learner.grad_norm), "tokens_per_second": speed}
            metrics.write(update, {**values, **self._use_of_gpus(speed)})
        if update >= ENOUGH_STEPS + self.options.warmup * self.updates and loss >= self.data.entropy:
            logger.warning(
                "%s: after %d updates the loss is %.3f, above the entropy of single tokens (%.3f): nothing is learnt "
                "from context; check the learning rate, and the data",
                self.job.selector, update, loss, self.data.entropy,
            )  # fmt: skip
        self.progress.losses = []
        since.restart()

    def _validates(self) -> bool:
        """Whether the validation loss is due; where no line is due at the same update, it comes with the next."""
        if self.data.validation is None:
            return False
        update, every = self.progress.update, self.options.eval_every or max(self.updates // _EVALUATIONS, 1)
        return update == self.updates or update // every > (update - self.options.log_every) // every

    def _use_of_gpus(self, speed: float | None) -> dict[str, float | None]:
        """Share of the bfloat16 peak, where that is known, and the most memory that one GPU has used."""
        if self.device.type != "cuda":
            return {}
        peak = peak_flops(torch.cuda.get_device_name(self.device))
        busy = speed * flops_per_token(self.shape) / (peak * self.processes) if peak and speed else None
        return {"mfu": busy, "memory_gib": torch.cuda.max_memory_allocated(self.device) / 2**30}

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Mean loss (nats per token) on the validation split, over all processes."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        size = max(_VALIDATION_TOKENS // self.shape.context, 1)
        for batch in self.data.validation_batches(size, self.rank, self.processes, self.device):
            positions = torch.arange(self.shape.context, device=self.device).expand(len(batch), -1)
            losses = self.learner.gpt(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous())
            sums += torch.stack([losses.double().sum(), torch.tensor(losses.numel(), device=self.device).double()])
        if self.processes > 1:
            torch.distributed.all_reduce(sums)
        return float(sums[0] / sums[1])

    def _guard(self, losses: list[float]) -> None:
        """Ends training whose loss cannot be of this data and model, with the documents of the batch."""
        first = self.progress.update - len(losses)
        for update, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                raise self._diverged(update, "loss", loss)
        if not math.isfinite(self.learner.grad_norm):  # the weights are spoilt already, which the next loss would show
            raise self._diverged(self.progress.update - 1, "norm of the gradient", self.learner.grad_norm)
        if first == 0 and losses and losses[0] < self.data.entropy / 2:
            raise InputError(
                f"{self.job.selector}: the first loss is {losses[0]:.3f} nats, a model that has learnt nothing has "
                f"{math.log(self.job.vocabulary):.3f} and single tokens an entropy of {self.data.entropy:.3f}; the "
                f"data are not what they seem, so export them again"
            )

    def _diverged(self, update: int, what: str, value: float) -> QuadmixError:
        documents, path = list(map(str, self.data.documents_of(update))), self.job.place / "bad_batch.json"
        write_json(path, {"update": update + 1, "what": what, "value": str(float(value)), "documents": documents})
        more = f" and {len(documents) - _NAMED} more" if len(documents) > _NAMED else ""
        return QuadmixError(
            f"{self.job.selector}, seed {self.job.seed}: the {what} of update {update + 1} is {float(value)}; its "
            f"batch is of the documents {', '.join(documents[:_NAMED])}{more} ({path}); look at them, or lower "
            f"learning_rate or grad_clip; the last checkpoint is from before"
        )


@dataclass
class _Since:
    """Losses and time since the last line of metrics; time for checkpoints and validation does not count."""

    losses: list[Any]
    count: int = 0
    _begun: float = field(default_factory=time.perf_counter)
    _before: int = field(init=False)

    def __post_init__(self) -> None:
        self.losses = list(self.losses)
        self._before = len(self.losses)

    def values(self) -> list[float]:
        """The losses as numbers; waits for the device."""
        self.losses = [float(loss) for loss in self.losses]
        self.count = len(self.losses) - self._before
        return list(self.losses)

    @property
    def seconds(self) -> float:
        """Of training."""
        return time.perf_counter() - self._begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        begun = time.perf_counter()
        yield
        self._begun += time.perf_counter() - begun

    def restart(self) -> None:
        """From here on."""
        self.losses, self._before, self._begun = [], 0, time.perf_counter()


def pretrain(
    options: "MegatronTrainer",
    job: "PretrainJob",
    rank: int = 0,
    processes: int = 1,
    stop: threading.Event | None = None,
) -> None:
    """Trains a job and writes its model and result; as one of ``processes``, or alone.

    Raises:
        Interrupted: ``stop`` was set; a checkpoint is there.
        InputError, QuadmixError, StorageError: as ``MegatronTrainer.pretrain``.
    """
    started = time.perf_counter()
    device = _device(options.device, rank)
    shape = options.model_shape(job.vocabulary)
    per_update = options.batch_size * shape.context
    if options.batch_size % processes:
        raise InputError(f"trainer: batch_size {options.batch_size} does not divide among {processes} processes")
    with on_threads(options.threads) if device.type == "cpu" else contextlib.nullcontext():
        training = _Training(
            options, job, shape, -(-job.tokens // per_update), device, rank, processes, stop or threading.Event()
        )
        training.open()
        training.run()
        if rank == 0:
            _finish(training, started)
        torch.distributed.barrier()


def identity_of(options: "MegatronTrainer", job: "PretrainJob", shape: "Shape") -> dict[str, Any]:
    """What a checkpoint must share with a job to be one of its own."""
    digests = [sha256_file(Path(f"{prefix}.idx")) for prefix in job.prefixes]
    settings = {name: getattr(options, name) for name in _OF_IDENTITY}
    settings["betas"] = list(settings["betas"])
    return {**asdict(shape), **settings, "tokens": job.tokens, "seed": job.seed, "data": content_key(digests)}


def _device(device: str, rank: int) -> torch.device:
    """Of this process: under torchrun every process of a machine has the GPU of its local number."""
    chosen = choose_device(device)
    if chosen != "cuda":
        return torch.device(chosen)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))


def _finish(training: _Training, started: float) -> None:
    """The model in Hugging Face's format, and the result with the losses on the answers."""
    job = training.job
    model = training.learner.decoder()
    sets = load_validation_sets(job.validation, "report")
    losses = {each.task: evaluate(model, each) for each in sets}
    curve = _curve(job, training.updates, losses)
    last = curve[-1]
    result = TrainResult(
        losses=losses,
        curve=curve,
        tokens_seen=last.tokens_seen,
        unigram_entropy=training.data.entropy,
        model=model,
        learnt=last.train_loss < training.data.entropy if training.updates >= ENOUGH_STEPS else None,
    )
    write_result(job, result, sets, job.selected_tokens, started)
    shutil.rmtree(job.place / "indices", ignore_errors=True)


def _curve(job: "PretrainJob", updates: int, losses: dict[str, float]) -> tuple[CurvePoint, ...]:
    """The training loss over ``metrics.jsonl``, neighbours taken together; the last point has the losses."""
    lines = read(job.place / FILE)
    size = -(-len(lines) // _CURVE_POINTS)
    points = []
    for start in range(0, len(lines), size):
        some = lines[start : start + size]
        last = some[-1]
        mean = math.fsum(line["loss"] for line in some) / len(some)
        points.append(CurvePoint(last["step"], last["step"] / updates, last["tokens"], mean))
    end = points[-1]
    return (*points[:-1], CurvePoint(end.step, end.share, end.tokens_seen, end.train_loss, losses))
