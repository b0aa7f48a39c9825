"""Token files: writing against Megatron's document by document, and tokenising on two workers against a plain loop.

    python benchmarks/export.py

Writing takes what the export has: lists of numbers as tokenizers give them, or arrays out of the token pool. Megatron's
way is that of its ``tools/preprocess_data.py``, ``IndexedDatasetBuilder.add_document`` for each; both write the same
bytes. Tokenising is the whole stage ``ExportTokens`` behind Curator's reader, files written, against a loop that only
tokenises.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from measuring import Cost, in_fresh_process, markdown, metered, progress, report
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.text.io.reader.parquet import ParquetReaderStage
from nemo_curator.tasks import DocumentBatch, FileGroupTask
from numpy.typing import NDArray

from quadmix_plugin.executors import DaskExecutor
from quadmix_plugin.megatron import write_documents
from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.stages import ExportTokens, PrepareDocuments, export_tokens
from quadmix_plugin.store import RunDirectory, Step

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
VOCABULARIES = (50_432, 128_256)
MEDIAN_TOKENS, SPREAD = 500, 1.0
PER_SHARD = 2000  # the default of recipes
OURS, MEGATRON = "quadmix", "Megatron, per document"

Documents = list[list[int]] | list[NDArray[Any]]


def documents(tokens: int, vocabulary: int, as_lists: bool) -> Documents:
    """Documents of log-normal length with so many tokens in all."""
    rng = np.random.default_rng(0)
    lengths = np.ceil(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, tokens // MEDIAN_TOKENS)).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
    kind = np.uint16 if vocabulary < 65_500 else np.int32
    ids = rng.integers(0, vocabulary, int(lengths.sum())).astype(kind)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    return [part.tolist() for part in parts] if as_lists else parts


def write_as_megatron(given: Documents, folder: Path, vocabulary: int) -> None:
    """As ``tools/preprocess_data.py`` writes."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder: Any = IndexedDatasetBuilder(str(folder / "a.bin"), dtype=DType.optimal_dtype(vocabulary))
    for document in given:
        builder.add_document(document, [len(document)])
    builder.finalize(str(folder / "a.idx"))


def write_ours(given: Documents, folder: Path, vocabulary: int) -> None:
    """As the export writes, what was written checked."""
    write_documents(given, folder / "a.bin", folder / "a.idx", vocabulary)


WRITERS: dict[str, Callable[[Documents, Path, int], None]] = {OURS: write_ours, MEGATRON: write_as_megatron}


def measure_writing(writer: str, tokens: int, vocabulary: int, as_lists: bool) -> tuple[Cost, int, str]:
    """Cost of writing, tokens written, and the hash of both files."""
    given = documents(tokens, vocabulary, as_lists)
    with TemporaryDirectory() as folder:
        WRITERS[writer](given[:10], Path(folder), vocabulary)
        with metered() as cost:
            WRITERS[writer](given, Path(folder), vocabulary)
        both = hashlib.sha256(b"".join((Path(folder) / name).read_bytes() for name in ("a.bin", "a.idx")))
    return cost, sum(map(len, given)), both.hexdigest()


def writing(tokens: int, repeats: int) -> str:
    """A table of both writers over the types of ids and of documents."""
    lines = []
    for vocabulary in VOCABULARIES:
        for as_lists in (True, False):
            costs: dict[str, list[Cost]] = {name: [] for name in WRITERS}
            hashes, written = set(), 0
            for _ in range(repeats):
                for name in WRITERS:  # in turn, so that a busy minute hits both
                    cost, written, both = in_fresh_process(measure_writing, name, tokens, vocabulary, as_lists)
                    costs[name].append(cost)
                    hashes.add(both)
            if len(hashes) > 1:
                raise RuntimeError("the two write different bytes")
            ours, theirs = (Cost.median(costs[name]).core_s for name in (OURS, MEGATRON))
            paired = [b.core_s / a.core_s for a, b in zip(costs[OURS], costs[MEGATRON], strict=True)]
            lines.append(
                [
                    f"{'lists' if as_lists else 'arrays'}, vocabulary {vocabulary:,}",
                    f"{written / ours / 1e6:.1f}",
                    f"{written / theirs / 1e6:.1f}",
                    f"{theirs / ours:.1f}",
                    f"{min(paired):.1f}–{max(paired):.1f}",
                ]
            )
            progress(" ".join(lines[-1]))
    header = ["given", "quadmix: M tokens per core-s", "Megatron, per document", "× as fast", "min–max"]
    return markdown(header, lines)


