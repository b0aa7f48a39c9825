"""Parquet files of a run, whose pages carry checksums: a flipped bit is an error, never a number."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from quadmix_plugin.errors import InputError


def read_parquet(
    path: str | Path,
    columns: list[str] | None = None,
    filters: Any = None,
    maker: str = "the step that makes it",
) -> pa.Table:
    """Reads a file with the checksums of its pages verified.

    Raises:
        InputError: it does not read back.
    """
    try:
        return pq.read_table(
            path,
            columns=columns,
            filters=filters,
            page_checksum_verification=True,
            partitioning=None,  # pyright: ignore[reportArgumentType] # else '/data/run=1/' makes a column 'run'
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it and run {maker} again") from error


def write_parquet(table: pa.Table, path: str | Path) -> None:
    """Writes a table with a checksum for each page."""
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
