"""MergeRank and SigmoidSample: the same documents and copies however the corpus is cut and whatever the executor."""

import functools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nemo_curator.pipeline import Pipeline
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin import count_copies, merge_quality, sample_parameters
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError
from quadmix_plugin.executors import DaskExecutor, InlineExecutor, make_executor
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.parameters import Parameters, ParameterSpace
from quadmix_plugin.pipelines.rank import FitRankMap
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.stages import FitRank, MergeRank, SelectDocuments, SigmoidSample

DOMAINS, SCORERS = ("News", "Science", "Sports"), ("edu", "prose")
N = 2000


def _labels() -> pa.Table:
    rng = np.random.default_rng(11)
    columns = {
        "doc_id": [f"doc-{i}" for i in range(N)],
        "domain": np.array(DOMAINS)[rng.integers(0, 3, N)],
        "tokens": rng.integers(1, 700, N),
        "score_edu": rng.normal(size=N).astype(np.float32).round(2),
        "score_prose": rng.random(N).astype(np.float32).round(1),
    }
    return pa.table(columns)


LABELS = _labels()
TABLE = ScoreTable.from_labels(LABELS, SCORERS)
NORMALISER = Normaliser.fit(TABLE, dict.fromkeys(SCORERS, True))
WIDE = ParameterSpace(omega_max=0.6)
THETA = sample_parameters(1, 2, 3, seed=4, space=WIDE, domains=DOMAINS, scorers=SCORERS)[0]


def _batches(parts: int, as_pandas: bool = False) -> list:
    order = np.random.default_rng(parts).permutation(N) if parts > 1 else np.arange(N)
    batches = []
    for rows in np.array_split(order, parts):
        part = LABELS.take(pa.array(rows))
        batches.append(DocumentBatch(dataset_name="x", data=part.to_pandas() if as_pandas else part))
    return batches


SIGMA = NORMALISER.apply(TABLE.scores)
SUMMARY = DomainSummary.of(TABLE, SIGMA)
METHODS = [
    ("histogram", "paper"),
    ("histogram", "hash"),
    ("exact", "paper"),
    ("exact", "mid"),
    ("exact", "hash"),
    ("subset", "paper"),
]


def _fit(method: str, ties: str, **more) -> FitRankMap:
    return FitRankMap(
        read=[], theta=THETA, normaliser=NORMALISER, method=method, ties=ties, summary=SUMMARY, bins=64, documents=300,
        seed=9, **more,
    )  # fmt: skip


def _select(executor, batches: list, method: str = "histogram", ties: str = "paper") -> dict[str, int]:
    rank_map = _fit(method, ties, tasks_per_pass=10).run(executor, batches).get_metadata("rank_map")
    merge = MergeRank(theta=THETA, normaliser=NORMALISER, rank_map=rank_map, seed=9)
    select = SelectDocuments(theta=THETA, normaliser=NORMALISER, rank_map=rank_map, seed=9)
    stages = [merge, SigmoidSample(theta=THETA, seed=9)]
    tasks = Pipeline("sample", stages=stages).run(executor, initial_tasks=batches)
    copies: dict[str, int] = {}
    for task in tasks:
        table = task.to_pyarrow()
        copies |= dict(zip(table["doc_id"].to_pylist(), table["copies"].to_pylist(), strict=True))
    assert len(copies) == N
    chosen = Pipeline("select", stages=[select]).run(executor, initial_tasks=batches)
    kept = [row for task in chosen for row in task.to_pyarrow().to_pylist()]  # Ray gives tasks back in any order
    why = [row for task in tasks for row in task.to_pyarrow().to_pylist() if row["copies"] > 0]
    assert sorted(kept, key=lambda row: row["doc_id"]) == sorted(why, key=lambda row: row["doc_id"])
    assert sum(task._metadata["rows_in"] for task in chosen) == N
    assert sum(task._metadata["dropped"]["not selected"] for task in chosen) == N - len(kept)
    return copies


@functools.cache
def _expected(method: str = "histogram", ties: str = "paper") -> dict[str, int]:
    """One call of the pure functions over the whole corpus."""
    copies = count_copies(
        SIGMA, TABLE.domain_ids, TABLE.tokens, TABLE.doc_ids, THETA, 9, method, ties, bins=64, subset_documents=300
    )  # fmt: skip
    assert 0 < (copies > 0).sum() < N
    return dict(zip(TABLE.doc_ids.to_pylist(), copies.tolist(), strict=True))


