"""σ: maps every scorer's raw scores to one scale on which smaller is better.

Fitted once on a corpus, frozen as ``normaliser.json`` and applied anywhere, so that documents added later get
the value they would have had, and old ones keep theirs. It is fitted from a ``ScoreSketch``, which merges exactly,
so σ is the same however the corpus was cut.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.schema import ScoreTable, score_column
from quadmix_plugin.score_sketch import Cells, ScoreSketch

if TYPE_CHECKING:
    from quadmix_plugin.kernels.normalise import Interpolation

Array = NDArray[np.float64]
Method = Literal["ecdf", "zscore", "minmax"]

_KNOTS = 4096


@dataclass(frozen=True)
class ScorerMap:
    """σ of one scorer as a piecewise linear map: ``value[i]`` at raw score ``knots[i]``, constant outside.

    ``error`` bounds by how much σ of any document that it was fitted on can be off, before rounding to float32: a
    share of the corpus' tokens under ``ecdf``, standard deviations under ``zscore``.
    """

    scorer: str
    higher_is_better: bool
    knots: tuple[float, ...]
    value: tuple[float, ...]
    error: float

    def apply(self, raw: ArrayLike) -> NDArray[np.float32]:
        """σ of raw scores [n], taken as float32; smaller = better.

        Raises:
            InputError: a score that is not finite.
        """
        with np.errstate(over="ignore"):
            scores = np.asarray(raw, dtype=np.float32)
        sigma, bad = self._interpolation(scores)
        if bad:
            raise InputError(
                f"{score_column(self.scorer)}: {bad} scores are not finite; repair the scorer or drop them"
            )
        return sigma

    @cached_property
    def _interpolation(self) -> "Interpolation":
        from quadmix_plugin.kernels.normalise import Interpolation  # numba is slow to import

        return Interpolation.of(np.array(self.knots, dtype=np.float32), np.array(self.value))

    def __getstate__(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Normaliser:
    """σ of all scorers of a corpus.

    ``ecdf``: the share of the corpus' tokens whose document is at least as good, in (0, 1]. It has a knot for each
    4,096th of the token mass (for each cell of the sketch, where there are no more of them), and at both ends of a
    cell that holds more than that. At a knot it is exact; elsewhere it is off by at most the map's ``error``.
    ``zscore``: standard deviations below the token-weighted mean, on the observed range. ``minmax``: 0 for the best
    observed score, 1 for the worst.
    """

    method: Method
    maps: tuple[ScorerMap, ...]

    @classmethod
    def fit(
        cls, documents: ScoreSketch | ScoreTable, higher_is_better: Mapping[str, bool], method: Method = "ecdf"
    ) -> Self:
        """Fits σ to documents; ``higher_is_better`` is each scorer's declared direction.

        Raises:
            InputError: no documents, an unknown method, a scorer without a direction, or one whose scores are all
                (nearly) equal under ``zscore`` or ``minmax``, where no scale exists.
        """
        sketch = ScoreSketch.of_table(documents) if isinstance(documents, ScoreTable) else documents
        if not sketch.n:
            raise InputError("labels: no documents; nothing to fit the normaliser on")
        if method not in _KNOT_VALUES:
            raise InputError(f"normalise.method: {method!r}; choose one of {', '.join(sorted(_KNOT_VALUES))}")
        maps = []
        for scorer, cells in zip(sketch.scorers, sketch.cells, strict=True):
            if scorer not in higher_is_better:
                raise InputError(f"higher_is_better: {scorer!r} is missing; say whether its high scores are good")
            maps.append(_scorer_map(scorer, cells, higher_is_better[scorer], method))
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
        """The inverse of ``to_dict``.

        Raises:
            InputError: content that is no normaliser.
        """
        try:
            fields = [
                {**each, "knots": tuple(each["knots"]), "value": tuple(each["value"])} for each in content["maps"]
            ]
            loaded = cls(content["method"], tuple(ScorerMap(**each) for each in fields))
            fault = next((fault for each in loaded.maps if (fault := _fault(each))), None)
        except (KeyError, TypeError, ValueError) as error:
            fault = f"{type(error).__name__}: {error}"
            raise InputError(f"not a normaliser ({fault}); give the normaliser.json of a run") from error
        if fault or loaded.method not in _KNOT_VALUES or not loaded.maps:
            reason = fault or f"method {loaded.method!r} with {len(loaded.maps)} scorers"
            raise InputError(f"not a normaliser ({reason}); give the normaliser.json of a run")
        return loaded

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a ``normaliser.json``.

        Raises:
            InputError: no such file, or it holds something else.
        """
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; give the normaliser.json of a run directory")
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}); give the normaliser.json of a run") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def _fault(each: ScorerMap) -> str | None:
    """What makes a map that was read unusable."""
    knots, value = np.array(each.knots, dtype=np.float32), np.array(each.value, dtype=np.float64)
    if not knots.size or knots.shape != value.shape or not (np.isfinite(knots).all() and np.isfinite(value).all()):
        return f"{each.scorer}: {knots.size} knots with {value.size} values; as many finite values as knots are needed"
    step = np.diff(value) * (-1 if each.higher_is_better else 1)
    if (np.diff(knots) <= 0).any() or (step < 0).any():
        return f"{each.scorer}: knots must ascend, and better scores have smaller values"
    return None


