"""What a θ selects, and the selections of many θ in one Parquet file: a row group each, written as they are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quadmix_plugin.atomic import atomic_path
from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.schema import COPIES, DOC_ID

if TYPE_CHECKING:
    from quadmix_plugin.score_index import ScoreIndex

ROW = "row"


@dataclass(frozen=True, eq=False)
class Selection:
    """What one θ selects: ``rows`` [k] of the score table, in no order, and their ``copies`` [k] int32, positive.

    Arrays of numpy, or tensors on a device.
    """

    rows: Any
    copies: Any

    def by_row(self, n: int) -> Any:
        """The copies of all ``n`` documents of the table [n]."""
        on_host = isinstance(self.copies, np.ndarray)
        copies = np.zeros(n, dtype=np.int32) if on_host else self.copies.new_zeros(n)
        copies[self.rows] = self.copies
        return copies


def write_selections(
    path: str | Path, index: "ScoreIndex", thetas: Sequence[Parameters], doc_ids: pa.Array | None = None, **options: Any
) -> int:
    """Writes the documents with copies under each θ; returns how many there are in all.

    Columns: ``row`` of the score table, or ``doc_id`` where ``doc_ids`` [n] are given, and ``copies``. A few selections
    are in memory at once; the file appears when it is whole. ``options``: of ``ScoreIndex.select_many``.

    Raises:
        InputError: as ``select_many``, no θ, or ids of another number of documents.
    """
    if not thetas:
        raise InputError("thetas: none given; give at least one")
    if doc_ids is not None and len(doc_ids) != index.n:
        raise InputError(f"doc_ids: {len(doc_ids)} for {index.n} documents of the index; give those it was made of")
    total, writer = 0, None
    with atomic_path(Path(path)) as temporary:
        try:
            for selection in index.select_many(thetas, **options):
                table = _table(selection, doc_ids)
                writer = writer or pq.ParquetWriter(
                    temporary, table.schema, compression="zstd", write_page_checksum=True
                )
                writer.write_table(table, row_group_size=max(1, table.num_rows))
                total += table.num_rows
        finally:
            if writer is not None:
                writer.close()
    return total


def read_selection(path: str | Path, theta: int) -> pa.Table:
    """The documents and copies of the θ at this place of the list that was written.

    Raises:
        InputError: no such file, or no such θ in it.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; write it with write_selections")
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if not 0 <= theta < file.num_row_groups:
            raise InputError(f"{path}: no θ {theta}; it holds {file.num_row_groups}")
        return file.read_row_group(theta)


def _table(selection: Selection, doc_ids: pa.Array | None) -> pa.Table:
    rows = pa.array(selection.rows)
    documents = {ROW: rows} if doc_ids is None else {DOC_ID: doc_ids.take(rows)}
    return pa.table({**documents, COPIES: selection.copies})
