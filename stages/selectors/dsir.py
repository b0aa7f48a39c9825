"""DSIR: documents drawn by how much more likely their n-grams are in a target than in the corpus.

Xie, Santurkar, Ma and Liang, "Data Selection for Language Models via Importance Resampling" (NeurIPS 2023, arXiv
2302.03169), as in their package ``data-selection`` 1.0.3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from quadmix_plugin.corpus import CorpusFile, list_files, read_json_lines
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64
from quadmix_plugin.labelled_corpus import LabelledCorpus, Law
from quadmix_plugin.ngrams import NgramBuckets, log_ratio
from quadmix_plugin.schema import DOC_ID, TEXT
from quadmix_plugin.threshold import up_to_budget

LOG_WEIGHT = "dsir_log_weight"
_BUCKET, _COUNT = "bucket", "count"


@dataclass
class DSIR:
    """Draws documents in proportion to p̂/q̂ of their hashed n-grams, p̂ of the target and q̂ of the corpus.

    A document's log-weight is the sum of log p̂(bucket) - log q̂(bucket) over its n-grams; those with the largest sum of
    log-weight and Gumbel noise are taken, which is a draw without replacement. Log-weights of long documents differ by
    hundreds and the noise by units, so the draw is then nearly the largest log-weights.

    Counts, weights and the shortest document are those of the package. Different from it: documents are taken up to a
    number of tokens, not of documents; the noise is the document's own (a hash of its id and the seed), so that no
    selection depends on the order of rows; q̂ is of all documents, not of the first 100,000 x ``n_buckets`` n-grams;
    and there is one target, never a share of the budget for each of several.

    Args:
        tasks: validation tasks that are the target, of which the half is read that a search may see; None takes all.
        target: a file, folder or glob of JSON Lines or Parquet that is the target in their place.
        target_text: its column.
        n_buckets: buckets that n-grams are hashed into.
        ngrams: the words of the longest n-grams.
        min_words: documents of fewer words are never taken.
        resample: False takes the largest log-weights, without noise.
    """

    name: ClassVar[str] = "dsir"
    tasks: list[str] | None = None
    target: str | None = None
    target_text: str = "text"
    n_buckets: int = 10_000
    ngrams: int = 2
    min_words: int = 100
    resample: bool = True

    def __post_init__(self) -> None:
        self.features = NgramBuckets(self.n_buckets, self.ngrams)
        if self.min_words < 0:
            raise InputError(f"min_words: {self.min_words}; give 0 (any document may be taken) or more, such as 100")
        if self.tasks is not None and self.target is not None:
            raise InputError(f"tasks: {self.tasks} and target: {self.target!r}; give one of them")
        if self.tasks is not None and not self.tasks:
            raise InputError("tasks: none; name at least one, or leave it out for all")

    def check(self, summary: DomainSummary, budget_tokens: int) -> None:
        """Raises InputError for a target that is not there."""
        del summary, budget_tokens
        if self.target is not None:
            list_files(self.target, "target")

    def fit(self, corpus: LabelledCorpus, budget_tokens: int, seed: int) -> Law:
        """The law of the threshold on log-weight and noise.

        Raises:
            InputError: a target without words or that cannot be read; or as ``up_to_budget``.
        """
        target = self._target_counts(corpus)
        raw = np.zeros(self.n_buckets, dtype=np.int64)
        counts = corpus.fold(BucketCounts(self.features))
        raw[counts[_BUCKET].to_numpy()] = counts[_COUNT].to_numpy()
        weights = LogWeights(self.features, log_ratio(target, raw), self.min_words)
        key = LargestWeight(seed if self.resample else None)
        corpus.add_columns(weights)
        return up_to_budget(corpus, key, budget_tokens, seed)

    def _target_counts(self, corpus: LabelledCorpus) -> NDArray[np.int64]:
        if self.target is not None:
            where = f"target: {self.target}, column {self.target_text!r}"
            texts = (text for file in list_files(self.target, "target") for text in _texts(file, self.target_text))
        else:
            where = "the validation rows of " + (f"tasks {', '.join(self.tasks)}" if self.tasks else "all tasks")
            texts = iter(corpus.target_texts(self.tasks))
        counts = self.features.counts(texts)
        if not counts.any():
            raise InputError(f"{where}: not one word in it; give texts that are like what shall be selected")
        return counts


@dataclass(frozen=True)
class BucketCounts:
    """Fold: how many n-grams of the corpus fall into each bucket; buckets of none are left out."""

    features: NgramBuckets
    columns: tuple[str, ...] = (TEXT,)

    def of(self, batch: pa.Table) -> pa.Table:
        """The counts of one batch."""
        return _counted(self.features.counts(batch[TEXT].to_pylist()))

    def merge(self, states: Sequence[pa.Table]) -> pa.Table:
        """Their sums."""
        total = np.zeros(self.features.n_buckets, dtype=np.int64)
        for state in states:
            np.add.at(total, state[_BUCKET].to_numpy(), state[_COUNT].to_numpy())
        return _counted(total)


@dataclass(frozen=True, eq=False)
class LogWeights:
    """Derive: the log-weight of every document under ``log_ratio`` [n_buckets]; NaN of one of too few words."""

    features: NgramBuckets
    log_ratio: NDArray[np.float64]
    min_words: int
    columns: tuple[str, ...] = (TEXT,)
    makes: tuple[str, ...] = (LOG_WEIGHT,)

    def of(self, batch: pa.Table) -> pa.Table:
        """The log-weights as one column."""
        sums, words = self.features.sums(batch[TEXT].to_pylist(), self.log_ratio)
        return pa.table({LOG_WEIGHT: np.where(words >= self.min_words, sums, np.nan)})


@dataclass(frozen=True)
class LargestWeight:
    """The key of a document: minus its log-weight, and minus Gumbel noise under ``seed``; None: without noise."""

    seed: int | None
    columns: tuple[str, ...] = (DOC_ID, LOG_WEIGHT)

    def of(self, batch: pa.Table) -> NDArray[np.float64]:
        """The key of every document [n]."""
        weight = batch[LOG_WEIGHT].to_numpy()
        return -weight if self.seed is None else -(weight + gumbel(batch[DOC_ID], self.seed))


def gumbel(doc_ids: pa.Array | pa.ChunkedArray, seed: int) -> NDArray[np.float64]:
    """Standard Gumbel noise -log(-log u) of every document [n], u from its hash and never 0 or 1."""
    # Of 53 bits the largest number plus a half would round up to 2^53, and u to 1.
    u = ((hash64(doc_ids, seed) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log(u))


def _counted(counts: NDArray[np.int64]) -> pa.Table:
    buckets = np.flatnonzero(counts)
    return pa.table({_BUCKET: buckets.astype(np.int32), _COUNT: counts[buckets]})


def _texts(file: CorpusFile, column: str) -> Iterator[str]:
    """The texts of one file of the target.

    Raises:
        InputError: no such column, a row without text, or a file that cannot be read.
    """
    rows = _parquet_rows(file, column) if file.is_parquet else read_json_lines(file)
    for number, row in rows:
        text = row.get(column)
        if not isinstance(text, str):
            found = f"{column!r} is {text!r}" if column in row else f"no {column!r}, found {', '.join(row)}"
            raise InputError(f"{file.path}: row {number}: {found}; name the column of texts as target_text")
        yield text


def _parquet_rows(file: CorpusFile, column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with fsspec.open(file.path, "rb") as stream:
            parquet = pq.ParquetFile(stream, page_checksum_verification=True)
            wanted = [column] if column in parquet.schema_arrow.names else None  # all: the error names what there is
            batches = parquet.iter_batches(columns=wanted)
            yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.path}: cannot be read as Parquet ({error}); write it again or remove it") from error
