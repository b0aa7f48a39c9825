"""One θ over a corpus that is not in memory: zstd Parquet in, Parquet of (doc_id, copies) out, through the stages.

    python benchmarks/streaming.py --rows 50_000_000

Two passes: ``FitRank`` turns batches into mergeable states, ``SelectDocuments`` looks every document up
in their sum. One process runs the stages one batch after the other, as each worker of an executor does. The files
were just written, so they are read from the system's cache.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from measuring import Cost, in_fresh_process, markdown, metered, progress, report
from nemo_curator.tasks import DocumentBatch
from synthetic import DOMAINS, SCORERS, generate, write_parquet

from quadmix_plugin import Parameters, sample_parameters
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.schema import COPIES, DOC_ID, DOMAIN, TOKENS, normalised_column
from quadmix_plugin.score_index import ScoreIndex
from quadmix_plugin.stages import FitRank, SelectDocuments

SEED = 0
BATCH = 1 << 18
PER_STATE = 8
READ = [DOMAIN, TOKENS, *(normalised_column(scorer) for scorer in SCORERS)]
NONE = np.zeros(len(DOMAINS), dtype=np.int64)
RANGE = np.zeros((len(DOMAINS), len(SCORERS)), dtype=np.float32)
SUMMARY = DomainSummary(DOMAINS, SCORERS, NONE, NONE, RANGE, RANGE + 1)  # an ECDF is in (0, 1]


def select_streaming(folder: Path, out: Path, theta: Parameters) -> None:
    """Writes the documents with copies of every file of ``folder`` to a file of the same name in ``out``."""
    files = sorted(folder.glob("*.parquet"))
    fit = FitRank(theta=theta, summary=SUMMARY)
    states = (fit.process_batch(group)[0].to_pyarrow() for group in batched(batches(files, READ), PER_STATE))
    select = SelectDocuments(theta=theta, rank_map=RankMap.of_states(states), seed=SEED)
    schema = pa.schema({DOC_ID: pa.int64(), COPIES: pa.int32()})
    for file in files:
        with pq.ParquetWriter(out / file.name, schema, compression="zstd") as writer:
            for batch in batches([file], [DOC_ID, *READ]):
                writer.write_table(select.process(batch).to_pyarrow().select(schema.names))


def batched(batches: Iterator[DocumentBatch], size: int) -> Iterator[list[DocumentBatch]]:
    """Batches in groups of ``size``."""
    while group := list(islice(batches, size)):
        yield group


def batches(files: Iterable[Path], columns: list[str]) -> Iterator[DocumentBatch]:
    """The rows of the files, ``BATCH`` at a time."""
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(BATCH, columns=columns):
                yield DocumentBatch(dataset_name="synthetic", data=pa.table(batch))


def measure(folder: Path, out: Path, theta: Parameters) -> Cost:
    """The cost of the selection in a process that has compiled everything."""
    with TemporaryDirectory() as scratch:
        small, small_out = Path(scratch) / "in", Path(scratch) / "out"
        small_out.mkdir()
        write_parquet(small, 100_000)
        select_streaming(small, small_out, theta)
    with metered() as cost:
        select_streaming(folder, out, theta)
    return cost


def measure_reading(folder: Path) -> Cost:
    """The cost of reading the same columns twice and doing nothing: what no selection can undercut."""
    files = sorted(folder.glob("*.parquet"))
    next(batches(files, READ))
    with metered() as cost:
        for columns in (READ, [DOC_ID, *READ]):
            for _ in batches(files, columns):
                pass
    return cost


def compare(rows: int, out: Path, theta: Parameters) -> tuple[int, int]:
    """Documents that exact ranks select, and those of either selection whose copies differ from the other's."""
    table, found = generate(rows), pq.read_table(out)
    wanted = ScoreIndex.of(*table, seed=SEED).select(theta, method="exact")
    doc_ids = np.concatenate([table.doc_ids[wanted.rows], found[DOC_ID].to_numpy()])
    copies = np.concatenate([wanted.copies, -found[COPIES].to_numpy()])
    _, document = np.unique(doc_ids, return_inverse=True)
    return wanted.rows.size, int(np.count_nonzero(np.bincount(document, copies)))


def main(
    rows: Annotated[int, typer.Option(help="documents of the data set")] = 50_000_000,
    repeats: Annotated[int, typer.Option(help="runs; the median is reported")] = 3,
    check: Annotated[bool, typer.Option(help="compare with exact ranks, in memory: some 150 bytes a document")] = True,
    seed: Annotated[int, typer.Option(help="seed of θ")] = 0,
    out: Annotated[Path | None, typer.Option(help="also write the report to this file")] = None,
) -> None:
    """Measures the two passes and prints a Markdown table."""
    theta = sample_parameters(1, len(SCORERS), len(DOMAINS), seed, domains=DOMAINS, scorers=SCORERS)[0]
    with TemporaryDirectory() as scratch:
        folder, selection = Path(scratch) / "scores", Path(scratch) / "selection"
        selection.mkdir()
        in_fresh_process(write_parquet, folder, rows)
        costs: dict[str, list[Cost]] = {"two passes": [], "reading alone": []}
        for repeat in range(repeats):
            costs["two passes"].append(in_fresh_process(measure, folder, selection, theta))
            costs["reading alone"].append(in_fresh_process(measure_reading, folder))
            progress(f"run {repeat + 1} of {repeats}: {costs['two passes'][-1].core_s:.2f} core-s")
        size_in, size_out = (sum(p.stat().st_size for p in place.glob("*.parquet")) for place in (folder, selection))
        checked = in_fresh_process(compare, rows, selection, theta) if check else None
    lines = []
    for name, cost in ((name, Cost.median(each)) for name, each in costs.items()):
        rate = rows / cost.core_s / 1e6
        lines.append([name, f"{cost.core_s:.2f}", f"{cost.wall_s:.2f}", f"{rate:.1f}"])
        lines[-1] += [f"{cost.peak / 2**20:,.0f}", f"{cost.peak_in_all / 2**20:,.0f}"]
    sections = [
        f"{rows:,} documents in {size_in / 2**30:.2f} GiB of zstd Parquet; {size_out / 2**20:.1f} MiB written. Medians "
        f"of {repeats} runs, each a fresh process.",
        markdown(["", "core-s", "wall s", "M docs per core-s", "peak MiB above the imports", "in all"], lines),
    ]
    if checked:
        sections.append(
            f"Exact ranks select {checked[0]:,} documents; {checked[1] / checked[0]:.3%} have other copies."
        )
    report("One θ, streaming", sections, out)


if __name__ == "__main__":
    typer.run(main)
