"""A loss of θ that is known, so that a search can be held against the truth: 26 domains, 3 scorers, 182 numbers.

It is built as the losses of real proxies are thought to behave: domains count through the square root of their share
of what is selected, scorers through the quality of what they prefer there, and the size of the selection has an
optimum. All parts come from a seed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.parameters import ParameterSpace, sample_parameter_vectors
from quadmix_plugin.search.features import FeatureMap
from quadmix_plugin.search.spaces import ThetaSpace

DOMAINS, SCORERS = tuple(f"domain {m}" for m in range(26)), tuple(f"scorer {n}" for n in range(3))

Array = NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


@dataclass(frozen=True, eq=False)
class KnownLoss:
    """``tokens`` and ``wanted`` shares of domains [M], ``quality`` [M, N] that each scorer finds, ``size`` wanted."""

    tokens: Array
    wanted: Array
    quality: Array
    size: float

    @classmethod
    def of(cls, seed: int) -> "KnownLoss":
        """One of many such losses."""
        rng, (m, n) = np.random.default_rng([seed, 7]), (len(DOMAINS), len(SCORERS))
        tokens, wanted = rng.dirichlet(np.ones(m)), rng.gamma(1.0, 1.0, m)
        return cls(tokens, wanted / wanted.sum(), rng.normal(size=(m, n)) + rng.normal(size=n), 0.3 * rng.normal())

    def __call__(self, thetas: Array) -> Array:
        """The loss without noise [T] of θ as rows [T, 182]."""
        m, n = self.quality.shape
        alpha = thetas[:, : m * n].reshape(-1, m, n)
        lam, omega, eta, epsilon = np.moveaxis(thetas[:, m * n :].reshape(-1, 4, m), 1, 0)
        depth = (lam * omega)[..., None] * (_NODES + 1) / 2
        window = omega * (((2 / (1 + np.exp(-depth))) ** eta[..., None]) @ (_WEIGHTS / 2))
        selected = self.tokens * (window + epsilon)
        total = selected.sum(axis=1)
        share = selected / total[:, None]
        gain = 2 * np.sqrt(self.wanted * share).sum(axis=1)
        merit = 0.35 * (share * (alpha * self.quality).sum(axis=2)).sum(axis=1)
        return 6 - gain - merit + 0.1 * (np.log(total / 0.05) - self.size) ** 2

    def proxies(self, n: int, signal_to_noise: float, seed: int) -> tuple[Array, Array, float]:
        """θ of Algorithm 1 [n, 182], their losses with noise [n], and the noise's standard deviation."""
        thetas = sample_parameter_vectors(n, len(SCORERS), len(DOMAINS), seed + 100, space=ParameterSpace())
        clean = self(thetas)
        noise = float(clean.std()) / signal_to_noise
        return thetas, clean + np.random.default_rng(seed).normal(0, noise, n), noise


def theta_space() -> ThetaSpace:
    """The space of these θ, with θ alone as features: there is no corpus."""
    return ThetaSpace(FeatureMap("theta", DOMAINS, SCORERS, None))  # type: ignore[arg-type]
