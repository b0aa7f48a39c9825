"""A Gaussian process over transformed features: the regressor for few rows, with an uncertainty of its own.

scikit-learn fits the process; here is what it is fitted to. Shares of a mixture act through their square roots, and a
length scale for each column pays where columns are few: which of these holds is decided by the predictive density of
each row given the others (leave-one-out; Rasmussen and Williams, 2006, §5.4.2), never by rows that are reported on.
"""

import json
import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from quadmix_plugin.errors import InputError
from quadmix_plugin.search.regressors import FEWEST_ROWS, require_finite_rows

Array = NDArray[np.float64]
Transform = Literal["none", "sqrt"]
Shape = Literal["ard", "isotropic"]

_ARD_COLUMNS = 40  # beyond, a length scale for each is slow to fit and little determined
_JITTER = 1e-8
_ENOUGH = 1e-6  # relative gain of the likelihood below which its optimiser stops
_BLOCK = 4096


@dataclass
class GaussianProcess:
    """Matérn 5/2 plus noise, on standardised features.

    ``transform`` and ``kernel`` None are chosen by leave-one-out density.
    """

    transform: Transform | None = None
    """``sqrt`` takes the square root of columns that are nowhere negative."""
    kernel: Shape | None = None
    """``ard``: a length scale for each column; ``isotropic``: one for all."""
    steps: Annotated[int, Field(ge=1)] = 50
    """Of the optimiser of the marginal likelihood."""
    rows_for_scales: Annotated[int, Field(ge=8)] = 256
    """Length scales are fitted to so many rows at most; all rows are conditioned on."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    _process: Any = field(default=None, init=False, repr=False, compare=False)
    _columns: Any = field(default=None, init=False, repr=False, compare=False)
    _score: float = field(default=float("nan"), init=False, repr=False, compare=False)

    @property
    def fewest_rows(self) -> int:
        """With fewer rows length scales say nothing."""
        return FEWEST_ROWS

    def fit(self, x: ArrayLike, y: ArrayLike) -> None:
        """Fits y [n] from x [n, f].

        Raises:
            InputError: as ``require_finite_rows``.
        """
        features, target = require_finite_rows(x, y)
        few = np.sort(np.random.default_rng(self.seed).permutation(target.size)[: self.rows_for_scales])
        fits = [
            self._scaled(columns, "isotropic" if self.kernel is None else self.kernel, features[few], target[few])
            for columns in self._transforms(features)
        ]
        best = max(fits, key=lambda fit: fit.score)
        if self.kernel is None and features.shape[1] <= _ARD_COLUMNS:
            best = max(best, self._scaled(best.columns, "ard", features[few], target[few]), key=lambda fit: fit.score)
        self._columns, process, self._score = best.columns, best.process, best.score
        if few.size < target.size:
            process = _process(process.kernel_, None)
            process.fit(self._columns(features), target)
        self._process = process

    def predict(self, x: ArrayLike) -> Array:
        """Predicted y [n] for x [n, f]."""
        process = self._fitted()
        return np.concatenate([process.predict(self._columns(block)) for block in _blocks(x)])

    def predict_with_sd(self, x: ArrayLike) -> tuple[Array, Array]:
        """Predicted y [n] and the standard deviation [n] of the process there, without the noise of a loss."""
        process = self._fitted()
        parts = [process.predict(self._columns(block), return_std=True) for block in _blocks(x)]
        mean, sd = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        noise = np.exp(process.kernel_.theta[-1]) * process._y_train_std**2
        return mean, np.sqrt(np.maximum(sd**2 - noise, 0.0))

    def to_text(self) -> str:
        """The kernel, the transformation and the weight of every row, as JSON."""
        process = self._fitted()
        return json.dumps(
            {
                "kernel": str(process.kernel_),
                "transform": self._columns.transform,
                "leave_one_out_log_density": self._score,
                "mean": self._columns.mean.tolist(),
                "sd": self._columns.sd.tolist(),
                "target_mean": float(process._y_train_mean),
                "target_sd": float(process._y_train_std),
                "weights": process.alpha_.tolist(),
            }
        )

    def _fitted(self) -> Any:
        if self._process is None:
            raise InputError("regressor: not fitted; call fit first")
        return self._process

    def _transforms(self, features: Array) -> list["_Columns"]:
        useful = (features >= 0).all(axis=0).any()
        wanted = (self.transform,) if self.transform else ("sqrt", "none") if useful else ("none",)
        return [_Columns.of(features, name) for name in wanted]

    def _scaled(self, columns: "_Columns", shape: Shape, features: Array, target: Array) -> "_Fit":
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits

        process = _process(_kernel(shape, features.shape[1]), self.steps)
        # On so small matrices several threads wait for each other more than they work.
        with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
            warnings.simplefilter("ignore", ConvergenceWarning)  # of a column without influence, its scale at the bound
            process.fit(columns(features), target)
        return _Fit(columns, process, _leave_one_out(process))


@dataclass(frozen=True, eq=False)
class _Fit:
    """One structure, its length scales fitted, and how well it predicts each row from the others."""

    columns: "_Columns"
    process: Any
    score: float


@dataclass(frozen=True, eq=False)
class _Columns:
    """Features transformed and standardised as those that were fitted on."""

    transform: Transform
    roots: NDArray[np.bool_]
    mean: Array
    sd: Array

    @classmethod
    def of(cls, features: Array, transform: Transform) -> "_Columns":
        roots = np.asarray((features >= 0).all(axis=0) & (transform == "sqrt"))
        z = _rooted(features, roots)
        sd = z.std(axis=0)
        return cls(transform, roots, z.mean(axis=0), np.where(sd > 1e-12 * np.abs(z).max(axis=0), sd, np.inf))

    def __call__(self, x: Array) -> Array:
        return (_rooted(x, self.roots) - self.mean) / self.sd


def _rooted(x: Array, roots: NDArray[np.bool_]) -> Array:
    return np.where(roots, np.sqrt(np.maximum(x, 0.0)), x)


def _kernel(shape: Shape, columns: int) -> Any:
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    length: Any = np.full(columns, np.sqrt(columns)) if shape == "ard" else np.sqrt(columns)
    return ConstantKernel(1.0, (1e-3, 1e5)) * Matern(length, (1e-1, 1e4), nu=2.5) + WhiteKernel(0.01, (1e-5, 2.0))


def _process(kernel: Any, steps: int | None) -> Any:
    """A process whose kernel is fitted in ``steps``, or taken as it is."""
    from scipy.optimize import minimize
    from sklearn.gaussian_process import GaussianProcessRegressor

    def optimise(objective: Any, start: Array, bounds: Array) -> tuple[Array, float]:
        options = {"maxiter": steps, "ftol": _ENOUGH}
        found = minimize(objective, start, method="L-BFGS-B", jac=True, bounds=bounds, options=options)
        return found.x, found.fun

    optimiser: Any = optimise if steps else None
    return GaussianProcessRegressor(kernel, alpha=_JITTER, optimizer=optimiser, normalize_y=True)


def _leave_one_out(process: Any) -> float:
    """Mean log density of each row given the others, in the units of the standardised target."""
    from scipy.linalg import cho_solve

    inverse = cho_solve((process.L_, True), np.eye(len(process.L_)))
    variance = 1.0 / np.diag(inverse)
    residual = process.alpha_ * variance
    return float(np.mean(-0.5 * np.log(2 * np.pi * variance) - residual**2 / (2 * variance)))


def _blocks(x: ArrayLike) -> list[Array]:
    features = np.asarray(x, dtype=np.float64)
    return [features[start : start + _BLOCK] for start in range(0, max(len(features), 1), _BLOCK)]
