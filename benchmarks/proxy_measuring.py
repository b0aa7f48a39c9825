"""What ``proxies_gpu.py`` measures with: a proxy and its batches, timing on a device, and lines that come one by one.

Nothing here needs the packages that ``measuring`` names in its reports: a borrowed machine has few of them.
"""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quadmix_plugin.models import first_line
from quadmix_plugin.proxy.model import Shape, named_shape
from quadmix_plugin.proxy.trainer import TorchTrainer

RATE = 4e-4
WARM, BLOCKS = 3, 5
ALL_TOKENS = 3000 * 1e9
LONGEST_MINUTES = 9.0
"""After which no part begins another measurement: a borrowed machine's commands end at ten."""


@dataclass(frozen=True)
class Job:
    """A proxy and its batch of pieces."""

    shape: str
    context: int
    batch: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.shape}, V {self.vocabulary:,}, {self.batch} × {self.context}"

    @property
    def model(self) -> Shape:
        """The shape of the model."""
        return named_shape(self.shape, context=self.context, vocabulary=self.vocabulary)

    @property
    def tokens(self) -> int:
        """Of an update."""
        return self.batch * self.context

    def trainer(self, **options: Any) -> TorchTrainer:
        """The built-in trainer, its options as they are by default but for ``options``."""
        return TorchTrainer(self.shape, {"context": self.context}, learning_rate=RATE, batch_size=self.batch, **options)

    def batches(self, n: int, device: torch.device, seed: int = 0) -> Tensor:
        """Ids [n, batch, context + 1] by Zipf's law."""
        share = np.cumsum(1 / np.arange(1, self.vocabulary + 1))
        draws = np.random.default_rng(seed).random((n, self.batch, self.context + 1))
        return torch.from_numpy(np.searchsorted(share / share[-1], draws)).to(device)


def flops_per_token(shape: Shape) -> float:
    """Forward and backward."""
    attention = 2 * shape.width * shape.head_width * (shape.heads + shape.n_kv_heads)
    weights = shape.layers * (attention + 3 * shape.width * shape.ffn) + shape.vocabulary * shape.width
    return 6.0 * (weights + shape.layers * shape.width * shape.context)


class Bench:
    """Where the measurements run, the time that is left, and the lines written so far.

    ``seconds``: of measuring one way, after it is warm; ``minutes``: of one part; ``peak``: FLOP/s that shares are of;
    ``losses``: what the first way to train a proxy came to, which the others should too.
    """

    def __init__(self, device: torch.device, seconds: float, minutes: float, out: Path | None) -> None:
        self.device, self.seconds, self.minutes = device, seconds, minutes
        self.peak = float("nan")
        self.losses: dict[Job, float] = {}
        self._end = self._until = time.perf_counter() + 60 * max(LONGEST_MINUTES, minutes)
        self._header: tuple[str, ...] = ()
        self._file = out.open("a", encoding="utf-8") if out else None

    @property
    def is_gpu(self) -> bool:
        """Else a rehearsal."""
        return self.device.type == "cuda"

    @property
    def peak_gib(self) -> float:
        """Most memory of the device that was held at once since the last measurement."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.is_gpu else float("nan")

    @property
    def seconds_left(self) -> float:
        """Of the whole run."""
        return self._end - time.perf_counter()

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Runs one part within its time; an error ends the part, not the run."""
        print(f"\n## {name}", flush=True)
        self._header = ()
        started = time.perf_counter()
        self._until = min(started + 60 * self.minutes, self._end)
        self.attempt(name, work)
        print(f"\n{name}: {time.perf_counter() - started:.0f} s", flush=True)

    def attempt(self, name: str, work: Callable[[], Any]) -> None:
        """Runs ``work`` if there is time left; says what it could not do."""
        if time.perf_counter() > self._until:
            self._left_out(name, "no time left; raise --minutes or give --only")
            return
        try:
            work()
        except ImportError as error:
            self._left_out(name, f"not installed ({error})")
        except Exception as error:  # other ways' figures are still of use
            self._left_out(name, f"{type(error).__name__}: {first_line(error)}")
            print(traceback.format_exc(), file=sys.stderr, flush=True)
        finally:
            self._forget()

    def line(self, name: str, **facts: Any) -> None:
        """One row of a Markdown table, headed anew where the columns change, and one line of JSON."""
        header = ("", *(key.replace("_", " ") for key in facts))
        if header != self._header:
            print(f"\n| {' | '.join(header)} |\n|---|{'---:|' * len(facts)}")
        self._header = header
        print(f"| {name} | {' | '.join(map(_shown, facts.values()))} |", flush=True)
        self._record({"name": name, **facts})

    def speed(self, name: str, job: Job, rate: float, **facts: Any) -> None:
        """A line of training at ``rate`` tokens/s."""
        share = rate * flops_per_token(job.model) / self.peak
        self.line(
            f"{job}: {name}", tokens_per_s=rate, of_bf16_peak=share, hours_3000_x_1B=ALL_TOKENS / rate / 3600, **facts
        )

    def timed(self, work: Callable[[int], Any]) -> tuple[float, float]:
        """Wall seconds of the first call, and the median of later ones by blocks; ``work`` is told which call it is."""
        first = self._seconds(work, 0, 1)
        self._seconds(work, 1, WARM - 1)
        calls = max(int(self.seconds / BLOCKS / self._seconds(work, WARM, 1)), 1)
        return first, median(self._seconds(work, WARM + 1 + i * calls, calls) / calls for i in range(BLOCKS))

    def _seconds(self, work: Callable[[int], Any], begin: int, calls: int) -> float:
        self.synchronise()
        started = time.perf_counter()
        for i in range(begin, begin + calls):
            work(i)
        self.synchronise()
        return time.perf_counter() - started

    def _left_out(self, name: str, reason: str) -> None:
        print(f"| {name} | {reason} |", flush=True)
        self._record({"name": name, "left_out": reason})

    def _record(self, facts: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(facts) + "\n")
            self._file.flush()

    def _forget(self) -> None:
        torch._dynamo.reset()
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
