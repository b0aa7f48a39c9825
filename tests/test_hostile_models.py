"""A model, tokenizer or checkpoint that brings code, or is not what it seems, is refused before it is loaded."""

import io
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import MODELS
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from transformers import LlamaConfig

from quadmix_plugin.convert import convert
from quadmix_plugin.embeddings import ModelEmbeddings
from quadmix_plugin.errors import InputError
from quadmix_plugin.harness import TASK_CODE, HarnessSettings, evaluate_model
from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.proxy.checkpoint_files import read_table
from quadmix_plugin.proxy.megatron_checkpoint import load_state, save_state
from quadmix_plugin.proxy.megatron_learner import CPULearner
from quadmix_plugin.proxy.megatron_model import start_parallel_state, stop_parallel_state
from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer
from quadmix_plugin.proxy.model import Shape, load_weights
from quadmix_plugin.stages.domain_classifiers.fasttext import FastTextDomain
from quadmix_plugin.stages.domain_classifiers.nvidia_domain import NvidiaDomain
from quadmix_plugin.stages.scorers.ask_llm import AskLLM
from quadmix_plugin.stages.scorers.dclm_fasttext import DCLMFastText
from quadmix_plugin.stages.scorers.fineweb_edu import FineWebEdu

CPU = torch.device("cpu")
LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    architectures=["LlamaForCausalLM"],
).to_dict()  # fmt: skip
LOADERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "fineweb-edu": ("fineweb-edu", lambda folder: FineWebEdu(model=folder).setup("cpu")),
    "ask-llm": ("ask-llm", lambda folder: AskLLM(model=folder).setup("cpu")),
    "nvidia-domain": ("domain", lambda folder: NvidiaDomain(model=folder).setup("cpu")),
    "embeddings": ("fineweb-edu", lambda folder: ModelEmbeddings(model=folder).setup("cpu")),
    "converted": ("fineweb-edu", lambda folder: load_weights(Path(folder))),
    "evaluated": ("fineweb-edu", lambda folder: evaluate_model(folder, folder, HarnessSettings(), "cpu")),
}
"""Whatever loads a model in transformers' format: a model to spoil, and how it is loaded."""


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _code(folder: Path, canary: Path) -> None:
    """A module beside the model, as ``auto_map`` names one."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Model: pass\n", encoding="utf-8")


def _edit(path: Path, **change: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **change}), encoding="utf-8")


def _only_pickle(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Canary(canary), folder / "pytorch_model.bin")


def _pickle_by_another_name(folder: Path, canary: Path) -> None:
    torch.save(Canary(canary), folder / "model.safetensors")


def _plain_pickle_by_another_name(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(canary), protocol=0))


def _index_to_a_pickle(folder: Path, canary: Path) -> None:
    _only_pickle(folder, canary)
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _auto_map(folder: Path, canary: Path) -> None:
    _code(folder, canary)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    _edit(
        folder / "config.json", auto_map=dict.fromkeys(names, "evil.Model"), model_type="evil", trust_remote_code=True
    )


def _auto_map_in_a_list(folder: Path, canary: Path) -> None:
    _code(folder, canary)
    _edit(folder / "config.json", parts=[{"auto_map": {"AutoModel": "evil.Model"}}])


def _adapter(folder: Path, canary: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}), encoding="utf-8")
    torch.save(Canary(canary), folder / "adapter_model.bin")


def _kernel(folder: Path, canary: Path) -> None:
    _edit(folder / "config.json", _attn_implementation="evil/kernel")


def _internal_kernel(folder: Path, canary: Path) -> None:  # CVE-2026-4372
    _edit(folder / "config.json", _attn_implementation_internal="evil/kernel")


def _trust_in_a_part(folder: Path, canary: Path) -> None:  # CVE-2026-5241
    part = {"model_type": "superpoint", "_name_or_path": "evil/model", "trust_remote_code": True}
    _edit(folder / "config.json", keypoint_detector_config=part)


def _other_weights(folder: Path, canary: Path) -> None:
    torch.save(Canary(canary), folder / "other.bin")
    _edit(folder / "config.json", transformers_weights="other.bin")


ATTACKS = {
    _only_pickle: r"found only pytorch_model\.bin, which is not read because loading it can run code",
    _pickle_by_another_name: r"model\.safetensors: damaged or incomplete",
    _plain_pickle_by_another_name: r"model\.safetensors: damaged or incomplete",
    _index_to_a_pickle: "only safetensors files in the folder itself are read",
    _auto_map: r"config\.json: the model asks to run code of its own .*\(auto_map\)",
    _auto_map_in_a_list: r"config\.json: the model asks to run code of its own .*\(auto_map\)",
    _adapter: r"adapter_config\.json: an adapter, which is not read",
    _kernel: r"\(_attn_implementation\)",
    _internal_kernel: r"\(_attn_implementation_internal\)",
    _trust_in_a_part: r"\(trust_remote_code\)",
    _other_weights: r"\(transformers_weights\)",
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda each: each.__name__.strip("_"))
def test_a_model_with_code_is_refused(attack: Callable, loader: str, tmp_path: Path) -> None:
    name, load = LOADERS[loader]
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(MODELS / name, folder)
    if loader == "converted":
        (folder / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    attack(folder, canary)
    with pytest.raises(InputError, match=ATTACKS[attack]) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_with_code_is_refused(file: str, tmp_path: Path) -> None:
    """By every way to a tokenizer but that of ``tokenizer.json`` alone, which can name no code."""
    folder, canary = tmp_path / "tokenizer", tmp_path / "canary"
    shutil.copytree(MODELS / "ask-llm", folder)
    _code(folder, canary)
    _edit(folder / file, auto_map={"AutoTokenizer": ["evil.Model", None]}, tokenizer_class="Evil")
    with pytest.raises(InputError, match=rf"{file}: the model asks to run code of its own .*\(auto_map\)"):
        AskLLM(model=str(folder)).check()
    load_tokenizer(str(folder))
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(InputError, match=rf"{file}: the model asks to run code of its own .*\(auto_map\)"):
        load_tokenizer(str(folder))
    assert not canary.exists()


# --- fastText


def _numbers(at: int, kind: str, *values: int) -> bytes:
    """The committed model with numbers of its header changed."""
    data = bytearray((MODELS / "dclm-fasttext" / "model.bin").read_bytes())
    struct.pack_into(kind, data, at, *values)
    return bytes(data)


_ARGUMENTS, _DICTIONARY = 8, 8 + 12 * 4 + 8  # magic and version; 12 ints and a double


@pytest.mark.parametrize(
    "data",
    [
        _numbers(_ARGUMENTS, "<i", 2**31 - 1),  # dimensions
        _numbers(_ARGUMENTS + 8 * 4, "<i", 2**31 - 1),  # buckets
        _numbers(_DICTIONARY, "<3i", 2**31 - 1, 2**31 - 3, 2),  # entries, words, labels
        _numbers(_DICTIONARY, "<3i2q", -1, -1, -1, 2**62, 2**62),
        (MODELS / "dclm-fasttext" / "model.bin").read_bytes()[:5000],
    ],
    ids=["dimensions", "buckets", "words", "negative", "truncated"],
)
def test_a_fasttext_file_that_says_it_is_huge_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(InputError, match=r"model\.bin: damaged \("):
        DCLMFastText(model=str(tmp_path)).check()


def test_a_fasttext_file_is_the_one_that_was_pinned(tmp_path: Path) -> None:
    """Labels that were exchanged make a sound file, which only its digest tells."""
    plain = (MODELS / "dclm-fasttext" / "model.bin").read_bytes()
    pinned = DCLMFastText(model=str(MODELS / "dclm-fasttext")).facts()["sha256"]
    good, bad = (plain.index(label) for label in (b"__label__hq", b"__label__cc"))
    swapped = bytearray(plain)
    swapped[good : good + 11], swapped[bad : bad + 11] = b"__label__cc", b"__label__hq"
    (tmp_path / "model.bin").write_bytes(swapped)
    DCLMFastText(model=str(tmp_path)).check()
    for plugin in (DCLMFastText(str(tmp_path), sha256=pinned), FastTextDomain(str(tmp_path), sha256=pinned)):
        with pytest.raises(InputError, match=f"sha256 is .*, not {pinned}"):
            plugin.check()


# --- checkpoints


@pytest.fixture
def learner():
    start_parallel_state(CPU)
    yield CPULearner(MegatronTrainer(shape="tiny", layers="local"), Shape(2, 16, 2, 32, 16, vocabulary=64), 1, CPU)
    stop_parallel_state()


@pytest.mark.parametrize("part", ["decoder.layers.mlp.linear_fc1._extra_state", "optimizer.state.exp_avg"])
def test_objects_of_a_checkpoint_are_not_unpickled(part: str, tmp_path: Path, learner) -> None:
    """PyTorch's reader unpickles what the table of contents calls an object, without asking what it is."""
    folder, canary = tmp_path / "checkpoint", tmp_path / "canary"
    state = learner.state(loading=True)
    save_state(state, folder, CPU)
    table = read_table(folder)
    name = next(name for name in table.state_dict_metadata if name.startswith(part))
    content = io.BytesIO()
    torch.save(Canary(canary), content)
    (folder / "evil.distcp").write_bytes(content.getvalue())
    place = next(info for index, info in table.storage_data.items() if index.fqn == name)
    places = {index: info for index, info in table.storage_data.items() if index.fqn != name}
    places[MetadataIndex(name)] = replace(place, relative_path="evil.distcp", offset=0, length=len(content.getvalue()))
    table.state_dict_metadata[name], table.storage_data = BytesStorageMetadata(), places
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(InputError, match=r"checkpoint: no checkpoint of this model"):
        load_state(learner.state(loading=True), folder)
    assert not canary.exists()


