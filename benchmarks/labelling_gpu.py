"""Documents per second and share of the card's bf16 peak, by shape. NOT YET RUN ON A GPU: no figure of it exists.

    python benchmarks/labelling_gpu.py --documents 20000 --peak-tflops 989

Untrained weights (they do not change the speed) of BERT base, DeBERTa-v3 base, T5 large (one decoder step) and a Llama
of 1.2B, over ids whose lengths follow real documents' (lognormal, cut at 512). The peers are batches of 32 and of 256
in the order of the corpus, padded to their longest, on the same card. Needs torch, transformers and the project's own
source. ``--device cpu --layers 1 --documents 24`` tries the script where there is no GPU.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the project need not be installed on a borrowed machine

from quadmix_plugin import inference, models
from quadmix_plugin.stages.domain_classifiers.nvidia_domain import DEBERTA_V3_BASE, build_network

Network = tuple[Any, Callable[[Any, Any], torch.Tensor]]
WORDS = 30522


def bert(layers: int | None) -> Network:
    """The shape of HuggingFaceFW/fineweb-edu-classifier."""
    network = BertForSequenceClassification(BertConfig(num_labels=1, num_hidden_layers=layers or 12))
    return network, lambda ids, mask: network(input_ids=ids, attention_mask=mask).logits


def deberta(layers: int | None) -> Network:
    """The shape of nvidia/domain-classifier."""
    shape = {**DEBERTA_V3_BASE, "vocab_size": 128_100, "num_hidden_layers": layers or 12}
    network = build_network(AutoConfig.for_model(**shape), 26)
    return network, network


def t5(layers: int | None) -> Network:
    """The shape of Flan-T5 large, one step of its decoder."""
    network = T5ForConditionalGeneration(
        T5Config(
            vocab_size=32128, d_model=1024, d_kv=64, d_ff=2816, num_layers=layers or 24, num_heads=16,
            num_decoder_layers=layers or 24, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    )  # fmt: skip

    def forward(ids: Any, mask: Any) -> torch.Tensor:
        start = torch.zeros((len(ids), 1), dtype=torch.long, device=ids.device)
        return network(input_ids=ids, attention_mask=mask, decoder_input_ids=start, use_cache=False).logits[:, 0, :8]

    return network, forward


def llama(layers: int | None) -> Network:
    """A causal model of 1.2B, as Llama 3.2 1B is."""
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers or 16,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
        )
    )  # fmt: skip
    return network, lambda ids, mask: network(
        input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=32
    ).logits[:, -1, :8]


SHAPES = {"bert-base": bert, "deberta-v3-base": deberta, "flan-t5-large": t5, "llama-1b": llama}


def document_ids(n: int) -> list[inference.Ids]:
    """Ids of documents whose lengths spread as on the web: median 300, cut at 512."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(300), 0.9, n), 8, 512).astype(int)
    return [rng.integers(5, WORDS, length).astype(np.int32) for length in lengths]


def flops(network: Any, lengths: Sequence[int]) -> float:
    """2 per weight of the linear layers and token, 4 per pair of tokens and channel of each attention layer.

    A decoder that takes one step, and heads, are counted as if they saw every token of the encoder: an upper bound of
    a few percent for T5's decoder, which is left out.
    """
    linear = [
        weight.numel()
        for name, module in network.named_modules()
        for weight in [getattr(module, "weight", None)]
        if isinstance(module, torch.nn.Linear) and not name.startswith("decoder.") and not name.startswith("lm_head")
    ]
    config = network.config if hasattr(network, "config") else network.model.config
    tokens, pairs = float(np.sum(lengths)), float(np.sum(np.square(np.asarray(lengths, dtype=float))))
    return 2 * sum(linear) * tokens + 4 * pairs * config.hidden_size * config.num_hidden_layers


def in_corpus_order(runner: inference.BatchRunner, ids: list[inference.Ids], size: int) -> None:
    """Batches as they come, padded to the longest of each."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(ids), size):
            some = ids[start : start + size]
            parts.append(runner._batch(some, max(len(row) for row in some)))
        torch.cat([part for part in parts if part is not None]).float().cpu()


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median wall time; every way ends with its results on the host."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return median(times)


def main() -> None:
    """Measures and prints one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="fewer layers than the published shapes have")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of the card; H100, H200: 989")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    arguments = parser.parse_args()
    device = models.choose_device(arguments.device)
    ids = document_ids(arguments.documents)
    lengths = [len(row) for row in ids]
    print(
        "| shape | way | documents/s | tokens/s | share of the peak | × of batches of 32 |\n|---|---|--:|--:|--:|--:|"
    )
    for name in arguments.shapes:
        torch.manual_seed(0)
        network, forward = SHAPES[name](arguments.layers)
        network.eval().to(device, models.model_dtype(device))
        work = flops(network, lengths)
        inference.in_blocks(network)
        runner = inference.BatchRunner(forward, 0, device)
        ways = {
            "batches of 32": lambda runner=runner: in_corpus_order(runner, ids, 32),
            "batches of 256": lambda runner=runner: in_corpus_order(runner, ids, 256),
            "quadmix": lambda runner=runner: runner.run(ids, list),
        }
        runner.run(ids[:512], list)
        times = {way: seconds(run, arguments.repeats) for way, run in ways.items()}
        for way, taken in times.items():
            share = work / taken / arguments.peak_tflops / 1e12
            ratio = times["batches of 32"] / taken
            figures = f"{len(ids) / taken:,.0f} | {sum(lengths) / taken:,.0f} | {share:.1%} | {ratio:.2f}"
            print(f"| {name} | {way} | {figures} |", flush=True)
    where = torch.cuda.get_device_name(device) if device != "cpu" else "CPU"
    print(f"\n{len(ids):,} documents of {np.mean(lengths):.0f} tokens, {where}, torch {torch.__version__}.")


if __name__ == "__main__":
    main()
