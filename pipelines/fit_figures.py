"""The figures of ``quadmix fit``: predicted against real, error by number of rows, and which inputs matter."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import figures, registry
from quadmix_plugin.search.insight import error_by_rows, importance
from quadmix_plugin.search.regressors import Regressor
from quadmix_plugin.search.tables import FitRows

Array = NDArray[np.float64]

_COMPARED = ("gp", "lightgbm", "svr-linear", "svr-rbf")
_MOST_ROWS = 640  # more take minutes


def prediction_drawings(judged: Mapping[str, tuple[Array, Array, float]]) -> list[figures.Drawing]:
    """Predicted against real of every target: target → real [n], predicted [n], Spearman."""
    return [
        figures.predicted_real(target, real, predicted, None, f"Spearman {spearman:.3f}")
        for target, (real, predicted, spearman) in judged.items()
    ]


def insight_drawings(
    target: str,
    rows: FitRows,
    make: Callable[[], Regressor],
    seed: int,
    progress: Callable[[str, int, int | None], None],
) -> list[figures.Drawing]:
    """Error by number of rows for several regressors, and the importance of each input to ``make``, of one target."""
    few = np.sort(np.random.default_rng(seed).permutation(len(rows.keys))[:_MOST_ROWS])
    x, y = rows.x[few], rows.losses[target][few]
    progress("figures", 0, 2)
    makers: dict[str, Any] = {name: registry.load("regressors", name) for name in _COMPARED}
    curves = error_by_rows(makers, x, y, seed=seed)
    progress("figures", 1, 2)
    found = importance(make, x, y, rows.names, seed=seed)
    progress("figures", 2, 2)
    drawn = [figures.error_by_proxies(target, curves, "units of the loss")] if curves else []
    return [*drawn, figures.importance(found.names, found.mean, found.sd, task=target)]
