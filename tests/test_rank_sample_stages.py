"""MergeRank and SigmoidSample: the same documents and copies however the corpus is cut and whatever the executor."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nemo_curator.pipeline import Pipeline
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin import count_copies, sample_parameters
from quadmix_plugin.errors import InputError
from quadmix_plugin.executors import DaskExecutor, InlineExecutor
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.ranking import RankMap
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.stages import FitRank, MergeRank, SigmoidSample

DOMAINS, SCORERS = ("News", "Science", "Sports"), ("edu", "prose")
N = 2000


def _labels() -> pa.Table:
    rng = np.random.default_rng(11)
    columns = {
        "doc_id": [f"doc-{i}" for i in range(N)],
        "domain": np.array(DOMAINS)[rng.integers(0, 3, N)],
        "tokens": rng.integers(1, 700, N),
        "score_edu": rng.normal(size=N).astype(np.float32).round(2),
        "score_prose": rng.random(N).astype(np.float32).round(2),
    }
    return pa.table(columns)


LABELS = _labels()
TABLE = ScoreTable.from_labels(LABELS, SCORERS)
NORMALISER = Normaliser.fit(TABLE, dict.fromkeys(SCORERS, True))
THETA = sample_parameters(1, 2, 3, seed=4, domains=DOMAINS, scorers=SCORERS)[0]


def _batches(parts: int, as_pandas: bool = False) -> list:
    order = np.random.default_rng(parts).permutation(N) if parts > 1 else np.arange(N)
    batches = []
    for rows in np.array_split(order, parts):
        part = LABELS.take(pa.array(rows))
        batches.append(DocumentBatch(dataset_name="x", data=part.to_pandas() if as_pandas else part))
    return batches


def _select(executor, batches: list) -> dict[str, int]:
    states = Pipeline("fit", stages=[FitRank(theta=THETA, normaliser=NORMALISER)]).run(executor, initial_tasks=batches)
    rank_map = RankMap.merge(RankMap.from_table(state.to_pyarrow()) for state in states)
    stages = [MergeRank(theta=THETA, normaliser=NORMALISER, rank_map=rank_map), SigmoidSample(theta=THETA, seed=9)]
    tasks = Pipeline("sample", stages=stages).run(executor, initial_tasks=batches)
    copies: dict[str, int] = {}
    for task in tasks:
        table = task.to_pyarrow()
        copies |= dict(zip(table["doc_id"].to_pylist(), table["copies"].to_pylist(), strict=True))
    return copies


@pytest.fixture(scope="module")
def expected() -> dict[str, int]:
    """One call of the pure functions over the whole corpus."""
    scores = NORMALISER.apply(TABLE.scores)
    copies = count_copies(scores, TABLE.domain_ids, TABLE.tokens, TABLE.doc_ids, THETA, seed=9)
    assert 0 < (copies > 0).sum() < N
    return dict(zip(TABLE.doc_ids.to_pylist(), copies.tolist(), strict=True))


@pytest.mark.parametrize("as_pandas", [False, True])
@pytest.mark.parametrize("parts", [1, 7, 64])
def test_same_selection_for_any_partitioning(parts: int, as_pandas: bool, expected: dict[str, int]) -> None:
    assert _select(InlineExecutor(), _batches(parts, as_pandas)) == expected


def test_same_selection_inline_and_on_dask(expected: dict[str, int]) -> None:
    with DaskExecutor(n_workers=2) as executor:
        assert _select(executor, _batches(7)) == expected


def test_stages_take_the_files_of_a_run(tmp_path: Path, expected: dict[str, int]) -> None:
    THETA.save(tmp_path / "theta.json")
    (tmp_path / "normaliser.json").write_text(json.dumps(NORMALISER.to_dict()))
    theta, normaliser = str(tmp_path / "theta.json"), str(tmp_path / "normaliser.json")
    state = FitRank(theta=theta, normaliser=normaliser).process(_batches(1)[0]).to_pyarrow()
    pq.write_table(state, tmp_path / "rank_map.parquet")
    merge = MergeRank(theta=theta, normaliser=normaliser, rank_map=str(tmp_path / "rank_map.parquet"))
    out = SigmoidSample(theta=theta, seed=9).process(merge.process(_batches(1)[0])).to_pyarrow()
    assert dict(zip(out["doc_id"].to_pylist(), out["copies"].to_pylist(), strict=True)) == expected


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
    out = MergeRank(theta=THETA, normaliser=NORMALISER, rank_map=RankMap.from_table(state)).process(batch)
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
