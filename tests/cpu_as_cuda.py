"""A CPU in the place of a GPU, for code that names CUDA: what Megatron-Core does on a GPU then runs here as it is."""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers.utils import is_torch_cuda_available

_ASK_CUDA_ON_IMPORT = (
    "core.models.gpt.gpt_layer_specs",
    "core.optimizer",
    "core.distributed",
    "core.pipeline_parallel",
)
_SET_INSIDE = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


class _CpuForCuda(TorchFunctionMode):
    """Every tensor asked for on a CUDA device is one on the CPU, and says that its type is one of CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.")
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*map(_moved, args), **{name: _moved(value) for name, value in (kwargs or {}).items()})


def _moved(value: Any) -> Any:
    named = str(value) if isinstance(value, str | torch.device) else ""
    return torch.device("cpu") if named.startswith("cuda") else value


@contextlib.contextmanager
def cpu_as_cuda() -> Iterator[None]:
    """Inside, CUDA is there, in one process group over gloo and loopback; outside, nothing is left of it."""
    from quadmix_plugin.proxy import megatron_model

    is_torch_cuda_available()  # keeps its first answer
    with megatron_model.quiet_import():
        for name in _ASK_CUDA_ON_IMPORT:
            import_module(f"megatron.{name}")
        from megatron.core import parallel_state
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": torch.device("cpu"),
        "synchronize": None,
        "get_rng_state": torch.get_rng_state(),
        "set_device": None,
        "get_device_name": "a CPU in the place of a GPU",
        "max_memory_allocated": 0,
    }
    with pytest.MonkeyPatch.context() as patch, _CpuForCuda():
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        patch.setattr(torch.cuda, "_queued_calls", [])
        patch.setattr(megatron_model, "_backend", lambda device: "gloo")
        for name in _SET_INSIDE:
            patch.setenv(name, "so that it is put back afterwards")
            patch.delenv(name)
        try:
            yield
        finally:
            megatron_model.stop_parallel_state()
            parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None  # megatron-core forgets it
            RotaryEmbedding.forward.cache_clear()
            filesystem_async._results_queue = None
