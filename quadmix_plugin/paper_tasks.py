"""The paper's nine benchmarks, the few-shot settings that this project gives them, and the paper's average.

The paper (section 5.1) names the tasks, their groups and the measure, normalised accuracy; its Table 1 and Table 2
show the weights of the groups. It does not say how many examples stand before a question: ``shots`` are ours.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

SUITE = "paper"
"""The name that stands for all nine in ``evaluate.tasks``."""

READING, COMMONSENSE, KNOWLEDGE, MATH = "reading comprehension", "commonsense reasoning", "knowledge", "math"

WEIGHTS = {READING: 3, COMMONSENSE: 3, KNOWLEDGE: 2, MATH: 1}
"""Of each group in the average: the number of its tasks."""


@dataclass(frozen=True)
class PaperTask:
    """One benchmark: its group, the harness' task that stands for it, and the examples before each question.

    ``also``: other tasks of the harness whose score is taken for it where a recipe names them in its place.
    """

    benchmark: str
    group: str
    task: str
    shots: int
    also: tuple[str, ...] = ()


PAPER_TASKS = (
    PaperTask("ARC-E", READING, "arc_easy", 0),
    PaperTask("ARC-C", READING, "arc_challenge", 0),
    PaperTask("TriviaQA", READING, "triviaqa", 5),
    PaperTask("PIQA", COMMONSENSE, "piqa", 0),
    PaperTask("HellaSwag", COMMONSENSE, "hellaswag", 0),
    PaperTask("OpenBookQA", COMMONSENSE, "openbookqa", 0),
    # The answers themselves are compared, not the letters A to D: only then is there a normalised accuracy, and a
    # model of this size is near chance on letters, while the paper's Table 3 has 34.
    PaperTask("MMLU", KNOWLEDGE, "mmlu_continuation", 5, ("mmlu",)),
    PaperTask("NQ-open", KNOWLEDGE, "nq_open", 5),
    PaperTask("SVAMP", MATH, "svamp", 5),
)


@dataclass(frozen=True)
class PaperAverage:
    """The average and its standard error; groups in the same form. Both are None where a task is ``missing``."""

    average: float | None
    stderr: float | None
    groups: dict[str, tuple[float, float | None] | None]
    missing: tuple[str, ...]


def average_of_groups(groups: Mapping[str, float]) -> float:
    """(3·Reading + 3·Commonsense + 2·Knowledge + 1·Math) / 9, in the unit of the scores."""
    return sum(weight * groups[name] for name, weight in WEIGHTS.items()) / sum(WEIGHTS.values())


def paper_average(scores: Mapping[str, tuple[float, float | None]]) -> PaperAverage:
    """The paper's average of ``scores``: task of the harness → value and standard error.

    A group is the mean of its tasks. Standard errors are those of independent tasks: the square root of the sum of
    squares, each times the weight of its task; None where one is not known.
    """
    found, missing = {}, []
    for each in PAPER_TASKS:
        name = next((name for name in (each.task, *each.also) if name in scores), None)
        if name is None:
            missing.append(each.benchmark)
        else:
            found[each.benchmark] = scores[name]
    groups: dict[str, tuple[float, float | None] | None] = {}
    for group in WEIGHTS:
        names = [each.benchmark for each in PAPER_TASKS if each.group == group]
        groups[group] = _mean([found[name] for name in names]) if not set(names) & set(missing) else None
    known = {name: score for name, score in groups.items() if score is not None}
    if missing:
        return PaperAverage(None, None, groups, tuple(missing))
    total = sum(WEIGHTS.values())
    stderr = _root([(WEIGHTS[name] / total, score[1]) for name, score in known.items()])
    return PaperAverage(average_of_groups({name: score[0] for name, score in known.items()}), stderr, groups, ())


def _mean(scores: list[tuple[float, float | None]]) -> tuple[float, float | None]:
    share = 1 / len(scores)
    return sum(value for value, _ in scores) * share, _root([(share, stderr) for _, stderr in scores])


def _root(parts: list[tuple[float, float | None]]) -> float | None:
    """Standard error of a weighted sum of independent values, from (weight, standard error) of each."""
    if any(stderr is None for _, stderr in parts):
        return None
    return math.sqrt(sum((weight * stderr) ** 2 for weight, stderr in parts if stderr is not None))
