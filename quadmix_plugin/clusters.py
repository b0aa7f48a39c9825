"""K-means clusters of documents: fitted on a sample, then the same for every document wherever it is computed.

Which library fits them depends on what is installed; which cluster a vector is in depends on the centroids alone.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.util import find_spec
from math import sqrt
from typing import Any, Literal, Self, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin import models
from quadmix_plugin.embeddings import Embedder, Vectors, from_column, to_column
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64, stream_hash
from quadmix_plugin.labelled_corpus import LabelledCorpus
from quadmix_plugin.schema import DOC_ID, TEXT

logger = logging.getLogger(__name__)

Distance = Literal["euclidean", "cosine"]

EMBEDDING, _HASH = "embedding", "hash"
_SAMPLE_STREAM = 0x5A3D1E  # so that a document's place in the sample says nothing of its draw
_ITERATIONS = 100
_LLOYD = 20_000_000  # documents × clusters up to which scikit-learn iterates over all, within a minute on one core
_BATCH = 4096
_SEEDS = 1 << 31  # what the libraries take


@dataclass(frozen=True, eq=False)
class Clusters:
    """Centroids [K, d] float32 and the distance by which a vector belongs to one of them.

    ``distance``: ``euclidean``, |x - c|, or ``cosine``, 1 - x·c; for the latter vectors have length one, as embedders
    give them, and so have the centroids. ``library``: which one fitted them.
    """

    centroids: Vectors
    distance: Distance = "euclidean"
    library: str = ""

    @classmethod
    def fit(cls, sample: Vectors, k: int, distance: Distance = "euclidean", seed: int = 0) -> Self:
        """K-means of a sample [s, d]: by cuML where it and a GPU are there, else faiss if installed, or scikit-learn.

        The last two use one thread, so that the centroids do not depend on the number of cores. The order of the sample
        matters, and so may the version of the library. A cluster has no document where the sample has fewer than K
        different vectors.

        Raises:
            InputError: more clusters than vectors, or another distance.
        """
        if distance not in get_args(Distance):
            raise InputError(f"distance: {distance!r}; give {' or '.join(get_args(Distance))}")
        if not 1 <= k <= len(sample):
            raise InputError(f"clusters: {k:,} of {len(sample):,} documents; give at least 1, and not more than these")
        vectors, seed = np.ascontiguousarray(sample, dtype=np.float32), seed % _SEEDS
        if find_spec("cuml") and models.choose_device("auto") == "cuda":
            name, centroids = "cuML", _by_cuml(vectors, k, seed)
        elif find_spec("faiss"):
            name, centroids = "faiss", _by_faiss(vectors, k, seed)
        else:
            name, centroids = "scikit-learn", _by_sklearn(vectors, k, seed)
        logger.info("K-means: %d clusters of %d documents by %s", k, len(vectors), name)
        if distance == "cosine":
            lengths = np.linalg.norm(centroids, axis=1, keepdims=True)
            centroids = centroids / np.where(lengths > 0, lengths, 1)
        return cls(np.ascontiguousarray(centroids, dtype=np.float32), distance, name)

    @property
    def columns(self) -> tuple[str, str]:
        """The columns for a document's cluster and its distance to the centroid, named by what the centroids are.

        An interrupted run fits again, on a GPU perhaps to other bits, and must then not go on with columns of others.
        """
        digest = blake2b(self.centroids.tobytes() + self.distance.encode(), digest_size=4).hexdigest()
        return f"cluster_{digest}", f"distance_{digest}"

    def assign(self, vectors: Vectors) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """The nearest centroid of every vector [n, d], the first of equals, and the distance to it, both [n].

        To the bit the same for a vector in any batch and at any place. By cosine a zero vector is as far from all.

        Raises:
            InputError: vectors of another width than the centroids.
        """
        from quadmix_plugin.kernels.nearest import nearest

        width = self.centroids.shape[1]
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise InputError(f"vectors: shape {vectors.shape}, the centroids have {width} columns; embed all alike")
        cluster, distance = np.empty(len(vectors), dtype=np.int32), np.empty(len(vectors))
        rows, transposed = np.ascontiguousarray(vectors, dtype=np.float32), np.ascontiguousarray(self.centroids.T)
        nearest(rows, transposed, self.distance == "cosine", cluster, distance)
        return cluster, distance

    def separation(self) -> NDArray[np.float64]:
        """The mean distance of every centroid to the others [K]; 0 where there is but one."""
        centroids = self.centroids.astype(np.float64)
        found = np.zeros(len(centroids))
        for k, centroid in enumerate(centroids):
            others = np.delete(centroids, k, axis=0)
            if self.distance == "cosine":
                distances = 1 - (others * centroid).sum(axis=1)
            else:
                distances = np.sqrt(((others - centroid) ** 2).sum(axis=1))
            found[k] = distances.mean() if distances.size else 0.0
        return found


def clustered(
    corpus: LabelledCorpus, embedder: Embedder, k: int, distance: Distance, sample: int, seed: int
) -> Clusters:
    """K-means clusters that were fitted on ``sample`` documents; the corpus gets ``Clusters.columns``.

    These are the ones with the smallest hashes, in that order, so that the clusters do not depend on the order of
    documents. The embeddings stay in the column ``embedding``.

    Raises:
        InputError: as ``Clusters.fit``; or as the embedder.
    """
    corpus.add_columns(_Embed(embedder))
    found = corpus.fold(_Sample.of_corpus(int(corpus.summary.documents.sum()), sample, seed))
    clusters = Clusters.fit(from_column(found[EMBEDDING]), k, distance, seed)
    corpus.add_columns(_Assign(clusters))
    return clusters


@dataclass(frozen=True)
class _Embed:
    """Derive: the embedding of the text."""

    embedder: Embedder
    columns: tuple[str, ...] = (TEXT,)
    makes: tuple[str, ...] = (EMBEDDING,)

    def on_device(self, device: str) -> Self:
        """The same on a device, where the embedder can be told."""
        embedder: Any = self.embedder
        return replace(self, embedder=replace(embedder, device=device)) if hasattr(embedder, "device") else self

    def of(self, batch: pa.Table) -> pa.Table:
        return pa.table({EMBEDDING: to_column(self.embedder.embed(batch[TEXT].to_pylist()))})


@dataclass(frozen=True)
class _Sample:
    """Fold: hash and embedding of the ``size`` documents with the smallest hashes, sorted; none is above ``bound``."""

    size: int
    bound: int
    seed: int
    columns: tuple[str, ...] = (DOC_ID, EMBEDDING)

    @classmethod
    def of_corpus(cls, documents: int, size: int, seed: int) -> Self:
        """With a bound that keeps states small, below which ``size`` documents lie, but for once in a billion times."""
        share = (size + 6 * sqrt(size) + 36) / documents
        return cls(size, min(int(share * 2.0**64), 2**64 - 1), seed)

    def of(self, batch: pa.Table) -> pa.Table:
        hashes = stream_hash(hash64(batch[DOC_ID], self.seed), _SAMPLE_STREAM)
        return self._smallest(pa.table({_HASH: hashes, EMBEDDING: batch[EMBEDDING]}))

    def merge(self, states: Sequence[pa.Table]) -> pa.Table:
        return self._smallest(pa.concat_tables(states))

    def _smallest(self, found: pa.Table) -> pa.Table:
        hashes = found[_HASH].to_numpy()
        order = np.argsort(hashes, kind="stable")[: self.size]
        return found.take(pa.array(order[hashes[order] <= np.uint64(self.bound)]))


@dataclass(frozen=True)
class _Assign:
    """Derive: the cluster and the distance to its centroid."""

    clusters: Clusters
    columns: tuple[str, ...] = (EMBEDDING,)

    @property
    def makes(self) -> tuple[str, ...]:
        return self.clusters.columns

    def of(self, batch: pa.Table) -> pa.Table:
        cluster, distance = self.clusters.assign(from_column(batch[EMBEDDING]))
        return pa.table(dict(zip(self.makes, (cluster, distance), strict=True)))


def _by_cuml(sample: Vectors, k: int, seed: int) -> Any:
    from cuml.cluster import KMeans  # pyright: ignore[reportMissingImports]

    fitted = KMeans(n_clusters=k, max_iter=_ITERATIONS, n_init=1, random_state=seed, output_type="numpy").fit(sample)
    return fitted.cluster_centers_


def _by_faiss(sample: Vectors, k: int, seed: int) -> Any:
    import faiss  # pyright: ignore[reportMissingImports]
    from sklearn.cluster import kmeans_plusplus
    from threadpoolctl import threadpool_limits

    every = {"min_points_per_centroid": 1, "max_points_per_centroid": len(sample)}  # it would take 256 of each cluster
    kmeans = faiss.Kmeans(sample.shape[1], k, niter=_ITERATIONS, seed=seed, **every)
    with threadpool_limits(1):
        starts, _ = kmeans_plusplus(sample, k, random_state=seed)  # its own are random documents, several of one group
        kmeans.train(sample, init_centroids=starts)
    return kmeans.centroids


def _by_sklearn(sample: Vectors, k: int, seed: int) -> Any:
    import warnings

    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    one: Any = 1  # scikit-learn declares a word
    if len(sample) * k <= _LLOYD:
        kmeans = KMeans(k, n_init=one, max_iter=_ITERATIONS, random_state=seed)
    else:
        kmeans = MiniBatchKMeans(k, n_init=one, max_iter=_ITERATIONS, batch_size=_BATCH, random_state=seed)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different vectors than clusters: some stay empty
        return kmeans.fit(sample).cluster_centers_
