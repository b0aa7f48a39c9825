"""``MegatronTrainer``: a model as a ``GPTModel`` of Megatron-Core, as a proxy or as the model that a run is for.

A proxy is trained on pieces in one process, so that its losses agree with those of the other trainers; ``pretrain``
trains on token files through megatron-core's own data sets, with checkpoints, on as many GPUs as there are.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quadmix_plugin.errors import InputError
from quadmix_plugin.models import choose_device
from quadmix_plugin.proxy.training import Trainer

if TYPE_CHECKING:
    import torch

    from quadmix_plugin.pretraining.job import PretrainJob
    from quadmix_plugin.proxy.megatron_learner import GPTLearner
    from quadmix_plugin.proxy.model import Shape


@dataclass
class MegatronTrainer(Trainer):
    """Trains with Megatron-Core: by its distributed optimizer on GPUs, by PyTorch's AdamW on a CPU.

    Args:
        dtype: of weights and products: ``auto`` is bfloat16 on a GPU, where the optimizer and the gradients' sums are
            float32 always, and float32 on a CPU.
        micro_batch_size: pieces per pass, of which an update sums ``batch_size``; 0: so many that their logits take
            2 GiB at most.
        layers: ``local`` or ``transformer_engine``; ``auto`` takes the latter where it is installed.
        gpus: of ``pretrain``: so many on this machine, one process each; 0: all that there are.
        save_every: of ``pretrain``: updates between checkpoints.
        keep: of ``pretrain``: checkpoints that are kept, the last ones.
        log_every: of ``pretrain``: updates per line of ``metrics.jsonl``.
        eval_every: of ``pretrain``: updates between measurements of the validation loss; 0: a twentieth of all.
        wandb: of ``pretrain``: project of Weights & Biases that metrics go to as well.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    micro_batch_size: int = 0
    layers: Literal["auto", "local", "transformer_engine"] = "auto"
    gpus: int = 0
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    eval_every: int = 0
    wandb: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"micro_batch_size": 0, "gpus": 0, "eval_every": 0, "save_every": 1, "keep": 1, "log_every": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise InputError(f"trainer: {name} {getattr(self, name)}; give {lowest} or more")

    def require_device(self) -> None:
        """Raises InputError where the device is not there, or fewer GPUs than asked for, or wandb that is asked for."""
        from quadmix_plugin.pretraining.launch import require_gpus
        from quadmix_plugin.pretraining.metrics import require_tracker

        require_tracker(self.wandb)
        device = choose_device(self.device)
        if device == "cpu" and self.dtype == "bfloat16":
            raise InputError(f"trainer megatron: dtype bfloat16 on device {self.device!r}, a CPU here; give float32")
        require_gpus(self.gpus, device)

    def learner(self, shape: "Shape", seed: int, device: "torch.device") -> "GPTLearner":
        """A ``GPTModel`` with the initial weights of ``seed``, in this process alone."""
        from quadmix_plugin.proxy.megatron_learner import CPULearner, GPULearner

        kind: Any = CPULearner if device.type == "cpu" else GPULearner
        return kind(self, shape, seed, device)

    def pretrain(self, job: "PretrainJob") -> None:
        """Trains the model of a job; goes on from its last checkpoint.

        Raises:
            InputError: data, tokenizer and shape do not belong together, or a checkpoint is of another model.
            QuadmixError: the loss is not finite; the message names the documents of that batch.
            StorageError: no checkpoint can be written.
        """
        from quadmix_plugin.pretraining.launch import launch

        launch(self, job)
