"""The command line ``quadmix``: a thin layer over ``pipelines`` that prints, draws progress and sets exit codes.

Exit codes: 0 done, 1 failed, 2 usage, 74 storage, 78 recipe error, 130 and 143 interrupted.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from quadmix_plugin.errors import QuadmixError
from quadmix_plugin.terminal import quiet_libraries, show_progress, stderr

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="quadmix",
    help="Quality-diversity balanced data selection for language model pretraining (QuaDMix, arXiv 2504.16511).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_SHOWN = 8

_stdout = Console(soft_wrap=True)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory; default runs/NAME.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Sets a recipe key, such as proxy.number=64; paths are relative to the recipe.",
    ),
]
ExecutorName = Annotated[
    str | None, typer.Option("--executor", help="inline, dask, ray_data or xenna; default as in the recipe.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Prints one JSON object on stdout and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Logs of the libraries as well.")]


def main() -> None:
    """Entry point of the console script: runs a command and turns errors into one line and an exit code."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    as_json = "--json" in sys.argv[1:]
    try:
        app()
    except QuadmixError as error:
        _fail(str(error), error.exit_code, as_json)
    except _StoppedError as stop:
        _fail(f"{stop}; run the same command again to go on", stop.exit_code, as_json)


class _StoppedError(BaseException):
    """A signal as an exception, so that clean-up runs; not KeyboardInterrupt, which typer ends without a word."""

    def __init__(self, number: int) -> None:
        super().__init__({signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signal.Signals(number)])
        self.exit_code = 128 + number


def _stop(number: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):  # a second one ends the clean-up of the first, which may hang
        signal.signal(each, lambda number, frame: os._exit(128 + number))
    raise _StoppedError(number)


