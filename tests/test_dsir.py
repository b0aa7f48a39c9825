"""DSIR: the weights and the draw of the package ``data-selection``, to a token budget, however the corpus is cut."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_selection import HashedNgramDSIR
from small_run import QUICKSTART, corpus_texts

from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64
from quadmix_plugin.labelled_corpus import MemoryCorpus, check_selector
from quadmix_plugin.ngrams import NgramBuckets, log_ratio
from quadmix_plugin.schema import DOC_ID, TEXT, ScoreTable
from quadmix_plugin.stages.selectors.dsir import DSIR, LOG_WEIGHT, BucketCounts, LogWeights, gumbel

SEED = 11
# Of every second document the beginning only, so that there are texts on both sides of 100 words.
TEXTS = [text if i % 2 else text[: 40 * (i % 50)] for i, text in enumerate(corpus_texts(400))]
SHORT = [text[:60] for text in corpus_texts(400)]  # log-weights of long texts are too far apart for noise to matter
N = len(TEXTS)
IDS = pa.array([f"d{i}" for i in range(N)])
WORDS = NgramBuckets().sums(TEXTS, np.zeros(10_000))[1]
TABLE = ScoreTable(
    IDS,
    np.arange(N) % 3,
    np.maximum(WORDS, 1),
    np.zeros((N, 1), dtype=np.float32),
    ("a", "b", "c"),
    ("edu",),
)
LINES = [json.loads(line) for line in (QUICKSTART / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
TARGETS = {
    task: [f"{row['prompt']} {row['response']}" for row in LINES if row["task"] == task]
    for task in ("arc_easy", "mmlu", "hellaswag")
}
BUDGET = int(TABLE.tokens.sum()) // 5


def _corpus(
    partitions: int = 1, targets: dict[str, list[str]] | None = TARGETS, texts: list[str] = TEXTS
) -> MemoryCorpus:
    return MemoryCorpus.of(TABLE, TABLE.scores, texts, partitions=partitions, targets=targets)


def _in_order(order: np.ndarray, partitions: int = 1) -> MemoryCorpus:
    whole = _corpus()
    return MemoryCorpus(whole.table.take(pa.array(order)), whole.summary, partitions, TARGETS)


def _copies(selector: DSIR, corpus: MemoryCorpus, budget: int = BUDGET, seed: int = SEED) -> np.ndarray:
    check_selector(selector, corpus.summary, budget)
    return corpus.copies(selector.fit(corpus, budget, seed))


def _package(folder: Path, texts: list[str], min_words: int) -> HashedNgramDSIR:
    """The package's estimator after a fit on these texts and all targets, its weights computed."""
    rows = {"raw": [{"text": t, "id": i} for i, t in zip(IDS.to_pylist(), texts, strict=True)]}
    rows["target"] = [{"text": text} for task in sorted(TARGETS) for text in TARGETS[task]]
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    paths = [[str(folder / f"{name}.jsonl")] for name in rows]
    package = HashedNgramDSIR(*paths, cache_dir=str(folder / "cache"), num_proc=1, min_example_length=min_words)
    package.fit_importance_estimator(num_tokens_to_fit="all")
    package.compute_importance_weights()
    return package


def _weights(corpus: MemoryCorpus, derive: LogWeights) -> np.ndarray:
    corpus.add_columns(derive)
    return corpus.table[LOG_WEIGHT].to_numpy()


def _derive(min_words: int = 100) -> LogWeights:
    features = NgramBuckets()
    target = features.counts(text for texts in TARGETS.values() for text in texts)
    return LogWeights(features, log_ratio(target, features.counts(TEXTS)), min_words)


