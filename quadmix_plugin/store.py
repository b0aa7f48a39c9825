"""The run directory: artifacts that are whole or absent, manifests that say what they are, one lock.

An artifact is written under a temporary name, flushed to disk, read back, renamed, and only then entered in
``manifest/<step>/``. Readers follow manifests, never globs, so a file without an entry does not exist. A step is
finished when its ``_SUCCESS.json`` is there; step and entries carry the step's key, the hash of all that
determines its content, and another key makes them invisible.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from quadmix_plugin.atomic import atomic_path, json_text, sha256_file
from quadmix_plugin.errors import QuadmixError, StorageError
from quadmix_plugin.parquet import read_parquet, write_parquet
from quadmix_plugin.places import LocalFolder, ObjectFolder, Place, place_at

_SUCCESS = "_SUCCESS.json"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_LONGEST_NAME = 200  # of all parts: the entry's temporary file is named by it, and a file system takes 255 bytes


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
    """One step of a run: its artifacts and their manifest. Small and picklable, so workers can write shards.

    ``root`` is the run directory, or the work folder of a run that lies in an object store at ``url``.
    """

    root: Path
    name: str
    key: str
    url: str | None = None

    @cached_property
    def place(self) -> Place:
        """Where the files lie."""
        return LocalFolder(self.root) if self.url is None else ObjectFolder(self.url, self.root)

    @property
    def _manifest(self) -> str:
        return f"manifest/{self.name}"

    def _entry_name(self, relative: str) -> str:
        # '%' is in no artifact name, so no two artifacts share an entry.
        return f"{self._manifest}/{relative.replace('/', '%')}.json"

    def path(self, relative: str) -> Path:
        """Where an artifact of this name is written; refuses names that leave the run or are the store's own."""
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
            self.place.remove(self._entry_name(name) for name in relative)
        for name, final in zip(relative, finals, strict=True):
            entry = Entry(name, final.stat().st_size, sha256_file(final), self.key, facts)
            self.place.publish(name)
            self.place.enter(self._entry_name(name), json_text(asdict(entry)).encode())

    def write_table(self, relative: str, table: pa.Table, **facts: Any) -> None:
        """Commits a Parquet file with page checksums."""
        with self.writing(relative, rows=table.num_rows, **facts) as (temporary,):
            write_parquet(table, temporary)
            if pq.read_metadata(temporary).num_rows != table.num_rows:
                raise StorageError(f"{temporary}: read back with another number of rows; check the disk")

    def write_json(self, relative: str, content: Any, **facts: Any) -> None:
        """Commits a JSON file."""
        with self.writing(relative, **facts) as (temporary,):
            temporary.write_text(json_text(content), encoding="utf-8")

    def write_text(self, relative: str, content: str, **facts: Any) -> None:
        """Commits a text file."""
        with self.writing(relative, **facts) as (temporary,):
            temporary.write_text(content, encoding="utf-8")

    def entry(self, relative: str) -> Entry | None:
        """The artifact's entry, or None when it is absent, incomplete, or made with another key."""
        self.path(relative)
        entry = _entry(self.place.read(self._entry_name(relative)))
        if entry is None or entry.key != self.key or entry.path != relative:
            return None
        return entry if self.place.sizes([relative]).get(relative) == entry.bytes else None

    def entries(self) -> list[Entry]:
        """All artifacts of this step and key, by name."""
        found = {}
        for file, content in _entry_files(self.place.read_folder(self._manifest)).items():
            name, entry = _artifact(file), _entry(content)
            if _is_name(name) and entry is not None and entry.key == self.key and entry.path == name:
                found[name] = entry
        sizes = self.place.sizes(found)
        return [entry for name, entry in sorted(found.items()) if sizes.get(name) == entry.bytes]

    def read_table(self, relative: str, columns: list[str] | None = None) -> pa.Table:
        """Reads a Parquet artifact, page checksums verified.

        Raises:
            QuadmixError: it is not in the manifest, or does not read back.
        """
        return read_parquet(self.read_path(relative), columns, maker=f"the step {self.name!r}")

    def read_json(self, relative: str) -> Any:
        """Reads a JSON artifact; errors as ``read_table``."""
        path = self.read_path(relative)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise QuadmixError(f"{path}: damaged ({error}); delete it and run the step {self.name!r} again") from error

    def read_path(self, relative: str) -> Path:
        """The path of an artifact that the manifest vouches for; fetched from an object store if it is not here."""
        entry = self.entry(relative)
        if entry is None:
            raise QuadmixError(
                f"{self.place}/{relative}: not there, or not from this recipe; run the step {self.name!r} first"
            )
        return self.place.local(relative, entry.bytes, entry.sha256)

    def bring(self, *paths: str | Path) -> None:
        """Fetches files and folders of the run, named by their places on the driver's machine, if they are not here."""
        for path in map(Path, paths):
            if path.is_relative_to(self.root):  # else a file of the user's own
                self.place.bring(path.relative_to(self.root).as_posix())

    def finish(self, **facts: Any) -> None:
        """Marks the step as complete; ``facts`` are its summary (row counts, seconds)."""
        entries = self.entries()
        content = {"step": self.name, "key": self.key, "artifacts": len(entries), "facts": facts}
        content = json.loads(json_text(content))  # as it will be read back
        content["sha256"] = _step_digest(content, entries)
        self.place.write(f"{self._manifest}/{_SUCCESS}", json_text(content).encode())

    def summary(self) -> dict[str, Any] | None:
        """What ``finish`` was told, or None while the step is not complete or an artifact is missing."""
        content = _mapping(self.place.read(f"{self._manifest}/{_SUCCESS}"))
        if content is None or content.get("key") != self.key or content.get("artifacts") != len(self.entries()):
            return None
        return content.get("facts")

    @property
    def is_done(self) -> bool:
        """Whether the step is complete with this key."""
        return self.summary() is not None


