"""The step ``normalise``: what it writes, that it streams and resumes, and σ taken as it is from another run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_run import write_small_recipe

from quadmix_plugin.config import load_recipe
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError, QuadmixError, RecipeError
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.pipelines import normalise as module
from quadmix_plugin.pipelines.context import Run, open_run
from quadmix_plugin.pipelines.normalise import frozen_normaliser, normalise
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.store import RunDirectory

SCORERS = ("edu", "noise")
DIRECTIONS = {"edu": True, "noise": False}
SHARDS, ROWS = 9, 120


def _labels(n: int = SHARDS * ROWS, seed: int = 5) -> pa.Table:
    rng = np.random.default_rng(seed)
    columns = {
        "doc_id": pa.array([f"doc-{i}" for i in range(n)]),
        "domain": np.array(["art", "moon", "sport", "zoo"])[rng.choice(4, n, p=[0.5, 0.3, 0.18, 0.02])],
        "tokens": rng.integers(1, 700, n),
        "score_edu": rng.normal(size=n).astype(np.float32),
        "score_noise": rng.random(n).astype(np.float32).round(2),
    }
    return pa.table(columns)


def _recipe(folder: Path, **sections: Any) -> Path:
    """A recipe of two scorers that are columns; its labels are put there by ``_labelled``."""
    path = write_small_recipe(folder)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["scorers"] = {
        name: {"scorer": "column", "column": name, "higher_is_better": better} for name, better in DIRECTIONS.items()
    }
    content |= {"domain": {"classifier": "column", "column": "domain"}, "compare": {}, "rank": {}} | sections
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _put_labels(run: Run, shards: list[pa.Table]) -> None:
    step = run.step("label")
    for i, table in enumerate(shards):
        facts = {"rows_in": table.num_rows, "rows_kept": table.num_rows, "dropped": {}}
        step.write_table(f"labels/part-{i:02}.parquet", table, **facts)
    total = sum(table.num_rows for table in shards)
    step.finish(rows_in=total, rows_kept=total, dropped={})


def _cut(labels: pa.Table, shards: int = SHARDS) -> list[pa.Table]:
    return [labels.take(pa.array(rows)) for rows in np.array_split(np.arange(labels.num_rows), shards)]


@contextmanager
def _labelled(folder: Path, shards: list[pa.Table], *overrides: str, **sections: Any) -> Iterator[Run]:
    recipe = load_recipe(_recipe(folder, **sections), list(overrides))
    with open_run(recipe, folder / "out") as run:
        _put_labels(run, shards)
        yield run


def _artifacts(out: Path) -> dict[str, bytes]:
    found = sorted((out / "normalise").iterdir()) + sorted((out / "manifest" / "normalise").glob("*%*"))
    return {path.name: path.read_bytes() for path in found}


def _shards(out: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((out / "normalise").glob("*.parquet")))


@pytest.fixture(scope="module")
def expected() -> tuple[Normaliser, ScoreTable]:
    """σ and the score table by the pure functions over the whole corpus."""
    table = ScoreTable.from_labels(_labels(), SCORERS)
    return Normaliser.fit(table, DIRECTIONS), table


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the finished step; tests only read it."""
    folder = tmp_path_factory.mktemp("whole")
    with _labelled(folder, _cut(_labels())) as run:
        normalise(run)
    return folder / "out"


def test_shards_hold_raw_and_normalised_scores_in_the_order_of_the_labels(
    whole: Path, expected: tuple[Normaliser, ScoreTable]
) -> None:
    found, labels = _shards(whole), _labels()
    assert found.column_names == [*labels.column_names, "normalised_edu", "normalised_noise"]
    assert found.select(labels.column_names).to_pylist() == labels.to_pylist()
    normaliser, table = expected
    sigma = np.stack([found[f"normalised_{scorer}"].to_numpy() for scorer in SCORERS], axis=1)
    assert sigma.dtype == np.float32
    np.testing.assert_array_equal(sigma, normaliser.apply(table.scores))
    assert Normaliser.load(whole / "normalise" / "normaliser.json") == normaliser
    best = int(np.argmax(table.scores[:, 0])), int(np.argmin(table.scores[:, 1]))
    assert (sigma[best[0], 0], sigma[best[1], 1]) == (sigma[:, 0].min(), sigma[:, 1].min())


