"""SampleMix: its weights are the formulas', its budget is met, and no cut of the corpus changes a copy."""

import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter, ValidationError
from scipy.stats import spearmanr
from small_run import MODELS, corpus_texts

from quadmix_plugin.clusters import Clusters, _Assign, _Embed, _Sample
from quadmix_plugin.drawn_tokens import _Sum
from quadmix_plugin.embeddings import HashedWords, ModelEmbeddings
from quadmix_plugin.errors import InputError
from quadmix_plugin.labelled_corpus import MemoryCorpus, check_selector
from quadmix_plugin.sampling import draw_copies
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.stages.selectors.samplemix import SampleMix, SoftmaxOfPriority, _Members, scaled_diversity

N = 900
RNG = np.random.default_rng(6)
TEXTS = corpus_texts(N)
IDS = [f"doc-{i}" for i in range(N)]
TOKENS = RNG.integers(1, 800, N)
SIGMA = RNG.random((N, 2)).astype(np.float32)
BUDGET = int(TOKENS.sum()) // 4
CLUSTERS = 12


def _corpus(texts=TEXTS, sigma=SIGMA, tokens=TOKENS, **rest) -> MemoryCorpus:
    n = len(texts)
    domains = np.zeros(n, dtype=np.int64)
    table = ScoreTable(pa.array(IDS[:n]), domains, tokens[:n], -sigma, ("all",), ("edu", "prose"))
    return MemoryCorpus.of(table, sigma, texts, **rest)


CORPUS = _corpus()


def _fit(selector: SampleMix, corpus: MemoryCorpus = CORPUS, budget: int = BUDGET, seed: int = 3):
    """The law and the corpus with the columns that it reads."""
    check_selector(selector, corpus.summary, budget)
    corpus = replace(corpus)  # the columns are added to a corpus of this call alone
    law = selector.fit(corpus, budget, seed)
    sample = corpus.fold(_Sample.of_corpus(corpus.table.num_rows, selector.sample, seed))
    vectors = np.array(sample["embedding"].to_pylist(), dtype=np.float32)
    clusters = Clusters.fit(vectors, selector.clusters, selector.distance, seed)
    assert clusters.columns[0] == law.cluster_column
    return law, corpus, clusters


def _copies(selector: SampleMix, corpus: MemoryCorpus = CORPUS, **rest) -> np.ndarray:
    law, labelled, _ = _fit(selector, corpus, **rest)
    return labelled.copies(law)


def _plain_expected(
    vectors: np.ndarray, centroids: np.ndarray, sigma: np.ndarray, alpha: float, tau: float, tokens=TOKENS
) -> np.ndarray:
    """Expected copies by loops over the formulas, with Euclidean distance."""
    distances = [[float(np.linalg.norm(v.astype(float) - c)) for c in centroids.astype(float)] for v in vectors]
    cluster = [int(np.argmin(row)) for row in distances]
    diversity = {}
    present = sorted(set(cluster))
    for k in present:
        within = [distances[i][k] for i in range(len(vectors)) if cluster[i] == k]
        apart = [float(np.linalg.norm(centroids[k].astype(float) - centroids[j])) for j in present if j != k]
        diversity[k] = sum(within) / len(within) * (sum(apart) / len(apart))
    low, high = min(diversity.values()), max(diversity.values())
    quality = [-sum(float(x) for x in row) / len(row) for row in sigma]
    weights = []
    for k, q in zip(cluster, quality, strict=True):
        d = (diversity[k] - low) / (high - low)
        p = alpha * d + (1 - alpha) * (q - min(quality)) / (max(quality) - min(quality))
        weights.append(np.exp(p / tau))
    scale = BUDGET / sum(t * w for t, w in zip(tokens, weights, strict=True))
    return np.array([scale * w for w in weights])


@pytest.mark.parametrize(("alpha", "tau", "quality"), [(0.8, 0.2, None), (0.3, 0.05, ["prose"]), (1, 1, ["edu"])])
def test_expected_copies_are_those_of_the_formulas(alpha, tau, quality):
    law, labelled, clusters = _fit(SampleMix(alpha, tau, CLUSTERS, quality=quality))
    columns = [("edu", "prose").index(name) for name in quality or ("edu", "prose")]
    vectors = HashedWords().embed(TEXTS)
    expected = _plain_expected(vectors, clusters.centroids, SIGMA[:, columns], alpha, tau)
    np.testing.assert_allclose(law.expected(labelled.table), expected, rtol=1e-5)
    np.testing.assert_array_equal(labelled.copies(law), draw_copies(law.expected(labelled.table), IDS, 3))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("sample", [100_000, 200])
