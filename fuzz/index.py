"""Fuzzes the reader of token files: two bytes with the size of the ``.bin`` file, then the ``.idx`` file."""

import random
import struct
import tempfile
from pathlib import Path

import numpy as np
from driver import fuzz, instrumented

with instrumented("quadmix_plugin.megatron"):
    from quadmix_plugin.megatron import TokenFile, check_tokens, write_documents

LONGEST = 4096


def target(data: bytes, folder: Path) -> None:
    """Opens a token file; of one that opens every document is read, and together they are the file."""
    size, index = int.from_bytes(data[:2], "little"), data[2:]
    bin_path, idx_path = folder / "t.bin", folder / "t.idx"
    bin_path.write_bytes(bytes(range(256)) * (size // 256) + bytes(range(size % 256)))
    idx_path.write_bytes(index)
    file = TokenFile.open(folder / "t")
    documents = [file.document(i) for i in range(file.n_documents)]
    if [document.size for document in documents] != file.lengths.tolist():
        raise ValueError("a document is not as long as the index says")
    joint = np.concatenate([np.empty(0, file.dtype), *documents])
    if joint.tobytes() != bin_path.read_bytes():
        raise ValueError("the documents together are not the file")
    check_tokens(file.tokens, 65_536, "t.bin")


def seeds() -> dict[str, bytes]:
    """Token files as they are written: ids of both widths, no document, one, and many."""
    cases = {
        "none": (100, []),
        "one": (100, [[1, 2, 3]]),
        "narrow": (65_499, [list(range(n)) for n in range(1, 20)]),
        "wide": (65_501, [list(range(n)) for n in range(1, 20)]),
    }
    return {name: _written(*case) for name, case in cases.items()}


def words() -> list[bytes]:
    """The header, each type of ids, and sizes at the edges of what their fields hold."""
    edges = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    return [
        b"MMIDIDX\x00\x00",
        *(b"\x01\0\0\0\0\0\0\0" + bytes([code]) for code in range(10)),
        *(edge.to_bytes(8, "little") for edge in edges),
        *((edge & 0xFFFFFFFF).to_bytes(4, "little") for edge in edges),
    ]


def mutation(data: bytes, generator: random.Random) -> bytes | None:
    """An index of a few sequences whose parts agree, but for one number of it at times."""
    lengths = [generator.choice([0, 1, 2, 3, 7, -1, -3]) for _ in range(generator.randrange(6))]
    documents = [0, *sorted(generator.choices(range(len(lengths) + 1), k=generator.randrange(4))), len(lengths)]
    code, width = generator.choice([(1, 1), (4, 4), (5, 8), (6, 8), (7, 4), (8, 2)])
    pointers = [sum(lengths[:i]) * width for i in range(len(lengths))]
    numbers = [sum(lengths) * width, 1, code, len(lengths), len(documents), *lengths, *pointers, *documents]
    if generator.random() < 0.5:
        numbers[generator.randrange(len(numbers))] += generator.choice([-1, 1, 2, 1 << 15, -(1 << 40)])
    layout = f"<H9sQBQQ{len(lengths)}i{len(pointers) + len(documents)}q"
    try:
        return struct.pack(layout, numbers[0], b"MMIDIDX\0\0", *numbers[1:])
    except struct.error:  # out of the field's range
        return None


def _written(vocabulary: int, documents: list[list[int]]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        bin_path, idx_path = Path(folder) / "t.bin", Path(folder) / "t.idx"
        write_documents(documents, bin_path, idx_path, vocabulary, eod=0)
        return bin_path.stat().st_size.to_bytes(2, "little") + idx_path.read_bytes()


if __name__ == "__main__":
    fuzz(target, seeds(), words(), LONGEST, mutation)