class _Ordered(NamedTuple):
    """The cells of a scorer from best to worst; all [k]."""

    best: Array
    worst: Array
    tokens: NDArray[np.int64]
    documents: NDArray[np.int64]


class _Knots(NamedTuple):
    """Knots from best to worst, σ at each, and the bound of its error."""

    at: Array
    value: Array
    error: float


def _scorer_map(scorer: str, cells: Cells, higher_is_better: bool, method: Method) -> ScorerMap:
    step = -1 if higher_is_better else 1
    low, high = cells.low.astype(np.float64), cells.high.astype(np.float64)
    best, worst = (high, low) if higher_is_better else (low, high)
    ordered = _Ordered(best[::step], worst[::step], cells.tokens[::step], cells.documents[::step])
    try:
        at, value, error = _KNOT_VALUES[method](ordered)
    except _NoScaleError as reason:
        raise InputError(
            f"{score_column(scorer)}: {reason}, so {method} has no scale; use normalise.method: ecdf or leave the "
            f"scorer out"
        ) from None
    value = value + 0.0  # makes -0.0 and 0.0 one value
    return ScorerMap(scorer, higher_is_better, tuple(at[::step].tolist()), tuple(value[::step].tolist()), error)


class _NoScaleError(Exception):
    """All scores are equal, or too nearly so."""


def _ecdf(cells: _Ordered) -> _Knots:
    total = int(cells.tokens.sum())
    upto = np.cumsum(cells.tokens)
    share = upto / total
    slot = np.minimum((share * _KNOTS).astype(np.int64), _KNOTS - 1)
    heavy = cells.tokens > total // _KNOTS
    keep = heavy | (heavy.size <= _KNOTS)
    keep[[0, -1]] = True
    keep[:-1] |= slot[:-1] != slot[1:]  # the last cell of every slot, and so what precedes a heavy one
    # A heavy cell of several scores has a knot at its best one too; what that one holds is not known, so it gets the
    # mean of the cell's documents.
    wide = cells.best != cells.worst
    split = wide & heavy
    split[0] = wide[0]
    alone = (upto - cells.tokens + cells.tokens / cells.documents) / total
    order = np.argsort(np.concatenate([2 * np.flatnonzero(split), 2 * np.flatnonzero(keep) + 1]))
    at = np.concatenate([cells.best[split], cells.worst[keep]])[order]
    value = np.concatenate([alone[split], share[keep]])[order]
    return _Knots(at, value, _ecdf_error(cells, at, value, share))


def _ecdf_error(cells: _Ordered, at: Array, value: Array, share: Array) -> float:
    """The most by which the interpolated share of any document differs from the exact one."""
    step = 1 if at[0] <= at[-1] else -1
    sigma_best, sigma_worst = (np.interp(ends, at[::step], value[::step]) for ends in (cells.best, cells.worst))
    before = np.concatenate([[0.0], share[:-1]])
    # Within a cell the exact share lies between those of the cells around; alone in its cell, a score has that share.
    several = np.maximum(sigma_worst - before, share - sigma_best)
    return float(np.where(cells.best == cells.worst, np.abs(sigma_worst - share), several).max())


def _zscore(cells: _Ordered) -> _Knots:
    _require_range(cells)
    total = int(cells.tokens.sum())
    middle, half = (cells.best + cells.worst) / 2, np.abs(cells.best - cells.worst) / 2
    mean = math.fsum(middle * cells.tokens) / total
    deviation = math.sqrt(math.fsum((middle - mean) ** 2 * cells.tokens) / total)
    mean_error = math.fsum(half * cells.tokens) / total
    deviation_error = math.sqrt(math.fsum(half**2 * cells.tokens) / total)
    if deviation <= deviation_error:
        raise _NoScaleError(f"its scores all lie between {cells.worst[-1]:.9g} and {cells.best[0]:.9g}")
    ends = np.array([cells.best[0], cells.worst[-1]])
    value = np.sign(ends[1] - ends[0]) * (ends - mean) / deviation
    error = (mean_error + float(np.abs(value).max()) * deviation_error) / (deviation - deviation_error)
    return _Knots(ends, value, error)


def _minmax(cells: _Ordered) -> _Knots:
    _require_range(cells)
    return _Knots(np.array([cells.best[0], cells.worst[-1]]), np.array([0.0, 1.0]), 0.0)


def _require_range(cells: _Ordered) -> None:
    if cells.best[0] == cells.worst[-1]:
        raise _NoScaleError(f"all {cells.documents.sum()} documents have the score {cells.best[0]:.6g}")


_KNOT_VALUES: dict[str, Callable[[_Ordered], _Knots]] = {"ecdf": _ecdf, "zscore": _zscore, "minmax": _minmax}
