"""``MegatronTrainer``: one proxy as a ``GPTModel``, trained by Megatron-Core's own means on one GPU.

Model, parallel state, gradient buffers, mixed precision, optimizer and schedule of passes are megatron-core's; pieces,
learning rate, initial weights and evaluation are those of the other trainers, so that the losses agree. A process
keeps its parallel state from one model to the next.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quadmix_plugin.errors import InputError
from quadmix_plugin.models import choose_device
from quadmix_plugin.proxy.training import Learner, Trainer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quadmix_plugin.proxy.model import Decoder, Shape

_LOGITS_PER_PASS = 1 << 29  # in float32 2 GiB, of which some three exist at once


@dataclass
class MegatronTrainer(Trainer):
    """Trains with Megatron-Core; needs a GPU.

    Args:
        dtype: of weights and products: ``auto`` is bfloat16; the optimizer and the gradients' sums are float32 always.
        micro_batch_size: pieces per pass, of which an update sums ``batch_size``; 0: so many that their logits take
            2 GiB at most.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    micro_batch_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size < 0:
            raise InputError(f"trainer: micro_batch_size {self.micro_batch_size}; give a positive number, or 0")

    def require_device(self) -> None:
        """Raises InputError on a machine without a GPU."""
        if choose_device(self.device) == "cpu":
            raise InputError(
                f"trainer megatron: Megatron-Core's optimizer needs a GPU, and device {self.device!r} is a CPU here; "
                f"give trainer: torch, which trains the same model"
            )

    def learner(self, shape: "Shape", seed: int, device: "torch.device") -> "MegatronLearner":
        """A ``GPTModel`` with the initial weights of ``seed``, and megatron-core's optimizer."""
        self.require_device()
        return MegatronLearner(self, shape, seed, device)


class PassDataset:
    """A batch as a data set whose items are passes: dicts with the keys of megatron-core's ``GPTDataset``.

    ``GPTDataset`` itself draws its own order of documents; a proxy's pieces come in the order of the pool, stratified
    by domain. Tensors are [pieces, context]; every token counts in ``loss_mask``.
    """

    def __init__(self, batch: "Tensor", pieces: int) -> None:
        self._parts = batch.split(pieces)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, i: int) -> dict[str, "Tensor"]:
        import torch

        tokens, labels = self._parts[i][:, :-1], self._parts[i][:, 1:]
        return {
            "tokens": tokens.contiguous(),
            "labels": labels.contiguous(),
            "loss_mask": torch.ones(labels.shape, device=labels.device),
            "position_ids": torch.arange(labels.shape[1], device=labels.device).expand_as(labels),
        }

    def __iter__(self) -> Iterator[dict[str, "Tensor"]]:
        return (self[i] for i in range(len(self)))


class MegatronLearner(Learner):
    """A ``GPTModel`` in training; ``decoder`` gives its weights in float32."""

    def __init__(self, options: MegatronTrainer, shape: "Shape", seed: int, device: "torch.device"):
        import torch

        from quadmix_plugin.proxy.megatron_model import gpt_model, quiet_import, start_parallel_state, to_megatron
        from quadmix_plugin.proxy.model import Decoder

        with quiet_import():
            from megatron.core import tensor_parallel
            from megatron.core.pipeline_parallel import get_forward_backward_func
        start_parallel_state(device)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        weights = to_megatron(Decoder(shape).initialise(seed).state_dict(), shape)
        self._shape, self._decoder = shape, Decoder(shape).to(device)
        self._gpt = gpt_model(shape, device, torch.float32 if options.dtype == "float32" else torch.bfloat16)
        self._gpt.load_state_dict(weights)
        self._model = _parallel_model(self._gpt)
        weakref.finalize(self, self._model.grad_accs.clear)  # its hooks hold the model, whose memory is needed again
        self._optimizer = _optimizer(self._model, options)
        self._forward_backward = get_forward_backward_func()
        for name, main in self._main_weights():  # copies made by the optimizer, of what bfloat16 has rounded
            main.data.copy_(weights[name])
        self._pieces = options.micro_batch_size or max(_LOGITS_PER_PASS // (shape.vocabulary * shape.context), 1)

    def step(self, batch: "Tensor", learning_rate: float) -> "Tensor":
        """One update; the passes of a batch count by their tokens."""
        import torch

        passes = PassDataset(batch, self._pieces)
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        done = self._forward_backward(
            forward_step_func=_forward_step,
            data_iterator=iter(passes),
            model=[self._model],
            num_microbatches=len(passes),
            seq_length=batch.shape[1] - 1,
            micro_batch_size=min(self._pieces, batch.shape[0]),
        )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        return torch.stack([each["loss"] for each in done]).sum() / sum(each["tokens"] for each in done)

    def decoder(self) -> "Decoder":
        """The float32 weights of the optimizer, in a model of its own."""
        from quadmix_plugin.proxy.megatron_model import from_megatron

        self._decoder.load_state_dict(from_megatron(dict(self._main_weights()), self._shape))
        return self._decoder

    def checkpoint(self, folder: Path) -> None:
        """Writes the weights and the optimizer's state, as ``megatron_model.save_checkpoint``."""
        from quadmix_plugin.proxy.megatron_model import save_checkpoint

        save_checkpoint(self._gpt, folder, self._optimizer)

    def _main_weights(self) -> Iterator[tuple[str, "Tensor"]]:
        """Name in the ``GPTModel`` and float32 weight, which with bfloat16 only the optimizer has."""
        return ((name, getattr(weight, "main_param", weight)) for name, weight in self._gpt.named_parameters())


def _parallel_model(gpt: Any) -> Any:
    """The model in the wrappers that megatron-core's optimizer expects; sums of gradients are float32."""
    from quadmix_plugin.proxy.megatron_model import quiet_import

    with quiet_import():
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.transformer.module import Float16Module

    config = gpt.config
    config.calculate_per_token_loss = True  # the last batch may divide into passes of different sizes
    config.finalize_model_grads_func = finalize_model_grads
    inner = Float16Module(config, gpt) if config.bf16 else gpt
    return DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), inner)


def _optimizer(model: Any, options: MegatronTrainer) -> Any:
    """AdamW; megatron-core leaves weights of one dimension undecayed only through a scheduler, so it is done here."""
    from quadmix_plugin.proxy.megatron_model import quiet_import

    with quiet_import():
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        clip_grad=options.grad_clip,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
    )
    optimizer = get_megatron_optimizer(config, [model], use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
    return optimizer


def _forward_step(passes: Iterator[dict[str, "Tensor"]], model: Any) -> tuple["Tensor", Any]:
    item = next(passes)
    losses = model(item["tokens"], item["position_ids"], None, labels=item["labels"])
    return losses, partial(_loss, item["loss_mask"])


def _loss(mask: "Tensor", losses: "Tensor") -> tuple["Tensor", "Tensor", dict[str, "Tensor"]]:
    """Sum of the losses, number of tokens, and what ``step`` is told."""
    total, tokens = (losses.float() * mask).sum(), mask.sum().int()
    return total, tokens, {"loss": total.detach(), "tokens": tokens}
