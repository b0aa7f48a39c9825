"""Regressors from features to a loss: the plug-ins of ``quadmix_plugin.regressors``.

A regressor is a dataclass whose fields are its options, with ``fit``, ``predict`` and ``to_text``. Which features it
gets, how it is judged and what its predictions are used for is decided elsewhere.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from quadmix_plugin.errors import InputError

if TYPE_CHECKING:
    import lightgbm

Array = NDArray[np.float64]


class Regressor(Protocol):
    """What a plug-in must offer; a new instance is made for every fit."""

    def fit(self, x: ArrayLike, y: ArrayLike) -> None:
        """Learns y [n] from x [n, f]."""
        ...

    def predict(self, x: ArrayLike) -> Array:
        """Predicted y, float64 [n], for x [n, f]."""
        ...

    def to_text(self) -> str:
        """The fitted model in a form that can be kept and read."""
        ...


@dataclass
class LightGBM:
    """Gradient-boosted trees, the paper's regressor, with defaults for tens to hundreds of rows.

    LightGBM's own defaults ask for 20 rows in a leaf, and so predict a constant from 32 rows. The settings of RegMix'
    published notebook: ``trees: 1000, learning_rate: 0.01, leaves: 31, min_child_samples: 20, colsample: 1, seed: 42``;
    its early stopping looked at the test rows, ``early_stopping`` here looks at rows held out of those to fit on.
    The same rows and options give the same model, byte for byte.
    """

    trees: Annotated[int, Field(ge=1)] = 150
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    leaves: Annotated[int, Field(ge=2)] = 8
    min_child_samples: Annotated[int, Field(ge=1)] = 5
    colsample: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the features that a tree may use."""
    lambda_l1: Annotated[float, Field(ge=0)] = 0.0
    lambda_l2: Annotated[float, Field(ge=0)] = 0.0
    early_stopping: Annotated[int, Field(ge=0)] = 0
    """Stop after so many trees without gain on held-out rows; 0: never."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows held out for ``early_stopping``."""
    threads: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    _model: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def fewest_rows(self) -> int:
        """With fewer rows there could be no two leaves."""
        return 2 * self.min_child_samples

    def fit(self, x: ArrayLike, y: ArrayLike) -> None:
        """Fits the trees to y [n] from x [n, f]; a missing feature may be NaN.

        Raises:
            InputError: shapes that differ, y not finite, or fewer rows than two leaves need.
        """
        import lightgbm

        features, target = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        if features.ndim != 2 or target.shape != features.shape[:1]:
            raise InputError(f"regressor: features {features.shape} and losses {target.shape}; give one loss per row")
        if (bad := ~np.isfinite(target)).any():
            raise InputError(f"regressor: losses of rows {np.flatnonzero(bad)[:5].tolist()} are not finite; drop them")
        train, held = self._split(target.size)
        if train.size < self.fewest_rows:
            raise InputError(
                f"regressor: {train.size} rows to fit on, but min_child_samples={self.min_child_samples} needs "
                f"{self.fewest_rows}; train more proxies or lower min_child_samples"
            )
        parameters = self._parameters()
        rows = lightgbm.Dataset(features[train], target[train], params=parameters)
        checks: dict[str, Any] = {}
        if held.size:
            checks["valid_sets"] = [rows.create_valid(features[held], target[held])]
            checks["callbacks"] = [lightgbm.early_stopping(self.early_stopping, verbose=False)]
        self._model = lightgbm.train(parameters, rows, num_boost_round=self.trees, **checks)

    def predict(self, x: ArrayLike) -> Array:
        """Predicted y [n] for x [n, f]."""
        return np.asarray(self._fitted().predict(np.asarray(x, dtype=np.float64), num_threads=self.threads))

    def to_text(self) -> str:
        """The trees in LightGBM's text format; ``lightgbm.Booster(model_str=...)`` reads it."""
        return self._fitted().model_to_string()

    def _fitted(self) -> "lightgbm.Booster":
        if self._model is None:
            raise InputError("regressor: not fitted; call fit first")
        return self._model

    def _split(self, n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows to fit on and rows held out for early stopping."""
        held = max(1, round(self.validation_share * n)) if self.early_stopping else 0
        order = np.random.default_rng(self.seed).permutation(n)
        return np.sort(order[held:]), np.sort(order[:held])

    def _parameters(self) -> dict[str, Any]:
        return {
            "objective": "regression",
            "metric": "l2",
            "learning_rate": self.learning_rate,
            "num_leaves": self.leaves,
            "min_data_in_leaf": self.min_child_samples,
            "feature_fraction": self.colsample,
            "lambda_l1": self.lambda_l1,
            "lambda_l2": self.lambda_l2,
            "seed": self.seed,
            "num_threads": self.threads,
            "deterministic": True,
            "force_row_wise": True,  # the other layout sums in another order
            "verbosity": -1,
        }
