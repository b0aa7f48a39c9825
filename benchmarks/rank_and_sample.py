"""One θ: copies of every document of a score table, by this package and by numpy, pandas, polars and DuckDB.

    python benchmarks/rank_and_sample.py --rows 10_000_000 --repeats 5

Every engine gets the same arrays in memory and must return the same copies as a full sort, exact engines on every
document. Each run is a fresh process; engines take turns, so that none has the quiet minutes for itself.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from measuring import Cost, in_fresh_process, markdown, metered, progress, report
from numpy.typing import NDArray
from peers import PEERS
from synthetic import DOMAINS, SCORERS, Documents, generate, load, save

from quadmix_plugin import Parameters, count_copies, sample_parameters
from quadmix_plugin.hashing import uniform

SEED = 0
REFERENCE = "lexsort"
METHODS: dict[str, Any] = {
    "count_copies exact": "exact",
    "count_copies histogram": "histogram",
    "ScoreIndex exact": "exact",
    "ScoreIndex histogram": "histogram",
}
ENGINES = [*PEERS, *METHODS]


def prepare(engine: str, table: Documents) -> Callable[[Parameters], Any]:
    """The call that is timed. What does not depend on θ is done before: the peers' hash and our index."""
    if engine in PEERS:
        u = uniform(table.doc_ids, SEED)
        return lambda theta: PEERS[engine](table, u, theta)
    if engine.startswith("count_copies"):
        return lambda theta: count_copies(*table, theta, seed=SEED, method=METHODS[engine])
    from quadmix_plugin.score_index import ScoreIndex

    index = ScoreIndex.of(*table, seed=SEED)
    return lambda theta: index.select(theta, method=METHODS[engine])


def measure(engine: str, folder: Path, theta: Parameters) -> tuple[Cost, Cost, Cost]:
    """The cost of the first call on a small table (imports, compilation), of the preparation, and of one θ."""
    table = load(folder)
    with metered() as first:
        prepare(engine, Documents(*(column[:20_000] for column in table)))(theta)
    with metered() as preparation:
        select = prepare(engine, table)
    with metered() as selection:
        result = select(theta)
    np.save(folder / "copies.npy", dense(result, len(table.tokens)))
    return first, preparation, selection


def dense(result: Any, rows: int) -> NDArray[np.int32]:
    """The copies of every document, from an array or a ``Selection``."""
    if isinstance(result, np.ndarray):
        return result
    copies = np.zeros(rows, dtype=np.int32)
    copies[result.rows] = result.copies
    return copies


def histogram_errors(engine: str, folder: Path, theta: Parameters) -> list[str]:
    """A row of the table of errors: the histogram against the full sort, tokens at ω = .05 in every domain."""
    table = load(folder)
    u, select = uniform(table.doc_ids, SEED), prepare(engine, table)
    shares = []
    for parameters in (theta, dataclasses.replace(theta, omega=np.full(theta.n_domains, 0.05))):
        exact, copies = PEERS[REFERENCE](table, u, parameters), dense(select(parameters), len(u))
        shares.append(f"{(copies != exact).sum() / (exact > 0).sum():.3%}")
    wanted, got = (np.bincount(table.domain_ids, c * table.tokens) for c in (exact, copies))
    error = np.abs(got - wanted) / np.maximum(wanted, 1)  # of the last, ω = .05
    return [engine, f"{error.mean():.3%}", f"{error.max():.3%}", *reversed(shares)]


def main(
    rows: Annotated[int, typer.Option(help="documents of the table")] = 10_000_000,
    repeats: Annotated[int, typer.Option(help="runs of every engine; the median is reported")] = 5,
    engines: Annotated[str, typer.Option(help="comma-separated: " + ", ".join(ENGINES))] = ",".join(ENGINES),
    seed: Annotated[int, typer.Option(help="seed of θ")] = 0,
    out: Annotated[Path | None, typer.Option(help="also write the report to this file")] = None,
) -> None:
    """Measures every engine and prints a Markdown table."""
    theta = sample_parameters(1, len(SCORERS), len(DOMAINS), seed)[0]
    chosen = [REFERENCE, *(name for name in engines.split(",") if name != REFERENCE)]
    costs: dict[str, list[tuple[Cost, Cost, Cost]]] = {name: [] for name in chosen}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save(folder, generate(rows))
        reference = np.zeros(0, dtype=np.int32)
        differing: dict[str, int] = {}
        for repeat in range(repeats):
            for name in chosen:
                costs[name].append(in_fresh_process(measure, name, folder, theta))
                progress(f"{repeat + 1}/{repeats} {name}: {costs[name][-1][2].core_s:.3f} core-s")
                copies = np.load(folder / "copies.npy")
                reference = reference if reference.size else copies
                differing[name] = int((copies != reference).sum())
                if differing[name] and METHODS.get(name) != "histogram":
                    raise SystemExit(f"{name}: {differing[name]} documents differ from {REFERENCE}; it must be exact")
        histograms = [name for name in chosen if METHODS.get(name) == "histogram"]
        errors = [in_fresh_process(histogram_errors, name, folder, theta) for name in histograms]
    selected = int((reference > 0).sum())
    sections = [
        f"{rows:,} documents, {len(DOMAINS)} domains, {len(SCORERS)} scores; {selected:,} documents selected. Medians "
        f"of {repeats} runs, each a fresh process. Peers are given the hash of the ids, `count_copies` computes it; "
        f"`ScoreIndex` is given its index. Every exact engine equals `{REFERENCE}` on every document.",
        cost_table(costs, differing, rows),
    ]
    if errors:
        header = ["against the full sort", "tokens of a domain at ω = .05: mean error", "maximum"]
        header += ["selected documents with other copies at ω = .05", "under θ"]
        sections.append(markdown(header, errors))
    report("One θ: rank and sample", sections, out)


def cost_table(costs: dict[str, list[tuple[Cost, Cost, Cost]]], differing: dict[str, int], rows: int) -> str:
    """One line per engine; a ratio above 1 means less time than that peer."""
    medians = {name: [Cost.median(column) for column in zip(*runs, strict=True)] for name, runs in costs.items()}
    ratios = [name for name in PEERS if name in medians and name != REFERENCE]
    lines = []
    for name, (first, preparation, cost) in medians.items():
        seconds = [run[2].core_s for run in costs[name]]
        lines.append(
            [
                name,
                f"{cost.core_s:.3f}",
                f"{min(seconds):.3f}–{max(seconds):.3f}",
                f"{cost.wall_s:.3f}",
                f"{rows / cost.core_s / 1e6:.1f}",
                *(f"{medians[peer][2].core_s / cost.core_s:.1f}" for peer in ratios),
                f"{cost.peak / 2**20:,.0f}",
                f"{preparation.core_s:.2f}",
                f"{first.wall_s:.2f}",
                f"{differing[name]:,}",
            ]
        )
    compared = [f"× {peer}" for peer in ratios]
    times = ["engine", "core-s", "min–max", "wall s", "M docs per core-s", *compared, "peak MiB above the table"]
    return markdown(
        [*times, "preparation core-s", "first call s (imports, JIT or its cache)", "documents that differ"], lines
    )


if __name__ == "__main__":
    typer.run(main)
