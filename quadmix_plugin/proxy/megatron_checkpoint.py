"""Distributed checkpoints of megatron-core: written whole, read only into a model of the same shape.

On a GPU megatron-core's own writer is used; on the CPU the same format is written by PyTorch's. Nothing here knows when
to save or which checkpoint is the last.
"""

import contextlib
import os
import queue
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from quadmix_plugin.errors import InputError, StorageError
from quadmix_plugin.models import first_line
from quadmix_plugin.proxy.checkpoint_files import read_table
from quadmix_plugin.proxy.megatron_model import quiet_import

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

_EXTRA = "_extra_state"
_FORCE, _FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def save_state(state: dict[str, Any], folder: Path, device: torch.device) -> None:
    """Writes a sharded state, tensors and plain values, as megatron-core's distributed checkpoint.

    All processes of the group call it. On a GPU megatron-core writes in processes that it forks, which a daemon cannot.

    Raises:
        InputError: the folder holds files.
        StorageError: it could not be written; what is there is not a checkpoint.
    """
    with quiet_import():
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async
    if filesystem_async._results_queue is None:  # its own is a process, which would outlive this one if it is killed
        filesystem_async._results_queue = queue.Queue()  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    if torch.distributed.get_rank() == 0 and any(folder.iterdir()):
        raise InputError(f"{folder}: not empty; give a new folder for the checkpoint")
    try:
        dist_checkpointing.save(state, str(folder), None if device.type == "cuda" else _saved_from_the_cpu())
    except (CheckpointException, OSError, RuntimeError) as error:
        raise StorageError(f"{folder}: the checkpoint could not be written ({_cause(error)})") from error


def load_state(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Reads what a sharded state asks for.

    Raises:
        InputError: no checkpoint, or one of another model.
    """
    with quiet_import():
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.core import CheckpointingException
    read_table(folder)  # megatron-core unpickles it
    try:
        _check_sizes(_weights(wanted), dist_checkpointing.load_tensors_metadata(str(folder)))
        with _plain_values_only():
            return dist_checkpointing.load(wanted, str(folder))  # type: ignore[return-value]
    except (CheckpointingException, CheckpointException, OSError, RuntimeError, KeyError, UnpicklingError) as error:
        raise InputError(f"{folder}: no checkpoint of this model ({_cause(error)}); give the folder of one") from error


def load_checkpoint(model: "GPTModel", folder: Path) -> None:
    """Reads the weights of a distributed checkpoint, of these layers or of TransformerEngine's, into ``model``.

    The state of an optimizer is left out.

    Raises:
        InputError: no checkpoint, or one of another model.
    """
    wanted = {name: part for name, part in model.sharded_state_dict().items() if not name.endswith(_EXTRA)}
    state = load_state(dict(wanted), folder)
    model.load_state_dict({name: state[name] for name in wanted})


@contextlib.contextmanager
def _plain_values_only() -> Iterator[None]:
    """``torch.load`` runs no code, whoever calls it.

    A table may say of any part that it is an object and not a tensor, and PyTorch's own reader of checkpoints unpickles
    objects without asking what they are. megatron-core's list of classes without code is allowed.
    """
    with quiet_import():
        from megatron.core.safe_globals import SAFE_GLOBALS
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORBID)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _weights(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The sharded tensors of a model's own weights, and those that are made of two (gate and up)."""
    return {name: part for name, part in wanted.items() if hasattr(part, "key") and not name.endswith(_EXTRA)}


def _check_sizes(wanted: dict[str, Any], found: Mapping[str, Any]) -> None:
    """megatron-core itself would fill up or cut a vocabulary of another size."""
    keys = {part.key for part in wanted.values()}
    if other := {key for key in keys ^ found.keys() if not key.startswith("optimizer.")}:
        raise RuntimeError(f"{min(other)} is in only one of the two")
    for part in wanted.values():
        size, there = getattr(part, "global_shape", None), found[part.key].global_shape
        if size is not None and size != there:
            raise RuntimeError(f"{part.key} is {list(there)}, not {list(size)}")


def _cause(error: BaseException) -> str:
    """The first line of what began it: megatron-core wraps failures of its writers."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


def _saved_from_the_cpu() -> Any:
    """megatron-core's strategy for the same format, written by PyTorch's own writer, which does not ask for CUDA."""
    with quiet_import():
        from megatron.core.dist_checkpointing.strategies import torch as strategies

    class OnTheCpu(strategies.TorchDistSaveShardedStrategy):
        def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
            state, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
            save(
                strategies.mcore_to_pyt_state_dict(state, False),
                storage_writer=FileSystemWriter(checkpoint_dir),
                planner=strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )

    return OnTheCpu("torch_dist", 1)
