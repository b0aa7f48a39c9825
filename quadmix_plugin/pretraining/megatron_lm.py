"""The same training as a command of Megatron-LM's ``pretrain_gpt.py``, for those who run that; text only.

Flags are those of Megatron-LM's branch core_r0.16.0, whose parser takes them. Layer by layer the model is the same;
initial weights and the order of samples are Megatron-LM's own.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer
    from quadmix_plugin.proxy.model import Shape

_GPUS = 8  # of a machine

_HEAD = """\
#!/usr/bin/env bash
# {tokens:,} tokens on the selection of this run, by pretrain_gpt.py of Megatron-LM (branch core_r0.16.0).
#   MEGATRON_LM  its folder
#   NNODES, GPUS (of one machine), MASTER (host:port of the first) as torchrun takes them
set -euo pipefail
cd "$(dirname "$0")/.."   # the run directory, which the prefixes in tokens/blend.json are relative to
: "${{MEGATRON_LM:?}}"
torchrun --nnodes "${{NNODES:-1}}" --nproc-per-node "${{GPUS:-{gpus}}}" \\
  --rdzv-backend c10d --rdzv-endpoint "${{MASTER:-localhost:29500}}" \\
  "$MEGATRON_LM/pretrain_gpt.py" \\
"""


def command(options: "MegatronTrainer", shape: "Shape", tokens: int, seed: int) -> str:
    """A shell script, to be run from anywhere, that trains ``shape`` with the settings of a recipe."""
    updates = -(-tokens // (options.batch_size * shape.context))
    warmup = max(round(options.warmup * updates), 1)
    gpus = next(number for number in range(_GPUS, 0, -1) if options.batch_size % number == 0)
    micro_batch = _micro_batch(options, shape, options.batch_size // gpus)
    lowest = options.learning_rate * (1.0 if options.schedule == "constant" else options.final_learning_rate)
    lines = [
        "--use-mcore-models --transformer-impl transformer_engine --attention-backend auto",
        f"--num-layers {shape.layers} --hidden-size {shape.width} --ffn-hidden-size {shape.ffn}",
        f"--num-attention-heads {shape.heads} --kv-channels {shape.head_width}"
        + (f" --group-query-attention --num-query-groups {shape.kv_heads}" if shape.kv_heads else ""),
        f"--seq-length {shape.context} --max-position-embeddings {shape.context}",
        f"--position-embedding-type rope --rotary-base {shape.rope_theta:.0f} --swiglu --disable-bias-linear",
        f"--normalization RMSNorm --norm-epsilon {shape.norm_eps:g} --attention-dropout 0 --hidden-dropout 0",
        *([] if shape.tied else ["--untie-embeddings-and-output-weights"]),
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model pretrain/tokenizer --make-vocab-size-divisible-by 1",
        "--per-split-data-args-path tokens/blend.json --data-cache-path pretrain/indices",
        "--no-create-attention-mask-in-dataloader",
        f"--micro-batch-size {micro_batch} --global-batch-size {options.batch_size}",
        f"--train-iters {updates} --seed {1 + seed % (1 << 31)}",
        f"--optimizer adam --adam-beta1 {options.betas[0]:g} --adam-beta2 {options.betas[1]:g} --adam-eps 1e-8",
        f"--weight-decay {options.weight_decay:g} --clip-grad {options.grad_clip:g}",
        f"--lr {options.learning_rate:g} --min-lr {lowest:g} {_schedule(options, updates)}",
        f"--lr-warmup-iters {warmup} --lr-decay-iters {updates}",
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        "--ckpt-format torch_dist --save pretrain/megatron_lm --load pretrain/megatron_lm",
        f"--save-interval {options.save_every}",
        f"--eval-interval {options.eval_every or max(updates // 20, 1)} --eval-iters 10",
        f"--log-interval {options.log_every} --log-throughput --tensorboard-dir pretrain/megatron_lm/tensorboard",
    ]
    return _HEAD.format(tokens=tokens, gpus=gpus) + " \\\n".join(f"  {line}" for line in lines) + "\n"


def _micro_batch(options: "MegatronTrainer", shape: "Shape", share: int) -> int:
    """Megatron-LM takes divisors of what a GPU has of a batch, its ``share``, only."""
    most = options.micro_batch_size or max((1 << 29) // (shape.vocabulary * shape.context), 1)
    return next(size for size in range(min(most, share), 0, -1) if share % size == 0)


def _schedule(options: "MegatronTrainer", updates: int) -> str:
    if options.schedule != "wsd":
        return f"--lr-decay-style {options.schedule}"
    falling = max(round(options.decay * updates), 1)
    return f"--lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters {falling}"
