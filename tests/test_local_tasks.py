"""Questions in files of one's own: what is read, what is dropped and counted, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quadmix_plugin.errors import InputError
from quadmix_plugin.local_tasks import LocalTask, Questions, read_questions

CHOICE = {"prompt": "2 + 2 =", "choices": ["3", "4"], "answer": 1}
ANSWER = {"prompt": "2 + 2 =", "response": "4"}


def _file(tmp_path: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _read(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> Questions:
    return read_questions(LocalTask("ours", (_file(tmp_path, rows),), **options))


def test_json_lines_and_parquet_give_the_same_rows_file_by_file(tmp_path: Path) -> None:
    rows = [{**CHOICE, "choices": [str(i), "4"]} for i in range(5)]
    parts = _file(tmp_path, rows[:2], "a.parquet"), _file(tmp_path, rows[2:], "b.jsonl")
    assert read_questions(LocalTask("ours", parts)) == Questions("multiple_choice", rows)
    assert read_questions(LocalTask("ours", (str(tmp_path),))).rows == rows


def test_the_kind_is_told_by_the_columns_unless_it_is_given(tmp_path: Path) -> None:
    both = [{**CHOICE, **ANSWER}]
    assert _read(tmp_path, both).kind == "multiple_choice"
    assert _read(tmp_path, [ANSWER]).kind == "bits_per_byte"
    assert _read(tmp_path, both, kind="exact_match") == Questions(
        "exact_match", [{"prompt": "2 + 2 =", "response": ["4"]}]
    )


def test_columns_are_those_that_are_named(tmp_path: Path) -> None:
    rows = [{"q": "2 + 2 =", "options": ["3", "4"], "label": 1, "prompt": "no"}]
    assert _read(tmp_path, rows, prompt="q", choices="options", answer="label").rows == [CHOICE]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ("2 + 2 =", " 4")),
        ({"delimiter": "\n"}, ("2 + 2 =", "\n4")),
        ({"mask_prompt": False}, ("", "2 + 2 = 4")),
        ({"prompt": None}, ("", "4")),
    ],
)
def test_the_text_whose_bits_are_counted(tmp_path: Path, options: dict[str, Any], wanted: tuple[str, str]) -> None:
    (row,) = _read(tmp_path, [ANSWER], **options).rows
    assert (row["prompt"], row["response"]) == wanted


def test_answers_may_be_numbers_and_several(tmp_path: Path) -> None:
    rows = [{**ANSWER, "response": given} for given in (4, 2.5, [" four ", "4"])]
    found = _read(tmp_path, rows, kind="exact_match").rows
    assert [row["response"] for row in found] == [["4"], ["2.5"], ["four", "4"]]


def test_rows_that_lack_something_are_dropped_and_counted(tmp_path: Path) -> None:
    lacking = [
        {"prompt": None},
        {"prompt": " "},
        {"choices": None},
        {"choices": []},
        {"choices": ["4"]},
        {"answer": None},
    ]
    rows = [{**CHOICE, **lack} for lack in lacking] + [{"prompt": "2 + 2 =", "choices": ["3", "4"]}, CHOICE]
    found = _read(tmp_path, rows)
    assert found.rows == [CHOICE]
    assert found.dropped == {"no prompt": 2, "no choices": 2, "one choice": 1, "no answer": 2}
    assert len(found.rows) + sum(found.dropped.values()) == len(rows)
    assert _read(tmp_path, [ANSWER, {**ANSWER, "response": ""}]).dropped == {"no response": 1}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [CHOICE],
            {"prompt": "question"},
            "evaluate.local.ours.prompt: no column 'question' in {path}; found prompt, cho",
        ),
        (
            [ANSWER],
            {"kind": "multiple_choice"},
            "evaluate.local.ours.choices: no column 'choices' in {path}; found promp",
        ),
        ([CHOICE], {"answer": "label"}, "evaluate.local.ours.answer: no column 'label'"),
        ([CHOICE], {"kind": "exact_match"}, "evaluate.local.ours.response: no column 'response'"),
        ([{"response": "x"}], {}, "found response; name the column, or set prompt: null where there is none"),
        ([CHOICE, {**CHOICE, "answer": 2}], {}, "{path}: row 2: 'answer' is 2, and there are 2 choices; give 0 to 1"),
        ([{**CHOICE, "answer": -1}], {}, "{path}: row 1: 'answer' is -1"),
        ([{**CHOICE, "answer": "B"}], {}, "{path}: row 1: 'answer' is 'B'; give the index of the right choice, from 0"),
        ([{**CHOICE, "answer": True}], {}, "{path}: row 1: 'answer' is True; give the index"),
        ([{**CHOICE, "choices": "3 or 4"}], {}, "{path}: row 1: 'choices' is '3 or 4'; give a list of texts"),
        ([{**CHOICE, "choices": ["3", 4]}], {}, "{path}: row 1: 'choices': choice 1 is 4; give a text"),
        ([{**CHOICE, "choices": ["3", ""]}], {}, "{path}: row 1: 'choices': choice 1 is empty; give a text"),
        ([{**CHOICE, "prompt": 3}], {}, "{path}: row 1: 'prompt' is 3; give a text"),
        ([{**ANSWER, "response": 4}], {}, "{path}: row 1: 'response' is 4; give a text"),
        (
            [{**CHOICE, "answer": None}],
            {},
            "evaluate.local.ours: 0 usable rows (1 with no answer) in {path}; give at lea",
        ),
        ([CHOICE] * 3, {"shots": 3}, "evaluate.local.ours: 3 usable rows in {path}; give at least 4, or lower fewshot"),
    ],
)
def test_what_cannot_be_used_is_said_with_place_value_and_remedy(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        _read(tmp_path, rows, **options)
    assert message.format(path=tmp_path / "rows.jsonl") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_empty_or_damaged_are_refused(tmp_path: Path) -> None:
    for content, message in (
        (None, "evaluate.local.ours.path: .* no such file or folder"),
        (b"", "empty file"),
        (b"\n", "found no rows"),
        (b"not a table", "cannot be read as Parquet"),
    ):
        path = tmp_path / ("rows.parquet" if content == b"not a table" else "rows.jsonl")
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_questions(LocalTask("ours", (str(path),)))
