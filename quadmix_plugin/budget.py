"""The token budget: one factor on every ω so that the selection has the tokens that were asked for.

Works on a rank map, not on documents: what a cell of q̄ contributes is known from its tokens and rank.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import bisect

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.sampling import sampling_value

Ints = NDArray[np.int64]

_STEP = 1e-9  # of the logarithm of c


@dataclass(frozen=True)
class Budget:
    """A selection scaled to a budget: the factor ``c``, θ with ω·c (at most 1), and its expected tokens."""

    factor: float
    theta: Parameters
    expected_tokens: float


def expected_tokens(ranks: RankMap, theta: Parameters, domain_tokens: ArrayLike | None = None) -> NDArray[np.float64]:
    """Σ tokens·S of every domain [M] under θ.

    ``domain_tokens`` [M]: of the corpus, where the map is of a subset of it. Within a cell of several q̄, tokens lie
    evenly and S is taken at the middle of the part that is in the window.
    """
    totals = ranks.totals.tokens
    corpus = np.asarray(totals if domain_tokens is None else domain_tokens, dtype=np.float64)
    domain, before, cells = ranks.domain_ids, ranks.before, ranks.cells
    wide = np.flatnonzero(cells["highest"] > cells["lowest"])
    inner = (cells["tokens"] - cells["at_lowest"] - cells["at_highest"])[wide]
    start = (before + cells["at_lowest"])[wide]
    value = np.bincount(domain, _groups(ranks, theta, domain, before, cells["at_lowest"]), minlength=totals.size)
    m = domain[wide]
    ends = _groups(ranks, theta, m, start + inner, cells["at_highest"][wide])
    value += np.bincount(m, ends + _spread(ranks, theta, m, start, inner), minlength=totals.size)
    return value * corpus / np.maximum(totals, 1) + theta.epsilon * corpus


def _groups(ranks: RankMap, theta: Parameters, m: Ints, before: Ints, tokens: Ints) -> NDArray[np.float64]:
    """Σ tokens·(S − ε) of groups of equal q̄ in domains ``m``, each after ``before`` tokens of its domain."""
    if ranks.ties == "hash" and not ranks.tie.size:
        return _spread(ranks, theta, m, before, tokens)
    at = before + (tokens / 2 if ranks.ties == "mid" else tokens)
    rank = np.clip(at / ranks.totals.tokens[m], np.finfo(np.float64).tiny, 1.0)
    return tokens * (sampling_value(rank, m, theta) - theta.epsilon[m])


def _spread(ranks: RankMap, theta: Parameters, m: Ints, before: Ints, tokens: Ints) -> NDArray[np.float64]:
    """The same of tokens that lie evenly."""
    total = ranks.totals.tokens[m]
    inside = np.clip(theta.omega[m] * total - before, 0.0, tokens)
    middle = np.clip((before + inside / 2) / total, np.finfo(np.float64).tiny, 1.0)
    return inside * (sampling_value(middle, m, theta) - theta.epsilon[m])


def scale_to_budget(
    theta: Parameters, ranks: RankMap, target_tokens: int, domain_tokens: ArrayLike | None = None
) -> Budget:
    """Finds c such that Σ tokens·S reaches ``target_tokens`` with ω·c in place of ω; λ, η and ε stay.

    α is untouched, so ranks do not change. By bisection, since the expectation never falls as c grows; where it moves
    in steps of documents, the nearest step is taken. ``domain_tokens``: as in ``expected_tokens``.

    Raises:
        InputError: the target cannot be reached with every ω at 1, or lies below what ε alone selects; the message
            gives the reachable range.
    """

    def expected(log_factor: float) -> float:
        return float(expected_tokens(ranks, _scaled(theta, np.exp(log_factor)), domain_tokens).sum())

    narrowest, widest = np.log(1e-12 / theta.omega.max()), -np.log(theta.omega.min())
    least, most = expected(narrowest), expected(widest)
    if not least <= target_tokens <= most:
        raise InputError(
            f"select.target_tokens: {target_tokens:,} cannot be reached; under these parameters the corpus gives "
            f"between {int(np.ceil(least)):,} and {int(most):,} tokens"
        )
    if most - target_tokens <= 0.0:
        found = widest
    else:
        root: Any = bisect(lambda x: expected(x) - target_tokens - 0.5, narrowest, widest, xtol=_STEP)
        found = float(root)
    sides = [found - 2 * _STEP, found, min(found + 2 * _STEP, widest)]
    nearest = min(sides, key=lambda x: abs(expected(x) - target_tokens))
    factor = float(np.exp(nearest))
    return Budget(factor, _scaled(theta, factor), expected(nearest))


def _scaled(theta: Parameters, factor: float) -> Parameters:
    return replace(theta, omega=np.clip(theta.omega * factor, np.finfo(np.float64).tiny, 1.0))
