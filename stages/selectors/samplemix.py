"""SampleMix: every document has a weight of its own, from its quality and from the diversity of its cluster.

Xi et al., "SampleMix: A Sample-wise Pre-training Data Mixing Strategy by Coordinating Data Quality and Diversity",
arXiv 2503.01506. The passes: embed, sample, assign to clusters, add up each cluster, the weights and the variance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.clusters import Clusters, Distance, clustered
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.drawn_tokens import mean_tokens, sd_tokens
from quadmix_plugin.embeddings import WORD_DIMENSIONS, Embedder, HashedWords, ModelEmbeddings
from quadmix_plugin.errors import InputError
from quadmix_plugin.labelled_corpus import LabelledCorpus, require_scorers
from quadmix_plugin.sampling import draw_copies
from quadmix_plugin.schema import DOC_ID
from quadmix_plugin.stages.selectors.top_k import MeanQuality

_CLUSTER, _DOCUMENTS, _DISTANCE, _LOW, _HIGH = "cluster", "documents", "distance", "low", "high"
_MOST_COPIES = np.iinfo(np.int32).max
_DISTANCE_UNIT = 2.0**-28  # distances are at most 2: their sum fits int64 for 17 billion documents
_ROUNDING = 1e-5  # more than that of a distance to a mean in float32

Array = NDArray[np.float64]


@dataclass
class SampleMix:
    """Draws documents with copies in proportion to exp(p/τ), where p = α·diversity + (1 - α)·quality.

    Diversity is that of the document's K-means cluster: its compactness (mean distance of its documents to the
    centroid) times its separation (mean distance of the centroid to the others), scaled to 0 … 1 over the clusters.
    Quality is scaled to 0 … 1 over the documents. Clusters without documents are left out; where all are alike, all
    diversities are 0, and likewise for quality. Different from the paper: quality comes from the run's scorers in place
    of one that a language model's labels trained, and the budget holds for expected tokens, not for documents. The
    paper's embedder, its number of clusters, its distance and τ could not be verified; the defaults are ours, but for
    α = 0.8.

    Args:
        alpha: weight of diversity against quality, 0 to 1.
        tau: temperature; smaller gives the documents of large p more of the copies.
        clusters: K.
        sample: documents that K-means is fitted on, chosen by hash; they are held in memory.
        model: an encoder whose mean last hidden state is the embedding, a folder or a hub id; None embeds by hashed
            words, which needs no model.
        revision: of a model on the hub.
        dimensions: of hashed words; a model has its own.
        distance: ``euclidean`` or ``cosine``.
        quality: the scorers whose mean normalised score is the quality; None takes all.
    """

    name: ClassVar[str] = "samplemix"
    repeats: ClassVar[bool] = True
    alpha: float = 0.8
    tau: float = 0.2
    clusters: int = 100
    sample: int = 100_000
    model: str | None = None
    revision: str | None = None
    dimensions: int = WORD_DIMENSIONS
    distance: Distance = "euclidean"
    quality: list[str] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha: {self.alpha}; give 0 (quality alone) to 1 (diversity alone), such as 0.8")
        if not 0 < self.tau < np.inf:
            raise InputError(f"tau: {self.tau}; give a number above 0, such as 0.2")
        if not 1 <= self.clusters <= self.sample:
            raise InputError(
                f"clusters: {self.clusters:,} of a sample of {self.sample:,} documents; give at least 1 cluster and as "
                f"many documents as clusters, better 100 times as many"
            )
        if self.quality is not None and not self.quality:
            raise InputError("quality: no scorers; name at least one, or leave it out for all")

    def check(self, summary: DomainSummary, budget_tokens: int) -> None:
        """Raises InputError for an unknown scorer, more clusters than documents, or a model that cannot be used."""
        del budget_tokens
        require_scorers(self.quality or (), summary.scorers, "quality")
        documents = int(summary.documents.sum())
        if self.clusters > documents:
            raise InputError(f"clusters: {self.clusters:,}, and the corpus has {documents:,} documents; lower clusters")
        self._embedder().check()

    def fit(self, corpus: LabelledCorpus, budget_tokens: int, seed: int) -> "SoftmaxOfPriority":
        """The law whose expected tokens are the budget.

        Raises:
            InputError: τ is so small that one document would have all copies.
        """
        clusters = clustered(corpus, self._embedder(), self.clusters, self.distance, self.sample, seed)
        quality = MeanQuality(tuple(self.quality or corpus.summary.scorers))
        members = corpus.fold(_Members(clusters.columns, quality))
        weights = SoftmaxOfPriority.of_members(members, clusters, quality, self.alpha, self.tau, seed)
        total = mean_tokens(corpus, weights)
        if budget_tokens >= _MOST_COPIES * total:
            raise InputError(
                f"tau: {self.tau} gives single documents {_MOST_COPIES:,} copies and more; raise tau, such as to 0.2"
            )
        law = replace(weights, scale=budget_tokens / total, expected_tokens=float(budget_tokens))
        return replace(law, sd_tokens=sd_tokens(corpus, law))

    def _embedder(self) -> Embedder:
        return ModelEmbeddings(self.model, self.revision) if self.model else HashedWords(self.dimensions)


@dataclass(frozen=True, eq=False)
class SoftmaxOfPriority:
    """The law: copies in proportion to exp(p/τ), an integer part and a draw of the rest.

    ``diversity`` [K] of the clusters, NaN of one without documents; ``best`` and ``worst``: the ends of the mean σ;
    ``largest``: the largest p of a document, which is expected to have ``scale`` copies. The tokens that are drawn have
    the mean ``expected_tokens`` and the standard deviation ``sd_tokens``. ``facts``: what else to know of the fit.
    """

    diversity: Array
    best: float
    worst: float
    largest: float
    quality: MeanQuality
    cluster_column: str
    alpha: float
    tau: float
    seed: int
    scale: float = 1.0
    expected_tokens: float = np.nan
    sd_tokens: float = np.nan
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_members(
        cls, members: pa.Table, clusters: Clusters, quality: MeanQuality, alpha: float, tau: float, seed: int
    ) -> Self:
        """The law, not yet scaled, from the state of ``_Members``."""
        present, documents, distances, low, high = (members[name].to_numpy() for name in members.column_names)
        compactness = distances * _DISTANCE_UNIT / documents
        separation = replace(clusters, centroids=clusters.centroids[present]).separation()
        diversity = np.full(len(clusters.centroids), np.nan)
        diversity[present] = scaled_diversity(compactness, separation)
        best, worst = float(low.min()), float(high.max())
        facts = {"k_means": clusters.library, "clusters_with_documents": int(present.size)}
        law = cls(diversity, best, worst, 0.0, quality, clusters.columns[0], alpha, tau, seed, facts=facts)
        return replace(law, largest=float(law.priority(present, low).max()))

    @property
    def columns(self) -> tuple[str, ...]:
        """The id, the cluster and the scores."""
        return (DOC_ID, self.cluster_column, *self.quality.columns)

    def priority(self, cluster: NDArray[np.integer], sigma: Array) -> Array:
        """p = α·d + (1 - α)·q [n] of documents of these clusters with these mean σ [n], smaller = better."""
        span = self.worst - self.best
        scaled = (self.worst - sigma) / span if span > 0 else np.zeros(sigma.size)
        return self.alpha * self.diversity[cluster] + (1 - self.alpha) * scaled

    def expected(self, batch: pa.Table) -> Array:
        """Expected copies of every document [n]."""
        priority = self.priority(batch[self.cluster_column].to_numpy(), self.quality.of(batch))
        return self.scale * np.exp((priority - self.largest) / self.tau)

    def copies(self, batch: pa.Table) -> NDArray[np.int32]:
        """Copies of every document [n]."""
        return draw_copies(self.expected(batch), batch[DOC_ID], self.seed)


def scaled_diversity(compactness: ArrayLike, separation: ArrayLike) -> Array:
    """Compactness × separation of clusters [K], scaled to 0 … 1; zeros where all are the same but for rounding."""
    product = np.asarray(compactness, dtype=np.float64) * np.asarray(separation, dtype=np.float64)
    span = product.max() - product.min()
    return (product - product.min()) / span if span > _ROUNDING * np.max(separation) else np.zeros(product.size)


@dataclass(frozen=True)
class _Members:
    """Fold: of every cluster its documents, the sum of their distances in units, and their lowest and highest σ."""

    assigned: tuple[str, str]
    quality: MeanQuality

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.assigned, *self.quality.columns)

    def of(self, batch: pa.Table) -> pa.Table:
        cluster, distance = (batch[name].to_numpy() for name in self.assigned)
        units, sigma = np.rint(distance / _DISTANCE_UNIT).astype(np.int64), self.quality.of(batch)
        return _by_cluster(cluster.astype(np.int64), np.ones(cluster.size, np.int64), units, sigma, sigma)

    def merge(self, states: Sequence[pa.Table]) -> pa.Table:
        found = pa.concat_tables(states)
        return _by_cluster(*(found[name].to_numpy() for name in found.column_names))


def _by_cluster(
    cluster: NDArray[np.int64], documents: NDArray[np.int64], distance: NDArray[np.int64], low: Array, high: Array
) -> pa.Table:
    present, at = np.unique(cluster, return_inverse=True)
    sums = np.zeros((2, present.size), dtype=np.int64)
    np.add.at(sums[0], at, documents)
    np.add.at(sums[1], at, distance)
    lowest, highest = np.full(present.size, np.inf), np.full(present.size, -np.inf)
    np.minimum.at(lowest, at, low)
    np.maximum.at(highest, at, high)
    return pa.table({_CLUSTER: present, _DOCUMENTS: sums[0], _DISTANCE: sums[1], _LOW: lowest, _HIGH: highest})
