"""What property tests try: how many examples, and documents with ties, empty and tiny domains, and extreme values."""

import os
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from quadmix_plugin.parameters import Parameters

EXAMPLES = int(os.environ.get("QUADMIX_EXAMPLES", "1000"))
FEWER = max(1, EXAMPLES // 4)  # of what the equations' own tests cover again, or what takes many steps an example

TIES = ("paper", "mid", "hash")
VALUES = ("few", "equal", "integers", "normal", "clipped", "tiny", "huge", "spread", "crowd", "neighbours")


class Documents(NamedTuple):
    """Columns [n] of a table; ``values`` is q̄ [n], or σ(q) [n, N] where asked for."""

    values: NDArray[Any]
    domain_ids: NDArray[np.int64]
    tokens: NDArray[np.int64]
    doc_ids: NDArray[np.int64]

    def take(self, rows: Any) -> "Documents":
        return Documents(*(column[rows] for column in self))


@st.composite
def documents(
    draw: Any, most: int = 40, n_domains: int = 6, n_scorers: int = 0, dtype: Any = np.float64, values: Any = VALUES
) -> Documents:
    """A table of 1 to ``most`` documents; domain ids are below ``n_domains``, and some of these have no document."""
    n, kind = draw(st.integers(1, most)), draw(st.sampled_from(values))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = numbers(rng, (n, n_scorers) if n_scorers else (n,), kind, dtype)
    present = rng.permutation(n_domains)[: rng.integers(1, n_domains + 1)]
    share = 1.0 / np.arange(1, present.size + 1) ** rng.choice([0.0, 1.0, 3.0])  # even, or most domains tiny
    domain_ids = rng.choice(present, n, p=share / share.sum()).astype(np.int64)
    tokens = rng.integers(1, rng.choice([2, 4, 10_000, 1 << 40]), n)
    return Documents(scores, domain_ids, tokens, rng.integers(-(1 << 63), (1 << 63) - 1, n))


def numbers(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: Any = np.float64) -> NDArray[Any]:
    """Finite numbers whose range does not overflow ``dtype``."""
    limits = np.finfo(dtype)
    few = [0.0, -0.0, 0.25, 0.5, 1.0, -3.0, 1e-30, 1e6]
    smallest, largest = float(limits.smallest_subnormal), float(limits.max) / 2.1
    drawn = {
        "few": lambda: rng.choice(few, shape),
        "equal": lambda: np.full(shape, rng.choice(few)),
        "integers": lambda: rng.integers(-3, 4, shape),
        "normal": lambda: rng.normal(size=shape),
        "clipped": lambda: np.clip(rng.normal(size=shape), -1.0, 0.5),
        "tiny": lambda: rng.choice([0.0, -0.0, smallest, 3 * smallest, -smallest, float(limits.tiny)], shape),
        "huge": lambda: rng.choice([-largest, largest, largest / 2, 0.0, 1.0], shape),
        "spread": lambda: rng.choice([-1.0, 1.0], shape) * 10.0 ** rng.uniform(-30, 30, shape),
        "crowd": lambda: np.where(rng.random(shape) < 0.05, 1e4, 1.0 + 1e-6 * rng.integers(0, 30, shape)),
        "neighbours": lambda: 1.0 + float(limits.eps) * rng.integers(0, 5, shape),
    }
    return np.asarray(drawn[kind](), dtype=dtype)


def parameters(rng: np.random.Generator, n_scorers: int, n_domains: int, omega_max: float = 1.0) -> Parameters:
    """θ with its corners: a scorer without weight, λ 0 and 1000, ω tiny and at its most, η 0, ε 0 and above 1."""

    def column(corners: list[float], low: float, high: float) -> NDArray[np.float64]:
        return np.where(rng.random(n_domains) < 0.5, rng.choice(corners, n_domains), rng.uniform(low, high, n_domains))

    alpha = rng.choice([0.0, 0.5, 1.0, 0.3], (n_domains, n_scorers))
    alpha[alpha.sum(axis=1) == 0] = 1.0
    return Parameters(
        alpha / alpha.sum(axis=1, keepdims=True),
        column([0.0, 1.0, 1000.0, 30.0], 0.0, 1000.0),
        column([omega_max, 0.1, 0.05, 1e-6], 1e-6, omega_max),
        column([0.0, 1.0, 2.0], 0.0, 2.0),
        column([0.0, 0.001, 1 / 256, 0.01, 1.0, 1.5], 0.0, 0.002),
    )
