"""The label step of a run: optional columns, estimates and what is recorded of the models."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from small_run import MODELS, write_small_recipe

from quadmix_plugin.config import load_recipe
from quadmix_plugin.pipelines.context import open_run
from quadmix_plugin.pipelines.run import run_steps


def _label(folder: Path, **sections):
    recipe = load_recipe(write_small_recipe(folder, **sections))
    with open_run(recipe, folder / "out") as run:
        run_steps(run, ["label"])
        step = run.step("label")
        tables = [step.read_table(entry.path) for entry in step.entries()]
        return pa.concat_tables(tables), step.summary()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> tuple[pa.Table, dict]:
    """With the most probable domains and estimated tokens."""
    return _label(
        tmp_path_factory.mktemp("label"),
        tokenizer={"estimate": True},
        domain={"top_k": 2},
        executor={"name": "inline"},
    )


def test_labels_hold_the_most_probable_domains(labelled):
    table, _ = labelled
    assert table["domain_top"].type == pa.list_(pa.string())
    for row in table.slice(0, 50).to_pylist():
        assert row["domain"] == row["domain_top"][0]
        assert len(row["domain_top"]) == len(row["domain_top_probability"]) == 2


def test_the_error_of_estimates_is_in_the_summary_and_its_headline(labelled):
    table, summary = labelled
    error = summary["estimate_error"]
    assert table.num_rows / 150 <= error["documents"] <= table.num_rows / 25
    assert 0 < error["mean_error"] < 0.15
    assert summary["headline"] == (
        f"token counts are estimates: off by {error['mean_error']:.1%} a document and {error['bias']:+.1%} in sum, "
        f"measured on {error['documents']:,} documents"
    )


def test_model_and_question_of_ask_llm_are_recorded(labelled):
    _, summary = labelled
    found = summary["plugins"]["quality_score_ask-llm"]
    assert (found["plugin"], found["distribution"], found["higher_is_better"]) == ("ask-llm", "quadmix-plugin", True)
    assert found["options"]["model"] == str(MODELS / "ask-llm")
    assert "{document}" in found["options"]["prompt"]
    assert found["options"]["yes_tokens"] == ["yes", "Yes"]
    assert summary["plugins"]["domain_classify"]["plugin"] == "nvidia-domain"
    json.dumps(summary)


def test_counted_tokens_are_called_no_estimates(finished: Path):
    with open_run(load_recipe(finished.parent / "recipe.yaml"), finished) as run:
        summary = run.step("label").summary()
    assert "estimate_error" not in summary
    assert "headline" not in summary