def test_domain_summary_is_that_of_the_written_columns_to_the_last_bit(whole: Path) -> None:
    found = _shards(whole).to_pandas()
    summary = DomainSummary.from_dict(json.loads((whole / "normalise" / "domains.json").read_text(encoding="utf-8")))
    assert (summary.domains, summary.scorers) == (("art", "moon", "sport", "zoo"), SCORERS)
    for m, name in enumerate(summary.domains):
        rows = found[found["domain"] == name]
        assert (summary.documents[m], summary.tokens[m]) == (len(rows), rows["tokens"].sum())
        for n, scorer in enumerate(SCORERS):
            column = rows[f"normalised_{scorer}"]
            assert (summary.low[m, n], summary.high[m, n]) == (column.min(), column.max())


def test_run_reads_table_sigma_and_summary_from_the_shards(tmp_path: Path) -> None:
    labels = _labels()
    with _labelled(tmp_path, _cut(labels), rank={"merge_small_domains": 20_000}) as run:
        normalise(run)
        assert {"table", "normalised"} & set(vars(run)) == set()  # the step itself holds no corpus
        table, sigma = run.table, run.normalised
        assert run.summary.to_dict() == DomainSummary.of(table, sigma).to_dict()
        assert run.normaliser == Normaliser.fit(table, DIRECTIONS)
        np.testing.assert_array_equal(sigma, run.normaliser.apply(table.scores))
    assert table.domains == ("art", "moon", "other", "sport")
    folded = ["other" if name == "zoo" else name for name in labels["domain"].to_pylist()]
    assert [table.domains[m] for m in table.domain_ids] == folded
    assert table.doc_ids.to_pylist() == labels["doc_id"].to_pylist()
    np.testing.assert_array_equal(table.scores[:, 1], labels["score_noise"].to_numpy())


@pytest.mark.parametrize("per_pass", [1, 300, 10**6])
def test_number_of_passes_and_of_shards_in_a_state_changes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_pass: int
) -> None:
    calls = []
    run_pipeline = module.Pipeline.run
    monkeypatch.setattr(
        module.Pipeline, "run", lambda self, *a, **k: calls.append(self.name) or run_pipeline(self, *a, **k)
    )
    monkeypatch.setattr(module, "_ROWS_PER_PASS", per_pass)
    monkeypatch.setattr(module, "_ROWS_PER_STATE", 2 * ROWS if per_pass == 300 else 250_000)
    with _labelled(tmp_path, _cut(_labels())) as run:
        normalise(run)
    assert calls.count("fit_normaliser") == {1: SHARDS, 300: 3, 10**6: 1}[per_pass]
    mine, theirs = _artifacts(tmp_path / "out"), _artifacts(whole)
    assert {name: mine[name] for name in mine if not name.startswith("normalise%")} == {
        name: theirs[name] for name in theirs if not name.startswith("normalise%")
    }


def test_dask_gives_the_same_bytes(whole: Path, tmp_path: Path, dask_executor) -> None:
    recipe = load_recipe(_recipe(tmp_path))
    with open_run(recipe, tmp_path / "out", lambda: dask_executor) as run:
        _put_labels(run, _cut(_labels()))
        normalise(run)
    names = [name for name in _artifacts(whole) if not name.startswith("normalise%")]
    assert len(names) == SHARDS + 2
    for name in names:
        assert _artifacts(tmp_path / "out")[name] == _artifacts(whole)[name]


def test_other_shards_of_the_same_documents_give_the_same_sigma(whole: Path, tmp_path: Path) -> None:
    labels = _labels()
    shuffled = labels.take(pa.array(np.random.default_rng(1).permutation(labels.num_rows)))
    with _labelled(tmp_path, _cut(shuffled, 4)) as run:
        normalise(run)
    for name in ("normaliser.json", "domains.json"):
        assert (tmp_path / "out" / "normalise" / name).read_bytes() == (whole / "normalise" / name).read_bytes()
    assert _shards(tmp_path / "out").sort_by("doc_id").equals(_shards(whole).sort_by("doc_id"))


def test_interrupted_step_makes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _labelled(tmp_path, _cut(_labels())) as run:
        normalise(run)
        before = _artifacts(run.directory.root)
        manifest = run.directory.root / "manifest" / "normalise"
        for name in ("_SUCCESS.json", "normalise%part-03.parquet.json", "normalise%part-08.parquet.json"):
            (manifest / name).unlink()
        (run.directory.root / "normalise" / "part-03.parquet").unlink()
        kept = {path: path.stat().st_mtime_ns for path in (run.directory.root / "normalise").iterdir()}
        monkeypatch.setattr(module, "_sketch", lambda run: pytest.fail("σ is there already"))
        normalise(run)
        rewritten = {path.name for path, at in kept.items() if path.stat().st_mtime_ns != at}
        assert rewritten == {"part-08.parquet"}
        assert _artifacts(run.directory.root) == before
        assert run.step("normalise").is_done
        normalise(run)
        assert RunDirectory(run.directory.root).verify()[1] == []


