"""Where the files of a run lie: in a folder, or in an object store with a work folder on each machine before it.

An object store has no rename and no lock. What stands in for them is the write of an object only where none of its
name is there: the entry of an artifact, made after the artifact itself, is such a write, and so is the lease of a run.
"""

import contextlib
import hashlib
import os
import socket
import stat
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from quadmix_plugin.atomic import atomic_path, flush, sha256_file, storage_errors
from quadmix_plugin.errors import QuadmixError, RunLockedError, StorageError
from quadmix_plugin.lease import Lease

WORK_FOLDERS = "QUADMIX_WORK"
"""Environment variable: the folder for the work folders of runs in object stores."""

_BLOCK = 1 << 22
_Stamp = tuple[int, int, str]
_SEEN: dict[Path, _Stamp] = {}  # files of work folders whose digest is known: time, bytes, sha256
_READ: dict[str, tuple[str, bytes]] = {}  # small objects that were read: version and content


@dataclass(frozen=True)
class LocalFolder:
    """A run in a folder that all its processes see."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def probe(self) -> None:
        """Creates the folder if need be, and finds out whether it can be written."""
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe.{uuid.uuid4().hex}.tmp"
            probe.write_bytes(b"\0")
            probe.unlink()

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def read_folder(self, folder: str) -> dict[str, bytes]:
        """Name → content of the JSON files of a folder."""
        found = {path.name: self.read(f"{folder}/{path.name}") for path in sorted((self.root / folder).glob("*.json"))}
        return {name: content for name, content in found.items() if content is not None}

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder."""
        place = self.root / folder
        return sorted(path.name for path in place.iterdir() if path.is_dir()) if place.exists() else []

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those files that are there; a folder is none."""
        found = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                about = (self.root / name).stat()
                if stat.S_ISREG(about.st_mode):
                    found[name] = about.st_size
        return found

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file, replacing one that is there."""
        with atomic_path(self.root / name) as temporary:
            temporary.write_bytes(content)

    enter = write

    def remove(self, names: Iterable[str]) -> None:
        """Removes small files of one folder that may be there, and waits until that is on the disk."""
        there = [path for name in names if (path := self.root / name).exists()]
        for path in there:
            path.unlink(missing_ok=True)
        if there:
            flush(there[0].parent)

    def publish(self, name: str) -> None:
        """Nothing to do: a file in its place is there for all."""

    def local(self, name: str, size: int, sha256: str) -> Path:
        """The file to read from."""
        return self.root / name

    def bring(self, name: str) -> None:
        """Nothing to do: all machines see the folder."""

    def digest(self, name: str) -> str:
        """The sha256 of the content as it is stored."""
        return sha256_file(self.root / name)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process.

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