def test_log_weights_are_those_of_the_package(tmp_path: Path) -> None:
    package = _package(tmp_path, TEXTS, 100)
    expected = np.load(package.log_importance_weights_dir / "0.npy")
    words = np.load(package.perexample_metadata_dir / "0.npy")
    found = _weights(_corpus(), _derive())
    assert 20 < np.isnan(found).sum() < N - 20
    np.testing.assert_array_equal(np.isnan(found), ~package.perexample_metadata_filter(words))
    np.testing.assert_allclose(found, np.where(np.isnan(found), np.nan, expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("texts", "min_words"), [(TEXTS, 100), (SHORT, 9)])
@pytest.mark.parametrize("resample", [True, False])
def test_with_the_same_noise_it_takes_what_the_package_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], min_words: int, resample: bool
) -> None:
    package = _package(tmp_path, texts, min_words)
    long_enough = np.load(package.perexample_metadata_dir / "0.npy") >= min_words
    noise = gumbel(IDS, SEED)[long_enough]
    monkeypatch.setattr(np.random, "gumbel", lambda *, size: noise.reshape(size))
    package.resample(str(tmp_path / "out"), 60, top_k=not resample)
    taken = {json.loads(line)["id"] for line in (tmp_path / "out" / "0.jsonl").read_text().splitlines()}
    assert len(taken) == 60 < long_enough.sum() < N
    budget = int(TABLE.tokens[[i in taken for i in IDS.to_pylist()]].sum())
    copies = _copies(DSIR(min_words=min_words, resample=resample), _corpus(7, texts=texts), budget)
    assert set(IDS.filter(pa.array(copies == 1)).to_pylist()) == taken
    assert set(copies) == {0, 1}


@pytest.mark.parametrize("partitions", [1, 7, 64])
def test_weights_and_selection_do_not_depend_on_batches_or_order(partitions: int) -> None:
    expected, selected = _weights(_corpus(), _derive()), _copies(DSIR(), _corpus())
    order = np.random.default_rng(partitions).permutation(N)
    assert _weights(_corpus(partitions), _derive()).tobytes() == expected.tobytes()
    assert _weights(_in_order(order, partitions), _derive()).tobytes() == expected[order].tobytes()
    np.testing.assert_array_equal(_copies(DSIR(), _corpus(partitions)), selected)
    np.testing.assert_array_equal(_copies(DSIR(), _in_order(order, partitions)), selected[order])


def test_budget_is_met_and_documents_are_like_the_target() -> None:
    copies, weights = _copies(DSIR(), _corpus()), _weights(_corpus(), _derive())
    assert abs(int((TABLE.tokens * copies).sum()) - BUDGET) <= TABLE.tokens.max()
    assert weights[copies == 1].mean() > np.nanmean(weights)


def test_short_documents_are_never_taken() -> None:
    budget = int(TABLE.tokens[WORDS >= 100].sum())
    np.testing.assert_array_equal(_copies(DSIR(), _corpus(), budget), WORDS >= 100)
    with pytest.raises(InputError, match="the documents that may be taken have"):
        _copies(DSIR(), _corpus(), budget + 1)
    assert _copies(DSIR(min_words=0), _corpus(), int(TABLE.tokens.sum())).all()


def test_seed_changes_the_draw_and_not_the_largest_weights() -> None:
    corpus = _corpus(texts=SHORT)
    drawn = [_copies(DSIR(min_words=9), corpus, seed=seed) for seed in (1, 2)]
    drawn.append(_copies(DSIR(min_words=9, resample=False), corpus))
    assert all((drawn[i] != drawn[j]).sum() > 3 for i, j in ((0, 1), (0, 2), (1, 2)))
    largest = _copies(DSIR(resample=False), _corpus(), seed=1)
    np.testing.assert_array_equal(largest, _copies(DSIR(resample=False), _corpus(), seed=2))
    weights = _weights(_corpus(), _derive())
    assert weights[largest == 1].min() > np.nanmax(weights[largest == 0])


def test_noise_is_of_the_gumbel_distribution_and_finite_at_both_ends() -> None:
    noise = gumbel(pa.array(np.arange(200_000)), SEED)
    below = [(noise <= x).mean() for x in (-1, 0, 1, 3)]
    np.testing.assert_allclose(below, np.exp(-np.exp([1.0, 0, -1, -3])), atol=0.005)
    # splitmix64 is a bijection: two ids whose hash under seed 0 is all zeros and all ones.
    ends = pa.array(np.array([0x61C8864680B583EB, 0xE220A8397B1DCDAF], dtype=np.uint64))
    assert hash64(ends, 0)[0] == 0
    assert np.isfinite(gumbel(ends, 0)).all()