def read_texts(corpus: Path, text: str, number: int | None) -> list[str]:
    """The first texts of a Parquet file."""
    return pq.read_table(corpus, columns=[text])[text].to_pylist()[:number]


def measure_share(texts: list[str], tokenizer: str) -> tuple[float, float, int]:
    """Core-seconds of an export of two copies of each text in one thread, those of writing, and tokens written."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    spent, write = [0.0], export_tokens.write_shard

    def metered_write(*arguments: Any) -> dict[str, int]:
        before = time.process_time()
        facts = write(*arguments)
        spent[0] += time.process_time() - before
        return facts

    export_tokens.write_shard = metered_write
    table = pa.table({"doc_id": np.arange(len(texts)), "text": texts, "copies": pa.array([2] * len(texts), pa.int32())})
    tokens = 0
    with TemporaryDirectory() as folder:
        stage = ExportTokens(step_in(folder), tokenizer, copies_field="copies")
        stage.process(DocumentBatch(dataset_name="x", data=table.slice(0, 9), _metadata={"shard": "warm-up"}))
        spent[0], began = 0.0, time.process_time()
        for i, start in enumerate(range(0, len(texts), PER_SHARD)):
            shard = DocumentBatch(
                dataset_name="x", data=table.slice(start, PER_SHARD), _metadata={"shard": f"part-{i}"}
            )
            tokens += stage.process(shard).to_pyarrow()["tokens"][0].as_py()
        return time.process_time() - began, spent[0], tokens


def step_in(folder: str | Path) -> Step:
    """A step of a new run directory."""
    return RunDirectory.open(folder).step("export", "key")


@contextmanager
def timed() -> Iterator[list[float]]:
    """Fills the list it gives with wall seconds and the core-seconds of this process and its children."""
    spent: list[float] = []
    began, cores = time.perf_counter(), core_seconds()
    yield spent
    spent += [time.perf_counter() - began, core_seconds() - cores]


def core_seconds() -> float:
    """Of this process and its children, so far."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def measure_loop(texts: list[str], tokenizer: str) -> list[float]:
    """Wall and core-seconds of tokenising one text after the other."""
    loaded = load_tokenizer(tokenizer)
    for text in texts[:50]:
        loaded.encode(text, add_special_tokens=False)
    with timed() as spent:
        for text in texts:
            _ = loaded.encode(text, add_special_tokens=False).ids
    return spent


def measure_batches(texts: list[str], tokenizer: str, threads: int) -> list[float]:
    """Wall and core-seconds of tokenising in batches in one process."""
    os.environ |= {"TOKENIZERS_PARALLELISM": str(threads > 1).lower(), "RAYON_NUM_THREADS": str(threads)}
    loaded = load_tokenizer(tokenizer)
    loaded.encode_batch_fast(texts[:50], add_special_tokens=False)
    with timed() as spent:
        for start in range(0, len(texts), PER_SHARD):
            for encoding in loaded.encode_batch_fast(texts[start : start + PER_SHARD], add_special_tokens=False):
                _ = encoding.ids
    return spent


def measure_stage(texts: list[str], tokenizer: str, workers: int, threads: int) -> list[float]:
    """Wall and core-seconds of the pipeline that tokenises and writes, on Dask workers that have run it once."""
    environment = {"TOKENIZERS_PARALLELISM": str(threads > 1).lower(), "RAYON_NUM_THREADS": str(threads)}
    with TemporaryDirectory() as folder, DaskExecutor(n_workers=workers, worker_env=environment) as executor:

        def run(name: str, some: list[str]) -> list[float]:
            path = Path(folder) / f"{name}.parquet"
            pq.write_table(pa.table({"text": some}), path)
            task = FileGroupTask(dataset_name=name, data=[str(path)], _metadata={"source_files": [str(path)]})
            stages = [
                ParquetReaderStage(fields=["text"]),
                PrepareDocuments(id_field=None, documents_per_shard=PER_SHARD),
                ExportTokens(step_in(folder), tokenizer, folder=name),
            ]
            with timed() as spent:
                Pipeline("export", stages=stages).run(executor, initial_tasks=[task])
            return spent

        run("warm-up", texts[: 4 * PER_SHARD])
        return run("measured", texts)


