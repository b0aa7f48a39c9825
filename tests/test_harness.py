"""Benchmarks: the harness gives what one computes by hand, and refuses what is not there in one line."""

import json
import math
import re
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from benchmark_models import (
    EOD,
    TOKENIZER,
    N,
    accuracies,
    bits_and_bytes,
    ids,
    likelihood,
    models,
    questions,
    ratio,
    tokenizer,
    write_rows,
)

from quadmix_plugin import harness
from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.harness import TASK_CODE, TASK_FOLDER, HarnessSettings, Result, evaluate_model, measure_of
from quadmix_plugin.local_tasks import LocalTask

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
tag: {tag}
num_fewshot: 1
"""
GROUP = """group: all_of_ours
task: [first, second]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""

SVAMP = [
    ("Ann has 7 pens and buys 2", "How many pens has she now?", "9.0"),
    ("A town has 1,200 people. 200 leave.", "How many stay?", "1000.0"),
    ("A rope of 5 metres is cut in two.", "How long is each?", "2.5"),
]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return questions()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    """The questions as a file."""
    return write_rows(tmp_path_factory.mktemp("questions") / "questions.jsonl", rows)


@pytest.fixture(autouse=True)
def _trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TASK_CODE, "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    """A folder of tasks: two over files of 10 and 30 questions, a group of them, one without its file, and SVAMP."""
    path = tmp_path_factory.mktemp("tasks")
    for name, part in (("first", rows[:10]), ("second", rows[10:40]), ("lost", [])):
        data = path / f"{name}.jsonl"
        if part:
            write_rows(data, part)
        text = TASK.format(name=name, data=data, cache=path / "cache", tag="lost_tag" if not part else "our_tag")
        (path / f"{name}.yaml").write_text(text, encoding="utf-8")
    (path / "group.yaml").write_text(GROUP, encoding="utf-8")
    svamp = [dict(zip(("Body", "Question", "Answer"), row, strict=True)) for row in SVAMP]
    data = str(write_rows(path / "svamp.jsonl", svamp))
    files = json.dumps({"data_files": {"train": data, "test": data}, "cache_dir": str(path / "cache")})
    text = (TASK_FOLDER / "svamp.yaml").read_text(encoding="utf-8")
    here = text.replace("dataset_path: ChilleD/SVAMP", f"dataset_path: json\ndataset_kwargs: {files}")
    (path / "svamp.yaml").write_text(here, encoding="utf-8")
    return path


def _evaluate(model: str, *local: LocalTask, **options: Any) -> dict[str, Result]:
    found = evaluate_model(models()[model], TOKENIZER, HarnessSettings(local=local, **options), "cpu", seed=1)
    return {row: result for by_row in found.values() for row, result in by_row.items()}


def _value(result: Result, metric: str) -> float:
    return result["metrics"][metric]["value"]


@pytest.mark.parametrize("model", ["trained", "random"])
def test_accuracies_of_a_local_file_are_those_computed_by_hand(model: str, data: Path, rows: list[dict]) -> None:
    found = _evaluate(model, LocalTask("ours", (str(data),)))["ours"]
    wanted = accuracies(models()[model], rows)
    assert {name: _value(found, name) for name in ("acc", "acc_norm")} == pytest.approx(wanted)
    assert (found["questions"], found["shots"], found["dropped"]) == (N, 0, {})
    p = wanted["acc"]
    assert found["metrics"]["acc"]["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (N - 1)))


def test_a_model_that_has_seen_the_answers_is_above_chance_and_a_random_one_is_not(data: Path) -> None:
    local = LocalTask("ours", (str(data),)), LocalTask("bits", (str(data),), kind="bits_per_byte")
    trained, random = (_evaluate(model, *local) for model in ("trained", "random"))
    assert _value(trained["bits"], "bits_per_byte") < 0.5 * _value(random["bits"], "bits_per_byte")  # the loss says so
    chance, error = 1 / 4, math.sqrt(1 / 4 * 3 / 4 / N)
    for metric in ("acc", "acc_norm"):
        assert _value(trained["ours"], metric) > chance + 3 * error
        assert abs(_value(random["ours"], metric) - chance) < 3 * error


@pytest.mark.parametrize("whole", [False, True], ids=["responses", "whole texts"])
def test_bits_per_byte_are_those_computed_by_hand(whole: bool, data: Path, rows: list[dict]) -> None:
    task = LocalTask("bits", (str(data),), kind="bits_per_byte", mask_prompt=not whole)
    found = _evaluate("trained", task)["bits"]
    each = bits_and_bytes(models()["trained"], rows, whole)
    assert _value(found, "bits_per_byte") == pytest.approx(ratio(each), abs=1e-4)
    assert _value(found, "byte_perplexity") == pytest.approx(2 ** ratio(each), rel=1e-4)
    assert not found["metrics"]["bits_per_byte"]["higher_is_better"]
    without = [ratio(each[:i] + each[i + 1 :]) for i in range(N)]
    jackknife = math.sqrt((N - 1) / N * sum((value - sum(without) / N) ** 2 for value in without))
    assert found["metrics"]["bits_per_byte"]["stderr"] == pytest.approx(jackknife, rel=0.05)


def test_a_text_without_a_prompt_is_its_response_alone(data: Path, rows: list[dict]) -> None:
    task = LocalTask("bits", (str(data),), kind="bits_per_byte", prompt=None, response="prompt")
    found = _evaluate("trained", task)["bits"]
    end = tokenizer().token_to_id(EOD)
    each = [(-likelihood(models()["trained"], [end], ids(row["prompt"])), row["prompt"]) for row in rows]
    bits = sum(total for total, _ in each) / math.log(2) / sum(len(text.encode()) for _, text in each)
    assert _value(found, "bits_per_byte") == pytest.approx(bits, abs=1e-4)


def test_answers_that_are_generated_are_compared_without_space_and_case(data: Path, rows: list[dict]) -> None:
    found = _evaluate("trained", LocalTask("exact", (str(data),), kind="exact_match"))["exact"]
    assert _value(found, "exact_match") > 0.5
    changed = [{**row, "response": ["something else", row["response"].upper()]} for row in rows]
    accepted = write_rows(data.with_name("accepted.jsonl"), changed)
    same = _evaluate("trained", LocalTask("accepted", (str(accepted),), kind="exact_match"))["accepted"]
    assert _value(same, "exact_match") == _value(found, "exact_match")
    wrong = write_rows(data.with_name("wrong.jsonl"), [{**row, "response": "something else"} for row in rows])
    assert (
        _value(_evaluate("trained", LocalTask("wrong", (str(wrong),), kind="exact_match"))["wrong"], "exact_match") == 0
    )


def test_examples_come_from_other_rows_and_their_number_is_told(data: Path, rows: list[dict]) -> None:
    settings = HarnessSettings(local=(LocalTask("shots", (str(data),), shots=2),))
    (task,) = harness._load(settings)["shots"].tasks.values()
    task.set_fewshot_seed(seed=0)
    for row in task.eval_docs:
        text = task.fewshot_context(row, 2)
        *examples, question = text.split("\n\n")
        assert question == row["prompt"]
        known = {f"{each['prompt']} {each['response']}": each["prompt"] for each in rows}
        assert [known[example] != row["prompt"] for example in examples] == [True, True]
    assert _evaluate("random", *settings.local, limit=3)["shots"]["shots"] == 2


def test_shots_of_tasks_of_the_harness_are_set_or_left(folder: Path) -> None:
    settings = HarnessSettings((("first", 3), ("second", None)), task_folder=str(folder))
    found = evaluate_model(models()["random"], TOKENIZER, settings, "cpu")
    assert {name: found[name][name]["shots"] for name in found} == {"first": 3, "second": 1}


def test_a_group_is_scored_over_all_its_questions_with_its_shots(folder: Path, rows: list[dict]) -> None:
    settings = HarnessSettings((("all_of_ours", 0),), task_folder=str(folder))
    found = evaluate_model(models()["random"], TOKENIZER, settings, "cpu")["all_of_ours"]["all_of_ours"]
    wanted = accuracies(models()["random"], rows[:40])
    assert {name: _value(found, name) for name in wanted} == pytest.approx(wanted)  # acc_norm is not in its own list
    assert (found["shots"], found["questions"]) == (0, 40)
    parts = {name: found["subtasks"][name] for name in ("first", "second")}
    assert [each["questions"] for each in parts.values()] == [10, 30]
    errors = [part["metrics"]["acc"]["stderr"] for part in parts.values()]
    assert found["metrics"]["acc"]["stderr"] == pytest.approx(math.hypot(errors[0] / 4, errors[1] * 3 / 4))


def test_a_tag_is_each_of_its_tasks(folder: Path) -> None:
    settings = HarnessSettings((("our_tag", 0),), task_folder=str(folder), limit=2)
    found = evaluate_model(models()["random"], TOKENIZER, settings, "cpu")
    assert set(found["our_tag"]) == {"first", "second"}


def test_names_that_are_not_there_or_taken_are_refused_before_any_data_is_read(folder: Path) -> None:
    ours = LocalTask("ours", ("/nowhere.jsonl",))
    for settings, message in (
        (
            HarnessSettings((("nope", None),), (ours,), str(folder)),
            r"evaluate\.tasks: 'nope' is not among the [\d,]+ tasks",
        ),
        (HarnessSettings((("nope", None),)), r"'nope' is not among .*; tasks of your own: evaluate\.task_folder"),
        (
            HarnessSettings(local=(LocalTask("piqa", ()),)),
            r"evaluate\.local\.piqa: a task of lm-eval.* has this name",
        ),
        (HarnessSettings((("ours", None),), (ours,)), r"evaluate\.tasks: 'ours' is in evaluate\.local.*leave it out"),
    ):
        with pytest.raises(InputError, match=message):
            settings.check()


def test_a_task_in_two_names_is_refused(folder: Path) -> None:
    settings = HarnessSettings((("all_of_ours", 0), ("second", 0)), task_folder=str(folder))
    with pytest.raises(InputError, match="'second' is in 'all_of_ours' and in 'second'; leave one of them out"):
        settings.check()


def test_a_task_without_its_data_is_named(folder: Path) -> None:
    with pytest.raises(
        QuadmixError, match=r"evaluate\.tasks: lost: its data cannot be had \(.*lost\.jsonl.*docs/evaluate"
    ):
        HarnessSettings((("lost", None),), task_folder=str(folder)).check()


def test_a_task_of_the_hub_without_a_network_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(QuadmixError, match=r"evaluate\.tasks: piqa: its data cannot be had .*fetch it once"):
        HarnessSettings((("piqa", None),)).check()


def test_a_folder_without_a_model_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(QuadmixError, match=re.escape(f"{tmp_path}: no model in Hugging Face's format there")):
        evaluate_model(tmp_path, TOKENIZER, HarnessSettings(local=(LocalTask("ours", (str(data),)),)), "cpu")


@pytest.mark.parametrize("kind", ["multiple_choice", "bits_per_byte"])
def test_a_text_that_is_longer_than_the_context_is_named(kind: Any, tmp_path: Path, rows: list[dict]) -> None:
    long = "stone " * 120
    data = write_rows(
        tmp_path / "long.jsonl", [rows[0], {**rows[1], "response": long, "choices": ["a", long], "answer": 0}]
    )
    task = LocalTask("long", (str(data),), kind=kind)
    with pytest.raises(
        QuadmixError, match=r"evaluate\.local\.long: a text of \d+ tokens, ' ?stone .*context of 96; shorten"
    ):
        _evaluate("random", task)
    assert _evaluate("random", task, limit=1)["long"]["questions"] == 1
    whole = LocalTask("long", (str(data),), kind="bits_per_byte", mask_prompt=False)
    assert _evaluate("random", whole)["long"]["questions"] == 2


def test_svamp_reads_a_number_and_compares_it(folder: Path) -> None:
    """Our own task file, over a file with the columns of ChilleD/SVAMP."""
    settings = HarnessSettings((("svamp", 2),), task_folder=str(folder))
    (task,) = harness._load(settings)["svamp"].tasks.values()
    rows = list(task.eval_docs)
    assert task.doc_to_text(rows[0]) == "Question: Ann has 7 pens and buys 2 How many pens has she now?\nAnswer:"
    assert [task.doc_to_target(row) for row in rows] == ["9", "1000", "2.5"]
    for generated, right in (
        ((" 9", " 1,000.", " 2.5"), (1, 1, 1)),
        ((" She has 9.0 pens, not 8", "$1000", "2.50"), (1, 1, 0)),
        (("-9", "100", "none"), (0, 0, 0)),
    ):
        task.build_all_requests()
        for instance, text in zip(task.instances, generated, strict=True):
            instance.resps = [text]
        task.apply_filters()
        scores = [
            task.process_results(row, [instance.filtered_resps["number"]])["exact_match"]
            for row, instance in zip(rows, task.instances, strict=True)
        ]
        assert tuple(scores) == right, generated
    found = evaluate_model(models()["random"], TOKENIZER, settings, "cpu")["svamp"]["svamp"]
    assert (list(found["metrics"]), found["shots"]) == (["exact_match"], 2)


@pytest.mark.parametrize(
    ("metrics", "told_by"), [(("acc", "acc_norm"), "acc_norm"), (("f1",), "f1"), (("x", "acc"), "acc")]
)
def test_a_task_is_told_by_its_normalised_accuracy_where_it_has_one(metrics: tuple[str, ...], told_by: str) -> None:
    assert measure_of({"metrics": dict.fromkeys(metrics)}) == told_by
