"""Trains tiny labelling models from scratch and saves each in the format of the published model it stands for.

Texts, labels and sizes come from the caller: ``train_quickstart_models.py`` makes the committed models of the
quickstart, ``train_on_corpus.py`` larger ones that are measured on unseen documents. Seeds are fixed.
"""

# pyright: reportCallIssue=false
# (transformers makes the signatures of its configs at run time)

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tiny_tokenizers import train_word_start_bpe, train_wordpiece, write_json
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from quadmix_plugin.models import load_transformers_tokenizer
from quadmix_plugin.stages.domain_classifiers.nvidia_domain import build_network
from quadmix_plugin.stages.scorers.ask_llm import PROMPT, Question

SEED = 20250423
DOMAINS = """
    Adult Arts_and_Entertainment Autos_and_Vehicles Beauty_and_Fitness Books_and_Literature Business_and_Industrial
    Computers_and_Electronics Finance Food_and_Drink Games Health Hobbies_and_Leisure Home_and_Garden
    Internet_and_Telecom Jobs_and_Education Law_and_Government News Online_Communities People_and_Society
    Pets_and_Animals Real_Estate Science Sensitive_Subjects Shopping Sports Travel_and_Transportation
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Size:
    """How large a transformer is and how long it is trained.

    Args:
        vocabulary: entries of its tokenizer.
        context: tokens that it reads.
        width: hidden size; the inner layers are twice as wide.
        layers: of the encoder, and of T5's decoder.
        buckets: of the relative positions, where the model has them.
        epochs: passes over the documents.
        rate: of learning, at its highest.
        cuts: tokens that documents are cut to, batch after batch in turn; by default the context.
    """

    vocabulary: int
    context: int
    width: int
    layers: int
    epochs: int
    buckets: int = 32
    rate: float = 2e-3
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True)
class FastTextSize:
    """How large a fastText model is and how long it is trained."""

    dim: int = 8
    buckets: int = 20000
    min_count: int = 8
    epochs: int = 5
    rate: float = 0.2


def train_domain(folder: Path, texts: Sequence[str], domains: Sequence[str], size: Size) -> None:
    """DeBERTa-v2, dropout and a linear head on the first token; the config names backbone and labels."""
    train_word_start_bpe(folder, texts, size.vocabulary, size.context, t5=False)
    tokenizer = load_transformers_tokenizer(folder)
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=2,
        intermediate_size=2 * size.width, max_position_embeddings=size.context, relative_attention=True,
        position_buckets=size.buckets, share_att_key=True, norm_rel_ebd="layer_norm", pos_att_type=["p2c", "c2p"],
        position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip
    network = build_network(config, len(DOMAINS), dropout=0.2)
    ids: dict[str, int] = {label: i for i, label in enumerate(DOMAINS)}
    targets = torch.tensor([ids[domain] for domain in domains])
    encode = _truncating(tokenizer, [text[:2000] for text in texts])
    fit(network, encode, targets, network, torch.nn.functional.cross_entropy, size)
    config.save_pretrained(folder / "backbone")
    labels = {str(i): label for label, i in ids.items()}
    content = {"base_model": "backbone", "fc_dropout": 0.2, "id2label": labels, "model_type": "deberta-v2"}
    write_json(folder / "config.json", content | {"label2id": ids})
    weights = {name: weight.half().contiguous() for name, weight in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _make_readable(folder)


def train_fineweb_edu(folder: Path, texts: Sequence[str], values: NDArray[np.float32], size: Size) -> None:
    """BertForSequenceClassification with one regression output."""
    train_wordpiece(folder, texts, size.vocabulary, size.context)
    tokenizer = load_transformers_tokenizer(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=size.width, num_hidden_layers=size.layers, num_attention_heads=2,
        intermediate_size=2 * size.width, max_position_embeddings=size.context, num_labels=1,
        problem_type="regression", pad_token_id=0,
    )  # fmt: skip
    network = BertForSequenceClassification(config)

    def value(inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return network(input_ids=inputs, attention_mask=mask).logits[:, 0]

    encode = _truncating(tokenizer, texts)
    fit(network, encode, torch.from_numpy(values), value, torch.nn.functional.mse_loss, size)
    _save(network, folder)


def train_ask_llm(folder: Path, texts: Sequence[str], yes: NDArray[np.bool_], size: Size) -> None:
    """T5ForConditionalGeneration (the Flan kind: gated GELU, untied head) that answers the default prompt."""
    train_word_start_bpe(folder, texts, size.vocabulary, size.context, t5=True)
    tokenizer = load_transformers_tokenizer(folder)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=size.width, d_kv=size.width // 2, d_ff=2 * size.width,
        num_layers=size.layers, num_decoder_layers=size.layers, num_heads=2,
        relative_attention_num_buckets=size.buckets, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    network = T5ForConditionalGeneration(config)
    words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("yes", "no")]
    if any(len(ids) != 1 for ids in words):
        raise SystemExit(f"{folder}: yes and no are not single tokens ({words}); repeat them more often")
    targets = torch.where(torch.from_numpy(yes), words[0][0], words[1][0])

    def encode(length: int) -> list[list[int]]:
        return [ids.tolist() for ids in Question(tokenizer, PROMPT, length).ids(texts)]

    def answer(inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        start = torch.zeros((len(inputs), 1), dtype=torch.long)
        return network(input_ids=inputs, attention_mask=mask, decoder_input_ids=start, use_cache=False).logits[:, 0]

    fit(network, encode, targets, answer, torch.nn.functional.cross_entropy, size)
    _save(network, folder)


def train_fasttext(folder: Path, texts: Sequence[str], labels: Sequence[str], size: FastTextSize) -> None:
    """FastText with word pairs; one thread, so that the file is the same every time."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        for label, text in zip(labels, texts, strict=True):
            file.write(f"__label__{label} {' '.join(text.strip().splitlines())}\n")
        file.flush()
        options = {"dim": size.dim, "wordNgrams": 2, "bucket": size.buckets, "minCount": size.min_count}
        options |= {"epoch": size.epochs, "lr": size.rate, "thread": 1, "seed": SEED, "verbose": 0}
        program = f"import fasttext; fasttext.train_supervised({file.name!r}, **{options}).save_model('model.bin')"
        # With one thread fastText draws a tenth of its initial weights and leaves the rest as the memory is: NaN at
        # worst. In a new process, blocks that malloc takes from the system one by one are zero.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, check=True)  # noqa: S603