@dataclass(frozen=True)
class ObjectFolder:
    """A run in an object store of fsspec; ``root`` is the work folder, with a copy of what this machine needed.

    Credentials and endpoints are the store's own (its environment variables and files), never the recipe's.
    """

    url: str
    root: Path

    def __str__(self) -> str:
        return self.url

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        with self._errors():
            return fsspec.filesystem(self.url.partition("://")[0], use_listings_cache=False)

    def _at(self, name: str) -> str:
        return f"{self.url}/{name}"

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Whatever a store's library raises, as an error that names the store; its own retries are over then."""
        try:
            yield
        except (QuadmixError, FileExistsError):
            raise
        except ImportError as error:
            raise StorageError(f"{self.url}: {error}; install the package of this store, such as s3fs") from error
        except FileNotFoundError as error:
            raise StorageError(f"{self.url}: {error}; create the bucket, or give another --out") from error
        except Exception as error:  # not all of them are OSErrors
            raise StorageError(
                f"{self.url}: {type(error).__name__}: {error}; check the store, its address and the credentials in the "
                "environment, and run the command again: finished work is kept"
            ) from error

    def probe(self) -> None:
        """Finds out whether objects can be written and removed, and makes the work folder."""
        LocalFolder(self.root).probe()
        name = self._at(f".probe-{uuid.uuid4().hex}")
        with self._errors():
            self._fs.pipe_file(name, b"\0")
            self._fs.rm_file(name)

    def read(self, name: str) -> bytes | None:
        """The content of a small object; None where there is none."""
        with self._errors():
            try:
                return self._fs.cat_file(self._at(name))
            except FileNotFoundError:
                return None

    def _listed(self, folder: str) -> list[dict[str, Any]]:
        with self._errors():
            try:
                return self._fs.ls(self._at(folder), detail=True)
            except FileNotFoundError:
                return []

    def read_folder(self, folder: str) -> dict[str, bytes]:
        """Name → content of the JSON objects of a folder; those that have not changed are not read again."""
        versions = {
            PurePosixPath(each["name"]).name: repr(sorted((key, str(value)) for key, value in each.items()))
            for each in self._listed(folder)
            if each["type"] == "file" and each["name"].endswith(".json")
        }
        places = {name: self._at(f"{folder}/{name}") for name in versions}
        new = [name for name, place in places.items() if _READ.get(place, ("",))[0] != versions[name]]
        with self._errors():
            read = self._fs.cat([places[name] for name in new], on_error="return") if new else {}
        content = list(read.values()) if isinstance(read, dict) else [read]
        for name, each in zip(new, content, strict=True):
            if isinstance(each, FileNotFoundError):  # removed meanwhile
                continue
            with self._errors():
                if isinstance(each, Exception):
                    raise each
            _READ[places[name]] = versions[name], each
        return {name: _READ[place][1] for name, place in sorted(places.items()) if place in _READ}

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder."""
        return sorted(PurePosixPath(each["name"]).name for each in self._listed(folder) if each["type"] == "directory")

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those objects that are there; one listing for each folder, or one look at a single object."""
        names = list(names)
        found = {}
        if len(names) == 1:
            with self._errors(), contextlib.suppress(FileNotFoundError):
                facts = self._fs.info(self._at(names[0]))
                return {names[0]: int(facts["size"])} if facts["type"] == "file" else {}
            return {}
        for folder in {str(PurePosixPath(name).parent) for name in names}:
            for each in self._listed(folder):
                if each["type"] == "file":
                    name = PurePosixPath(each["name"]).name
                    found[name if folder == "." else f"{folder}/{name}"] = int(each["size"])
        return {name: found[name] for name in names if name in found}

    def write(self, name: str, content: bytes) -> None:
        """Writes a small object, replacing one that is there."""
        with self._errors():
            self._fs.pipe_file(self._at(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object; False where one of this name is there, which is left as it is."""
        with self._errors():
            try:
                self._fs.pipe_file(self._at(name), content, mode="create")
            except FileExistsError:
                return False
        return True

    def enter(self, name: str, content: bytes) -> None:
        """Writes an entry that must not be there yet; an equal one is a repetition of the same work."""
        if not self.create(name, content) and (there := self.read(name)) != content:
            raise StorageError(
                f"{self._at(name)}: another process has entered something else ({(there or b'')[:200]!r}); end it and "
                "run the command again"
            )

    def remove(self, names: Iterable[str]) -> None:
        """Removes small objects that may be there."""
        for name in names:
            with self._errors(), contextlib.suppress(FileNotFoundError):
                if self._fs.exists(self._at(name)):
                    self._fs.rm_file(self._at(name))

    def publish(self, name: str) -> None:
        """Puts a file of the work folder into the store, whole or not at all."""
        path = self.root / name
        with self._errors():
            self._fs.put_file(str(path), self._at(name))

    def local(self, name: str, size: int, sha256: str) -> Path:
        """The copy in the work folder, fetched if it is not there or is another one.

        Raises:
            StorageError: what is in the store is not what its entry says.
        """
        path = self.root / name
        if not path.exists() or _stamp(path)[1:] != (size, sha256):
            with atomic_path(path) as temporary:
                with self._errors():
                    self._fs.get_file(self._at(name), str(temporary))
                if sha256_file(temporary) != sha256:
                    raise StorageError(
                        f"{self._at(name)}: content differs from its sha256; delete it and run the step again"
                    )
        return path

    def bring(self, name: str) -> None:
        """Copies an object, or all that are in a folder, into the work folder where their sizes differ."""
        prefix = self._fs._strip_protocol(self.url)
        with self._errors():
            found = self._fs.find(self._at(name), detail=True)
        for place, facts in found.items():
            path = self.root / str(place).removeprefix(prefix).lstrip("/")
            if not path.exists() or path.stat().st_size != facts["size"]:
                with atomic_path(path) as temporary, self._errors():
                    self._fs.get_file(place, str(temporary))

    def digest(self, name: str) -> str:
        """The sha256 of the content as it is stored."""
        digest = hashlib.sha256()
        with self._errors(), self._fs.open(self._at(name), "rb", block_size=_BLOCK) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process, against others on this machine and elsewhere.

        Raises:
            RunLockedError: another process holds it, or took it over meanwhile; the message says which.
        """
        with LocalFolder(self.root).lock(), Lease(self).held():
            yield


Place = LocalFolder | ObjectFolder


def is_url(place: str | Path) -> bool:
    """Whether this names a place in an object store."""
    return "://" in str(place)


def place_at(place: str | Path) -> Place:
    """The folder, or the object store's prefix, that a user names."""
    text = str(place)
    if text.startswith("file://"):
        return LocalFolder(Path(text.removeprefix("file://")).absolute())
    if not is_url(text):
        return LocalFolder(Path(text).absolute())
    url = text.rstrip("/")
    return ObjectFolder(url, work_folder(url))


def work_folder(url: str) -> Path:
    """Where this machine keeps what it reads and writes of a run in an object store."""
    given = os.environ.get(WORK_FOLDERS)
    base = Path(given) if given else Path.home() / ".cache" / "quadmix"
    return base.absolute() / f"{PurePosixPath(url).name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def _stamp(path: Path) -> _Stamp:
    """Time, size and sha256 of a file, which is read again only when time or size have changed."""
    facts = path.stat()
    known = _SEEN.get(path)
    if known is None or known[:2] != (facts.st_mtime_ns, facts.st_size):
        known = _SEEN[path] = facts.st_mtime_ns, facts.st_size, sha256_file(path)
    return known
