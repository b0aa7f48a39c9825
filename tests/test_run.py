"""The whole run: what it leaves behind, that it resumes after any kill, and that the executor changes nothing."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_run import MODELS, write_small_recipe
from tokenizers import Tokenizer

from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import RecipeError
from quadmix_plugin.pipelines.context import STEPS, open_run
from quadmix_plugin.pipelines.run import run_steps
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
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def test_run_leaves_every_artifact_and_verifies(finished: Path) -> None:
    names = (
        "recipe.yaml provenance.json report.html normalise/normaliser.json proxies/losses.parquet "
        "proxies/curves.parquet "
        "proxies/noise.json search/theta.json search/metrics.json search/predictions.parquet search/regressor.txt "
        "selection/theta.json selection/rank_map.parquet selection/baselines.parquet selection/summary.json "
        "tokens/train.bin tokens/train.idx tokens/random.bin pretrain/results.parquet pretrain/curves.parquet"
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
    dataset = IndexedDataset(str(finished / "tokens" / "train"))
    found = [tuple(int(i) for i in dataset[i]) for i in range(len(dataset))]
    assert Counter(found) == wanted
    assert max(wanted.values()) > 1
    assert all(a != b for a, b in pairwise(found))


def test_compared_selections_have_the_budget_of_unique_tokens(finished: Path) -> None:
    selectors = json.loads((finished / "selection" / "summary.json").read_text())["selectors"]
    budget = selectors["quadmix"]["unique_tokens"]
    largest = max(pq.read_table(p, columns=["tokens"])["tokens"].to_numpy().max() for p in finished.glob("labels/*"))
    for facts in selectors.values():
        assert abs(facts["unique_tokens"] - budget) <= largest
    results = pq.read_table(finished / "pretrain" / "results.parquet").to_pandas()
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


def test_killed_again_and_again_it_ends_with_the_same_bytes(recipe_path: Path, finished: Path, tmp_path: Path) -> None:
    commits = sum(1 for _ in (finished / "manifest").rglob("*.json")) * 2
    kills = 0
    for n in np.random.default_rng(5).integers(3, commits // 4, 20):
        command = [sys.executable, "-c", CRASHING, str(n), "run", str(recipe_path), "--out", str(tmp_path), "--json"]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if ended.returncode == 0:
            break
        assert ended.returncode == KILLED, ended.stderr + ended.stdout
        kills += 1
    else:
        pytest.fail("the run never came to its end")
    assert kills >= 4
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
        pytest.raises(RecipeError, match="files that the recipe names have changed"),
        open_run(load_recipe(path), tmp_path / "out"),
    ):
        pass
