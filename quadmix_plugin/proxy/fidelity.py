"""How far losses before the last token can be trusted, and which proxies can be stopped there.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) with thresholds taken once from a pilot that was
trained in full: each later proxy is judged alone, whatever the order in which proxies are trained. Pure functions
over arrays of losses; nothing here trains or reads files.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.search.objective import Objective

Array = NDArray[np.float64]

_PILOTS = 8
_SAME_SHARE = 1e-9
_NO_SPREAD = 1e-12  # standard deviation over largest loss; below it there is only rounding
_ALONE = 1e-9  # 1 - leverage of a proxy without which the others have no slope


def rank_agreement(partial: ArrayLike, final: ArrayLike) -> float | None:
    """Spearman's correlation of losses [n] at a part of the tokens with the final ones [n].

    None for fewer than three proxies, and where all losses of a side are equal.

    Raises:
        InputError: arrays of different lengths, or losses that are not finite.
    """
    from scipy.stats import spearmanr

    early, late = _finite_losses(partial, "partial losses"), _finite_losses(final, "final losses")
    if early.size != late.size:
        raise InputError(f"rank agreement: {early.size} partial and {late.size} final losses; give both of each proxy")
    if early.size < 3 or np.ptp(early) == 0.0 or np.ptp(late) == 0.0:
        return None
    return float(np.asarray(spearmanr(early, late))[0])


def agreement(
    curve_losses: Mapping[float, Mapping[str, ArrayLike]], final: Mapping[str, ArrayLike]
) -> dict[str, dict[float, float | None]]:
    """``rank_agreement`` per task and share of the tokens; ``curve_losses``: share → task → [n], ``final``: task → [n].

    Raises:
        InputError: other tasks at a share than at the end, or as ``rank_agreement``.
    """
    for share, losses in curve_losses.items():
        _require_tasks(losses, final, f"losses at the share {share}")
    return {
        task: {share: rank_agreement(curve_losses[share][task], late) for share in sorted(curve_losses)}
        for task, late in final.items()
    }


@dataclass(frozen=True)
class Forecast:
    """The final loss of a task as a line in its loss at a rung, by least squares over the pilot.

    ``error``: standard deviation of the final loss of a pilot proxy around the line through the others (root mean
    square over the pilot), in units of the loss.
    """

    intercept: float
    slope: float
    error: float

    @classmethod
    def fit(cls, partial: Array, final: Array) -> Self:
        """The line through losses [n] at a rung and at the end; level where those at the rung have no spread."""
        from scipy.stats import linregress

        n, level = final.size, float(final.mean())
        around_others = (final - level) * n / (n - 1)  # what is left where the others have no slope
        if not _has_spread(partial):
            return cls(level, 0.0, _root_mean_square(around_others))
        slope, intercept = np.asarray(linregress(partial, final))[:2].tolist()
        residual = final - (intercept + slope * partial)
        from_mean = (partial - partial.mean()) ** 2
        remaining = 1.0 - 1.0 / n - from_mean / from_mean.sum()  # 1 - leverage
        alone = remaining < _ALONE
        left_out = np.where(alone, around_others, residual / np.where(alone, 1.0, remaining))
        return cls(intercept, slope, _root_mean_square(left_out))


@dataclass(frozen=True)
class Rung:
    """A share of the tokens at which proxies may be stopped, with what the pilot showed there.

    ``agreement``: Spearman's correlation of the objective here with that at the end, None where there is none;
    ``threshold``: the objective above which a proxy is stopped, None where the rung is not trusted; ``objective``:
    standardised by the pilot's losses at this share; ``forecasts``: of each task's final loss.
    """

    share: float
    agreement: float | None
    threshold: float | None
    objective: Objective
    forecasts: dict[str, Forecast]


@dataclass(frozen=True)
class HalvingRule:
    """Which proxies to stop, and where; fitted on ``pilots`` proxies that were trained in full.

    A rung stops proxies only if its ``agreement`` is at least ``trusted``. At the i-th of those rungs (from 1) a proxy
    stays if its objective is among the lowest ``keep``**i of the pilot's there. All rungs are kept, by ascending share.

    Raises:
        InputError: ``keep`` outside (0, 1), ``trusted`` outside [0, 1], no rung, or shares not ascending in (0, 1).
    """

    keep: float
    trusted: float
    pilots: int
    rungs: tuple[Rung, ...]

    def __post_init__(self) -> None:
        _require_options(self.keep, self.trusted, [rung.share for rung in self.rungs])

    @classmethod
    def fit(
        cls,
        at: Mapping[float, Mapping[str, ArrayLike]],
        final: Mapping[str, ArrayLike],
        weights: Mapping[str, float] | None = None,
        keep: float = 0.5,
        trusted: float = 0.8,
    ) -> Self:
        """The rule of a pilot: ``at`` has its losses before the end, share → task → [n], ``final`` task → [n].

        ``weights`` of the tasks are scaled to sum 1; without them all count equally. A task whose losses at a rung are
        all equal counts for nothing there.

        Raises:
            InputError: fewer than 8 pilot proxies, other tasks or lengths at a rung than at the end, losses that are
                not finite, weights as refused by ``Objective.of``, or as ``HalvingRule``.
        """
        shares = sorted(at)
        _require_options(keep, trusted, shares)
        late = _pilot_losses(final, final, "final losses of the pilot")
        last = _values(_objective(late, weights), late)
        rungs, stage = [], 0
        for share in shares:
            early = _pilot_losses(at[share], late, f"losses of the pilot at the share {share}")
            objective = _objective(early, weights)
            values = _values(objective, early)
            found, threshold = rank_agreement(values, last), None
            if found is not None and found >= trusted:
                stage += 1
                # Weibull's quantile: a new θ is below the k-th of n pilot proxies with probability k / (n + 1).
                threshold = float(np.quantile(values, keep**stage, method="weibull"))
            forecasts = {task: Forecast.fit(early[task], late[task]) for task in late}
            rungs.append(Rung(float(share), found, threshold, objective, forecasts))
        return cls(float(keep), float(trusted), last.size, tuple(rungs))

    @property
    def expected_cost(self) -> float:
        """The share of all tokens that proxies are trained on if ``keep``**i of them pass the i-th trusted rung.

        That is where the rungs agree with each other; where they do not, more are stopped and the cost is lower.
        """
        shares = [0.0, *(rung.share for rung in self.rungs if rung.threshold is not None), 1.0]
        return float(np.diff(shares) @ self.keep ** np.arange(len(shares) - 1))

    def stops(self, share: float, losses: Mapping[str, float]) -> bool:
        """Whether a proxy with these losses (task → loss) after this share of its tokens is to be stopped.

        Raises:
            InputError: at a rung, other tasks than the pilot's or losses that are not finite.
        """
        rung = self._rung(share)
        if rung is None:
            return False
        found = _proxy_losses(rung, losses)
        return rung.threshold is not None and float(rung.objective.value(found)) > rung.threshold

    def expected(self, share: float, losses: Mapping[str, float]) -> dict[str, float]:
        """The final loss of each task that is expected of a proxy with these losses at a rung, trusted or not.

        Raises:
            InputError: a share that is no rung, other tasks than the pilot's, or losses that are not finite.
        """
        rung = self._rung(share)
        if rung is None:
            known = ", ".join(str(each.share) for each in self.rungs)
            raise InputError(f"halving: the share {share} is no rung; give one of {known}")
        found = _proxy_losses(rung, losses)
        return {task: line.intercept + line.slope * float(found[task]) for task, line in rung.forecasts.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON."""
        return asdict(self) | {"rungs": [asdict(rung) for rung in self.rungs]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``.

        Raises:
            InputError: content that is no halving rule.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_json(json.dumps(content, allow_nan=False), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            fault, cause = f"{'.'.join(map(str, first['loc']))}: {first['msg']}", error
        except (TypeError, ValueError, InputError) as error:
            fault, cause = str(error), error
        raise InputError(f"not a halving rule ({fault}); give what HalvingRule.to_dict wrote") from cause

    def _rung(self, share: float) -> Rung | None:
        return next((rung for rung in self.rungs if abs(rung.share - share) < _SAME_SHARE), None)


def _require_options(keep: float, trusted: float, shares: Sequence[float]) -> None:
    if not 0 < keep < 1:
        raise InputError(f"halving: keep {keep}; give a share in (0, 1)")
    if not 0 <= trusted <= 1:
        raise InputError(f"halving: trusted {trusted}; give a rank correlation in [0, 1]")
    steps = np.diff([0.0, *shares, 1.0])
    if not len(shares) or not (steps >= _SAME_SHARE).all():
        raise InputError(f"halving: shares {list(shares)}; give different shares of the tokens in (0, 1), ascending")


def _require_tasks(found: Mapping[str, Any], expected: Mapping[str, Any], name: str) -> None:
    if set(found) != set(expected):
        raise InputError(f"{name}: tasks {sorted(found)}; give losses of {', '.join(sorted(expected))}")


def _finite_losses(losses: ArrayLike, name: str) -> Array:
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1:
        raise InputError(f"{name}: shape {values.shape}; give one loss per proxy")
    if (bad := ~np.isfinite(values)).any():
        rows = np.flatnonzero(bad)[:5].tolist()
        raise InputError(f"{name}: {int(bad.sum())} are not finite, rows {rows}; leave failed proxies out")
    return values


def _pilot_losses(losses: Mapping[str, ArrayLike], final: Mapping[str, ArrayLike], name: str) -> dict[str, Array]:
    """The losses as float64 [n] per task, in the order and of the length of ``final``."""
    if not final:
        raise InputError(f"{name}: no task; give losses of at least one")
    _require_tasks(losses, final, name)
    checked = {task: _finite_losses(losses[task], f"{name}, {task}") for task in final}
    n = np.size(next(iter(final.values())))
    for task, values in checked.items():
        if values.size != n:
            raise InputError(f"{name}, {task}: {values.size} of {n} proxies; give the losses of all")
    if n < _PILOTS:
        raise InputError(f"{name}: {n} proxies; train at least {_PILOTS} in full to see whether ranks hold")
    return checked


def _proxy_losses(rung: Rung, losses: Mapping[str, float]) -> dict[str, Array]:
    name = f"losses at the share {rung.share}"
    _require_tasks(losses, rung.forecasts, name)
    if bad := [task for task, loss in losses.items() if not math.isfinite(loss)]:
        raise InputError(f"{name}, {bad[0]}: {losses[bad[0]]} is not finite; record the proxy as failed")
    return {task: np.asarray(loss, dtype=np.float64) for task, loss in losses.items()}


def _has_spread(losses: Array) -> bool:
    return bool(losses.std() > _NO_SPREAD * np.abs(losses).max())


def _objective(losses: Mapping[str, Array], weights: Mapping[str, float] | None) -> Objective:
    """The objective of the pilot; tasks without spread, where it does not exist, have weight 0."""
    whole = Objective.of(losses, weights)
    return replace(whole, weights={task: w if _has_spread(losses[task]) else 0.0 for task, w in whole.weights.items()})


def _values(objective: Objective, losses: Mapping[str, Array]) -> Array:
    """The objective [n] of the pilot; 0 where no task has any spread."""
    return objective.value(losses) + np.zeros_like(next(iter(losses.values())))


def _root_mean_square(residuals: Array) -> float:
    return float(np.sqrt(np.mean(residuals**2)))
