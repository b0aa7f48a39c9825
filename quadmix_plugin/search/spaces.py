"""Where a search looks: parameters of QuaDMix, mixtures, or any box of numbers.

A space draws points as its prior says, makes features of them, and maps them to the unit cube, in which a trust
region is a ball. A point is a row of numbers; what it means is known here alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import (
    Parameters,
    ParameterSpace,
    average_parameters,
    sample_parameter_vectors,
)
from quadmix_plugin.search.features import SIZE, FeatureMap
from quadmix_plugin.search.token_constraint import TokenConstraint

Array = NDArray[np.float64]
Average = Literal["unit", "paper"]

PAPER_SPACE = ParameterSpace()

_BLOCK = 4096
_SEARCH_STREAM = 0x5EA4C4  # keeps the draws of a search apart from those of the proxies, whatever the seeds
_LEAST = 1e-9  # of a coordinate in the cube, so that weights can be normalised


class SearchSpace(Protocol):
    """What a search needs to know of its points, rows [k, w]."""

    @property
    def remedy(self) -> str:
        """What to change where no draw can be used."""
        ...

    def draw(self, n: int, seed: int) -> Iterator[tuple[int, Array]]:
        """``n`` points of the prior, in blocks with the number of their first."""
        ...

    def features(self, points: Array) -> Array:
        """What a regressor sees [k, f]; a row of NaN is a point that cannot be used."""
        ...

    def to_unit(self, points: Array) -> Array:
        """The points in the unit cube [k, d]."""
        ...

    def from_unit(self, unit: Array) -> Array:
        """The inverse of ``to_unit``, which takes any place of the cube."""
        ...

    def mean(self, points: Array, average: Average) -> Array:
        """One point [w] in the middle of several."""
        ...

    def describe(self, point: Array) -> Any:
        """A point as plain content for JSON."""
        ...


@dataclass(frozen=True, eq=False)
class ThetaSpace:
    """Parameters θ of one corpus under Algorithm 1.

    ``excluded``: columns of scorers whose weight is 0 everywhere; ``constraint``: the token budget that every θ is
    scaled to.
    """

    columns: FeatureMap
    space: ParameterSpace = PAPER_SPACE
    excluded: tuple[int, ...] = ()
    constraint: TokenConstraint | None = None

    def __post_init__(self) -> None:
        if len(set(self.excluded)) >= len(self.columns.scorers):
            raise InputError("search.exclude_scorers: every scorer is excluded; leave at least one")

    @property
    def remedy(self) -> str:
        """What to change where no draw can be used."""
        return (
            "selects a token of this corpus"
            + (" at this budget" if self.constraint else "")
            + ("; widen space.omega_max" if self.constraint is None else "; change select.target_tokens")
        )

    def draw(self, n: int, seed: int) -> Iterator[tuple[int, Array]]:
        """θ of Algorithm 1; a longer search begins with the draws of a shorter one."""
        scorers, domains = len(self.columns.scorers), len(self.columns.domains)
        for start, size, state in _streams(n, seed):
            vectors = sample_parameter_vectors(size, scorers, domains, state, space=self.space)
            yield start, self._constrained(vectors)

    def features(self, points: Array) -> Array:
        """As ``FeatureMap``; NaN where nothing is selected, or the budget is out of reach."""
        x = np.full((len(points), len(self.columns.names())), np.nan)
        usable = np.isfinite(points).all(axis=1)
        if usable.any():
            x[usable] = self.columns.features(points[usable])
        if self.columns.kind != "theta":
            x[x[:, self.columns.names().index(SIZE)] <= 0.0] = np.nan
        return x

    def to_unit(self, points: Array) -> Array:
        """The cube of Algorithm 1, α of each domain as its ratio to the largest.

        Where a budget has widened windows beyond ``omega_max``, ω keep their ratios and the widest is at 1.
        """
        alpha, lam, omega, eta, epsilon = self._split(points)
        ratio = alpha / alpha.max(axis=2, keepdims=True)
        decades = np.log(self.space.lam_max / self.space.lam_min)
        rest = (
            np.log(np.maximum(lam, self.space.lam_min) / self.space.lam_min) / (decades or 1.0),
            omega / np.maximum(omega.max(axis=1, keepdims=True), self.space.omega_max),
            eta / (self.space.eta_max or 1.0),
            epsilon / (self.space.epsilon_max or 1.0),
        )
        return np.clip(np.concatenate([ratio.reshape(len(points), -1), *rest], axis=1), 0.0, 1.0)

    def from_unit(self, unit: Array) -> Array:
        """θ of a place in the cube, scaled to the budget."""
        alpha, lam, omega, eta, epsilon = self._split(np.clip(unit, _LEAST, 1.0))
        weights = alpha / alpha.sum(axis=2, keepdims=True)
        columns = (
            weights.reshape(len(unit), -1),
            self.space.lam_min * (self.space.lam_max / self.space.lam_min) ** lam,
            self.space.omega_max * omega,
            self.space.eta_max * eta,
            self.space.epsilon_max * epsilon,
        )
        return self._constrained(np.concatenate(columns, axis=1))

    def mean(self, points: Array, average: Average) -> Array:
        """As ``average_parameters``, scaled to the budget."""
        mean = average_parameters([self.parameters(point) for point in points], average).to_vector()
        return self._constrained(mean[None])[0]

    def describe(self, point: Array) -> dict[str, Any]:
        """θ as in ``theta.json``."""
        return self.parameters(point).to_dict()

    def parameters(self, point: Array) -> Parameters:
        """A point as named parameters."""
        return self.columns.parameters(point)

    def _split(self, points: Array) -> tuple[Array, ...]:
        n_domains, n_scorers = len(self.columns.domains), len(self.columns.scorers)
        alpha = points[:, : n_domains * n_scorers].reshape(-1, n_domains, n_scorers)
        rest = points[:, n_domains * n_scorers :].reshape(-1, 4, n_domains)
        return alpha, *(rest[:, i] for i in range(4))

    def _constrained(self, points: Array) -> Array:
        points = points.copy()
        if self.excluded:
            alpha = self._split(points)[0]
            alpha[:, :, list(self.excluded)] = 0.0
            total = alpha.sum(axis=2, keepdims=True)
            kept = [n for n in range(alpha.shape[2]) if n not in self.excluded]
            even = np.zeros(alpha.shape[2])
            even[kept] = 1 / len(kept)
            alpha[:] = np.where(total > 0, alpha / np.where(total > 0, total, 1.0), even)
        if self.constraint is not None:
            points = self.constraint.apply(points, len(self.columns.scorers))
        return points


@dataclass(frozen=True, eq=False)
class MixtureSpace:
    """Shares that sum to 1, drawn from Dirichlet(``prior``), which sums to ``prior.sum()``; RegMix draws so.

    ``legacy``: NumPy's old random stream, for results that were published with it.
    """

    names: tuple[str, ...]
    prior: Array
    legacy: bool = False
    remedy: str = "is a mixture"

    def draw(self, n: int, seed: int) -> Iterator[tuple[int, Array]]:
        """Mixtures of the prior."""
        stream = np.random.RandomState(seed) if self.legacy else np.random.default_rng(seed)
        for start in range(0, n, _BLOCK):
            yield start, stream.dirichlet(self.prior, min(_BLOCK, n - start))

    def features(self, points: Array) -> Array:
        """The shares themselves."""
        return points

    def to_unit(self, points: Array) -> Array:
        """Each share as its ratio to the largest."""
        return points / points.max(axis=1, keepdims=True)

    def from_unit(self, unit: Array) -> Array:
        """Shares in the ratio of the coordinates."""
        weights = np.clip(unit, 0.0, 1.0)
        weights = np.where(weights.max(axis=1, keepdims=True) > 0, weights, 1.0)
        return weights / weights.sum(axis=1, keepdims=True)

    def mean(self, points: Array, average: Average) -> Array:
        """The arithmetic mean."""
        return points.mean(axis=0)

    def describe(self, point: Array) -> dict[str, float]:
        """Name → share."""
        return dict(zip(self.names, map(float, point), strict=True))


@dataclass(frozen=True, eq=False)
class BoxSpace:
    """Any numbers, each uniform between ``low`` and ``high``."""

    names: tuple[str, ...]
    low: Array
    high: Array
    remedy: str = "is inside the box"

    def draw(self, n: int, seed: int) -> Iterator[tuple[int, Array]]:
        """Points of the box."""
        rng = np.random.default_rng(seed)
        for start in range(0, n, _BLOCK):
            yield start, self.from_unit(rng.random((min(_BLOCK, n - start), self.low.size)))

    def features(self, points: Array) -> Array:
        """The numbers themselves."""
        return points

    def to_unit(self, points: Array) -> Array:
        """Linear; a number that does not vary is at 0."""
        width = self.high - self.low
        return np.where(width > 0, (points - self.low) / np.where(width > 0, width, 1.0), 0.0)

    def from_unit(self, unit: Array) -> Array:
        """The inverse."""
        return self.low + np.clip(unit, 0.0, 1.0) * (self.high - self.low)

    def mean(self, points: Array, average: Average) -> Array:
        """The arithmetic mean."""
        return points.mean(axis=0)

    def describe(self, point: Array) -> dict[str, float]:
        """Name → number."""
        return dict(zip(self.names, map(float, point), strict=True))


def _streams(n: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """Start, size and seed of every block of ``n`` draws."""
    for block, start in enumerate(range(0, n, _BLOCK)):
        entropy = np.random.SeedSequence([_SEARCH_STREAM, seed, block]).generate_state(2, np.uint64)
        yield start, min(_BLOCK, n - start), int(entropy[0])


def mixture_or_box(names: Sequence[str], rows: ArrayLike, prior: ArrayLike | None = None) -> MixtureSpace | BoxSpace:
    """The space that these rows [n, f] come from: mixtures where each sums to 1, otherwise their box.

    ``prior`` of mixtures sums to 1; without it, the mean of the rows.

    Raises:
        InputError: a prior for rows that are not mixtures, or one that is not positive and as long as a row.
    """
    x = np.asarray(rows, dtype=np.float64)
    if not ((x >= 0).all() and (np.abs(x.sum(axis=1) - 1) < 0.02).all()):  # published tables are rounded
        if prior is not None:
            raise InputError("prior: given for features that are not mixtures (rows that sum to 1); leave it out")
        return BoxSpace(tuple(names), x.min(axis=0), x.max(axis=0))
    weights = x.mean(axis=0) if prior is None else np.asarray(prior, dtype=np.float64)
    if weights.shape != (x.shape[1],) or not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise InputError(f"prior: {weights.tolist()}; give {x.shape[1]} numbers >= 0, one per column of the mixtures")
    weights = np.maximum(weights, 1e-6)
    return MixtureSpace(tuple(names), weights)
