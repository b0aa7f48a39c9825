"""What people write to label documents: loops with the models' own library calls, one for each padding habit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from quadmix_plugin.stages.domain_classifiers.nvidia_domain import NvidiaDomain
from quadmix_plugin.stages.scorers.ask_llm import PROMPT

BATCH = 32

Peer = Callable[[Sequence[str]], NDArray[np.float32]]
Forward = Callable[[Any, Any], torch.Tensor]


def loop(tokenizer: Any, forward: Forward, padding: str, longest: int, as_prompt: bool = False) -> Peer:
    """Batches of 32 in the order of the corpus; ``padding`` as transformers names it, ``max_length`` or ``longest``."""

    def score(texts: Sequence[str]) -> NDArray[np.float32]:
        results = []
        for start in range(0, len(texts), BATCH):
            some = list(texts[start : start + BATCH])
            if as_prompt:
                some = [PROMPT.format(document=text.replace("###", "")) for text in some]
            inputs = tokenizer(some, padding=padding, truncation=True, max_length=longest, return_tensors="pt")
            with torch.inference_mode():
                results.append(forward(inputs["input_ids"], inputs["attention_mask"]).float().numpy())
        return np.concatenate(results)

    return score


def of_fineweb_edu(folder: Path, longest: int = 512) -> dict[str, Peer]:
    """Both loops, and transformers' own pipeline."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def forward(ids: Any, mask: Any) -> torch.Tensor:
        return network(input_ids=ids, attention_mask=mask).logits

    classify = pipeline("text-classification", model=network, tokenizer=tokenizer, device="cpu")

    def piped(texts: Sequence[str]) -> NDArray[np.float32]:
        options = {"batch_size": BATCH, "truncation": True, "max_length": longest, "function_to_apply": "none"}
        return np.array([[found["score"]] for found in classify(list(texts), **options)], dtype=np.float32)

    return {
        "loop, padded to 512": loop(tokenizer, forward, "max_length", longest),
        "loop, padded to the longest of 32": loop(tokenizer, forward, "longest", longest),
        "transformers pipeline(batch_size=32)": piped,
    }


def of_domain(folder: Path, longest: int = 512) -> dict[str, Peer]:
    """Both loops; the head is not one that a pipeline knows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plugin = NvidiaDomain(model=str(folder))
    plugin.read_folder(folder)
    network = plugin.load_network(folder)

    def cut(padding: str) -> Peer:
        score = loop(tokenizer, network, padding, longest)
        return lambda texts: score([text[:2000] for text in texts])

    return {"loop, padded to 512": cut("max_length"), "loop, padded to the longest of 32": cut("longest")}


def of_ask_llm(folder: Path, longest: int = 512) -> dict[str, Peer]:
    """Both loops over prompts; ``texts`` must be short enough that no prompt is cut."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    spelt = [tokenizer(word, add_special_tokens=False).input_ids for word in ("yes", "Yes")]
    yes = sorted({ids[0] for ids in spelt if len(ids) == 1})

    def forward(ids: Any, mask: Any) -> torch.Tensor:
        start = torch.full((len(ids), 1), network.config.decoder_start_token_id)
        logits = network(input_ids=ids, attention_mask=mask, decoder_input_ids=start).logits[:, 0]
        return logits.softmax(-1)[:, yes].sum(-1, keepdim=True)

    return {
        "loop, padded to 512": loop(tokenizer, forward, "max_length", longest, as_prompt=True),
        "loop, padded to the longest of 32": loop(tokenizer, forward, "longest", longest, as_prompt=True),
    }
