"""Regressors from features to a loss: the plug-ins of ``quadmix_plugin.regressors``.

A regressor is a dataclass whose fields are its options, with ``fit``, ``predict`` and ``to_text``; one that knows
how far its predictions may be off also has ``predict_with_sd``. Here are the protocol and gradient-boosted trees, the
paper's choice. Which features a regressor gets, how it is judged and what it is used for is decided elsewhere.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from quadmix_plugin.errors import InputError

if TYPE_CHECKING:
    import lightgbm

Array = NDArray[np.float64]

FEWEST_ROWS = 8
"""Of smooth regressors."""

_FEWEST_COLUMNS, _FEWEST_SHARE = 12, 0.3


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


@runtime_checkable
class KnowsItsError(Protocol):
    """A regressor with an uncertainty of its own; that of others is estimated by refits on resampled rows."""

    def predict_with_sd(self, x: ArrayLike) -> tuple[Array, Array]:
        """Predicted y [n], and the standard deviation [n] of what its mean may be off by, without the noise of y."""
        ...


def require_rows(x: ArrayLike, y: ArrayLike, fewest: int, remedy: str) -> tuple[Array, Array]:
    """Features [n, f] and losses [n] as float64.

    Raises:
        InputError: shapes that differ, y not finite, or fewer than ``fewest`` rows, with ``remedy``.
    """
    features, target = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if features.ndim != 2 or target.shape != features.shape[:1]:
        raise InputError(f"regressor: features {features.shape} and losses {target.shape}; give one loss per row")
    if (bad := ~np.isfinite(target)).any():
        raise InputError(f"regressor: losses of rows {np.flatnonzero(bad)[:5].tolist()} are not finite; drop them")
    if target.size < fewest:
        raise InputError(f"regressor: {target.size} rows to fit on, {fewest} are needed; {remedy}")
    return features, target


def require_finite_rows(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    """The same for smooth regressors.

    Raises:
        InputError: as ``require_rows`` (8 rows), or features that are not finite.
    """
    features, target = require_rows(x, y, FEWEST_ROWS, "train more proxies")
    if (bad := ~np.isfinite(features).all(axis=1)).any():
        raise InputError(
            f"regressor: features of rows {np.flatnonzero(bad)[:5].tolist()} are not finite; fill or drop them"
        )
    return features, target


@dataclass
class LightGBM:
    """Gradient-boosted trees, the paper's regressor, with defaults for tens to hundreds of rows.

    LightGBM's own defaults ask for 20 rows in a leaf, and so predict a constant from 32 rows. ``lightgbm-published``
    has the settings of RegMix' published notebook. The same rows and options give the same model, byte for byte.
    """

    trees: Annotated[int, Field(ge=1)] = 150
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    leaves: Annotated[int, Field(ge=2)] = 8
    min_child_samples: Annotated[int, Field(ge=1)] = 5
    colsample: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the features that a tree may use; None: 12 of them, at least .3."""
    lambda_l1: Annotated[float, Field(ge=0)] = 0.0
    lambda_l2: Annotated[float, Field(ge=0)] = 0.0
    early_stopping: Annotated[int, Field(ge=0)] = 0
    """Stop after so many trees without gain on held-out rows; 0: never."""
    stop_on: Literal["l2", "either"] = "l2"
    """What must gain: the squared error, or neither it nor the absolute error may stand still."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows held out for ``early_stopping``."""
    threads: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    _model: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def fewest_rows(self) -> int:
        """With fewer rows there could be no two leaves, those held out for early stopping apart."""
        held = self.validation_share if self.early_stopping else 0.0
        return math.ceil(self._two_leaves / (1.0 - held))

    @property
    def _two_leaves(self) -> int:
        return 2 * self.min_child_samples

    def fit(self, x: ArrayLike, y: ArrayLike, held: tuple[ArrayLike, ArrayLike] | None = None) -> None:
        """Fits the trees to y [n] from x [n, f]; a missing feature may be NaN.

        ``held``: rows for ``early_stopping`` in place of a share of the given ones. Rows that are also reported on
        make the report look better than it is.

        Raises:
            InputError: shapes that differ, y not finite, or fewer rows than two leaves need.
        """
        import lightgbm

        remedy = f"min_child_samples={self.min_child_samples} asks for them: train more proxies or lower it"
        features, target = require_rows(x, y, 1, remedy)
        train, out = self._split(target.size if held is None else 0)
        if held is None:
            held, (features, target) = (features[out], target[out]), (features[train], target[train])
        features, target = require_rows(features, target, self._two_leaves, remedy)
        parameters = self._parameters(features.shape[1])
        rows = lightgbm.Dataset(features, target, params=parameters)
        checks: dict[str, Any] = {}
        if self.early_stopping:
            checks["valid_sets"] = [rows.create_valid(np.asarray(held[0], np.float64), np.asarray(held[1], np.float64))]
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

    def _parameters(self, columns: int) -> dict[str, Any]:
        share = self.colsample or min(1.0, max(_FEWEST_SHARE, _FEWEST_COLUMNS / columns))
        return {
            "objective": "regression",
            "metric": "l2" if self.stop_on == "l2" else ["l1", "l2"],
            "learning_rate": self.learning_rate,
            "num_leaves": self.leaves,
            "min_data_in_leaf": self.min_child_samples,
            "feature_fraction": share,
            "lambda_l1": self.lambda_l1,
            "lambda_l2": self.lambda_l2,
            "seed": self.seed,
            "num_threads": self.threads,
            "deterministic": True,
            "force_row_wise": True,  # the other layout sums in another order
            "verbosity": -1,
        }


@dataclass
class PublishedLightGBM(LightGBM):
    """LightGBM with the settings of RegMix' published notebook (sail-sg/regmix, regression_fitting/regression.ipynb).

    The notebook stopped early on the rows that it reported; ``quadmix fit --early-stop-on-test`` does the same.
    """

    trees: Annotated[int, Field(ge=1)] = 1000
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    leaves: Annotated[int, Field(ge=2)] = 31
    min_child_samples: Annotated[int, Field(ge=1)] = 20
    colsample: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    early_stopping: Annotated[int, Field(ge=0)] = 3
    stop_on: Literal["l2", "either"] = "either"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
