"""Trains one tiny model per published format on real documents and measures each, through its plug-in, on unseen ones.

``python scripts/train_on_corpus.py --corpus FOLDER --out FOLDER [--report FILE.md]``. The folder of the corpus is
described in ``labelling_corpus.py``. What comes out shows that the formats and the code work from end to end with 512
tokens of real text; it says nothing about the published models, which are neither fetched nor run.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from labelling_corpus import Corpus, Split, held_out_parts, repeated, split
from labelling_report import report
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
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
from tiny_tokenizers import write_json

from quadmix_plugin.stages.domain_classifiers.fasttext import FastTextDomain
from quadmix_plugin.stages.domain_classifiers.nvidia_domain import NvidiaDomain
from quadmix_plugin.stages.scorers.ask_llm import AskLLM
from quadmix_plugin.stages.scorers.dclm_fasttext import DCLMFastText
from quadmix_plugin.stages.scorers.fineweb_edu import FineWebEdu

PER_PART, PER_DOMAIN = 400, 100  # documents: trained on at most, measured on at most

# Most batches hold the heads of documents, for time; the 16th in turn reads 512 tokens, as labelling does.
DOMAIN = Size(vocabulary=8000, context=512, width=96, layers=2, epochs=3, cuts=(64,) * 15 + (512,))
FINEWEB_EDU = Size(vocabulary=8000, context=512, width=96, layers=2, epochs=3, rate=1e-3, cuts=(96,) * 15 + (512,))
ASK_LLM = Size(vocabulary=7000, context=512, width=64, layers=2, epochs=2, cuts=(160,) * 15 + (512,))
HQ = FastTextSize(buckets=30000, epochs=5)
DOMAIN_FASTTEXT = FastTextSize(buckets=30000, epochs=15, rate=1.0)


def domain(folder: Path, documents: Corpus) -> None:
    """DeBERTa: the true domain."""
    train_domain(folder, documents.texts, documents.domains.tolist(), DOMAIN)


def domain_fasttext(folder: Path, documents: Corpus) -> None:
    """FastText with the domains as labels."""
    train_fasttext(folder, documents.texts, documents.domains.tolist(), DOMAIN_FASTTEXT)


def fineweb_edu(folder: Path, documents: Corpus) -> None:
    """BERT: the tier, as 0 to 5."""
    train_fineweb_edu(folder, documents.texts, documents.education, FINEWEB_EDU)


def ask_llm(folder: Path, documents: Corpus) -> None:
    """T5: yes for reference and teaching, no for chatter and fiction."""
    known = documents.take(np.flatnonzero(documents.informing >= 0))
    train_ask_llm(folder, known.texts, known.informing == 1, ASK_LLM)


def dclm_fasttext(folder: Path, documents: Corpus) -> None:
    """FastText: ``hq`` for the tiers 4 and 5, ``cc`` for 1 and 2."""
    known = documents.take(np.flatnonzero(documents.high >= 0))
    train_fasttext(folder, known.texts, np.where(known.high == 1, "hq", "cc").tolist(), HQ)


TRAIN: dict[str, Callable[[Path, Corpus], None]] = {
    "dclm-fasttext": dclm_fasttext,
    "domain-fasttext": domain_fasttext,
    "fineweb-edu": fineweb_edu,
    "ask-llm": ask_llm,
    "domain": domain,
}


def measure(name: str, folder: Path, documents: Corpus) -> Any:
    """Of a classifier the label of each document; of a scorer its figures against the weak label."""
    if name == "domain":
        return _ready(NvidiaDomain(model=str(folder))).classify(documents.texts)
    if name == "domain-fasttext":
        return _ready(FastTextDomain(model=str(folder))).classify(documents.texts)
    if name == "fineweb-edu":
        return _errors(_ready(FineWebEdu(model=str(folder))).score(documents.texts), documents)
    scorer = DCLMFastText(model=str(folder)) if name == "dclm-fasttext" else AskLLM(model=str(folder))
    labels = documents.high if name == "dclm-fasttext" else documents.informing
    known = documents.take(np.flatnonzero(labels >= 0))
    auc = roc_auc_score(labels[labels >= 0] == 1, _ready(scorer).score(known.texts))
    return {"documents": len(known.texts), "of them high": int((labels == 1).sum()), "AUC": float(auc)}


def _ready(plugin: Any) -> Any:
    plugin.setup("cpu")
    return plugin


def _errors(found: NDArray[np.float32], documents: Corpus) -> dict[str, float]:
    wanted = documents.education
    correlation: Any = spearmanr(found, wanted)
    return {
        "documents": len(wanted),
        "mean absolute error": float(np.abs(found - wanted).mean()),
        "of the median": float(np.abs(np.median(wanted) - wanted).mean()),
        "Spearman": float(correlation.statistic),
    }


def train_all(out: Path, documents: Corpus) -> dict[str, float]:
    """Trains every model into its folder; gives the MB of each."""
    sizes = {}
    for name, folder in fresh_folders(out, list(TRAIN)):
        started = _core_seconds()
        torch.manual_seed(SEED)
        TRAIN[name](folder, documents)
        sizes[name] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        print(f"{name}: {sizes[name]:.1f} MB, {_core_seconds() - started:.0f} core seconds", flush=True)
    return sizes


def measure_all(out: Path, corpus: Corpus, rows: Split) -> dict[str, Any]:
    """What every model gives on both kinds of unseen documents."""
    found: dict[str, Any] = {}
    for kind, chosen in (("works", rows.works), ("parts", rows.parts)):
        documents = corpus.take(chosen)
        found[kind] = {name: measure(name, out / name, documents) for name in TRAIN}
        found[kind] |= {"domains": documents.domains.tolist(), "parts": documents.parts.tolist()}
        found[kind]["repeated"] = repeated(corpus.take(rows.train).texts, documents.texts)
        print(kind, {name: found[kind][name] for name in ("fineweb-edu", "ask-llm", "dclm-fasttext")}, flush=True)
    return found


def _core_seconds() -> float:
    """Of this process and its children: other work on the machine hardly changes them."""
    return sum(os.times()[:4])


def main() -> None:
    """Trains, measures and writes ``figures.json`` beside the models, and the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of corpus.parquet and quality_tiers.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--report", type=Path, help="Markdown file to write the tables to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = Corpus.read(arguments.corpus)
    rows = split(corpus, per_part=PER_PART, per_domain=PER_DOMAIN)
    figures: dict[str, Any] = {"held out": held_out_parts(corpus), "trained on": corpus.domains[rows.train].tolist()}
    figures["MB"] = train_all(arguments.out, corpus.take(rows.train))
    figures |= measure_all(arguments.out, corpus, rows)
    figures["minutes"] = _core_seconds() / 60
    write_json(arguments.out / "figures.json", figures)
    if arguments.report:
        arguments.report.write_text(report(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