@pytest.mark.parametrize(("method", "ties"), METHODS)
@pytest.mark.parametrize("parts", [1, 7, 64])
def test_same_selection_for_any_partitioning(parts: int, method: str, ties: str) -> None:
    assert _select(InlineExecutor(), _batches(parts, as_pandas=parts == 7), method, ties) == _expected(method, ties)


def test_methods_and_ties_differ_so_that_the_test_above_tells_them_apart() -> None:
    assert len({tuple(_expected(*each).values()) for each in METHODS}) == len(METHODS)


@pytest.mark.parametrize("workers", [1, 2])
def test_same_selection_inline_and_on_dask(workers: int) -> None:
    with DaskExecutor(n_workers=workers) as executor:
        for method, ties in METHODS:
            assert _select(executor, _batches(7), method, ties) == _expected(method, ties)


@pytest.mark.slow
def test_same_selection_on_ray_data_and_eight_dask_workers() -> None:
    with DaskExecutor(n_workers=8, memory_limit="2GB") as executor:
        assert _select(executor, _batches(16)) == _expected()
    assert _select(make_executor("ray_data"), _batches(7)) == _expected()


def test_states_of_several_batches_are_the_sum_of_theirs() -> None:
    one = FitRank(theta=THETA, normaliser=NORMALISER, summary=SUMMARY, batch_size=3)
    together = one.process_batch(_batches(3))
    assert len(together) == 1
    apart = [one.process(batch).to_pyarrow() for batch in _batches(3)]
    whole = RankMap.of_states([together[0].to_pyarrow()])
    assert whole.to_table().equals(RankMap.of_states(apart).to_table(), check_metadata=True)


def test_without_a_summary_bins_lie_over_the_range_of_sigma() -> None:
    state = FitRank(theta=THETA, normaliser=NORMALISER, bins=512).process(_batches(1)[0]).to_pyarrow()
    grid = RankMap.of_states([state]).grid
    assert grid.low.min() >= 0
    assert grid.high.max() <= 1
    with pytest.raises(InputError, match="without a normaliser the histogram needs summary="):
        FitRank(theta=THETA)


def test_normalised_columns_take_the_place_of_the_normaliser() -> None:
    table = LABELS
    for n, scorer in enumerate(SCORERS):
        table = table.append_column(f"normalised_{scorer}", pa.array(SIGMA[:, n]))
    fit = FitRank(theta=THETA, summary=SUMMARY, bins=64)
    assert fit.inputs()[1] == ["domain", "tokens", "normalised_edu", "normalised_prose"]
    batch = DocumentBatch(dataset_name="x", data=table.drop_columns(["score_edu", "score_prose"]))
    rank_map = RankMap.of_states([fit.process(batch).to_pyarrow()])
    out = (
        SigmoidSample(theta=THETA, seed=9)
        .process(MergeRank(theta=THETA, rank_map=rank_map).process(batch))
        .to_pyarrow()
    )
    assert dict(zip(out["doc_id"].to_pylist(), out["copies"].to_pylist(), strict=True)) == _expected()
    np.testing.assert_array_equal(out["merged_quality"].to_numpy(), merge_quality(SIGMA, TABLE.domain_ids, THETA))


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("score_edu", [None, *[1.0] * (N - 1)], r"column 'score_edu' is missing in 1 rows, first \[0\]; label these"),
        ("score_edu", ["x"] * N, "column 'score_edu' is of type string; give numbers"),
        ("score_edu", [1.0] * (N - 1) + [float("nan")], "score_edu"),
        ("score_edu", [1.0] * (N - 1) + [float("inf")], "score_edu"),
        ("tokens", [None, *[5] * (N - 1)], r"column 'tokens' is missing in 1 rows, first \[0\]"),
        ("tokens", [1.5] * N, "column 'tokens' is of type double; give integers"),
        ("tokens", [0, *[5] * (N - 1)], "tokens: 1 documents have 0 tokens; drop empty documents first"),
        ("domain", [None, *["News"] * (N - 1)], r"column 'domain' is missing in 1 rows, first \[0\]"),
    ],
)
def test_bad_columns_are_named_with_the_remedy(column: str, values: list, says: str) -> None:
    table = LABELS.set_column(LABELS.column_names.index(column), column, pa.array(values))
    with pytest.raises(InputError, match=says):
        FitRank(theta=THETA, normaliser=NORMALISER).process(DocumentBatch(dataset_name="x", data=table))


