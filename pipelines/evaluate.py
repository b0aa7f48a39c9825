"""Step 7: benchmarks of the models that were trained on θ*'s selection, by lm-evaluation-harness."""

import time
from importlib.metadata import version
from typing import Any

from quadmix_plugin.benchmark_scores import BySeed, headline, summarise, to_csv, to_markdown
from quadmix_plugin.pipelines.benchmarks import asked, evaluate_models, read_scores
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.select import QUADMIX

SCORES = "evaluate/scores"
"""The results, with ``.json``, ``.md`` and ``.csv``."""

_FOLDER = "pretrain"  # whose models they are


def evaluate(run: Run) -> None:
    """Writes ``evaluate/scores.json``, ``.md`` and ``.csv``; without tasks it is done at once.

    Raises:
        InputError: the harness, a task or a file is not there, or holds what cannot be used; before any model.
        QuadmixError: no models, a task's data cannot be had, or it cannot be evaluated.
    """
    step = run.step("evaluate")
    if is_done(run):
        return
    started = time.monotonic()
    run.require("pretrain")
    if run.recipe.evaluate.is_empty:
        step.finish(asked=asked(run), headline="no tasks; set evaluate.tasks or evaluate.local")
        return
    results = evaluate_models(run, step, {QUADMIX: _FOLDER})[QUADMIX]
    summary = {**summarise(results), "limit": run.recipe.evaluate.limit, "harness": f"lm_eval {version('lm_eval')}"}
    step.write_json(f"{SCORES}.json", summary)
    step.write_text(f"{SCORES}.md", to_markdown(summary))
    step.write_text(f"{SCORES}.csv", to_csv(summary))
    step.finish(
        asked=asked(run),
        seconds=round(time.monotonic() - started, 2),
        headline=headline(summary),
    )


def is_done(run: Run) -> bool:
    """Whether the last evaluation was of what the recipe asks; what it asks is in no step's key."""
    facts = run.step("evaluate").summary()
    return facts is not None and facts["asked"] == asked(run)


def scores_of_theta(run: Run) -> BySeed:
    """The scores of θ*'s models: seed → task → what is known; empty without tasks.

    Raises:
        QuadmixError: the step has not run.
    """
    if run.recipe.evaluate.is_empty:
        return {}
    return read_scores(run, run.require("evaluate"), QUADMIX, _FOLDER)


def read_summary(run: Run) -> dict[str, Any] | None:
    """What ``scores.json`` holds; None while the step has not run, or has no tasks."""
    if run.recipe.evaluate.is_empty or not is_done(run):
        return None
    return run.step("evaluate").read_json(f"{SCORES}.json")
