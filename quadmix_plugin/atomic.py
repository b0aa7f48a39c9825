"""Files that are whole or absent: written beside their name, flushed to disk, renamed; and what can go wrong then."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quadmix_plugin.errors import StorageError


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """A temporary path beside ``final``; on a clean exit it is flushed and renamed to it, on an error removed."""
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, final)
            flush(final.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, with sorted keys and shortest floats: equal content gives equal bytes."""
    with atomic_path(path) as temporary:
        temporary.write_text(json_text(content), encoding="utf-8")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns a full, read-only or otherwise unwritable place into a ``StorageError`` with a remedy."""
    remedies = {
        errno.ENOSPC: "the disk is full; free some space or give another --out, finished work is kept",
        errno.EDQUOT: "the disk quota is used up; free some space or give another --out, finished work is kept",
        errno.EROFS: "the file system is read-only; give another --out",
        errno.EACCES: "no permission to write; give another --out",
        errno.EPERM: "no permission to write; give another --out",
        errno.ENOENT: "no such place, and it cannot be made; give another --out",
        errno.ENOTDIR: "a part of this path is a file; give another --out",
        errno.EEXIST: "this is a file; give a folder as --out",
        errno.EFBIG: "the file would exceed the size limit; raise it or give another --out",
        errno.EIO: "the disk reports a fault; check it, or give another --out",
        errno.ENAMETOOLONG: "the name is too long for this file system; shorten it or give another --out",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in remedies or not _concerns(path, error):
            raise
        space = f" ({_free(path):,} bytes are free)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise StorageError(f"{path}: {remedies[error.errno]}{space}") from error


def _free(path: Path) -> int:
    """Bytes that are free where a path is, or would be."""
    there = next(each for each in (path, *path.parents) if each.exists())
    return shutil.disk_usage(there).free


def _concerns(path: Path, error: OSError) -> bool:
    """Whether an error is about writing ``path``, and not about another file that was read meanwhile."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    named = Path(error.filename)
    return named.parent == path.parent or named.is_relative_to(path) or path.is_relative_to(named)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_text(content: Any) -> str:
    """JSON with sorted keys and shortest floats: equal content gives equal text."""
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