def test_neither_partitions_nor_the_order_of_rows_change_a_copy(distance, sample):
    selector = SampleMix(clusters=CLUSTERS, sample=sample, distance=distance, tau=0.03)
    law, labelled, _ = _fit(selector)
    order = np.random.default_rng(0).permutation(N)
    shuffled = replace(CORPUS, table=CORPUS.table.take(pa.array(order)))
    for partitions in (7, 64):
        for corpus, rows in ((CORPUS, np.arange(N)), (shuffled, order)):
            other, cut, _ = _fit(selector, replace(corpus, partitions=partitions))
            assert (other.scale, other.sd_tokens, other.largest) == (law.scale, law.sd_tokens, law.largest)
            np.testing.assert_array_equal(cut.copies(other), labelled.copies(law)[rows])
    assert (_copies(selector, seed=4) != labelled.copies(law)).any()


def test_merged_states_merge_again():
    """Groups of partitions are merged before the whole."""
    selector = SampleMix(clusters=CLUSTERS, sample=100)
    law, labelled, clusters = _fit(selector)
    folds = [_Sample.of_corpus(N, 100, 3), _Members(clusters.columns, law.quality), _Sum(law), _Sum(law, variance=True)]
    for fold in folds:
        states = [fold.of(labelled.table.slice(i, 100)) for i in range(0, N, 100)]
        whole = fold.merge(states)
        assert fold.merge([fold.merge(states[4:]), fold.merge(states[:4])]).equals(whole)
        assert fold.merge([fold.of(labelled.table)]).equals(whole)


@pytest.mark.parametrize("tau", [0.2, 0.01])
@pytest.mark.parametrize("share", [0.1, 1, 3.5])
def test_the_budget_is_met_within_three_standard_deviations(tau, share):
    budget = int(TOKENS.sum() * share)
    law, labelled, _ = _fit(SampleMix(clusters=CLUSTERS, tau=tau), budget=budget)
    expected = law.expected(labelled.table)
    rest = expected - np.floor(expected)
    assert law.expected_tokens == budget
    assert (TOKENS * expected).sum() == pytest.approx(budget, rel=1e-9)
    assert law.sd_tokens == pytest.approx(np.sqrt((TOKENS.astype(float) ** 2 * rest * (1 - rest)).sum()), rel=1e-5)
    drawn = np.array([(TOKENS * replace(law, seed=seed).copies(labelled.table)).sum() for seed in range(60)])
    assert abs(drawn[0] - budget) <= 3 * law.sd_tokens
    assert abs(drawn.mean() - budget) <= 4 * law.sd_tokens / np.sqrt(drawn.size)
    assert 0.7 < drawn.std() / law.sd_tokens < 1.3


def test_quality_alone_orders_the_copies_where_alpha_is_0():
    law, labelled, _ = _fit(SampleMix(alpha=0, clusters=CLUSTERS))
    assert spearmanr(law.expected(labelled.table), -SIGMA.astype(float).mean(axis=1)).statistic == pytest.approx(1)