@dataclass(frozen=True)
class RunDirectory:
    """A folder, or a prefix of an object store, that holds one run; ``root`` is then the work folder."""

    root: Path
    url: str | None = None

    @classmethod
    def at(cls, out: str | Path) -> Self:
        """The run that lies there; nothing is created."""
        place = place_at(out)
        return cls(place.root, place.url if isinstance(place, ObjectFolder) else None)

    @classmethod
    def open(cls, out: str | Path) -> Self:
        """Creates the folder if need be.

        Raises:
            StorageError: it cannot be created or written.
        """
        directory = cls.at(out)
        directory.place.probe()
        return directory

    @cached_property
    def place(self) -> Place:
        """Where the files lie."""
        return LocalFolder(self.root) if self.url is None else ObjectFolder(self.url, self.root)

    def step(self, name: str, key: str) -> Step:
        """The step ``name`` made from what ``key`` is the hash of."""
        return Step(self.root, name, key, self.url)

    def step_names(self) -> list[str]:
        """Steps that have a manifest, whatever their key."""
        return self.place.folders("manifest")

    def recorded_keys(self, name: str) -> set[str]:
        """The keys with which artifacts of a step were made."""
        found = map(_mapping, self.place.read_folder(f"manifest/{name}").values())
        return {content["key"] for content in found if content is not None}

    def write_text(self, name: str, content: str) -> None:
        """Writes a file beside the artifacts, such as the report."""
        self.place.write(name, content.encode())

    def read_text(self, name: str) -> str | None:
        """A file beside the artifacts; None where there is none."""
        content = self.place.read(name)
        return None if content is None else content.decode()

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Holds the run for this process.

        Raises:
            RunLockedError: another process holds it; the message says which.
        """
        return self.place.lock()

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
            files, entries = self.place.read_folder(f"manifest/{name}"), []
            for file, content in _entry_files(files).items():
                checked += 1
                entry = _entry(content)
                if entry is None or content != json_text(asdict(entry)).encode():
                    faults.append(f"manifest/{name}/{file}: manifest entry is not as it was written")
                    continue
                entries.append(entry)
                fault = self._fault(name, entry, file)
                faults += [fault] if fault else []
            if _SUCCESS in files and not _success_matches(files[_SUCCESS], entries):
                faults.append(f"manifest/{name}/{_SUCCESS}: does not match the entries beside it")
        return checked, faults

    def _fault(self, step: str, entry: Entry, file: str) -> str | None:
        """What is wrong with an artifact, if anything is."""
        if not _is_name(entry.path):
            return f"manifest/{step}/{file}: {entry.path!r} is not an artifact name"
        if _artifact(file) != entry.path:
            return f"{file}: describes {entry.path!r}"
        size = self.place.sizes([entry.path]).get(entry.path)
        if size is None:
            return f"{entry.path}: missing"
        if size != entry.bytes:
            return f"{entry.path}: {size} bytes, the manifest says {entry.bytes}"
        if self.place.digest(entry.path) != entry.sha256:
            return f"{entry.path}: content differs from its sha256"
        return None


def _step_digest(content: dict[str, Any], entries: list[Entry]) -> str:
    ordered = sorted((asdict(entry) for entry in entries), key=lambda entry: entry["path"])
    return content_key(content, ordered)


def _success_matches(written: bytes, entries: list[Entry]) -> bool:
    content = _mapping(written)
    if content is None or written != json_text(content).encode():
        return False
    said = {name: value for name, value in content.items() if name != "sha256"}
    # Entries of another recipe may lie beside those of this one.
    return content.get("sha256") == _step_digest(said, [e for e in entries if e.key == content.get("key")])


def content_key(*parts: Any) -> str:
    """The sha256 of JSON-serialisable parts: the key of a step."""
    return hashlib.sha256(json_text(parts).encode()).hexdigest()


def merge_counts(counts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Adds up ``rows_in``, ``rows_kept`` and ``dropped`` (by reason) of several shards."""
    total: dict[str, Any] = {"rows_in": 0, "rows_kept": 0, "dropped": {}}
    for count in counts:
        total["rows_in"] += count["rows_in"]
        total["rows_kept"] += count["rows_kept"]
        for reason, n in count["dropped"].items():
            total["dropped"][reason] = total["dropped"].get(reason, 0) + n
    return total


def _is_name(relative: str) -> bool:
    parts = relative.split("/")
    fits = len(relative) <= _LONGEST_NAME and all(_NAME.fullmatch(part) for part in parts)
    return fits and parts[0] not in ("manifest", "_SUCCESS")


def _artifact(file: str) -> str:
    """The artifact that the entry of this file name is of."""
    return file.removesuffix(".json").replace("%", "/")


def _entry_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in sorted(files.items()) if name != _SUCCESS}


def _mapping(content: bytes | None) -> dict[str, Any] | None:
    """What is written in a manifest's file; None where it is no such thing."""
    try:
        found = json.loads((content or b"").decode())
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # not NaN, nor half a surrogate pair
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("key"), str) else None


def _entry(content: bytes | None) -> Entry | None:
    found = _mapping(content)
    try:
        entry = None if found is None else Entry(**found)
    except TypeError:
        return None
    kinds = {"path": str, "bytes": int, "sha256": str, "key": str, "facts": dict}
    return entry if entry and all(isinstance(getattr(entry, name), kind) for name, kind in kinds.items()) else None
