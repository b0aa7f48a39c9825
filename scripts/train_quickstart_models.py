"""Trains the tiny labelling models and the tokenizer of the quickstart, from examples/quickstart/corpus.parquet alone.

They have the formats of the published models, so that the quickstart runs the same code as a real corpus, and they
are worth what eleven thousand documents with weak labels can teach: each folder's README.md says so with figures.
The validation questions are never read. Run from anywhere: ``python scripts/train_quickstart_models.py [NAME ...]``.
"""

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from quickstart_corpus import QUICKSTART, Documents, education_labels, informative_labels, prose_labels
from scipy.stats import spearmanr
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from tiny_models import (
    SEED,
    FastTextSize,
    Size,
    fresh_folders,
    train_ask_llm,
    train_domain,
    train_fasttext,
    train_fineweb_edu,
)
from tiny_tokenizers import train_eod_tokenizer

from quadmix_plugin.stages.domain_classifiers.nvidia_domain import NvidiaDomain
from quadmix_plugin.stages.scorers.ask_llm import AskLLM
from quadmix_plugin.stages.scorers.dclm_fasttext import DCLMFastText
from quadmix_plugin.stages.scorers.fineweb_edu import FineWebEdu

# How each is trained.


def domain(folder: Path, documents: Documents) -> None:
    """Labels by ``true_domain``."""
    size = Size(vocabulary=6000, context=96, width=64, layers=1, epochs=4)
    train_domain(folder, documents.texts, documents.domains.tolist(), size)


def fineweb_edu(folder: Path, documents: Documents) -> None:
    """Values by the kind of source."""
    size = Size(vocabulary=6000, context=96, width=64, layers=1, epochs=3)
    train_fineweb_edu(folder, documents.texts, education_labels(documents), size)


def ask_llm(folder: Path, documents: Documents) -> None:
    """Yes for what informs by itself."""
    size = Size(vocabulary=4000, context=128, width=48, layers=1, epochs=2, buckets=16)
    train_ask_llm(folder, documents.texts, informative_labels(documents), size)


def dclm_fasttext(folder: Path, documents: Documents) -> None:
    """``hq`` for continuous prose."""
    labels = np.where(prose_labels(documents), "hq", "cc").tolist()
    train_fasttext(folder, documents.texts, labels, FastTextSize())


# What each is worth, measured through the plug-in that will load it.


def measure_domain(folder: Path, documents: Documents) -> dict[str, float]:
    """Accuracy against ``true_domain``, plain and balanced over domains."""
    classifier = NvidiaDomain(model=str(folder))
    classifier.setup("cpu")
    found = np.array(classifier.classify(documents.texts), dtype=object)
    accuracy = float((found == documents.domains).mean())
    return {"accuracy": accuracy, "balanced accuracy": float(balanced_accuracy_score(documents.domains, found))}


def measure_fineweb_edu(folder: Path, documents: Documents) -> dict[str, float]:
    """Error and rank correlation against the weak label."""
    found, labels = _scores(FineWebEdu(model=str(folder)), documents), education_labels(documents)
    correlation: Any = spearmanr(found, labels)
    return {"mean absolute error": float(np.abs(found - labels).mean()), "Spearman": float(correlation.statistic)}


def measure_ask_llm(folder: Path, documents: Documents) -> dict[str, float]:
    """AUC of the yes-probability against the weak label."""
    return {"AUC": roc_auc_score(informative_labels(documents), _scores(AskLLM(model=str(folder)), documents))}


def measure_dclm_fasttext(folder: Path, documents: Documents) -> dict[str, float]:
    """AUC of P(hq) against the weak label."""
    return {"AUC": roc_auc_score(prose_labels(documents), _scores(DCLMFastText(model=str(folder)), documents))}


def _scores(scorer: Any, documents: Documents) -> NDArray[np.float32]:
    scorer.setup("cpu")
    return scorer.score(documents.texts)


@dataclass(frozen=True)
class Recipe:
    """One model of the quickstart: how it is trained and measured, and what its card says."""

    train: Callable[[Path, Documents], None]
    measure: Callable[[Path, Documents], dict[str, float]]
    title: str
    label: str


