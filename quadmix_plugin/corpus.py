# pyright: reportAttributeAccessIssue=false
# pyarrow makes its compute functions at import; no checker sees them.
"""The corpus on disk: which files it has, and a check of all of them before any model is loaded.

The check reads what is cheap to read (Parquet footers and id columns, JSON lines) and finds what would otherwise
stop a run hours later: an unreadable file, a missing column, a row without text, an id given twice.
"""

import difflib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64
from quadmix_plugin.schema import require_unique

PARQUET = (".parquet", ".pq")
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst")

_UNREADABLE = (OSError, EOFError, RuntimeError, zlib.error, zstandard.ZstdError)
_LONGEST_LINE = 1 << 28  # characters; a small compressed file may hold a line that no memory does


@dataclass(frozen=True)
class CorpusFile:
    """One file: ``path`` as it is opened, ``name`` relative to what the recipe names, ``version`` to notice changes."""

    path: str
    name: str
    bytes: int
    version: str

    @property
    def is_parquet(self) -> bool:
        """Parquet, else JSON Lines."""
        return self.path.endswith(PARQUET)


@dataclass(frozen=True)
class Inspection:
    """What the check found: rows per file, in the order of the files."""

    rows: dict[str, int]

    @property
    def documents(self) -> int:
        """All rows."""
        return sum(self.rows.values())


def list_files(paths: str | list[str], place: str = "corpus.path") -> list[CorpusFile]:
    """The data files behind a file, folder, glob or list of them, sorted by name.

    Raises:
        InputError: nothing there, no file of a known kind, or an empty file.
    """
    found: dict[str, CorpusFile] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        fs, root = fsspec.core.url_to_fs(path)
        for each in _expand(fs, root):
            info = fs.info(each)
            name = each.removeprefix(root.rstrip("/") + "/") if each != root else each.rsplit("/", 1)[-1]
            if fs.has_magic(root) if hasattr(fs, "has_magic") else any(c in root for c in "*?["):
                name = each.rsplit("/", 1)[-1]
            url = fs.unstrip_protocol(each) if "://" in path else each
            version = str(info.get("ETag") or info.get("mtime") or info.get("LastModified") or info.get("created"))
            found[url] = CorpusFile(url, name, int(info["size"] or 0), version)
    files = sorted(found.values(), key=lambda file: (file.name, file.path))
    if not files:
        raise InputError(
            f"{place}: {paths}: no such file or folder, or no {', '.join(PARQUET + JSON_LINES)} file in it"
        )
    for file in files:
        if file.bytes == 0:
            raise InputError(f"{file.path}: empty file (0 bytes); remove it, or write it again")
    _require_distinct_names(files)
    return files


@dataclass(frozen=True)
class _Wanted:
    """The columns that must be there and what the recipe calls them."""

    text: str
    id: str | None
    keep: Sequence[str]
    invalid_rows: str

    def keys(self) -> dict[str, str]:
        """Column → where the recipe names it."""
        named = {self.text: "corpus.text"} | ({} if self.id is None else {self.id: "corpus.id"})
        return named | dict.fromkeys(self.keep, "the scorer or classifier that reads it")


def inspect(
    files: list[CorpusFile], text: str, id_field: str | None, invalid_rows: str = "error", keep: Sequence[str] = ()
) -> Inspection:
    """Checks every file; see the module. ``keep``: further columns that scorers or classifiers read.

    Raises:
        InputError: an unreadable file, a line that is not a JSON object, a missing column, a text that is not a
            string or missing (under ``invalid_rows='error'``), an id missing or given twice, or no documents at all.
    """
    rows: dict[str, int] = {}
    kinds: set[str] = set()
    hashes: list[NDArray[np.uint64]] = []  # 8 bytes a document; the ids themselves would be far more
    wanted = _Wanted(text, id_field, keep, invalid_rows)
    for file in files:
        check = _inspect_parquet if file.is_parquet else _inspect_json_lines
        rows[file.path], found = check(file, wanted)
        kinds |= {str(array.type) for array in found}
        hashes += [hash64(array, 0) for array in found]
    if not sum(rows.values()):
        raise InputError(f"{files[0].path}: no documents in {len(files)} files; give a corpus with rows")
    if len(kinds) > 1:
        raise InputError(f"column {id_field!r} is {' in some files and '.join(sorted(kinds))} in others; use one type")
    if hashes:
        _require_unique(files, wanted, hashes)
    return Inspection(rows)


def _require_unique(files: list[CorpusFile], wanted: _Wanted, hashes: list[NDArray[np.uint64]]) -> None:
    """Reads the ids again whose hashes are there twice, if there are any."""
    ordered = np.concatenate(hashes)
    hashes.clear()
    ordered.sort()
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not twice.size:
        return
    del ordered
    ids: list[pa.Array] = []
    for file in files:
        check = _inspect_parquet if file.is_parquet else _inspect_json_lines
        ids += [array.filter(pa.array(np.isin(hash64(array, 0), twice))) for array in check(file, wanted)[1]]
    require_unique(pa.chunked_array(ids))


