"""What a fit depends on: its number of rows, and its features.

Every error is measured on rows that the model had not seen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.search.regressors import Regressor

Array = NDArray[np.float64]
Makers = Mapping[str, Callable[[], Regressor]]

_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the rows that are fitted on
_HELD = 0.2
_MOST_ROWS = 640
_HELD_ROWS = 200
_FOLDS = 5


def error_by_rows(
    makers: Makers, x: ArrayLike, y: ArrayLike, *, repeats: int = 3, seed: int = 0
) -> dict[str, tuple[NDArray[np.int64], Array]]:
    """Mean absolute error against the number of rows fitted on: name → (numbers [k], error [k, repeats]).

    Of many rows 640 are taken. Each repeat holds a fifth of them out for all sizes and regressors. A size to which a
    regressor cannot be fitted is left out for it.
    """
    features, target = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    rng = np.random.default_rng([seed, 0xE440])
    few = np.sort(rng.permutation(target.size)[:_MOST_ROWS])
    features, target = features[few], target[few]
    orders = [rng.permutation(target.size) for _ in range(repeats)]
    held = max(1, round(_HELD * target.size))
    sizes = sorted({round(share * (target.size - held)) for share in _SHARES})
    curves = {}
    for name, make in makers.items():
        kept, errors = [], []
        for size in sizes:
            try:
                errors.append([_error(make(), features, target, o[held : held + size], o[:held]) for o in orders])
            except InputError:  # too few rows for this one, which its message would say
                continue
            kept.append(size)
        if kept:
            curves[name] = (np.array(kept, dtype=np.int64), np.array(errors))
    return curves


@dataclass(frozen=True, eq=False)
class Importance:
    """Increase of the mean absolute error where a feature is shuffled: ``mean`` [f] and its ``sd`` [f] over folds."""

    names: tuple[str, ...]
    mean: Array
    sd: Array


def importance(
    make: Callable[[], Regressor], x: ArrayLike, y: ArrayLike, names: Sequence[str], *, seed: int = 0
) -> Importance:
    """Permutation importance of every feature, on rows held out in turn; of none where the rows are too few."""
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import KFold

    features, target = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    state = seed % 2**32
    each = []
    for train, held in KFold(min(_FOLDS, target.size), shuffle=True, random_state=state).split(features):
        rows = held[:_HELD_ROWS]
        model = make()
        try:
            model.fit(features[train], target[train])
        except InputError:
            return Importance((), np.empty(0), np.empty(0))
        found = permutation_importance(
            model, features[rows], target[rows], scoring=_score, n_repeats=2, random_state=state
        )
        each.append(found["importances_mean"])  # type: ignore[index]
        if target.size > _FOLDS * _HELD_ROWS:  # one fold has rows enough
            break
    return Importance(tuple(names), np.mean(each, axis=0), np.std(each, axis=0))


def _error(model: Regressor, x: Array, y: Array, train: NDArray[np.int64], held: NDArray[np.int64]) -> float:
    model.fit(x[train], y[train])
    return float(np.abs(model.predict(x[held]) - y[held]).mean())


def _score(model: Regressor, x: Array, y: Array) -> float:
    return -float(np.abs(model.predict(x) - y).mean())
