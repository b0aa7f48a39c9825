"""DSIR against the package of its authors, ``data-selection``: the same documents and target, one process each.

    OMP_NUM_THREADS=1 python benchmarks/dsir.py --corpus corpus.parquet --text text

Both fit p̂ and q̂, weigh every document, draw a tenth of them and write the selected: the package from and to JSON
Lines with a new cache folder, ours from and to Parquet. The target are the quickstart's validation rows. Also against
the package with the regular expressions that it had until NLTK 3.10, which are faster.
"""

import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from measuring import Cost, in_fresh_process, markdown, metered, progress, report
from numpy.typing import NDArray

from quadmix_plugin.labelled_corpus import MemoryCorpus
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.stages.selectors.dsir import DSIR, LOG_WEIGHT

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
WARM_UP = "warm-up"
OURS, PACKAGE, PACKAGE_RE = "quadmix", "data-selection", "data-selection, tokenised by re"

Weights = NDArray[np.float64]


def prepare(folder: Path, corpus: Path, text: str, documents: int | None) -> tuple[int, int]:
    """Writes documents and target for both, and twenty documents to warm up on; documents and their characters."""
    texts = pq.read_table(corpus, columns=[text])[text].to_pylist()[:documents]
    lines = (QUICKSTART / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    target = [f"{row['prompt']} {row['response']}" for row in map(json.loads, lines)]
    for name, some in {"raw": texts, WARM_UP: texts[:20], "target": target}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in some), encoding="utf-8")
        pq.write_table(pa.table({"text": some}), folder / f"{name}.parquet")
    return len(texts), sum(map(len, texts))


def quadmix(folder: Path, name: str, n_buckets: int, min_words: int) -> Callable[[], Weights]:
    """Ours, over one partition; characters stand for tokens, of which a tenth is the budget."""
    texts = pq.read_table(folder / f"{name}.parquet")["text"].to_pylist()
    tokens, none = np.fromiter(map(len, texts), dtype=np.int64), np.zeros((len(texts), 0), dtype=np.float32)
    labels = ScoreTable(pa.array(np.arange(tokens.size)), np.zeros(tokens.size, np.int64), tokens, none, ("all",), ())
    corpus = MemoryCorpus.of(labels, none, texts)
    selector = DSIR(target=str(folder / "target.jsonl"), n_buckets=n_buckets, min_words=min_words)
    law = selector.fit(corpus, int(tokens.sum()) // 10, seed=0)
    pq.write_table(corpus.table.filter(pa.array(corpus.copies(law) > 0)), folder / f"{name}-selected.parquet")

    return corpus.table[LOG_WEIGHT].to_numpy


def package(folder: Path, name: str, n_buckets: int, min_words: int, by_re: bool = False) -> Callable[[], Weights]:
    """The package, by its own steps in their order."""
    from data_selection import HashedNgramDSIR

    raw, cache = folder / f"{name}.jsonl", Path(mkdtemp(dir=folder))
    options: Any = {"num_proc": 1, "num_buckets": n_buckets, "min_example_length": min_words}
    peer: Any = HashedNgramDSIR([str(raw)], [str(folder / "target.jsonl")], cache_dir=str(cache), **options)
    if by_re:
        peer.tokenizer = re.compile(r"\w+|[^\w\s]+").findall
    with redirect_stderr(io.StringIO()):  # its progress bars
        peer.fit_importance_estimator()
        peer.compute_importance_weights()
        with raw.open(encoding="utf-8") as lines:
            documents = sum(1 for _ in lines)
        peer.resample(str(cache / "selected"), documents // 10)

    def weights() -> Weights:
        long_enough = peer.perexample_metadata_filter(np.load(cache / "perexample_metadata" / "0.npy"))
        return np.where(long_enough, np.load(cache / "log_importance_weights" / "0.npy"), np.nan)

    return weights


ENGINES: dict[str, Callable[..., Callable[[], Weights]]] = {
    OURS: quadmix,
    PACKAGE: package,
    PACKAGE_RE: partial(package, by_re=True),
}


def measure(engine: str, folder: Path) -> tuple[Cost, Weights]:
    """Cost of the whole job, imports and compilation done, and the log-weights; nothing is remembered from before."""
    ENGINES[engine](folder, WARM_UP, n_buckets=9_999, min_words=0)
    with metered() as cost:
        weights = ENGINES[engine](folder, "raw", n_buckets=10_000, min_words=100)
    return cost, weights()


def main(
    documents: Annotated[int | None, typer.Option(help="the first so many; all by default")] = None,
    corpus: Annotated[Path, typer.Option(help="a Parquet file")] = QUICKSTART / "corpus.parquet",
    text: Annotated[str, typer.Option(help="its column of texts")] = "text",
    repeats: Annotated[int, typer.Option(help="runs of every engine; the median is reported")] = 3,
    out: Annotated[Path | None, typer.Option(help="also write the report to this file")] = None,
) -> None:
    """Measures every engine and prints a Markdown table."""
    costs: dict[str, list[Cost]] = {name: [] for name in ENGINES}
    found: dict[str, Weights] = {}
    with TemporaryDirectory() as scratch:
        n, characters = prepare(Path(scratch), corpus, text, documents)
        for repeat in range(repeats):
            for name in ENGINES:  # in turn, so that a busy minute hits all
                cost, found[name] = in_fresh_process(measure, name, Path(scratch))
                costs[name].append(cost)
                progress(f"{repeat + 1}/{repeats} {name}: {cost.core_s:.2f} core-s")
    section = (
        f"{n:,} documents of {corpus.name}, {characters / 1e6:.1f} M characters. Medians of {repeats} runs, each a "
        f"fresh process, in turn. data-selection {version('data-selection')}, NLTK {version('nltk')}."
    )
    report("DSIR: counts, weights and selection", [section, table(costs, found, n)], out)


def table(costs: dict[str, list[Cost]], found: dict[str, Weights], documents: int) -> str:
    """One line per engine; a ratio above 1 means that ours takes fewer core-seconds."""
    ours = Cost.median(costs[OURS])
    lines = []
    for name, runs in costs.items():
        cost, seconds = Cost.median(runs), [run.core_s for run in runs]
        both = ~np.isnan(found[name]) & ~np.isnan(found[OURS])
        lines.append(
            [
                name,
                f"{cost.core_s:.2f}",
                f"{min(seconds):.2f}–{max(seconds):.2f}",
                f"{cost.wall_s:.2f}",
                f"{documents / cost.core_s:,.0f}",
                f"{cost.core_s / ours.core_s:.1f}",
                f"{cost.peak_in_all / 2**20:,.0f}",
                f"{np.abs(found[name] - found[OURS])[both].max():.1e}",
                f"{(np.isnan(found[name]) != np.isnan(found[OURS])).sum():,}",
            ]
        )
    header = ["engine", "core-s", "min–max", "wall s", "documents per core-s", "quadmix is × faster", "peak MiB"]
    return markdown([*header, "greatest difference of a log-weight", "documents that only one may take"], lines)


if __name__ == "__main__":
    typer.run(main)