def read_json_lines(file: CorpusFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and objects of a JSON Lines file, blank lines skipped.

    Raises:
        InputError: a line that is not a JSON object or too long, or a file that cannot be decompressed or decoded.
    """
    line_number = 0
    try:
        with fsspec.open(file.path, "rt", compression="infer", encoding="utf-8") as stream:
            lines = iter(lambda: stream.readline(_LONGEST_LINE + 1), "")
            for line_number, line in enumerate(lines, start=1):
                if len(line) > _LONGEST_LINE:
                    raise InputError(
                        f"{file.path}: line {line_number} has more than {_LONGEST_LINE:,} characters; cut the document"
                    )
                if line.strip():
                    yield line_number, _object(file, line_number, line)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file.path}: after line {line_number}: not UTF-8 ({error.reason}); convert the file"
        ) from error
    except _UNREADABLE as error:
        raise InputError(f"{file.path}: after line {line_number}: cannot be read ({error}); write it again") from error


def read_records(file: CorpusFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line or row numbers (from 1) and rows of a JSON Lines or Parquet file.

    Raises:
        InputError: as ``read_json_lines``, or a Parquet file that cannot be read.
    """
    if not file.is_parquet:
        yield from read_json_lines(file)
        return
    try:
        with fsspec.open(file.path, "rb") as stream:
            records = pq.read_table(stream, page_checksum_verification=True).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.path}: cannot be read as Parquet ({error}); write it again") from error
    yield from enumerate(records, start=1)


def _object(file: CorpusFile, line_number: int, line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise InputError(
            f"{file.path}: line {line_number} is not JSON ({error}): {line.strip()[:60]!r}; repair or remove the line"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{file.path}: line {line_number} holds {type(content).__name__}; give one object per line")
    return content


def _expand(fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
    known = PARQUET + JSON_LINES
    if any(character in root for character in "*?["):
        candidates = cast("list[str]", fs.glob(root))
    elif fs.isdir(root):
        candidates = cast("list[str]", fs.find(root))
    elif fs.exists(root):
        if not root.endswith(known):
            raise InputError(f"{root}: not a corpus file; give {', '.join(known)}")
        return [root]
    else:
        return []
    visible = (path for path in candidates if not path.rsplit("/", 1)[-1].startswith((".", "_")))
    return [path for path in visible if path.endswith(known)]


def _require_distinct_names(files: list[CorpusFile]) -> None:
    """Shards are named after their file, so two files of one name would overwrite each other."""
    seen: dict[str, str] = {}
    for file in files:
        if file.name in seen:
            raise InputError(
                f"{file.path} and {seen[file.name]} have the same name; give their common folder as corpus.path"
            )
        seen[file.name] = file.path


def _inspect_parquet(file: CorpusFile, wanted: _Wanted) -> tuple[int, list[pa.Array]]:
    text = wanted.text
    try:
        with fsspec.open(file.path, "rb") as stream:
            parquet = pq.ParquetFile(stream, page_checksum_verification=True)
            _require_columns(file.path, parquet.schema_arrow.names, wanted)
            kind = parquet.schema_arrow.field(text).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise InputError(f"{file.path}: column {text!r} is {kind}; the text must be a string column")
            if wanted.invalid_rows == "error":
                _require_texts(file, parquet, text)
            ids = [] if wanted.id is None else _ids(file, parquet, wanted.id)
            return parquet.metadata.num_rows, ids
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.path}: cannot be read as Parquet ({error}); write it again or remove it") from error


def _require_texts(file: CorpusFile, parquet: pq.ParquetFile, text: str) -> None:
    """Null texts, from the footer where it has statistics, else from the column."""
    column = next(i for i in range(len(parquet.schema)) if parquet.schema.column(i).path == text)  # structs have many
    for group in range(parquet.num_row_groups):
        statistics = parquet.metadata.row_group(group).column(column).statistics
        nulls = statistics.null_count if statistics is not None and statistics.has_null_count else None
        if nulls == 0:
            continue
        values = parquet.read_row_group(group, [text])[text]
        if values.null_count:
            row = pc.index(pc.is_null(values), True).as_py()
            raise InputError(
                f"{file.path}: row {row} of row group {group} has no text ({values.null_count} such rows there); "
                f"remove them or set corpus.invalid_rows: drop"
            )


def _ids(file: CorpusFile, parquet: pq.ParquetFile, id_field: str) -> list[pa.Array]:
    column = parquet.read([id_field])[id_field]
    if column.null_count:
        raise InputError(f"{file.path}: {column.null_count} rows have no {id_field!r}; every document needs an id")
    if pa.types.is_integer(column.type):
        return [chunk.cast(pa.int64()) for chunk in column.chunks]
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise InputError(f"{file.path}: column {id_field!r} is {column.type}; ids must be integers or strings")
    return [chunk.cast(pa.large_string()) for chunk in column.chunks]


def _inspect_json_lines(file: CorpusFile, wanted: _Wanted) -> tuple[int, list[pa.Array]]:
    text, id_field = wanted.text, wanted.id
    columns = set(wanted.keys())
    ids: list[Any] = []
    rows = 0
    for line_number, content in read_json_lines(file):
        rows += 1
        where = f"{file.path}: line {line_number}"
        if not columns <= content.keys():
            _require_columns(where, list(content), wanted)
        value = content[text]
        if value is None and wanted.invalid_rows == "error":
            raise InputError(f"{where} has no text; remove it or set corpus.invalid_rows: drop")
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where}: {text!r} is {value!r}; the text must be a string")
        if id_field is not None:
            ids.append(content[id_field])
            if type(ids[-1]) not in (int, str) or type(ids[-1]) is not type(ids[0]):
                raise InputError(f"{where}: {id_field!r} is {ids[-1]!r}; ids must be all integers or all strings")
            if isinstance(ids[-1], int) and not -(1 << 63) <= ids[-1] < 1 << 63:
                raise InputError(f"{where}: {id_field!r} is {ids[-1]}; give ids of at most 64 bits, or strings")
    kind = pa.int64() if ids and isinstance(ids[0], int) else pa.large_string()
    return rows, [pa.array(ids, kind)] if ids else []


def _require_columns(where: str, columns: list[str], wanted: _Wanted) -> None:
    for name, key in wanted.keys().items():
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            found = ", ".join(columns)
            raise InputError(f"{where}: no column {name!r}; {hint}found {found}; set {key} in the recipe")
