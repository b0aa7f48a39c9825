"""Runs a transformers model over documents: the one inference engine of all labelling plug-ins.

It tokenises without padding, groups documents by length under a token budget, halves a batch that does not fit into
memory, and gives the results back in the order of the documents. How models are found and loaded safely is in
``models``; what their outputs mean is each plug-in's own.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import models
from quadmix_plugin.errors import InputError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Ids = NDArray[np.int32]

# Measured for BERT, DeBERTa, T5 and Llama of 128 to 768 wide on one CPU thread: a document has the same result, to the
# bit, in any company, if its padded length depends on it alone and is a multiple of 8, at least 16, and if layers that
# see one vector per document are computed a fixed number of rows at a time (``in_blocks``).
_LENGTH_MULTIPLE = 8
_SHORTEST = 16
_COARSE = 16
"""On a GPU, where batches want to be large, a document may be padded by a 16th of its length."""
MOST_PADDING = 32
"""No document of more tokens than ``_SHORTEST`` is padded by so many."""
_HEAD_ROWS = 32

_TOKENS_ON_CPU = 2048  # more does not fit the caches: 32 × 512 is slower by a sixth (BERT and DeBERTa, 768 wide)
_TOKENS_ON_GPU = 32768
_HALVINGS = 3
_WINDOW = 2048
"""Documents that are tokenised at a time, while those before them are computed."""
_SECONDS_BETWEEN_REPORTS = 30


@dataclass
class DocumentModel(ABC):
    """What the transformers plug-ins share: options, loading, and ``run`` over texts.

    A plug-in gives ``load_network`` and ``forward``; ``read_folder`` where it needs more than tokenizer and weights,
    and ``encode`` where documents are not tokenised as they are.

    Args:
        model: a local folder, or a hub id with ``revision``.
        revision: the 40 hex digits of a commit on the hub.
        max_length: tokens of a document that the model sees; by default the tokenizer's limit, at most 512.
        tokens_per_batch: upper bound of padded tokens in one forward pass; by default 2,048 on a CPU and 32,768 on a
            GPU. Where memory does not suffice, it is halved up to three times.
    """

    model: str
    revision: str | None = None
    max_length: int | None = None
    tokens_per_batch: int | None = None

    def __post_init__(self) -> None:
        models.check_source(self.model, self.revision)
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise InputError(f"tokens_per_batch: {self.tokens_per_batch}; give at least 1, or leave it out")
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"max_length: {self.max_length}; give at least 1, or leave it out")
        self._tokenizer: Any = None
        self._network: Any = None
        self._runner: BatchRunner | None = None
        self._device = "cpu"
        self._positions = 1 << 30

    def download(self) -> None:
        """Fetches the model into the hub's cache, once per machine."""
        models.model_folder(self.model, self.revision)

    def facts(self) -> dict[str, Any]:
        """What a reader of the scores needs to know of the model; for the run's provenance."""
        return {"model": self.model, "revision": self.revision}

    def check(self) -> None:
        """Looks at all of the model but the weights' values, so that a fault shows before the first document.

        Raises:
            InputError: as ``setup``, for what can be seen without loading the weights.
        """
        folder = models.model_folder(self.model, self.revision)
        models.read_config(folder)
        models.weight_files(folder)
        self._tokenizer = models.load_transformers_tokenizer(folder)
        self.read_folder(folder)

    def setup(self, device: str) -> None:
        """Loads tokenizer and network onto ``device``.

        Raises:
            InputError: a model that is damaged, of another kind, or without tokenizer; no such device.
        """
        folder = models.model_folder(self.model, self.revision)
        self._device = models.choose_device(device)
        models.read_config(folder)
        self._tokenizer = models.load_transformers_tokenizer(folder)
        self.read_folder(folder)
        self._network = in_blocks(self.load_network(folder))
        self._runner = BatchRunner(
            self.forward,
            self._tokenizer.pad_token_id or 0,
            self._device,
            self.tokens_per_batch,
            str(folder),
            self.length,
        )

    def read_folder(self, folder: Path) -> None:  # noqa: B027 - a plug-in may need nothing
        """Reads what the plug-in needs of the model's files, and refuses what it cannot use."""

    @abstractmethod
    def load_network(self, folder: Path) -> "torch.nn.Module":
        """The network, ready to infer on ``self._device``."""

    @abstractmethod
    def forward(self, ids: "torch.Tensor", mask: "torch.Tensor") -> "torch.Tensor":
        """Ids and mask [b, t] to results [b, k]."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, at most ``length`` of them."""
        return token_ids(self._tokenizer, texts, self.length)

    @property
    def length(self) -> int:
        """Tokens that the model sees."""
        return self.max_length or min(models.input_length(self._tokenizer), self._positions)

    def limit_positions(self, config: Any, place: Path) -> None:
        """Keeps to the positions that a model has embeddings for.

        Raises:
            InputError: ``max_length`` is more.
        """
        positions = getattr(config, "max_position_embeddings", None)
        if not positions or getattr(config, "relative_attention", False):
            return
        if "roberta" in config.model_type:  # these count from the padding's id on
            positions -= (config.pad_token_id or 0) + 1
        if (self.max_length or 0) > positions:
            raise InputError(f"{place}: max_length: {self.max_length}, and the model has {positions} positions")
        self._positions = positions

    def run(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The network's results for each text, float32 [n, k]; (0, 1) for no texts."""
        if self._runner is None:
            raise InputError(f"{self.model}: not loaded; call setup(device) first")
        return self._runner.run(texts, self.encode)


class BatchRunner:
    """Computes ``forward(ids [b, t], mask [b, t]) -> [b, k]`` over documents of up to ``longest`` tokens.

    The budget of tokens stays halved after a batch that did not fit, so that the next ones fit at once.
    """

    def __init__(
        self,
        forward: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]",
        pad_id: int,
        device: str,
        tokens_per_batch: int | None = None,
        name: str = "model",
        longest: int | None = None,
    ) -> None:
        self._forward, self._pad_id, self._device, self._name = forward, pad_id, device, name
        self._longest = longest
        self.tokens_per_batch = tokens_per_batch or (_TOKENS_ON_CPU if device == "cpu" else _TOKENS_ON_GPU)
        self.halvings = 0

    def run(self, texts: Sequence[str], encode: Callable[[Sequence[str]], list[Ids]]) -> NDArray[np.float32]:
        """Results of all texts, float32 [n, k], in their order.

        Raises:
            InputError: memory does not suffice for an eighth of the budget.
        """
        import torch

        progress = _Progress(self._name, len(texts))
        results: list[NDArray[np.float32]] = []
        with torch.inference_mode(), _one_thread(self._device):
            for ids in _ahead(encode, texts):
                results.append(self._window(ids))
                progress.report(len(ids))
        return np.concatenate(results) if results else np.empty((0, 1), dtype=np.float32)

    def _window(self, ids: Sequence[Ids]) -> NDArray[np.float32]:
        """Longest first, so that too little memory shows at once; results stay on the device until all are there."""
        import torch

        order: list[int] = []
        parts: list[torch.Tensor] = []
        classes = length_classes([len(i) for i in ids], self._longest, coarse=self._device != "cpu")
        for length, members in sorted(classes.items(), reverse=True):
            start = 0
            while start < len(members):
                rows = members[start : start + max(1, self.tokens_per_batch // length)]
                part = self._batch([ids[i] for i in rows], length)
                if part is not None:
                    parts.append(part)
                    order += rows
                    start += len(rows)
        computed = torch.cat(parts).float().cpu().numpy()
        result = np.empty_like(computed)
        result[order] = computed
        return result

    def _batch(self, ids: Sequence[Ids], length: int) -> "torch.Tensor | None":
        """Results of one batch on the device; None, and half the budget, where memory did not suffice."""
        import torch

        inputs = torch.full((len(ids), length), self._pad_id, dtype=torch.long)
        mask = torch.zeros_like(inputs)
        for row, known in enumerate(ids):
            inputs[row, : len(known)] = torch.from_numpy(known)
            mask[row, : len(known)] = 1
        try:
            if self._device != "cpu":
                inputs = inputs.pin_memory().to(self._device, non_blocking=True)
                mask = mask.pin_memory().to(self._device, non_blocking=True)
            return self._forward(inputs, mask)
        except (RuntimeError, MemoryError) as error:
            if not models.is_out_of_memory(error):
                raise
            self._halve(len(ids), length, error)
        if self._device != "cpu":
            torch.cuda.empty_cache()
        return None

    def _halve(self, rows: int, length: int, error: BaseException) -> None:
        if self.halvings == _HALVINGS or rows == 1:
            raise InputError(
                f"{self._name}: not enough memory on {self._device} for {rows} × {length} tokens "
                f"({models.first_line(error)}); lower tokens_per_batch ({self.tokens_per_batch}) or max_length, or "
                f"use a larger device"
            ) from error
        self.halvings += 1
        self.tokens_per_batch = min(self.tokens_per_batch, rows * length) // 2
        logger.warning(
            "%s: not enough memory on %s for %d × %d tokens; going on with %d tokens per batch",
            self._name, self._device, rows, length, self.tokens_per_batch,
        )  # fmt: skip


def length_classes(lengths: Sequence[int], longest: int | None = None, *, coarse: bool = False) -> dict[int, list[int]]:
    """Padded length, at most ``longest``, → the documents of that class; it depends on each document alone.

    Steps are of 8 tokens; ``coarse`` ones are of 16 above 128 tokens and of 32 above 256.
    """
    classes: dict[int, list[int]] = defaultdict(list)
    for i, length in enumerate(lengths):
        step = _LENGTH_MULTIPLE
        while coarse and step < MOST_PADDING and step * _COARSE < length:
            step *= 2
        padded = max(_SHORTEST, -(-length // step) * step)
        classes[max(length, min(padded, longest or padded))].append(i)
    return classes


def token_ids(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[Ids]:
    """Ids int32 of every text with the model's special tokens, truncated, not padded.

    Of a long text only the head is tokenised: cut at white space, and checked to be long enough.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length, direction=tokenizer.truncation_side)

    def ids(some: Sequence[str]) -> list[Ids]:
        return [np.array(encoding.ids, dtype=np.int32) for encoding in backend.encode_batch_fast(some)]

    whole = [models.encodable(text) for text in texts]
    cuts_the_end = tokenizer.truncation_side == "right"
    heads = [models.head(text, models.CHARACTERS_PER_TOKEN * max_length) for text in whole] if cuts_the_end else whole
    found = ids(heads)
    for i, (short, text) in enumerate(zip(heads, whole, strict=True)):
        if len(short) < len(text) and len(found[i]) < max_length:
            found[i] = ids([text])[0]
    return found


def in_blocks(network: Any) -> Any:
    """The network, whose linear layers compute one vector per document in blocks of 32 rows.

    A matrix product of few rows is rounded according to their number; heads and first decoder steps are such products.
    """
    import torch

    def blocked(linear: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        plain = linear.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.dim() != 2 and (x.dim() != 3 or x.shape[1] > 1):
                return plain(x)
            rows = x.reshape(-1, x.shape[-1])
            padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % _HEAD_ROWS))
            result = torch.cat([plain(block) for block in padded.split(_HEAD_ROWS)])[: len(rows)]
            return result.reshape(*x.shape[:-1], -1)

        return forward

    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = blocked(module)  # pyright: ignore[reportAttributeAccessIssue]
    return network


class _Progress:
    """Logs how far a long call is, every half minute."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._started = self._reported = time.monotonic()

    def report(self, more: int) -> None:
        self._done += more
        now = time.monotonic()
        if now - self._reported >= _SECONDS_BETWEEN_REPORTS:
            self._reported = now
            rate = self._done / (now - self._started)
            logger.info("%s: %d of %d documents, %.3g per second", self._name, self._done, self._total, rate)


def _ahead(encode: Callable[[Sequence[str]], list[Ids]], texts: Sequence[str]) -> Iterator[list[Ids]]:
    """The ids of window after window; the next one is tokenised while its predecessor is computed."""
    starts = range(0, len(texts), _WINDOW)
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for start in starts:
            following = pool.submit(encode, texts[start : start + _WINDOW])
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
