"""The paper's average: its published rows, and what it says where a task is missing."""

import math

import pytest

from quadmix_plugin.paper_tasks import (
    COMMONSENSE,
    KNOWLEDGE,
    MATH,
    PAPER_TASKS,
    READING,
    WEIGHTS,
    average_of_groups,
    paper_average,
)

# Table 1 and Table 2 of arXiv 2504.16511: reading, commonsense, knowledge, math, average. Two rows of Table 2 repeat
# rows of Table 1 (FineWeb-Edu alone, and QuaDMix-OH).
TABLES = {
    "Random": (32.9, 51.6, 17.4, 2.8, 32.3),
    "DSIR": (34.9, 49.2, 17.5, 6.9, 32.7),
    "RegMix": (35.5, 52.4, 17.7, 3.5, 33.6),
    "FineWeb-Edu": (41.4, 55.5, 20.1, 6.0, 37.4),
    "AskLLM": (38.9, 54.2, 19.0, 2.3, 35.5),
    "DCLM": (41.2, 53.1, 19.8, 8.2, 36.7),
    "Criteria Mix": (40.1, 53.7, 20.0, 3.1, 36.0),
    "QuaDMix-OH": (44.0, 55.7, 21.0, 10.2, 39.0),
    "QuaDMix-BMK": (44.8, 55.7, 21.3, 11.5, 39.5),
    "Table 2, row 1: one filter": (38.9, 53.5, 18.6, 2.9, 35.2),
    "Table 2, row 2: one filter": (41.4, 55.5, 20.1, 6.0, 37.4),
    "Table 2, row 3: one filter": (41.3, 53.4, 19.7, 12.2, 37.3),
    "Table 2, row 4: two filters": (41.9, 55.6, 20.0, 5.1, 37.5),
    "Table 2, row 5: two filters": (41.8, 54.6, 19.8, 9.1, 37.5),
    "Table 2, row 6: two filters": (43.5, 55.6, 20.8, 9.6, 38.7),
    "Table 2, row 7: 90B tokens": (40.7, 55.2, 19.5, 4.6, 36.8),
    "Table 2, row 8: 180B tokens": (37.8, 53.9, 18.9, 2.8, 35.1),
    "Table 2, row 9: 30B tokens": (44.0, 55.7, 21.0, 10.2, 39.0),
}
GROUPS = (READING, COMMONSENSE, KNOWLEDGE, MATH)


@pytest.mark.parametrize("row", TABLES.values(), ids=TABLES)
def test_the_papers_rows_are_reproduced(row: tuple[float, ...]) -> None:
    *groups, average = row
    assert average_of_groups(dict(zip(GROUPS, groups, strict=True))) == pytest.approx(average, abs=0.1)


@pytest.mark.parametrize(
    ("scores", "reading"), [((39.2, 71.1, 21.6), 44.0), ((40.2, 71.3, 22.8), 44.8)], ids=["QuaDMix-OH", "QuaDMix-BMK"]
)
def test_reading_is_the_mean_of_its_tasks_as_in_the_papers_table_3(scores: tuple[float, ...], reading: float) -> None:
    named = dict(zip(("arc_challenge", "arc_easy", "triviaqa"), scores, strict=True))
    group = paper_average({name: (value, None) for name, value in named.items()}).groups[READING]
    assert group is not None
    assert group[0] == pytest.approx(reading, abs=0.05)


def test_each_group_weighs_as_many_as_it_has_tasks() -> None:
    assert {group: sum(each.group == group for each in PAPER_TASKS) for group in WEIGHTS} == WEIGHTS


def test_average_and_error_are_those_of_nine_independent_tasks() -> None:
    scores = {each.task: (i / 10, 0.01 * (i + 1)) for i, each in enumerate(PAPER_TASKS)}
    found = paper_average(scores)
    assert found.missing == ()
    assert found.average == pytest.approx(sum(value for value, _ in scores.values()) / 9)
    assert found.stderr == pytest.approx(math.sqrt(sum(stderr**2 for _, stderr in scores.values())) / 9)
    knowledge = [scores[each.task] for each in PAPER_TASKS if each.group == KNOWLEDGE]
    assert found.groups[KNOWLEDGE] == pytest.approx((
        sum(value for value, _ in knowledge) / 2, math.hypot(*(stderr for _, stderr in knowledge)) / 2
    ))  # fmt: skip
    unknown = paper_average({**scores, "piqa": (0.5, None)})
    assert unknown.average is not None
    assert (unknown.stderr, unknown.groups[COMMONSENSE][1]) == (None, None)  # type: ignore[index]


def test_a_missing_task_is_named_and_takes_its_group_and_the_average_along() -> None:
    scores = {each.task: (0.5, 0.1) for each in PAPER_TASKS if each.benchmark not in ("SVAMP", "PIQA")}
    found = paper_average(scores)
    assert (found.average, found.stderr, found.missing) == (None, None, ("PIQA", "SVAMP"))
    assert {name for name, value in found.groups.items() if value is None} == {COMMONSENSE, MATH}


def test_mmlu_by_letters_stands_in_where_it_is_what_was_asked() -> None:
    scores = {each.task: (0.5, 0.1) for each in PAPER_TASKS if each.benchmark != "MMLU"}
    assert paper_average(scores).missing == ("MMLU",)
    assert paper_average({**scores, "mmlu": (0.25, 0.1)}).average == pytest.approx((8 * 0.5 + 0.25) / 9)
    both = paper_average({**scores, "mmlu": (0.25, 0.1), "mmlu_continuation": (0.3, 0.1)})
    assert both.average == pytest.approx((8 * 0.5 + 0.3) / 9)