def test_common_values_of_a_checkpoint_are_not_unpickled(tmp_path: Path, learner, monkeypatch) -> None:
    folder, canary = tmp_path / "checkpoint", tmp_path / "canary"
    save_state(learner.state(loading=True), folder, CPU)
    torch.save({"optimizer": Canary(canary)}, folder / "common.pt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as those set it who load old checkpoints
    with pytest.raises(InputError, match=r"checkpoint: no checkpoint of this model"):
        load_state(learner.state(loading=True), folder)
    assert not canary.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_pickles_beside_a_checkpoint_are_not_converted(tmp_path: Path) -> None:
    folder, canary = tmp_path / "checkpoint", tmp_path / "canary"
    folder.mkdir()
    for name in (".metadata", "common.pt", "__0_0.distcp", "model_optim_rng.pt"):
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(InputError, match="no table of contents of a checkpoint"):
        convert(folder, tmp_path / "out", MODELS / "tokenizer", "<|endoftext|>")
    assert not canary.exists()


# --- tasks of the evaluation


def test_a_task_folder_runs_no_code_unless_the_environment_says_so(tmp_path: Path, monkeypatch) -> None:
    """A recipe names the folder, and who wrote the recipe is not trusted with code."""
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\ndef f(*_): pass\n", encoding="utf-8")
    task = "task: evil\ndataset_path: json\ncustom_dataset: !function evil.f\ntest_split: test\ndoc_to_text: x\n"
    (tmp_path / "evil.yaml").write_text(task, encoding="utf-8")
    monkeypatch.delenv(TASK_CODE, raising=False)
    settings = HarnessSettings((("evil", None),), task_folder=str(tmp_path))
    for use in (settings.check_names, settings.check):
        with pytest.raises(InputError, match=rf"can run code of their own .*set {TASK_CODE}=1 in the environment"):
            use()
    assert not canary.exists()
