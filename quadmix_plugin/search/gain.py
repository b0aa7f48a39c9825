"""Is there a gain to expect of θ*? Its predicted loss against measured losses of rivals, in units of the noise.

A regressor always finds a θ that it likes. What is to be expected is said before anything is selected or trained:
the interval of the prediction holds the regressor's cross-validated error, its uncertainty at θ*, how far it goes
beyond what could be checked, and the noise of the rival's own losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_Z = 1.96  # 95 % of a normal distribution


@dataclass(frozen=True)
class Prediction:
    """A predicted loss with the 95 % interval ``low``..``high`` of the loss of a proxy trained there.

    ``error``: cross-validated root mean squared error; ``sd``: of the predicted mean at this place; ``checked``: the
    lowest prediction that cross-validation held against a measured loss. A search goes beyond it, where nothing says
    how far predictions can be trusted: the interval then reaches from there up to the checked range and its error.
    """

    loss: float
    error: float
    sd: float
    checked: float

    @property
    def half(self) -> float:
        """Half the width of the interval, within what was checked."""
        return _Z * float(np.hypot(self.error, self.sd))

    @property
    def low(self) -> float:
        """The lower end."""
        return self.loss - self.half

    @property
    def high(self) -> float:
        """The upper end."""
        return max(self.loss, self.checked) + self.half

    def to_dict(self) -> dict[str, float]:
        """Plain content for JSON."""
        return {**asdict(self), "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Gain:
    """Predicted gain over one rival: its mean measured ``loss`` minus the prediction; positive favours θ*.

    ``in_noise``: the gain in standard deviations of the noise of one training, None where that is not known; ``low``
    and ``high``: 95 % interval of the gain; ``overlap``: tokens of documents that both select / tokens of those that
    either selects, in [0, 1]; None where it has no selection.
    """

    rival: str
    loss: float
    gain: float
    in_noise: float | None
    low: float
    high: float
    overlap: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON."""
        return asdict(self)


def gain_over(
    rival: str, losses: ArrayLike, prediction: Prediction, noise_sd: float | None, overlap: float | None = None
) -> Gain:
    """The gain over a rival from its measured losses, one per seed; a noise that is not known is taken to be the error.

    The regressor's error against losses of single trainings holds their noise.
    """
    values = np.asarray(losses, dtype=np.float64)
    mean = float(values.mean())
    gain = mean - prediction.loss
    half = float(np.hypot(prediction.half, _Z * (noise_sd or prediction.error) / np.sqrt(values.size)))
    wider = half - prediction.half
    low, high = mean - prediction.high - wider, mean - prediction.low + wider
    return Gain(rival, mean, gain, gain / noise_sd if noise_sd else None, low, high, overlap)


def verdict(gains: list[Gain], failed: Sequence[str] = ()) -> tuple[bool, str]:
    """Whether the gain over the strongest rival is outside its interval, and the sentence that says so.

    ``failed``: rivals whose proxies could not be trained, which are not among ``gains``.
    """
    if not gains:
        reason = f"{', '.join(failed)} could not be trained" if failed else "none was trained; set proxy.baselines"
        return False, f"No evidence of gain over a baseline: {reason}."
    strongest = min(gains, key=lambda gain: gain.loss)
    amount = f"{strongest.gain:+.4f}" + (
        "" if strongest.in_noise is None else f", {strongest.in_noise:.1f} × the noise"
    )
    interval = f"95 % {strongest.low:+.4f} to {strongest.high:+.4f}"
    against = f"the strongest baseline proxy, {strongest.rival} ({amount}; {interval})"
    lacking = f" {', '.join(failed)} could not be trained and may be stronger." if failed else ""
    if strongest.low > 0:
        return True, f"A gain is to be expected over {against}.{lacking}"
    beaten = [gain.rival for gain in gains if gain.low > 0]
    rest = f" One is to be expected over {', '.join(beaten)}." if beaten else ""
    if strongest.high < 0:
        return False, f"No gain: θ* is predicted to be worse than {against}.{rest}{lacking}"
    return False, f"No evidence of gain over {against}: the interval holds 0.{rest}{lacking}"


def jaccard(tokens: ArrayLike, copies: ArrayLike, others: ArrayLike) -> float:
    """Overlap of two selections, documents of ``tokens`` [n]: tokens in both / in either; 1 where both are empty."""
    each, a, b = np.asarray(tokens), np.asarray(copies) > 0, np.asarray(others) > 0
    either = int(each[a | b].sum())
    return float(each[a & b].sum() / either) if either else 1.0


def weighted(losses: Mapping[str, Any], weights: Mapping[str, float]) -> Any:
    """The mean loss over the tasks that count; numbers or arrays, nats per token."""
    return sum(weight * losses[task] for task, weight in weights.items()) / sum(weights.values())
