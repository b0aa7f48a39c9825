"""A ``GPTModel`` in training: by megatron-core's own means on GPUs, by PyTorch's AdamW on the CPU.

Model, gradient buffers, mixed precision, optimizer and schedule of passes are megatron-core's on GPUs, whose optimizer
does not run without one; on the CPU the model is the same and the loop is plain. Both give their whole state to a
distributed checkpoint. Nothing here knows where batches come from.
"""

import weakref
from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quadmix_plugin.proxy.megatron_model import (
    from_megatron,
    gpt_model,
    quiet_import,
    set_weights,
    start_parallel_state,
    to_megatron,
)
from quadmix_plugin.proxy.model import Decoder, Shape
from quadmix_plugin.proxy.training import Learner

if TYPE_CHECKING:
    from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer

_LOGITS_PER_PASS = 1 << 29  # in float32 2 GiB, of which some three exist at once
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}  # another number of GPUs can go on from it


class PassDataset:
    """A batch as a data set whose items are passes: dicts with the keys of megatron-core's ``GPTDataset``.

    Tensors are [pieces, context]; every token counts in ``loss_mask``.
    """

    def __init__(self, batch: Tensor, pieces: int) -> None:
        self._parts = batch.split(pieces)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        tokens, labels = self._parts[i][:, :-1], self._parts[i][:, 1:]
        return {
            "tokens": tokens.contiguous(),
            "labels": labels.contiguous(),
            "loss_mask": torch.ones(labels.shape, device=labels.device),
            "position_ids": torch.arange(labels.shape[1], device=labels.device).expand_as(labels),
        }

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))


class GPTLearner(Learner):
    """What both have: a ``GPTModel`` with the initial weights of ``seed``, and passes that fit the memory.

    ``processes``: of the group, which all hold the same model; each steps on its own part of a batch.
    ``grad_norm``: of the last update, before clipping.
    """

    def __init__(
        self, options: "MegatronTrainer", shape: Shape, seed: int, device: torch.device, processes: int = 1
    ) -> None:
        with quiet_import():
            from megatron.core import tensor_parallel
        start_parallel_state(device, processes)
        if device.type == "cuda":
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
        self._shape, self._processes = shape, processes
        self._initial = to_megatron(Decoder(shape).initialise(seed).state_dict(), shape)
        self._gpt = gpt_model(shape, device, _weights_dtype(options, device), options.layers)
        set_weights(self._gpt, self._initial)
        self._pieces = options.micro_batch_size or max(_LOGITS_PER_PASS // (shape.vocabulary * shape.context), 1)
        self.grad_norm = 0.0

    @property
    def gpt(self) -> Any:
        """The ``GPTModel`` itself."""
        return self._gpt

    @abstractmethod
    def state(self, loading: bool = False) -> dict[str, Any]:
        """Weights and optimizer as a sharded state, to be saved or, ``loading``, to say what is to be read."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Takes over a state that was read."""

    def decoder(self) -> Decoder:
        """The model in float32, on the device of the learner."""
        device = next(self._gpt.parameters()).device
        decoder = Decoder(self._shape).to(device)
        decoder.load_state_dict(from_megatron(dict(self._float32_weights()), self._shape))
        return decoder

    def _float32_weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, weight.detach()) for name, weight in self._gpt.named_parameters())


