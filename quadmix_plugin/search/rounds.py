"""The next θ to train, from those trained before: most where the loss should be low, some where little is known.

Half are predicted best, a quarter have the lowest lower confidence bound, an eighth lie far from everything among the
better draws, an eighth are drawn by Algorithm 1 as they come (so that the rows still cover the space).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.parameters import ParameterSpace
from quadmix_plugin.search.evaluation import require_losses
from quadmix_plugin.search.features import FeatureMap
from quadmix_plugin.search.objective import Objective
from quadmix_plugin.search.optimise import TrustRegion, refine
from quadmix_plugin.search.regressors import Regressor
from quadmix_plugin.search.spaces import PAPER_SPACE, ThetaSpace
from quadmix_plugin.search.surrogate import Surrogate
from quadmix_plugin.search.token_constraint import TokenConstraint

Array = NDArray[np.float64]

_DRAWS = 16_384
_NEAR = 2_048  # points of the trust region
_TOP = 10
_BOLD = 2.0  # standard deviations below the prediction
_BETTER = 0.2  # share of the candidates that diverse ones are taken from
_SHARES = (("lcb", 0.25), ("diverse", 0.125), ("random", 0.125))


@dataclass(frozen=True, eq=False)
class Batch:
    """θ of the next round as rows ``vectors`` [n, (N + 4)·M], and why each was chosen."""

    vectors: Array
    reasons: tuple[str, ...]


def next_round(
    n: int,
    vectors: Array,
    losses: Mapping[str, Array],
    columns: FeatureMap,
    make: Callable[[], Regressor],
    *,
    weights: Mapping[str, float] | None = None,
    space: ParameterSpace = PAPER_SPACE,
    excluded: tuple[int, ...] = (),
    constraint: TokenConstraint | None = None,
    seed: int = 0,
) -> Batch:
    """Chooses ``n`` θ from what the trained ``vectors`` [T, w] and their ``losses`` (task → [T]) teach.

    Raises:
        InputError: losses that cannot be learned from, θ of another corpus, or a budget that no draw reaches.
    """
    real = require_losses(losses, len(vectors))
    theta = ThetaSpace(columns, space, excluded, constraint)
    surrogate = Surrogate.fit(make, theta.features(vectors), real, Objective.of(real, weights), seed=seed)
    drawn = np.concatenate([points for _, points in theta.draw(_DRAWS, seed)])
    value = surrogate.value(theta.features(drawn))
    top = drawn[np.argsort(value, kind="stable")[:_TOP]]
    best = refine(theta, surrogate, theta.mean(top, "unit"), TrustRegion(), seed)
    near = theta.from_unit(_around(theta.to_unit(best[None])[0], np.random.default_rng([seed, 1])))
    pool = np.concatenate([best[None], near, drawn])
    mean, sd = surrogate.value_with_sd(theta.features(pool))
    chooser = _Chooser(theta.to_unit(pool), theta.to_unit(vectors))
    counts = {reason: int(n * share) for reason, share in _SHARES}
    counts = {"best": n - sum(counts.values()), **counts}
    rows, reasons = [], []
    for reason, count in counts.items():
        chosen = chooser.choose(reason, count, mean, sd, first_draw=1 + len(near))
        rows += chosen
        reasons += [reason] * len(chosen)
    return Batch(pool[rows], tuple(reasons))


def _around(centre: Array, rng: np.random.Generator) -> Array:
    """Points of the trust region, denser towards its centre."""
    step = rng.standard_normal((_NEAR, centre.size))
    step /= np.linalg.norm(step, axis=1, keepdims=True)
    radius = TrustRegion().radius * np.sqrt(centre.size / 12) * rng.random((_NEAR, 1))
    return np.clip(centre + radius * step, 0.0, 1.0)


class _Chooser:
    """Takes points one after the other, none twice."""

    def __init__(self, unit: Array, trained: Array):
        self._unit, self._trained = unit, trained
        self._taken: list[int] = []

    def choose(self, reason: str, count: int, mean: Array, sd: Array, first_draw: int) -> list[int]:
        if reason == "diverse":
            return self._far(count, mean)
        order = {
            "best": np.argsort(mean, kind="stable"),
            "lcb": np.argsort(mean - _BOLD * sd, kind="stable"),
            "random": np.arange(first_draw, len(mean)),
        }[reason]
        taken = set(self._taken)
        free = [int(row) for row in order if row not in taken and np.isfinite(mean[row])]
        self._taken += free[:count]
        return free[:count]

    def _far(self, count: int, mean: Array) -> list[int]:
        """The farthest from all that is trained or taken, one by one, among the better points."""
        taken, chosen = set(self._taken), []
        better = [int(row) for row in np.argsort(mean, kind="stable")[: int(_BETTER * len(mean))] if row not in taken]
        known = np.concatenate([self._trained, self._unit[self._taken]])
        distance = np.min([np.linalg.norm(self._unit[better] - place, axis=1) for place in known], axis=0)
        for _ in range(count):
            farthest = int(np.argmax(distance))
            chosen.append(better[farthest])
            here = np.linalg.norm(self._unit[better] - self._unit[better[farthest]], axis=1)
            distance = np.minimum(distance, here)
        self._taken += chosen
        return chosen
