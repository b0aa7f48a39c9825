"""The table of a comparison: its verdicts are those of the noise, and what is written can be read back."""

import csv
import io
import math
from typing import Any

import numpy as np
import pytest

from quadmix_plugin import verdict
from quadmix_plugin.comparison import Selected, budget_met, comparison_rows, to_csv, to_markdown

TRAINED, LARGEST = 12_000, 400
BUDGET = 6_000


def _facts(tokens: int = 6_100, budget: int | None = BUDGET, **rest: Any) -> dict[str, Any]:
    third = tokens // 3
    return {
        "plugin": "random",
        "documents": 50,
        "copies": 60,
        "tokens": tokens,
        "unique_tokens": 5_000,
        "epochs": tokens / 5_000,
        "budget_tokens": budget,
        "domain_tokens": {"web": third, "books": tokens - third},
        **rest,
    }


def _selected(name: str, losses: dict[str, list[float]], overlap: float = 0.5, **facts: Any) -> Selected:
    return Selected(name, _facts(**facts), losses, overlap)


# mmlu of three seeds each: around 3.0 with a deviation of 0.1; near, unsettled and far from the first.
MMLU = {
    "quadmix": [2.90, 3.00, 3.10],
    "near": [2.95, 3.05, 3.15],
    "between": [3.05, 3.15, 3.25],
    "far": [3.90, 4.00, 4.10],
}
ARC = {name: [5.0, 5.1, 5.2] for name in MMLU} | {"far": [1.0, 1.1, 1.2]}
ENTRIES = [_selected(name, {"mmlu": MMLU[name], "arc": ARC[name]}) for name in MMLU]


def _rows(entries: list[Selected] = ENTRIES, weights: dict[str, float] | None = None) -> dict[str, dict[str, Any]]:
    return {row["selector"]: row for row in comparison_rows(entries, weights or {}, TRAINED, LARGEST)}


def test_standings_are_those_of_the_noise() -> None:
    rows = _rows()
    assert [rows[name]["mmlu standing"] for name in MMLU] == ["best", "near-tie", "unclear", "worse"]
    words = {"better": "worse"}  # what the best is to another, that is how the other stands
    for name in ("near", "between", "far"):
        outcome = verdict.compare(MMLU["quadmix"], MMLU[name]).outcome
        assert rows[name]["mmlu standing"] == words.get(outcome, outcome)
    assert rows["far"]["arc standing"] == "best"
    assert {rows[name]["arc standing"] for name in MMLU if name != "far"} == {"worse"}


@pytest.mark.parametrize(
    ("weights", "lowest"),
    [
        ({}, "far"),
        ({"mmlu": 1.0}, "quadmix"),
        ({"mmlu": 9.0, "arc": 1.0}, "quadmix"),
        ({"arc": 1.0, "mmlu": 0.0}, "far"),
    ],
)
def test_the_objective_is_the_weighted_mean_and_has_a_standing_of_its_own(
    weights: dict[str, float], lowest: str
) -> None:
    rows = _rows(weights=weights)
    used = weights or {"mmlu": 1.0, "arc": 1.0}
    for name, row in rows.items():
        each = (used.get("mmlu", 0) * np.array(MMLU[name]) + used.get("arc", 0) * np.array(ARC[name])) / sum(
            used.values()
        )
        assert row["objective"] == pytest.approx(each.mean())
        assert row["objective sd"] == pytest.approx(each.std(ddof=1))
        assert row["mmlu"] == pytest.approx(np.mean(MMLU[name]))
        assert row["mmlu sd"] == pytest.approx(0.1)
    assert min(rows, key=lambda name: rows[name]["objective"]) == lowest
    assert [name for name, row in rows.items() if row["objective standing"] == "best"] == [lowest]


def test_one_seed_says_nothing_of_the_noise() -> None:
    rows = _rows([_selected("quadmix", {"mmlu": [3.0]}), _selected("random", {"mmlu": [3.5]})])
    assert [row["mmlu sd"] for row in rows.values()] == [None, None]
    assert rows["random"]["mmlu standing"] == rows["random"]["objective standing"] == "unknown"
    assert rows["quadmix"]["seeds"] == 1
    assert "± " not in to_markdown(list(rows.values()), *_facts_and_overlap(rows)).split("Loss in nats")[0]


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    entries = [
        _selected("diverged", {"mmlu": [math.nan, 3.0]}),
        _selected("random", {"mmlu": [3.4, 3.5]}),
        _selected("quadmix", {"mmlu": [3.1, 3.2]}),
    ]
    rows = _rows(entries)
    assert rows["quadmix"]["objective standing"] == rows["quadmix"]["mmlu standing"] == "best"
    assert rows["diverged"]["mmlu standing"] == "unknown"
    text = to_markdown(list(rows.values()), *_facts_and_overlap(rows))
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:5]] == ["`quadmix`", "`random`", "`diverged`"]


