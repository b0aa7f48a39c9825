"""Trains the tiny labelling models and the tokenizer of the quickstart, from examples/quickstart/corpus.parquet alone.

They have the formats of the published models, so that the quickstart runs the same code as a real corpus, and they
are worth what eleven thousand documents with weak labels can teach: each folder's README.md says so with figures.
The validation questions are never read. Run from anywhere: ``python scripts/train_quickstart_models.py [NAME ...]``.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # sums in a fixed order: the same tokenizer every time

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from quickstart_corpus import QUICKSTART, Documents, education_labels, informative_labels, prose_labels
from safetensors.torch import save_file
from scipy.stats import spearmanr
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import models as tokenizer_models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from quadmix_plugin.models import load_transformers_tokenizer
from quadmix_plugin.stages.domain_classifiers.nvidia_domain import NvidiaDomain, build_network
from quadmix_plugin.stages.scorers.ask_llm import AskLLM
from quadmix_plugin.stages.scorers.dclm_fasttext import DCLMFastText
from quadmix_plugin.stages.scorers.fineweb_edu import FineWebEdu

SEED = 20250423
END_OF_DOCUMENT = "<|endoftext|>"
DOMAINS = """
    Adult Arts_and_Entertainment Autos_and_Vehicles Beauty_and_Fitness Books_and_Literature Business_and_Industrial
    Computers_and_Electronics Finance Food_and_Drink Games Health Hobbies_and_Leisure Home_and_Garden
    Internet_and_Telecom Jobs_and_Education Law_and_Government News Online_Communities People_and_Society
    Pets_and_Animals Real_Estate Science Sensitive_Subjects Shopping Sports Travel_and_Transportation
""".split()  # noqa: SIM905


# Tokenizers in the manner of each model family.


def train_eod_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """Byte-level BPE with 4,096 entries: the tokenizer that counts and exports tokens."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    names = dict.fromkeys(("eos_token", "bos_token", "unk_token", "pad_token"), END_OF_DOCUMENT)
    save_tokenizer(folder, tokenizer, 1000000000000000019884624838656, **names)


def train_wordpiece(folder: Path, texts: Sequence[str], size: int, max_length: int) -> None:
    """Lower-case WordPiece with [CLS] and [SEP], as BERT has."""
    tokenizer = Tokenizer(tokenizer_models.WordPiece(unk_token="[UNK]"))  # noqa: S106 - a token, not a secret
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    save_tokenizer(folder, tokenizer, max_length, **names)


