"""Finds and loads labelling models and tokenizers safely; it knows no scorer and no Curator.

A model is a local folder, or a Hugging Face id with a pinned revision. Only safetensors are read and code that comes
with a model is never run. How a model is run over documents is in ``inference``.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quadmix_plugin.errors import InputError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[0-9a-f]{40}")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # never pickles, never code
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "spm.model", "vocab.txt", "vocab.json")
_TOKENIZER_CONFIGS = ("tokenizer_config.json", "config.json")  # transformers looks for a tokenizer's code in both
_LONGEST_INPUT = 512  # of the published models
CHARACTERS_PER_TOKEN = 8
"""More than text has; where it is not, the whole document is tokenised."""


def choose_device(device: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that exists here; ``auto`` takes a GPU if there is one.

    Raises:
        InputError: another word, or a GPU that is not there.
    """
    if not _DEVICE.fullmatch(device):
        raise InputError(f"device {device!r}: unknown; give auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    if int(device.partition(":")[2] or 0) >= count:
        raise InputError(f"device {device!r}: this machine has {count} usable GPUs; give auto or cpu")
    return device


def is_local(model: str) -> bool:
    """Whether ``model`` is a folder or file that exists."""
    try:
        return bool(model) and Path(model).exists()
    except (OSError, ValueError):  # no name that a file can have
        return False


def check_source(model: str, revision: str | None) -> None:
    """Whether ``model`` can be meant: an existing folder or file, or a hub id with a pinned revision.

    Raises:
        InputError: neither; the message says which of the two it looks like.
    """
    if is_local(model):
        return
    if not _HUB_ID.fullmatch(model):
        raise InputError(f"model {model[:200]!r}: no such folder; give a folder that holds the model, or a hub id")
    if revision is None or not _REVISION.fullmatch(revision):
        raise InputError(
            f"model {model!r}: no such folder, and as a Hugging Face id it needs a pinned revision, not {revision!r}; "
            f"give revision: the 40 hex digits of a commit"
        )


def model_folder(model: str, revision: str | None = None) -> Path:
    """The local folder of a model; fetches it into the hub's cache when ``model`` is a hub id.

    Raises:
        InputError: as ``check_source``; or the hub cannot be reached and the model is not in its cache.
    """
    check_source(model, revision)
    if is_local(model):
        return Path(model).absolute()
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(model, revision=revision, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"])
    except Exception as error:  # the hub's client raises many kinds
        raise InputError(
            f"model {model!r} at {revision}: cannot be fetched ({type(error).__name__}: {first_line(error)}); "
            f"check the network and the id, or download it and give its folder"
        ) from error
    return Path(found)


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``.

    Raises:
        InputError: none there, not a JSON mapping, or it asks for code (``auto_map``, an attention kernel of the hub)
            or for other weights (of another name, or an adapter's).
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; give the folder of a Hugging Face model")
    if (adapter := folder / "adapter_config.json").exists():  # with the package peft, transformers would load it too
        raise InputError(f"{adapter}: an adapter, which is not read; merge it into its model, and give that")
    config = _read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds {type(config).__name__}, not a mapping; fetch the model again")
    return config


def _read_json(path: Path) -> Any:
    """A JSON file of a model that asks for no code."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _refuse_code(content, path)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)}); fetch the model again") from error
    return content


def _refuse_code(config: Any, path: Path) -> None:
    for each in config if isinstance(config, list) else ():
        _refuse_code(each, path)
    for key, value in config.items() if isinstance(config, dict) else ():
        _refuse_code(value, path)
        kernel = "_implementation" in key and "/" in str(value)  # transformers would fetch it from the hub
        if kernel or key in ("auto_map", "transformers_weights") or (key == "trust_remote_code" and value):
            raise InputError(
                f"{path}: the model asks to run code of its own or to read other weights ({key}), which is never done; "
                f"use another model"
            )


def load_config(folder: Path) -> Any:
    """The model's config as transformers reads it.

    Raises:
        InputError: as ``read_config``; one that transformers cannot read.
    """
    from transformers import AutoConfig

    read_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # many kinds, some with several lines
        raise InputError(f"{folder}/config.json: not one that transformers reads ({first_line(error)})") from error


def weights_path(folder: Path) -> Path:
    """The model's safetensors file (or index of such).

    Raises:
        InputError: there is none; pickled weights are not read, since loading them can run code.
    """
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    found = f"only {', '.join(pickles)}, which is not read because loading it can run code" if pickles else "none"
    raise InputError(f"{folder}: needs weights as model.safetensors, found {found}; convert or fetch them")


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files, their headers read, which tells a truncated one.

    Raises:
        InputError: as ``weights_path``; a file that is missing, damaged, outside the folder or not safetensors.
    """
    path = weights_path(folder)
    names = [path.name]
    try:
        if path.suffix == ".json":
            names = sorted({str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()})
        for name in names:
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise InputError(f"{path}: names {name[:100]!r}; only safetensors files in the folder itself are read")
            weight_shapes(folder / name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged or incomplete ({first_line(error)}); fetch the model again") from error
    return [folder / name for name in names]


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight in a safetensors file, from its header.

    Raises:
        InputError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or incomplete ({first_line(error)}); fetch the model again") from error


def load_pretrained(auto_class: Any, folder: Path, device: str) -> Any:
    """A transformers model, ready to infer: float32 on the CPU, bfloat16 on a GPU.

    Raises:
        InputError: as ``read_config`` and ``weight_files``; weights that do not fit the config, or not into memory.
    """
    read_config(folder)
    weight_files(folder)
    try:
        with _quiet_transformers():
            model, info = auto_class.from_pretrained(
                folder,
                dtype=model_dtype(device),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors, config and shape errors have no common class
        _refuse_want_of_memory(error, folder, "cpu")
        raise InputError(
            f"{folder}: cannot be loaded ({type(error).__name__}: {first_line(error)}); fetch the model again"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{folder}: {len(missing)} weights are missing, first {missing[0]!r}; this is not a model of the kind "
            f"{type(model).__name__}"
        )
    return on_device(model.eval(), folder, device)


def on_device(network: "torch.nn.Module", folder: Path, device: str) -> Any:
    """The network on a device, in the type that it computes in there.

    Raises:
        InputError: the device has not enough memory.
    """
    try:
        return network.to(device, model_dtype(device))
    except (RuntimeError, MemoryError) as error:
        _refuse_want_of_memory(error, folder, device)
        raise


def _refuse_want_of_memory(error: BaseException, folder: Path, device: str) -> None:
    if is_out_of_memory(error):
        raise InputError(
            f"{folder}: not enough memory on {device} for the model ({first_line(error)}); use a larger device or a "
            f"smaller model"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice: torch has a class of its own for some of them only."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its bars and tables, which say less than our errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def model_dtype(device: str) -> "torch.dtype":
    """float32 on the CPU, bfloat16 on a GPU."""
    import torch

    return torch.float32 if device == "cpu" else torch.bfloat16


def load_transformers_tokenizer(folder: Path) -> Any:
    """The model's fast tokenizer, as transformers configures it.

    Raises:
        InputError: no tokenizer in the folder, or one that is damaged, asks for code or is not a fast one.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):  # transformers would make an empty one
        raise InputError(f"{folder}: holds no tokenizer; put the tokenizer.json of the model there")
    for name in _TOKENIZER_CONFIGS:
        if (folder / name).is_file():
            _read_json(folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # many kinds, some with several lines
        raise InputError(
            f"{folder}: no usable tokenizer ({type(error).__name__}: {first_line(error)}); the folder must hold the "
            f"model's tokenizer.json and tokenizer_config.json"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: its tokenizer is not a fast one; save it with a tokenizer.json")
    return tokenizer


def load_tokenizer(model: str, revision: str | None = None) -> "Tokenizer":
    """The plain tokenizer of a folder or hub id, without truncation or padding.

    Raises:
        InputError: as ``model_folder`` and ``load_transformers_tokenizer``.
    """
    from tokenizers import Tokenizer

    folder = model_folder(model, revision)
    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            tokenizer = load_transformers_tokenizer(folder).backend_tokenizer
    except InputError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{folder}/tokenizer.json: damaged ({first_line(error)}); fetch it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a document is text, not the end of a document
    return tokenizer


def input_length(tokenizer: Any) -> int:
    """Tokens that a model sees unless told otherwise: the tokenizer's own limit, at most 512."""
    return min(int(tokenizer.model_max_length), _LONGEST_INPUT)


def encodable(text: str) -> str:
    """The text itself, or with ``?`` for lone surrogates, which no encoder accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


def head(text: str, characters: int) -> str:
    """The first ``characters`` up to the last white space among them; the whole text when there is none."""
    if len(text) <= characters:
        return text
    parts = text[:characters].rsplit(maxsplit=1)
    return parts[0] if len(parts) > 1 else text


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
