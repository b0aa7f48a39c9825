"""The parameters θ of QuaDMix and Algorithm 1, which draws them.

θ holds, per domain m of M: α_m (weights of the N scorers), λ_m, ω_m, η_m and ε_m; (N + 4)·M numbers in all.
Nothing here reads data: see ``ranking`` for Eq. 1 and 2 and ``sampling`` for Eq. 3.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError

Array = NDArray[np.float64]

_PER_DOMAIN = ("lam", "omega", "eta", "epsilon")


@dataclass(frozen=True, eq=False)
class Parameters:
    """θ: how the scores of each domain are merged and how steeply each domain is sampled.

    Shapes: ``alpha`` [M, N], rows summing to 1; ``lam``, ``omega``, ``eta``, ``epsilon`` [M]. ``domains`` and
    ``scorers`` name the rows and columns; empty when θ is used as bare numbers.

    Raises:
        InputError: a shape that does not fit, a value that is not a finite number, names that do not fit, α not
            summing to 1, ω outside (0, 1], or a negative α, λ, η or ε.
    """

    alpha: Array
    lam: Array
    omega: Array
    eta: Array
    epsilon: Array
    domains: tuple[str, ...] = ()
    scorers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("alpha", *_PER_DOMAIN):
            try:
                values = np.array(getattr(self, name), dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise InputError(f"{name}: {error}; give numbers, in rows of one length") from error
            values.flags.writeable = False
            object.__setattr__(self, name, values)
        for name in ("domains", "scorers"):
            names = getattr(self, name)
            if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(n, str) for n in names):
                raise InputError(f"{name}: {names!r}; give a list of names")
            object.__setattr__(self, name, tuple(names))
        self._check()

    def _check(self) -> None:
        if self.alpha.ndim != 2 or 0 in self.alpha.shape:
            raise InputError(f"alpha: shape {self.alpha.shape}; give one row per domain, one column per scorer")
        for name in _PER_DOMAIN:
            if getattr(self, name).shape != (self.n_domains,):
                raise InputError(
                    f"{name}: shape {getattr(self, name).shape}; alpha has {self.n_domains} rows, so give "
                    f"{self.n_domains} numbers"
                )
        for name, names, n in (
            ("domains", self.domains, self.n_domains),
            ("scorers", self.scorers, self.n_scorers),
        ):
            if names and (len(names) != n or len(set(names)) != n):
                raise InputError(f"{name}: {len(names)} names ({', '.join(names)}); give {n} different names, or none")
        for name in ("alpha", *_PER_DOMAIN):
            values = getattr(self, name)
            bad = ~np.isfinite(values) | (values < 0)
            if bad.any():
                where = tuple(int(i) for i in np.argwhere(bad)[0])
                raise InputError(f"{name}{list(where)} = {values[where]}; give a finite number >= 0")
        sums = self.alpha.sum(axis=1)
        if (off := np.abs(sums - 1) > 1e-6).any():
            m = int(np.argmax(off))
            raise InputError(f"alpha[{self._domain(m)}] sums to {sums[m]:.6g}; weights of a domain must sum to 1")
        if (off := (self.omega <= 0) | (self.omega > 1)).any():
            m = int(np.argmax(off))
            raise InputError(f"omega[{self._domain(m)}] = {self.omega[m]:.6g}; give a share in (0, 1]")

    def _domain(self, m: int) -> str:
        return self.domains[m] if self.domains else str(m)

    @property
    def n_domains(self) -> int:
        """M."""
        return self.alpha.shape[0]

    @property
    def n_scorers(self) -> int:
        """N."""
        return self.alpha.shape[1]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parameters):
            return NotImplemented
        return (
            np.array_equal(self.to_vector(), other.to_vector())
            and self.alpha.shape == other.alpha.shape
            and self.domains == other.domains
            and self.scorers == other.scorers
        )

    __hash__ = None  # type: ignore[assignment]

    def to_vector(self) -> Array:
        """θ as (N + 4)·M numbers: α row by row, then λ, ω, η, ε, each of length M."""
        return np.concatenate([self.alpha.ravel(), *(getattr(self, name) for name in _PER_DOMAIN)])

    def names(self) -> list[str]:
        """The name of each number of ``to_vector``, such as ``alpha[fineweb-edu, Science]`` or ``omega[Science]``."""
        domains = self.domains or tuple(str(m) for m in range(self.n_domains))
        scorers = self.scorers or tuple(str(n) for n in range(self.n_scorers))
        weights = [f"alpha[{scorer}, {domain}]" for domain in domains for scorer in scorers]
        return weights + [f"{name}[{domain}]" for name in _PER_DOMAIN for domain in domains]

    @classmethod
    def from_vector(
        cls, vector: ArrayLike, n_scorers: int, domains: Sequence[str] = (), scorers: Sequence[str] = ()
    ) -> Self:
        """The inverse of ``to_vector`` for N scorers.

        Raises:
            InputError: a length that is not a multiple of N + 4.
        """
        numbers = np.asarray(vector, dtype=np.float64)
        n_domains, rest = divmod(numbers.size, n_scorers + 4)
        if numbers.ndim != 1 or rest or not n_domains:
            raise InputError(
                f"a parameter vector of shape {numbers.shape} does not divide into domains of {n_scorers} scorer "
                f"weights and 4 numbers each; give (N + 4)·M numbers"
            )
        weights = numbers[: n_domains * n_scorers].reshape(n_domains, n_scorers)
        lam, omega, eta, epsilon = numbers[n_domains * n_scorers :].reshape(4, n_domains)
        return cls(weights, lam, omega, eta, epsilon, tuple(domains), tuple(scorers))

    def to_dict(self) -> dict[str, Any]:
        """θ as plain lists, as written to ``theta.json``."""
        numbers = {name: getattr(self, name).tolist() for name in ("alpha", *_PER_DOMAIN)}
        return {"domains": list(self.domains), "scorers": list(self.scorers), **numbers}

    @classmethod
    def from_dict(cls, content: dict[str, Any], place: str = "parameters") -> Self:
        """The inverse of ``to_dict``; ``place`` names the source in errors.

        Raises:
            InputError: a missing or unknown key, or values that ``Parameters`` refuses.
        """
        known = {"domains", "scorers", "alpha", *_PER_DOMAIN}
        required = {"alpha", *_PER_DOMAIN}
        if not isinstance(content, dict) or not required <= set(content) <= known:
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise InputError(f"{place}: found {found}; parameters have the keys {', '.join(sorted(known))}")
        try:
            return cls(**content)
        except (TypeError, InputError) as error:
            raise InputError(f"{place}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes θ as JSON, atomically."""
        from quadmix_plugin.atomic import write_json

        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what ``save`` wrote.

        Raises:
            InputError: no such file, one that cannot be read, not JSON, or not parameters.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file; give the theta.json that `quadmix search` wrote") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a theta.json") from error
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}); give the theta.json that `quadmix search` wrote") from error
        return cls.from_dict(content, str(path))


