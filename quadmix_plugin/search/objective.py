"""The objective: several tasks' losses as one number, lower = better."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError

Array = NDArray[np.float64]


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

    def value(self, losses: Mapping[str, Array]) -> Array:
        """The objective [n] of losses, task → [n]."""
        terms = [self.weights[task] * (losses[task] - self.mean[task]) / self.sd[task] for task in self.tasks]
        return np.sum(terms, axis=0)