def test_sigma_without_its_domains_is_made_anew(tmp_path: Path) -> None:
    with _labelled(tmp_path, _cut(_labels())) as run:
        step = run.step("normalise")
        step.write_json("normalise/normaliser.json", {})
        normalise(run)
        assert run.normaliser.scorers == SCORERS


def _spoil(labels: pa.Table, rows: dict[str, list[int]]) -> pa.Table:
    for name, places in rows.items():
        values = labels[name].to_numpy().copy()
        values[places] = np.nan
        labels = labels.set_column(labels.column_names.index(name), name, pa.array(values))
    return labels


def test_score_that_is_not_finite_stops_the_step_with_its_document(tmp_path: Path) -> None:
    with (
        _labelled(tmp_path, _cut(_spoil(_labels(), {"score_noise": [250]}))) as run,
        pytest.raises(
            QuadmixError, match=r"'score_noise' is not finite for 1 documents, such as doc-250; .*under norm"
        ),
    ):
        normalise(run)


def test_dropped_documents_are_counted_and_everything_goes_on_without_them(tmp_path: Path) -> None:
    labels = _labels()
    zoo = np.flatnonzero(np.array(labels["domain"].to_pylist()) == "zoo")
    edu = sorted({*zoo.tolist(), *range(ROWS, 2 * ROWS), 3})  # a whole domain and a whole shard
    noise = [3, 500] if 500 not in zoo else [3, 501]
    spoilt = _spoil(labels, {"score_edu": edu, "score_noise": noise})
    with _labelled(tmp_path, _cut(spoilt), "normalise.invalid_scores=drop") as run:
        normalise(run)
        facts = run.step("normalise").summary()
        assert facts is not None
        assert facts["dropped"] == {"score_edu not finite": len(edu), "score_noise not finite": 1}
        assert (facts["rows_in"], facts["rows_kept"]) == (labels.num_rows, labels.num_rows - len(edu) - 1)
        gone = set(edu) | set(noise)
        left = labels.take(pa.array([row for row in range(labels.num_rows) if row not in gone]))
        assert run.table.doc_ids.to_pylist() == left["doc_id"].to_pylist()
        assert run.table.domains == run.summary.domains == ("art", "moon", "sport")
        assert run.normaliser == Normaliser.fit(ScoreTable.from_labels(left, SCORERS), DIRECTIONS)
        assert run.normalised.shape == (left.num_rows, 2)
        assert run.summary.documents.sum() == left.num_rows
        assert pq.read_metadata(run.directory.root / "normalise" / "part-01.parquet").num_rows == 0


def test_domains_are_folded_by_what_is_left_of_them(tmp_path: Path) -> None:
    labels = _labels()
    domain = np.array(labels["domain"].to_pylist())
    sport = np.flatnonzero(domain == "sport")
    tokens = labels["tokens"].to_numpy()
    fewest = int(tokens[sport[:-5]].sum()) + 1
    assert tokens[sport].sum() >= fewest
    spoilt = _spoil(labels, {"score_edu": sport[-5:].tolist()})
    settings = {"rank": {"merge_small_domains": fewest}, "normalise": {"invalid_scores": "drop"}}
    with _labelled(tmp_path, _cut(spoilt), **settings) as run:
        normalise(run)
        assert run.table.domains == ("art", "moon", "other")


def test_nothing_left_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    spoilt = _spoil(_labels(40), {"score_edu": list(range(40))})
    with (
        _labelled(tmp_path, _cut(spoilt, 2), "normalise.invalid_scores=drop") as run,
        pytest.raises(
            InputError, match=r"none of the 40 labelled documents is left; dropped.*score_edu not finite': 40"
        ),
    ):
        normalise(run)


def test_scores_too_near_to_each_other_are_said_to_be_coarse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = _labels(400)
    saturated = 1 - np.random.default_rng(2).random(400) * 2**-16
    labels = labels.set_column(3, "score_edu", pa.array(saturated.astype(np.float32)))
    with _labelled(tmp_path, _cut(labels, 2)) as run:
        normalise(run)
        assert run.normaliser.maps[0].error > 0.5
    (warning,) = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert warning.startswith(
        "score_edu: many scores agree to one part in 16,384, so σ of a document may be off by up to"
    )