@dataclass(frozen=True)
class ParameterSpace:
    """The ranges of Algorithm 1: λ log-uniform, ω, η and ε uniform; the defaults are the paper's.

    Raises:
        InputError: 0 < ``lam_min`` <= ``lam_max`` or 0 < ``omega_max`` <= 1 does not hold, or a negative maximum.
    """

    lam_min: float = 1.0
    lam_max: float = 1000.0
    omega_max: float = 0.1
    eta_max: float = 1.0
    epsilon_max: float = 0.001

    def __post_init__(self) -> None:
        for holds, name, remedy in (
            (0 < self.lam_min < np.inf, "lam_min", "give a number above 0"),
            (self.lam_min <= self.lam_max < np.inf, "lam_max", f"give a number of at least lam_min = {self.lam_min}"),
            (0 < self.omega_max <= 1, "omega_max", "give a share in (0, 1]"),
            (0 <= self.eta_max < np.inf, "eta_max", "give a finite number >= 0"),
            (0 <= self.epsilon_max < np.inf, "epsilon_max", "give a finite number >= 0"),
        ):
            if not holds:
                raise InputError(f"space.{name}: {getattr(self, name)}; {remedy}")


def sample_parameters(
    n: int,
    n_scorers: int,
    n_domains: int,
    seed: int,
    *,
    space: ParameterSpace = ParameterSpace(),
    domains: Sequence[str] = (),
    scorers: Sequence[str] = (),
) -> list[Parameters]:
    """Draws ``n`` parameters by Algorithm 1 of the paper.

    a ~ U(0,1)^N, ã = a/Σa; per domain b ~ U(0,1)^N, α = ãb/Σãb; λ = 10^(3u), ω = 0.1u, η = u, ε = u/1000 with the
    default ``space``. Draw i depends on (seed, i) alone, so a longer list begins with the shorter one.

    Raises:
        InputError: ``n`` or ``seed`` below 0, or fewer than one scorer or domain.
    """
    if n < 0 or n_scorers < 1 or n_domains < 1:
        raise InputError(f"n={n}, n_scorers={n_scorers}, n_domains={n_domains}; give n >= 0 and at least one of each")
    if seed < 0:
        raise InputError(f"seed={seed}; give an integer >= 0")
    vectors = sample_parameter_vectors(n, n_scorers, n_domains, seed, space=space)
    return [Parameters.from_vector(vector, n_scorers, domains, scorers) for vector in vectors]


