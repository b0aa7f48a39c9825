"""CountTokens: adds the number of tokens of every document, by the tokenizer that the recipe names.

Special tokens are not counted: neither those a model adds around a text nor the end-of-document token of an export.
How tokens are counted and estimated is in ``quadmix_plugin.token_counts``.
"""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin import models, token_counts
from quadmix_plugin.schema import TEXT, TOKENS
from quadmix_plugin.stages.labelling import read_texts, with_column

ESTIMATE_ERROR = "estimate_error"
"""Key of a batch's metadata: what is known of the error of its estimates."""


@dataclass
class CountTokens(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds ``tokens`` (int64) to each batch; an empty text has none.

    Args:
        tokenizer: a folder with a ``tokenizer.json``, or a hub id with ``revision``.
        revision: the 40 hex digits of a commit on the hub.
        estimate: tokenises a sample of each document and scales it. One document in 64, by hash, is counted whole
            as well and keeps that count; what the estimates missed there goes into the batch's metadata, under
            ``estimate_error``.
        text_field: column with the text.

    Raises:
        InputError: no such tokenizer; at ``setup`` one that cannot be loaded.
    """

    tokenizer: str
    revision: str | None = None
    estimate: bool = False
    text_field: str = TEXT
    name: str = "count_tokens"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        models.check_source(self.tokenizer, self.revision)
        self._loaded: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def inputs(self) -> tuple[list[str], list[str]]:
        """The text."""
        return ["data"], [self.text_field]

    def outputs(self) -> tuple[list[str], list[str]]:
        """``tokens``."""
        return ["data"], [TOKENS]

    def setup_on_node(self, node_info: Any = None, worker_metadata: Any = None) -> None:
        """Fetches the tokenizer once per machine."""
        models.model_folder(self.tokenizer, self.revision)

    def setup(self, worker_metadata: Any = None) -> None:
        """Loads the tokenizer."""
        if self._loaded is None:
            self._loaded = models.load_tokenizer(self.tokenizer, self.revision)

    def teardown(self) -> None:
        """Lets go of the tokenizer."""
        self._loaded = None

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Adds the column to one batch."""
        self.setup()
        texts = read_texts(task, self.text_field)
        if not self.estimate:
            return with_column(task, TOKENS, token_counts.count_tokens(self._loaded, texts), pa.int64())
        estimated = token_counts.estimate_tokens(self._loaded, texts)
        checked = [i for i, text in enumerate(texts) if token_counts.is_checked(text)]
        counted = token_counts.count_tokens(self._loaded, [texts[i] for i in checked])
        facts = token_counts.compare(estimated[checked], counted)
        estimated[checked] = counted
        result = with_column(task, TOKENS, estimated, pa.int64())
        result._metadata = {**task._metadata, ESTIMATE_ERROR: facts}
        return result
