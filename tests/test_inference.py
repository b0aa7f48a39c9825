"""The inference engine: same scores in any batch, less memory when there is less, nothing lost and no order changed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from small_run import MODELS, ROOT, corpus_texts
from transformers import BertConfig, BertForSequenceClassification

from quadmix_plugin import inference, models
from quadmix_plugin.errors import InputError
from quadmix_plugin.stages.domain_classifiers.nvidia_domain import NvidiaDomain
from quadmix_plugin.stages.scorers.ask_llm import AskLLM
from quadmix_plugin.stages.scorers.fineweb_edu import FineWebEdu

PLUGINS = {"domain": NvidiaDomain, "fineweb-edu": FineWebEdu, "ask-llm": AskLLM}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return corpus_texts(600)


def _ids(n: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 500, int(rng.integers(1, 120))).astype(np.int32) for _ in range(n)]


def _wide_bert() -> BertForSequenceClassification:
    """Wider than the committed models: heads of this width round by the number of rows."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500, hidden_size=384, num_hidden_layers=1, num_attention_heads=6, intermediate_size=512,
        num_labels=1, max_position_embeddings=128,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def _runner(network, tokens: int) -> inference.BatchRunner:
    return inference.BatchRunner(lambda i, m: network(input_ids=i, attention_mask=m).logits, 0, "cpu", tokens)


def test_a_wide_model_gives_the_same_bits_in_every_batch():
    ids = _ids(60)
    network = inference.in_blocks(_wide_bert())
    results = [_runner(network, tokens).run(ids, list) for tokens in (1, 300, 4096, 100_000)]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    order = np.random.default_rng(1).permutation(60)
    np.testing.assert_array_equal(_runner(network, 4096).run([ids[i] for i in order], list), results[0][order])
    np.testing.assert_array_equal(_runner(network, 4096).run(ids[:1], list), results[0][:1])


def test_without_blocks_it_would_not():
    """Shows that the test above can fail."""
    ids = _ids(60)
    network = _wide_bert()
    assert not np.array_equal(_runner(network, 1).run(ids, list), _runner(network, 100_000).run(ids, list))


def test_blocks_change_no_result_beyond_rounding():
    ids = _ids(30)
    plain = _runner(_wide_bert(), 4096).run(ids, list)
    np.testing.assert_allclose(_runner(inference.in_blocks(_wide_bert()), 4096).run(ids, list), plain, atol=1e-6)


def test_windows_keep_the_order(monkeypatch):
    ids = _ids(50)
    network = inference.in_blocks(_wide_bert())
    whole = _runner(network, 4096).run(ids, list)
    monkeypatch.setattr(inference, "_WINDOW", 7)
    np.testing.assert_array_equal(_runner(network, 4096).run(ids, list), whole)


@pytest.mark.parametrize("coarse", [False, True])
def test_every_document_is_in_one_class_that_holds_it_and_pads_little(coarse):
    lengths = list(range(1, 4097))
    classes = inference.length_classes(lengths, coarse=coarse)
    assert sorted(i for rows in classes.values() for i in rows) == list(range(4096))
    for padded, rows in classes.items():
        assert padded % 8 == 0
        for i in rows:
            spare = padded - lengths[i]
            assert 0 <= spare
            assert spare < (8 if padded > 16 and not coarse else 32)  # ask-llm looks for the answer among 32
            if lengths[i] >= 128:
                assert spare / lengths[i] <= (1 / 8 if coarse else 1 / 16)


def test_no_document_is_padded_beyond_what_the_model_reads():
    classes = inference.length_classes([3, 90, 99, 100], 100)
    assert classes == {16: [0], 96: [1], 100: [2, 3]}


def test_a_model_of_few_positions_reads_as_many_by_default_and_refuses_more(tmp_path):
    """The tokenizer would allow 512; the committed model has 96 positions."""
    folder = Path(shutil.copytree(MODELS / "fineweb-edu", tmp_path / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 512}))
    scorer = FineWebEdu(model=str(folder))
    scorer.setup("cpu")
    assert scorer.length == 96
    assert np.isfinite(scorer.score(["many words " * 300])).all()
    with pytest.raises(InputError, match="max_length: 600, and the model has 96 positions"):
        FineWebEdu(model=str(folder), max_length=600).check()


