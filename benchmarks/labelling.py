"""Labelling against the loops that people write: the same models, the same real documents, one thread, one run.

    python benchmarks/labelling.py --corpus corpus.parquet --models FOLDER

``FOLDER`` is what scripts/train_on_corpus.py writes: tiny models of the published formats that read 512 tokens. A
BERT of the published shape (12 layers of 768, untrained: weights do not change its speed) is made on the way.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from labelling_peers import of_ask_llm, of_domain, of_fineweb_edu
from measuring import Cost, in_fresh_process, markdown, metered, progress, report
from nemo_curator.pipeline import Pipeline
from nemo_curator.tasks import DocumentBatch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from quadmix_plugin import inference, models, token_counts
from quadmix_plugin.executors import DaskExecutor
from quadmix_plugin.stages import QualityScore
from quadmix_plugin.stages.domain_classifiers.nvidia_domain import NvidiaDomain
from quadmix_plugin.stages.scorers.ask_llm import PROMPT, AskLLM
from quadmix_plugin.stages.scorers.dclm_fasttext import DCLMFastText
from quadmix_plugin.stages.scorers.fineweb_edu import FineWebEdu

PLUGINS: dict[str, tuple[type[inference.DocumentModel], Callable]] = {
    "fineweb-edu": (FineWebEdu, of_fineweb_edu),
    "domain": (NvidiaDomain, of_domain),
    "ask-llm": (AskLLM, of_ask_llm),
}
SHORT = 100
PUBLISHED = "bert-base shape"


def read_texts(corpus: Path) -> list[str]:
    """The texts in a fixed random order."""
    column = pq.read_table(corpus, columns=["text"])["text"]
    return column.take(pa.array(np.random.default_rng(0).permutation(len(column)))).to_pylist()


def make_published_shape(folder: Path, like: Path, texts: Sequence[str]) -> Path:
    """An untrained BERT regression of 109M parameters, with a tokenizer of as many words as the published one."""
    shutil.copytree(like, folder)
    words = 30522
    AutoTokenizer.from_pretrained(like).train_new_from_iterator(texts, words).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=words, num_labels=1, problem_type="regression")
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def measure(name: str, folder: Path, texts: Sequence[str], repeats: int) -> dict[str, tuple[Cost, float]]:
    """Cost of every way to score ``texts``, and its greatest difference from the plain loop."""
    torch.set_num_threads(1)
    plugin_class, peers_of = PLUGINS[name]
    plugin = plugin_class(model=str(folder), max_length=512)
    plugin.setup("cpu")
    kept = getattr(plugin, "characters", None)
    ways: dict[str, Callable[[Sequence[str]], Any]] = peers_of(folder)
    ways["quadmix"] = lambda some: plugin.run([text[:kept] for text in some])
    costs: dict[str, list[Cost]] = {way: [] for way in ways}
    found = {}
    for score in ways.values():
        score(texts[:40])
    for _ in range(repeats):
        for way, score in ways.items():  # in turn, so that a busy minute hits all
            with metered() as cost:
                found[way] = score(texts)
            costs[way].append(cost)
    reference = found["loop, padded to the longest of 32"]
    return {way: (Cost.median(costs[way]), float(np.abs(found[way] - reference).max())) for way in ways}


def speed_table(name: str, texts: Sequence[str], found: dict[str, tuple[Cost, float]]) -> str:
    """Documents per core-second and ratios."""
    ours = found["quadmix"][0]
    rows = []
    for way, (cost, difference) in found.items():
        rate, ratio = len(texts) / cost.core_s, cost.core_s / ours.core_s
        rows.append(
            [way, f"{cost.core_s:.2f}", f"{cost.wall_s:.2f}", f"{rate:.1f}", f"{ratio:.2f}", f"{difference:.1e}"]
        )
    header = [name, "core-s", "wall s", "documents per core-s", "quadmix is × faster", "greatest difference of a score"]
    return markdown(header, rows)


def padding(folder: Path, texts: Sequence[str]) -> str:
    """Padded / real tokens − 1 over the whole corpus, in shards of 2,000."""
    tokenizer = models.load_transformers_tokenizer(folder)
    totals = np.zeros(4)
    for start in range(0, len(texts), 2000):
        lengths = [len(ids) for ids in inference.token_ids(tokenizer, texts[start : start + 2000], 512)]
        fine, coarse = (
            sum(t * len(rows) for t, rows in inference.length_classes(lengths, coarse=coarse).items())
            for coarse in (False, True)
        )
        longest = sum(max(some) * len(some) for some in (lengths[i : i + 32] for i in range(0, len(lengths), 32)))
        totals += [sum(lengths), fine, coarse, longest]
    real, fine, coarse, longest = totals
    return markdown(
        [f"padding of {len(texts):,} documents", "padded / real tokens − 1"],
        [
            ["quadmix on a CPU (steps of 8)", f"{fine / real - 1:.2%}"],
            ["quadmix on a GPU (coarse steps)", f"{coarse / real - 1:.2%}"],
            ["longest of 32", f"{longest / real - 1:.2%}"],
            ["512", f"{len(texts) * 512 / real - 1:.2%}"],
        ],
    )


def count_table(tokenizer_folder: Path, texts: Sequence[str], repeats: int) -> str:
    """Wall time of a loop, of the batch on all cores and of the estimate, and what the estimate misses."""
    tokenizer = models.load_tokenizer(str(tokenizer_folder))
    ways = {
        "loop over documents": lambda: np.array(
            [len(tokenizer.encode(t, add_special_tokens=False).ids) for t in texts]
        ),
        "CountTokens": lambda: token_counts.count_tokens(tokenizer, texts),
        "CountTokens, estimate": lambda: token_counts.estimate_tokens(tokenizer, texts),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    found = {}
    for _ in range(repeats):
        for way, count in ways.items():
            started = perf_counter()
            found[way] = count()
            times[way].append(perf_counter() - started)
    exact = found["loop over documents"]
    slowest = median(times["loop over documents"])
    rows = []
    for way, counted in found.items():
        error = np.abs(counted - exact)
        p95 = np.quantile(error / np.maximum(exact, 1), 0.95)
        figures = [f"{median(times[way]):.2f}", f"{slowest / median(times[way]):.1f}"]
        figures += [f"{error.sum() / exact.sum():.2%}", f"{p95:.1%}", f"{counted.sum() / exact.sum() - 1:+.2%}"]
        rows.append([way, *figures])
    header = [f"tokens of {len(texts):,} documents", "wall s", "× faster than the loop", "mean error by tokens"]
    return markdown([*header, "95th percentile of a document's error", "error of the sum"], rows)


def measure_fasttext(folder: Path, texts: Sequence[str], repeats: int) -> dict[str, tuple[Cost, float]]:
    """Wall time of the DCLM scorer, whose model is in a child process, and of fastText's own call in this one."""
    import fasttext

    plugin = DCLMFastText(model=str(folder))
    plugin.setup("cpu")
    model = fasttext.load_model(str(folder / "model.bin"))

    def in_process(some: Sequence[str]) -> Any:
        labels, shares = model.predict([" ".join(text.strip().splitlines()) for text in some], k=1)
        pairs = zip(labels, shares, strict=True)
        high = [float(p[0]) if label[0] == "__label__hq" else 1 - float(p[0]) for label, p in pairs]
        return np.clip(high, 0, 1).astype(np.float32)

    costs: dict[str, list[Cost]] = {"fasttext.predict": [], "quadmix": []}
    for _ in range(repeats):
        for way, score in (("fasttext.predict", in_process), ("quadmix", plugin.score)):
            with metered() as cost:
                scores = score(texts)
            costs[way].append(cost)
            if way == "fasttext.predict":
                reference = scores
    difference = float(np.abs(scores - reference).max())
    return {way: (Cost.median(each), difference if way == "quadmix" else 0.0) for way, each in costs.items()}


