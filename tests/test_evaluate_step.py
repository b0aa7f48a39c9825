"""The step `evaluate`: local benchmarks of trained models without a network, scores over seeds, what is asked anew."""

import csv
import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from benchmark_models import accuracies, bits_and_bytes, models, questions, ratio, train, write_rows
from small_run import ROOT, write_small_recipe

from quadmix_plugin.cli import main
from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import RecipeError
from quadmix_plugin.harness import TASK_CODE, TASK_FOLDER
from quadmix_plugin.paper_tasks import PAPER_TASKS
from quadmix_plugin.pipelines.benchmarks import harness_settings, task_keys
from quadmix_plugin.pipelines.context import open_run
from quadmix_plugin.pipelines.evaluate import read_summary
from quadmix_plugin.pipelines.plan import make_plan
from quadmix_plugin.pipelines.run import run_steps
from quadmix_plugin.report import ReportData, render

SHARED = ROOT.parent / "shared" / "data" / "validation"
LOCAL: dict[str, dict[str, Any]] = {
    "choice": {"path": "questions.jsonl", "kind": "multiple_choice"},
    "bits": {"path": "questions.jsonl", "kind": "bits_per_byte"},
    "exact": {"path": "few.jsonl", "kind": "exact_match"},
}


def _write(folder: Path, local: dict[str, dict[str, Any]] = LOCAL, **evaluate: Any) -> Path:
    """A recipe whose benchmarks are over files beside it."""
    path = write_small_recipe(folder, evaluate={"local": local, **evaluate})
    write_rows(folder / "questions.jsonl", questions())
    write_rows(folder / "few.jsonl", questions()[:12])
    return path


def _pretrained(recipe: Path, out: Path, made: dict[str, Path] | None = None) -> Path:
    """A run directory as `pretrain` leaves it, with these models: seed 1 has seen the answers, seed 2 nothing."""
    made = made or models()
    with open_run(load_recipe(recipe), out) as run:
        step = run.step("pretrain")
        for seed, name in ((1, "trained"), (2, "random")):
            paths = [f"pretrain/models/quadmix-{seed}/{file}" for file in ("model.safetensors", "config.json")]
            with step.writing(*paths) as temporary:
                for path, source in zip(temporary, ("model.safetensors", "config.json"), strict=True):
                    shutil.copyfile(made[name] / source, path)
        step.finish(headline="models of a test")
    return out


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def evaluated(recipe: Path) -> Path:
    """The run directory after an evaluation; tests only read it."""
    out = _pretrained(recipe, recipe.parent / "out")
    with open_run(load_recipe(recipe), out) as run:
        run_steps(run, ("evaluate",))
    return out


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """No connection can be made; says which were tried, and what was written to the cache of data sets."""
    tried: list[Any] = []

    def refuse(*given: Any, **_: Any) -> None:
        tried.append(given)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return lambda: [*tried, *(tmp_path / "cache").rglob("*")]


