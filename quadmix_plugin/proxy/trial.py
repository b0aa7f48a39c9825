"""A short measured trial: what training and evaluating one model costs here, before thousands are begun."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.proxy.validation import ValidationSet

_SECONDS = 1.5  # that the longer of two trainings should take
_MOST_STEPS = 256
_SLOW_TOKENS = 4096  # per update on a CPU, where a batch made for a GPU takes minutes


@dataclass(frozen=True)
class Trial:
    """Cost of a model here: ``tokens_per_second`` of training, ``seconds_per_evaluation`` of all validation sets."""

    tokens_per_second: float
    seconds_per_evaluation: float

    def seconds(self, tokens: int, evaluations: int = 1) -> float:
        """Seconds of one model that is trained on ``tokens`` and evaluated so many times."""
        return tokens / self.tokens_per_second + evaluations * self.seconds_per_evaluation


def measure(trainer: Any, sets: Sequence[ValidationSet], vocabulary: int) -> Trial:
    """Trains on random ids, in twice as many steps each time until that takes long enough; the last two are compared.

    Raises:
        InputError, QuadmixError: what the trainer raises.
    """
    one = sets[0]
    short = [ValidationSet(one.task, one.ids[:1], one.lengths[:1], one.starts[:1])]

    def train(steps: int, validation: Sequence[ValidationSet]) -> float:
        pieces = _random_pieces(steps * trainer.batch_size, trainer.context, vocabulary)
        return _seconds(lambda: trainer.train(pieces, validation, seed=0, vocabulary=vocabulary))

    train(1, short)  # what only the first model pays: imports, compilation
    steps, before = 1, train(1, short)
    while True:
        now = train(2 * steps, short)
        if now >= _SECONDS or 2 * steps >= _MOST_STEPS:
            break
        steps, before = 2 * steps, now
    rate = steps * trainer.batch_size * trainer.context / max(now - before, 1e-3 * now)
    return Trial(rate, max(train(1, sets) - train(1, short), 0.0))


def trial_options(options: dict[str, Any], context: int, on_gpu: bool) -> dict[str, Any]:
    """A trainer's options for the trial: on a CPU with a batch that it can take in seconds."""
    if on_gpu or "batch_size" not in options:
        return options
    return {**options, "batch_size": min(options["batch_size"], max(_SLOW_TOKENS // context, 1))}


def _random_pieces(count: int, context: int, vocabulary: int) -> NDArray[np.int32]:
    """Ids whose frequencies fall as those of words do."""
    generator = np.random.default_rng(0)
    ids = np.exp(generator.random((count, context + 1)) * np.log(vocabulary)).astype(np.int32)
    return np.minimum(ids, vocabulary - 1)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
