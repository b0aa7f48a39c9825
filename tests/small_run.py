"""A recipe over a tenth of the quickstart corpus, small enough for tests and real in every part."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"
MODELS = QUICKSTART / "models"


def write_small_recipe(folder: Path, **sections: dict) -> Path:
    """Writes corpus, validation rows and recipe into ``folder``; ``sections`` are merged into the recipe's."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = pq.read_table(QUICKSTART / "corpus.parquet")
    pq.write_table(corpus.take(list(range(0, corpus.num_rows, 10))), folder / "corpus.parquet")
    lines = (QUICKSTART / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["task"] in ("hellaswag", "mmlu")]
    (folder / "validation.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    recipe = {
        "name": "small",
        "seed": 3,
        "corpus": {"path": "corpus.parquet", "id": "doc_id", "documents_per_shard": 300},
        "tokenizer": {"model": str(MODELS / "tokenizer")},
        "domain": {"classifier": "nvidia-domain", "model": str(MODELS / "domain")},
        "scorers": {name: {"model": str(MODELS / name)} for name in ("fineweb-edu", "dclm-fasttext", "ask-llm")},
        "rank": {"merge_small_domains": 20_000},
        "space": {"omega_max": 0.5},
        "validation": {"path": "validation.jsonl", "rows_per_task": 40},
        "proxy": {"number": 14, "tokens": 6_000, "repeats": 2},
        "search": {
            "draws": 500,
            "objective": {"hellaswag": 1.0},
            "regressor": "gp",
            "compared": ["gp", "lightgbm"],
        },
        "pretrain": {"tokens": 12_000, "seeds": [1, 2]},
        "compare": {"selectors": {"random": {}, "top-edu": {"selector": "top_k", "scorer_name": "fineweb-edu"}}},
        "executor": {"name": "inline"},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section} if isinstance(section, dict) else section  # type: ignore[dict-item]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def corpus_texts(n: int) -> list[str]:
    """``n`` texts of the quickstart corpus, evenly spread over it."""
    column = pq.read_table(QUICKSTART / "corpus.parquet", columns=["text"])["text"]
    return [column[int(i)].as_py() for i in range(0, len(column), len(column) // n)][:n]
