"""What ``quadmix fit`` may say of its optimum: a predicted gain, in units of the error of the prediction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.search.evaluation import Metrics
from quadmix_plugin.search.gain import Prediction
from quadmix_plugin.search.objective import Objective
from quadmix_plugin.search.proposals import Proposal
from quadmix_plugin.search.tables import FitRows

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Judged:
    """Predictions of one target for rows that the models had not seen: ``real`` [n], ``predicted`` [repeats, n]."""

    keys: list[str]
    real: Array
    predicted: Array
    metrics: Metrics

    @property
    def error(self) -> float:
        """Root mean squared error."""
        return float(np.sqrt(((self.predicted - self.real) ** 2).mean()))


def gain(train: FitRows, judged: Mapping[str, Judged], proposal: Proposal) -> dict[str, Any]:
    """Is the optimum better than the mean row, and than the best one? In losses, or in the objective for several."""
    objective = proposal.objective
    unit, scale, middle = "standard deviations of the losses", 1.0, 0.0
    if len(objective.tasks) == 1:
        (target,) = objective.tasks
        unit, scale, middle = "loss", objective.sd[target], objective.mean[target]
    sd = sum(objective.weights[target] * each / objective.sd[target] for target, each in proposal.best.sd.items())
    predicted = objective.value({target: judged[target].predicted for target in objective.tasks})
    at = Prediction(
        loss=middle + scale * proposal.best.objective,
        error=scale * _objective_error(objective, judged),
        sd=scale * float(sd),
        checked=middle + scale * float(predicted.mean(axis=0).min()),
    )
    rivals = {
        "mean_row": ("the mean row", middle),
        "best_row": (
            f"the best measured row ({train.key} {train.keys[proposal.best_proxy.number]})",
            middle + scale * proposal.best_proxy.objective,
        ),
    }
    found = {name: _gain_over(said, level, at, unit) for name, (said, level) in rivals.items()}
    return {"unit": unit, "predicted": at.to_dict(), **found}


def _objective_error(objective: Objective, judged: Mapping[str, Judged]) -> float:
    """Root mean squared error of the predicted objective."""
    real = objective.value({target: judged[target].real for target in objective.tasks})
    predicted = objective.value({target: judged[target].predicted for target in objective.tasks})
    return float(np.sqrt(((predicted - real) ** 2).mean()))


def _gain_over(rival: str, level: float, at: Prediction, unit: str) -> dict[str, Any]:
    gain = level - at.loss
    error = float(np.hypot(at.error, at.sd))
    evident = at.high < level
    digits = 4 if unit == "loss" else 2
    amount = f"{gain:+.{digits}f}" + ("" if unit == "loss" else f" {unit}")
    times = f", {gain / error:.1f} × its error" if error else ""
    said = f"over {rival}: predicted gain {amount}{times}"
    interval = f"95 % {level - at.high:+.{digits}f} to {level - at.low:+.{digits}f}"
    sentence = (
        f"A gain is to be expected {said} ({interval})." if evident else f"No evidence of gain {said} ({interval})."
    )
    return {
        "level": level,
        "gain": gain,
        "in_errors": gain / error if error else None,
        "low": gain - at.half,
        "high": gain + at.half,
        "evidence": evident,
        "sentence": sentence,
    }
