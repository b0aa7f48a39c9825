"""Eq. 1 to 3 and the draw as plain loops in the paper's words: with nothing of the package but θ, slow and obvious."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
STRIDE = 0xD1342543DE82EF95
TIE_STREAM = 0x71E5


def splitmix64(state: int) -> int:
    """The generator of Steele, Lea and Flood (2014), one output."""
    z = (state + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def hash_of(doc_id: int, seed: int = 0) -> int:
    """The hash of an integer id under a seed, and of a hash under a stream."""
    return splitmix64((doc_id + seed * STRIDE) & MASK)


def tie_of(doc_id: int, seed: int = 0) -> int:
    """What orders documents of equal q̄ under ``ties: hash``."""
    return hash_of(hash_of(doc_id, seed), TIE_STREAM)


def eq_1(scores: Any, domain_ids: Any, alpha: Any) -> list[float]:
    """The weighted sum over scorers, in their order."""
    merged = []
    for row, m in zip(scores, domain_ids, strict=True):
        total = 0.0
        for score, weight in zip(row, alpha[m], strict=True):
            total += float(weight) * float(score)
        merged.append(total)
    return merged


def eq_2(
    merged: Sequence[float], domain_ids: Any, tokens: Any, ties: str = "paper", tie: Sequence[int] = ()
) -> list[Fraction]:
    """Tokens of the domain that are at least as good, by exact fractions; ``tie``: the order under ``hash``."""
    mates: dict[int, list[int]] = {}
    for i, m in enumerate(domain_ids):
        mates.setdefault(int(m), []).append(i)
    ranks = []
    for i, m in enumerate(domain_ids):
        total = better = same = 0
        for j in mates[int(m)]:
            w = int(tokens[j])
            total += w
            if merged[j] < merged[i]:
                better += w
            elif merged[j] == merged[i] and (ties != "hash" or tie[j] <= tie[i]):
                same += w
        ranks.append(Fraction(2 * better + same, 2 * total) if ties == "mid" else Fraction(better + same, total))
    return ranks


def eq_3(rank: float, lam: float, omega: float, eta: float, epsilon: float) -> float:
    """The expected copies."""
    if rank > omega:
        return epsilon
    return (2 / (1 + math.exp(-lam * (omega - rank)))) ** eta + epsilon


def draw(value: float, uniform: int) -> int:
    """floor(S) and one more where u < S − floor(S); ``uniform``: u in units of 2^-64."""
    whole = math.floor(value)
    return whole + ((uniform >> 11) / 2**53 < value - whole)


def count(scores: Any, domain_ids: Any, tokens: Any, doc_ids: Any, theta: Any, seed: int, ties: str) -> list[int]:
    """Every document's copies."""
    merged = eq_1(scores, domain_ids, theta.alpha)
    ranks = eq_2(merged, domain_ids, tokens, ties, [tie_of(int(i), seed) for i in doc_ids])
    copies = []
    for i, m in enumerate(domain_ids):
        shape = (float(getattr(theta, name)[m]) for name in ("lam", "omega", "eta", "epsilon"))
        copies.append(draw(eq_3(float(ranks[i]), *shape), hash_of(int(doc_ids[i]), seed)))
    return copies
