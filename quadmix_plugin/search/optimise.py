"""Two searches of a surrogate: the best of many draws, and a trust region around their mean.

The paper averages the best draws. A surrogate is sure of more than it knows far from its rows, and a search that may
go anywhere finds just those places; so the second search stays within a ball of the unit cube around that mean, and
what it minimises is the prediction plus its uncertainty.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.search.spaces import SearchSpace
from quadmix_plugin.search.surrogate import Surrogate

Array = NDArray[np.float64]

_POPULATION = 24
_STILL = 40  # generations without gain end a search


@dataclass(frozen=True)
class TrustRegion:
    """How far and how boldly to search.

    ``radius``: of the ball, as a share of the distance between the middle of the cube and a uniform point of it;
    ``pessimism``: standard deviations that are added to a prediction; ``evaluations``: predictions at most.
    """

    radius: float = 0.2
    pessimism: float = 1.0
    evaluations: int = 6000


@dataclass(frozen=True, eq=False)
class Draws:
    """Predictions of all draws: ``value`` [n] infinite where unusable, ``losses`` task → [n], and the best of them.

    ``numbers`` [k] and ``points`` [k, w]: the ``top`` draws of lowest value, best first; ``paper_numbers`` and
    ``paper_points``: those by the value of the second surrogate.
    """

    value: Array
    losses: dict[str, Array]
    numbers: NDArray[np.int64]
    points: Array
    paper_numbers: NDArray[np.int64]
    paper_points: Array

    @property
    def usable(self) -> NDArray[np.bool_]:
        """The draws that select anything [n]."""
        return np.isfinite(self.value)


def predict_draws(
    space: SearchSpace,
    surrogate: Surrogate,
    paper: Surrogate | None,
    n: int,
    top: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Draws:
    """Draws ``n`` points and keeps the ``top`` best of each surrogate; features are made once for both.

    Raises:
        InputError: no draw can be used.
    """
    values: list[Array] = []
    losses: dict[str, list[Array]] = {task: [] for task in surrogate.regressors}
    ours, theirs = _Best(top), _Best(top)
    for start, points in space.draw(n, seed):
        x = space.features(points)
        usable = np.isfinite(x).all(axis=1)
        predicted = {task: np.full(len(x), np.nan) for task in losses}
        if usable.any():
            for task, loss in surrogate.losses(x[usable]).items():
                predicted[task][usable] = loss
        value = np.where(usable, surrogate.objective.value(predicted), np.inf)
        values.append(value)
        for task, loss in predicted.items():
            losses[task].append(loss)
        ours.add(start, value, points)
        if paper is not None:
            theirs.add(start, paper.value(x), points)
        progress(start + len(points))
    value = np.concatenate(values)
    if not np.isfinite(value).any():
        raise InputError(f"search: none of {n} draws {space.remedy}")
    merged = {task: np.concatenate(parts) for task, parts in losses.items()}
    return Draws(value, merged, ours.numbers, ours.points, theirs.numbers, theirs.points)


class _Best:
    """The points of lowest finite value until now; of equal ones the first."""

    def __init__(self, top: int):
        self._top = top
        self.values, self.numbers, self.points = np.empty(0), np.empty(0, np.int64), np.empty((0, 0))

    def add(self, start: int, value: Array, points: Array) -> None:
        values = np.concatenate([self.values, value])
        numbers = np.concatenate([self.numbers, np.arange(start, start + len(value))])
        everything = np.concatenate([self.points, points]) if self.points.size else points
        keep = np.argsort(values, kind="stable")[: self._top]
        keep = keep[np.isfinite(values[keep])]
        self.values, self.numbers, self.points = values[keep], numbers[keep], everything[keep]


def refine(
    space: SearchSpace, surrogate: Surrogate, start: Array, settings: TrustRegion = TrustRegion(), seed: int = 0
) -> Array:
    """The best point [w] of a ball around ``start`` [w], by separable CMA-ES; ``start`` where nothing is better.

    The ball is one of places in the cube; a space may move the point of a place, such as to a budget.
    """
    from cmaes import SepCMA

    centre = space.to_unit(start[None])[0]
    dimensions = centre.size
    radius = settings.radius * np.sqrt(dimensions / 12)

    def judged(points: Array) -> Array:
        value, sd = surrogate.value_with_sd(space.features(points))
        return np.where(np.isfinite(value), value + settings.pessimism * sd, _FAR)

    def cost(unit: Array) -> Array:
        outside = np.maximum(np.linalg.norm(unit - centre, axis=1) / radius - 1.0, 0.0)
        return judged(space.from_unit(unit)) + _FAR * outside

    bounds = np.stack([np.zeros(dimensions), np.ones(dimensions)], axis=1)
    optimiser = SepCMA(
        mean=np.clip(centre, 1e-6, 1 - 1e-6),
        sigma=radius / np.sqrt(dimensions),
        bounds=bounds,
        seed=seed % 2**32,
        population_size=_POPULATION,
    )
    begun = float(judged(start[None])[0])
    best, lowest, still = centre, begun, 0
    for _ in range(settings.evaluations // _POPULATION):
        unit = np.array([optimiser.ask() for _ in range(_POPULATION)])
        costs = cost(unit)
        optimiser.tell(list(zip(unit, costs.tolist(), strict=True)))
        first = int(np.argmin(costs))
        still = 0 if costs[first] < lowest - 1e-6 else still + 1
        if costs[first] < lowest:
            best, lowest = unit[first], costs[first]
        if still >= _STILL or optimiser.should_stop():
            break
    return start if lowest >= begun else space.from_unit(best[None])[0]


_FAR = 100.0  # in standard deviations of the objective; finite, so that ranks among bad points remain


def pareto_front(losses: Array) -> NDArray[np.intp]:
    """Rows of ``losses`` [n, tasks] than which no other is as low in every task and lower in one."""
    order = np.lexsort(losses.T[::-1])
    front: list[int] = []
    kept = np.empty((0, losses.shape[1]))
    for row in order:
        if not np.isfinite(losses[row]).all():
            continue
        beaten = ((kept <= losses[row]).all(axis=1) & (kept < losses[row]).any(axis=1)).any()
        if not beaten:
            front.append(int(row))
            kept = np.concatenate([kept, losses[row][None]])
    return np.array(sorted(front), dtype=np.intp)
