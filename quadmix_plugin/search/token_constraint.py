"""A token budget inside the search: every θ is scaled to it before its loss is predicted.

A domain's ranks r̄ are spread evenly over its tokens, so what θ selects of it is an integral of Eq. 3 that does not
depend on α. Documents make the real selection coarser; the step ``select`` scales the final θ exactly.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError

Array = NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_HALVINGS = 30
_SATURATED = 20.0  # λ(ω − r̄) beyond which the sigmoid is 1
_WIDEST = 1e6  # factor on ω; at it every window is the whole domain


@dataclass(frozen=True, eq=False)
class TokenConstraint:
    """Expected selected tokens of every θ: ``target`` of a corpus with ``domain_tokens`` [M]."""

    domain_tokens: Array
    target: float

    @classmethod
    def of(cls, domain_tokens: ArrayLike, target: float, most_copies: float = 2.0) -> "TokenConstraint":
        """The constraint; ``most_copies`` is the largest S of the space.

        Raises:
            InputError: a target of 0, or of more than all documents with the most copies.
        """
        tokens = np.asarray(domain_tokens, dtype=np.float64)
        if not 0 < target <= most_copies * tokens.sum():
            raise InputError(
                f"select.target_tokens: {target:,.0f} with search.at_budget; the corpus has {tokens.sum():,.0f} tokens "
                f"and θ takes each {most_copies:.3g} times at most"
            )
        return cls(tokens, float(target))

    def expected_tokens(self, points: Array, n_scorers: int) -> Array:
        """Expected selected tokens [k] of θ as rows [k, (N + 4)·M]."""
        return self._tokens(points[:, n_scorers * self.domain_tokens.size :], np.ones(len(points)))

    def apply(self, points: Array, n_scorers: int) -> Array:
        """θ with every ω times one factor, at most 1; rows of NaN where the target cannot be reached."""
        start = n_scorers * self.domain_tokens.size
        rest = points[:, start:]
        low, high = np.full(len(points), -np.log(_WIDEST)), np.full(len(points), np.log(_WIDEST))
        reachable = (self._tokens(rest, np.exp(low)) <= self.target) & (self._tokens(rest, np.exp(high)) >= self.target)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            over = self._tokens(rest, np.exp(middle)) > self.target
            low, high = np.where(over, low, middle), np.where(over, middle, high)
        scaled = points.copy()
        omega = slice(start + self.domain_tokens.size, start + 2 * self.domain_tokens.size)
        scaled[:, omega] = np.minimum(points[:, omega] * np.exp((low + high) / 2)[:, None], 1.0)
        scaled[~reachable] = np.nan
        return scaled

    def _tokens(self, rest: Array, factor: Array) -> Array:
        lam, omega, eta, epsilon = np.moveaxis(rest.reshape(len(rest), 4, -1), 1, 0)
        window = np.minimum(omega * factor[:, None], 1.0)
        depth = np.minimum(lam * window, _SATURATED)
        z = depth[..., None] * (_NODES + 1) / 2
        inside = ((2.0 / (1.0 + np.exp(-z))) ** eta[..., None]) @ (_WEIGHTS / 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(lam > 0, depth / np.where(lam > 0, lam, 1.0), window)
        value = share * inside + (window - share) * 2.0**eta
        return (value + epsilon) @ self.domain_tokens
