"""Scores of benchmarks over seeds: what a task is told by, its errors, the paper's average, and the tables of it all.

Pure functions over what ``harness.evaluate_model`` returns. Two errors stand beside every mean and are kept apart:

- ``stderr``, of the questions: the root mean square over seeds of the harness' standard error. All models answer the
  same questions, so more seeds do not lower it.
- ``sd``, of the training: the standard deviation of the score over seeds; None with one.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quadmix_plugin.harness import Result, measure_of
from quadmix_plugin.paper_tasks import PAPER_TASKS, WEIGHTS, paper_average

BySeed = Mapping[int, Mapping[str, Result]]

_SHOWN = 5


def summarise(results: BySeed) -> dict[str, Any]:
    """All that is known of the models of one selection.

    ``tasks``: by name, ``order``: as they are shown; ``average``: the paper's, None unless one of its tasks is among
    them; ``seeds``: every result.
    """
    seeds = list(results)
    names = list(results[seeds[0]])
    tasks = {name: _task([results[seed][name] for seed in seeds]) for name in names}
    return {
        "order": names,
        "tasks": tasks,
        "average": _average(results),
        "seeds": {str(seed): dict(found) for seed, found in results.items()},
    }


def columns(results: BySeed) -> dict[str, list[float]]:
    """``<task> (<metric>)`` → the score of each seed."""
    found: dict[str, list[float]] = {}
    for by_task in results.values():
        for name, result in by_task.items():
            metric = measure_of(result)
            found.setdefault(f"{name} ({metric})", []).append(result["metrics"][metric]["value"])
    return found


def lower_is_better(results: BySeed) -> set[str]:
    """Those of ``columns`` of which a lower score is better."""
    first = next(iter(results.values()), {})
    measures = {name: measure_of(result) for name, result in first.items()}
    return {
        f"{name} ({metric})"
        for name, metric in measures.items()
        if not first[name]["metrics"][metric]["higher_is_better"]
    }


def headline(summary: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    tasks = dict(in_order(summary))
    said = [f"{name} {each['metric']} {in_words(each)}" for name, each in list(tasks.items())[:_SHOWN]]
    more = f" and {len(tasks) - _SHOWN} more" if len(tasks) > _SHOWN else ""
    average = summary["average"]
    if average and average["value"] is not None:
        more += f"; the paper's average {in_words(average)}"
    dropped = {name: sum(each["dropped"].values()) for name, each in tasks.items() if each["dropped"]}
    lost = "".join(f"; {n:,} rows of {name} dropped" for name, n in dropped.items())
    return f"{len(summary['seeds'])} models: {', '.join(said)}{more}{lost}"


def in_order(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The tasks as they are shown."""
    return [(name, summary["tasks"][name]) for name in summary["order"]]


def in_words(score: Mapping[str, Any]) -> str:
    """Value ± standard error."""
    return f"{score['value']:.4f}" + (f" ± {score['stderr']:.4f}" if score["stderr"] is not None else "")


def average_in_words(average: Mapping[str, Any]) -> str:
    """The paper's average, or why there is none."""
    groups = ", ".join(f"{name} {in_words(each)}" for name, each in average["groups"].items() if each is not None)
    if average["value"] is None:
        return f"No average of the paper's nine: {', '.join(average['missing'])} missing." + (
            f" Groups: {groups}." if groups else ""
        )
    weights = " + ".join(f"{weight} × {name}" for name, weight in WEIGHTS.items())
    return f"The paper's average, ({weights}) / {sum(WEIGHTS.values())}: {in_words(average)}. Groups: {groups}."


def to_markdown(summary: Mapping[str, Any]) -> str:
    """The table of tasks, what its columns mean, and the paper's average."""
    header = ["task", "shots", "metric", "score ± standard error", "sd over seeds", "seeds", "questions"]
    rows = [
        [name, _shots(each["shots"]), each["metric"], in_words(each), _number(each["sd"]), str(each["n_seeds"]),
         f"{each['questions']:,}"]
        for name, each in in_order(summary)
    ]  # fmt: skip
    lines = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in
                      [header, ["---"] * len(header), *rows])  # fmt: skip
    parts = [lines, LEGEND]
    if summary["average"]:
        parts.append(average_in_words(summary["average"]))
    parts += [
        f"{name}: rows dropped: {', '.join(f'{n:,} with {reason}' for reason, n in each['dropped'].items())}."
        for name, each in in_order(summary)
        if each["dropped"]
    ]
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "Scores are means over seeds; higher is better, of bits and perplexity lower. The standard error is that of the "
    "questions, the same for all seeds: the root mean square over seeds. Shots: examples before each question."
)


def to_csv(summary: Mapping[str, Any]) -> str:
    """A row per task and metric, all metrics of the harness; the one that the task is told by is marked."""
    text = io.StringIO()
    seeds = list(summary["seeds"])
    writer = csv.writer(text, lineterminator="\n")
    names = [f"seed {seed}" for seed in seeds]
    writer.writerow(["task", "metric", "told by", "shots", "questions", "score", "stderr", "sd over seeds", *names])
    for name, task in in_order(summary):
        for metric, each in task["metrics"].items():
            values = [summary["seeds"][seed][name]["metrics"][metric]["value"] for seed in seeds]
            facts = [name, metric, metric == task["metric"], task["shots"], task["questions"]]
            writer.writerow([*facts, each["value"], each["stderr"], each["sd"], *values])
    return text.getvalue()


def _task(found: Sequence[Result]) -> dict[str, Any]:
    """One task over the seeds; shots, questions and dropped rows are the same for all of them."""
    shared = [name for name in found[0]["metrics"] if all(name in each["metrics"] for each in found)]
    metrics = {}
    for name in shared:
        parts = [each["metrics"][name] for each in found]
        metrics[name] = {
            **_over_seeds([part["value"] for part in parts], [part["stderr"] for part in parts]),
            "higher_is_better": parts[0]["higher_is_better"],
        }
    metric = measure_of({"metrics": metrics})
    facts = {name: found[0][name] for name in ("shots", "questions", "dropped")}
    return {"metric": metric, **metrics[metric], "n_seeds": len(found), **facts, "metrics": metrics}


def _average(results: BySeed) -> dict[str, Any] | None:
    """The paper's average over the seeds; its standard error takes the tasks as independent."""
    known = {name for each in PAPER_TASKS for name in (each.task, *each.also)}
    if not known & next(iter(results.values())).keys():
        return None
    averages = [
        paper_average({name: _score(result) for name, result in by_task.items() if name in known})
        for by_task in results.values()
    ]
    groups: dict[str, Any] = {}
    for name in WEIGHTS:
        parts = [part for each in averages if (part := each.groups[name]) is not None]
        groups[name] = _over_seeds([part[0] for part in parts], [part[1] for part in parts]) if parts else None
    values = [each.average for each in averages if each.average is not None]
    facts = {"groups": groups, "missing": list(averages[0].missing)}
    if not values:
        return {"value": None, "stderr": None, "sd": None, **facts}
    return {**_over_seeds(values, [each.stderr for each in averages]), **facts}


def _score(result: Result) -> tuple[float, float | None]:
    metric = result["metrics"][measure_of(result)]
    return metric["value"], metric["stderr"]


def _over_seeds(values: Sequence[float], stderrs: Sequence[float | None]) -> dict[str, float | None]:
    known = [stderr for stderr in stderrs if stderr is not None]
    return {
        "value": float(np.mean(values)),
        "stderr": math.sqrt(float(np.mean(np.square(known)))) if len(known) == len(values) else None,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }


def _shots(shots: int | None) -> str:
    return "various" if shots is None else str(shots)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
