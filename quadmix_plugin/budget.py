"""The token budget: one factor on every ω so that the selection has the tokens that were asked for."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.sampling import sampling_value

_STEPS = 60


@dataclass(frozen=True)
class Budget:
    """A selection scaled to a budget: the factor ``c``, θ with ω·c (at most 1), and its expected tokens."""

    factor: float
    theta: Parameters
    expected_tokens: float


def scale_to_budget(
    theta: Parameters, rank: ArrayLike, domain_ids: ArrayLike, tokens: ArrayLike, target_tokens: int
) -> Budget:
    """Finds c such that Σ tokens·S reaches ``target_tokens`` with ω·c in place of ω; λ, η and ε stay.

    Shapes: ``rank``, ``domain_ids``, ``tokens`` [n]; α is untouched, so ranks do not change. By bisection, since the
    expectation never falls as c grows; it moves in steps of documents, and the nearest step is taken.

    Raises:
        InputError: the target cannot be reached with every ω at 1, or lies below what ε alone selects; the message
            gives the reachable range.
    """
    ranks, ids = np.asarray(rank, dtype=np.float64), np.asarray(domain_ids)
    weights = np.asarray(tokens, dtype=np.int64)
    widest = 1.0 / float(theta.omega.min())
    most = _expected(theta, widest, ranks, ids, weights)
    least = float((weights * theta.epsilon[ids]).sum())
    if not least <= target_tokens <= most:
        raise InputError(
            f"select.target_tokens: {target_tokens:,} cannot be reached; under these parameters the corpus gives "
            f"between {int(np.ceil(least)):,} and {int(most):,} tokens"
        )
    low, high = np.finfo(np.float64).tiny, widest
    for _ in range(_STEPS):
        middle = np.sqrt(low * high) if low > 1e-9 else (low + high) / 2
        if _expected(theta, middle, ranks, ids, weights) < target_tokens:
            low = middle
        else:
            high = middle
    below, above = (_expected(theta, c, ranks, ids, weights) for c in (low, high))
    factor = high if above - target_tokens <= target_tokens - below else low
    return Budget(
        float(factor), _scaled(theta, factor), float(min((below, above), key=lambda x: abs(x - target_tokens)))
    )


def _scaled(theta: Parameters, factor: float) -> Parameters:
    return replace(theta, omega=np.clip(theta.omega * factor, np.finfo(np.float64).tiny, 1.0))


def _expected(
    theta: Parameters,
    factor: float,
    rank: NDArray[np.float64],
    domain_ids: NDArray[np.int64],
    tokens: NDArray[np.int64],
) -> float:
    return float((tokens * sampling_value(rank, domain_ids, _scaled(theta, factor))).sum())
