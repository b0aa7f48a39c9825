"""Benchmarks: the harness on local tasks gives what one computes by hand, and refuses what is not there in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import MODELS
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.harness import HarnessSettings, evaluate_model, score_columns

QUESTIONS = [
    {"prompt": "The sun rises in the", "choices": [" east", " morning of the day", " x"], "answer": 0},
    {"prompt": "Water is made of hydrogen and", "choices": [" oxygen", " a stone"], "answer": 0},
    {"prompt": "A cat is", "choices": [" an animal", " a number", " a town in the north"], "answer": 2},
    {"prompt": "He went to the", "choices": [" the the", " store"], "answer": 1},
]
TASK = """task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
- {{metric: acc, aggregation: mean, higher_is_better: true}}
- {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks: one over a local file, and one whose file is not there."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    (path / "ours.yaml").write_text(TASK.format(data=path / "questions.jsonl"), encoding="utf-8")
    lost = TASK.format(data=path / "none.jsonl").replace("task: ours", "task: lost")
    (path / "lost.yaml").write_text(lost, encoding="utf-8")
    return path


def _by_hand(model_folder: Path) -> dict[str, float]:
    """Accuracy by the total log-likelihood of each choice, and by that over its characters."""
    tokenizer = Tokenizer.from_file(str(MODELS / "tokenizer" / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    right = {"acc": [], "acc_norm": []}
    for row in QUESTIONS:
        sums = []
        for choice in row["choices"]:
            prompt = tokenizer.encode(row["prompt"], add_special_tokens=False).ids
            whole = tokenizer.encode(row["prompt"] + choice, add_special_tokens=False).ids
            with torch.inference_mode():
                logits = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
            sums.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        lengths = [len(choice) for choice in row["choices"]]
        right["acc"].append(np.argmax(sums) == row["answer"])
        right["acc_norm"].append(np.argmax(np.array(sums) / lengths) == row["answer"])
    return {name: float(np.mean(values)) for name, values in right.items()}


def test_scores_of_a_local_task_are_those_computed_by_hand(finished: Path, folder: Path) -> None:
    model = finished / "pretrain" / "models" / "quadmix-1"
    settings = HarnessSettings(("ours",), str(folder), batch_size=2)
    found = evaluate_model(model, MODELS / "tokenizer", settings, "cpu")
    wanted = _by_hand(model)
    assert {name: found["ours"][name] for name in wanted} == pytest.approx(wanted)
    assert found["ours"]["acc_stderr"] >= 0
    first = evaluate_model(model, MODELS / "tokenizer", HarnessSettings(("ours",), str(folder), limit=1), "cpu")
    assert first["ours"]["acc"] in (0.0, 1.0)


def test_an_unknown_task_and_one_without_data_are_named(finished: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"evaluate\.tasks: 'nope' is not among the [\d,]+ tasks"):
        HarnessSettings(("nope",), str(folder)).manager()
    model = finished / "pretrain" / "models" / "quadmix-1"
    with pytest.raises(QuadmixError, match=r"evaluate\.tasks: lost: .*none\.jsonl"):
        evaluate_model(model, MODELS / "tokenizer", HarnessSettings(("lost",), str(folder)), "cpu")


def test_a_task_is_told_by_its_normalised_accuracy_where_it_has_one() -> None:
    scores = {"a": {"acc": 0.1, "acc_norm": 0.2, "acc_norm_stderr": 0.3}, "b": {"f1": 0.4}, "c": {}}
    assert score_columns(scores, ["a", "b", "c", "d"]) == {"a (acc_norm)": 0.2, "b (f1)": 0.4}
