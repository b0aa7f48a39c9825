"""The label step of a run: optional columns, estimates and what is recorded of the models."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from small_run import MODELS, write_small_recipe

from quadmix_plugin.config import Recipe, load_recipe
from quadmix_plugin.errors import InputError
from quadmix_plugin.pipelines.context import open_run
from quadmix_plugin.pipelines.plan import make_plan
from quadmix_plugin.pipelines.run import run_steps
from quadmix_plugin.stages.scorers.ask_llm import AskLLM


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


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        ("scorers", {"ask-llm": {"model": "NO_WEIGHTS"}}, r"only pytorch_model\.bin, which is not read"),
        ("scorers", {"ask-llm": {"model": "TRUNCATED"}}, r"model\.safetensors: damaged or incomplete"),
        ("scorers", {"dclm-fasttext": {"model": "CUT_FASTTEXT"}}, r"model\.bin: "),
        ("scorers", {"dclm-fasttext": {"sha256": "0" * 64}}, r"sha256 is"),
        ("scorers", {"fineweb-edu": {"model": str(MODELS / "ask-llm")}}, r"fineweb-edu needs a regression model"),
        ("scorers", {"ask-llm": {"model": "a/b", "revision": "0" * 40}}, r"'a/b' at 0{40}: cannot be fetched"),
        ("scorers", {"ask-llm": {"prompt": "Is {document} " + "very " * 200 + "good?"}}, r"the prompt alone takes"),
        ("domain", {"model": "SWAPPED"}, r"in another order, first 'Finance' as 0 in place of 'Adult'"),
        ("domain", {"classifier": "fasttext", "model": "TEXT"}, r"not a fastText model"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_before_the_corpus_is_read(
    tmp_path, monkeypatch, small, broken, section, change, says
):
    """The corpus is not even there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = (
        {name: dict(given) for name, given in change.items()} if section == "scorers" else {"domain": dict(change)}
    )
    for name, given in options.items():
        model = given.get("model", str(MODELS / name))
        given["model"] = broken.get(model, model)
    changed = {**small.model_dump(), section: options["domain"] if section == "domain" else options}
    changed["corpus"]["path"] = str(tmp_path / "corpus.parquet")
    (tmp_path / "corpus.parquet").write_bytes(b"not Parquet")
    recipe = Recipe.model_validate(changed)
    with open_run(recipe, tmp_path / "out") as run, pytest.raises(InputError, match=says) as caught:
        run_steps(run, ["label"])
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Recipe:
    return load_recipe(write_small_recipe(tmp_path_factory.mktemp("recipe")))


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, str]:
    """A model of each kind of damage, by what is wrong with it."""
    folder = tmp_path_factory.mktemp("broken")
    found = {name: folder / name for name in ("NO_WEIGHTS", "TRUNCATED", "CUT_FASTTEXT", "SWAPPED", "TEXT")}
    for name in ("NO_WEIGHTS", "TRUNCATED"):
        shutil.copytree(MODELS / "ask-llm", found[name])
    (found["NO_WEIGHTS"] / "model.safetensors").rename(found["NO_WEIGHTS"] / "pytorch_model.bin")
    weights = found["TRUNCATED"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for name, content in (
        ("CUT_FASTTEXT", (MODELS / "dclm-fasttext" / "model.bin").read_bytes()[:-7]),
        ("TEXT", b"x" * 99),
    ):
        found[name].mkdir()
        (found[name] / "model.bin").write_bytes(content)
    shutil.copytree(MODELS / "domain", found["SWAPPED"])
    config = json.loads((found["SWAPPED"] / "config.json").read_text())
    config["id2label"] |= {"0": "Finance", "7": "Adult"}
    del config["label2id"]
    (found["SWAPPED"] / "config.json").write_text(json.dumps(config))
    return {name: str(path) for name, path in found.items()}


def test_plan_fetches_no_model(tmp_path, monkeypatch, broken):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = {"ask-llm": {"model": "somebody/large", "revision": "0" * 40}}
    plan = make_plan(load_recipe(write_small_recipe(tmp_path, scorers=given)), tmp_path / "out")
    assert [row["state"] for row in plan["steps"]].count("done") == 0
    here = {"ask-llm": {"model": broken["TRUNCATED"]}}
    with pytest.raises(InputError, match="damaged or incomplete"):
        make_plan(load_recipe(write_small_recipe(tmp_path, scorers=here)), tmp_path / "out")


def test_a_plug_in_whose_facts_cannot_be_written_is_named_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(AskLLM, "facts", lambda self: {"threshold": float("nan")})
    recipe = load_recipe(write_small_recipe(tmp_path))
    with (
        open_run(recipe, tmp_path / "out") as run,
        pytest.raises(InputError, match=r"ask-llm: its facts are not plain"),
    ):
        run_steps(run, ["label"])
    assert not list((tmp_path / "out" / "labels").glob("*"))