def test_some_tasks_are_the_target_of_those_alone() -> None:
    alone = MemoryCorpus.of(TABLE, TABLE.scores, TEXTS, targets={"mmlu": TARGETS["mmlu"]})
    selected = _copies(DSIR(tasks=["mmlu"]), _corpus())
    np.testing.assert_array_equal(selected, _copies(DSIR(), alone))
    assert (selected != _copies(DSIR(), _corpus())).any()


def _write_target(path: Path, column: str) -> str:
    texts = TARGETS["mmlu"]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({column: texts, "rest": texts}), path)
    else:
        path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["target.jsonl", "target.parquet"])
def test_a_file_is_the_target_in_place_of_validation_rows(tmp_path: Path, name: str) -> None:
    path = _write_target(tmp_path / name, "body")
    selected = _copies(DSIR(tasks=["mmlu"]), _corpus())
    for target in (path, str(tmp_path), str(tmp_path / "*.*")):
        found = _copies(DSIR(target=target, target_text="body"), _corpus(targets=None))
        np.testing.assert_array_equal(found, selected)
    with pytest.raises(InputError, match=rf"{name}: row 1: no 'text', found body.*; name the column"):
        _copies(DSIR(target=path), _corpus())


class _NoPass(MemoryCorpus):
    """A corpus that may not be read."""

    def fold(self, fold: Any) -> pa.Table:
        raise AssertionError(f"{fold} read the corpus")


@pytest.mark.parametrize(
    ("selector", "targets", "message"),
    [
        (DSIR(), {"mmlu": ["", " \n"]}, "validation rows of all tasks: not one word in it; give texts"),
        (DSIR(tasks=["mmlu"]), {"mmlu": [" "]}, "validation rows of tasks mmlu: not one word"),
        (DSIR(tasks=["nope"]), TARGETS, "'nope' is not among arc_easy, hellaswag, mmlu"),
        (DSIR(), None, "no validation rows to take as target"),
        (DSIR(target="/nowhere/target.jsonl"), TARGETS, "target: /nowhere/target.jsonl: no such file"),
    ],
)
def test_a_target_that_says_nothing_is_refused_before_any_pass(
    selector: DSIR, targets: dict[str, list[str]] | None, message: str
) -> None:
    whole = _corpus()
    with pytest.raises(InputError, match=message):
        selector.fit(_NoPass(whole.table, whole.summary, targets=targets), BUDGET, SEED)


def test_an_empty_file_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": "  "}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"blank.jsonl, column 'text': not one word"):
        DSIR(target=str(tmp_path / "blank.jsonl")).fit(_corpus(), BUDGET, SEED)
    with pytest.raises(InputError, match=r"target: .*nope.jsonl: no such file"):
        DSIR(target=str(tmp_path / "nope.jsonl")).check(DomainSummary.of(TABLE, TABLE.scores), BUDGET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_buckets": 0}, "n_buckets: 0"),
        ({"ngrams": 0}, "ngrams: 0"),
        ({"min_words": -1}, "min_words: -1"),
        ({"tasks": []}, "tasks: none"),
        ({"tasks": ["mmlu"], "target": "x.jsonl"}, "give one of them"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DSIR(**options)


def test_counts_of_batches_add_up_and_those_of_none_are_empty() -> None:
    fold = BucketCounts(NgramBuckets())
    whole = _corpus().fold(fold)
    assert _corpus(64).fold(fold).equals(whole)
    assert (whole["count"].to_numpy() > 0).all()
    assert fold.merge([]).schema == whole.schema
    assert fold.of(pa.table({TEXT: pa.array([], pa.string())})).equals(fold.merge([]))


def test_passes_and_law_pickle() -> None:
    corpus = _corpus()
    batch = corpus.table
    law = DSIR().fit(corpus, BUDGET, SEED)
    fold, derive, again = pickle.loads(pickle.dumps((BucketCounts(NgramBuckets()), _derive(), law)))  # noqa: S301
    assert fold.of(batch).equals(BucketCounts(NgramBuckets()).of(batch))
    column = _derive().of(batch)[LOG_WEIGHT].to_numpy()
    np.testing.assert_array_equal(derive.of(batch)[LOG_WEIGHT].to_numpy(), column)
    assert set(law.columns) == {DOC_ID, LOG_WEIGHT}
    np.testing.assert_array_equal(corpus.copies(again), corpus.copies(law))
