"""How far a regressor and a loss can be trusted: cross-validated error, and signal over noise.

Nothing here chooses parameters. Every figure is measured on rows that the model which predicted them had not seen.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.search.regressors import Regressor

Array = NDArray[np.float64]

_FEWEST_ROWS = 3  # that a rank correlation says anything of

_log = logging.getLogger(__name__)

_RESAMPLES = 500


@dataclass(frozen=True)
class Metrics:
    """Agreement of predicted with real losses; a constant prediction has ``spearman`` and ``pearson`` 0.

    ``mae`` in units of the loss; ``r2`` is below 0 where the mean of the real losses would predict better.
    """

    spearman: float
    pearson: float
    mae: float
    r2: float

    @classmethod
    def of(cls, real: ArrayLike, predicted: ArrayLike) -> "Metrics":
        """Metrics of predictions [n] of losses [n] that are not all equal."""
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import mean_absolute_error, r2_score

        y, p = np.asarray(real, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
        constant = np.ptp(p) <= 1e-12 * np.abs(p).max()
        return cls(
            spearman=0.0 if constant else float(np.asarray(spearmanr(y, p))[0]),
            pearson=0.0 if constant else float(np.asarray(pearsonr(y, p))[0]),
            mae=float(mean_absolute_error(y, p)),
            r2=float(r2_score(y, p)),
        )

    def to_dict(self) -> dict[str, float]:
        """Plain content for ``metrics.json``."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """Out-of-fold predictions of one task.

    ``real`` [n]; ``predicted`` [repeats, n]: each row predicts every proxy once, by a model that had not seen it;
    ``metrics``: mean over the repeats; ``spread``: their standard deviation (0 for one repeat).
    """

    real: Array
    predicted: Array
    metrics: Metrics
    spread: Metrics

    def of_rows(self, rows: NDArray[np.bool_]) -> "CrossValidation":
        """The same of some rows [n] only; of all where these are fewer than three or have equal losses."""
        if rows.all() or rows.sum() < _FEWEST_ROWS or np.ptp(self.real[rows]) == 0.0:
            return self
        return _summary(self.real[rows], self.predicted[:, rows])

    @property
    def mean_predicted(self) -> Array:
        """The mean over the repeats [n], for tables and figures."""
        return self.predicted.mean(axis=0)


def cross_validate(
    make: Callable[[], Regressor],
    x: ArrayLike,
    losses: Mapping[str, ArrayLike],
    *,
    folds: int = 5,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, CrossValidation]:
    """Repeated K-fold cross-validation of a regressor, per task.

    ``make`` returns a new regressor; ``x`` [n, f]; ``losses``: task → [n]. All tasks share the same folds.

    Raises:
        InputError: as ``require_losses``, fewer rows than folds, or two rows with the same features (repeats of one θ
            in two folds would make the error look smaller than it is).
    """
    from sklearn.model_selection import RepeatedKFold

    features = np.asarray(x, dtype=np.float64)
    real = require_losses(losses, len(features))
    if folds < 2 or repeats < 1 or len(features) < folds:
        raise InputError(
            f"cross-validation: {len(features)} rows, {folds} folds, {repeats} repeats; give at least 2 folds, "
            f"1 repeat and one row for each fold"
        )
    _, first, counts = np.unique(features, axis=0, return_index=True, return_counts=True)
    if (counts > 1).any():
        example = first[np.argmax(counts > 1)]
        rows = np.flatnonzero((features == features[example]).all(axis=1))
        raise InputError(f"cross-validation: rows {rows[:5].tolist()} have the same features; keep one of them")
    predicted = {task: np.empty((repeats, len(features))) for task in real}
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])  # scikit-learn takes 32 bits
    splits = RepeatedKFold(n_splits=folds, n_repeats=repeats, random_state=state).split(features)
    for i, (train, held) in enumerate(splits):
        for task, y in real.items():
            model = make()
            model.fit(features[train], y[train])
            predicted[task][i // folds, held] = model.predict(features[held])
    return {task: _summary(y, predicted[task]) for task, y in real.items()}


def bootstrap_intervals(real: ArrayLike, predicted: ArrayLike, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of the metrics over the rows: name of ``Metrics`` → (low, high).

    ``real`` [n]; ``predicted`` [n], or [repeats, n], of which each metric is the mean, as in ``CrossValidation``. 500
    resamples of whole rows, percentile method. They hold the chance of which rows were measured, no other.
    """
    from scipy.stats import bootstrap

    y, repeats = np.asarray(real, dtype=np.float64), np.atleast_2d(np.asarray(predicted, dtype=np.float64))

    def statistic(y: Array, *each: Array, axis: int = -1) -> Array:
        return np.mean([_metrics_of_rows(y, p) for p in each], axis=0)

    found = bootstrap(
        (y, *repeats),
        statistic,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=_RESAMPLES,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    names = [field.name for field in fields(Metrics)]
    return {name: (float(low), float(high)) for name, low, high in zip(names, found.low, found.high, strict=True)}


@dataclass(frozen=True)
class Noise:
    """How much of a task's loss is θ and how much is chance.

    ``theta_sd``: standard deviation across θ (it holds the noise of one run each); ``noise_sd``: across seeds of the
    same θ, pooled, with the 95 % chi-square interval ``noise_sd_low``..``noise_sd_high`` of its ``degrees`` of freedom
    (normal noise, the same for all θ); ``signal_to_noise``: theta_sd / noise_sd, None when the repeats are equal;
    ``reliability``: 1 - noise_sd² / theta_sd², at least 0: the share of the variance across θ that is not noise, and
    so the R² that a perfect regressor reaches against losses of single seeds (0 where θ makes no difference);
    ``repeats``: how many models were repeats, of ``thetas`` many θ.

    Where all θ were trained under one seed, what that seed does alike to all of them counts in ``noise_sd`` but not in
    ``theta_sd``; ``reliability`` is then too low.
    """

    theta_sd: float
    noise_sd: float
    noise_sd_low: float
    noise_sd_high: float
    degrees: int
    signal_to_noise: float | None
    reliability: float
    repeats: int
    thetas: int

    def to_dict(self) -> dict[str, Any]:
        """Plain content for ``noise.json``."""
        return asdict(self)


def noise(repeats: Sequence[ArrayLike] | Array, across: ArrayLike, task: str = "loss") -> Noise:
    """Signal and noise of a task: ``repeats`` has an array for each repeated θ, ``across`` is one loss each of many θ.

    An array of ``repeats`` is one θ under several seeds; they may differ in length, and those of one loss are ignored.

    Raises:
        InputError: no θ with two losses, fewer than two losses in ``across``, or losses that are not finite.
    """
    from scipy.stats import chi2

    different = _finite_losses(across, "θ", task)
    if different.size < 2:
        raise InputError(f"noise of {task}: {different.size} θ; at least 2 are needed")
    given = [_finite_losses(losses, "repeats of one θ", task) for losses in repeats]
    groups = [losses for losses in given if losses.size > 1]
    if not groups:
        sizes = [losses.size for losses in given]
        raise InputError(f"noise of {task}: repeats of each θ: {sizes}; at least 2 of one θ are needed")
    models = sum(losses.size for losses in groups)
    degrees = models - len(groups)
    squares = sum((losses.size - 1) * _variance(losses) for losses in groups)
    if squares == 0.0:
        _log.warning("%s: all %d repeats have the same loss; does the trainer use its seed?", task, models)
    noise_sd, theta_sd = math.sqrt(squares / degrees), math.sqrt(_variance(different))
    low, high = (math.sqrt(squares / quantile) for quantile in chi2.ppf([0.975, 0.025], degrees))
    return Noise(
        theta_sd=theta_sd,
        noise_sd=noise_sd,
        noise_sd_low=low,
        noise_sd_high=high,
        degrees=degrees,
        signal_to_noise=theta_sd / noise_sd if noise_sd else None,
        reliability=max(0.0, 1.0 - (noise_sd / theta_sd) ** 2) if theta_sd else 0.0,
        repeats=models,
        thetas=len(groups),
    )


def require_losses(losses: Mapping[str, ArrayLike], rows: int) -> dict[str, Array]:
    """The losses as float64 [rows] per task.

    Raises:
        InputError: no task, another number of rows, losses that are not finite (with their rows), or all equal.
    """
    if not losses:
        raise InputError("losses: no task; give at least one column of losses")
    checked = {}
    for task, values in losses.items():
        y = np.asarray(values, dtype=np.float64)
        if y.shape != (rows,):
            raise InputError(f"losses of {task}: shape {y.shape} for {rows} rows of features; give one loss per row")
        if (bad := ~np.isfinite(y)).any():
            raise InputError(
                f"losses of {task}: {int(bad.sum())} are not finite, rows {np.flatnonzero(bad)[:5].tolist()}; leave "
                f"failed proxies out"
            )
        if rows < 2 or np.ptp(y) == 0.0:
            raise InputError(
                f"losses of {task}: all {rows} rows have the same loss {y[:1].tolist()}; there is nothing to learn, "
                f"leave the task out"
            )
        checked[task] = y
    return checked


def _summary(real: Array, predicted: Array) -> CrossValidation:
    each = [Metrics.of(real, row).to_dict() for row in predicted]
    mean = Metrics(**{name: float(np.mean([m[name] for m in each])) for name in each[0]})
    spread = Metrics(**{name: float(np.std([m[name] for m in each])) for name in each[0]})
    return CrossValidation(real, predicted, mean, spread)


def _metrics_of_rows(y: Array, p: Array) -> Array:
    """The numbers of ``Metrics`` [4, ...] over the last axis; 0 where a resample leaves one undefined."""
    from scipy.stats import rankdata

    left = ((y - y.mean(axis=-1, keepdims=True)) ** 2).mean(axis=-1)
    r2 = 1.0 - ((y - p) ** 2).mean(axis=-1) / np.where(left > 0, left, np.inf)
    ranks = (rankdata(values, axis=-1) for values in (y, p))
    return np.stack(
        [_correlation(*ranks), _correlation(y, p), np.abs(y - p).mean(axis=-1), np.where(left > 0, r2, 0.0)]
    )


def _correlation(a: Array, b: Array) -> Array:
    a, b = (values - values.mean(axis=-1, keepdims=True) for values in (a, b))
    scale = np.sqrt((a**2).mean(axis=-1) * (b**2).mean(axis=-1))
    flat = scale <= 1e-15 * (np.abs(a).max() * np.abs(b).max() or 1.0)
    return np.where(flat, 0.0, (a * b).mean(axis=-1) / np.where(flat, 1.0, scale))


def _finite_losses(losses: ArrayLike, name: str, task: str) -> Array:
    values = np.asarray(losses, dtype=np.float64)
    if values.ndim != 1:
        raise InputError(f"noise of {task}: losses of {name} have the shape {values.shape}; give a list of losses")
    if not np.isfinite(values).all():
        raise InputError(f"noise of {task}: losses of {name} are not finite: {values.tolist()[:5]}; drop them")
    return values


def _variance(losses: Array) -> float:
    """The sample variance; exactly 0 for equal losses, whose mean may be off by a rounding."""
    return float(losses.var(ddof=1)) if np.ptp(losses) else 0.0
