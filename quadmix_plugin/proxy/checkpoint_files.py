"""The weights in a distributed checkpoint of megatron-core, read without megatron-core, a GPU or a group of processes.

The table of contents of such a checkpoint is pickled. It is read here by an unpickler that knows PyTorch's own classes
of such tables and nothing else, so that a checkpoint cannot bring code with it.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from quadmix_plugin.errors import InputError
from quadmix_plugin.models import first_line

_TABLE = ".metadata"
_LAYERS = "decoder.layers."
_NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state")
_CLASSES_OF = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner"))
"""Megatron-core's own writer, on GPUs, leaves the plan by which it wrote."""
_OTHERS = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"), ("collections", "OrderedDict"), ("builtins", "set"),
}  # fmt: skip


def read_table(folder: Path) -> Metadata:
    """The table of contents of a checkpoint.

    Raises:
        InputError: none there, a damaged one, or one that names anything but tensors.
    """
    path = folder / _TABLE
    try:
        with path.open("rb") as file:
            table = _Unpickler(file).load()
    except (OSError, EOFError, ValueError, pickle.UnpicklingError, AttributeError, ImportError, IndexError) as error:
        raise InputError(
            f"{path}: no table of contents of a checkpoint ({first_line(error)}); give the folder of one"
        ) from error
    if not isinstance(table, Metadata):
        raise InputError(f"{path}: a {type(table).__name__}, no table of contents; give the folder of a checkpoint")
    return table


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a ``GPTModel`` under its names, as they were saved, on the CPU; nothing of optimizers.

    Raises:
        InputError: as ``read_table``, or a file of the checkpoint is missing or damaged.
    """
    table = read_table(folder)
    wanted = {
        name: torch.empty(part.size, dtype=part.properties.dtype)
        for name, part in table.state_dict_metadata.items()
        if isinstance(part, TensorStorageMetadata) and not name.startswith(_NOT_WEIGHTS)
    }
    if not wanted:
        raise InputError(f"{folder}: no weights in this checkpoint; give the folder of one of a GPTModel")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it reads in one process
            load(wanted, storage_reader=_Reader(folder, table), no_dist=True)
    except (CheckpointException, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"{folder}: damaged ({first_line(error)}); give another checkpoint") from error
    found: dict[str, Tensor] = {}
    for name, weight in wanted.items():
        rest = name.removeprefix(_LAYERS)
        if rest == name or rest.split(".")[0].isdigit():
            found[name] = weight
        else:  # those of all layers together
            found |= {f"{_LAYERS}{i}.{rest}": each for i, each in enumerate(weight)}
    return found


class _Reader(FileSystemReader):
    """PyTorch's reader with a table that has been read."""

    def __init__(self, folder: Path, table: Metadata) -> None:
        super().__init__(folder)
        self._table = table

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        return self._table


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = (module, name) in _OTHERS
        if module in _CLASSES_OF and "." not in name:
            found = super().find_class(module, name)
            allowed = isinstance(found, type) and found.__module__ == module
        if module == "torch" and "." not in name:
            allowed = allowed or isinstance(super().find_class(module, name), torch.dtype)
        if not allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)
