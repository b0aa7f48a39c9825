"""``auto``: the regressor that predicts best, chosen for each task by cross-validation within the rows of the fit.

Where ``auto`` itself is cross-validated, the choice is made anew inside every fold, so the reported rows never take
part in it.
"""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from quadmix_plugin.errors import InputError
from quadmix_plugin.search.regressors import FEWEST_ROWS, KnowsItsError, Regressor, require_rows

Array = NDArray[np.float64]

_MOST_ROWS = 1024  # for the choice; more rows cost much and decide little


@dataclass
class Auto:
    """The one of ``among`` with the lowest cross-validated squared error.

    One that cannot be fitted to so few rows takes no part. Of errors that do not differ by a standard error of their
    difference the earlier name is taken, so noise does not choose.
    """

    among: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["gp", "lightgbm"])
    """Names of regressors, each with its default options; more of them cost more, see docs/search.md."""
    folds: Annotated[int, Field(ge=2)] = 5
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    chosen: str = field(default="", init=False, compare=False)
    errors: dict[str, float] = field(default_factory=dict, init=False, compare=False)
    _model: Any = field(default=None, init=False, repr=False, compare=False)

    @property
    def fewest_rows(self) -> int:
        """As many as leave enough to fit on where one fold is held out."""
        return -(-FEWEST_ROWS * self.folds // (self.folds - 1))

    def __post_init__(self) -> None:
        from quadmix_plugin import registry

        if "auto" in self.among:
            raise InputError("regressor auto: 'auto' is among itself; leave it out of `among`")
        for name in self.among:
            registry.load("regressors", name, "search.options.among")

    def fit(self, x: ArrayLike, y: ArrayLike) -> None:
        """Chooses and fits.

        Raises:
            InputError: as ``require_rows``, fewer rows than folds, or rows to which none of the regressors can be
                fitted, with the reason of the first.
        """
        from quadmix_plugin import registry

        features, target = require_rows(x, y, self.folds, "train more proxies, or lower `folds`")
        makers = {name: registry.load("regressors", name, "search.options.among") for name in self.among}
        squares, reasons = {}, []
        for name, make in makers.items() if len(makers) > 1 else ():
            try:
                squares[name] = self._squares(make, features, target)
            except InputError as error:  # such as too few rows for this one
                reasons.append(f"{name}: {error}")
        if len(makers) > 1 and not squares:
            raise InputError(f"regressor auto: none can be fitted; {reasons[0]}")
        self.errors = {name: float(np.sqrt(each.mean())) for name, each in squares.items()}
        self.chosen = _earliest_of_the_best(squares) if squares else self.among[0]
        self._model = makers[self.chosen]()
        self._model.fit(features, target)

    def predict(self, x: ArrayLike) -> Array:
        """Predicted y [n] for x [n, f]."""
        return self._fitted().predict(x)

    def predict_with_sd(self, x: ArrayLike) -> tuple[Array, Array]:
        """As of the chosen regressor, which must have it; see ``knows_its_error``."""
        return self._fitted().predict_with_sd(x)

    def another(self) -> Regressor:
        """A new one of the chosen kind: refits are of the same model, not of another choice."""
        from quadmix_plugin import registry

        self._fitted()
        return registry.load("regressors", self.chosen)()

    @property
    def knows_its_error(self) -> bool:
        """Whether the chosen regressor has an uncertainty of its own."""
        return isinstance(self._fitted(), KnowsItsError)

    def to_text(self) -> str:
        """The errors that decided, and the chosen model."""
        return f"{json.dumps({'chosen': self.chosen, 'rmse': self.errors})}\n{self._fitted().to_text()}"

    def _fitted(self) -> Any:
        if self._model is None:
            raise InputError("regressor: not fitted; call fit first")
        return self._model

    def _squares(self, make: Any, features: Array, target: Array) -> Array:
        """The squared error of every row, predicted by a model that had not seen it."""
        from sklearn.model_selection import KFold

        few = np.random.default_rng(self.seed).permutation(target.size)[:_MOST_ROWS]
        features, target = features[few], target[few]
        squares = np.empty(target.size)
        for train, out in KFold(self.folds, shuffle=True, random_state=self.seed).split(features):
            model: Regressor = make()
            model.fit(features[train], target[train])
            squares[out] = (model.predict(features[out]) - target[out]) ** 2
        return squares


def _earliest_of_the_best(squares: dict[str, Array]) -> str:
    best = min(squares, key=lambda name: squares[name].mean())
    for name, each in squares.items():
        difference = each - squares[best]
        if difference.mean() <= difference.std(ddof=1) / np.sqrt(difference.size):
            return name
    return best