def tokenising(texts: list[str], tokenizer: str, repeats: int) -> str:
    """A table of ways to tokenise on two cores."""
    ways: dict[str, Callable[[], list[float]]] = {
        "loop over texts, one process": lambda: in_fresh_process(measure_loop, texts, tokenizer),
        "batches, one process, 1 thread": lambda: in_fresh_process(measure_batches, texts, tokenizer, 1),
        "batches, one process, 2 threads": lambda: in_fresh_process(measure_batches, texts, tokenizer, 2),
        "ExportTokens, 2 workers (the default)": lambda: in_fresh_process(measure_stage, texts, tokenizer, 2, 1),
        "ExportTokens, 2 workers with 2 threads": lambda: in_fresh_process(measure_stage, texts, tokenizer, 2, 2),
        "ExportTokens, 1 worker with 2 threads": lambda: in_fresh_process(measure_stage, texts, tokenizer, 1, 2),
    }
    seconds: dict[str, list[list[float]]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            seconds[name].append(way())
            progress(f"{repeat + 1}/{repeats} {name}: {seconds[name][-1][0]:.2f} s, load {os.getloadavg()[0]:.1f}")
    loop, lines = np.array(next(iter(seconds.values()))), []
    for name, each in seconds.items():
        (wall, core), paired = np.median(each, axis=0), loop[:, 0] / np.array(each)[:, 0]
        ratio = np.median(loop[:, 0]) / wall
        lines.append([name, f"{wall:.2f}", f"{ratio:.2f}", f"{paired.min():.2f}–{paired.max():.2f}", f"{core:.2f}"])
    return markdown(["", "wall s", "× as fast as the loop", "min–max", "core-s of all processes"], lines)


def main(
    tokens: Annotated[int, typer.Option(help="tokens that are written")] = 50_000_000,
    corpus: Annotated[Path, typer.Option(help="a Parquet file")] = QUICKSTART / "corpus.parquet",
    text: Annotated[str, typer.Option(help="its column of texts")] = "text",
    number: Annotated[int | None, typer.Option(help="the first so many texts; all by default")] = None,
    tokenizer: Annotated[Path, typer.Option(help="a folder")] = QUICKSTART / "models" / "tokenizer",
    tokenise: Annotated[bool, typer.Option(help="measure that too: by the clock, so on a machine that is idle")] = True,
    repeats: Annotated[int, typer.Option(help="runs; the median is reported")] = 5,
    out: Annotated[Path | None, typer.Option(help="also write the report to this file")] = None,
) -> None:
    """Measures writing and tokenising and prints Markdown tables."""
    written = writing(tokens, repeats)
    texts = read_texts(corpus, text, number)
    shares = [in_fresh_process(measure_share, texts, str(tokenizer)) for _ in range(repeats)]
    total, spent, exported = (float(np.median(each)) for each in zip(*shares, strict=True))
    progress(f"writing: {spent / total:.1%} of an export's core-seconds")
    sections = [
        f"{tokens:,} tokens in documents of log-normal length. Medians of {repeats} runs, each a fresh process, in "
        f"turn. The bytes are the same.",
        written,
        f"An export of {len(texts):,} documents × 2 copies, {exported:,.0f} tokens, from text in one thread: "
        f"{total:.2f} core-s, of which {spent:.2f} or {spent / total:.1%} are writing: order, ids, index, table of "
        f"documents, hashes, to the disk.",
    ]
    if tokenise:
        sections += [f"Tokenising these {len(texts):,} documents:", tokenising(texts, str(tokenizer), repeats)]
    report("Token files", sections, out)


if __name__ == "__main__":
    typer.run(main)
