"""θ*: a search of the regressors' predictions, beside what it must be judged against.

The default goes from the mean of the best draws into a trust region (``optimise``); the paper's procedure is the mean
itself, by LightGBM. Both are always computed, and both are held against the best proxy that was really trained. How
good the regressor is, is measured in ``evaluation``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.search.evaluation import require_losses
from quadmix_plugin.search.objective import Objective
from quadmix_plugin.search.optimise import Draws, TrustRegion, pareto_front, predict_draws, refine
from quadmix_plugin.search.regressors import LightGBM, Regressor
from quadmix_plugin.search.spaces import Average, SearchSpace
from quadmix_plugin.search.surrogate import Surrogate

Array = NDArray[np.float64]
Method = Literal["trust_region", "paper"]

_QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class SearchSettings:
    """How θ* is searched for; see ``propose``."""

    method: Method = "trust_region"
    draws: int = 100_000
    top: int = 10
    average: Average = "unit"
    region: TrustRegion = field(default_factory=TrustRegion)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.top <= self.draws:
            raise InputError(f"search: top {self.top} of {self.draws} draws; give 1 <= top <= draws")


@dataclass(frozen=True, eq=False)
class Candidate:
    """One point with its losses per task and its objective: predicted, or measured for a proxy.

    ``sd``: task → standard deviation of what the predicted mean may be off by, for the tasks that count; empty where
    measured, for the averaged draws, and under ``paper``.
    """

    number: int
    point: Array
    losses: dict[str, float]
    objective: float
    sd: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON, without the point."""
        return {"number": self.number, "losses": self.losses, "objective": self.objective, "sd": self.sd}


@dataclass(frozen=True, eq=False)
class Proposal:
    """θ* and what it is to be judged against.

    ``best``: the result of ``method``; ``ways``: every way to it, predicted by the same regressors: ``trust_region``
    (not under ``paper``), ``draws`` (mean of the best draws) and ``paper`` (arithmetic mean of those that LightGBM
    finds best; absent where there are too few rows for it); ``top``: the averaged draws, best first; ``drawn``:
    predictions of all draws; ``front``: numbers of the draws that no other beats in all tasks; ``best_proxy``: the
    proxy of the lowest measured objective, and ``best_proxy_predicted`` what the regressors, which saw it, say of it;
    ``surrogate``: fitted on all proxies.
    """

    space: SearchSpace
    method: Method
    best: Candidate
    ways: dict[str, Candidate]
    top: tuple[Candidate, ...]
    drawn: Draws
    front: NDArray[np.intp]
    best_proxy: Candidate
    best_proxy_predicted: Candidate
    surrogate: Surrogate

    @property
    def theta(self) -> Parameters:
        """θ*, where the space is one of parameters."""
        return self.space.parameters(self.best.point)  # type: ignore[attr-defined]

    @property
    def objective(self) -> Objective:
        """The weighting of the tasks."""
        return self.surrogate.objective

    @property
    def empty(self) -> int:
        """Draws that could not be used: they select at most one token (never so for ``features: theta``)."""
        return int((~self.drawn.usable).sum())

    @property
    def quantiles(self) -> dict[float, float]:
        """Of the predicted objective over the usable draws, share → value."""
        value = self.drawn.value[self.drawn.usable]
        return {share: float(np.quantile(value, share)) for share in _QUANTILES}

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON; the regressors are left out."""
        return {
            "method": self.method,
            "theta": self.space.describe(self.best.point),
            **self.best.to_dict(),
            "ways": {name: each.to_dict() for name, each in self.ways.items()},
            "top": [each.to_dict() for each in self.top],
            "quantiles": {str(share): value for share, value in self.quantiles.items()},
            "draws": self.drawn.value.size,
            "empty": self.empty,
            "best_proxy": self.best_proxy.to_dict(),
            "best_proxy_predicted": self.best_proxy_predicted.to_dict(),
            "objective_of": asdict(self.objective),
        }


def propose(
    space: SearchSpace,
    points: Array,
    losses: Mapping[str, ArrayLike],
    make: Callable[[], Regressor],
    *,
    weights: Mapping[str, float] | None = None,
    settings: SearchSettings = SearchSettings(),
    surrogate: Surrogate | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Proposal:
    """Searches the best point of a space by what ``points`` [T, w] and their ``losses`` (task → [T]) teach.

    ``make`` returns a new regressor; ``weights`` as in ``Objective``; ``surrogate``: one fitted already, in place of
    ``make``; ``progress`` is called with the number of draws done. The draws never repeat those of the proxies, even
    under the same seed.

    Raises:
        InputError: losses that are not finite or constant, fewer draws than ``top``, no draw that can be used, or a
            regressor whose predictions are not finite.
    """
    real = require_losses(losses, len(points))
    objective = Objective.of(real, weights)
    x = space.features(points)
    if (bad := ~np.isfinite(x).all(axis=1)).any():
        raise InputError(
            f"search: rows {np.flatnonzero(bad)[:5].tolist()} of the trained proxies cannot be used here; search under "
            f"the settings that they were trained with"
        )
    refined = settings.method == "trust_region"
    if surrogate is None:
        surrogate = Surrogate.fit(make, x, real, objective, uncertain=refined, seed=settings.seed)
    paper = _by_trees(x, real, objective)
    drawn = predict_draws(space, surrogate, paper, settings.draws, settings.top, settings.seed, progress)
    means = {"draws": space.mean(drawn.points, settings.average)}
    if paper is not None:
        means["paper"] = space.mean(drawn.paper_points, "paper")
    found = dict(means)
    if refined:
        found["trust_region"] = refine(space, surrogate, means["draws"], settings.region, settings.seed)
    ways = {name: _candidates(space, surrogate, point[None], [0], refined)[0] for name, point in found.items()}
    measured = objective.value(real)
    row = int(np.argmin(measured))
    tasks = objective.tasks
    return Proposal(
        space=space,
        method=settings.method,
        best=ways["trust_region" if refined else "draws"],
        ways=ways,
        top=tuple(_candidates(space, surrogate, drawn.points, drawn.numbers, uncertain=False)),
        drawn=drawn,
        front=pareto_front(np.stack([drawn.losses[task] for task in tasks], axis=1)) if len(tasks) > 1 else _NONE,
        best_proxy=Candidate(
            row, points[row], {task: float(y[row]) for task, y in real.items()}, float(measured[row]), {}
        ),
        best_proxy_predicted=_candidates(space, surrogate, points[row][None], [row], refined)[0],
        surrogate=surrogate,
    )


_NONE = np.empty(0, dtype=np.intp)


def _by_trees(x: Array, real: Mapping[str, Array], objective: Objective) -> Surrogate | None:
    """The paper's regressor; None where there are too few rows for it."""
    try:
        return Surrogate.fit(LightGBM, x, real, objective, uncertain=False)
    except InputError:
        return None


def _candidates(
    space: SearchSpace,
    surrogate: Surrogate,
    points: Array,
    numbers: Sequence[int] | NDArray[np.int64],
    uncertain: bool = True,
) -> list[Candidate]:
    """Points with the predicted losses of all tasks, those of weight 0 too."""
    x = space.features(points)
    losses = surrogate.losses(x)
    objective = surrogate.objective.value(losses)
    sd = {task: surrogate.with_sd(task, x)[1] for task in surrogate.objective.tasks if uncertain}
    return [
        Candidate(
            int(number),
            points[i],
            {task: float(y[i]) for task, y in losses.items()},
            float(objective[i]),
            {task: float(s[i]) for task, s in sd.items()},
        )
        for i, number in enumerate(numbers)
    ]