_DRAWS_PER_STREAM = 256


def sample_parameter_vectors(n: int, n_scorers: int, n_domains: int, seed: int, *, space: ParameterSpace) -> Array:
    """Algorithm 1 as an array [n, (N + 4)·M] in the order of ``Parameters.to_vector``."""
    per_draw = n_scorers + n_scorers * n_domains + 4 * n_domains
    blocks = []
    for stream in range(-(-n // _DRAWS_PER_STREAM)):
        rng = np.random.default_rng([seed, stream])
        blocks.append(1.0 - rng.random((_DRAWS_PER_STREAM, per_draw)))  # (0, 1]: ω = 0 selects nothing
    u = np.concatenate(blocks)[:n] if blocks else np.empty((0, per_draw))
    a, b, rest = np.split(u, [n_scorers, n_scorers * (1 + n_domains)], axis=1)
    weights = a[:, None, :] * b.reshape(n, n_domains, n_scorers)  # Σa cancels
    weights /= weights.sum(axis=2, keepdims=True)
    lam, omega, eta, epsilon = np.moveaxis(rest.reshape(n, 4, n_domains), 1, 0)
    decades = np.log10(space.lam_max / space.lam_min)
    columns = (
        weights.reshape(n, n_domains * n_scorers),
        space.lam_min * 10.0 ** (decades * lam),
        space.omega_max * omega,
        space.eta_max * eta,
        space.epsilon_max * epsilon,
    )
    return np.concatenate(columns, axis=1)


def average_parameters(thetas: Sequence[Parameters], average: Literal["unit", "paper"] = "unit") -> Parameters:
    """The mean of several θ, with α renormalised.

    ``paper``: arithmetic. ``unit``: in the unit cube of Algorithm 1, where λ is geometric (λ is log-uniform, so
    that an arithmetic mean would be governed by its largest value); a λ of 0 in one makes the mean 0.

    Raises:
        InputError: no parameters, another ``average``, or parameters of different domains or scorers.
    """
    if average not in ("unit", "paper"):
        raise InputError(f"average={average!r}; choose 'unit' or 'paper'")
    if not thetas:
        raise InputError("no parameters to average; give at least one")
    first = thetas[0]
    for i, theta in enumerate(thetas):
        if (theta.alpha.shape, theta.domains, theta.scorers) != (first.alpha.shape, first.domains, first.scorers):
            raise InputError(
                f"parameters {i} have other domains or scorers than parameters 0; average those of one search"
            )
    mean = {name: np.mean([getattr(t, name) for t in thetas], axis=0) for name in ("alpha", *_PER_DOMAIN)}
    if average == "unit":
        with np.errstate(divide="ignore"):  # log 0 = -inf, and exp makes it 0 again
            mean["lam"] = np.exp(np.mean([np.log(t.lam) for t in thetas], axis=0))
    mean["alpha"] /= mean["alpha"].sum(axis=1, keepdims=True)
    return Parameters(**mean, domains=first.domains, scorers=first.scorers)
