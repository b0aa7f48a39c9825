"""The child's side of ``fasttext_process``: checks one fastText file, loads it, and answers requests on its stdin.

Run as ``python -m quadmix_plugin.fasttext_child FILE LOAD_SECONDS ANSWER_SECONDS``. It knows no scorer, and imports
little so that it starts fast. A message of either side is a length-prefixed JSON header and bytes.
"""

import contextlib
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quadmix_plugin.fasttext_file import (
    HIERARCHICAL_SOFTMAX,
    SOFTMAX,
    DamagedError,
    NoClassifierError,
    inspect,
    require,
)

FRAME = struct.Struct("<IQ")  # lengths of the JSON header and of the bytes after it

_MEMORY_PER_BYTE, _MEMORY = 4, 2 << 30
_GRACE = 30  # seconds; the parent, while it lives, is first to end a child that hangs


def pack(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """One message."""
    text = json.dumps(header).encode()
    return FRAME.pack(len(text), len(payload)) + text + payload


def main(path: str, load_seconds: str, answer_seconds: str) -> int:
    """Loads the file and answers until stdin ends; 0, or 1 after an error, which the parent is told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle; this process ends with its stdin
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside C++, with or without a parent
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever fastText prints must not get between the replies
    try:
        with contextlib.suppress(BrokenPipeError):  # the parent is gone
            _serve(path, int(load_seconds), int(answer_seconds), replies)
        return 0
    except NoClassifierError as error:
        reason = f"{error}; give a model that fastText trained as supervised"
    except DamagedError as error:
        reason = f"damaged ({error}); fetch it again"
    except MemoryError:
        reason = "needs more memory than there is, or than a sound file of its size; free some, or fetch it again"
    except Exception as error:  # the parent shows it, whatever it is
        reason = f"cannot be used ({type(error).__name__}: {error}); fetch it again"
    replies.write(pack({"error": " ".join(reason.split())}))
    replies.flush()
    return 1


def load(path: str) -> tuple[Any, list[str]]:
    """The model of a file, which is checked before and tried after, and its labels.

    Raises:
        DamagedError, NoClassifierError: as ``inspect``; or what the model says of its own words is no probability.
    """
    import fasttext

    contents = inspect(path)
    try:
        model = fasttext.load_model(path)
        found = model.get_labels()
        _, [tried] = model.f.multilinePredict([contents.canary], -1, 0.0, "strict")
    except (ValueError, RuntimeError) as error:
        raise DamagedError(str(error)) from error
    require(found == contents.labels, f"{len(found)} labels, not {len(contents.labels)}")
    require(bool(np.all((tried >= 0) & (tried <= 1.0001))), "a probability is outside [0, 1]")
    if contents.loss in (HIERARCHICAL_SOFTMAX, SOFTMAX):
        total, slack = float(tried.sum()), 1e-3 + 2e-5 * len(found)  # fastText adds 1e-5 to each probability
        require(abs(total - 1) <= slack, f"the probabilities of all labels sum to {total:.4g}")
    return model, contents.labels


@contextlib.contextmanager
def limited_memory(file_size: int) -> Iterator[None]:
    """Allows this process four times the file's size and 2 GiB more than it has; afterwards as much as before."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    wanted = used + _MEMORY_PER_BYTE * file_size + _MEMORY
    soft = min([wanted, *(limit for limit in before if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _serve(path: str, load_seconds: int, answer_seconds: int, replies: BinaryIO) -> None:
    signal.alarm(load_seconds + _GRACE)
    with limited_memory(Path(path).stat().st_size):
        model, labels = load(path)
    replies.write(pack({"labels": labels}))
    label_ids = {label: i for i, label in enumerate(labels)}
    while True:
        replies.flush()
        signal.alarm(0)
        request = _read(sys.stdin.buffer)
        if request is None:
            return
        signal.alarm(answer_seconds + _GRACE)
        replies.write(pack({}, _answer(model, label_ids, *request)))


def _read(requests: BinaryIO) -> tuple[list[bytes], int] | None:
    """The lines and k of the next request; None where the stream ends, even in the middle of a request."""
    start = requests.read(FRAME.size)
    if len(start) < FRAME.size:
        return None
    header_size, payload_size = FRAME.unpack(start)
    header, payload = requests.read(header_size), requests.read(payload_size)
    if len(payload) < payload_size or len(header) < header_size:
        return None
    request = json.loads(header)
    ends = np.cumsum(request["lengths"]).tolist()
    return [payload[start:end] for start, end in zip([0, *ends], ends, strict=False)], request["k"]


def _answer(model: Any, label_ids: dict[str, int], lines: Sequence[bytes], k: int) -> bytes:
    """The ``k`` most probable labels of each line: ids int32 [n, k], then probabilities float32 [n, k].

    Where fastText gives fewer labels, the rest is -1 and 0.
    """
    labels, probabilities = model.f.multilinePredict(lines, k, 0.0, "strict")
    given = np.arange(k) < np.array([len(row) for row in labels])[:, None]
    ids = np.full(given.shape, -1, dtype="<i4")
    values = np.zeros(given.shape, dtype="<f4")
    ids[given] = [label_ids[label] for row in labels for label in row]
    values[given] = np.concatenate(probabilities)
    return ids.tobytes() + values.tobytes()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
