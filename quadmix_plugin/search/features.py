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

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.score_index import ScoreIndex

Array = NDArray[np.float64]
Kind = Literal["theta", "theta+derived"]
Thetas = Sequence[Parameters] | Array
"""Parameters, or their ``to_vector`` as the rows of an array [T, (N + 4)·M]."""

SIZE = "log_selected_tokens"
"""The derived feature that is 0 where at most one token is selected."""

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
    """Features of any θ over one corpus, which is checked and laid out once.

    Raises:
        InputError: from ``of``: σ(q) whose shape does not fit the table or that is not finite; from the methods: θ of
            another corpus.
    """

    kind: Kind
    domains: tuple[str, ...]
    scorers: tuple[str, ...]
    index: ScoreIndex

    @classmethod
    def of(cls, table: ScoreTable, normalised: ArrayLike, kind: Kind = "theta+derived") -> Self:
        """The map over this table; ``normalised`` [n, N] is σ(q), smaller = better."""
        if kind not in ("theta", "theta+derived"):
            raise InputError(f"features: {kind!r}; choose 'theta' or 'theta+derived'")
        scores = np.asarray(normalised, dtype=np.float32)
        if scores.shape != (table.n, len(table.scorers)) or table.n == 0:
            raise InputError(
                f"normalised: shape {scores.shape}; give one row for each of the {table.n} documents and one column "
                f"for each of the scorers {', '.join(table.scorers)}"
            )
        index = ScoreIndex.of(scores, table.domain_ids, table.tokens, table.doc_ids, n_domains=len(table.domains))
        return cls(kind, table.domains, table.scorers, index)

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
        lam, omega, eta, epsilon = (np.ascontiguousarray(rest[:, i]) for i in range(4))
        tokens, scores, copies = self.index.expect(np.ascontiguousarray(alpha), lam, omega, eta, epsilon)
        selected, totals = tokens.sum(axis=1), self.index.totals
        corpus = self.index.token_scores.sum(axis=0) / totals.tokens.sum()
        empty = selected <= 0
        mean = np.where(empty[:, None], corpus, scores / np.where(empty, 1.0, selected)[:, None])
        documents = totals.documents.sum()
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
    """X [T, M + 2 + N]: √ of each domain's share of the selected tokens, their log, mean S, mean scores.

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
    mean = statistics.mean_sampling_value
    return np.concatenate([np.sqrt(share), size[:, None], mean[:, None], statistics.mean_score], axis=1)


def _derived_names(domains: tuple[str, ...], scorers: tuple[str, ...]) -> list[str]:
    shares = [f"sqrt_share[{domain}]" for domain in domains]
    return [*shares, SIZE, "mean_sampling_value", *(f"mean_score[{scorer}]" for scorer in scorers)]
