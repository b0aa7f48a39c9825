"""A labelled corpus of some 280 documents and the step ``proxies`` on it, small enough to be run many times."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_run import write_small_recipe

from quadmix_plugin.config import load_recipe
from quadmix_plugin.pipelines.context import open_run
from quadmix_plugin.pipelines.proxies import proxies
from quadmix_plugin.pipelines.run import run_steps, steps_until
from quadmix_plugin.proxy.parts import part_path
from quadmix_plugin.store import Step

TASKS = ("hellaswag", "mmlu")
TOKENS, PER_STEP = 2_000, 64
STEPS = -(-TOKENS // PER_STEP)
MODEL = {
    "batch_size": 2,
    "learning_rate": 0.01,
    "dtype": "float32",
    "shape_options": {"layers": 1, "width": 16, "heads": 1, "ffn": 32, "context": 32},
}

_LABELLED: list[Path] = []


def write_recipe(folder: Path) -> Path:
    """Some 280 documents whose domains and scores are columns, so that no model is loaded to label them."""
    path = write_small_recipe(folder)
    corpus = pq.read_table(folder / "corpus.parquet")
    corpus = corpus.take(list(range(0, corpus.num_rows, 4)))
    texts = corpus["text"].to_pylist()
    scores = {"characters": [len(text) for text in texts], "words": [len(text.split()) / len(text) for text in texts]}
    for name, values in scores.items():
        corpus = corpus.append_column(name, pa.array(values, pa.float64()))
    pq.write_table(corpus, folder / "corpus.parquet")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content |= {
        "corpus": {"path": "corpus.parquet", "id": "doc_id", "documents_per_shard": 100},
        "domain": {"classifier": "column", "column": "true_domain"},
        "scorers": {name: {"scorer": "column", "column": name} for name in scores},
        "rank": {"merge_small_domains": 8_000},
        "compare": {},
        "proxy": {"number": 24, "tokens": TOKENS, "repeats": 2, "repeated": 2, "baselines": 2, "options": MODEL},
    }
    content["validation"]["rows_per_task"] = 12
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def label_once(factory: pytest.TempPathFactory) -> Path:
    """The path of a recipe whose run directory ``out`` has labels and σ: the same one for all modules that ask."""
    if not _LABELLED:
        path = write_recipe(factory.mktemp("labelled"))
        with open_run(load_recipe(path), path.parent / "out") as run:
            run_steps(run, steps_until("label"))
        _LABELLED.append(path)
    return _LABELLED[0]


def trained(recipe: Path, out: Path, *overrides: str, **options) -> Step:
    """The proxies of a recipe with labels, trained in ``out`` or what is missing there."""
    if not out.exists():
        shutil.copytree(recipe.parent / "out", out)
    with open_run(load_recipe(recipe, list(overrides)), out, **options) as run:
        proxies(run)
        return run.step("proxies")


def part(step: Step, number: int) -> dict:
    return step.read_json(part_path(number))


def rows(step: Step, kind: str = "draw") -> dict[int, dict]:
    """Number → row of losses.parquet."""
    table = step.read_table("proxies/losses.parquet").to_pylist()
    return {row["proxy"]: row for row in table if row["kind"] == kind}


def measured(row: dict) -> dict:
    """What training and measuring gave, and on which data."""
    return {key: value for key, value in row.items() if key not in ("proxy", "kind", "seconds", "attempts")}


def columns(step: Step, name: str) -> list[dict]:
    """The rows of a table without what the clock says."""
    table = step.read_table(f"proxies/{name}.parquet")
    return table.drop_columns([c for c in ("seconds",) if c in table.column_names]).to_pylist()
