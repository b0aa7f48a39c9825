"""σ: maps every scorer's raw scores to one scale on which smaller is better.

Fitted once on a corpus, frozen as ``normaliser.json`` and applied anywhere, so that documents added later get
the value they would have had, and old ones keep theirs.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.schema import ScoreTable

Method = Literal["ecdf", "zscore", "minmax"]

_KNOTS = 4096


@dataclass(frozen=True)
class ScorerMap:
    """σ of one scorer as a piecewise linear map: ``value[i]`` at raw score ``knots[i]``, constant outside."""

    scorer: str
    higher_is_better: bool
    knots: tuple[float, ...]
    value: tuple[float, ...]

    def apply(self, raw: ArrayLike) -> NDArray[np.float32]:
        """σ of raw scores [n], smaller = better."""
        scores = np.asarray(raw, dtype=np.float64)
        if not np.isfinite(scores).all():
            bad = int((~np.isfinite(scores)).sum())
            raise InputError(f"score_{self.scorer}: {bad} scores are not finite; repair the scorer or drop them")
        return np.interp(scores, self.knots, self.value).astype(np.float32)


@dataclass(frozen=True)
class Normaliser:
    """σ of all scorers of a corpus.

    ``ecdf``: the share of the corpus' tokens whose document is at least as good, in (0, 1]; one knot for each 4,096th
    of the token mass and one for each value that holds more than that, at which it is exact; elsewhere it is off by
    at most 1/4,096. ``zscore``: standard deviations below the token-weighted mean, on the observed range.
    ``minmax``: 0 for the best observed score, 1 for the worst.
    """

    method: Method
    maps: tuple[ScorerMap, ...]

    @classmethod
    def fit(cls, table: ScoreTable, higher_is_better: dict[str, bool], method: Method = "ecdf") -> Self:
        """Fits σ to a score table; ``higher_is_better`` is each scorer's declared direction.

        Raises:
            InputError: an empty table, an unknown method, or a scorer whose scores are all equal under ``zscore`` or
                ``minmax``, where no scale exists.
        """
        if table.n == 0:
            raise InputError("labels: no documents; nothing to fit the normaliser on")
        if method not in _KNOT_VALUES:
            raise InputError(f"normalise.method: {method!r}; choose one of {', '.join(sorted(_KNOT_VALUES))}")
        maps = []
        for n, scorer in enumerate(table.scorers):
            better = 1.0 if higher_is_better[scorer] else -1.0
            quality, mass = _token_mass(better * table.scores[:, n].astype(np.float64), table.tokens)
            if method != "ecdf" and quality.size == 1:
                raise InputError(
                    f"score_{scorer}: all {table.n} documents have the score {better * quality[0]:.6g}, so {method} "
                    f"has no scale; use normalise.method: ecdf or leave the scorer out"
                )
            at, value = _KNOT_VALUES[method](quality, mass)
            order = np.argsort(better * at)
            knots = tuple((better * at)[order].tolist())
            maps.append(ScorerMap(scorer, higher_is_better[scorer], knots, tuple(value[order].tolist())))
        return cls(method, tuple(maps))

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorers in the order of the columns of ``apply``."""
        return tuple(each.scorer for each in self.maps)

    def apply(self, scores: ArrayLike) -> NDArray[np.float32]:
        """σ of raw scores [n, N] as float32 [n, N], smaller = better; columns in the order of ``scorers``."""
        raw = np.asarray(scores)
        if raw.ndim != 2 or raw.shape[1] != len(self.maps):
            raise InputError(f"scores: shape {raw.shape}; the normaliser was fitted on {', '.join(self.scorers)}")
        return np.stack([each.apply(raw[:, n]) for n, each in enumerate(self.maps)], axis=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain content for ``normaliser.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        fields = [{**each, "knots": tuple(each["knots"]), "value": tuple(each["value"])} for each in content["maps"]]
        return cls(content["method"], tuple(ScorerMap(**each) for each in fields))


def _token_mass(
    quality: NDArray[np.float64], tokens: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distinct qualities from best to worst and the tokens at each."""
    distinct, inverse = np.unique(-quality, return_inverse=True)
    mass = np.zeros(distinct.size, dtype=np.int64)
    np.add.at(mass, inverse, tokens)
    return -distinct, mass


def _ecdf(quality: NDArray[np.float64], mass: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    share = np.cumsum(mass) / mass.sum()
    cell = np.minimum((share * _KNOTS).astype(np.int64), _KNOTS - 1)
    keep = mass * _KNOTS > mass.sum()  # a value that holds more than a cell, whatever follows it there
    keep[[0, -1]] = True
    keep[1:-1] |= cell[1:-1] != cell[2:]  # the last value of every cell
    return quality[keep], share[keep]


def _zscore(quality: NDArray[np.float64], mass: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean = np.average(quality, weights=mass)
    deviation = np.sqrt(np.average((quality - mean) ** 2, weights=mass))
    ends = quality[[0, -1]]
    return ends, (mean - ends) / deviation


def _minmax(quality: NDArray[np.float64], mass: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return quality[[0, -1]], np.array([0.0, 1.0])


_KNOT_VALUES = {"ecdf": _ecdf, "zscore": _zscore, "minmax": _minmax}
