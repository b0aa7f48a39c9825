"""AskLLM (arXiv 2402.09668): a T5 model is asked whether a document is worth training on.

The score is the probability of a yes-token at the first answer position, over the whole vocabulary. Nothing is
generated or parsed, so a document that contains instructions can change its own score and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import models
from quadmix_plugin.errors import InputError

_DOCUMENT = "{document}"
_CHARACTERS_PER_TOKEN = 8  # more than text has; where it is not, the whole document is tokenised
_PROMPT = (
    "###\n{document}\n###\n\n"
    "Would the text between the two ### lines help to pre-train a language model? A helpful text is well formatted, "
    "teaches something usable about the world, and is not harmful, racist or sexist.\n\nOPTIONS:\n- yes\n- no\n"
)


@dataclass
class AskLLM:
    """Scores documents by the yes-probability of a T5 model such as Flan-T5.

    Args:
        model: a local folder, or a hub id with ``revision``.
        revision: the 40 hex digits of a commit on the hub.
        prompt: the question; holds ``{document}`` once. ``###`` is removed from documents, since it delimits them.
        yes_tokens: spellings of yes; those that are a single token of the model count.
        max_length: tokens of prompt and document together; by default the tokenizer's limit, at most 512. The
            document is cut to fit, never the prompt.
        tokens_per_batch: upper bound of padded tokens in one forward pass.

    Raises:
        InputError: no such model, one that is not encoder-decoder, a prompt without ``{document}`` or longer than
            ``max_length``, or no spelling of yes that is a single token.
    """

    name: ClassVar[str] = "ask-llm"
    higher_is_better: ClassVar[bool] = True

    model: str = "google/flan-t5-large"
    revision: str | None = None
    prompt: str = _PROMPT
    yes_tokens: tuple[str, ...] = ("yes", "Yes")
    max_length: int | None = None
    tokens_per_batch: int = 16384

    def __post_init__(self) -> None:
        models.check_source(self.model, self.revision)
        if self.prompt.count(_DOCUMENT) != 1:
            raise InputError(
                f"ask-llm.prompt: holds {_DOCUMENT} {self.prompt.count(_DOCUMENT)} times; write it exactly once"
            )
        self._model: Any = None
        self._tokenizer: Any = None
        self._device = "cpu"
        self._yes_ids: list[int] = []

    def download(self) -> None:
        """Fetches the model into the hub's cache, once per machine."""
        models.model_folder(self.model, self.revision)

    def setup(self, device: str) -> None:
        """Loads the model onto ``device``."""
        from transformers import AutoModelForSeq2SeqLM

        folder = models.model_folder(self.model, self.revision)
        if not models.read_config(folder).get("is_encoder_decoder", False):
            raise InputError(f"{folder}: not an encoder-decoder model; give a T5 such as Flan-T5")
        self._device = models.choose_device(device)
        self._tokenizer = models.load_transformers_tokenizer(folder)
        self._yes_ids = self._single_tokens(folder)
        self._model = models.load_pretrained(AutoModelForSeq2SeqLM, folder, self._device)
        if (used := len(self._prompt_ids([""])[0])) >= self._limit:
            raise InputError(
                f"ask-llm.max_length: the prompt alone takes {used} of {self._limit} tokens; raise it or ask shorter"
            )

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The yes-probability of each text, float32 [n] in [0, 1]."""
        documents = [models.encodable(text).replace("###", "") for text in texts]
        return models.run_batches(
            self._question_ids(documents),
            self._yes_probability,
            pad_id=self._tokenizer.pad_token_id,
            device=self._device,
            tokens_per_batch=self.tokens_per_batch,
        )[:, 0]

    def _yes_probability(self, inputs: Any, mask: Any) -> Any:
        import torch

        start = torch.full((len(inputs), 1), self._model.config.decoder_start_token_id, device=inputs.device)
        output = self._model(input_ids=inputs, attention_mask=mask, decoder_input_ids=start, use_cache=False)
        probability = output.logits[:, 0].float().softmax(dim=-1)
        return probability[:, self._yes_ids].sum(dim=-1, keepdim=True)

    @property
    def _limit(self) -> int:
        return models.input_length(self._tokenizer, self.max_length)

    def _question_ids(self, documents: Sequence[str]) -> list[list[int]]:
        """Ids of the prompt with each document, the document cut at a token boundary where the whole is too long."""
        kept = [models.head(document, _CHARACTERS_PER_TOKEN * self._limit) for document in documents]
        ids = self._prompt_ids(kept)
        short = [i for i, row in enumerate(ids) if len(row) < self._limit and len(kept[i]) < len(documents[i])]
        for i in short:
            kept[i] = documents[i]
            ids[i] = self._prompt_ids([documents[i]])[0]
        while long := [i for i, row in enumerate(ids) if len(row) > self._limit]:
            cut = self._cut([kept[i] for i in long], [len(ids[i]) - self._limit for i in long])
            for i, document, row in zip(long, cut, self._prompt_ids(cut), strict=True):
                kept[i], ids[i] = document, row
        return ids

    def _cut(self, documents: list[str], excess: list[int]) -> list[str]:
        """Each document without its last ``excess`` tokens, and by one character at least."""
        found = self._tokenizer(documents, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            text[: min(offsets[-n - 1][1], len(text) - 1)] if len(offsets) > n else ""
            for text, offsets, n in zip(documents, found["offset_mapping"], excess, strict=True)
        ]

    def _prompt_ids(self, documents: Sequence[str]) -> list[list[int]]:
        if not documents:
            return []
        before, _, after = self.prompt.partition(_DOCUMENT)
        texts = [before + document + after for document in documents]
        return self._tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]

    def _single_tokens(self, folder: Any) -> list[int]:
        spelt = [self._tokenizer(word, add_special_tokens=False)["input_ids"] for word in self.yes_tokens]
        ids = {ids[0] for ids in spelt if len(ids) == 1} - {self._tokenizer.unk_token_id}
        if not ids:
            raise InputError(
                f"ask-llm.yes_tokens: none of {', '.join(map(repr, self.yes_tokens))} is a single token of {folder}; "
                f"give spellings that are"
            )
        return sorted(ids)
