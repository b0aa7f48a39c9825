"""Commands of ``quadmix`` that stand beside a run and take no recipe: fit, verify, convert, plugins, init."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from quadmix_plugin.terminal import print_fit, quiet_libraries, show_progress, stdout

AsJson = Annotated[bool, typer.Option("--json", help="Prints one JSON object on stdout and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Logs of the libraries as well.")]


def add_to(app: typer.Typer) -> None:
    """Adds the commands."""
    for command in (fit, verify, convert, plugins, init):
        app.command(rich_help_panel="Around a run")(command)


def fit(
    features: Annotated[Path, typer.Option("--features", help="Table of inputs, CSV or Parquet: a row per proxy.")],
    losses: Annotated[Path, typer.Option("--losses", help="Table of their losses, joined on a shared column.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for metrics.json, optimum.json, predictions, figures.")],
    test_features: Annotated[Path | None, typer.Option(help="Inputs of rows to measure on.")] = None,
    test_losses: Annotated[Path | None, typer.Option(help="Their losses; without test rows: cross-validation.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="COL", help="Loss column or a part of its name; repeatable; all if not given."),
    ] = None,
    regressor: Annotated[str, typer.Option(help="auto, gp, lightgbm, svr-linear, … as in quadmix plugins.")] = "auto",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Sets an option of the regressor.")
    ] = None,
    method: Annotated[str, typer.Option(help="trust_region, or paper: the mean of the best draws.")] = "trust_region",
    draws: Annotated[int, typer.Option(min=1, help="Points that are drawn and predicted.")] = 100_000,
    top: Annotated[int, typer.Option(min=1, help="The best of them, which are averaged.")] = 10,
    prior: Annotated[
        Path | None,
        typer.Option(help="JSON: Dirichlet weights of mixtures, by column; otherwise the mean of the rows."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of folds, draws and search.")] = 0,
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation.")] = 5,
    early_stop_on_test: Annotated[
        bool, typer.Option("--early-stop-on-test", help="Stops by the test rows, as RegMix published; flatters them.")
    ] = False,
    drop_unmatched: Annotated[
        bool, typer.Option("--drop-unmatched", help="Leaves out rows of features without losses.")
    ] = False,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draws DIR/figures.")] = True,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Search without training: fits tables of inputs and losses, says how far to trust it, finds the best input."""
    quiet_libraries(verbose)
    from quadmix_plugin.pipelines import fit as fitting

    settings = fitting.FitSettings(
        features, losses, out, test_features, test_losses, tuple(target or ()), regressor,
        fitting.parse_options(set_ or ()), method, draws, top, prior, seed, folds, early_stop_on_test,  # type: ignore[arg-type]
        drop_unmatched, figures,
    )  # fmt: skip
    with show_progress(as_json) as progress:
        metrics = fitting.fit(settings, *([progress] if progress else []))
    if as_json:
        print(json.dumps(metrics))
        return
    print_fit(metrics)
    stdout.print(f"written to {out}", markup=False, highlight=False)


def verify(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="The --out of a run.")],
    as_json: AsJson = False,
) -> None:
    """Re-reads every artifact of a run against its manifest; exit code 1 with the list of what is wrong."""
    from quadmix_plugin.errors import UsageError
    from quadmix_plugin.store import RunDirectory

    directory = RunDirectory.at(run_dir)
    if not directory.step_names():
        raise UsageError(f"{run_dir}: not a run directory (no manifest/ in it); give the --out of a run")
    checked, faults = directory.verify()
    if as_json:
        print(json.dumps({"checked": checked, "faults": faults}))
    else:
        for fault in faults:
            stdout.print(fault, markup=False, highlight=False)
        stdout.print(f"{checked} artifacts read, {len(faults)} wrong")
    raise typer.Exit(1 if faults else 0)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A checkpoint, or a model's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of the tokenizer, to go with the model.")] = None,
    eod: Annotated[str, typer.Option(help="The token that ends a document.")] = "<|endoftext|>",
    heads: Annotated[int | None, typer.Option(min=1, help="Of attention; own checkpoints say it.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Own checkpoints say it.")] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Own checkpoints say it; otherwise 10000.")] = None,
    norm_eps: Annotated[float | None, typer.Option(help="Own checkpoints say it; otherwise 1e-5.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """A checkpoint of Megatron-Core as a model of Hugging Face's Llama format, or the reverse.

    Checkpoints of Megatron-LM (--ckpt-format torch_dist, a folder iter_…) need --heads and --context.
    """
    quiet_libraries(verbose)
    from quadmix_plugin.convert import convert as converted

    made = converted(
        source, out, tokenizer, eod, heads=heads, context=context, rope_theta=rope_theta, norm_eps=norm_eps
    )
    if as_json:
        print(json.dumps({"out": str(out), "made": made}))
    else:
        stdout.print(f"{out}: {made}", markup=False, highlight=False)


def plugins(as_json: AsJson = False) -> None:
    """Lists what is installed in each entry-point group, and whether it loads."""
    from quadmix_plugin import registry

    rows = registry.describe()
    if as_json:
        print(json.dumps({"plugins": rows}))
        return
    table = Table("group", "name", "distribution", "version", "loads")
    for row in rows:
        table.add_row(*(escape(row[key]) for key in ("group", "name", "distribution", "version", "status")))
    stdout.print(table)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write recipe.yaml into.")],
    corpus: Annotated[str | None, typer.Option(help="Your documents; their columns are looked up.")] = None,
    validation: Annotated[str | None, typer.Option(help="Your questions and answers.")] = None,
    models: Annotated[
        str | None, typer.Option(help="Folder with tokenizer/, domain/ and the scorers' folders.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Writes a commented starter recipe for your own data."""
    from quadmix_plugin.pipelines.init import write_starter

    path, notes = write_starter(folder, corpus, validation, models)
    if as_json:
        print(json.dumps({"recipe": str(path), "notes": notes}))
        return
    stdout.print(f"wrote {escape(str(path))}")
    for note in notes:
        stdout.print(f"  {note}", markup=False)
    stdout.print(f"next: quadmix plan {escape(str(path))}, then quadmix run {escape(str(path))}")