def train_word_start_bpe(folder: Path, texts: Sequence[str], size: int, max_length: int, *, t5: bool) -> None:
    """BPE over words with a leading ``▁`` as SentencePiece writes them; ``</s>`` ends a text for T5, else [SEP]."""
    special = ["<pad>", "</s>", "<unk>"] if t5 else ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    tokenizer = Tokenizer(tokenizer_models.BPE(unk_token="<unk>" if t5 else "[UNK]", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, limit_alphabet=200, max_token_length=16, show_progress=False
    )
    heads = [text[:1000] for text in texts] + ["yes no Yes No"] * 2000  # the answers become tokens of their own
    tokenizer.train_from_iterator(heads, trainer, length=len(heads))
    if t5:
        keys = ("pad_token", "eos_token", "unk_token")
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    else:
        keys = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
        ends = [("[CLS]", 1), ("[SEP]", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    save_tokenizer(folder, tokenizer, max_length, **dict(zip(keys, special, strict=True)))


def save_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int, **names: str) -> None:
    """Both files that transformers reads; plain tokenizers reads the first."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, **names}
    write_json(folder / "tokenizer_config.json", config | {"clean_up_tokenization_spaces": False})


# Models: each function trains one on some documents and saves it in its published format.


def train_domain(folder: Path, documents: Documents) -> None:
    """DeBERTa-v2, dropout and a linear head on the first token; the config names backbone and labels."""
    train_word_start_bpe(folder, documents.texts, 6000, 96, t5=False)
    tokenizer = load_transformers_tokenizer(folder)
    config = DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=96, relative_attention=True, position_buckets=32, share_att_key=True,
        norm_rel_ebd="layer_norm", pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip
    network = build_network(config, len(DOMAINS), dropout=0.2)
    ids = tokenizer([text[:2000] for text in documents.texts], truncation=True, padding=False)["input_ids"]
    targets = torch.tensor([DOMAINS.index(domain) for domain in documents.domains])
    fit(network, ids, targets, network, torch.nn.functional.cross_entropy, epochs=4)
    config.save_pretrained(folder / "backbone")
    labels = {str(i): label for i, label in enumerate(DOMAINS)}
    content = {"base_model": "backbone", "fc_dropout": 0.2, "id2label": labels, "model_type": "deberta-v2"}
    write_json(folder / "config.json", content | {"label2id": {label: i for i, label in enumerate(DOMAINS)}})
    weights = {name: weight.half().contiguous() for name, weight in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def train_fineweb_edu(folder: Path, documents: Documents) -> None:
    """BertForSequenceClassification with one regression output."""
    train_wordpiece(folder, documents.texts, 6000, 96)
    tokenizer = load_transformers_tokenizer(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=96, num_labels=1, problem_type="regression", pad_token_id=0,
    )  # fmt: skip
    network = BertForSequenceClassification(config)
    ids = tokenizer(documents.texts, truncation=True, padding=False)["input_ids"]
    targets = torch.from_numpy(education_labels(documents))
    loss = torch.nn.functional.mse_loss
    fit(network, ids, targets, lambda i, m: network(input_ids=i, attention_mask=m).logits[:, 0], loss, epochs=3)
    network.half().save_pretrained(folder)


def train_ask_llm(folder: Path, documents: Documents) -> None:
    """T5ForConditionalGeneration (the Flan kind: gated GELU, untied head) that answers the default prompt."""
    train_word_start_bpe(folder, documents.texts, 4000, 128, t5=True)
    tokenizer = load_transformers_tokenizer(folder)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=48, d_kv=24, d_ff=96, num_layers=1, num_decoder_layers=1, num_heads=2,
        relative_attention_num_buckets=16, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    network = T5ForConditionalGeneration(config)
    question = AskLLM(model=str(folder))
    question._tokenizer = tokenizer
    ids = question._question_ids([text.replace("###", "") for text in documents.texts])
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("yes", "no"))
    if len(yes) != 1 or len(no) != 1:
        raise SystemExit(f"{folder}: yes and no are not single tokens ({yes}, {no}); repeat them more often")
    targets = torch.where(torch.from_numpy(informative_labels(documents)), yes[0], no[0])

    def answer(inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        start = torch.zeros((len(inputs), 1), dtype=torch.long)
        return network(input_ids=inputs, attention_mask=mask, decoder_input_ids=start, use_cache=False).logits[:, 0]

    fit(network, ids, targets, answer, torch.nn.functional.cross_entropy, epochs=2)
    network.half().save_pretrained(folder)


def train_dclm_fasttext(folder: Path, documents: Documents) -> None:
    """FastText with word pairs and the labels hq and cc; one thread, so that the file is the same every time."""
    labels = np.where(prose_labels(documents), "__label__hq", "__label__cc")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        for label, text in zip(labels, documents.texts, strict=True):
            file.write(f"{label} {' '.join(text.strip().splitlines())}\n")
        file.flush()
        options = {"dim": 8, "wordNgrams": 2, "bucket": 20000, "minCount": 8, "epoch": 5, "lr": 0.2}
        options |= {"thread": 1, "seed": SEED, "verbose": 0}
        program = f"import fasttext; fasttext.train_supervised({file.name!r}, **{options}).save_model('model.bin')"
        # With one thread fastText draws a tenth of its initial weights and leaves the rest as the memory is: NaN at
        # worst. In a new process, blocks that malloc takes from the system one by one are zero.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, check=True)  # noqa: S603


def fit(
    network: torch.nn.Module,
    ids: list[list[int]],
    targets: torch.Tensor,
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    epochs: int,
) -> None:
    """AdamW over shuffled batches of 32, warm-up then linear decay; leaves the network in evaluation mode."""
    generator = torch.Generator().manual_seed(SEED)
    steps = epochs * -(-len(ids) // 32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 100, 1 - s / steps))
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(ids), generator=generator).split(32):
            inputs, mask = _padded([ids[i] for i in rows.tolist()])
            optimizer.zero_grad()
            loss(forward(inputs, mask), targets[rows]).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    network.eval()


def _padded(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, ids))
    inputs = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    return inputs, mask


# What each is worth, measured through the plug-in that will load it.


def measure_domain(folder: Path, documents: Documents) -> dict[str, float]:
    """Accuracy against ``true_domain``, plain and balanced over domains."""
    classifier = NvidiaDomain(model=str(folder))
    classifier.setup("cpu")
    found = np.array(classifier.classify(documents.texts), dtype=object)
    accuracy = float((found == documents.domains).mean())
    return {"accuracy": accuracy, "balanced accuracy": float(balanced_accuracy_score(documents.domains, found))}


def measure_fineweb_edu(folder: Path, documents: Documents) -> dict[str, float]:
    """Error and rank correlation against the weak label."""
    found, labels = _scores(FineWebEdu(model=str(folder)), documents), education_labels(documents)
    return {"mean absolute error": float(np.abs(found - labels).mean()), "Spearman": float(spearmanr(found, labels)[0])}


def measure_ask_llm(folder: Path, documents: Documents) -> dict[str, float]:
    """AUC of the yes-probability against the weak label."""
    return {"AUC": roc_auc_score(informative_labels(documents), _scores(AskLLM(model=str(folder)), documents))}


def measure_dclm_fasttext(folder: Path, documents: Documents) -> dict[str, float]:
    """AUC of P(hq) against the weak label."""
    return {"AUC": roc_auc_score(prose_labels(documents), _scores(DCLMFastText(model=str(folder)), documents))}


def _scores(scorer: Any, documents: Documents) -> NDArray[np.float32]:
    scorer.setup("cpu")
    return scorer.score(documents.texts)


@dataclass(frozen=True)
class Recipe:
    """One model of the quickstart: how it is trained and measured, and what its card says."""

    train: Callable[[Path, Documents], None]
    measure: Callable[[Path, Documents], dict[str, float]]
    title: str
    label: str


RECIPES = {
    "domain": Recipe(
        train_domain, measure_domain, "domain classifier, format of `nvidia/domain-classifier`",
        "`true_domain` of the corpus, which follows a document's source or its section. Two of the 26 labels (Adult, "
        "Sensitive_Subjects) have no document and are never to be expected; News has five.",
    ),
    "fineweb-edu": Recipe(
        train_fineweb_edu, measure_fineweb_edu, "educational value, format of `HuggingFaceFW/fineweb-edu-classifier`",
        "0 to 5 by the kind of source: 5 teaching chapters of manuals, 4 their other chapters, 3 reference works, 2 "
        "documentation of single functions, and speeches, 1 fiction and scripture, 0 interface strings and changelogs.",
    ),
    "dclm-fasttext": Recipe(
        train_dclm_fasttext, measure_dclm_fasttext, "P(hq), format of `mlfoundations/fasttext-oh-eli5`",
        "`hq` = continuous prose by form alone (long paragraphs of whole sentences, many function words), `cc` = "
        "lists, strings, statistics, changelogs, references.",
    ),
    "ask-llm": Recipe(
        train_ask_llm, measure_ask_llm, "yes-probability of a T5, format of Flan-T5 under AskLLM",
        "yes = informative by itself: reference works, and manual sections that open with their heading; no = fiction, "
        "documentation of single functions, interface strings, changelogs, fragments.",
    ),
}  # fmt: skip


def held_out(documents: Documents) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """Rows to train on, and two kinds of rows to measure on: whole sources, and random rows of the other sources."""
    share = np.array([_hash_share(source) for source in documents.sources])
    random = np.random.default_rng(SEED).random(len(share)) < 0.1
    unseen = share < 0.15
    rows = {"random documents": np.flatnonzero(random & ~unseen), "unseen sources": np.flatnonzero(unseen)}
    return np.flatnonzero(~random & ~unseen), rows


def _hash_share(name: str) -> float:
    return int.from_bytes(hashlib.sha1(name.encode(), usedforsecurity=False).digest()[:4], "big") / 2**32


def evaluate(recipe: Recipe, documents: Documents) -> dict[str, dict[str, float]]:
    """Trains on a part of the corpus and measures on the rest."""
    train_rows, parts = held_out(documents)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(SEED)
        recipe.train(Path(folder), documents.part(train_rows))
        return {
            f"{name} ({len(rows)})": recipe.measure(Path(folder), documents.part(rows)) for name, rows in parts.items()
        }


def card(name: str, recipe: Recipe, figures: dict[str, dict[str, float]]) -> str:
    """The model card."""
    measures = list(next(iter(figures.values())))
    lines = [f"| held out | {' | '.join(measures)} |", "|---|" + "--:|" * len(measures)]
    lines += [f"| {part} | {' | '.join(f'{row[m]:.3f}' for m in measures)} |" for part, row in figures.items()]
    return f"""# Quickstart model `{name}`: {recipe.title}

A tiny model trained from scratch in about a minute on one CPU core by `scripts/train_quickstart_models.py`, with
fixed seeds, from `examples/quickstart/corpus.parquet` alone. It exists so that the quickstart runs the real code with
real inference. **It is not a quality model for other text**: use the published model of the same format for that.

**Weak label it was trained on:** {recipe.label} Nobody read the documents one by one.

{chr(10).join(lines)}

Measured with a model trained on the other documents; the committed model is trained on all of them, so what it says
about the quickstart corpus is in-sample. The label goes with the source, and so does the vocabulary: the figure on
unseen sources, not the one on random documents, says what the model has learnt beyond recognising a source.

Licence: Apache-2.0, as the project. The texts it was trained on keep theirs (see `../../README.md`).
"""


def write_json(path: Path, content: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def fresh_folders(root: Path, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """An empty folder for each name."""
    for name in names:
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield name, folder


def main() -> None:
    """Trains the named models, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"tokenizer, {', '.join(RECIPES)}; default all")
    parser.add_argument("--out", type=Path, default=QUICKSTART / "models")
    parser.add_argument("--cards-only", action="store_true", help="measure again and rewrite the cards")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    documents = Documents.read()
    names = arguments.names or ["tokenizer", *RECIPES]
    for name, folder in fresh_folders(arguments.out, [] if arguments.cards_only else names):
        started = time.perf_counter()
        torch.manual_seed(SEED)
        if name == "tokenizer":
            train_eod_tokenizer(folder, documents.texts)
        else:
            RECIPES[name].train(folder, documents)
        for path in folder.rglob("*.safetensors"):
            path.chmod(0o644)  # transformers writes them for the owner alone
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{name}: {size / 1e6:.2f} MB, {time.perf_counter() - started:.0f} s", flush=True)
    for name in [name for name in names if name in RECIPES]:
        figures = evaluate(RECIPES[name], documents)
        (arguments.out / name / "README.md").write_text(card(name, RECIPES[name], figures), encoding="utf-8")
        print(name, figures, flush=True)


if __name__ == "__main__":
    main()
