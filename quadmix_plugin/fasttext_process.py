"""A fastText model in a process of its own, so that a damaged file cannot take the worker down.

fastText checks nothing when it loads: a changed file can crash at the first document. Here such a file ends a child
process (``fasttext_child``) and becomes an error of one line. The child is an ordinary subprocess, since Dask's
workers may not have ``multiprocessing`` children. Scorers and classifiers are built on it; it knows none of them.
"""

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import models
from quadmix_plugin.errors import InputError
from quadmix_plugin.fasttext_child import FRAME, pack
from quadmix_plugin.fasttext_file import MAGIC

# Bounds so generous that only a hang meets them: the published model of 2.39 GB has ten minutes to load.
_LOAD_SECONDS, _LOAD_BYTES_PER_SECOND = 120, 5_000_000
_ANSWER_SECONDS = 300  # for one request

_REQUEST_BYTES, _REQUEST_LINES = 1 << 20, 256
_READ_BYTES = 1 << 20
_EXIT_SECONDS = 10  # from the end of a child's output to its exit code

_Message = tuple[dict[str, Any], bytes]


class FastTextProcess:
    """A supervised fastText model (``.bin`` or ``.ftz``), loaded and run in a child process.

    Before fastText opens the file its structure is checked, and then the model's answer to a line of its own words. A
    cut file is always refused. A changed word, a small change of a weight and exchanged labels are seen by ``sha256``
    alone. The child lives until ``close``, until this object is collected, or until the parent ends, in whatever way.
    Threads may share the object.

    Args:
        path: the model.
        sha256: digest that the file must have, checked before anything else reads it.
        load_seconds: time to load; by default two minutes and a second for every 5 MB. Meanwhile the child may take
            four times the file's size and 2 GiB of memory.
        answer_seconds: time for one request, which is at most 1 MiB of text, or one document.

    Raises:
        InputError: no fastText model, another digest, damaged, or the child ended or was too slow.
    """

    labels: list[str]

    def __init__(
        self,
        path: str | Path,
        sha256: str | None = None,
        *,
        load_seconds: float | None = None,
        answer_seconds: float = _ANSWER_SECONDS,
    ) -> None:
        self.path = Path(path)
        _check_file(self.path, sha256)
        if load_seconds is None:
            load_seconds = _LOAD_SECONDS + self.path.stat().st_size / _LOAD_BYTES_PER_SECOND
        self._answer_seconds = answer_seconds
        self._remedy = "fetch it again" if sha256 else "fetch it again and give sha256: the file's digest"
        self._lock = threading.Lock()
        limits = [str(int(seconds)) for seconds in (load_seconds, answer_seconds)]
        command = [sys.executable, "-P", "-m", "quadmix_plugin.fasttext_child", str(self.path), *limits]
        self._child = _Child(command)
        self._end = weakref.finalize(self, self._child.end)
        [(header, _)] = self._converse(iter(()), 1, load_seconds, "while it loads")
        self.labels = header["labels"]

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.process.pid

    def predict(self, texts: Iterable[str], k: int = 1) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The ``k`` most probable labels of each text, best first; a text is read as one line.

        Returns:
            Positions in ``labels`` int32 [n, k], and probabilities float32 [n, k] as fastText gives them (up to
            1.00001). Where fastText gives fewer labels, as for a text with none of its words, the rest is -1 and 0.

        Raises:
            InputError: the child ended or did not answer in time, now or before; it is not started again.
        """
        with self._lock:
            if not self._end.alive:
                raise InputError(f"{self.path}: its fastText process has ended; set the plug-in up again")
            replies = self._converse(_requests(texts, k), 0, self._answer_seconds, "at a document")
        ids = b"".join(payload[: len(payload) // 2] for _, payload in replies)
        probabilities = b"".join(payload[len(payload) // 2 :] for _, payload in replies)
        return np.frombuffer(ids, "<i4").reshape(-1, k), np.frombuffer(probabilities, "<f4").reshape(-1, k)

    def close(self) -> None:
        """Ends the child and waits for its end."""
        self._end()

    def _converse(self, requests: Iterator[bytes], awaited: int, seconds: float, when: str) -> list[_Message]:
        """Sends every request; the ``awaited`` replies and one to each request. Any failure ends the child."""
        try:
            return list(self._replies(requests, awaited, seconds, when))
        except BaseException:  # also an interrupt: the pipes are in the middle of a message
            self.close()
            raise

    def _replies(self, requests: Iterator[bytes], awaited: int, seconds: float, when: str) -> Iterator[_Message]:
        """Reads while it writes, since both pipes may be full; makes the next request while the child computes."""
        received, unsent = bytearray(), memoryview(b"")
        while True:
            if not unsent:
                unsent = memoryview(next(requests, b""))
                awaited += bool(unsent)
            if not unsent and not awaited:
                return
            if not self._child.wait(bool(unsent), seconds):
                raise InputError(f"{self.path}: fastText hangs {when} (for {seconds:g} s now); {self._remedy}")
            try:
                unsent = unsent[self._child.write(unsent) :]
            except BrokenPipeError:  # what the child died of may still be in its output
                requests, unsent = iter(()), memoryview(b"")
            if not self._child.read(received):
                raise InputError(f"{self.path}: fastText ended {when} ({self._child.ending()}); {self._remedy}")
            for header, payload in _messages(received):
                if "error" in header:
                    raise InputError(f"{self.path}: {header['error']}")
                awaited -= 1
                yield header, payload


def _check_file(path: Path, sha256: str | None) -> None:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise InputError(f"{path}: not a fastText model; give the .bin that fastText wrote")
    if sha256 and (found := digest(path)) != sha256:
        raise InputError(f"{path}: sha256 is {found}, not {sha256}; fetch it again")


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _requests(texts: Iterable[str], k: int) -> Iterator[bytes]:
    """Messages of at most ``_REQUEST_BYTES`` and ``_REQUEST_LINES``, or of one text that is longer."""
    lines: list[bytes] = []
    size = 0
    for text in texts:
        line = " ".join(models.encodable(text).strip().splitlines()).encode() + b"\n"
        if lines and (size + len(line) > _REQUEST_BYTES or len(lines) == _REQUEST_LINES):
            yield _request(lines, k)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield _request(lines, k)


def _request(lines: list[bytes], k: int) -> bytes:
    return pack({"k": k, "lengths": [len(line) for line in lines]}, b"".join(lines))


def _messages(received: bytearray) -> Iterator[_Message]:
    """Takes the complete messages off the front."""
    while len(received) >= FRAME.size:
        header_size, payload_size = FRAME.unpack_from(received)
        middle = FRAME.size + header_size
        if len(received) < middle + payload_size:
            return
        message = json.loads(received[FRAME.size : middle]), bytes(received[middle : middle + payload_size])
        del received[: middle + payload_size]
        yield message


class _Child:
    """A subprocess whose pipes never block."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)  # noqa: S603
        self._input, self._output = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        for pipe in (self._input, self._output):
            os.set_blocking(pipe.fileno(), False)

    def wait(self, writing: bool, seconds: float) -> bool:
        """Waits until it can be read or, if ``writing``, written; False when time is up."""
        poll = select.poll()  # select() refuses files beyond the 1024th
        poll.register(self._output, select.POLLIN)
        if writing:
            poll.register(self._input, select.POLLOUT)
        return bool(poll.poll(seconds * 1000))

    def write(self, data: memoryview) -> int:
        """Writes what fits now; the number of bytes."""
        return (self._input.write(data) or 0) if data else 0

    def read(self, received: bytearray) -> bool:
        """Adds what there is to ``received``; False when nothing will come any more."""
        data = self._output.read(_READ_BYTES)
        received += data or b""
        return data != b""

    def ending(self) -> str:
        """How it ended, given that its output has."""
        try:
            code = self.process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "its output is closed"
        if code >= 0:
            return f"exit code {code}"
        return f"signal {-code}, {signal.strsignal(-code)}" + ", perhaps for want of memory" * (-code == signal.SIGKILL)

    def end(self) -> None:
        """Kills it, since it keeps nothing that could be lost, and leaves no zombie."""
        self.process.kill()
        self.process.wait()
        self._input.close()
        self._output.close()