def fit(
    network: torch.nn.Module,
    encode: Callable[[int], list[list[int]]],
    targets: torch.Tensor,
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    size: Size,
) -> None:
    """AdamW over shuffled batches, warm-up then linear decay; leaves the network in evaluation mode.

    ``encode(length)`` gives the ids of all documents, cut to ``length`` tokens.
    """
    cuts = size.cuts or (size.context,)
    ids = {cut: encode(cut) for cut in set(cuts)}
    batches = _batches(len(targets), cuts, size.epochs)
    optimizer = torch.optim.AdamW(network.parameters(), lr=size.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 100, 1 - s / len(batches)))
    network.train()
    for cut, rows in batches:
        inputs, mask = _padded([ids[cut][i] for i in rows.tolist()])
        optimizer.zero_grad()
        loss(forward(inputs, mask), targets[rows]).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.eval()


def fresh_folders(root: Path, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """An empty folder for each name."""
    for name in names:
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield name, folder


def _batches(n: int, cuts: Sequence[int], epochs: int) -> list[tuple[int, torch.Tensor]]:
    """Tokens per document and rows of every step: 32 documents, or fewer where that is more than 4,096 tokens."""
    generator = torch.Generator().manual_seed(SEED)
    batches: list[tuple[int, torch.Tensor]] = []
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        while len(order):
            cut = cuts[len(batches) % len(cuts)]
            rows = min(32, max(1, 4096 // cut))
            batches.append((cut, order[:rows]))
            order = order[rows:]
    return batches


def _padded(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, ids))
    inputs = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    return inputs, mask


def _truncating(tokenizer: Any, texts: Sequence[str]) -> Callable[[int], list[list[int]]]:
    return lambda length: tokenizer(list(texts), truncation=True, max_length=length, padding=False)["input_ids"]


def _save(network: Any, folder: Path) -> None:
    network.half().save_pretrained(folder)
    _make_readable(folder)


def _make_readable(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)  # both libraries write them for the owner alone
