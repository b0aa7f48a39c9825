"""Column names of the artifacts, and the score table that all steps after labelling work on."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError

DOC_ID = "doc_id"
TEXT = "text"
DOMAIN = "domain"
DOMAIN_TOP = "domain_top"
DOMAIN_TOP_PROBABILITY = "domain_top_probability"
TOKENS = "tokens"
SCORE_PREFIX = "score_"
NORMALISED_PREFIX = "normalised_"
MERGED_QUALITY = "merged_quality"
QUALITY_RANK = "quality_rank"
SAMPLING_VALUE = "sampling_value"
COPIES = "copies"

OTHER_DOMAIN = "other"
"""The domain that small domains are folded into."""


def score_column(scorer: str) -> str:
    """The raw column of a scorer: ``score_<scorer>``."""
    return SCORE_PREFIX + scorer


def normalised_column(scorer: str) -> str:
    """The column with σ of a scorer: ``normalised_<scorer>``."""
    return NORMALISED_PREFIX + scorer


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """The narrow, numeric table of a labelled corpus; one row per document.

    ``doc_ids`` [n] Arrow (int64 or string); ``domain_ids`` [n] int64 into ``domains`` (sorted by name); ``tokens``
    [n] int64, positive; ``scores`` [n, N] float32, raw as the scorers give them, columns in the order of ``scorers``.
    """

    doc_ids: pa.Array
    domain_ids: NDArray[np.int64]
    tokens: NDArray[np.int64]
    scores: NDArray[np.float32]
    domains: tuple[str, ...]
    scorers: tuple[str, ...]

    @classmethod
    def from_labels(cls, labels: pa.Table, scorers: Sequence[str], domains: Sequence[str] | None = None) -> Self:
        """Reads the columns of ``labels/``.

        Raises:
            InputError: a missing column or value, a column of another type, a score that is not finite, a token
                count that is not positive, duplicate ids, or a domain that is not among ``domains``.
        """
        columns = [DOC_ID, DOMAIN, TOKENS, *(score_column(s) for s in scorers)]
        missing = [name for name in columns if name not in labels.column_names]
        if missing:
            raise InputError(
                f"labels: no column {', '.join(missing)}; found {', '.join(labels.column_names)}; label the corpus "
                f"with these scorers"
            )
        _require_types(labels, columns)
        for name in columns:
            if nulls := labels[name].null_count:
                raise InputError(f"labels: column {name!r} is missing in {nulls} rows; label the corpus again")
        ids = labels[DOC_ID].combine_chunks()
        if isinstance(ids, pa.ChunkedArray):
            ids = pa.concat_arrays(ids.chunks)
        require_unique(ids)
        domain = labels[DOMAIN].to_pandas().astype(str)
        names = tuple(sorted(domain.unique())) if domains is None else tuple(domains)
        position = {name: m for m, name in enumerate(names)}
        unknown = sorted(set(domain.unique()) - set(names))
        if unknown:
            raise InputError(
                f"labels: domains {', '.join(unknown[:5])} are not among those of the parameters ({', '.join(names)}); "
                f"use parameters that were searched on this corpus"
            )
        tokens = labels[TOKENS].to_numpy()
        if (bad := tokens <= 0).any():
            raise InputError(f"labels: {int(bad.sum())} documents without tokens; drop empty documents first")
        scores = np.empty((labels.num_rows, len(scorers)), dtype=np.float32)
        for n, scorer in enumerate(scorers):
            scores[:, n] = labels[score_column(scorer)].to_numpy()
            if (bad := ~np.isfinite(scores[:, n])).any():
                first = [ids[int(i)].as_py() for i in np.flatnonzero(bad)[:5]]
                raise InputError(
                    f"labels: {score_column(scorer)} is not finite for {int(bad.sum())} documents, first {first}; "
                    f"repair the scorer or drop them"
                )
        domain_ids = domain.map(position).to_numpy(dtype=np.int64)
        return cls(ids, domain_ids, tokens.astype(np.int64), scores, names, tuple(scorers))

    @property
    def n(self) -> int:
        """Number of documents."""
        return self.tokens.size

    @cached_property
    def domain_tokens(self) -> NDArray[np.int64]:
        """Tokens of every domain [M]."""
        sums = np.zeros(len(self.domains), dtype=np.int64)
        np.add.at(sums, self.domain_ids, self.tokens)
        return sums


def _require_types(labels: pa.Table, columns: Sequence[str]) -> None:
    number = (pa.types.is_integer, pa.types.is_floating)
    allowed = {DOC_ID: (pa.types.is_integer, _is_string), TOKENS: (pa.types.is_integer,), DOMAIN: ()}
    for name in columns:
        tests = allowed.get(name, number)
        kind = labels.schema.field(name).type
        if tests and not pa.types.is_null(kind) and not any(test(kind) for test in tests):
            wanted = {DOC_ID: "integers or strings", TOKENS: "integers"}.get(name, "numbers")
            raise InputError(f"labels: column {name!r} is of type {kind}; give {wanted}")


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def require_unique(doc_ids: pa.Array | pa.ChunkedArray) -> None:
    """Raises InputError with five examples when an id occurs more than once."""
    counts = doc_ids.value_counts()
    times = counts.field("counts").to_numpy()
    if repeated := int((times > 1).sum()):
        first = counts.field("values").take(pa.array(np.flatnonzero(times > 1)[:5]))
        examples = [str(value) for value in first.to_pylist()]
        raise InputError(
            f"doc_id: {repeated} ids occur more than once, such as {', '.join(examples)}; every document needs "
            f"its own id (remove duplicates, or leave corpus.id out of the recipe and ids are made)"
        )
