"""θ*: the paper's search. Draw many θ by Algorithm 1, predict their losses, average the best.

The prediction of θ* comes with what it must be judged against: the best draws, the spread of all draws, and the
best proxy that was really trained. How good the regressor is, is measured in ``evaluation``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters, ParameterSpace, average_parameters, sample_parameter_vectors
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.search.evaluation import require_losses
from quadmix_plugin.search.features import SIZE, FeatureMap, Kind
from quadmix_plugin.search.objective import Objective
from quadmix_plugin.search.regressors import Regressor

Array = NDArray[np.float64]

PAPER_SPACE = ParameterSpace()

_BLOCK = 4096
_SEARCH_STREAM = 0x5EA4C4  # keeps the draws of a search apart from those of the proxies, whatever the seeds
_QUANTILES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Candidate:
    """One θ with its losses per task and its objective: predicted for a draw, measured for a proxy."""

    number: int
    theta: Parameters
    losses: dict[str, float]
    objective: float

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON, without θ."""
        return {"number": self.number, "losses": self.losses, "objective": self.objective}


@dataclass(frozen=True)
class Proposal:
    """θ* and what it is to be judged against.

    ``losses`` and ``objective_value``: predicted for ``theta``; ``top``: the averaged draws, best first, predicted;
    ``quantiles``: of the predicted objective over all draws, share → value; ``draws``: how many; ``empty``: how many
    of them select at most one token and were left out (0 for ``features="theta"``, which cannot tell);
    ``best_proxy``: the proxy with the lowest measured objective, and ``best_proxy_predicted`` what the regressor,
    which saw it, says of it; ``regressors``: fitted on all proxies, one per task, on the losses as they are.
    """

    theta: Parameters
    losses: dict[str, float]
    objective_value: float
    top: tuple[Candidate, ...]
    quantiles: dict[float, float]
    draws: int
    empty: int
    best_proxy: Candidate
    best_proxy_predicted: Candidate
    objective: Objective
    regressors: dict[str, Regressor]

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON: θ* is in ``theta``, the regressors are left out."""
        return {
            "theta": self.theta.to_dict(),
            "losses": self.losses,
            "objective_value": self.objective_value,
            "top": [each.to_dict() for each in self.top],
            "quantiles": {str(share): value for share, value in self.quantiles.items()},
            "draws": self.draws,
            "empty": self.empty,
            "best_proxy": self.best_proxy.to_dict(),
            "best_proxy_predicted": self.best_proxy_predicted.to_dict(),
            "objective": asdict(self.objective),
        }


def propose(
    thetas: Sequence[Parameters],
    losses: Mapping[str, ArrayLike],
    table: ScoreTable,
    normalised: ArrayLike,
    make: Callable[[], Regressor],
    *,
    weights: Mapping[str, float] | None = None,
    features: Kind = "theta+derived",
    space: ParameterSpace = PAPER_SPACE,
    draws: int = 100_000,
    top: int = 10,
    average: Literal["unit", "paper"] = "unit",
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Proposal:
    """The paper's search (§3.4): predict ``draws`` θ of Algorithm 1 and average the ``top`` with the lowest objective.

    ``thetas`` and ``losses`` (task → [T]) are the trained proxies, one row per θ; ``table`` and ``normalised`` [n, N]
    the corpus over which derived features are computed; ``make`` returns a new regressor; ``weights`` as in
    ``Objective``; ``progress`` is called with the number of draws done. The draws never repeat those of the proxies,
    even under the same ``seed``. Memory: blocks of 4,096 draws, and 8 bytes a draw.

    Raises:
        InputError: losses that are not finite or constant, θ of another corpus, fewer draws than ``top``, no draw
            that selects anything, or a regressor whose predictions are not finite.
    """
    if not 1 <= top <= draws:
        raise InputError(f"search: top {top} of {draws} draws; give 1 <= top <= draws")
    columns = FeatureMap.of(table, normalised, features)
    real = require_losses(losses, len(thetas))
    objective = Objective.of(real, weights)
    x = columns.features(thetas)
    surrogate = _Surrogate(columns, {task: _fit(make(), x, y) for task, y in real.items()}, objective)
    values, numbers, vectors = _best_draws(surrogate, _draw(draws, columns, space, seed), top, progress)
    useful = np.isfinite(values)
    if not useful.any():
        raise InputError(f"search: none of {draws} draws selects a token of this corpus; widen space.omega_max")

    keep = useful[numbers]
    candidates = surrogate.candidates(vectors[keep], numbers[keep])
    theta = average_parameters([candidate.theta for candidate in candidates], average)
    of_theta = surrogate.candidates(theta.to_vector()[None], [0])[0]
    measured = objective.value(real)
    row = int(np.argmin(measured))
    return Proposal(
        theta=theta,
        losses=of_theta.losses,
        objective_value=of_theta.objective,
        top=tuple(candidates),
        quantiles={share: float(np.quantile(values[useful], share)) for share in _QUANTILES},
        draws=draws,
        empty=int((~useful).sum()),
        best_proxy=Candidate(row, thetas[row], {task: float(y[row]) for task, y in real.items()}, float(measured[row])),
        best_proxy_predicted=surrogate.candidates(columns.vectors([thetas[row]]), [row])[0],
        objective=objective,
        regressors=surrogate.regressors,
    )


@dataclass(frozen=True)
class _Surrogate:
    """From θ to predicted losses: features, then one regressor per task."""

    columns: FeatureMap
    regressors: dict[str, Regressor]
    objective: Objective

    def objective_of(self, vectors: Array) -> Array:
        """The predicted objective [n]; infinite where nothing is selected."""
        x = self.columns.features(vectors)
        value = self.objective.value({task: self.regressors[task].predict(x) for task in self.objective.tasks})
        if not np.isfinite(value).all():
            raise InputError("search: the regressor predicts losses that are not finite; check its options")
        if self.columns.kind == "theta":
            return value
        return np.where(x[:, self.columns.names().index(SIZE)] <= 0.0, np.inf, value)

    def candidates(self, vectors: Array, numbers: ArrayLike) -> list[Candidate]:
        """θ with the predicted losses of all tasks, those of weight 0 too."""
        x = self.columns.features(vectors)
        losses = {task: regressor.predict(x) for task, regressor in self.regressors.items()}
        objective = self.objective.value(losses)
        return [
            Candidate(
                int(number),
                self.columns.parameters(vectors[i]),
                {task: float(y[i]) for task, y in losses.items()},
                float(objective[i]),
            )
            for i, number in enumerate(np.asarray(numbers))
        ]


def _best_draws(
    surrogate: _Surrogate, blocks: Iterator[tuple[int, Array]], top: int, progress: Callable[[int], None]
) -> tuple[Array, NDArray[np.int64], Array]:
    """The predicted objective of all draws, and number and θ of the ``top`` best, best first."""
    values, numbers, vectors = np.empty(0), np.empty(0, np.int64), np.empty((0, surrogate.columns.width))
    for start, block in blocks:
        values = np.concatenate([values, surrogate.objective_of(block)])
        numbers = np.concatenate([numbers, np.arange(start, values.size)])
        keep = np.argsort(values[numbers], kind="stable")[:top]  # of equal draws the first
        numbers, vectors = numbers[keep], np.concatenate([vectors, block])[keep]
        progress(values.size)
    return values, numbers, vectors


def _fit(regressor: Regressor, x: Array, y: Array) -> Regressor:
    regressor.fit(x, y)
    return regressor


def _draw(n: int, columns: FeatureMap, space: ParameterSpace, seed: int) -> Iterator[tuple[int, Array]]:
    """Draws [_BLOCK, ...] with the number of their first; a longer search begins with the draws of a shorter one."""
    for block, start in enumerate(range(0, n, _BLOCK)):
        entropy = np.random.SeedSequence([_SEARCH_STREAM, seed, block]).generate_state(2, np.uint64)
        size = min(_BLOCK, n - start)
        scorers, domains = len(columns.scorers), len(columns.domains)
        yield start, sample_parameter_vectors(size, scorers, domains, int(entropy[0]), space=space)