def test_every_selection_is_held_against_that_of_theta_too() -> None:
    ours = [2.0, 2.1, 2.2]
    rivals = {"ahead": [1.0, 1.1, 1.2], "tied": [2.05, 2.15, 2.25], "behind": [3.0, 3.1, 3.2]}
    rows = _rows([_selected("quadmix", {"t": ours}), *(_selected(name, {"t": each}) for name, each in rivals.items())])
    assert [rows[name]["against quadmix"] for name in rivals] == ["better", "near-tie", "worse"]
    assert _rows([_selected("ahead", {"t": ours})])["ahead"]["against quadmix"] == "unknown"


def test_sizes_are_what_was_selected_and_trained_on() -> None:
    row = _rows()["near"]
    assert (row["documents"], row["copies"], row["tokens"], row["unique_tokens"]) == (50, 60, 6_100, 5_000)
    assert row["copies per document"] == 6_100 / 5_000
    assert row["training epochs"] == TRAINED / 6_100
    assert row["overlap with quadmix"] == 0.5
    assert (row["method"], row["budget"], row["seeds"]) == ("random", BUDGET, 3)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (_facts(6_100), "+100 tokens, within one document"),
        (_facts(5_600), "-400 tokens, within one document"),
        (_facts(6_401), "+401 tokens, within one document of each domain"),
        (_facts(8_000, expected_tokens=None, sd_tokens=None), "+2,000 tokens: missed by +33.3%"),
        (_facts(6_300, expected_tokens=6_000.0, sd_tokens=150.0), "+300 tokens, 2.0σ of its draws"),
        (_facts(6_600, expected_tokens=6_000.0, sd_tokens=150.0), "+600 tokens, 4.0σ of its draws: beyond 3σ"),
        (_facts(6_300, expected_tokens=6_010.4, sd_tokens=None), "+300 tokens; +10 in expectation"),
        (_facts(6_300, expected_tokens=6_000.0, sd_tokens=0.0), "+300 tokens; +0 in expectation"),
        (_facts(6_300, budget=None, expected_tokens=6_200.0), "sets the budget"),
    ],
)
def test_how_a_budget_is_met_is_told_by_how_it_was_made(facts: dict[str, Any], words: str) -> None:
    assert budget_met(facts, LARGEST) == words