def _fail(message: str, code: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    else:
        stderr.print(f"[bold red]error:[/] {escape(message)}", highlight=False)
    sys.stdout.flush()
    sys.exit(code)


def _print_version(asked: bool) -> None:
    if asked:
        from quadmix_plugin import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="The version."),
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel="Whole run")
def run(
    recipe: RecipePath,
    out: Out = None,
    set_: Overrides = None,
    until: Annotated[
        str | None,
        typer.Option(
            "--until",
            metavar="STEP",
            help="Stops after: label (with normalise), proxies, search, select, export, pretrain, compare, report.",
        ),
    ] = None,
    executor: ExecutorName = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Runs every step of a recipe, from text to a chosen data set; what is already there is not done again."""
    quiet_libraries(verbose)
    from quadmix_plugin.pipelines.run import run_steps, steps_until

    _run_steps(recipe, out, set_, executor, as_json, lambda opened: run_steps(opened, steps_until(until)))


def _step_command(name: str, steps: tuple[str, ...], text: str) -> None:
    def command(
        recipe: RecipePath,
        out: Out = None,
        set_: Overrides = None,
        executor: ExecutorName = None,
        as_json: AsJson = False,
        verbose: Verbose = False,
    ) -> None:
        quiet_libraries(verbose)
        from quadmix_plugin.pipelines.run import run_steps

        _run_steps(recipe, out, set_, executor, as_json, lambda opened: run_steps(opened, steps))

    command.__doc__ = text
    app.command(name, rich_help_panel="One step of it")(command)


_step_command("label", ("label", "normalise"), "Labels every document: domain, quality scores, tokens; and fits σ.")
_step_command("proxies", ("proxies",), "Trains proxy models on selections under drawn parameters.")


@app.command("search", rich_help_panel="One step of it")
def search_command(
    recipe: RecipePath,
    out: Out = None,
    set_: Overrides = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude-scorer",
            metavar="NAME",
            help="Searches again with this scorer's weights at 0, beside θ*: search/without-NAME/. Can be repeated.",
        ),
    ] = None,
    executor: ExecutorName = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Fits a regressor from parameters to losses, finds θ*, and says what gain to expect of it."""
    quiet_libraries(verbose)
    from quadmix_plugin.pipelines.run import run_ablation, run_steps

    def work(opened: Any) -> dict[str, Any]:
        return run_ablation(opened, exclude) if exclude else run_steps(opened, ("search",))

    _run_steps(recipe, out, set_, executor, as_json, work)


_step_command("select", ("select",), "Draws the selection under θ*, at the token budget where there is one.")
_step_command("export", ("export",), "Writes the selected documents as Megatron .bin/.idx.")
_step_command("pretrain", ("pretrain",), "Trains the recipe's model on the selection of θ*, once per seed.")
_step_command("report", ("report",), "Writes report.html over what is there.")


@app.command(rich_help_panel="Whole run")
def compare(
    recipe: RecipePath,
    out: Out = None,
    set_: Overrides = None,
    executor: ExecutorName = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Every selector of the recipe at the same token budget, the same models trained on each, and one table.

    Steps that it needs and that are not done are done first; a selector that is added later is all that runs then.
    """
    quiet_libraries(verbose)
    from quadmix_plugin.pipelines.run import run_comparison

    summary = _run_steps(recipe, out, set_, executor, as_json, run_comparison)
    if not as_json:
        from rich.markdown import Markdown

        losses, legend, *_ = summary["markdown"].split("\n\n")
        _stdout.print(Markdown(f"{losses}\n\n{legend}"))
        _stdout.print(f"sizes, overlaps, domains: {summary['table']} (and .csv, .json)", markup=False, highlight=False)


@app.command(rich_help_panel="Around a run")
def plan(
    recipe: RecipePath,
    out: Out = None,
    set_: Overrides = None,
    trial: Annotated[
        bool, typer.Option("--trial/--no-trial", help="Trains for some seconds here to measure the cost of a proxy.")
    ] = True,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Says what would run: documents, tokens, parameters, compute, disk, and what is already done."""
    quiet_libraries(verbose)
    from quadmix_plugin.pipelines.plan import make_plan

    loaded = _load(recipe, set_, None)
    made = make_plan(loaded, _out(loaded.name, out), trial)
    if as_json:
        print(json.dumps(made))
        return
    _stdout.print(f"[bold]{escape(loaded.name)}[/] → {escape(made['out'])}")
    for name, value in made["quantities"].items():
        _stdout.print(f"  {escape(name)}: {escape(str(value))}", highlight=False)
    table = Table("step", "state", "work")
    for row in made["steps"]:
        table.add_row(row["step"], row["state"], escape(row["work"]))
    _stdout.print(table)


@app.command(rich_help_panel="Around a run")
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
    _print_fit(metrics)
    _stdout.print(f"written to {out}", markup=False, highlight=False)


@app.command(rich_help_panel="Around a run")
def verify(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory.")], as_json: AsJson = False
) -> None:
    """Re-reads every artifact of a run against its manifest; exit code 1 with the list of what is wrong."""
    from quadmix_plugin.errors import UsageError
    from quadmix_plugin.store import RunDirectory

    if not (run_dir / "manifest").is_dir():
        raise UsageError(f"{run_dir}: not a run directory (no manifest/ in it); give the --out of a run")
    checked, faults = RunDirectory(run_dir.absolute()).verify()
    if as_json:
        print(json.dumps({"checked": checked, "faults": faults}))
    else:
        for fault in faults:
            _stdout.print(fault, markup=False, highlight=False)
        _stdout.print(f"{checked} artifacts read, {len(faults)} wrong")
    raise typer.Exit(1 if faults else 0)


@app.command(rich_help_panel="Around a run")
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
    _stdout.print(table)


@app.command(rich_help_panel="Around a run")
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
    _stdout.print(f"wrote {escape(str(path))}")
    for note in notes:
        _stdout.print(f"  {note}", markup=False)
    _stdout.print(f"next: quadmix plan {escape(str(path))}, then quadmix run {escape(str(path))}")


def _run_steps(
    recipe: Path,
    out: Path | None,
    overrides: list[str] | None,
    executor: str | None,
    as_json: bool,
    work: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    from quadmix_plugin.pipelines.context import open_run

    loaded = _load(recipe, overrides, executor)
    folder = _out(loaded.name, out)
    with show_progress(as_json) as progress, open_run(loaded, folder, progress=progress) as opened:
        summary = work(opened)
    if as_json:
        print(json.dumps({"out": str(folder), **{key: value for key, value in summary.items() if key != "markdown"}}))
        return summary
    for line in [*summary["headlines"], summary["verdict"]]:
        if line:
            _stdout.print(line, markup=False, highlight=False)
    if summary.get("report"):
        _stdout.print(f"report: {summary['report']}", markup=False)
    return summary


def _print_fit(metrics: dict[str, Any]) -> None:
    tests = metrics["measured_on"] == "test rows"
    rows = f"{metrics['test_rows']} test rows" if tests else "cross-validation"
    leak = ", by which early stopping chose" if metrics.get("early_stopped_on_test") else ""
    table = Table(Column("target", overflow="fold"), "Spearman", "95 %", "Pearson", "MAE", "R²")
    table.title = f"measured on {rows}{leak}"
    for name, each in metrics["targets"].items():
        chosen = metrics.get("chosen", {}).get(name)
        low, high = each["interval"]["spearman"]
        numbers = [f"{each['spearman']:.4f}", f"{low:.4f}–{high:.4f}", f"{each['pearson']:.4f}"]
        numbers += [f"{each['mae']:.4f}", f"{each['r2']:.3f}"]
        table.add_row(escape(name + (f" ({chosen})" if chosen else "")), *numbers)
    _stdout.print(table)
    counts = [f"{metrics[key]} {key}" for key in ("rows", "failed", "unmatched") if metrics[key]]
    _stdout.print(f"{', '.join(counts)}; regressor {metrics['regressor']}", markup=False, highlight=False)
    optimum = sorted(metrics["optimum"].items(), key=lambda item: -item[1])
    more = f" … and {len(optimum) - _SHOWN} more" if len(optimum) > _SHOWN else ""
    said = ", ".join(f"{name} {value:.4g}" for name, value in optimum[:_SHOWN])
    _stdout.print(f"optimum, largest first: {said}{more}", markup=False, highlight=False)
    for rival in ("mean_row", "best_row"):
        _stdout.print(metrics["gain"][rival]["sentence"], markup=False, highlight=False)


def _load(recipe: Path, overrides: list[str] | None, executor: str | None) -> Any:
    from quadmix_plugin.config import load_recipe

    return load_recipe(recipe, [*(overrides or []), *([f"executor.name={executor}"] if executor else [])])


def _out(name: str, out: Path | None) -> Path:
    return (out or Path("runs") / name).absolute()


if __name__ == "__main__":
    main()