def fasttext_table(texts: Sequence[str], found: dict[str, tuple[Cost, float]]) -> str:
    """Documents per second of wall time: the child's core-seconds are not this process' own."""
    rows = []
    for way, (cost, difference) in found.items():
        ratio = found["fasttext.predict"][0].wall_s / cost.wall_s
        rows.append(
            [way, f"{cost.wall_s:.2f}", f"{len(texts) / cost.wall_s:,.0f}", f"{ratio:.2f}", f"{difference:.1e}"]
        )
    header = [f"dclm-fasttext: {len(texts):,} real documents", "wall s", "documents/s", "of fasttext.predict"]
    return markdown([*header, "greatest difference of a score"], rows)


def scaling(folder: Path, texts: Sequence[str], workers: int) -> float:
    """Wall seconds of one scoring stage over 16 shards on Dask, its workers started and warm."""
    stage = QualityScore("fineweb-edu", {"model": str(folder), "max_length": 512})
    size = -(-len(texts) // 16)
    tasks: list[Any] = [
        DocumentBatch(dataset_name="corpus", data=pa.table({"text": texts[i : i + size]}), _metadata={"shard": f"{i}"})
        for i in range(0, len(texts), size)
    ]
    with DaskExecutor(n_workers=workers, worker_env={"TOKENIZERS_PARALLELISM": "false"}) as executor:
        Pipeline("warm", stages=[stage]).run(executor, initial_tasks=tasks[: 2 * workers])
        started = perf_counter()
        Pipeline("score", stages=[stage]).run(executor, initial_tasks=tasks)
        return perf_counter() - started


def main(
    corpus: Annotated[Path, typer.Option(help="Parquet file with a column text")],
    folder: Annotated[Path, typer.Option("--models", help="what scripts/train_on_corpus.py wrote")],
    documents: Annotated[int, typer.Option(help="documents for the tiny models")] = 1000,
    published: Annotated[int, typer.Option(help="documents for the BERT of the published shape")] = 96,
    repeats: Annotated[int, typer.Option(help="runs; medians are reported")] = 3,
    only: Annotated[str | None, typer.Option(help="only the speeds whose title holds this")] = None,
    out: Annotated[Path | None, typer.Option(help="also write the report to this file")] = None,
) -> None:
    """Measures and prints Markdown tables."""
    texts = read_texts(corpus)
    tokenizer = models.load_transformers_tokenizer(folder / "fineweb-edu")
    lengths = np.array([len(ids) for ids in inference.token_ids(tokenizer, texts, 512)])
    short = [texts[i] for i in np.flatnonzero(lengths <= SHORT)]
    openings = [text.strip().partition("\n\n")[0] for text in texts]
    openings = [text for text in openings if len(text) < 3 * SHORT]
    few = [text for text in texts if len(PROMPT) + len(text) < 512]  # prompts that none of the loops would cut
    sections = [] if only else [padding(folder / "fineweb-edu", texts)]
    with TemporaryDirectory() as scratch:
        base = make_published_shape(Path(scratch) / "bert-base", folder / "fineweb-edu", texts)
        cases = [
            ("fineweb-edu", folder / "fineweb-edu", texts[:documents], "real documents"),
            ("fineweb-edu", folder / "fineweb-edu", short[:documents], f"documents of at most {SHORT} tokens"),
            (
                "fineweb-edu",
                folder / "fineweb-edu",
                openings[: 2 * documents],
                "first paragraphs of under 300 characters",
            ),
            ("domain", folder / "domain", texts[:documents], "real documents"),
            ("domain", folder / "domain", short[:documents], f"documents of at most {SHORT} tokens"),
            ("ask-llm", folder / "ask-llm", few[:documents], "documents whose prompt is not cut"),
            ("fineweb-edu", base, texts[:published], f"real documents, {PUBLISHED}"),
            ("fineweb-edu", base, short[: 2 * published], f"documents of at most {SHORT} tokens, {PUBLISHED}"),
        ]
        for name, place, some, what in cases:
            title = f"{name}: {len(some):,} {what}"
            if only and only not in title:
                continue
            found = in_fresh_process(measure, name, place, some, repeats if place != base else 1)
            sections.append(speed_table(title, some, found))
            progress(sections[-1])
    if not only or only == "dclm-fasttext":
        some = texts[:10_000]
        sections.append(
            fasttext_table(some, in_fresh_process(measure_fasttext, folder / "dclm-fasttext", some, repeats))
        )
        progress(sections[-1])
    if only:
        report("Labelling", sections, out)
        return
    sections.append(in_fresh_process(count_table, folder / "fineweb-edu", texts[:8000], repeats))
    progress(sections[-1])
    seconds = {n: [scaling(folder / "fineweb-edu", texts[: 4 * documents], n) for _ in range(repeats)] for n in (1, 2)}
    one, two = (median(seconds[n]) for n in (1, 2))
    sections.append(f"Two Dask workers score {one / two:.2f} times as fast as one ({one:.1f} s and {two:.1f} s).")
    report("Labelling", sections, out)


if __name__ == "__main__":
    typer.run(main)
