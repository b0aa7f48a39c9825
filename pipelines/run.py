"""The whole run: its steps in order, each skipped when its artifacts are already there."""

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from quadmix_plugin.errors import UsageError
from quadmix_plugin.pipelines import compare
from quadmix_plugin.pipelines.context import STEPS, Run
from quadmix_plugin.pipelines.done import step_is_done
from quadmix_plugin.pipelines.preflight import check_before_work
from quadmix_plugin.pipelines.provenance import write_provenance
from quadmix_plugin.pipelines.report import REPORT, verdict


def steps_until(last: str | None) -> tuple[str, ...]:
    """All steps up to and with ``last``; None for all of them.

    Raises:
        UsageError: no such step.
    """
    if last is None:
        return STEPS
    if last not in STEPS:
        raise UsageError(f"--until {last}: no such step; choose one of {', '.join(STEPS)}")
    end = STEPS.index("normalise" if last == "label" else last)
    return STEPS[: end + 1]


def run_steps(run: Run, steps: Sequence[str] = STEPS) -> dict[str, Any]:
    """Runs these steps and returns what the command line prints: seconds per step, headlines, the report's path."""
    steps = [name for name in steps if name in run.steps]
    if not steps:
        raise UsageError("select.theta is given in the recipe, so nothing is searched; leave it out to search")
    check_before_work(run, steps)
    seconds, was_done = {}, {}
    for name in steps:
        started = time.monotonic()
        was_done[name] = name != "report" and step_is_done(run, name)
        step_function(name)(run)
        seconds[name] = round(time.monotonic() - started, 2)
    write_provenance(run)
    headlines = [_headline(run, name, was_done[name], seconds[name]) for name in steps]
    found = verdict(run)
    return {
        "seconds": seconds,
        "headlines": headlines,
        "verdict": None if found is None else f"{found.headline} {found.numbers}".strip(),
        "report": f"{run.directory.place}/{REPORT}" if "report" in steps else None,
    }


def run_comparison(run: Run) -> dict[str, Any]:
    """Compares, after whatever step it still needs, and writes the report; returns what the command line prints."""
    summary = run_steps(run)
    step = run.step("compare")
    path = step.read_path(f"{compare.TABLE}.md")
    rows = step.read_json(f"{compare.TABLE}.json")["rows"]
    return {**summary, "table": str(path), "markdown": path.read_text(encoding="utf-8"), "rows": rows}


def run_ablation(run: Run, scorers: Sequence[str]) -> dict[str, Any]:
    """Searches without these scorers, beside the run's own search; returns what the command line prints."""
    from quadmix_plugin.pipelines.search import ablate

    if "search" not in run.steps:
        raise UsageError("select.theta is given in the recipe, so nothing is searched; leave it out to search")
    started = time.monotonic()
    run.require("proxies")
    step = ablate(run, scorers)
    seconds = round(time.monotonic() - started, 2)
    headline = f"{step.name}  {seconds:.1f} s  {(step.summary() or {})['headline']}"
    return {"seconds": {step.name: seconds}, "headlines": [headline], "verdict": None, "report": None}


def step_function(name: str) -> Callable[[Run], None]:
    """The function of a step; its module is imported only when it runs."""
    return getattr(import_module(f"quadmix_plugin.pipelines.{name}"), name)


def _headline(run: Run, name: str, was_done: bool, seconds: float) -> str:
    facts = run.step(name).summary() or {}
    text = facts.get("headline")
    if text is None and "rows_in" in facts:
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in facts["dropped"].items())
        text = f"{facts['rows_kept']:,} of {facts['rows_in']:,} documents" + (f" ({dropped})" if dropped else "")
    state = "already done" if was_done else f"{seconds:.1f} s"
    return f"{name:<10} {state:>12}  {text or ''}".rstrip()