RECIPES = {
    "domain": Recipe(
        domain, measure_domain, "domain classifier, format of `nvidia/domain-classifier`",
        "`true_domain` of the corpus, which follows a document's source or its section. Two of the 26 labels (Adult, "
        "Sensitive_Subjects) have no document and are never to be expected; News has five.",
    ),
    "fineweb-edu": Recipe(
        fineweb_edu, measure_fineweb_edu, "educational value, format of `HuggingFaceFW/fineweb-edu-classifier`",
        "0 to 5 by the kind of source: 5 teaching chapters of manuals, 4 their other chapters, 3 reference works, 2 "
        "documentation of single functions, and speeches, 1 fiction and scripture, 0 interface strings and changelogs.",
    ),
    "dclm-fasttext": Recipe(
        dclm_fasttext, measure_dclm_fasttext, "P(hq), format of `mlfoundations/fasttext-oh-eli5`",
        "`hq` = continuous prose by form alone (long paragraphs of whole sentences, many function words), `cc` = "
        "lists, strings, statistics, changelogs, references.",
    ),
    "ask-llm": Recipe(
        ask_llm, measure_ask_llm, "yes-probability of a T5, format of Flan-T5 under AskLLM",
        "yes = informative by itself: reference works, and manual sections that open with their heading; no = fiction, "
        "documentation of single functions, interface strings, changelogs, fragments.",
    ),
}  # fmt: skip


def held_out(documents: Documents) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """Rows to train on, and two kinds of rows to measure on: whole sources, and random rows of the other sources."""
    share = np.array([_hash_share(source) for source in documents.sources])
    random = np.random.default_rng(SEED).random(len(share)) < 0.1
    unseen = share < 0.15
    rows = {"random documents": np.flatnonzero(random & ~unseen), "unseen sources": np.flatnonzero(unseen)}
    return np.flatnonzero(~random & ~unseen), rows


def _hash_share(name: str) -> float:
    return int.from_bytes(hashlib.sha1(name.encode(), usedforsecurity=False).digest()[:4], "big") / 2**32


def evaluate(recipe: Recipe, documents: Documents) -> dict[str, dict[str, float]]:
    """Trains on a part of the corpus and measures on the rest."""
    train_rows, parts = held_out(documents)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        recipe.train(Path(folder), documents.part(train_rows))
        return {
            f"{name} ({len(rows)})": recipe.measure(Path(folder), documents.part(rows)) for name, rows in parts.items()
        }


def card(name: str, recipe: Recipe, figures: dict[str, dict[str, float]]) -> str:
    """The model card."""
    measures = list(next(iter(figures.values())))
    lines = [f"| held out | {' | '.join(measures)} |", "|---|" + "--:|" * len(measures)]
    lines += [f"| {part} | {' | '.join(f'{row[m]:.3f}' for m in measures)} |" for part, row in figures.items()]
    return f"""# Quickstart model `{name}`: {recipe.title}

A tiny model trained from scratch in about a minute on one CPU core by `scripts/train_quickstart_models.py`, with
fixed seeds, from `examples/quickstart/corpus.parquet` alone. It exists so that the quickstart runs the real code with
real inference. **It is not a quality model for other text**: use the published model of the same format for that.

**Weak label it was trained on:** {recipe.label} Nobody read the documents one by one.

{chr(10).join(lines)}

Measured with a model trained on the other documents; the committed model is trained on all of them, so what it says
about the quickstart corpus is in-sample. The label goes with the source, and so does the vocabulary: the figure on
unseen sources, not the one on random documents, says what the model has learnt beyond recognising a source.

Licence: Apache-2.0, as the project. The texts it was trained on keep theirs (see `../../README.md`).
"""


def main() -> None:
    """Trains the named models, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"tokenizer, {', '.join(RECIPES)}; default all")
    parser.add_argument("--out", type=Path, default=QUICKSTART / "models")
    parser.add_argument("--cards-only", action="store_true", help="measure again and rewrite the cards")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    documents = Documents.read()
    names = arguments.names or ["tokenizer", *RECIPES]
    for name, folder in fresh_folders(arguments.out, [] if arguments.cards_only else names):
        started = time.perf_counter()
        torch.manual_seed(SEED)
        if name == "tokenizer":
            train_eod_tokenizer(folder, documents.texts)
        else:
            RECIPES[name].train(folder, documents)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{name}: {size / 1e6:.2f} MB, {time.perf_counter() - started:.0f} s", flush=True)
    for name in [name for name in names if name in RECIPES]:
        figures = evaluate(RECIPES[name], documents)
        (arguments.out / name / "README.md").write_text(card(name, RECIPES[name], figures), encoding="utf-8")
        print(name, figures, flush=True)


if __name__ == "__main__":
    main()