class GPULearner(GPTLearner):
    """On one GPU, or with ``distributed`` on as many as the group has processes, by the distributed optimizer."""

    def __init__(
        self,
        options: "MegatronTrainer",
        shape: Shape,
        seed: int,
        device: torch.device,
        processes: int = 1,
        distributed: bool = False,
    ) -> None:
        super().__init__(options, shape, seed, device, processes)
        with quiet_import():
            from megatron.core.pipeline_parallel import get_forward_backward_func
        self._distributed = distributed
        self._model = _parallel_model(self._gpt, distributed, overlap=processes > 1)
        weakref.finalize(self, self._model.grad_accs.clear)  # its hooks hold the model, whose memory is needed again
        self._optimizer = _megatron_optimizer(self._model, options, distributed)
        self._forward_backward = get_forward_backward_func()
        if not distributed:
            for name, main in self._float32_weights():  # copies of the optimizer, of what bfloat16 has rounded
                main.data.copy_(self._initial[name])
        self._initial = {}

    def step(self, batch: Tensor, learning_rate: float) -> Tensor:
        """One update; the passes of a batch count by their tokens, over all processes."""
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
        _, self.grad_norm, _ = self._optimizer.step()
        sums = torch.stack([torch.stack([each["loss"], each["tokens"].float()]) for each in done]).sum(0)
        if self._processes > 1:
            torch.distributed.all_reduce(sums)
        return sums[0] / sums[1]

    def state(self, loading: bool = False) -> dict[str, Any]:
        """As ``GPTLearner.state``, for any number of processes."""
        if loading and self._distributed:  # it says the same of its moments only where there are any
            for each in self._optimizer.chained_optimizers:
                each._init_optimizer_states_with_dummy_values()
        own = self._gpt.sharded_state_dict()
        options = {"metadata": _RESHARDABLE} if self._distributed else {}
        optimizer = self._optimizer.sharded_state_dict(self._gpt.sharded_state_dict(), is_loading=loading, **options)
        return {**own, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over a state that was read."""
        self._optimizer.load_state_dict(state.pop("optimizer"))
        self._gpt.load_state_dict(state)
        for each in self._optimizer.chained_optimizers if self._distributed else ():
            for moments in each.optimizer.state.values():  # it gave all weights one tensor that counts their steps
                moments |= {name: value.clone() for name, value in moments.items() if name == "step"}

    def _float32_weights(self) -> Iterator[tuple[str, Tensor]]:
        """With bfloat16 only the optimizer has them; the distributed one only parts, so there they are rounded ones."""
        if self._distributed:
            return ((name, weight.detach().float()) for name, weight in self._gpt.named_parameters())
        return ((name, getattr(weight, "main_param", weight)) for name, weight in self._gpt.named_parameters())


class CPULearner(GPTLearner):
    """In one process on a CPU, in float32, by PyTorch's AdamW."""

    def __init__(self, options: "MegatronTrainer", shape: Shape, seed: int, device: torch.device) -> None:
        super().__init__(options, shape, seed, device)
        self._initial = {}
        weights = list(self._gpt.parameters())
        groups = [
            {"params": [each for each in weights if each.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [each for each in weights if each.ndim == 1], "weight_decay": 0.0},
        ]
        self._clip = options.grad_clip
        self._optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, fused=True)

    def step(self, batch: Tensor, learning_rate: float) -> Tensor:
        """One update; the passes of a batch count by their tokens."""
        tokens, total = batch[:, 1:].numel(), torch.zeros(())
        for item in PassDataset(batch, self._pieces):
            loss = self._gpt(item["tokens"], item["position_ids"], None, labels=item["labels"]).sum() / tokens
            loss.backward()
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self._gpt.parameters(), self._clip)
        self.grad_norm = float(norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def state(self, loading: bool = False) -> dict[str, Any]:
        """As ``GPTLearner.state``; updates are counted once, not for every weight."""
        with quiet_import():
            from megatron.core.dist_checkpointing import optimizer as sharding
        if loading:
            self._allot()
        sharded = self._gpt.sharded_state_dict()
        found = self._optimizer.state_dict()
        moments = {i: {name: each[name] for name in ("exp_avg", "exp_avg_sq")} for i, each in found["state"].items()}
        content = {"state": moments, "param_groups": [dict(group) for group in found["param_groups"]]}
        weights = (weight for group in self._optimizer.param_groups for weight in group["params"])
        numbered = sharding.get_param_id_to_sharded_param_map(sharded, weights)
        sharding.optim_state_to_sharding_state(content, numbered)  # type: ignore[arg-type]
        content["updates"] = next(float(each["step"]) for each in found["state"].values())
        return {**sharded, "optimizer": content}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over a state that was read."""
        content = state.pop("optimizer")
        for each in content["state"].values():
            each["step"] = torch.tensor(content["updates"])
        self._optimizer.load_state_dict({name: content[name] for name in ("state", "param_groups")})
        self._gpt.load_state_dict(state)

    def _allot(self) -> None:
        """Moments of zero for every weight, to be read into."""
        for group in self._optimizer.param_groups:
            for weight in group["params"]:
                zeros = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[weight] = {"step": torch.tensor(0.0), **zeros}


def _weights_dtype(options: "MegatronTrainer", device: torch.device) -> torch.dtype:
    low = options.dtype == "bfloat16" or (options.dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if low else torch.float32


def _parallel_model(gpt: Any, distributed: bool, overlap: bool) -> Any:
    """The model in the wrappers that megatron-core's optimizer expects; sums of gradients are float32."""
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
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_grad_reduce=overlap
    )
    model = DistributedDataParallel(config, settings, inner)
    if overlap:
        config.no_sync_func = model.no_sync
    return model


def _megatron_optimizer(model: Any, options: "MegatronTrainer", distributed: bool) -> Any:
    """AdamW; megatron-core leaves weights of one dimension undecayed only through a scheduler, so it is done here."""
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
        use_distributed_optimizer=distributed,
    )
    optimizer: Any = get_megatron_optimizer(config, [model], use_gloo_process_groups=False)
    if distributed:
        for each in optimizer.chained_optimizers:
            _keep_steps(each)
    for group in optimizer.param_groups:
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
    return optimizer


def _keep_steps(optimizer: Any) -> None:
    """PyTorch's AdamW counts the steps of every weight, which megatron-core has set when it reads back the moments."""
    read_back = optimizer._set_main_param_and_optimizer_states

    def read_back_all_but_steps(weight: Tensor, tensors: dict[str, Tensor]) -> None:
        group, place = optimizer.model_param_group_index_map[weight]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][place]]
        read_back(weight, {**tensors, **{name: state[name] for name in state if name == "step"}})

    optimizer._set_main_param_and_optimizer_states = read_back_all_but_steps


def _forward_step(passes: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    item = next(passes)
    losses = model(item["tokens"], item["position_ids"], None, labels=item["labels"])
    return losses, partial(_loss, item["loss_mask"])


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses, number of tokens, and what ``step`` is told."""
    total, tokens = (losses.float() * mask).sum(), mask.sum().int()
    return total, tokens, {"loss": total.detach(), "tokens": tokens}
