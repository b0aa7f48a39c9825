"""The rows of a batch that a score table can have: read from pandas or Arrow, each checked, faults named.

It computes nothing from them; the stages that fit and apply σ do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from nemo_curator.tasks import DocumentBatch
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.schema import DOC_ID, DOMAIN, TOKENS, require_unique, score_column

InvalidScores = Literal["error", "drop"]

_REMEDY = "repair the scorer, or drop such rows: invalid_scores: drop (in a recipe under normalise)"


@dataclass(frozen=True)
class CheckedRows:
    """The rows of a batch that can be used.

    ``columns``: doc_id, and domain and tokens where they are read, without nulls; ``scores``: one finite float32 [n]
    for each scorer; ``kept``: bool over the batch's rows, None for all of them; ``dropped``: rows by reason.
    """

    columns: dict[str, pa.Array]
    scores: list[NDArray[np.float32]]
    kept: NDArray[np.bool_] | None
    dropped: dict[str, int]


def checked_rows(
    task: DocumentBatch, scorers: Sequence[str], invalid_scores: InvalidScores, columns: Sequence[str] | None = None
) -> CheckedRows:
    """Reads the columns of a score table from a batch, pandas or Arrow, and checks every row.

    ``columns`` are those that must be there, by default all of them; ``tokens`` and ``domain`` are checked wherever
    they are.

    Raises:
        InputError: a missing column or one of another type; a null id, duplicate ids, a null domain, a token count
            that is null or not positive; a score that is not finite, unless such rows are dropped.
    """
    batch = _Batch(task, columns or [DOC_ID, DOMAIN, TOKENS, *map(score_column, scorers)])
    found = {DOC_ID: batch.ids}
    if DOMAIN in batch.present:
        found[DOMAIN] = batch.column(DOMAIN, "strings", _is_text).cast(pa.string())
    if TOKENS in batch.present:
        found[TOKENS] = batch.column(TOKENS, "integers", pa.types.is_integer).cast(pa.int64())
        if len(zero := np.flatnonzero(found[TOKENS].to_numpy() <= 0)):
            raise batch.fault(TOKENS, zero, "not positive", "drop empty documents first")
    require_unique(batch.ids)
    scores, dropped = [], {}
    kept = np.ones(len(batch.ids), dtype=bool)
    for name in map(score_column, scorers):
        scores.append(batch.score(name))
        bad = ~np.isfinite(scores[-1])
        if bad.any() and invalid_scores == "error":
            raise batch.fault(name, np.flatnonzero(bad), "not finite", _REMEDY)
        if first := int((bad & kept).sum()):
            dropped[f"{name} not finite"] = first
        kept &= ~bad
    if kept.all():
        return CheckedRows(found, scores, None, {})
    found = {name: column.filter(pa.array(kept)) for name, column in found.items()}
    return CheckedRows(found, [column[kept] for column in scores], kept, dropped)


class _Batch:
    """The columns of one batch as Arrow arrays, and the errors that name them."""

    def __init__(self, task: DocumentBatch, required: Sequence[str]) -> None:
        self._data: Any = task.data
        self._name = task.dataset_name
        self.present = set(task.get_columns())
        if missing := [name for name in required if name not in self.present]:
            raise InputError(
                f"{self._name}: no column {', '.join(missing)}; found {', '.join(map(str, task.get_columns()))}; label "
                f"the documents first"
            )
        self.ids: pa.Array = pa.array([], pa.string())
        self.ids = self.column(DOC_ID, "integers or strings", _is_id)

    def column(self, name: str, wanted: str, is_right: Callable[[pa.DataType], bool], nulls: bool = False) -> pa.Array:
        """A column of the right type; without nulls unless they are allowed."""
        if isinstance(self._data, pd.DataFrame):
            try:
                column = pa.array(self._data[name], from_pandas=True)
            except (pa.ArrowException, TypeError) as error:
                raise InputError(f"{self._name}: column {name!r} is of several types; give {wanted}") from error
        else:
            column = self._data[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if column.null_count and not nulls:
            raise self.fault(name, np.flatnonzero(column.is_null()), "missing", "label these documents again")
        if pa.types.is_null(column.type):
            return column
        if not is_right(column.type):
            raise InputError(f"{self._name}: column {name!r} is of type {column.type}; give {wanted}")
        return column

    def score(self, name: str) -> NDArray[np.float32]:
        """A score column as float32; NaN where it is null."""
        column = self.column(name, "numbers", _is_number, nulls=True)
        if pa.types.is_null(column.type):
            return np.full(len(column), np.nan, dtype=np.float32)
        with np.errstate(over="ignore"):
            return column.to_numpy(zero_copy_only=False).astype(np.float32)

    def fault(self, name: str, rows: NDArray[np.int64], what: str, remedy: str) -> InputError:
        """An error about some rows: the column, how many, the first five, and what to do."""
        first = ", ".join(str(self.ids[int(row)] if len(self.ids) else f"row {row}") for row in rows[:5])
        return InputError(
            f"{self._name}: column {name!r} is {what} for {len(rows)} documents, such as {first}; {remedy}"
        )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_id(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or _is_text(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def check_choice(invalid_scores: str) -> None:
    """Raises InputError for another value than those of ``InvalidScores``."""
    if invalid_scores not in ("error", "drop"):
        raise InputError(f"invalid_scores={invalid_scores!r}; choose 'error' or 'drop'")
