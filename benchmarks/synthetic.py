"""A synthetic score table of any size, the same for the same seed: the input of every benchmark here.

26 domains whose sizes follow Zipf's law (26 % down to 1 %) and whose quality differs; three correlated scores, clipped
at both ends as real scorers are, so that ties occur; lognormal token counts. Not a model of any real corpus.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.special import ndtr

DOMAINS = tuple(f"domain_{m:02d}" for m in range(26))
SCORERS = ("a", "b", "c")
MEAN_TOKENS = 996
CHUNK = 1 << 20  # rows drawn at a time, and rows of one Parquet file


class Documents(NamedTuple):
    """The arguments of ``count_copies``: ``normalised`` [n, 3] float32 in (0, 1], the others [n] int64."""

    normalised: NDArray[Any]
    domain_ids: NDArray[Any]
    tokens: NDArray[Any]
    doc_ids: NDArray[Any]


def chunks(rows: int, seed: int = 0) -> Iterator[Documents]:
    """The table in pieces of ``CHUNK`` rows; a longer table begins with the shorter one."""
    for chunk in range(-(-rows // CHUNK)):
        first = chunk * CHUNK
        drawn = _draw(first, seed)
        yield Documents(*(column[: rows - first] for column in drawn))


def generate(rows: int, seed: int = 0) -> Documents:
    """The whole table in memory: 36 bytes a row."""
    shapes = ((rows, len(SCORERS)), rows, rows, rows)
    types = (np.float32, np.int64, np.int64, np.int64)
    table = Documents(*(np.empty(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)))
    for i, part in enumerate(chunks(rows, seed)):
        for column, piece in zip(table, part, strict=True):
            column[i * CHUNK : i * CHUNK + len(piece)] = piece
    return table


def save(folder: Path, table: Documents) -> None:
    """One ``.npy`` file per column, for processes that measure one engine each."""
    for name, column in table._asdict().items():
        np.save(folder / f"{name}.npy", column)


def load(folder: Path) -> Documents:
    """Reads what ``save`` wrote into memory, so that no engine's time includes the disk."""
    return Documents(*(np.load(folder / f"{name}.npy") for name in Documents._fields))


def write_parquet(folder: Path, rows: int, seed: int = 0) -> None:
    """The table as zstd Parquet files of one row group each: ids, domain names, tokens and ``normalised_<scorer>``."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(chunks(rows, seed)):
        domain = pa.DictionaryArray.from_arrays(part.domain_ids.astype(np.int32), pa.array(DOMAINS))
        columns = {"doc_id": part.doc_ids, "domain": domain, "tokens": part.tokens}
        columns |= {f"normalised_{name}": part.normalised[:, n] for n, name in enumerate(SCORERS)}
        path = folder / f"part-{i:05d}.parquet"
        pq.write_table(pa.table(columns), path, compression="zstd", row_group_size=CHUNK)


def _draw(first: int, seed: int) -> Documents:
    level = 0.3 * np.random.default_rng([seed, 0]).standard_normal(len(DOMAINS), dtype=np.float32)
    rng = np.random.default_rng([seed, 1 + first // CHUNK])
    share = np.cumsum(1.0 / np.arange(1, len(DOMAINS) + 1))
    domain_ids = np.searchsorted(share / share[-1], rng.random(CHUNK), side="right")
    common = level[domain_ids] + rng.standard_normal(CHUNK, dtype=np.float32)
    scores = 0.8 * common[:, None] + 0.6 * rng.standard_normal((CHUNK, len(SCORERS)), dtype=np.float32)
    np.clip(scores, -1.9, 1.6, out=scores)  # about 3 % of the documents tie as best by a scorer and 6 % as worst
    spread = 1.1  # of log tokens
    tokens = rng.lognormal(np.log(MEAN_TOKENS) - spread**2 / 2, spread, CHUNK)
    rows = np.arange(first, first + CHUNK, dtype=np.uint64)
    return Documents(ndtr(scores), domain_ids, np.maximum(np.rint(tokens), 1).astype(np.int64), _ids(rows, seed))


def _ids(rows: NDArray[np.uint64], seed: int) -> NDArray[np.int64]:
    # Steps that each are one-to-one on 63 bits, so no id occurs twice.
    mask, golden = np.uint64(2**63 - 1), 0x9E3779B97F4A7C15
    z = (rows + np.uint64((seed + 1) * golden % 2**63)) & mask
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        z = ((z ^ (z >> np.uint64(32))) * np.uint64(factor)) & mask
    return (z ^ (z >> np.uint64(32))).astype(np.int64)