def _facts_and_overlap(rows: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    names = list(rows)
    overlap = {a: {b: 1.0 if a == b else 0.1 * (1 + i + j) for j, b in enumerate(names)} for i, a in enumerate(names)}
    return {name: _facts() for name in names}, overlap


def _tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text: rows of cells, the header first; a bar behind a backslash is no border."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if not line.startswith("|"):
            found += [[]] if found[-1] else []
            continue
        cells = line.replace(r"\|", "\0").strip("|").split("|")
        found[-1].append([cell.strip().replace("\0", "|") for cell in cells])
    return [table for table in found if table]


def test_markdown_has_losses_sizes_overlaps_and_shares_of_all_the_best_first() -> None:
    rows = _rows(weights={"mmlu": 9.0, "arc": 1.0})
    text = to_markdown(list(rows.values()), *_facts_and_overlap(rows))
    losses, sizes, overlaps, shares = _tables(text)
    order = ["`quadmix`", "`near`", "`between`", "`far`"]
    assert losses[0] == ["selection", "method", "objective loss", "mmlu loss", "arc loss", "against θ*"]
    assert set(losses[1]) == {"---"}
    for table in (losses, sizes, overlaps):
        assert [row[0] for row in table[2:]] == order
    assert losses[2][2:4] == ["**3.2100 ± 0.1000**", "**3.0000 ± 0.1000**"]
    assert [row[3] for row in losses[3:]] == ["3.0500 ± 0.1000 ≈", "3.1500 ± 0.1000 ?", "4.0000 ± 0.1000"]
    assert losses[5][4] == "**1.1000 ± 0.1000**"
    assert [row[5] for row in losses[2:]] == [
        "–",
        *(rows[name]["against quadmix"] for name in ("near", "between", "far")),
    ]
    assert "over 3 seeds" in text
    assert sizes[2] == ["`quadmix`", "50", "6,100", "5,000", "1.22", "1.97", "+100 tokens, within one document"]
    assert overlaps[0][1:] == order
    assert overlaps[2][1:] == ["100", "20", "30", "40"]
    assert [row[0] for row in shares[2:]] == ["web", "books"]
    assert [row[1] for row in shares[2:]] == ["33.3", "66.7"]


def test_a_single_task_that_counts_is_told_once() -> None:
    rows = _rows(weights={"mmlu": 1.0})
    losses = _tables(to_markdown(list(rows.values()), *_facts_and_overlap(rows)))[0]
    assert losses[0] == ["selection", "method", "mmlu loss (the objective)", "arc loss", "against θ*"]
    assert losses[2][2] == "**3.0000 ± 0.1000**"


def test_of_a_benchmark_the_highest_is_the_best() -> None:
    scores = {"quadmix": [0.30, 0.31, 0.32], "near": [0.305, 0.315, 0.325], "between": [0.5, 0.51, 0.52]}
    entries = [Selected(name, _facts(), {"mmlu": MMLU[name]}, 1.0, {"arc_easy": each}) for name, each in scores.items()]
    rows = _rows(entries)
    assert [rows[name]["arc_easy standing"] for name in scores] == ["worse", "worse", "best"]
    assert [rows[name]["objective standing"] for name in scores] == ["best", "near-tie", "unclear"]
    assert rows["near"]["arc_easy"] == pytest.approx(0.315)
    assert all(row["objective"] == row["mmlu"] for row in rows.values())  # benchmarks are no part of it
    text = to_markdown(list(rows.values()), *_facts_and_overlap(rows), benchmarks=["arc_easy"])
    assert _tables(text)[0][0][2:] == ["mmlu loss (the objective)", "arc_easy", "against θ*"]
    assert "higher is better" in text
    assert _tables(text)[0][4][3] == "**0.5100 ± 0.0100**"


def test_of_bits_per_byte_the_lowest_is_the_best() -> None:
    name, scores = "ours (bits_per_byte)", {"quadmix": [1.30, 1.31, 1.32], "between": [1.5, 1.51, 1.52]}
    entries = [
        Selected(each, _facts(), {"mmlu": MMLU[each]}, 1.0, {name: bits}, lower={name}) for each, bits in scores.items()
    ]
    rows = _rows(entries)
    assert [rows[each][f"{name} standing"] for each in scores] == ["best", "worse"]


def test_rows_are_in_the_order_of_the_objective_whatever_the_order_they_came_in() -> None:
    rows = _rows(ENTRIES[::-1], {"mmlu": 1.0})
    losses = _tables(to_markdown(list(rows.values()), *_facts_and_overlap(rows)))[0]
    assert [row[0] for row in losses[2:]] == ["`quadmix`", "`near`", "`between`", "`far`"]


def test_bars_in_names_are_no_borders() -> None:
    name, domain = "top|k", "news | opinion"
    entries = [_selected("quadmix", {"a|b": [3.0, 3.1]}), _selected(name, {"a|b": [4.0, 4.1]})]
    rows = _rows(entries)
    facts = {each.name: {**_facts(), "domain_tokens": {domain: 6_100}} for each in entries}
    overlap = {a: dict.fromkeys(rows, 1.0) for a in rows}
    losses, sizes, overlaps, shares = _tables(to_markdown(list(rows.values()), facts, overlap))
    for table in (losses, sizes, overlaps, shares):
        assert len({len(row) for row in table}) == 1
    assert losses[0] == ["selection", "method", "a|b loss (the objective)", "against θ*"]
    assert losses[3][0] == sizes[3][0] == overlaps[0][2] == f"`{name}`"
    assert shares[2] == [domain, "100.0", "100.0"]


def test_csv_reads_back_as_the_rows_with_the_domain_shares() -> None:
    rows = _rows([*ENTRIES[:2], _selected('odd, "name"', {"mmlu": [3.0, 3.1], "arc": [1.0, 2.0]}, budget=None)])
    facts = {name: _facts() for name in rows}
    read = list(csv.DictReader(io.StringIO(to_csv(list(rows.values()), facts))))
    assert [row["selector"] for row in read] == list(rows)
    for row, (name, wanted) in zip(read, rows.items(), strict=True):
        assert list(row) == [*wanted, "share web", "share books"]
        for key, value in wanted.items():
            if isinstance(value, int | float):
                assert float(row[key]) == value, key
            else:
                assert row[key] == ("" if value is None else value), key
        assert float(row["share web"]) == facts[name]["domain_tokens"]["web"] / facts[name]["tokens"]
        assert float(row["share web"]) + float(row["share books"]) == pytest.approx(1)
