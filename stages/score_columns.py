# pyright: reportAttributeAccessIssue=false
# pyarrow makes its compute functions at import; no checker sees them.
"""The columns of a score table as arrays: from pandas or Arrow batches to what the mathematics takes."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.schema import DOMAIN, OTHER_DOMAIN, normalised_column, score_column

if TYPE_CHECKING:
    from nemo_curator.tasks import DocumentBatch


def read_numbers(table: pa.Table, name: str, wanted: str = "numbers") -> NDArray[Any]:
    """A numeric column [n].

    Raises:
        InputError: no such column, missing values, or values that are not numbers (``integers``: not whole ones).
    """
    if name not in table.column_names:
        raise InputError(f"no column {name!r}; found {', '.join(table.column_names)}")
    column = table[name]
    if column.null_count:
        rows = np.flatnonzero(column.is_null().to_numpy())[:5].tolist()
        raise InputError(f"column {name!r} is missing in {column.null_count} rows, first {rows}; label these again")
    whole = pa.types.is_integer(column.type)
    if not whole and (wanted == "integers" or not pa.types.is_floating(column.type)):
        raise InputError(f"column {name!r} is of type {column.type}; give {wanted}")
    return column.to_numpy()


def read_normalised(table: pa.Table, theta: Parameters, normaliser: Normaliser | None) -> NDArray[np.float32]:
    """σ(q) [n, N]: of the raw columns by ``normaliser``, or the columns ``normalised_<scorer>`` where it is None."""
    if normaliser is None:
        columns = [read_numbers(table, normalised_column(scorer)) for scorer in theta.scorers]
        return _stack(columns)
    return normaliser.apply(_stack([read_numbers(table, score_column(scorer)) for scorer in theta.scorers]))


def score_columns(theta: Parameters, normaliser: Normaliser | None) -> list[str]:
    """The columns that ``read_normalised`` reads."""
    return [(score_column if normaliser else normalised_column)(scorer) for scorer in theta.scorers]


def domain_ids(table: pa.Table, theta: Parameters) -> NDArray[np.int64]:
    """The position in θ of each row's domain [n]; domains that θ does not name count as its domain ``other``.

    Raises:
        InputError: a missing domain, or one that θ does not name, when it has no domain ``other``.
    """
    column = table[DOMAIN].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks else pa.array([], pa.string())
    if column.null_count:
        rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[:5].tolist()
        raise InputError(f"column {DOMAIN!r} is missing in {column.null_count} rows, first {rows}; label these again")
    encoded = column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column)
    position = {name: m for m, name in enumerate(theta.domains)}
    fallback = position.get(OTHER_DOMAIN, -1)
    names = encoded.dictionary.to_pylist()
    lookup = np.array([position.get(name, fallback) for name in names], dtype=np.int64)
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    ids = lookup[codes] if codes.size else np.empty(0, dtype=np.int64)
    if (unknown := ids < 0).any():
        first = sorted({str(names[code]) for code in np.unique(codes[unknown])})[:5]
        raise InputError(
            f"domain: {', '.join(first)} not among the domains of the parameters ({', '.join(theta.domains)}); search "
            f"parameters on a corpus that has them, or relabel"
        )
    return ids


def arrow(task: "DocumentBatch") -> pa.Table:
    """The batch as an Arrow table."""
    return task.data if isinstance(task.data, pa.Table) else task.to_pyarrow()


def _stack(columns: list[NDArray[Any]]) -> NDArray[np.float32]:
    stacked = np.empty((columns[0].size, len(columns)), dtype=np.float32)
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused as such
        for n, column in enumerate(columns):
            stacked[:, n] = column
    return stacked
