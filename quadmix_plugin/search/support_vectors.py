"""Support vector regression with a linear or a radial kernel: the paper's comparison to its trees.

scikit-learn fits it; features and losses are standardised, and what is not given of C, ε and γ is chosen by
cross-validation within the rows of the fit.
"""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from quadmix_plugin.errors import InputError
from quadmix_plugin.search.regressors import FEWEST_ROWS, require_finite_rows

Array = NDArray[np.float64]

_FOLDS = 4
_MOST_ROWS = 512  # for the choice of C, ε and γ


@dataclass
class LinearSVR:
    """Support vector regression with a linear kernel."""

    C: Annotated[float, Field(gt=0)] | None = None
    """Weight of errors beyond ε, in standard deviations of the loss; None: chosen."""
    epsilon: Annotated[float, Field(ge=0)] = 0.1
    """Errors below count as none, in standard deviations of the loss."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    kernel: ClassVar[str] = "linear"
    penalties: ClassVar[tuple[float, ...]] = (0.001, 0.01, 0.1, 1.0)
    _model: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def fewest_rows(self) -> int:
        """With fewer rows C and γ cannot be chosen."""
        return FEWEST_ROWS

    def fit(self, x: ArrayLike, y: ArrayLike) -> None:
        """Fits y [n] from x [n, f].

        Raises:
            InputError: as ``require_finite_rows``.
        """
        from sklearn.base import clone
        from sklearn.compose import TransformedTargetRegressor
        from sklearn.model_selection import GridSearchCV, KFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVR

        features, target = require_finite_rows(x, y)
        machine = SVR(kernel=self.kernel, epsilon=self.epsilon)  # type: ignore[arg-type]
        model = TransformedTargetRegressor(make_pipeline(StandardScaler(), machine), transformer=StandardScaler())
        rng = np.random.default_rng(self.seed)
        few = np.sort(rng.permutation(target.size)[:_MOST_ROWS])
        folds = KFold(_FOLDS, shuffle=True, random_state=self.seed)
        grid = {f"regressor__svr__{name}": list(values) for name, values in self._grid(features).items()}
        search = GridSearchCV(model, grid, scoring="neg_mean_squared_error", cv=folds, refit=False)
        best = search.fit(features[few], target[few]).best_params_
        chosen: Any = clone(model)
        self._model = chosen.set_params(**best).fit(features, target)

    def predict(self, x: ArrayLike) -> Array:
        """Predicted y [n] for x [n, f]."""
        return np.asarray(self._fitted().predict(np.asarray(x, dtype=np.float64)))

    def to_text(self) -> str:
        """Parameters, scaling and support vectors, as JSON."""
        model = self._fitted()
        scaler, machine = (step for _, step in model.regressor_.steps)
        names = ("kernel", "C", "epsilon", "gamma")
        return json.dumps(
            {
                **{name: getattr(machine, name) for name in names},
                "mean": scaler.mean_.tolist(),
                "sd": scaler.scale_.tolist(),
                "target_mean": float(model.transformer_.mean_[0]),
                "target_sd": float(model.transformer_.scale_[0]),
                "intercept": machine.intercept_.tolist(),
                "support": machine.support_.tolist(),
                "dual": machine.dual_coef_[0].tolist(),
            }
        )

    def _fitted(self) -> Any:
        if self._model is None:
            raise InputError("regressor: not fitted; call fit first")
        return self._model

    def _grid(self, features: Array) -> dict[str, tuple[float, ...]]:
        return {"C": self.penalties if self.C is None else (self.C,)}


@dataclass
class RadialSVR(LinearSVR):
    """Support vector regression with a radial kernel."""

    gamma: Annotated[float, Field(gt=0)] | None = None
    """1 / (2·length²) on standardised features; None: chosen."""
    kernel: ClassVar[str] = "rbf"
    penalties: ClassVar[tuple[float, ...]] = (1.0, 10.0, 100.0)

    def _grid(self, features: Array) -> dict[str, tuple[float, ...]]:
        widths = tuple(factor / features.shape[1] for factor in (0.03, 0.1, 0.3))
        return {**super()._grid(features), "gamma": widths if self.gamma is None else (self.gamma,)}
