"""How a job grows with its documents, shards and workers: one subcommand per measurement, one line of JSON each.

python benchmarks/scaling.py soak --folder /data/soak --documents 2_000_000
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

os.environ.setdefault("LOGURU_LEVEL", "WARNING")  # Curator's, of every pipeline

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Option(help="an empty folder for what is made")]


def _print(row: str, made: dict[str, Any]) -> None:
    print(json.dumps({"row": row, **made}), flush=True)


JOBS = ["label", "select", "export"]
CELLS = [
    *(f"{shards}x1000" for shards in (10, 100, 1000, 10_000)),
    *(f"1000x{documents}" for documents in (10_000, 100_000, 1_000_000)),
    "10000x100000",
]


@app.command()
def simulate(
    cell: Annotated[list[str], typer.Option(help="SHARDSxDOCUMENTS of each; can be repeated")] = CELLS,
    sigma_documents: Annotated[int, typer.Option(help="σ is fitted too on jobs of at most so many")] = 100_000_000,
) -> None:
    """What driver, scheduler and network hold and carry as documents and shards grow; simulated_job says of what."""
    from measuring import in_fresh_process
    from simulated_job import PASSES, run_cell

    for each in cell:
        shards, rows = (int(part.replace("_", "")) for part in each.split("x"))
        passes = [name for name in PASSES if name != "sigma" or shards * rows <= sigma_documents]
        _print("simulate", in_fresh_process(run_cell, shards, rows, passes))


@app.command()
def units(
    shards: Annotated[int, typer.Option(help="tasks of the first stage")] = 2000,
    stages: Annotated[int, typer.Option(help="stages, each of which does nothing")] = 4,
) -> None:
    """Calls of stages that do nothing, on two workers: the ceiling of the flow itself."""
    from measuring import in_fresh_process
    from simulated_job import units_per_second

    _print("units", in_fresh_process(units_per_second, shards, stages))


@app.command()
def soak(
    folder: Folder,
    documents: Annotated[int, typer.Option(help="at least so many; whole copies of the quickstart corpus")] = 2_000_000,
    limit_gib: Annotated[float, typer.Option(help="of all processes together; they are ended above it")] = 3.0,
    fasttext: Annotated[bool, typer.Option(help="score with the quickstart's fastText model as well")] = True,
    estimate: Annotated[bool, typer.Option(help="estimate tokens (tokenizer.estimate) in place of counting")] = True,
    memory_limit: Annotated[str, typer.Option(help="of each of the two workers")] = "1200MiB",
) -> None:
    """Label, normalise, select and export within a limit of memory."""
    from soak import soak as run

    _print("soak", run(folder, documents, limit_gib, fasttext, estimate, memory_limit))


@app.command()
def workers(
    job: Annotated[list[str], typer.Option(help="label, select or export; can be repeated")] = JOBS,
    repeats: Annotated[int, typer.Option(help="of each; the medians are reported")] = 3,
) -> None:
    """Two workers against one where work is bound by cores."""
    from two_workers import compare

    for made in compare(job, repeats):
        _print("workers", made)


@app.command()
def cost(
    gpus: Annotated[list[int], typer.Option(help="so many; can be repeated")] = [1, 8, 64],  # noqa: B006
    assume: Annotated[list[str], typer.Option(help="NAME=VALUE in place of an assumption; can be repeated")] = [],  # noqa: B006
) -> None:
    """The cost model: what the assumptions, all printed first, come to. Nothing is measured."""
    from cost_model import Assumptions

    given = {name: float(value) for name, _, value in (each.partition("=") for each in assume)}
    if unknown := sorted(set(given) - set(Assumptions().to_dict())):
        raise typer.BadParameter(f"{unknown[0]}: no such assumption; there are {', '.join(Assumptions().to_dict())}")
    assumptions = Assumptions(**given)
    _print("assumptions", assumptions.to_dict())
    for number in gpus:
        _print("cost", assumptions.of(number))


if __name__ == "__main__":
    app()
