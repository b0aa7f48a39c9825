"""AskLLM (arXiv 2402.09668): a language model is asked whether a document is worth training on.

The score is the probability of a yes-token at the first answer position, over the whole vocabulary. Nothing is
generated or parsed, so a document that contains instructions can change its own score and nothing else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import models
from quadmix_plugin.errors import InputError
from quadmix_plugin.inference import MOST_PADDING, DocumentModel, Ids

PROMPT = (
    "###\n{document}\n###\n\n"
    "Would the text between the two ### lines help to pre-train a language model? A helpful text is well formatted, "
    "teaches something usable about the world, and is not harmful, racist or sexist.\n\nOPTIONS:\n- yes\n- no\n"
)
"""The default question, for the T5 family; a decoder is asked the same with ``ANSWER:`` at the end."""

_DOCUMENT = "{document}"
_ONE_DATE = "{% macro strftime_now(format) %}1 Jan 2025{% endmacro %}"
"""Before a chat template: a prompt with today's date would score otherwise tomorrow."""
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_YES = ("yes", "Yes")
_YES_OF_DECODERS = ("yes", "Yes", "YES", " yes", " Yes", " YES")


@dataclass
class AskLLM(DocumentModel):
    """Scores documents by the yes-probability of a language model: the T5 family (Flan-T5) or a causal one.

    Further options are those of ``DocumentModel``; the document is cut to fit into ``max_length``, never the prompt.

    Args:
        prompt: the question; holds ``{document}`` once. By default ``PROMPT``. ``###`` and the model's special tokens
            are removed from documents, since they delimit them.
        yes_tokens: spellings of yes; those that are a single token of the model count. By default yes and Yes, and
            for causal models YES too, each also with a leading space.
        chat: puts the prompt into the model's chat template, as the user's message.

    Raises:
        InputError: no such model, a prompt without ``{document}`` or longer than ``max_length``, a model without chat
            template, or no spelling of yes that is a single token.
    """

    name: ClassVar[str] = "ask-llm"
    higher_is_better: ClassVar[bool] = True

    model: str = "google/flan-t5-large"
    prompt: str | None = None
    yes_tokens: tuple[str, ...] | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompt.count(_DOCUMENT) != 1:
            raise InputError(
                f"ask-llm.prompt: holds {_DOCUMENT} {self.prompt.count(_DOCUMENT)} times; write it exactly once"
            )
        self._question: Question | None = None
        self._yes_ids: list[int] = []

    def facts(self) -> dict[str, Any]:
        """The model, and the question as it is asked."""
        folder = models.model_folder(self.model, self.revision)
        self._decodes_only = self._is_causal(folder)
        self._tokenizer = models.load_transformers_tokenizer(folder)
        asked = {"prompt": self._whole_prompt(folder), "yes_tokens": list(self._yes_words()), "chat": self.chat}
        return {**super().facts(), **asked}

    def read_folder(self, folder: Path) -> None:
        """Whether it is an encoder-decoder or a causal model; the question and the answer in its tokens."""
        self._decodes_only = self._is_causal(folder)
        config = models.load_config(folder)
        self.limit_positions(config, folder)
        if not self._decodes_only and config.decoder_start_token_id is None:
            raise InputError(f"{folder}/config.json: no decoder_start_token_id, with which an answer begins; add it")
        self._yes_ids = self._single_tokens(folder)
        self._question = Question(self._tokenizer, self._whole_prompt(folder), self.length, plain=not self.chat)

    def load_network(self, folder: Path) -> Any:
        """The language model."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        kind = AutoModelForCausalLM if self._decodes_only else AutoModelForSeq2SeqLM
        network = models.load_pretrained(kind, folder, self._device)
        self._keeps_last = "logits_to_keep" in signature(network.forward).parameters
        return network

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of the prompt with each text."""
        return self._question.ids(texts) if self._question else []

    def forward(self, ids: Any, mask: Any) -> Any:
        """The probability of the yes-tokens, [b, 1]."""
        logits = self._answer_of_decoder(ids, mask) if self._decodes_only else self._answer_of_t5(ids, mask)
        return logits.float().softmax(dim=-1)[:, self._yes_ids].sum(dim=-1, keepdim=True)

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The yes-probability of each text, float32 [n] in [0, 1]."""
        return np.clip(self.run(texts)[:, 0], 0.0, 1.0)

    def _answer_of_t5(self, ids: Any, mask: Any) -> Any:
        import torch

        start = torch.full((len(ids), 1), self._network.config.decoder_start_token_id, device=ids.device)
        return self._network(input_ids=ids, attention_mask=mask, decoder_input_ids=start, use_cache=False).logits[:, 0]

    def _answer_of_decoder(self, ids: Any, mask: Any) -> Any:
        import torch

        width = ids.shape[1]  # logits of a whole vocabulary at every position would fill the memory
        keep = min(width, MOST_PADDING) if self._keeps_last else width
        options = {"logits_to_keep": keep} if self._keeps_last else {}
        logits = self._network(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        return logits[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1 - (width - keep)]

    def _is_causal(self, folder: Path) -> bool:
        """Whether the model is a decoder alone; raises InputError where it is neither that nor encoder-decoder."""
        config = models.read_config(folder)
        kinds = [str(kind) for kind in config.get("architectures") or []]
        if config.get("is_encoder_decoder", False):
            return False
        if not any(kind.endswith(_CAUSAL) for kind in kinds):
            raise InputError(
                f"{folder}: is of the kind {', '.join(kinds) or 'unknown'}; ask-llm needs an encoder-decoder such as "
                f"Flan-T5, or a causal model"
            )
        return True

    def _default_prompt(self) -> str:
        return self.prompt or PROMPT + ("ANSWER:" if self._decodes_only and not self.chat else "")

    def _yes_words(self) -> tuple[str, ...]:
        return self.yes_tokens or (_YES_OF_DECODERS if self._decodes_only else _YES)

    def _whole_prompt(self, folder: Path) -> str:
        """The prompt as the model reads it."""
        prompt = self._default_prompt()
        if not self.chat:
            return prompt
        if not getattr(self._tokenizer, "chat_template", None):
            raise InputError(f"{folder}: its tokenizer has no chat template; leave ask-llm.chat out")
        try:
            message = [{"role": "user", "content": prompt}]
            text = self._tokenizer.apply_chat_template(
                message,
                chat_template=_ONE_DATE + self._tokenizer.chat_template,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # of templates that know it: the answer is the first token, not a thought
            )
        except Exception as error:  # whatever a model's template raises
            raise InputError(f"{folder}: its chat template fails ({models.first_line(error)})") from error
        if text.count(_DOCUMENT) != 1:
            raise InputError(f"{folder}: its chat template does not hold the user's message once; leave chat out")
        return text

    def _single_tokens(self, folder: Path) -> list[int]:
        words = self._yes_words()
        spelt = [self._tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
        ids = {ids[0] for ids in spelt if len(ids) == 1} - {self._tokenizer.unk_token_id}
        if not ids:
            raise InputError(
                f"ask-llm.yes_tokens: none of {', '.join(map(repr, words))} is a single token of {folder}; give "
                f"spellings that are"
            )
        return sorted(ids)


class Question:
    """A prompt around documents, in a tokenizer's ids; a document is cut until both fit, the prompt never.

    Args:
        tokenizer: of transformers, a fast one.
        prompt: holds ``{document}`` once.
        max_length: tokens of prompt and document together.
        plain: whether the tokenizer adds its special tokens; a chat template has them already.

    Raises:
        InputError: the prompt alone is longer.
    """

    def __init__(self, tokenizer: Any, prompt: str, max_length: int, *, plain: bool = True) -> None:
        self._tokenizer, self._prompt, self._limit, self._plain = tokenizer, prompt, max_length, plain
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        known = {tokenizer.convert_tokens_to_ids(token) for token in special} - {tokenizer.unk_token_id, None}
        self._special_ids = np.array(sorted(known), dtype=np.int32)  # unk stands for letters, too
        self._own_specials = self._specials(self._encoded(prompt.replace(_DOCUMENT, "")).ids).size
        if (used := len(self._tokens([""])[0])) >= max_length:
            raise InputError(
                f"ask-llm.max_length: the prompt alone takes {used} of {max_length} tokens; raise it or ask shorter"
            )

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Ids int32 of the prompt with each text; the text is cut at a token boundary where the whole is too long."""
        documents = [self._as_text(text) for text in texts]
        kept = [models.head(document, models.CHARACTERS_PER_TOKEN * self._limit) for document in documents]
        ids = self._tokens(kept)
        short = [i for i, row in enumerate(ids) if len(row) < self._limit and len(kept[i]) < len(documents[i])]
        for i in short:
            kept[i] = documents[i]
            ids[i] = self._tokens([documents[i]])[0]
        while long := [i for i, row in enumerate(ids) if len(row) > self._limit]:
            cut = self._cut([kept[i] for i in long], [len(ids[i]) - self._limit for i in long])
            for i, document, row in zip(long, cut, self._tokens(cut), strict=True):
                kept[i], ids[i] = document, row
        return [np.array(row, dtype=np.int32) for row in ids]

    def _as_text(self, document: str) -> str:
        """Without what delimits documents; a special token inside one would end it."""
        return self._special.sub(" ", models.encodable(document).replace("###", ""))

    def _cut(self, documents: list[str], excess: list[int]) -> list[str]:
        """Each document without its last ``excess`` tokens, and by one character at least."""
        found = self._tokenizer(documents, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            text[: min(offsets[-n - 1][1], len(text) - 1)] if len(offsets) > n else ""
            for text, offsets, n in zip(documents, found["offset_mapping"], excess, strict=True)
        ]

    def _tokens(self, documents: Sequence[str]) -> list[list[int]]:
        if not documents:
            return []
        before, _, after = self._prompt.partition(_DOCUMENT)
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        texts = [before + document + after for document in documents]
        found = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=self._plain)]
        for i, ids in enumerate(found):
            if self._specials(ids).size > self._own_specials:
                found[i] = self._without_specials(texts[i], len(before), len(texts[i]) - len(after))
        return found

    def _without_specials(self, text: str, start: int, end: int) -> list[int]:
        """Without special tokens between two characters, which a normaliser makes of look-alikes such as ``＜/s＞``."""
        encoding = self._encoded(text)
        smuggled = set()
        for i in self._specials(encoding.ids).tolist():
            begins, ends = encoding.offsets[i]
            spaces = len(text[begins:ends]) - len(text[begins:ends].lstrip())  # that the token takes along
            if begins < ends and start <= begins + spaces < end:
                smuggled.add(i)
        return [each for i, each in enumerate(encoding.ids) if i not in smuggled]

    def _specials(self, ids: list[int]) -> NDArray[np.intp]:
        return np.flatnonzero(np.isin(ids, self._special_ids))

    def _encoded(self, text: str) -> Any:
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return backend.encode(text, add_special_tokens=self._plain)
