"""The label stages add one column each to any kind of Curator batch and travel without their models."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.resources import Resources
from nemo_curator.stages.text.io.reader import JsonlReader, ParquetReader
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin import token_counts
from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.executors import InlineExecutor
from quadmix_plugin.stages import CountTokens, DomainClassify, QualityScore

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
MODELS = QUICKSTART / "models"
NAMES = ("domain", "score_fineweb-edu", "score_dclm-fasttext", "score_ask-llm", "tokens")


def label_stages() -> list:
    scorers = ("fineweb-edu", "dclm-fasttext", "ask-llm")
    return [
        DomainClassify(options={"model": str(MODELS / "domain")}, device="cpu"),
        *(QualityScore(scorer, {"model": str(MODELS / scorer)}, device="cpu") for scorer in scorers),
        CountTokens(str(MODELS / "tokenizer")),
    ]


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return pq.read_table(QUICKSTART / "corpus.parquet", columns=["doc_id", "text"]).slice(0, 60)


@pytest.fixture(scope="module")
def expected(table: pa.Table) -> pa.Table:
    return run(label_stages(), table).data


def run(stages: list, data) -> DocumentBatch:
    task = DocumentBatch(dataset_name="corpus", data=data, _metadata={"source_files": ["a.parquet"], "own": 1})
    for stage in stages:
        stage.setup()
        (task,) = stage.process_batch([task])
    return task


def frames(table: pa.Table) -> dict:
    return {
        "arrow": table,
        "pandas str": table.to_pandas(),
        "pandas ArrowDtype": table.to_pandas(types_mapper=pd.ArrowDtype),
        "pandas object, odd index": table.to_pandas().astype(object).set_axis(range(100, 160)),
        "arrow large_string": table.cast(pa.schema([("doc_id", pa.string()), ("text", pa.large_string())])),
    }


@pytest.mark.parametrize(
    "kind", ["arrow", "pandas str", "pandas ArrowDtype", "pandas object, odd index", "arrow large_string"]
)
def test_every_kind_of_batch_gives_the_same_labels_in_its_own_kind(kind, table, expected):
    data = frames(table)[kind]
    task = run(label_stages(), data)
    assert type(task.data) is type(data)
    result = task.to_pyarrow()
    for name in NAMES:
        assert result[name].to_pylist() == expected[name].to_pylist()
    assert result["tokens"].type == pa.int64()
    assert result["score_ask-llm"].type == pa.float32()
    if kind == "pandas ArrowDtype":
        assert all(isinstance(dtype, pd.ArrowDtype) for dtype in task.data.dtypes)
    assert (task._metadata, task.dataset_name) == ({"source_files": ["a.parquet"], "own": 1}, "corpus")


def test_performance_records_travel_on_and_the_input_is_untouched(table):
    stage = CountTokens(str(MODELS / "tokenizer"))
    frame = table.to_pandas()
    task = DocumentBatch(dataset_name="corpus", data=frame, _stage_perf=["earlier"])
    result = stage.process(task)
    assert result._stage_perf == ["earlier"]
    assert list(frame.columns) == ["doc_id", "text"]
    assert not result.task_id


def test_tokens_are_counted_without_special_tokens(table):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tokenizer")
    counts = run([CountTokens(str(MODELS / "tokenizer"))], table).data["tokens"].to_pylist()
    assert counts == [len(tokenizer.encode(text, add_special_tokens=False)) for text in table["text"].to_pylist()]


def test_one_odd_row_does_not_end_a_batch(table, expected):
    texts = ["", " ", "\0", "\ud800", "__label__hq", None, table["text"][0].as_py(), "long words " * 900_000]
    frame = pd.DataFrame({"text": pd.Series(texts, dtype=object)})
    result = run(label_stages(), frame).data
    assert len(result) == len(texts)
    assert result["tokens"].tolist()[:2] == [0, 1]
    assert result["tokens"].tolist()[5] == 0  # a missing text counts as empty
    for name in NAMES:
        assert result[name].iloc[6] == expected[name][0].as_py()


@pytest.mark.parametrize("number", range(5))
def test_copies_and_pickles_leave_the_model_behind_and_work(number, table, expected):
    stage = label_stages()[number]
    before = len(pickle.dumps(stage))
    stage.setup()
    for other in (pickle.loads(pickle.dumps(stage)), copy.deepcopy(stage), stage.with_(batch_size=2)):  # noqa: S301
        assert run([other], table).data[NAMES[number]].to_pylist() == expected[NAMES[number]].to_pylist()
    assert len(pickle.dumps(stage)) == before


def test_labels_do_not_depend_on_how_the_corpus_is_cut(table, expected):
    parts = [run(label_stages(), table.slice(start, 13)).data for start in range(0, 60, 13)]
    assert pa.concat_tables(parts).equals(expected)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_they_work_behind_curators_readers(kind, table, expected, tmp_path):
    if kind == "parquet":
        pq.write_table(table, tmp_path / "part.parquet")
        reader = ParquetReader(file_paths=str(tmp_path))
    else:
        table.to_pandas().to_json(tmp_path / "part.jsonl", orient="records", lines=True)
        reader = JsonlReader(file_paths=str(tmp_path))
    pipeline = Pipeline(name="label", stages=[reader, *label_stages()])
    results = pipeline.run(InlineExecutor())
    found = pa.concat_tables([result.to_pyarrow() for result in results])
    for name in NAMES:
        assert found[name].to_pylist() == expected[name].to_pylist()


def test_columns_of_other_tools_are_taken_as_they_are(table):
    data = table.append_column("domain_pred", pa.array(["Law"] * 60))
    data = data.append_column("fineweb-edu-score-float", pa.array(np.arange(60.0)))
    stages = [
        DomainClassify("column", {"column": "domain_pred"}),
        QualityScore("column", {"column": "fineweb-edu-score-float"}, column="score_edu"),
    ]
    assert [stage.resources for stage in stages] == [Resources(cpus=1.0), Resources(cpus=1.0)]
    result = run(stages, data).data
    assert result["domain"].to_pylist() == ["Law"] * 60
    assert result["score_edu"].to_pylist() == list(range(60))
    assert stages[1].inputs() == (["data"], ["fineweb-edu-score-float"])


def test_an_existing_label_column_is_replaced(table):
    data = table.append_column("tokens", pa.array([-1] * 60))
    result = run([CountTokens(str(MODELS / "tokenizer"))], data).data
    assert result.column_names.count("tokens") == 1
    assert min(result["tokens"].to_pylist()) > 0


def test_mistakes_show_at_construction():
    model = str(MODELS / "fineweb-edu")
    with pytest.raises(RecipeError, match="did you mean 'fineweb-edu'"):
        QualityScore("fineweb_edu", {"model": model})
    with pytest.raises(RecipeError, match="did you mean 'model'"):
        QualityScore("fineweb-edu", {"modle": model})
    with pytest.raises(RecipeError, match="no such folder"):
        DomainClassify(options={"model": "no/such/folder"})
    with pytest.raises(InputError, match="no such folder"):
        CountTokens("no/such/folder")
    with pytest.raises(InputError, match="usable GPUs"):
        QualityScore("fineweb-edu", {"model": model}, device="cuda:99")


def test_a_missing_column_is_named(table):
    stage = CountTokens(str(MODELS / "tokenizer"), text_field="body")
    with pytest.raises(InputError, match="no column 'body'; found doc_id, text"):
        stage.process(DocumentBatch(dataset_name="corpus", data=table))


def test_a_column_that_is_not_text_is_refused():
    stage = CountTokens(str(MODELS / "tokenizer"))
    with pytest.raises(InputError, match="text: row 1 is int 3"):
        stage.process(DocumentBatch(dataset_name="corpus", data=pd.DataFrame({"text": ["a", 3]}, dtype=object)))


@pytest.mark.parametrize("kind", ["arrow", "pandas str", "pandas ArrowDtype", "pandas object, odd index"])
def test_the_most_probable_domains_are_kept_best_first(kind, table):
    stage = DomainClassify(options={"model": str(MODELS / "domain")}, top_k=3)
    assert stage.outputs() == (["data"], ["domain", "domain_top", "domain_top_probability"])
    result = run([stage], frames(table)[kind]).to_pyarrow()
    labels, probabilities = stage._handle.ready().probabilities(table["text"].to_pylist())
    for i, row in enumerate(result.to_pylist()):
        assert row["domain"] == row["domain_top"][0]
        assert row["domain_top"] == [labels[m] for m in np.argsort(-probabilities[i], kind="stable")[:3]]
        np.testing.assert_allclose(row["domain_top_probability"], sorted(probabilities[i])[:-4:-1], rtol=1e-6)
    plain = run([DomainClassify(options={"model": str(MODELS / "domain")})], table).data
    assert result["domain"].to_pylist() == plain["domain"].to_pylist()


def test_a_classifier_without_probabilities_has_no_top():
    with pytest.raises(RecipeError, match=r"domain\.top_k: column gives no probabilities; leave top_k out"):
        DomainClassify("column", {"column": "topic"}, top_k=2)
    with pytest.raises(RecipeError, match=r"domain\.top_k: -1"):
        DomainClassify(options={"model": str(MODELS / "domain")}, top_k=-1)


def test_estimated_tokens_come_with_what_they_missed(table):
    counted = run([CountTokens(str(MODELS / "tokenizer"))], table).data["tokens"].to_numpy()
    task = run([CountTokens(str(MODELS / "tokenizer"), estimate=True)], table)
    found = task.to_pyarrow()["tokens"].to_numpy()
    facts = task._metadata["estimate_error"]
    checked = np.array([token_counts.is_checked(text) for text in table["text"].to_pylist()])
    assert facts["documents"] == checked.sum()
    assert facts["tokens"] == counted[checked].sum()
    np.testing.assert_array_equal(found[checked], counted[checked])
    assert 0 < np.abs(found - counted).sum() <= 0.1 * counted.sum()
    assert "estimate_error" not in run([CountTokens(str(MODELS / "tokenizer"))], table)._metadata
