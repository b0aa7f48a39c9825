"""The run directory: artifacts that are whole or absent, manifests that say what they are, one lock.

An artifact is written under a temporary name, flushed to disk, read back, renamed, and only then entered in
``manifest/<step>/``. Readers follow manifests, never globs, so a file without an entry does not exist. A step is
finished when its ``_SUCCESS.json`` is there; step and entries carry the step's key, the hash of all that
determines its content, and another key makes them invisible.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from quadmix_plugin.errors import QuadmixError, RunLockedError, StorageError

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Entry:
    """One artifact as its manifest describes it; ``path`` is relative to the run directory."""

    path: str
    bytes: int
    sha256: str
    key: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step of a run: its artifacts and their manifest. Small and picklable, so workers can write shards."""

    root: Path
    name: str
    key: str

    @property
    def _manifest(self) -> Path:
        return self.root / "manifest" / self.name

    def _entry_path(self, relative: str) -> Path:
        # '%' is in no artifact name, so no two artifacts share an entry.
        return self._manifest / f"{relative.replace('/', '%')}.json"

    def path(self, relative: str) -> Path:
        """Where an artifact of this name lies; refuses a name that leaves the run directory or is the store's own."""
        if not _is_name(relative):
            raise StorageError(f"{relative!r}: not an artifact name; use letters, digits, '.', '_' and '-'")
        return self.root.joinpath(*relative.split("/"))

    @contextlib.contextmanager
    def writing(self, *relative: str, **facts: Any) -> Iterator[tuple[Path, ...]]:
        """Temporary paths for these artifacts; on a clean exit all are committed and entered, on an error none.

        ``facts`` go into the manifest entry of each: rows in, kept and dropped by reason, for instance.
        """
        with contextlib.ExitStack() as stack:
            finals = [self.path(name) for name in relative]
            yield tuple(stack.enter_context(atomic_path(final)) for final in finals)
            # An older entry must not outlive the bytes it vouches for, not even between the rename and the new entry.
            old = [path for name in relative if (path := self._entry_path(name)).exists()]
            for path in old:
                path.unlink(missing_ok=True)
            if old:
                _flush(self._manifest)
        for name, final in zip(relative, finals, strict=True):
            entry = Entry(name, final.stat().st_size, sha256_file(final), self.key, facts)
            write_json(self._entry_path(name), asdict(entry))

    def write_table(self, relative: str, table: pa.Table, **facts: Any) -> None:
        """Commits a Parquet file with page checksums."""
        with self.writing(relative, rows=table.num_rows, **facts) as (temporary,):
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
            if pq.read_metadata(temporary).num_rows != table.num_rows:
                raise StorageError(f"{temporary}: read back with another number of rows; check the disk")

    def write_json(self, relative: str, content: Any, **facts: Any) -> None:
        """Commits a JSON file."""
        with self.writing(relative, **facts) as (temporary,):
            temporary.write_text(_json_text(content), encoding="utf-8")

    def write_text(self, relative: str, content: str, **facts: Any) -> None:
        """Commits a text file."""
        with self.writing(relative, **facts) as (temporary,):
            temporary.write_text(content, encoding="utf-8")

    def entry(self, relative: str) -> Entry | None:
        """The artifact's entry, or None when it is absent, incomplete, or made with another key."""
        path = self.path(relative)
        entry = _read_entry(self._entry_path(relative))
        if entry is None or entry.key != self.key or entry.path != relative:
            return None
        return entry if path.exists() and path.stat().st_size == entry.bytes else None

    def entries(self) -> list[Entry]:
        """All artifacts of this step and key, by name."""
        names = (path.name.removesuffix(".json").replace("%", "/") for path in _entry_paths(self._manifest))
        return [entry for name in sorted(names) if _is_name(name) and (entry := self.entry(name)) is not None]

    def read_table(self, relative: str, columns: list[str] | None = None) -> pa.Table:
        """Reads a Parquet artifact, page checksums verified.

        Raises:
            QuadmixError: it is not in the manifest, or does not read back.
        """
        path = self.read_path(relative)
        try:
            return pq.read_table(
                path,
                columns=columns,
                page_checksum_verification=True,
                partitioning=None,  # pyright: ignore[reportArgumentType] # else '/data/run=1/' makes a column 'run'
            )
        except (pa.ArrowException, OSError, ValueError) as error:
            raise QuadmixError(f"{path}: damaged ({error}); delete it and run the step {self.name!r} again") from error

    def read_json(self, relative: str) -> Any:
        """Reads a JSON artifact; errors as ``read_table``."""
        path = self.read_path(relative)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise QuadmixError(f"{path}: damaged ({error}); delete it and run the step {self.name!r} again") from error

    def read_path(self, relative: str) -> Path:
        """The path of an artifact that the manifest vouches for."""
        if self.entry(relative) is None:
            raise QuadmixError(
                f"{self.path(relative)}: not there, or not from this recipe; run the step {self.name!r} first"
            )
        return self.path(relative)

    def finish(self, **facts: Any) -> None:
        """Marks the step as complete; ``facts`` are its summary (row counts, seconds)."""
        entries = self.entries()
        content = {"step": self.name, "key": self.key, "artifacts": len(entries), "facts": facts}
        content = json.loads(_json_text(content))  # as it will be read back
        write_json(self._manifest / "_SUCCESS.json", {**content, "sha256": _step_digest(content, entries)})

    def summary(self) -> dict[str, Any] | None:
        """What ``finish`` was told, or None while the step is not complete or an artifact is missing."""
        content = _read_json(self._manifest / "_SUCCESS.json")
        if content is None or content.get("key") != self.key or content.get("artifacts") != len(self.entries()):
            return None
        return content.get("facts")

    @property
    def is_done(self) -> bool:
        """Whether the step is complete with this key."""
        return self.summary() is not None