def test_empty_batches_are_no_documents() -> None:
    empty = DocumentBatch(dataset_name="x", data=LABELS.slice(0, 0))
    batches = [empty, *_batches(2), empty]
    for method, ties in METHODS:
        assert _select(InlineExecutor(), batches, method, ties) == _expected(method, ties)


def test_stages_take_the_files_of_a_run(tmp_path: Path) -> None:
    THETA.save(tmp_path / "theta.json")
    (tmp_path / "normaliser.json").write_text(json.dumps(NORMALISER.to_dict()))
    theta, normaliser = str(tmp_path / "theta.json"), str(tmp_path / "normaliser.json")
    state = FitRank(theta=theta, normaliser=normaliser, summary=SUMMARY, bins=64).process(_batches(1)[0]).to_pyarrow()
    pq.write_table(RankMap.of_states([state]).to_table(), tmp_path / "rank_map.parquet")
    merge = MergeRank(theta=theta, normaliser=normaliser, rank_map=str(tmp_path / "rank_map.parquet"))
    out = SigmoidSample(theta=theta, seed=9).process(merge.process(_batches(1)[0])).to_pyarrow()
    assert dict(zip(out["doc_id"].to_pylist(), out["copies"].to_pylist(), strict=True)) == _expected()


@pytest.mark.parametrize("as_pandas", [False, True])
def test_expand_repeats_each_document_by_its_copies(as_pandas: bool) -> None:
    batch = _batches(1, as_pandas)[0]
    ranked = batch.to_pandas().assign(quality_rank=np.linspace(1e-6, 1, N))
    batch.data = ranked if as_pandas else pa.Table.from_pandas(ranked)
    heavy = Parameters(THETA.alpha, THETA.lam, np.full(3, 1.0), np.full(3, 1.0), np.full(3, 0.5), DOMAINS, SCORERS)
    plain = SigmoidSample(theta=heavy).process(batch).to_pyarrow()
    expanded = SigmoidSample(theta=heavy, expand=True).process(batch).to_pyarrow()
    wanted = [
        i for i, c in zip(plain["doc_id"].to_pylist(), plain["copies"].to_pylist(), strict=True) for _ in range(c)
    ]
    assert expanded["doc_id"].to_pylist() == wanted
    assert max(plain["copies"].to_pylist()) >= 2


def test_frames_keep_their_kind_and_metadata() -> None:
    batch = _batches(1, as_pandas=True)[0]
    batch._metadata["shard"] = "s"
    state = FitRank(theta=THETA, normaliser=NORMALISER).process(batch).to_pyarrow()
    out = MergeRank(theta=THETA, normaliser=NORMALISER, rank_map=RankMap.of_states([state])).process(batch)
    assert isinstance(out.data, pd.DataFrame)
    assert out._metadata == {"shard": "s"}


def test_unknown_domain_and_foreign_normaliser_are_named() -> None:
    strange = LABELS.set_column(1, "domain", pa.array(["Moon"] * N))
    with pytest.raises(InputError, match="domain: Moon not among the domains of the parameters"):
        FitRank(theta=THETA, normaliser=NORMALISER).process(DocumentBatch(dataset_name="x", data=strange))
    other = sample_parameters(1, 2, 3, seed=4, domains=DOMAINS, scorers=("edu", "length"))[0]
    with pytest.raises(InputError, match="theta has the scorers edu, length, the normaliser edu, prose"):
        FitRank(theta=other, normaliser=NORMALISER)
    with pytest.raises(InputError, match="no names"):
        SigmoidSample(theta=sample_parameters(1, 2, 3, seed=4)[0])
    with pytest.raises(InputError, match="no such file"):
        MergeRank(theta=THETA, normaliser=NORMALISER, rank_map="nowhere.parquet")
