"""Questions of the quickstart's validation rows, and two tiny models: one that knows the answers, one that does not."""

import atexit
import functools
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from small_run import MODELS, QUICKSTART
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TOKENIZER = MODELS / "tokenizer"
EOD = "<|endoftext|>"
CONTEXT, STEPS, BATCH = 96, 60, 15
N = 45

Row = dict[str, Any]


def questions(n: int = N, choices: int = 4) -> list[Row]:
    """Questions of arc_easy with their answer among those of the next questions, at changing places."""
    lines = (QUICKSTART / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["task"] == "arc_easy" and len(row["prompt"]) < 110][:n]
    made = []
    for i, row in enumerate(rows):
        wrong = [rows[(i + k) % n]["response"] for k in range(1, choices)]
        answer = (i * 7) % choices
        made.append({**row, "choices": [*wrong[:answer], row["response"], *wrong[answer:]], "answer": answer})
    return made


def write_rows(path: Path, rows: list[Row]) -> Path:
    """The rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@functools.lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """The quickstart's tokenizer."""
    return Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))


def ids(text: str) -> list[int]:
    """Without special tokens."""
    return tokenizer().encode(text, add_special_tokens=False).ids


@functools.lru_cache(maxsize=1)
def models() -> dict[str, Path]:
    """Folders of ``trained``, which has seen the questions with their answers often, and ``random``; made once."""
    folder = Path(tempfile.mkdtemp(prefix="quadmix-benchmark-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return train(folder, questions())


def train(folder: Path, rows: list[Row]) -> dict[str, Path]:
    """Writes both models into ``folder``: the rows are what one of them is trained on."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=tokenizer().get_vocab_size(), max_position_embeddings=CONTEXT, **shape)
    )
    model.save_pretrained(folder / "random")
    _train(model, rows)
    model.save_pretrained(folder / "trained")
    return {name: folder / name for name in ("trained", "random")}


def _train(model: LlamaForCausalLM, rows: list[Row]) -> None:
    end = tokenizer().token_to_id(EOD)
    texts = [ids(f"{row['prompt']} {row['response']}") + ids("\n") for row in rows]
    longest = min(max(map(len, texts)), CONTEXT - 1)
    batch = torch.full((len(texts), longest + 1), end)
    targets = torch.full_like(batch, -100)
    for i, text in enumerate(texts):
        length = len(text[:longest])
        batch[i, 1 : length + 1] = torch.tensor(text[:longest])  # after the end of a document
        targets[i, 1 : length + 1] = batch[i, 1 : length + 1]
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(STEPS):
        part = torch.arange(BATCH * step, BATCH * (step + 1)) % len(rows)
        optimiser.zero_grad()
        model(input_ids=batch[part], labels=targets[part]).loss.backward()
        optimiser.step()


@functools.lru_cache(maxsize=2)
def _loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def likelihood(folder: Path, context: list[int], text: list[int]) -> float:
    """Natural log-likelihood of ``text`` after ``context``, token by token: a loop of its own, without the harness."""
    whole = [*context, *text]
    with torch.inference_mode():
        scores = _loaded(folder)(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return math.fsum(float(scores[i - 1, whole[i]]) for i in range(len(context), len(whole)))


def likelihood_after(folder: Path, prompt: str, text: str) -> float:
    """That of ``text``, whose tokens are those of the whole after those of the prompt."""
    start = ids(prompt)
    return likelihood(folder, start, ids(prompt + text)[len(start) :])


def accuracies(folder: Path, rows: list[Row]) -> dict[str, float]:
    """By the total log-likelihood of each choice, and by that over its characters."""
    right = {"acc": 0, "acc_norm": 0}
    for row in rows:
        sums = [likelihood_after(folder, row["prompt"], f" {choice}") for choice in row["choices"]]
        each = [total / len(choice) for total, choice in zip(sums, row["choices"], strict=True)]
        right["acc"] += max(range(len(sums)), key=sums.__getitem__) == row["answer"]
        right["acc_norm"] += max(range(len(each)), key=each.__getitem__) == row["answer"]
    return {name: n / len(rows) for name, n in right.items()}


def bits_and_bytes(folder: Path, rows: list[Row], whole: bool = False) -> list[tuple[float, int]]:
    """Of each response with the space before it given its prompt, or of both after the end of a document."""
    end = tokenizer().token_to_id(EOD)
    found = []
    for row in rows:
        text = f" {row['response']}"
        if whole:
            total, text = likelihood(folder, [end], ids(row["prompt"] + text)), row["prompt"] + text
        else:
            total = likelihood_after(folder, row["prompt"], text)
        found.append((-total / math.log(2), len(text.encode())))
    return found


def ratio(found: list[tuple[float, int]]) -> float:
    """Bits per byte of them all."""
    return math.fsum(bits for bits, _ in found) / sum(n_bytes for _, n_bytes in found)
