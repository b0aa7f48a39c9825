"""The whole run: what it leaves behind, that it resumes after any kill, and that the executor changes nothing."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_run import MODELS, write_small_recipe
from tokenizers import Tokenizer

from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import RecipeError
from quadmix_plugin.pipelines.context import STEPS, Run, open_run
from quadmix_plugin.pipelines.label import label
from quadmix_plugin.pipelines.normalise import normalise
from quadmix_plugin.pipelines.proxies import _finish
from quadmix_plugin.pipelines.proxy_data import pool_prefixes, write_pool
from quadmix_plugin.pipelines.run import run_steps
from quadmix_plugin.pipelines.search import search
from quadmix_plugin.proxy.parts import part_path
from quadmix_plugin.store import RunDirectory

KILLED = 9

# Ends the process without any clean-up after the n-th artifact or manifest entry has been renamed into place.
CRASHING = """
import os, sys
left, rename = int(sys.argv.pop(1)), os.replace
def replace(*args):
    global left
    rename(*args)
    left -= 1
    if left == 0:
        os._exit(9)
os.replace = replace
from quadmix_plugin.cli import main
main()
"""


def _results(out: Path) -> dict[str, bytes]:
    """The artifacts that must not depend on how the run went."""
    names = ["search/theta.json", "proxies/thetas.parquet", "normalise/normaliser.json", "selection/summary.json"]
    found = [out / name for name in names]
    found += sorted((out / "selection").glob("*.parquet")) + sorted((out / "labels").glob("*.parquet"))
    found += sorted((out / "tokens").glob("*")) + sorted((out / "pretrain" / "models").rglob("*.safetensors"))
    found += sorted((out / "compare").rglob("*.safetensors")) + sorted((out / "compare").glob("*/selection/*"))
    found += sorted((out / "compare").glob("*/tokens/*"))
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def test_run_leaves_every_artifact_and_verifies(finished: Path) -> None:
    names = (
        "recipe.yaml provenance.json report.html normalise/normaliser.json normalise/domains.json "
        "proxies/losses.parquet proxies/curves.parquet "
        "proxies/noise.json search/theta.json search/metrics.json search/predictions.parquet search/regressor.txt "
        "selection/theta.json selection/rank_map.parquet selection/summary.json "
        "tokens/blend.txt tokens/blend.json tokens/validation.bin tokens/validation.idx "
        "pretrain/results.parquet pretrain/curves.parquet "
        "compare/results.parquet compare/curves.parquet "
        "compare/comparison.md compare/comparison.csv compare/comparison.json"
    )
    assert [name for name in names.split() if not (finished / name).is_file()] == []
    checked, faults = RunDirectory(finished).verify()
    assert faults == []
    assert checked > 60


def test_rows_in_are_rows_kept_and_dropped_in_every_step(finished: Path) -> None:
    steps = json.loads((finished / "provenance.json").read_text())["steps"]
    counted = {name: facts for name, facts in steps.items() if "rows_in" in facts}
    assert set(counted) == {"label", "normalise", "select"}
    for facts in counted.values():
        assert facts["rows_in"] == facts["rows_kept"] + sum(facts["dropped"].values())
    assert counted["label"]["rows_in"] == pq.read_metadata(finished.parent / "corpus.parquet").num_rows


def test_megatron_reads_back_the_selected_documents_with_their_copies(finished: Path) -> None:
    tokenizer = Tokenizer.from_file(str(MODELS / "tokenizer" / "tokenizer.json"))
    eod = tokenizer.token_to_id("<|endoftext|>")
    corpus = pq.read_table(finished.parent / "corpus.parquet", columns=["doc_id", "text"]).to_pandas()
    texts = dict(zip(corpus["doc_id"], corpus["text"], strict=True))
    shards = [pq.read_table(p) for p in (finished / "selection").glob("corpus-*.parquet")]
    wanted: Counter[tuple[int, ...]] = Counter()
    for row in pa.concat_tables(shards).to_pylist():
        ids = tokenizer.encode(texts[row["doc_id"]], add_special_tokens=False).ids
        wanted[(*ids, eod)] += row["copies"]
    found: Counter[tuple[int, ...]] = Counter()
    prefixes = (finished / "tokens" / "blend.txt").read_text(encoding="utf-8").split()[1::2]
    for prefix in prefixes:
        dataset = IndexedDataset(str(finished / prefix))
        documents = [tuple(dataset[i].tolist()) for i in range(len(dataset))]
        assert all(a != b for a, b in pairwise(documents))
        found += Counter(documents)
    assert found == wanted
    assert max(wanted.values()) > 1
    assert len(prefixes) == len(shards) > 1


def test_models_are_trained_alike_on_every_selection(finished: Path) -> None:
    results = pq.read_table(finished / "compare" / "results.parquet").to_pandas()
    assert results.groupby("selector").size().to_dict() == {"quadmix": 2, "random": 2, "top-edu": 2}
    assert results["tokens_seen"].nunique() == 1


def test_trained_model_loads_in_transformers(finished: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished / "pretrain" / "models" / "quadmix-1")
    assert model.config.vocab_size == 4096


def test_second_run_does_nothing(recipe_path: Path, finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "manifest").rglob("*.json")}
    with open_run(load_recipe(recipe_path), finished) as run:
        summary = run_steps(run)
    assert all("already done" in line for line in summary["headlines"][:-1])
    assert {p: p.stat().st_mtime_ns for p in (finished / "manifest").rglob("*.json")} == before


def test_dask_gives_the_same_bytes(recipe_path: Path, finished: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path, ["executor.name=dask", "executor.workers=2"])
    with open_run(recipe, tmp_path) as run:
        run_steps(run)
    assert _results(tmp_path) == _results(finished)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(recipe_path: Path, finished: Path, tmp_path: Path) -> None:
    commits = sum(1 for _ in (finished / "manifest").rglob("*.json")) * 2
    kills = 0
    for n in np.random.default_rng(5).integers(commits // 4, commits // 2, 20):
        command = [sys.executable, "-c", CRASHING, str(n), "run", str(recipe_path), "--out", str(tmp_path), "--json"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if ended.returncode == 0:
            break
        assert ended.returncode == KILLED, ended.stderr + ended.stdout
        kills += 1
    else:
        pytest.fail("the run never came to its end")
    assert kills >= 2
    assert _results(tmp_path) == _results(finished)
    assert RunDirectory(tmp_path).verify()[1] == []
    assert [p for p in tmp_path.rglob("*.tmp")] == []


def test_another_recipe_in_the_same_directory_is_refused_with_the_keys(recipe_path: Path, finished: Path) -> None:
    changed = load_recipe(recipe_path, ["proxy.tokens=7000", "search.draws=600"])
    with (
        pytest.raises(RecipeError, match=r"step 'proxies'.*proxy.tokens: 6000 → 7000; search.draws: 500 → 600"),
        open_run(changed, finished),
    ):
        pass
    moved = load_recipe(recipe_path, ["executor.name=dask"])
    with open_run(moved, finished) as run:
        assert [name for name in STEPS if run.step(name).is_done] == list(STEPS[:-1])


def test_changed_corpus_is_refused(tmp_path: Path) -> None:
    path = write_small_recipe(tmp_path)
    with open_run(load_recipe(path), tmp_path / "out") as run:
        run.step("label").write_json("labels/note.json", {})
    corpus = tmp_path / "corpus.parquet"
    os.utime(corpus, ns=(1, 1))
    with (
        pytest.raises(RecipeError, match=r"files that the recipe names, or the versions of .* plug-ins, have changed"),
        open_run(load_recipe(path), tmp_path / "out"),
    ):
        pass


def _keys(recipe: Path) -> dict[str, str]:
    return Run(load_recipe(recipe), RunDirectory(recipe.parent / "none"), lambda: pytest.fail("nothing runs")).keys


def _edit(recipe: Path, **sections: object) -> Path:
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    recipe.write_text(yaml.safe_dump(content | sections, sort_keys=False), encoding="utf-8")
    return recipe


def test_order_of_scorers_is_in_the_keys(tmp_path: Path) -> None:
    recipe = write_small_recipe(tmp_path)
    before = _keys(recipe)
    scorers = yaml.safe_load(recipe.read_text(encoding="utf-8"))["scorers"]
    after = _keys(_edit(recipe, scorers=dict(reversed(scorers.items()))))
    assert all(before[name] != after[name] for name in STEPS)


def test_validation_rows_behind_a_glob_are_in_the_keys(tmp_path: Path) -> None:
    recipe = write_small_recipe(tmp_path, validation={"path": "valid*.jsonl"})
    before = _keys(recipe)
    rows = (tmp_path / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "validation.jsonl").write_text("\n".join(rows[1:]) + "\n", encoding="utf-8")
    after = _keys(recipe)
    assert before["normalise"] == after["normalise"]
    assert before["proxies"] != after["proxies"]


def test_place_of_models_and_the_caches_of_a_download_are_in_no_key(tmp_path: Path) -> None:
    recipe = write_small_recipe(tmp_path)
    before = _keys(recipe)
    moved = shutil.copytree(MODELS / "tokenizer", tmp_path / "elsewhere")
    (moved / ".cache").mkdir()
    (moved / ".cache" / "etag").write_text("1", encoding="utf-8")
    assert _keys(_edit(recipe, tokenizer={"model": str(moved)})) == before
    tokenizer = json.loads((moved / "tokenizer.json").read_text(encoding="utf-8"))
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": None}, indent=3), encoding="utf-8")
    assert _keys(recipe) != before


def _columns_recipe(folder: Path, corpus: str) -> Path:
    """A recipe whose labels are columns of the corpus, so that no model is loaded."""
    recipe = write_small_recipe(folder, corpus={"path": corpus, "documents_per_shard": 40})
    scorers = {"length": {"scorer": "column", "column": "tokens"}, "s": {"scorer": "column", "column": "s"}}
    domain = {"classifier": "column", "column": "domain"}
    return _edit(recipe, domain=domain, scorers=scorers, compare={}, rank={"merge_small_domains": 0})


def _rows(n: int) -> list[dict]:
    kinds = ({"x": 1}, {"x": "one"}, None)  # of a key that nobody reads
    return [
        {
            "doc_id": f"2020-01-01 00:{i // 60:02}:{i % 60:02}",
            "text": f"{i} of many words",
            "domain": "ab"[i % 2],
            "tokens": i + 0.5,
            "s": i,
            "meta": kinds[i % 3],
        }
        for i in range(n)
    ]


def test_columns_that_are_called_like_ours_and_uneven_json_lines_are_read_as_they_are(tmp_path: Path) -> None:
    rows = _rows(100)
    recipe = _columns_recipe(tmp_path, "mine.jsonl")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with open_run(load_recipe(recipe), tmp_path / "out") as run:
        label(run)
        normalise(run)
        table = run.table
    assert table.doc_ids.to_pylist() == [row["doc_id"] for row in rows]
    assert [table.domains[m] for m in table.domain_ids] == [row["domain"] for row in rows]
    np.testing.assert_array_equal(table.scores[:, 0], [row["tokens"] for row in rows])
    assert table.tokens.max() < 20


def test_pool_goes_on_after_a_kill_between_the_two_entries_of_a_pair(tmp_path: Path) -> None:
    recipe = _columns_recipe(tmp_path, "mine.parquet")
    rows = [{key: value for key, value in row.items() if key != "meta"} for row in _rows(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    with open_run(load_recipe(recipe), tmp_path / "out") as run:
        label(run)
        normalise(run)
        step = run.step("proxies")
        write_pool(run, step)
        whole = pool_prefixes(run)
        entry = next((tmp_path / "out" / "manifest" / "proxies").glob("*-00001.idx.json"))
        entry.unlink()
        write_pool(run, step)
        assert pool_prefixes(run) == whole
        assert entry.exists()


@pytest.fixture
def copied(recipe_path: Path, finished: Path, tmp_path: Path):
    """The finished run, opened in a copy that a test may change."""
    out = shutil.copytree(finished, tmp_path / "out")
    with open_run(load_recipe(recipe_path), out) as run:
        yield run


@pytest.mark.parametrize("failed", [pytest.param((3,), marks=pytest.mark.slow), (0, 14)])
def test_failed_proxies_are_left_out_of_the_search(copied: Run, failed: tuple[int, ...]) -> None:
    step = copied.step("proxies")
    for number in failed:
        step.write_json(part_path(number), {"proxy": number, "kind": "draw", "seed": 1, "failure": "diverged"})
    _finish(copied, step, step.read_table("proxies/thetas.parquet"), None, 0.0)
    shutil.rmtree(copied.directory.root / "manifest" / "search")
    search(copied)
    found = copied.step("search").read_table("search/predictions.parquet")["proxy"].unique().to_pylist()
    assert found == [number for number in range(14) if number not in failed]
    losses = step.read_table("proxies/losses.parquet").to_pylist()
    best = copied.step("search").read_json("search/metrics.json")["optimum"]["best_proxy"]
    assert best["losses"]["hellaswag"] == next(
        row["loss_hellaswag"] for row in losses if row["proxy"] == best["number"]
    )
    noise = step.read_json("proxies/noise.json")
    assert {task: each["thetas"] for task, each in noise.items()} == dict.fromkeys(
        ("hellaswag", "mmlu"), 2 if 0 in failed else 3
    )
