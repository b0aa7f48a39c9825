"""Corpora that are odd and not damaged: files that differ in their columns, and next to no documents."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import SHORT, write_tiny_recipe

from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.pipelines.context import open_run
from quadmix_plugin.pipelines.run import run_steps


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def recipe(original: Path, tmp_path: Path) -> Path:
    """A recipe whose corpus a test may change."""
    return shutil.copytree(original.parent, tmp_path / "tiny") / original.name


def _second(recipe: Path, change: Any) -> Path:
    """Changes the second of the two files."""
    path = recipe.parent / "corpus" / "1.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    return path


def _rows(recipe: Path, steps: tuple[str, ...] = ("label",)) -> int:
    """How many documents are labelled."""
    with open_run(load_recipe(recipe), recipe.parent / "out") as run:
        run_steps(run, steps)
        return sum(entry.facts["rows_kept"] for entry in run.step("label").entries())


def _cast(table: pa.Table, kinds: dict[str, pa.DataType]) -> pa.Table:
    for name, kind in kinds.items():
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    return table


OTHER_KINDS = {
    "s": pa.float32(),
    "domain": pa.dictionary(pa.int32(), pa.string()),
    "text": pa.large_string(),
    "doc_id": pa.large_string(),
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda table: table.drop_columns("s"), "no column 's'"),
        (lambda table: table.drop_columns("text"), "no column 'text'"),
        (lambda table: table.rename_columns(["id", *table.column_names[1:]]), "no column 'doc_id'"),
        (lambda table: table.set_column(1, "text", pa.array(range(len(table)))), "column 'text' is int64"),
        (lambda table: table.set_column(0, "doc_id", pa.array([0.5] * len(table))), "column 'doc_id' is double"),
    ],
)
def test_a_file_with_other_columns_is_named(recipe: Path, change: Any, says: str) -> None:
    path = _second(recipe, change)
    with pytest.raises(InputError) as caught:
        _rows(recipe)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)


def test_a_score_that_is_text_in_one_file_names_scorer_row_and_value(recipe: Path) -> None:
    _second(recipe, lambda table: table.set_column(3, "s", pa.array(["high"] * len(table))))
    with pytest.raises(QuadmixError, match=r"s: row 0 is 'high'; a score must be a number"):
        _rows(recipe)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.append_column("extra", pa.array(range(len(table)))).select(
            ["extra", *table.column_names[::-1]]
        ),
        lambda table: _cast(table, OTHER_KINDS),
        lambda table: table.slice(0, 0),
    ],
    ids=["columns", "types", "no rows"],
)
def test_files_that_differ_in_what_does_not_matter_are_read_alike(recipe: Path, change: Any) -> None:
    path = _second(recipe, change)
    assert _rows(recipe) == 80 + pq.read_metadata(path).num_rows


@pytest.mark.parametrize("documents", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_next_to_no_documents_go_through_every_step(recipe: Path, documents: int) -> None:
    (recipe.parent / "corpus" / "1.parquet").unlink()
    path = recipe.parent / "corpus" / "0.parquet"
    pq.write_table(pq.read_table(path).slice(0, documents), path)
    theta = json.loads((recipe.parent / "theta.json").read_text(encoding="utf-8"))
    theta |= {"omega": [1.0] * documents, "domains": theta["domains"][:documents]}
    theta |= {name: theta[name][:documents] for name in ("alpha", "lam", "eta", "epsilon")}
    (recipe.parent / "theta.json").write_text(json.dumps(theta), encoding="utf-8")
    assert _rows(recipe, SHORT) == documents
    blend = (recipe.parent / "out" / "tokens" / "blend.txt").read_text(encoding="utf-8")
    assert len(blend.split()) == 2


@pytest.mark.parametrize("value", [float("nan"), pytest.param(-float("inf"), marks=pytest.mark.slow), None])
def test_a_score_that_is_no_number_is_refused_with_a_count_or_dropped_by_reason(recipe: Path, value: Any) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        scores = table["s"].to_pylist()
        scores[3:5] = [value, value]
        return table.set_column(3, "s", pa.array(scores, pa.float64()))

    _second(recipe, spoil)
    with pytest.raises(InputError, match=r"score_s: 2 of 40 .*first row 3 of .*invalid_scores: drop"):
        _rows(recipe)
    with open_run(load_recipe(recipe, ["normalise.invalid_scores=drop"]), recipe.parent / "dropped") as run:
        run_steps(run, ("label", "normalise"))
        totals = [run.step(name).summary() or {} for name in ("label", "normalise")]
        kept = run.table.n
    assert kept == 158
    assert sum(n for each in totals for n in each["dropped"].values()) == 2