def _scores(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluate" / "scores.json").read_text(encoding="utf-8"))


def _artifacts(out: Path) -> dict[str, int]:
    """The scores of every task and model, and when they were written."""
    files = (out / "evaluate" / "benchmarks").glob("*/*.json")
    return {str(path.relative_to(out / "evaluate" / "benchmarks")): path.stat().st_mtime_ns for path in files}


def _quadmix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["quadmix", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def _check_by_hand(out: Path, rows: dict[str, list[dict]]) -> None:
    """Every score of every model is what one computes without the harness, and the trained model is above chance."""
    found = _scores(out)
    for seed in ("1", "2"):
        model = out / "pretrain" / "models" / f"quadmix-{seed}"
        for name, each in rows.items():
            metrics = {key: metric["value"] for key, metric in found["seeds"][seed][name]["metrics"].items()}
            if "acc" in metrics:
                assert metrics == pytest.approx(accuracies(model, each))
                chance = sum(1 / len(row["choices"]) for row in each) / len(each)
                stderr = (chance * (1 - chance) / len(each)) ** 0.5
                lift = (metrics["acc_norm"] - chance) / stderr  # the sum alone favours short choices
                assert lift > 3 if seed == "1" else abs(lift) < 3
            elif "bits_per_byte" in metrics:
                assert metrics["bits_per_byte"] == pytest.approx(ratio(bits_and_bytes(model, each)), abs=1e-4)
    for name, task in found["tasks"].items():
        both = [found["seeds"][seed][name]["metrics"][task["metric"]] for seed in ("1", "2")]
        assert task["value"] == pytest.approx(sum(one["value"] for one in both) / 2)
        assert task["stderr"] == pytest.approx((sum(one["stderr"] ** 2 for one in both) / 2) ** 0.5)
        assert task["sd"] == pytest.approx(abs(both[0]["value"] - both[1]["value"]) / 2**0.5)


def test_the_command_evaluates_local_files_without_a_network(
    recipe: Path, tmp_path: Path, no_network: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = _pretrained(recipe, tmp_path / "out")
    code, said, err = _quadmix(monkeypatch, capsys, "evaluate", str(recipe), "--out", str(out))
    assert (code, no_network()) == (0, []), err
    assert "evaluate" in said
    assert "2 models: choice acc_norm " in said
    _check_by_hand(out, {"choice": questions(), "bits": questions()})
    exact = [_scores(out)["seeds"][seed]["exact"]["metrics"]["exact_match"]["value"] for seed in ("1", "2")]
    assert exact[0] > 0.5 > exact[1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published benchmarks' rows are not on this machine")
def test_published_benchmarks_as_local_files(
    tmp_path: Path, no_network: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    rows = {}
    for name in ("arc_easy_train", "openbookqa_train", "piqa_train", "triviaqa_llmfoundry"):
        table = pq.read_table(SHARED / f"{name}.parquet").to_pylist()
        short = [row for row in table if len(row["prompt"]) + len(row["response"]) < 100][:18]
        rows[name] = [{**row, "answer": row["answer_index"]} for row in short]
        write_rows(tmp_path / f"{name}.jsonl", short)
    local: dict[str, dict[str, Any]] = {name: {"path": f"{name}.jsonl", "answer": "answer_index"} for name in rows}
    local["triviaqa_llmfoundry"]["kind"] = "bits_per_byte"
    recipe = _write(tmp_path, local)
    out = _pretrained(recipe, tmp_path / "out", train(tmp_path, [row for each in rows.values() for row in each]))
    code, _, err = _quadmix(monkeypatch, capsys, "evaluate", str(recipe), "--out", str(out), "--json")
    assert (code, no_network()) == (0, []), err
    _check_by_hand(out, rows)
    bits = [_scores(out)["seeds"][seed]["triviaqa_llmfoundry"]["metrics"]["bits_per_byte"] for seed in ("1", "2")]
    assert bits[0]["value"] < 0.5 * bits[1]["value"]


def test_scores_are_in_the_tables_and_in_the_report(evaluated: Path, recipe: Path) -> None:
    found = _scores(evaluated)
    assert found["order"] == list(LOCAL)
    assert (found["limit"], found["average"]) == (None, None)  # none of the paper's nine is among them
    text = (evaluated / "evaluate" / "scores.md").read_text(encoding="utf-8")
    task = found["tasks"]["choice"]
    assert f"| choice | 0 | acc_norm | {task['value']:.4f} ± {task['stderr']:.4f} | {task['sd']:.4f} | 2 | 45 |" in text
    rows = list(csv.DictReader((evaluated / "evaluate" / "scores.csv").open(encoding="utf-8")))
    assert [(row["task"], row["metric"], row["told by"]) for row in rows if row["task"] == "choice"] == [
        ("choice", "acc", "False"),
        ("choice", "acc_norm", "True"),
    ]
    assert [float(row["seed 2"]) for row in rows if row["metric"] == "bits_per_byte"] == [
        found["seeds"]["2"]["bits"]["metrics"]["bits_per_byte"]["value"]
    ]
    with open_run(load_recipe(recipe), evaluated) as run:
        page = render(ReportData("x", evaluation=read_summary(run)))
    for name in LOCAL:
        task = found["tasks"][name]
        assert f"<span>{name}</span></th><td>0</td><td>{task['metric']}</td><td>{task['value']:.4f}<br>" in page
    assert 'href="#benchmarks"' in page


def test_a_finished_evaluation_is_not_repeated_and_a_new_task_is_all_that_runs(
    evaluated: Path, recipe: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(evaluated, tmp_path / "out")
    before = _artifacts(out)
    assert len(before) == 2 * len(LOCAL)
    with open_run(load_recipe(recipe), out) as run:
        assert "already done" in run_steps(run, ("evaluate",))["headlines"][0]
    more = json.dumps({**LOCAL, "few": {**LOCAL["choice"], "fewshot": 2}})
    changed = load_recipe(recipe, [f"evaluate.local={more}"])
    assert next(row for row in make_plan(changed, out, trial=False)["steps"] if row["step"] == "evaluate") == {
        "step": "evaluate", "state": "done for other tasks", "work": "2 models: choice, bits, exact, few",
    }  # fmt: skip
    with open_run(changed, out) as run:  # pretrain, which is before it, and compare, which is after, are not stale
        run_steps(run, ("evaluate",))
    assert _scores(out)["tasks"]["few"]["shots"] == 2
    after = _artifacts(out)
    assert {path: after[path] for path in before} == before
    assert sorted(path.split("/")[1] for path in after.keys() - before.keys()) == ["quadmix-1.json", "quadmix-2.json"]
    with open_run(load_recipe(recipe, ["evaluate.local={}"]), out) as run:
        assert "no tasks; set evaluate.tasks" in run_steps(run, ("evaluate",))["headlines"][0]


def test_what_is_asked_is_the_content_of_files_and_not_the_size_of_batches(recipe: Path, tmp_path: Path) -> None:
    def keys(*overrides: str) -> dict[str, str]:
        with open_run(load_recipe(recipe, list(overrides)), tmp_path / "out") as run:
            return task_keys(run)

    before = keys()
    assert keys("evaluate.batch_size=3") == before
    assert all(keys("evaluate.limit=3")[name] != before[name] for name in before)
    assert keys("evaluate.local.bits.mask_prompt=false").items() - before.items() == {
        ("bits", keys("evaluate.local.bits.mask_prompt=false")["bits"])
    }
    path = recipe.parent / "questions.jsonl"
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text.replace("Earth", "Venus"), encoding="utf-8")
        assert {name for name, key in keys().items() if key != before[name]} == {"choice", "bits"}
    finally:
        path.write_text(text, encoding="utf-8")
    assert keys() == before


def test_dropped_rows_are_told(tmp_path: Path) -> None:
    recipe = _write(tmp_path, {"choice": LOCAL["choice"]})
    rows = questions()
    write_rows(tmp_path / "questions.jsonl", [*rows[:4], {**rows[4], "choices": None}, {**rows[5], "answer": None}])
    out = _pretrained(recipe, tmp_path / "out")
    with open_run(load_recipe(recipe), out) as run:
        headline = run_steps(run, ("evaluate",))["headlines"][0]
    assert headline.endswith("; 2 rows of choice dropped")
    assert _scores(out)["tasks"]["choice"]["dropped"] == {"no choices": 1, "no answer": 1}
    text = (out / "evaluate" / "scores.md").read_text(encoding="utf-8")
    assert "choice: rows dropped: 1 with no answer, 1 with no choices." in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.local.choice.path=none.jsonl", "evaluate.local.choice.path: .*none.jsonl.*: no such file or folder"),
        ("evaluate.local.choice.answer=label", "evaluate.local.choice.answer: no column 'label'.*found task, prompt"),
        ("evaluate.tasks=[arc_eazy]", "evaluate.tasks: 'arc_eazy' is not among"),
        ("evaluate.local.piqa={path: questions.jsonl}", "evaluate.local.piqa: a task of lm-eval.* has this name"),
    ],
)
def test_faults_are_found_before_any_work(recipe: Path, tmp_path: Path, override: str, message: str) -> None:
    changed = load_recipe(recipe, [override])
    with open_run(changed, tmp_path / "out") as run, pytest.raises(RecipeError, match=message):
        run_steps(run)
    assert not (tmp_path / "out" / "labels").exists()
    with pytest.raises(RecipeError, match=message):
        make_plan(changed, tmp_path / "out", trial=False)


def test_examples_before_each_question_as_the_recipe_says(recipe: Path, tmp_path: Path) -> None:
    def settings(*overrides: str) -> Any:
        with open_run(load_recipe(recipe, list(overrides)), tmp_path / "out") as run:
            return harness_settings(run)

    assert settings("evaluate.tasks=[piqa, mmlu]", "evaluate.fewshot=3").tasks == (("piqa", 3), ("mmlu", 3))
    found = settings("evaluate.tasks={piqa: 2, mmlu: null}", "evaluate.fewshot=3", "evaluate.local.bits.fewshot=1")
    assert found.tasks == (("piqa", 2), ("mmlu", None))
    assert {task.name: task.shots for task in found.local} == {"choice": 3, "bits": 1, "exact": 3}
    suite = dict(settings("evaluate.tasks=[paper]", "evaluate.fewshot=3").tasks)
    assert suite == {each.task: each.shots for each in PAPER_TASKS}
    assert dict(settings("evaluate.tasks={paper: null, piqa: 10}").tasks) == {**suite, "piqa": 10}
    assert set(dict(settings("evaluate.tasks={paper: 0}").tasks).values()) == {0}


def test_the_paper_suite_is_known_to_the_harness_and_its_average_to_the_report(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nine by name; SVAMP is ours. One of them with data of one's own stands for itself, eight are missing."""
    monkeypatch.setenv(TASK_CODE, "1")
    with open_run(load_recipe(recipe, ["evaluate.tasks=[paper]"]), tmp_path / "names") as run:
        harness_settings(run).check_names()
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = write_rows(folder / "svamp.jsonl", [{"Body": "", "Question": "1 + 1?", "Answer": i} for i in range(7)])
    files = json.dumps({"data_files": {"train": str(data), "test": str(data)}, "cache_dir": str(folder / "cache")})
    text = (TASK_FOLDER / "svamp.yaml").read_text(encoding="utf-8")
    here = text.replace("dataset_path: ChilleD/SVAMP", f"dataset_path: json\ndataset_kwargs: {files}")
    (folder / "svamp.yaml").write_text(here, encoding="utf-8")
    asked = [f"evaluate.task_folder={folder}", "evaluate.tasks={svamp: 1}", "evaluate.local={}"]
    out = _pretrained(recipe, tmp_path / "out")
    with open_run(load_recipe(recipe, asked), out) as run:
        run_steps(run, ("evaluate",))
        page = render(ReportData("x", evaluation=read_summary(run)))
    average = _scores(out)["average"]
    assert average["value"] is None
    assert average["groups"]["math"]["value"] == _scores(out)["tasks"]["svamp"]["value"]
    missing = ", ".join(each.benchmark for each in PAPER_TASKS if each.benchmark != "SVAMP")
    assert f"No average of the paper&#39;s nine: {missing} missing." in page


def test_the_papers_recipe_asks_for_the_papers_tasks() -> None:
    content = yaml.safe_load((ROOT / "pipelines" / "recipes" / "paper.yaml").read_text(encoding="utf-8"))
    assert content["evaluate"] == {"tasks": ["paper"]}
