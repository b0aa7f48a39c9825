"""The lock of a run in an object store: numbered objects, each made only where none of its name is there.

The highest number holds the run. Its process renews it; one that is not renewed any more belongs to a process that was
killed, and whoever makes the next number has taken the run over. No clock is compared with another: a waiting process
watches whether the object changes.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import psutil

from quadmix_plugin.errors import RunLockedError, StorageError

FOLDER = ".lock"


class Objects(Protocol):
    """What a lease needs of an object store."""

    def read(self, name: str) -> bytes | None:
        """An object's content."""
        ...

    def read_folder(self, folder: str) -> dict[str, bytes]:
        """Name → content of the objects of a folder."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless one of its name is there."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Writes an object."""
        ...

    def remove(self, names: list[str]) -> None:
        """Removes objects."""
        ...


@dataclass
class Lease:
    """The lease of a run.

    Args:
        objects: where the run lies.
        renewal: seconds between two renewals.
        patience: seconds without a renewal after which a lease is taken over.
    """

    objects: Objects
    renewal: float = 10.0
    patience: float = 60.0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Holds the run; the block is interrupted should another process take it over.

        Raises:
            RunLockedError: a living process holds it, or has taken it over.
        """
        number, ended, lost = self._acquire(), threading.Event(), []
        renewing = threading.Thread(target=self._renew, args=(number, ended, lost), daemon=True)
        renewing.start()
        try:
            yield
        except BaseException as error:  # the interrupt, whatever it has become
            if lost:
                raise RunLockedError(f"{self.objects}: {lost[0]}; what is entered is kept") from error
            raise
        finally:
            ended.set()
            renewing.join()
            if not lost:
                self.objects.write(_name(number), _content(0, free=True))

    def _acquire(self) -> int:
        number, content = self._highest()
        if content and not content.get("free") and not _is_dead(content):
            self._wait(number, content)
        if not self.objects.create(_name(number + 1), _content(0)):
            raise RunLockedError(
                f"{self.objects}: another process has just taken it; wait for it or give another --out"
            )
        self.objects.remove([_name(each) for each in self._numbers() if each <= number])
        return number + 1

    def _wait(self, number: int, before: dict[str, Any]) -> None:
        """Returns when the lease has not been renewed for long enough."""
        who = f"process {before.get('pid')} on {before.get('host')}"
        if before.get("host") == socket.gethostname():
            raise RunLockedError(f"{self.objects}: in use by {who}; wait for it or give another --out")
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            time.sleep(min(self.renewal, self.patience) / 2)
            if self._highest() != (number, before):
                raise RunLockedError(f"{self.objects}: in use by {who}; wait for it or give another --out")

    def _renew(self, number: int, ended: threading.Event, lost: list[str]) -> None:
        beat = 0
        while not ended.wait(self.renewal):
            beat += 1
            try:
                highest, content = self._highest()
                if highest == number:
                    self.objects.write(_name(number), _content(beat))
                    continue
            except StorageError:  # unreachable for now: whoever waits sees no renewal, and this process no lease
                continue
            who = f"process {content.get('pid')} on {content.get('host')}" if content else "another process"
            lost.append(f"taken over by {who}, since this process did not renew its lease for {self.patience:g} s")
            os.kill(os.getpid(), signal.SIGINT)
            return

    def _numbers(self) -> list[int]:
        names = (name.removesuffix(".json") for name in self.objects.read_folder(FOLDER))
        return sorted(int(name) for name in names if name.isdigit())

    def _highest(self) -> tuple[int, dict[str, Any]]:
        found = self._numbers()
        if not found:
            return 0, {}
        try:
            content = json.loads(self.objects.read(_name(found[-1])) or b"{}")
        except ValueError:
            content = {}
        return found[-1], content if isinstance(content, dict) else {}


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08}.json"


def _content(beat: int, free: bool = False) -> bytes:
    me = psutil.Process()
    facts = {"pid": me.pid, "started": me.create_time(), "host": socket.gethostname(), "beat": beat, "free": free}
    return json.dumps(facts).encode()


def _is_dead(content: dict[str, Any]) -> bool:
    """Whether the holder ran on this machine and is gone."""
    if content.get("host") != socket.gethostname():
        return False
    try:
        return psutil.Process(int(content["pid"])).create_time() != content["started"]
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return True
