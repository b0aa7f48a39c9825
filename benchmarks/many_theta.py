"""Many θ over one score table, as the proxies of a search need them: ``ScoreIndex`` against a loop over a peer.

    python benchmarks/many_theta.py --rows 10_000_000 --thetas 150

The peer runs a few θ (its cost per θ does not change) and our exact selections must equal its own on every document.
The index is made once and its cost reported apart. Each run is a fresh process; engines take turns.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from measuring import Cost, in_fresh_process, markdown, metered, progress, report
from peers import PEERS
from synthetic import DOMAINS, SCORERS, Documents, generate, load, save

from quadmix_plugin import Parameters, sample_parameters
from quadmix_plugin.hashing import uniform
from quadmix_plugin.score_index import ScoreIndex

SEED = 0


class Engine(NamedTuple):
    """``method`` of ``select_many``, or ``peer``; ``bins`` of the histogram, None for the default."""

    name: str
    method: Any
    bins: int | None = None

    def lay_out(self, table: Documents) -> ScoreIndex:
        """The table laid out for this engine."""
        return ScoreIndex.of(*table, seed=SEED, **({"bins": self.bins} if self.bins else {}))


OURS = [
    Engine("histogram, 1024 bins", "histogram", 1024),
    Engine("histogram, default bins", "histogram"),
    Engine("exact", "exact"),
]


class Run(NamedTuple):
    """The cost of the first calls on a small table, of the index and of all θ, and what came out."""

    first: Cost
    preparation: Cost
    selections: Cost
    documents: int
    size: int


def measure(engine: Engine, folder: Path, thetas: list[Parameters], threads: int) -> Run:
    """All θ by ``select_many``, one selection after the other counted and dropped."""
    table = load(folder)
    with metered() as first:
        index = engine.lay_out(Documents(*(column[:100_000] for column in table)))
        list(index.select_many(thetas[:2], method=engine.method, threads=threads))
    with metered() as preparation:
        index = engine.lay_out(table)
    documents = size = 0
    with metered() as selections:
        for selection in index.select_many(thetas, method=engine.method, threads=threads):
            documents += selection.rows.size
            size += selection.rows.nbytes + selection.copies.nbytes
    return Run(first, preparation, selections, documents, size)


def measure_peer(peer: str, folder: Path, thetas: list[Parameters]) -> Run:
    """A loop over θ; the hash of the ids is made once."""
    table = load(folder)
    with metered() as first:
        small = Documents(*(column[:100_000] for column in table))
        PEERS[peer](small, uniform(small.doc_ids, SEED), thetas[0])
    with metered() as preparation:
        u = uniform(table.doc_ids, SEED)
    documents = size = 0
    with metered() as selections:
        for theta in thetas:
            copies = PEERS[peer](table, u, theta)
            documents += int(np.count_nonzero(copies))
            size += copies.nbytes
    return Run(first, preparation, selections, documents, size)


def differences(folder: Path, peer: str, thetas: list[Parameters], peer_thetas: int) -> list[list[str]]:
    """Per histogram, the selected documents with other copies than exact; checks exact against the peer."""
    table = load(folder)
    n, exact = len(table.tokens), OURS[-1].lay_out(table)
    u = uniform(table.doc_ids, SEED)
    for i, selection in enumerate(exact.select_many(thetas[:peer_thetas], method="exact")):
        if wrong := int((selection.by_row(n) != PEERS[peer](table, u, thetas[i])).sum()):
            raise SystemExit(f"exact: {wrong} documents differ from {peer} at θ {i}")
    lines = []
    for engine in OURS[:-1]:
        shares = []
        wanted = exact.select_many(thetas, method="exact")
        for want, got in zip(wanted, engine.lay_out(table).select_many(thetas, method="histogram"), strict=True):
            shares.append((want.by_row(n) != got.by_row(n)).sum() / want.rows.size)
        lines.append([engine.name, f"{np.mean(shares):.3%}", f"{np.max(shares):.3%}"])
    return lines


def main(
    rows: Annotated[int, typer.Option(help="documents of the table")] = 10_000_000,
    thetas: Annotated[int, typer.Option(help="how many θ of Algorithm 1")] = 150,
    repeats: Annotated[int, typer.Option(help="runs of every engine; the median is reported")] = 3,
    peer: Annotated[str, typer.Option(help="what to compare with: " + ", ".join(PEERS))] = "numpy",
    peer_thetas: Annotated[int, typer.Option(help="how many θ the peer runs")] = 3,
    threads: Annotated[int, typer.Option(help="threads of select_many")] = 1,
    seed: Annotated[int, typer.Option(help="seed of the θ")] = 0,
    out: Annotated[Path | None, typer.Option(help="also write the report to this file")] = None,
) -> None:
    """Measures every engine and prints a Markdown table."""
    drawn = sample_parameters(thetas, len(SCORERS), len(DOMAINS), seed)
    runs: dict[str, list[Run]] = {name: [] for name in (peer, *(engine.name for engine in OURS))}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save(folder, generate(rows))
        for repeat in range(repeats):
            runs[peer].append(in_fresh_process(measure_peer, peer, folder, drawn[:peer_thetas]))
            for engine in OURS:
                runs[engine.name].append(in_fresh_process(measure, engine, folder, drawn, threads))
            progress(f"run {repeat + 1} of {repeats}")
        different = in_fresh_process(differences, folder, peer, drawn, peer_thetas)
    counts = {name: peer_thetas if name == peer else thetas for name in runs}
    sections = [
        f"{rows:,} documents, {len(DOMAINS)} domains, {len(SCORERS)} scores, {thetas} θ of Algorithm 1 ({peer_thetas} "
        f"for {peer}), {threads} thread(s). Medians of {repeats} runs, each a fresh process. The exact selections "
        f"equal {peer}'s on every document of its θ.",
        cost_table(runs, counts, rows),
        markdown(["against exact", "selected documents with other copies, mean over θ", "worst θ"], different),
    ]
    report("Many θ: rank and sample", sections, out)


def cost_table(runs: dict[str, list[Run]], counts: dict[str, int], rows: int) -> str:
    """One line per engine, the peer first; the last ratio is of docs·θ per core-second."""
    lines, rates = [], []
    for name, measured in runs.items():
        first = Cost.median([run.first for run in measured])
        preparation = Cost.median([run.preparation for run in measured])
        cost = Cost.median([run.selections for run in measured])
        rates.append(rows * counts[name] / cost.core_s / 1e6)
        lines.append(
            [
                name,
                f"{cost.core_s / counts[name] * 1e3:.1f}",
                f"{cost.wall_s / counts[name] * 1e3:.1f}",
                f"{rates[-1]:,.1f}",
                f"{rates[-1] / rates[0]:.1f}",
                f"{preparation.core_s:.2f}",
                f"{preparation.peak / 2**20:,.0f}",
                f"{cost.peak / 2**20:,.0f}",
                f"{first.wall_s:.2f}",
                f"{measured[0].documents / counts[name]:,.0f}",
                f"{measured[0].size / counts[name] / 2**20:.1f}",
            ]
        )
    peer = next(iter(runs))
    header = ["engine", "core-ms per θ", "wall ms per θ", "M docs·θ per core-s", f"× {peer}", "preparation core-s"]
    header += ["its peak MiB", "peak MiB of the selections", "first call s (imports, JIT or its cache)"]
    return markdown([*header, "documents per θ", "output MiB per θ"], lines)


if __name__ == "__main__":
    typer.run(main)