def test_good_documents_and_those_of_wide_clusters_apart_get_more_copies():
    words = [f"{a}{b}" for a in "bcdfghjk" for b in "aeiouy"]
    rng = np.random.default_rng(5)
    alike = ["same words here every time and again " + " ".join(rng.choice(words, 1)) for _ in range(N // 2)]
    varied = [" ".join(f"other{i}" for i in rng.integers(0, 60, 25)) for _ in range(N - N // 2)]
    corpus = _corpus(alike + varied)
    diverse = _copies(SampleMix(alpha=1, clusters=2), corpus, budget=2 * int(TOKENS.sum()))
    assert diverse[N // 2 :].mean() > 3 * diverse[: N // 2].mean()
    good = SIGMA.mean(axis=1) < np.median(SIGMA.mean(axis=1))
    copies = _copies(SampleMix(alpha=0.5, clusters=2), corpus, budget=2 * int(TOKENS.sum()))
    for group in (np.arange(N) < N // 2, np.arange(N) >= N // 2):
        assert copies[group & good].mean() > 1.2 * copies[group & ~good].mean()


def test_diversity_is_scaled_to_the_clusters():
    np.testing.assert_allclose(scaled_diversity([1, 2, 3, 0.5], [2, 2, 1, 1]), [1.5 / 3.5, 1, 2.5 / 3.5, 0])
    assert scaled_diversity([0.3], [0.0]).tolist() == [0]
    assert scaled_diversity([0.1 + 0.2, 0.3], [1, 1]).tolist() == [0, 0]


def test_one_cluster_and_one_quality_give_all_the_same():
    law, labelled, _ = _fit(SampleMix(clusters=1), _corpus(sigma=np.full((N, 2), 0.5, np.float32)))
    np.testing.assert_allclose(law.expected(labelled.table), BUDGET / TOKENS.sum(), rtol=1e-9)


def test_clusters_without_documents_are_left_out(monkeypatch):
    monkeypatch.setattr("quadmix_plugin.clusters.find_spec", lambda name: None)  # faiss leaves none empty
    texts = ([*TEXTS[:3], ""] * N)[:N]
    law, labelled, _ = _fit(SampleMix(clusters=9), _corpus(texts))
    assert np.isnan(law.diversity).any()
    assert set(law.diversity[~np.isnan(law.diversity)]) == {0}  # four texts over and over: every distance is rounding
    assert abs((TOKENS * labelled.copies(law)).sum() - BUDGET) <= 3 * law.sd_tokens


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_cluster_without_documents_changes_no_diversity(distance):
    law, labelled, clusters = _fit(SampleMix(clusters=CLUSTERS, distance=distance))
    opposite = -HashedWords().embed(TEXTS).mean(axis=0, keepdims=True)
    nowhere = opposite / np.linalg.norm(opposite)
    more = replace(
        clusters, centroids=np.concatenate([clusters.centroids[:5], nowhere, clusters.centroids[5:], nowhere])
    )
    labelled.add_columns(_Assign(more))
    members = labelled.fold(_Members(more.columns, law.quality))
    other = SoftmaxOfPriority.of_members(members, more, law.quality, law.alpha, law.tau, law.seed)
    assert np.isnan(other.diversity[[5, -1]]).all()
    np.testing.assert_array_equal(np.delete(other.diversity, [5, -1]), law.diversity)
    assert other.largest == law.largest


def test_a_small_temperature_keeps_its_precision():
    """The weights of most documents are below 1e-200 of the best one's."""
    law, labelled, _ = _fit(SampleMix(clusters=CLUSTERS, tau=0.001), budget=3)
    assert (TOKENS * law.expected(labelled.table)).sum() == pytest.approx(3, rel=1e-6)
    assert law.expected(labelled.table).max() == law.scale


def test_a_model_embeds_as_well():
    selector = SampleMix(clusters=CLUSTERS, model=str(MODELS / "fineweb-edu"))
    corpus = _corpus(TEXTS[:200], SIGMA[:200])
    copies = _copies(selector, corpus, budget=20_000)
    np.testing.assert_array_equal(_copies(selector, replace(corpus, partitions=7), budget=20_000), copies)
    assert (copies != _copies(SampleMix(clusters=CLUSTERS), corpus, budget=20_000)).any()


def test_passes_and_law_are_the_same_after_pickling():
    law, labelled, clusters = _fit(SampleMix(clusters=CLUSTERS))
    table = labelled.table
    for each in (_Sample.of_corpus(N, 100, 3), _Members(clusters.columns, law.quality), _Sum(law), _Assign(clusters)):
        assert pickle.loads(pickle.dumps(each)).of(table).equals(each.of(table))  # noqa: S301 - our own
    embed = pickle.loads(pickle.dumps(_Embed(HashedWords(32))))  # noqa: S301
    assert embed.of(table).equals(_Embed(HashedWords(32)).of(table))
    again = pickle.loads(pickle.dumps(law))  # noqa: S301
    np.testing.assert_array_equal(again.copies(table), law.copies(table))


def test_it_is_refused_before_any_pass():
    summary = CORPUS.summary
    with pytest.raises(InputError, match=r"clusters: 901, and the corpus has 900 documents; lower clusters"):
        check_selector(SampleMix(clusters=901), summary, BUDGET)
    with pytest.raises(InputError, match="quality: 'beauty' is not among edu, prose"):
        check_selector(SampleMix(clusters=2, quality=["beauty"]), summary, BUDGET)
    with pytest.raises(InputError, match="needs a pinned revision"):
        check_selector(SampleMix(clusters=2, model="someone/encoder"), summary, BUDGET)
    check_selector(SampleMix(clusters=900), summary, 10 * int(TOKENS.sum()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.1}, "alpha: 1.1; give 0"),
        ({"alpha": float("nan")}, "alpha: nan"),
        ({"tau": 0}, "tau: 0; give a number above 0"),
        ({"tau": float("inf")}, "tau: inf"),
        ({"clusters": 0}, "clusters: 0 of a sample"),
        ({"clusters": 11, "sample": 10}, "clusters: 11 of a sample of 10 documents"),
        ({"quality": []}, "quality: no scorers"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SampleMix(**options)


def test_a_temperature_that_gives_one_document_everything_is_refused():
    with pytest.raises(InputError, match=r"tau: 0.0001 gives single documents .*; raise tau"):
        SampleMix(clusters=CLUSTERS, tau=0.0001).fit(CORPUS, 2**31 * 1000, 3)


def test_a_recipe_can_give_the_options():
    options = {"alpha": 0.5, "clusters": 7, "distance": "cosine", "quality": ["edu"], "model": None}
    assert TypeAdapter(SampleMix).validate_python(options) == SampleMix(
        0.5, clusters=7, distance="cosine", quality=["edu"]
    )
    with pytest.raises(ValidationError, match="distance"):
        TypeAdapter(SampleMix).validate_python({"distance": "manhattan"})
    assert isinstance(SampleMix(model=str(MODELS / "fineweb-edu"))._embedder(), ModelEmbeddings)
    assert isinstance(_fit(SampleMix(clusters=2))[0], SoftmaxOfPriority)
