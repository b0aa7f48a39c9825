"""Mixtures of domains for proxies, drawn as RegMix published it (sail-sg/regmix, mixture_config/synthesize_mixture.py).

Dirichlet draws around a flattened prior, at a random concentration each; none that a domain could only meet by many
repeats, and none twice.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError

Array = NDArray[np.float64]

_STRENGTHS = 15
_SAME = 1e-5  # L1 distance of mixtures that count as one
_TRIES = 1000  # draws per mixture before a prior counts as impossible


@dataclass(frozen=True)
class MixtureDraws:
    """How mixtures are drawn; the defaults are those that were published.

    ``temperature``: exponent of the prior; ``weakest`` and ``strongest``: concentration of the Dirichlet, between
    which 15 logarithmic steps lie; ``most_repeats``: a share is at most so many times that of the prior, or 1;
    ``least``: shares below are 0, the rest multiples of it; ``oversample``: how many are drawn for each one kept.
    """

    temperature: float = 0.5
    weakest: float = 0.1
    strongest: float = 5.0
    most_repeats: float = 15.0
    least: float = 2e-4
    oversample: int = 100

    def draw(self, prior: Array, number: int, seed: int) -> Array:
        """``number`` different mixtures [number, M] around the prior [M]; shares sum to 1 up to their rounding.

        Raises:
            InputError: so many different mixtures cannot be drawn within the bounds.
        """
        generator = np.random.default_rng(seed)
        flat = prior**self.temperature
        flat, bound = flat / flat.sum(), np.minimum(prior * self.most_repeats, 1.0)
        found = np.empty((0, prior.size))
        for _ in range(max(_TRIES // self.oversample, 1)):
            found = _distinct(np.concatenate([found, self._some(flat, bound, number * self.oversample, generator)]))
            if found.shape[0] >= number:
                return found[generator.choice(found.shape[0], number, replace=False)]
        raise InputError(
            f"regmix: only {found.shape[0]} different mixtures of {prior.size} domains were found within the bounds, "
            f"{number} are wanted; train fewer proxies or raise most_repeats"
        )

    def _some(self, flat: Array, bound: Array, number: int, generator: np.random.Generator) -> Array:
        """Draws within the bounds, with the small shares at 0."""
        strengths = np.geomspace(self.weakest, self.strongest, _STRENGTHS)[generator.integers(_STRENGTHS, size=number)]
        # Gamma draws normalised are Dirichlet draws; a row whose draws all underflow is no mixture.
        gammas = generator.standard_gamma(strengths[:, None] * flat)
        total = gammas.sum(axis=1, keepdims=True)
        mixtures = np.divide(gammas, total, out=np.full_like(gammas, 2.0), where=total > 0)
        kept = mixtures[(mixtures <= bound).all(axis=1)]
        kept = np.where(kept < self.least, 0.0, kept)
        return np.round(kept / kept.sum(axis=1, keepdims=True) / self.least) * self.least


def _distinct(mixtures: Array) -> Array:
    """The mixtures in an order of their own, without those that are nearly the one before."""
    if not mixtures.size:
        return mixtures
    ordered = mixtures[np.lexsort(mixtures.T)]
    kept = [0]
    for i in range(1, ordered.shape[0]):
        if np.abs(ordered[i] - ordered[kept[-1]]).sum() > _SAME:
            kept.append(i)
    return ordered[kept]