def test_empty_shard_is_kept_empty(tmp_path: Path) -> None:
    labels = _labels(50)
    with _labelled(tmp_path, [labels.slice(0, 30), labels.slice(0, 0), labels.slice(30)]) as run:
        normalise(run)
        assert run.table.n == 50
        assert run.label_shards == ["part-00", "part-01", "part-02"]


def test_same_document_in_two_shards_is_found_when_the_table_is_read(tmp_path: Path) -> None:
    labels = _labels(50)
    with _labelled(tmp_path, [labels, labels.slice(7, 1)]) as run:
        normalise(run)
        with pytest.raises(InputError, match="1 ids occur more than once, such as doc-7"):
            _ = run.table


def test_frozen_sigma_is_used_unchanged_on_more_documents(whole: Path, tmp_path: Path) -> None:
    frozen = whole / "normalise" / "normaliser.json"
    more = _labels(300, seed=9)
    more = more.set_column(0, "doc_id", pa.array([f"late-{i}" for i in range(300)]))
    both = [*_cut(_labels()), more]
    with _labelled(tmp_path, both, normalise={"frozen": str(frozen)}) as run:
        normalise(run)
        assert run.normaliser != Normaliser.fit(run.table, DIRECTIONS)
        assert run.summary.to_dict() == DomainSummary.of(run.table, run.normalised).to_dict()
    out = tmp_path / "out" / "normalise"
    assert (out / "normaliser.json").read_bytes() == frozen.read_bytes()
    for i in range(SHARDS):
        name = f"part-{i:02}.parquet"
        assert pq.read_table(out / name).equals(pq.read_table(frozen.parent / name))


def test_content_of_a_frozen_sigma_is_in_the_key_and_its_place_is_not(whole: Path, tmp_path: Path) -> None:
    text = (whole / "normalise" / "normaliser.json").read_text(encoding="utf-8")
    path = _recipe(tmp_path)

    def keys(frozen: str) -> dict[str, str]:
        recipe = load_recipe(path, [f"normalise.frozen={frozen}"])
        return Run(recipe, RunDirectory(tmp_path / "none"), lambda: pytest.fail("nothing runs")).keys

    (tmp_path / "sigma.json").write_text(text, encoding="utf-8")
    (tmp_path / "moved.json").write_text(text, encoding="utf-8")
    plain, given = keys("null"), keys("sigma.json")
    assert (plain["label"], plain["normalise"] != given["normalise"]) == (given["label"], True)
    assert keys("moved.json") == given
    (tmp_path / "sigma.json").write_text(text.replace("1.0", "0.9", 1), encoding="utf-8")
    assert keys("sigma.json")["normalise"] != given["normalise"]
    assert load_recipe(path, ["normalise.frozen=sigma.json"]).normalise.frozen == str(tmp_path / "sigma.json")


def test_frozen_sigma_that_does_not_fit_the_recipe_is_refused_before_any_pass(whole: Path, tmp_path: Path) -> None:
    content = json.loads((whole / "normalise" / "normaliser.json").read_text(encoding="utf-8"))
    edu, noise = content["maps"]
    turned = {**edu, "higher_is_better": False, "value": edu["value"][::-1]}
    for maps, method, expected in (
        ([edu], "ecdf", r"normalise.frozen: .*sigma.json is of the scorers edu; scorers has edu, noise; give"),
        ([noise, edu], "ecdf", r"of the scorers noise, edu; scorers has edu, noise; .*in the same order"),
        ([turned, noise], "ecdf", r"takes low scores of edu as good, the recipe's scorer does not"),
        ([edu, noise], "zscore", r"was fitted by zscore; set normalise.method to that, found ecdf"),
    ):
        (tmp_path / "sigma.json").write_text(json.dumps({"method": method, "maps": maps}), encoding="utf-8")
        recipe = load_recipe(_recipe(tmp_path, normalise={"frozen": "sigma.json"}))
        run = Run(recipe, RunDirectory(tmp_path / "none"), lambda: pytest.fail("nothing runs"))
        with pytest.raises(RecipeError, match=expected):
            frozen_normaliser(run)
    (tmp_path / "sigma.json").unlink()
    with pytest.raises(InputError, match=r"sigma.json: no such file"):
        frozen_normaliser(run)
    assert frozen_normaliser(Run(load_recipe(_recipe(tmp_path)), run.directory, run.make_executor)) is None
