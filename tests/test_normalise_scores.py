"""FitNormaliser and NormaliseScores: the same σ for any cut, kind of frame and executor; every bad row named."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hydra.utils import instantiate
from nemo_curator.pipeline import Pipeline
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.errors import InputError
from quadmix_plugin.executors import InlineExecutor
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.score_sketch import ScoreSketch
from quadmix_plugin.stages import FitNormaliser, NormaliseScores

SCORERS = ("edu", "noise")
DIRECTIONS = {"edu": True, "noise": False}
N = 3000


def _labels(n: int = N) -> pa.Table:
    rng = np.random.default_rng(5)
    columns = {
        "doc_id": [f"doc-{i}" for i in range(n)],
        "text": ["a text"] * n,
        "domain": np.array(["art", "moon", "sport"])[rng.integers(0, 3, n)],
        "tokens": rng.integers(1, 700, n),
        "score_edu": rng.normal(size=n).astype(np.float32),
        "score_noise": rng.random(n).astype(np.float32).round(2),
    }
    return pa.table(columns)


LABELS = _labels()
TABLE = ScoreTable.from_labels(LABELS, SCORERS)
NORMALISER = Normaliser.fit(TABLE, DIRECTIONS)


def _frame(table: pa.Table, kind: str) -> pa.Table | pd.DataFrame:
    if kind == "arrow":
        return table
    if kind == "categories":
        place = table.column_names.index("domain")
        return table.set_column(place, "domain", table["domain"].dictionary_encode())
    return table.to_pandas(types_mapper=pd.ArrowDtype if kind == "pandas on arrow" else None)


def _batches(parts: int, kind: str = "arrow", table: pa.Table = LABELS) -> list[DocumentBatch]:
    n = table.num_rows
    order = np.random.default_rng(parts).permutation(n) if parts > 1 else np.arange(n)
    cut = [table.take(pa.array(rows)) for rows in np.array_split(order, parts)]
    return [DocumentBatch(dataset_name=f"part-{i}", data=_frame(part, kind)) for i, part in enumerate(cut)]


def _fit(executor, batches: list, batch_size: int = 1) -> ScoreSketch:
    stage = FitNormaliser(scorers=list(SCORERS), batch_size=batch_size)
    states = Pipeline("fit", stages=[stage]).run(executor, initial_tasks=batches)
    assert len(states) == -(-len(batches) // batch_size)
    return ScoreSketch.merge(ScoreSketch.from_table(state.to_pyarrow()) for state in states)


@pytest.mark.parametrize("kind", ["arrow", "categories", "pandas", "pandas on arrow"])
@pytest.mark.parametrize(("parts", "batch_size"), [(1, 1), (7, 1), (64, 1), (64, 5)])
def test_same_state_for_any_cut_and_kind_of_frame(parts: int, batch_size: int, kind: str) -> None:
    sketch = _fit(InlineExecutor(), _batches(parts, kind), batch_size)
    assert sketch.to_table().equals(ScoreSketch.of_table(TABLE).to_table())


def test_same_state_and_columns_on_dask(dask_executor) -> None:
    assert _fit(dask_executor, _batches(20), 6).to_table().equals(ScoreSketch.of_table(TABLE).to_table())
    tasks = Pipeline("apply", stages=[NormaliseScores(normaliser=NORMALISER)]).run(
        dask_executor, initial_tasks=_batches(7)
    )
    found = pa.concat_tables(task.to_pyarrow() for task in tasks or []).to_pandas().set_index("doc_id")
    expected = NORMALISER.apply(TABLE.scores)
    for n, scorer in enumerate(SCORERS):
        sigma = found.loc[LABELS["doc_id"].to_pylist(), f"normalised_{scorer}"]
        np.testing.assert_array_equal(sigma.to_numpy(), expected[:, n])


@pytest.mark.parametrize("kind", ["arrow", "categories", "pandas", "pandas on arrow"])
def test_columns_are_sigma_of_the_raw_ones_and_nothing_else_changes(kind: str) -> None:
    batch = _batches(1, kind)[0]
    batch._metadata["source"] = "x"
    out = NormaliseScores(normaliser=NORMALISER).process(batch)
    assert type(out.data) is type(batch.data)
    assert out._metadata == {"source": "x", "rows_in": N, "dropped": {}}
    assert batch._metadata == {"source": "x"}
    table = pa.table({name: pa.array(out.data[name]) for name in out.get_columns()})
    assert table.select(LABELS.column_names).to_pylist() == LABELS.to_pylist()
    added = table.select(["normalised_edu", "normalised_noise"])
    assert added.schema.types == [pa.float32(), pa.float32()]
    np.testing.assert_array_equal(np.stack([c.to_numpy() for c in added.columns], 1), NORMALISER.apply(TABLE.scores))


@pytest.mark.parametrize("kind", ["arrow", "categories", "pandas", "pandas on arrow"])
def test_unknown_domains_become_other(kind: str) -> None:
    out = NormaliseScores(normaliser=NORMALISER, domains=["moon", "art"]).process(_batches(1, kind)[0])
    expected = ["other" if name == "sport" else name for name in LABELS["domain"].to_pylist()]
    assert list(out.to_pandas()["domain"]) == expected
    assert list(out.to_pandas()["doc_id"]) == LABELS["doc_id"].to_pylist()


def test_domain_and_tokens_are_needed_only_where_they_are_read() -> None:
    plain = DocumentBatch(dataset_name="x", data=LABELS.select(["doc_id", "score_edu", "score_noise"]))
    assert NormaliseScores(normaliser=NORMALISER).process(plain).num_items == N
    with pytest.raises(InputError, match="x: no column domain; found doc_id, score_edu, score_noise"):
        NormaliseScores(normaliser=NORMALISER, domains=["art"]).process(plain)
    with pytest.raises(InputError, match="x: no column domain, tokens; found"):
        FitNormaliser(scorers=list(SCORERS)).process(plain)


def test_stages_come_from_hydra_yaml_and_a_file_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "normaliser.json").write_text(json.dumps(NORMALISER.to_dict()), encoding="utf-8")
    home = "quadmix_plugin.stages"
    fit = instantiate({"_target_": f"{home}.FitNormaliser", "scorers": ["edu", "noise"], "invalid_scores": "drop"})
    apply = instantiate(
        {
            "_target_": f"{home}.NormaliseScores",
            "normaliser": str(tmp_path / "normaliser.json"),
            "domains": ["art"],
        }
    )
    state = fit.process(_batches(1)[0]).to_pyarrow()
    assert Normaliser.fit(ScoreSketch.from_table(state), DIRECTIONS) == NORMALISER
    out = apply.process(_batches(1)[0]).to_pyarrow()
    assert set(out["domain"].to_pylist()) == {"art", "other"}
    np.testing.assert_array_equal(out["normalised_noise"].to_numpy(), NORMALISER.apply(TABLE.scores)[:, 1])
    with pytest.raises(InputError, match="invalid_scores='skip'; choose 'error' or 'drop'"):
        NormaliseScores(normaliser=NORMALISER, invalid_scores="skip")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"nowhere.json: no such file"):
        NormaliseScores(normaliser="nowhere.json")


def _with(**columns: object) -> pa.Table:
    table = LABELS.slice(0, 8)
    for name, values in columns.items():
        column = values if isinstance(values, pa.Array) else pa.array(values)
        table = table.set_column(table.column_names.index(name), name, column)
    return table


FINE = [0.5] * 6
FIRST_FIVE = "8 documents, such as doc-0, doc-1, doc-2, doc-3, doc-4; repair the scorer, or drop such rows"
FAULTS = {
    "nan": (
        {"score_edu": [*FINE, np.nan, 1]},
        "part-0: column 'score_edu' is not finite for 1 documents, such as",
    ),
    "inf": (
        {"score_noise": [np.inf, *FINE, -np.inf]},
        "not finite for 2 documents, such as doc-0, doc-7; repair",
    ),
    "null score": ({"score_noise": [None, *FINE, 1]}, "'score_noise' is not finite for 1 documents, such as doc-0"),
    "too large": ({"score_noise": [1e300, *FINE, 1]}, "'score_noise' is not finite for 1 documents, such as doc-0"),
    "all null": ({"score_edu": pa.nulls(8)}, f"column 'score_edu' is not finite for {FIRST_FIVE}"),
    "null tokens": ({"tokens": [1] * 7 + [None]}, "'tokens' is missing for 1 documents, such as doc-7; label these"),
    "zero tokens": ({"tokens": [0] + [3] * 7}, "'tokens' is not positive for 1 documents, such as doc-0; drop empty"),
    "negative tokens": (
        {"tokens": [3] * 6 + [-1, -2]},
        "not positive for 2 documents, such as doc-6, doc-7; drop",
    ),
    "null domain": (
        {"domain": [*"abcdef", None, "b"]},
        "'domain' is missing for 1 documents, such as doc-6; label",
    ),
    "null id": ({"doc_id": ["a", None, *"cdefgh"]}, "'doc_id' is missing for 1 documents, such as row 1"),
    "twice": ({"doc_id": [*"abcdef", "a", "b"]}, "doc_id: 2 ids occur more than once, such as a, b; every document"),
    "real tokens": ({"tokens": [1.5] * 8}, "column 'tokens' is of type double; give integers"),
    "text score": ({"score_edu": ["1"] * 8}, "string; give numbers"),
    "boolean score": ({"score_edu": [True] * 8}, "column 'score_edu' is of type bool; give numbers"),
    "number domain": ({"domain": [1] * 8}, "column 'domain' is of type int64; give strings"),
    "real id": ({"doc_id": [i / 2 for i in range(8)]}, "column 'doc_id' is of type double; give integers or strings"),
}


@pytest.mark.parametrize("kind", ["arrow", "pandas", "pandas on arrow"])
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_rows_are_named_by_column_number_and_document(fault: str, kind: str) -> None:
    columns, expected = FAULTS[fault]
    batch = _batches(1, kind, _with(**columns))[0]
    if kind == "pandas" and fault == "all null":
        batch.data["score_edu"] = [None] * 8
    for stage in (FitNormaliser(scorers=list(SCORERS)), NormaliseScores(normaliser=NORMALISER, domains=["a"])):
        with pytest.raises(InputError) as caught:
            stage.process(batch)
        assert expected in str(caught.value)
        assert ";" in str(caught.value)


def test_column_of_several_types_is_named() -> None:
    batch = _batches(1, "pandas", LABELS.slice(0, 3))[0]
    batch.data = batch.data.astype({"score_edu": object})
    batch.data.loc[1, "score_edu"] = "high"
    with pytest.raises(InputError, match="part-0: column 'score_edu' is of several types; give numbers"):
        FitNormaliser(scorers=list(SCORERS)).process(batch)


def test_integer_ids_and_scores_and_other_widths_are_taken() -> None:
    table = _with(
        doc_id=pa.array(range(8), pa.uint64()),
        tokens=pa.array([3] * 8, pa.int16()),
        score_edu=list(range(8)),
        score_noise=pa.array([0.5] * 8, pa.float64()),
    )
    table = table.set_column(2, "domain", table["domain"].cast(pa.large_string()))
    sketch = ScoreSketch.from_table(FitNormaliser(scorers=list(SCORERS)).process(_batches(1, table=table)[0]).data)
    assert sketch.cells[0].high.tolist() == list(range(8))
    assert sketch.tokens.sum() == 24
    out = NormaliseScores(normaliser=NORMALISER, domains=["art"]).process(_batches(1, table=table)[0]).to_pyarrow()
    np.testing.assert_array_equal(out["normalised_edu"].to_numpy(), NORMALISER.maps[0].apply(np.arange(8)))


@pytest.mark.parametrize("kind", ["arrow", "categories", "pandas", "pandas on arrow"])
def test_dropped_rows_are_counted_once_under_the_first_scorer_at_fault(kind: str) -> None:
    nan = float("nan")
    edu, noise = [nan, None, 1.0, float("inf"), *[2.0] * 4], [nan, 1.0, None, 1.0, *[2.0] * 4]
    batch = _batches(1, kind, _with(score_edu=edu, score_noise=noise))[0]
    batch._metadata.update({"shard": "s", "rows_in": 10, "dropped": {"null text": 2}})
    out = NormaliseScores(normaliser=NORMALISER, invalid_scores="drop").process(batch)
    dropped = {"null text": 2, "score_edu not finite": 3, "score_noise not finite": 1}
    assert out._metadata == {"shard": "s", "rows_in": 10, "dropped": dropped}
    assert out.num_items == 10 - sum(dropped.values())
    assert list(out.to_pandas()["doc_id"]) == ["doc-4", "doc-5", "doc-6", "doc-7"]
    np.testing.assert_array_equal(out.to_pandas()["normalised_edu"], NORMALISER.maps[0].apply([2.0] * 4))
    state = FitNormaliser(scorers=list(SCORERS), invalid_scores="drop").process(batch)
    assert ScoreSketch.from_table(state.to_pyarrow()).n == 4
    assert state._metadata == {"shard": "s", "rows_in": 10, "dropped": dropped}
    assert batch._metadata["dropped"] == {"null text": 2}


def test_state_of_several_batches_counts_the_rows_of_all() -> None:
    table = _with(score_edu=[float("nan"), *[1.0] * 7])
    stage = FitNormaliser(scorers=list(SCORERS), invalid_scores="drop", batch_size=3)
    (state,) = stage.process_batch(_batches(3, table=table))
    assert (state._metadata["rows_in"], state._metadata["dropped"]) == (8, {"score_edu not finite": 1})
    assert ScoreSketch.from_table(state.to_pyarrow()).n == 7


@pytest.mark.parametrize("kind", ["arrow", "categories", "pandas", "pandas on arrow"])
def test_batches_without_rows_and_that_lose_all_rows_pass(kind: str) -> None:
    none = _batches(1, kind, LABELS.slice(0, 0))[0]
    lost = _batches(1, kind, _with(score_edu=pa.nulls(8, pa.float32())))[0]
    untyped = DocumentBatch(
        dataset_name="x", data=pd.DataFrame({name: [] for name in LABELS.column_names}, dtype=object)
    )
    stage = NormaliseScores(normaliser=NORMALISER, invalid_scores="drop", domains=["art"])
    fit = FitNormaliser(scorers=list(SCORERS), invalid_scores="drop")
    for batch, dropped in ((none, 0), (lost, 8), (untyped, 0)):
        out = stage.process(batch)
        assert out.num_items == 0
        assert sum(out._metadata["dropped"].values()) == dropped
        assert out.get_columns()[-2:] == ["normalised_edu", "normalised_noise"]
        assert ScoreSketch.from_table(fit.process(batch).to_pyarrow()).n == 0
    whole = fit.process_batch([none, *_batches(1, kind), lost])[0]
    assert ScoreSketch.from_table(whole.to_pyarrow()).to_table().equals(ScoreSketch.of_table(TABLE).to_table())
