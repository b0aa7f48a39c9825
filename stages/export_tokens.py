"""ExportTokens: documents as Megatron token files, one pair per shard, each once or as often as it has copies.

A document is tokenised once: for the proxies' pool, out of which ``GatherTokens`` takes what a selection trains on, or
here for the selection itself.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch
from numpy.typing import NDArray

from quadmix_plugin import models
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import uniform
from quadmix_plugin.megatron import write_documents
from quadmix_plugin.portions import portions
from quadmix_plugin.schema import DOC_ID, TEXT
from quadmix_plugin.stages.labelling import read_texts
from quadmix_plugin.stages.score_columns import arrow, read_numbers
from quadmix_plugin.store import Entry, Step
from quadmix_plugin.training_data import Documents, shard_facts, write_shard

_CHARACTERS = 1 << 21  # that are tokenised at once: meanwhile the tokenizer takes some 400 bytes a token


@dataclass
class ExportTokens(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Writes the documents of each shard as ``<folder>/<stem><shard>.bin`` and ``.idx``.

    In their order, each once; or, with ``copies_field``, shuffled by hash, each as often as it has copies and never
    twice in a row where that is possible, with ``.documents.parquet`` (doc_id, copy, tokens) and ``.json`` (rows,
    tokens) beside the pair, the latter alone where nothing has copies. Documents without tokens are left out, as they
    are from the labels. A shard that is already there is not written again. Passes on the shard's name and counts.

    Args:
        step: where the files are entered.
        tokenizer: a folder with a ``tokenizer.json``, or a hub id with ``revision``.
        revision: the 40 hex digits of a commit on the hub.
        eod: the token that ends every document.
        folder: folder of the files in the run directory.
        stem: beginning of their names.
        copies_field: column with the number of copies, such as ``copies``; the column ``doc_id`` is then read too.
        counted_field: column with the tokens of each document without its end, which the tokenizer must then agree
            with; None: not checked.
        kept: a step with ``<kept>/<shard>.parquet``, whose ids alone are written.
        below: write only documents whose u (``hashing.uniform``) is below this.
        seed: of ``below``, and of the order of copies.
        text_field: column with the text.

    Raises:
        InputError: no such tokenizer, or no token ``eod`` in it; a batch without a shard name; other counts than in
            ``counted_field``.
    """

    step: Step
    tokenizer: str
    revision: str | None = None
    eod: str = "<|endoftext|>"
    folder: str = "proxies/pool"
    stem: str = ""
    copies_field: str | None = None
    counted_field: str | None = None
    kept: Step | None = None
    below: float = 1.0
    seed: int = 0
    text_field: str = TEXT
    name: str = "export_tokens"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        models.check_source(self.tokenizer, self.revision)
        self._loaded: Any = None
        self._eod = self._vocabulary = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def inputs(self) -> tuple[list[str], list[str]]:
        """The text, the copies and counts if so asked, and the id where it matters."""
        named = [name for name in (self.copies_field, self.counted_field) if name]
        chooses = named or self.kept is not None or self.below < 1
        return ["data"], [self.text_field, *([DOC_ID] if chooses else []), *named]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The shard's name and counts."""
        return ["data"], ["shard", "rows", "tokens"]

    def setup_on_node(self, node_info: Any = None, worker_metadata: Any = None) -> None:
        """Fetches the tokenizer once per machine."""
        models.model_folder(self.tokenizer, self.revision)

    def setup(self, worker_metadata: Any = None) -> None:
        """Loads the tokenizer."""
        if self._loaded is None:
            self._loaded = models.load_tokenizer(self.tokenizer, self.revision)
            self._eod = end_of_document(self._loaded, self.eod, self.tokenizer)
            self._vocabulary = vocabulary_of(self._loaded)

    def teardown(self) -> None:
        """Lets go of the tokenizer."""
        self._loaded = None

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Writes one shard."""
        prefix = f"{self.folder}/{self.stem}{shard_name(task, self.name)}"
        if self.copies_field is None:
            facts = pair_entry(self.step, prefix) or self._write(task, prefix)
        else:
            facts = shard_facts(self.step, prefix) or self._write_copies(task, prefix, self.copies_field)
        return shard_counts(task, facts)

    def _write(self, task: DocumentBatch, prefix: str) -> dict[str, Any]:
        texts, chosen = read_texts(task, self.text_field), self._chosen(task)
        documents = self._encode([text for text, take in zip(texts, chosen, strict=True) if take])
        written = np.flatnonzero(documents.lengths).tolist()
        facts = {"rows": len(written), "tokens": int(documents.lengths.sum())}
        with self.step.writing(f"{prefix}.bin", f"{prefix}.idx", **facts) as (bin_path, idx_path):
            write_documents((documents[i] for i in written), bin_path, idx_path, self._vocabulary)
        return facts

    def _write_copies(self, task: DocumentBatch, prefix: str, copies_field: str) -> dict[str, Any]:
        table, texts = arrow(task), read_texts(task, self.text_field)
        copies = read_numbers(table, copies_field, "integers")
        if copies.min(initial=0) < 0:
            raise InputError(f"{prefix}: {copies.min()} copies of a document; give 0 or more")
        rows = np.flatnonzero(self._chosen(task) & (copies > 0))
        documents = self._encode([texts[i] for i in rows])
        doc_ids = table[DOC_ID].take(pa.array(rows))
        if self.counted_field is not None:
            counted = read_numbers(table, self.counted_field, "integers")[rows]
            require_counts(prefix, doc_ids, counted, documents.lengths, self.tokenizer)
        taken = np.where(documents.lengths > 0, copies[rows], 0).astype(np.int32)
        return write_shard(self.step, prefix, doc_ids, taken, documents, self._vocabulary, self.seed)

    def _encode(self, texts: Sequence[str]) -> Documents:
        """The ids of each text and its end; those without tokens have no end either."""
        self.setup()
        flat, lengths = array("I"), []
        for part in portions(texts, _CHARACTERS):
            clean = [models.encodable(text) for text in part]
            for encoding in self._loaded.encode_batch_fast(clean, add_special_tokens=False):
                ids = encoding.ids
                if ids:
                    ids.append(self._eod)
                flat.fromlist(ids)
                lengths.append(len(ids))
        ends = np.cumsum([0, *lengths], dtype=np.int64)
        tokens = np.frombuffer(flat, dtype=np.uintc) if flat else np.empty(0, dtype=np.uintc)
        return Documents(tokens, ends[:-1], np.diff(ends))

    def _chosen(self, task: DocumentBatch) -> NDArray[np.bool_]:
        """The rows that are to be written, but for those without tokens."""
        if self.kept is None and self.below >= 1:
            return np.ones(task.num_items, dtype=bool)
        column = arrow(task)[DOC_ID]
        chosen = uniform(column, self.seed) < self.below
        if self.kept is not None:
            rows = self.kept.read_table(f"{self.kept.name}/{task._metadata['shard']}.parquet", [DOC_ID])
            kept = set(rows[DOC_ID].to_pylist())
            chosen &= np.fromiter((doc_id in kept for doc_id in column.to_pylist()), bool, len(column))
        return chosen


def require_counts(
    place: str, doc_ids: pa.ChunkedArray, counted: NDArray[Any], lengths: NDArray[np.int64], tokenizer: str
) -> None:
    """Refuses documents whose tokens are not those that were counted; ``lengths`` have the end, where there are any.

    Raises:
        InputError: names the first such document and both numbers.
    """
    found = np.maximum(lengths - 1, 0)
    if (wrong := np.flatnonzero(found != counted)).size:
        first = int(wrong[0])
        raise InputError(
            f"{place}: doc_id {doc_ids[first].as_py()!r} has {found[first]} tokens, {counted[first]} are in its labels "
            f"({wrong.size} such documents); tokenizer.model {tokenizer} is not the one that counted them, so use "
            f"that one, or run again into another --out"
        )


def shard_name(task: DocumentBatch, stage: str) -> str:
    """The shard that a batch is of.

    Raises:
        InputError: it does not say.
    """
    shard = task._metadata.get("shard")
    if not isinstance(shard, str):
        raise InputError(f"{stage}: a batch without a shard name; put PrepareDocuments before this stage")
    return shard


def shard_counts(task: DocumentBatch, facts: dict[str, Any]) -> DocumentBatch:
    """What an exporting stage passes on: the shard's name and counts."""
    counts = {"shard": [task._metadata["shard"]], "rows": [facts["rows"]], "tokens": [facts["tokens"]]}
    return DocumentBatch(
        dataset_name=task.dataset_name,
        data=pa.table(counts),
        _metadata=task._metadata,
        _stage_perf=list(task._stage_perf),
    )


def end_of_document(tokenizer: Any, eod: str, place: str) -> int:
    """The id of the end-of-document token.

    Raises:
        InputError: the tokenizer has no such token.
    """
    found = tokenizer.token_to_id(eod)
    if found is None:
        raise InputError(f"{place}: no token {eod!r}; set tokenizer.eod in the recipe to the one that ends a document")
    return found


def vocabulary_of(tokenizer: Any) -> int:
    """One more than the largest id: added tokens may lie beyond the size that a tokenizer states."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def readable_pair(step: Step, prefix: str) -> str:
    """The absolute path, without ending, of a pair; errors as ``Step.read_path``."""
    index, _ = (step.read_path(f"{prefix}{suffix}") for suffix in (".idx", ".bin"))
    return str(index.with_suffix(""))


def pair_entry(step: Step, prefix: str) -> dict[str, Any] | None:
    """The facts of a pair that is wholly there, else None."""
    entries: list[Entry | None] = [step.entry(f"{prefix}{suffix}") for suffix in (".bin", ".idx")]
    return entries[0].facts if entries[0] is not None and entries[1] is not None else None
