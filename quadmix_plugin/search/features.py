"""What the regressor sees: θ itself, and what the selection under θ would look like.

The selection is described by expected values (Eq. 1 to 3 without the draw of integers), for many θ at once, since
a search asks for 100,000 of them. Ranks here are exact and follow the paper's rule for ties. Drawing, training and
prediction are elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.ranking import require_finite
from quadmix_plugin.schema import ScoreTable

Array = NDArray[np.float64]
Kind = Literal["theta", "theta+derived"]
Thetas = Sequence[Parameters] | Array
"""Parameters, or their ``to_vector`` as the rows of an array [T, (N + 4)·M]."""

SIZE = "log_selected_tokens"
"""The derived feature that is 0 where at most one token is selected."""

_BLOCK = 1 << 16  # θ × documents at once: half a megabyte, which stays in the cache
_LAM_FLOOR = 1e-6


@dataclass(frozen=True, eq=False)
class SelectionStatistics:
    """What T parameters would select from one corpus, in expectation.

    ``tokens_per_domain`` [T, M]: Σ tokens·S; ``selected_tokens`` [T]: their sum; ``mean_score`` [T, N]: mean of σ(q)
    weighted by tokens·S (smaller = better; of a selection that is empty: the corpus' mean, its limit for ε → 0);
    ``mean_sampling_value`` [T]: mean of S over documents.
    """

    domains: tuple[str, ...]
    scorers: tuple[str, ...]
    tokens_per_domain: Array
    selected_tokens: Array
    mean_score: Array
    mean_sampling_value: Array


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Features of any θ over one corpus, which is checked and cut into domains once.

    Raises:
        InputError: from ``of``: σ(q) whose shape does not fit the table or that is not finite; from the methods: θ of
            another corpus.
    """

    kind: Kind
    domains: tuple[str, ...]
    scorers: tuple[str, ...]
    pools: tuple["_Pool", ...]

    @classmethod
    def of(cls, table: ScoreTable, normalised: ArrayLike, kind: Kind = "theta+derived") -> Self:
        """The map over this table; ``normalised`` [n, N] is σ(q), smaller = better."""
        if kind not in ("theta", "theta+derived"):
            raise InputError(f"features: {kind!r}; choose 'theta' or 'theta+derived'")
        scores = np.asarray(normalised, dtype=np.float64)
        if scores.shape != (table.n, len(table.scorers)) or table.n == 0:
            raise InputError(
                f"normalised: shape {scores.shape}; give one row for each of the {table.n} documents and one column "
                f"for each of the scorers {', '.join(table.scorers)}"
            )
        require_finite(scores.sum(axis=1), "normalised")
        rows = [np.flatnonzero(table.domain_ids == m) for m in range(len(table.domains))]
        pools = tuple(_Pool(np.ascontiguousarray(scores[r].T), table.tokens[r]) for r in rows)
        return cls(kind, table.domains, table.scorers, pools)

    @property
    def width(self) -> int:
        """Numbers in one θ: (N + 4)·M."""
        return (len(self.scorers) + 4) * len(self.domains)

    def statistics(self, thetas: Thetas) -> SelectionStatistics:
        """The expected selection under each θ."""
        vectors = self.vectors(thetas)
        n_domains, n_scorers = len(self.domains), len(self.scorers)
        alpha = vectors[:, : n_domains * n_scorers].reshape(-1, n_domains, n_scorers)
        rest = vectors[:, n_domains * n_scorers :].reshape(-1, 4, n_domains)
        tokens = np.zeros((len(vectors), n_domains))
        scores = np.zeros((len(vectors), n_scorers))
        copies = np.zeros(len(vectors))
        for m, pool in enumerate(self.pools):
            tokens[:, m], of_scores, of_copies = pool.select(alpha[:, m], *rest[:, :, m].T)
            scores += of_scores
            copies += of_copies
        selected = tokens.sum(axis=1)
        corpus = np.sum([pool.scores @ pool.tokens for pool in self.pools], axis=0) / self._corpus_tokens
        empty = selected <= 0
        mean = np.where(empty[:, None], corpus, scores / np.where(empty, 1.0, selected)[:, None])
        documents = sum(pool.tokens.size for pool in self.pools)
        return SelectionStatistics(self.domains, self.scorers, tokens, selected, mean, copies / documents)

    def names(self) -> list[str]:
        """The name of every column of ``features``."""
        theta = _theta_names(self._like())
        return theta if self.kind == "theta" else theta + _derived_names(self.domains, self.scorers)

    def features(self, thetas: Thetas) -> Array:
        """X [T, number of names]."""
        vectors = self.vectors(thetas)
        x = _theta_columns(vectors, len(self.domains))
        if self.kind == "theta":
            return x
        return np.concatenate([x, _derived_columns(self.statistics(vectors))], axis=1)

    def vectors(self, thetas: Thetas) -> Array:
        """θ as rows [T, (N + 4)·M], checked to belong to this corpus."""
        if not isinstance(thetas, np.ndarray):
            for i, theta in enumerate(thetas):
                for what in ("domains", "scorers"):
                    ours, theirs = getattr(self, what), getattr(theta, what)
                    if theirs and theirs != ours:
                        raise InputError(
                            f"parameters {i}: {what} {', '.join(theirs)}, but those of the corpus are "
                            f"{', '.join(ours)}; use parameters drawn for this corpus"
                        )
            thetas = np.array([theta.to_vector() for theta in thetas]) if len(thetas) else np.empty((0, self.width))
        if thetas.ndim != 2 or thetas.shape[1] != self.width:
            raise InputError(
                f"parameters: shape {thetas.shape}; {len(self.domains)} domains and {len(self.scorers)} scorers make "
                f"{self.width} numbers each; use parameters drawn for this corpus"
            )
        return thetas

    def parameters(self, vector: ArrayLike) -> Parameters:
        """One row of ``vectors`` as named parameters."""
        return Parameters.from_vector(vector, len(self.scorers), self.domains, self.scorers)

    @property
    def _corpus_tokens(self) -> int:
        return sum(int(pool.tokens.sum()) for pool in self.pools)

    def _like(self) -> Parameters:
        n_domains, n_scorers = len(self.domains), len(self.scorers)
        ones = np.ones(n_domains)
        alpha = np.full((n_domains, n_scorers), 1 / n_scorers)
        return Parameters(alpha, ones, ones, ones, ones, self.domains, self.scorers)


def theta_features(thetas: Sequence[Parameters]) -> tuple[Array, list[str]]:
    """θ as X [T, (N + 4)·M] and the names of its columns; λ as log10, since Algorithm 1 draws it log-uniformly.

    A λ below 1e-6 counts as 1e-6.

    Raises:
        InputError: no parameters, or parameters that differ in domains or scorers.
    """
    if not len(thetas):
        raise InputError("no parameters to make features of; give at least one")
    first = thetas[0]
    for i, theta in enumerate(thetas):
        if theta.names() != first.names():
            raise InputError(f"parameters {i} and 0 differ in domains or scorers; use parameters of one corpus")
    return _theta_columns(np.array([theta.to_vector() for theta in thetas]), first.n_domains), _theta_names(first)


def selection_statistics(table: ScoreTable, normalised: ArrayLike, thetas: Thetas) -> SelectionStatistics:
    """What each θ would select from the documents of ``table``; ``normalised`` [n, N] is σ(q), smaller = better.

    Equal to looping over ``merge_quality``, ``quality_rank`` and ``sampling_value`` up to the rounding of float64 sums.

    Raises:
        InputError: as ``FeatureMap``.
    """
    return FeatureMap.of(table, normalised).statistics(thetas)


def derived_features(statistics: SelectionStatistics) -> tuple[Array, list[str]]:
    """X [T, M + 1 + N]: √ of each domain's share of the selected tokens, log of the selected tokens, mean scores.

    Fewer than one selected token counts as one in the logarithm; the shares of an empty selection are 0.
    """
    return _derived_columns(statistics), _derived_names(statistics.domains, statistics.scorers)


def features(
    thetas: Thetas, table: ScoreTable, normalised: ArrayLike, kind: Kind = "theta+derived"
) -> tuple[Array, list[str]]:
    """The regressor's input X and the names of its columns: θ, or θ and ``derived_features``.

    Raises:
        InputError: as ``FeatureMap``.
    """
    columns = FeatureMap.of(table, normalised, kind)
    return columns.features(thetas), columns.names()


@dataclass(frozen=True, eq=False)
class _Pool:
    """The documents of one domain: ``scores`` [N, n] float64, σ(q); ``tokens`` [n] int64."""

    scores: Array
    tokens: NDArray[np.int64]

    def select(self, alpha: Array, lam: Array, omega: Array, eta: Array, epsilon: Array) -> tuple[Array, Array, Array]:
        """Σ tokens·S [T], Σ tokens·S·σ(q) [T, N] and Σ S [T] for parameters [T] of this domain, ``alpha`` [T, N]."""
        tokens, copies = np.zeros(omega.size), np.zeros(omega.size)
        scores = np.zeros((omega.size, len(self.scores)))
        if self.tokens.size:
            # Only documents inside the window need their rank. θ of similar ω together keep the window short.
            lightest = np.cumsum(np.sort(self.tokens)) / self.tokens.sum()
            order = np.argsort(omega, kind="stable")
            step = max(1, _BLOCK // self.tokens.size)
            for rows in (order[start : start + step] for start in range(0, omega.size, step)):
                widest = int(np.searchsorted(lightest, omega[rows[-1]], side="right")) + 1
                best, rank = self._window(alpha[rows], widest)
                inside = rank <= omega[rows, None]
                i = np.nonzero(inside)[0]
                value = np.zeros(rank.shape)  # Eq. 3 without ε
                value[inside] = (2.0 * expit(lam[rows][i] * (omega[rows][i] - rank[inside]))) ** eta[rows][i]
                copies[rows] = value.sum(axis=1)
                value *= self.tokens[best]
                tokens[rows] = value.sum(axis=1)
                for n, column in enumerate(self.scores):
                    scores[rows, n] = np.einsum("ij,ij->i", value, column[best])
        tokens += epsilon * self.tokens.sum()
        copies += epsilon * self.tokens.size
        scores += epsilon[:, None] * (self.scores @ self.tokens)
        return tokens, scores, copies

    def _window(self, alpha: Array, width: int) -> tuple[NDArray[np.intp], Array]:
        """The first ``width`` documents by q̄ and their r̄, each [T, width]; beyond it no document has r̄ <= ω.

        ``width`` exceeds by one the number of documents that fit into the share ω even if the lightest came first, so
        the last one here is outside the window, and so is a tie group that reaches it.
        """
        merged = np.multiply.outer(alpha[:, 0], self.scores[0])  # Eq. 1, in the order of ``merge_quality``
        for n in range(1, len(self.scores)):
            merged += np.multiply.outer(alpha[:, n], self.scores[n])
        best = np.argsort(merged, axis=1)[:, :width]
        mass = np.cumsum(self.tokens[best], axis=1)
        quality = np.take_along_axis(merged, best, axis=1)
        tied = quality[:, :-1] == quality[:, 1:]
        if tied.any():  # Eq. 2 counts the whole tie group: take the mass at its end
            mass[:, :-1][tied] = np.iinfo(np.int64).max
            mass = np.minimum.accumulate(mass[:, ::-1], axis=1)[:, ::-1]
        return best, mass / self.tokens.sum()


def _theta_columns(vectors: Array, n_domains: int) -> Array:
    x = np.array(vectors, dtype=np.float64)
    lam = x[:, -4 * n_domains : -3 * n_domains]
    np.log10(np.maximum(lam, _LAM_FLOOR), out=lam)
    return x


def _theta_names(theta: Parameters) -> list[str]:
    names = theta.names()
    start = theta.n_domains * theta.n_scorers
    lam = slice(start, start + theta.n_domains)
    names[lam] = [f"log10_{name}" for name in names[lam]]
    return names


def _derived_columns(statistics: SelectionStatistics) -> Array:
    selected = np.maximum(statistics.selected_tokens, 1e-300)
    share = statistics.tokens_per_domain / selected[:, None]
    size = np.log(np.maximum(selected, 1.0))
    return np.concatenate([np.sqrt(share), size[:, None], statistics.mean_score], axis=1)


def _derived_names(domains: tuple[str, ...], scorers: tuple[str, ...]) -> list[str]:
    shares = [f"sqrt_share[{domain}]" for domain in domains]
    return [*shares, SIZE, *(f"mean_score[{scorer}]" for scorer in scorers)]
