"""From points to predicted losses, with how far these may be off.

One regressor per task, fitted on the losses as they are. A regressor without an uncertainty of its own is refitted
on resampled rows, and the scatter of the refits stands for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.search.objective import Objective
from quadmix_plugin.search.regressors import KnowsItsError, Regressor

Array = NDArray[np.float64]

REFITS = 8


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Predicted losses and objective of features X [k, f]; a row of NaN has an infinite objective.

    ``refits``: task → the same regressor on resampled rows; empty for one that knows its error.
    """

    regressors: dict[str, Regressor]
    refits: dict[str, list[Regressor]]
    objective: Objective

    @classmethod
    def fit(
        cls,
        make: Callable[[], Regressor],
        x: Array,
        losses: Mapping[str, Array],
        objective: Objective,
        *,
        uncertain: bool = True,
        seed: int = 0,
    ) -> "Surrogate":
        """Fits a regressor for each task; ``uncertain``: and what is needed for the error of the objective's tasks."""
        regressors = {task: _fitted(make(), x, y) for task, y in losses.items()}
        refits: dict[str, list[Regressor]] = {}
        for task in objective.tasks if uncertain else ():
            if not knows_its_error(regressors[task]):
                rng = np.random.default_rng([seed, 0xB007])
                remake = getattr(regressors[task], "another", make)
                chosen = [np.sort(rng.integers(0, len(x), len(x))) for _ in range(REFITS)]
                refits[task] = [_fitted(remake(), x[rows], losses[task][rows]) for rows in chosen]
        return cls(regressors, refits, objective)

    def losses(self, x: Array) -> dict[str, Array]:
        """Predicted loss [k] of every task, those of weight 0 too."""
        return {task: self._predict(task, x) for task in self.regressors}

    def value(self, x: Array) -> Array:
        """The predicted objective [k]."""
        return _where_usable(x, lambda rows: self.objective.value(self._of_objective(rows)))

    def value_with_sd(self, x: Array) -> tuple[Array, Array]:
        """The predicted objective [k] and a bound on the standard deviation of its error.

        The tasks' errors are added as if they went together, since the same features are misjudged for all.
        """
        usable = np.isfinite(x).all(axis=1)
        value, sd = np.full(len(x), np.inf), np.zeros(len(x))
        if usable.any():
            means = {}
            for task in self.objective.tasks:
                means[task], error = self.with_sd(task, x[usable])
                sd[usable] += self.objective.weights[task] * error / self.objective.sd[task]
            value[usable] = self.objective.value(means)
        return value, sd

    def with_sd(self, task: str, x: Array) -> tuple[Array, Array]:
        """Predicted loss [k] of a task of the objective and the standard deviation of its error, without noise."""
        if task not in self.refits:
            mean, sd = self.regressors[task].predict_with_sd(x)  # type: ignore[attr-defined]
            return _finite(mean), sd
        spread = np.std([refit.predict(x) for refit in self.refits[task]], axis=0, ddof=1)
        return self._predict(task, x), spread

    def _of_objective(self, x: Array) -> dict[str, Array]:
        return {task: self._predict(task, x) for task in self.objective.tasks}

    def _predict(self, task: str, x: Array) -> Array:
        return _finite(self.regressors[task].predict(x))


def knows_its_error(regressor: Regressor) -> bool:
    """Whether a fitted regressor has an uncertainty of its own."""
    return getattr(regressor, "knows_its_error", isinstance(regressor, KnowsItsError))


def _fitted(regressor: Regressor, x: Array, y: Array) -> Regressor:
    regressor.fit(x, y)
    return regressor


def _finite(predicted: Array) -> Array:
    if not np.isfinite(predicted).all():
        raise InputError("search: the regressor predicts losses that are not finite; check its options")
    return predicted


def _where_usable(x: Array, predict: Callable[[Array], Array]) -> Array:
    usable = np.isfinite(x).all(axis=1)
    value = np.full(len(x), np.inf)
    if usable.any():
        value[usable] = predict(x[usable])
    return value