def test_padding_is_the_one_that_the_model_looks_for(tmp_path):
    """A decoder with a head takes a document's last token to be the one before its own padding."""
    folder = Path(shutil.copytree(MODELS / "fineweb-edu", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 7}))
    with pytest.raises(InputError, match="pad_token_id is 7 in the config and 0 in the tokenizer"):
        FineWebEdu(model=str(folder)).check()


_STARVED = """
import resource, sys
import numpy as np, torch
sys.path.insert(0, "tests")
from test_inference import _ids, _runner, _wide_bert
from quadmix_plugin import inference
from quadmix_plugin.errors import InputError

network = inference.in_blocks(_wide_bert())
ids = [np.full(120, 7 + i % 400, dtype=np.int32) for i in range(512)]
small = _runner(network, 1024)
expected = small.run(ids, list)
torch.set_num_threads(1)
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
spare = int(sys.argv[1]) << 20
resource.setrlimit(resource.RLIMIT_AS, (now + spare, now + spare))
runner = _runner(network, 1 << 16)
try:
    found = runner.run(ids, list)
except InputError as error:
    print("refused", runner.halvings, error)
else:
    print("halved", runner.halvings, np.array_equal(found, expected))
"""


@pytest.mark.parametrize(("spare", "says"), [(200, "halved [123] True"), (4, "refused .* not enough memory on cpu")])
def test_a_batch_that_does_not_fit_is_halved_up_to_three_times_with_the_same_scores(spare, says):
    """A real limit on the address space, in a process of its own; 65,536 tokens want about half a gigabyte."""
    command = [sys.executable, "-c", _STARVED, str(spare)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.match(says, done.stdout.splitlines()[-1]), done.stdout


def test_another_error_is_not_taken_for_want_of_memory():
    def forward(ids, mask):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        inference.BatchRunner(forward, 0, "cpu").run(_ids(3), list)


@pytest.mark.parametrize("name", sorted(PLUGINS))
def test_bfloat16_keeps_the_order_of_documents(name, texts):
    """What a GPU computes in; here on the CPU, by the same code."""
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        plugin = PLUGINS[name](model=str(MODELS / name))
        plugin.setup("cpu")
        plugin._network.to(dtype)
        results.append(plugin.run(texts))
    for column in range(results[0].shape[1]):
        assert spearmanr(results[0][:, column], results[1][:, column])[0] >= 0.999


@pytest.mark.parametrize("bad", [{"tokens_per_batch": 0}, {"max_length": 0}])
def test_sizes_that_cannot_be_are_refused_at_once(bad):
    with pytest.raises(InputError, match="at least 1"):
        FineWebEdu(model=str(MODELS / "fineweb-edu"), **bad)


def test_use_before_setup_says_so():
    with pytest.raises(InputError, match=r"not loaded; call setup"):
        FineWebEdu(model=str(MODELS / "fineweb-edu")).score(["a"])


def test_special_tokens_of_a_tokenizer_that_cuts_at_the_left_are_kept(tmp_path):
    folder = Path(shutil.copytree(MODELS / "fineweb-edu", tmp_path / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"truncation_side": "left"}))
    tokenizer = models.load_transformers_tokenizer(folder)
    text = "one two three four five six seven eight nine ten " * 3
    [ids] = inference.token_ids(tokenizer, [text], 12)
    assert ids.tolist() == tokenizer(text, truncation=True, max_length=12)["input_ids"]


def test_ids_are_those_of_transformers_itself(texts):
    tokenizer = models.load_transformers_tokenizer(MODELS / "fineweb-edu")
    for length in (8, 96, 512):
        found = inference.token_ids(tokenizer, texts[:200], length)
        assert [row.tolist() for row in found] == tokenizer(texts[:200], truncation=True, max_length=length)[
            "input_ids"
        ]
