"""The command line ``quadmix``: a thin layer over ``pipelines`` that prints, draws progress and sets exit codes.

Exit codes: 0 done, 1 failed, 2 usage, 74 storage, 78 recipe error, 130 and 143 interrupted.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from quadmix_plugin import cli_tools
from quadmix_plugin.cli_tools import AsJson, Verbose
from quadmix_plugin.errors import QuadmixError, StorageError
from quadmix_plugin.signals import raise_surely
from quadmix_plugin.terminal import printable, quiet_libraries, show_progress, stderr, stdout

app = typer.Typer(
    name="quadmix",
    help="Quality-diversity balanced data selection for language model pretraining (QuaDMix, arXiv 2504.16511).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Out = Annotated[
    str | None,
    typer.Option("--out", help="Run directory, or s3://bucket/prefix; default runs/NAME.", show_default=False),
]
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


def main() -> None:
    """Entry point of the console script: runs a command and turns errors into one line and an exit code."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    as_json = "--json" in sys.argv[1:]
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or error.filename is not None:
            raise
        stderr.print(f"[bold red]error:[/] standard output: {error.strerror}; the work itself is done", highlight=False)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  else the interpreter tries once more
        sys.exit(StorageError.exit_code)
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
    raise_surely(_StoppedError(number))


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
            help="Stops after: label (with normalise), proxies, search, select, export, pretrain, evaluate, compare, "
            "report.",
        ),
    ] = None,
    executor: ExecutorName = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Runs every step of a recipe, from text to a chosen data set; what is already there is not done again."""

    def work(opened: Any) -> dict[str, Any]:
        from quadmix_plugin.pipelines.run import run_steps, steps_until

        return run_steps(opened, steps_until(until))

    quiet_libraries(verbose)
    _run_steps(recipe, out, set_, executor, as_json, work)


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
        _run_steps(recipe, out, set_, executor, as_json, lambda opened: _these_steps(opened, steps))

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

    def work(opened: Any) -> dict[str, Any]:
        from quadmix_plugin.pipelines.run import run_ablation

        return run_ablation(opened, exclude) if exclude else _these_steps(opened, ("search",))

    quiet_libraries(verbose)
    _run_steps(recipe, out, set_, executor, as_json, work)


_step_command("select", ("select",), "Draws the selection under θ*, at the token budget where there is one.")
_step_command("export", ("export",), "Writes the selected documents as Megatron .bin/.idx.")


@app.command("pretrain", rich_help_panel="One step of it")
def pretrain_command(
    recipe: RecipePath,
    out: Out = None,
    set_: Overrides = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            "--launcher",
            envvar="QUADMIX_LAUNCHER",
            metavar="COMMAND",
            help="Starts the processes in place of torchrun on this machine, such as 'srun torchrun --nnodes 4 …'.",
        ),
    ] = None,
    executor: ExecutorName = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Trains the recipe's model on the selection of θ*, once per seed; goes on from the last checkpoint.

    Under Megatron-Core: on a CPU in this process, on GPUs by torchrun with one process each. The same training as a
    command of Megatron-LM's pretrain_gpt.py is written to pretrain/megatron_lm.sh.
    """
    quiet_libraries(verbose)
    from quadmix_plugin.pretraining.launch import LAUNCHER

    if launcher is not None:
        os.environ[LAUNCHER] = launcher
    _run_steps(recipe, out, set_, executor, as_json, lambda opened: _these_steps(opened, ("pretrain",)))


_step_command("evaluate", ("evaluate",), "Benchmarks of the trained models by lm-evaluation-harness (evaluate.tasks).")
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

    def work(opened: Any) -> dict[str, Any]:
        from quadmix_plugin.pipelines.run import run_comparison

        return run_comparison(opened)

    quiet_libraries(verbose)
    summary = _run_steps(recipe, out, set_, executor, as_json, work)
    if not as_json:
        from rich.markdown import Markdown

        losses, legend, *_ = summary["markdown"].split("\n\n")
        stdout.print(Markdown(printable(f"{losses}\n\n{legend}")))
        stdout.print(f"sizes, overlaps, domains: {summary['table']} (and .csv, .json)", markup=False, highlight=False)


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
    loaded = _load(recipe, set_, None)
    from quadmix_plugin.pipelines.plan import make_plan

    made = make_plan(loaded, _out(loaded.name, out), trial)
    if as_json:
        print(json.dumps(made))
        return
    stdout.print(f"[bold]{escape(loaded.name)}[/] → {escape(made['out'])}")
    for name, value in made["quantities"].items():
        stdout.print(f"  {escape(name)}: {escape(str(value))}", highlight=False)
    table = Table("step", "state", "work")
    for row in made["steps"]:
        table.add_row(row["step"], row["state"], escape(row["work"]))
    stdout.print(table)


cli_tools.add_to(app)


def _run_steps(
    recipe: Path,
    out: str | None,
    overrides: list[str] | None,
    executor: str | None,
    as_json: bool,
    work: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    loaded = _load(recipe, overrides, executor)
    from quadmix_plugin.pipelines.context import open_run  # seconds of imports, which a faulty recipe need not wait for

    folder = _out(loaded.name, out)
    with show_progress(as_json) as progress, open_run(loaded, folder, progress=progress) as opened:
        summary = work(opened)
    if as_json:
        print(json.dumps({"out": str(folder), **{key: value for key, value in summary.items() if key != "markdown"}}))
        return summary
    for line in [*summary["headlines"], summary["verdict"]]:
        if line:
            stdout.print(line, markup=False, highlight=False)
    if summary.get("report"):
        stdout.print(f"report: {summary['report']}", markup=False)
    return summary


def _these_steps(opened: Any, steps: tuple[str, ...]) -> dict[str, Any]:
    from quadmix_plugin.pipelines.run import run_steps

    return run_steps(opened, steps)


def _load(recipe: Path, overrides: list[str] | None, executor: str | None) -> Any:
    from quadmix_plugin.config import load_recipe

    return load_recipe(recipe, [*(overrides or []), *([f"executor.name={executor}"] if executor else [])])


def _out(name: str, out: str | None) -> str:
    from quadmix_plugin.credentials import refuse_credentials

    place = out or str(Path("runs") / name)
    refuse_credentials({"--out": place}, "quadmix")
    return place if "://" in place else str(Path(place).absolute())


if __name__ == "__main__":
    main()