@dataclass(frozen=True)
class RunDirectory:
    """A folder that holds one run."""

    root: Path

    @classmethod
    def open(cls, root: str | Path) -> Self:
        """Creates the folder if need be.

        Raises:
            StorageError: it cannot be created or written.
        """
        path = Path(root).absolute()
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".probe.{uuid.uuid4().hex}.tmp"
            probe.write_bytes(b"\0")
            probe.unlink()
        return cls(path)

    def step(self, name: str, key: str) -> Step:
        """The step ``name`` made from what ``key`` is the hash of."""
        return Step(self.root, name, key)

    def step_names(self) -> list[str]:
        """Steps that have a manifest, whatever their key."""
        folder = self.root / "manifest"
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []

    def recorded_keys(self, name: str) -> set[str]:
        """The keys with which artifacts of a step were made."""
        found = (_read_json(path) for path in (self.root / "manifest" / name).glob("*.json"))
        return {content["key"] for content in found if content is not None and "key" in content}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run directory for this process.

        Raises:
            RunLockedError: another process holds it; the message says which.
        """
        holder = self.root / ".lock.holder"
        lock = FileLock(self.root / ".lock", timeout=0)
        try:
            with storage_errors(self.root / ".lock"):
                lock.acquire()
        except Timeout as error:
            try:
                who = holder.read_text(encoding="utf-8").strip() or "another process"
            except FileNotFoundError:  # released, or not yet written
                who = "another process"
            raise RunLockedError(f"{self.root}: in use by {who}; wait for it or give another --out") from error
        try:
            with storage_errors(holder):
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def sweep(self) -> int:
        """Removes temporary files that a killed process left; call it under the lock. Returns how many."""
        left = [path for path in self.root.rglob(".*.tmp") if path.is_file()]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def verify(self) -> tuple[int, list[str]]:
        """Re-reads every artifact against its manifest: how many were read, and what is wrong with which."""
        checked, faults = 0, []
        for name in self.step_names():
            manifest = self.root / "manifest" / name
            entries = []
            for path in _entry_paths(manifest):
                checked += 1
                entry = _read_entry(path)
                if entry is None:
                    faults.append(f"{path.relative_to(self.root)}: manifest entry is not readable")
                    continue
                entries.append(entry)
                fault = _verify_entry(self.step(name, entry.key), entry, path)
                faults += [fault] if fault else []
            success = manifest / "_SUCCESS.json"
            if success.exists() and not _success_matches(_read_json(success), entries):
                faults.append(f"{success.relative_to(self.root)}: does not match the entries beside it")
        return checked, faults


def _step_digest(content: dict[str, Any], entries: list[Entry]) -> str:
    ordered = sorted((asdict(entry) for entry in entries), key=lambda entry: entry["path"])
    return content_key(content, ordered)


def _success_matches(content: dict[str, Any] | None, entries: list[Entry]) -> bool:
    if content is None:
        return False
    said = {name: value for name, value in content.items() if name != "sha256"}
    # Entries of another recipe may lie beside those of this one.
    return content.get("sha256") == _step_digest(said, [e for e in entries if e.key == content.get("key")])


def _verify_entry(step: Step, entry: Entry, entry_path: Path) -> str | None:
    try:
        path = step.path(entry.path)
    except StorageError as error:
        return f"{entry_path.name}: {error}"
    if step._entry_path(entry.path) != entry_path:
        return f"{entry_path.name}: describes {entry.path!r}"
    if not path.exists():
        return f"{entry.path}: missing"
    if path.stat().st_size != entry.bytes:
        return f"{entry.path}: {path.stat().st_size} bytes, the manifest says {entry.bytes}"
    return None if sha256_file(path) == entry.sha256 else f"{entry.path}: content differs from its sha256"


@contextlib.contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """A temporary path beside ``final``; on a clean exit it is flushed and renamed to it, on an error removed."""
    with storage_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, final)
            _flush(final.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, with sorted keys and shortest floats: equal content gives equal bytes."""
    with atomic_path(path) as temporary:
        temporary.write_text(_json_text(content), encoding="utf-8")


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
        raise StorageError(f"{path}: {remedies[error.errno]}") from error


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


def content_key(*parts: Any) -> str:
    """The sha256 of JSON-serialisable parts: the key of a step."""
    return hashlib.sha256(_json_text(parts).encode()).hexdigest()


def merge_counts(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Adds up ``rows_in``, ``rows_kept`` and ``dropped`` (by reason) of several shards."""
    total: dict[str, Any] = {"rows_in": 0, "rows_kept": 0, "dropped": {}}
    for count in counts:
        total["rows_in"] += count["rows_in"]
        total["rows_kept"] += count["rows_kept"]
        for reason, n in count["dropped"].items():
            total["dropped"][reason] = total["dropped"].get(reason, 0) + n
    return total


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_text(content: Any) -> str:
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _is_name(relative: str) -> bool:
    parts = relative.split("/")
    return all(_NAME.fullmatch(part) for part in parts) and parts[0] not in ("manifest", "_SUCCESS")


def _entry_paths(manifest: Path) -> list[Path]:
    return sorted(path for path in manifest.glob("*.json") if path.name != "_SUCCESS.json")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _read_entry(path: Path) -> Entry | None:
    content = _read_json(path)
    try:
        entry = None if content is None else Entry(**content)
    except TypeError:
        return None
    kinds = {"path": str, "bytes": int, "sha256": str, "key": str, "facts": dict}
    return entry if entry and all(isinstance(getattr(entry, name), kind) for name, kind in kinds.items()) else None
