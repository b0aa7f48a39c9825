"""The objective: several tasks' losses as one number, lower = better."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError

Array = NDArray[np.float64]


def gate(
    weights: Mapping[str, float], ratios: Mapping[str, float | None], least: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Weights without those of tasks whose signal to noise is below ``least``, and the ratio of each that lost its own.

    ``ratios``: task → standard deviation across θ (which holds the noise) / that over seeds; None or absent where
    unknown, which leaves a task in. Where all are too low none is left out.
    """
    low = {
        task: ratio
        for task, weight in weights.items()
        if weight > 0 and (ratio := ratios.get(task)) is not None and ratio < least
    }
    if all(task in low for task, weight in weights.items() if weight > 0):
        return dict(weights), {}
    return {task: 0.0 if task in low else weight for task, weight in weights.items()}, low


@dataclass(frozen=True)
class Objective:
    """The weighted mean of the tasks' standardised losses, lower = better; 0 is the mean proxy.

    ``weights`` sum to 1; ``mean`` and ``sd`` are each task's over the proxies.
    """

    weights: dict[str, float]
    mean: dict[str, float]
    sd: dict[str, float]

    @classmethod
    def of(cls, losses: Mapping[str, Array], weights: Mapping[str, float] | None = None) -> "Objective":
        """The objective of these proxies' losses (task → [n]); without ``weights`` all tasks count equally.

        Raises:
            InputError: a weight for an unknown task, a negative one, or none above 0.
        """
        given = dict(weights or dict.fromkeys(losses, 1.0))
        if unknown := [task for task in given if task not in losses]:
            raise InputError(
                f"search.objective: no task {unknown[0]!r}; the proxies have losses of {', '.join(losses)}"
            )
        total = sum(given.values())
        if not (np.isfinite(total) and total > 0 and min(given.values()) >= 0):
            raise InputError(f"search.objective: weights {given}; give numbers >= 0, at least one above 0")
        return cls(
            {task: given.get(task, 0.0) / total for task in losses},
            {task: float(np.mean(y)) for task, y in losses.items()},
            {task: float(np.std(y, ddof=1)) for task, y in losses.items()},
        )

    @property
    def tasks(self) -> list[str]:
        """The tasks that count."""
        return [task for task, weight in self.weights.items() if weight > 0]

    @property
    def scale(self) -> float:
        """Of ``measure``: one standard deviation."""
        return self.sd[self.tasks[0]] if len(self.tasks) == 1 else 1.0

    @property
    def unit(self) -> str:
        """Of ``measure``."""
        return "nats per token" if len(self.tasks) == 1 else "standard deviations over the proxies"

    def measure(self, losses: Mapping[str, Any]) -> Array:
        """The objective [n] as it is told: of one task its loss itself, of several ``value``."""
        return self.value(losses) if len(self.tasks) > 1 else np.asarray(losses[self.tasks[0]])

    def value(self, losses: Mapping[str, Any]) -> Array:
        """The objective [n] of losses, task → [n]."""
        terms = [self.weights[task] * (losses[task] - self.mean[task]) / self.sd[task] for task in self.tasks]
        return np.sum(terms, axis=0)
