"""Loads labelling models safely and runs them over documents in batches; it knows no scorer and no Curator.

A model is a local folder, or a Hugging Face id with a pinned revision. Only safetensors are read and code that comes
with a model is never run. Documents are tokenised without padding, grouped by length under a token budget, and
their results come back in the order of the documents.
"""

import contextlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[0-9a-f]{40}")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")  # never pickles, never code
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "spm.model", "vocab.txt", "vocab.json")
_LONGEST_INPUT = 512  # of the published models
_CHARACTERS_PER_TOKEN = 8  # more than text has; where it is not, the whole document is tokenised

# A document's score must not depend on the documents beside it. Measured for BERT, DeBERTa and T5 on CPU: one thread,
# a length that depends on the document alone, and a multiple of 8 rows give the same bits in any company.
_ROW_MULTIPLE = 8
_LENGTH_MULTIPLE = 8


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


def check_source(model: str, revision: str | None) -> None:
    """Whether ``model`` can be meant: an existing folder or file, or a hub id with a pinned revision.

    Raises:
        InputError: neither; the message says which of the two it looks like.
    """
    if Path(model).exists():
        return
    if not _HUB_ID.fullmatch(model):
        raise InputError(f"model {model!r}: no such folder; give a folder that holds the model, or a hub id")
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
    if Path(model).exists():
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
        InputError: none there, not JSON, or it asks to run code of its own (``auto_map``).
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder}: no config.json; give the folder of a Hugging Face model") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); fetch the model again") from error
    if "auto_map" in config:
        raise InputError(
            f"{path}: the model asks to run code of its own (auto_map), which is never done; use another model"
        )
    return config


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


def load_pretrained(auto_class: Any, folder: Path, device: str) -> Any:
    """A transformers model, ready to infer: float32 on the CPU, bfloat16 on a GPU.

    Raises:
        InputError: as ``read_config`` and ``weights_path``; weights that are damaged or do not fit the config.
    """
    read_config(folder)
    weights_path(folder)
    try:
        model, info = auto_class.from_pretrained(
            folder,
            dtype=model_dtype(device),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, config and shape errors have no common class
        raise InputError(
            f"{folder}: cannot be loaded ({type(error).__name__}: {first_line(error)}); fetch the model again"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{folder}: {len(missing)} weights are missing, first {missing[0]!r}; this is not a model of the kind "
            f"{type(model).__name__}"
        )
    return model.eval().to(device)


def model_dtype(device: str) -> "torch.dtype":
    """float32 on the CPU, bfloat16 on a GPU."""
    import torch

    return torch.float32 if device == "cpu" else torch.bfloat16


def load_transformers_tokenizer(folder: Path) -> Any:
    """The model's fast tokenizer, as transformers configures it.

    Raises:
        InputError: no tokenizer in the folder, or one that is damaged or not a fast one.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):  # transformers would make an empty one
        raise InputError(f"{folder}: holds no tokenizer; put the tokenizer.json of the model there")
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


def input_length(tokenizer: Any, max_length: int | None) -> int:
    """Tokens a model sees: ``max_length``, or the tokenizer's own limit but at most 512."""
    return max_length or min(int(tokenizer.model_max_length), _LONGEST_INPUT)


def encodable(text: str) -> str:
    """The text itself, or with ``?`` for lone surrogates, which no encoder accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


def token_ids(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Ids of every text with the model's special tokens, truncated, not padded.

    Of a long text only the head is tokenised: cut at white space, and checked to be long enough.
    """
    whole = [encodable(text) for text in texts]
    heads = [head(text, _CHARACTERS_PER_TOKEN * max_length) for text in whole]
    options: dict[str, Any] = {"truncation": True, "max_length": max_length, "padding": False}
    options |= {"return_attention_mask": False, "return_token_type_ids": False}
    ids = tokenizer(heads, **options)["input_ids"] if heads else []
    for i, (short, text) in enumerate(zip(heads, whole, strict=True)):
        if len(short) < len(text) and len(ids[i]) < max_length:
            ids[i] = tokenizer(text, **options)["input_ids"]
    return ids


def head(text: str, characters: int) -> str:
    """The first ``characters`` up to the last white space among them; the whole text when there is none."""
    if len(text) <= characters:
        return text
    parts = text[:characters].rsplit(maxsplit=1)
    return parts[0] if len(parts) > 1 else text


def run_batches(
    ids: Sequence[Sequence[int]],
    forward: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]",
    *,
    pad_id: int,
    device: str,
    tokens_per_batch: int,
) -> NDArray[np.float32]:
    """``forward(ids [b, t], mask [b, t]) -> [b, k]`` over all documents: float32 [n, k] in the order given.

    A document is padded to the next multiple of 8 tokens, whatever its neighbours are, and a batch to a multiple of
    8 rows; on the CPU one thread computes. So a document has the same result, to the bit, in every batch.
    """
    import torch

    rows: dict[int, NDArray[np.float32]] = {}
    with torch.inference_mode(), _one_thread(device):
        for length, batch in _batches([len(i) for i in ids], tokens_per_batch):
            padded = batch + [batch[-1]] * (-len(batch) % _ROW_MULTIPLE)
            inputs = torch.full((len(padded), length), pad_id, dtype=torch.long)
            mask = torch.zeros_like(inputs)
            for row, i in enumerate(padded):
                inputs[row, : len(ids[i])] = torch.tensor(ids[i], dtype=torch.long)
                mask[row, : len(ids[i])] = 1
            result = forward(inputs.to(device), mask.to(device)).float().cpu().numpy()
            rows.update(zip(batch, result, strict=False))  # the rows that only fill up the batch are left over
    return np.stack([rows[i] for i in range(len(ids))]) if ids else np.empty((0, 1), dtype=np.float32)


def _batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[tuple[int, list[int]]]:
    """Padded length and document positions of each batch, longest first, so that too little memory shows at once."""
    classes: dict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(lengths):
        classes[max(1, -(-length // _LENGTH_MULTIPLE)) * _LENGTH_MULTIPLE].append(i)
    for length in sorted(classes, reverse=True):
        size = max(1, tokens_per_batch // (length * _ROW_MULTIPLE)) * _ROW_MULTIPLE
        members = classes[length]
        for start in range(0, len(members), size):
            yield length, members[start : start + size]


@contextlib.contextmanager
def _one_thread(device: str) -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
