"""Clusters: the nearest centroid to the bit for any batch, and the same centroids for any order of the documents."""

from importlib.util import find_spec

import numpy as np
import pytest
from small_run import corpus_texts

from quadmix_plugin import clusters as module
from quadmix_plugin.clusters import Clusters, _Sample
from quadmix_plugin.embeddings import HashedWords
from quadmix_plugin.errors import InputError

VECTORS = HashedWords().embed(corpus_texts(800))
DISTANCES = ("euclidean", "cosine")


def _plain_distance(a: np.ndarray, b: np.ndarray, distance: str) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(1 - a @ b) if distance == "cosine" else float(np.sqrt(((a - b) ** 2).sum()))


@pytest.fixture(params=DISTANCES, scope="module")
def clusters(request) -> Clusters:
    return Clusters.fit(VECTORS, 20, request.param, seed=4)


def test_every_vector_is_in_its_nearest_cluster(clusters):
    found, distance = clusters.assign(VECTORS[:200])
    assert (found.dtype, distance.dtype) == (np.int32, np.float64)
    for vector, k, d in zip(VECTORS, found, distance, strict=False):
        plain = [_plain_distance(vector, c, clusters.distance) for c in clusters.centroids]
        assert d == pytest.approx(plain[k], abs=1e-12)
        assert plain[k] <= min(plain) + 1e-6


def test_assignment_is_the_same_to_the_bit_in_any_batch_and_place(clusters):
    found, distance = clusters.assign(VECTORS)
    order = np.random.default_rng(0).permutation(len(VECTORS))
    for size in (1, 3, 8, 33, 511):
        parts = [clusters.assign(VECTORS[order[i : i + size]]) for i in range(0, len(order), size)]
        np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), found[order])
        np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), distance[order])
    strided = np.asfortranarray(VECTORS[::2])
    np.testing.assert_array_equal(clusters.assign(strided)[1], distance[::2])


def test_of_equal_centroids_the_first_is_taken():
    one = VECTORS[:1]
    assert Clusters(np.concatenate([VECTORS[1:2], one, one])).assign(one)[0].tolist() == [1]


def test_separation_is_the_mean_distance_to_the_other_centroids(clusters):
    k = len(clusters.centroids)
    for i, found in enumerate(clusters.separation()):
        others = [_plain_distance(clusters.centroids[i], clusters.centroids[j], clusters.distance) for j in range(k)]
        assert found == pytest.approx((sum(others) - others[i]) / (k - 1), abs=1e-9)
    assert Clusters(VECTORS[:1]).separation().tolist() == [0]


def test_fit_finds_groups_that_are_there(clusters):
    rng = np.random.default_rng(2)
    centres = np.eye(6, 32)
    group = rng.integers(0, 6, 600)
    points = centres[group] + rng.normal(0, 0.05, (600, 32))
    points = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)
    found, _ = Clusters.fit(points, 6, clusters.distance, seed=8).assign(points)
    assert len({(g, k) for g, k in zip(group, found, strict=True)}) == 6


@pytest.mark.parametrize("limit", [module._LLOYD, 0])
def test_fit_is_reproducible_and_depends_on_the_seed(monkeypatch, limit):
    monkeypatch.setattr(module, "_LLOYD", limit)
    first, again, other = (Clusters.fit(VECTORS, 20, seed=seed) for seed in (1, 1, -2))
    np.testing.assert_array_equal(first.centroids, again.centroids)
    assert first.columns == again.columns
    assert first.columns != other.columns


def test_columns_tell_other_centroids_and_distances_apart(clusters):
    moved = clusters.centroids.copy()
    moved[3, 5] = np.nextafter(moved[3, 5], np.float32(2))
    other = "cosine" if clusters.distance == "euclidean" else "euclidean"
    made = [clusters, Clusters(moved, clusters.distance), Clusters(clusters.centroids, other)]
    assert len({name for each in made for name in each.columns}) == 6


def test_cosine_centroids_have_length_one():
    found = Clusters.fit(VECTORS, 20, "cosine").centroids
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_fewer_different_vectors_than_clusters_leave_some_empty():
    few = np.repeat(VECTORS[:3], 10, axis=0)
    fitted = Clusters(np.asarray(module._by_sklearn(few, 8, 0), dtype=np.float32))
    found, distance = fitted.assign(few)
    assert len(set(found.tolist())) == 3
    np.testing.assert_allclose(distance, 0, atol=1e-6)


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(InputError, match="clusters: 11 of 10 documents"):
        Clusters.fit(VECTORS[:10], 11)
    with pytest.raises(InputError, match="distance: 'manhattan'; give euclidean or cosine"):
        Clusters.fit(VECTORS, 3, "manhattan")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the centroids have 512 columns"):
        Clusters(VECTORS[:3]).assign(VECTORS[:3, :100])


@pytest.mark.parametrize("documents", [1, 2000, 10**9])
def test_the_sample_s_bound_leaves_enough_documents_and_no_more_than_needed(documents):
    size = 1000
    sample = _Sample.of_corpus(documents, size, seed=0)
    expected = documents * (sample.bound / 2**64)
    assert min(documents, size + 5 * size**0.5) <= expected * (1 + 1e-9)
    assert expected <= 1.25 * size


@pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed")
@pytest.mark.parametrize("distance", DISTANCES)
def test_faiss_is_reproducible_and_as_good_as_scikit_learn(distance):
    fitted = [module._by_faiss(VECTORS, 20, 5) for _ in range(2)]
    np.testing.assert_array_equal(*fitted)
    both = (fitted[0], module._by_sklearn(VECTORS, 20, 5))
    spread = [(Clusters(np.asarray(c, np.float32)).assign(VECTORS)[1] ** 2).sum() for c in both]
    assert spread[0] < 1.03 * spread[1]
    assert Clusters.fit(VECTORS, 20, distance, 5).centroids.shape == (20, 512)
