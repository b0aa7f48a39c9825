"""Trains small tokenizers in the manner of each model family; which sizes and texts, the callers say."""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # sums in a fixed order: the same tokenizer every time

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

END_OF_DOCUMENT = "<|endoftext|>"


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
    # Left alone, the library numbers these at random, and ties between merges follow the numbers.
    inner = [f"##{letter}" for letter in sorted(_letters(tokenizer, texts))]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special + inner, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer = _with_vocabulary(tokenizer, special)
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
    heads = [text[:1000] for text in texts] + ["yes no Yes No"] * 2000  # the answers become tokens of their own
    # Left alone, the library chooses among equally rare characters at random.
    letters = _letters(tokenizer, heads)
    alphabet = ["▁", *sorted(letters, key=lambda letter: (-letters[letter], letter))[:199]]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, limit_alphabet=len(alphabet),
        max_token_length=16, show_progress=False,
    )  # fmt: skip
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


def write_json(path: Path, content: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _letters(tokenizer: Tokenizer, texts: Sequence[str]) -> Counter[str]:
    """How often each character stands in the normalised texts, without white space."""
    letters: Counter[str] = Counter()
    for text in texts:
        letters.update(tokenizer.normalizer.normalize_str(text))
    return Counter({letter: count for letter, count in letters.items() if not letter.isspace()})


def _with_vocabulary(trained: Tokenizer, special: Sequence[str]) -> Tokenizer:
    """The same WordPiece, but only ``special`` are special tokens."""
    made = Tokenizer(tokenizer_models.WordPiece(trained.get_vocab(with_added_tokens=False), unk_token="[UNK]"))  # noqa: S106
    made.normalizer, made.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    made.add_special_tokens(list(special))
    return made
