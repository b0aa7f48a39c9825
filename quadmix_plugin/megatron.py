"""Megatron token files: ``.bin`` with the ids of all documents, ``.idx`` with their lengths.

Written byte for byte as megatron-core's own builder does and read through its own reader; nothing here knows a run
directory. The arrays of megatron's readers die with them, so what leaves this module is a copy or a memory map of its
own.
"""

import struct
import warnings
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.portions import portions

MOST_PAIRS = 32_766
"""Of one blend: megatron-core's BlendedDataset numbers them by 16 bits and refuses 32,767."""

_HEADER = b"MMIDIDX\x00\x00"
_BATCH = 1 << 20  # ids that are put together before they are written; a longer document comes alone or as the last
_LONGEST = (1 << 31) - 1  # tokens of a document and its end: the index has lengths of 32 bits

_SAMPLE = 1 << 20
_FEWEST_IDS = 8
_LEAST_ENTROPY = 0.5  # nats; English text has 6 to 7 by subwords, 3 by bytes


@dataclass(frozen=True)
class Written:
    """What was written: number of documents and of tokens, end-of-document tokens included."""

    documents: int
    tokens: int


def write_documents(
    documents: Iterable[ArrayLike],
    bin_path: Path,
    idx_path: Path,
    vocabulary: int,
    eod: int | None = None,
    named: Callable[[int], str] = "document {}".format,
) -> Written:
    """Writes each list or array of ids as one document, ``eod`` (if given) after each, and reads the pair back.

    The bytes are those of megatron-core's ``IndexedDatasetBuilder``, which writes document by document; here some
    million ids are put together first. The ids take 2 bytes below a vocabulary of 65,500 and 4 from there on, as in
    megatron-core. ``named`` says in an error which document it is about.

    Raises:
        InputError: a document without tokens, an id outside the vocabulary, or ids that are no whole numbers; nothing
            usable is left then.
        QuadmixError: the files do not read back as written.
    """
    dtype = np.dtype(_indexed("DType").optimal_dtype(vocabulary))
    lengths: list[NDArray[np.int32]] = []
    count, sized = 0, cast("Iterable[Any]", documents)  # lists and arrays, which ArrayLike is wider than
    with bin_path.open("wb", buffering=0) as file:
        for batch in portions(sized, _BATCH):
            ids, ends = _joined(batch, eod, count, named)
            _require_known(ids, ends, vocabulary, count, named)
            _write_all(file, ids.astype(dtype, copy=False))
            lengths.append(np.diff(ends, prepend=0).astype(np.int32))
            count += len(batch)
    joint = np.concatenate(lengths) if lengths else np.empty(0, dtype=np.int32)
    _write_index(idx_path, joint, dtype)
    back, tokens = TokenFile.open_pair(bin_path, idx_path), int(joint.sum(dtype=np.int64))
    if (back.n_documents, back.n_tokens) != (count, tokens):
        raise QuadmixError(
            f"{bin_path}: reads back as {back.n_documents} documents with {back.n_tokens} tokens, not {count} with "
            f"{tokens}; check the disk"
        )
    return Written(count, tokens)


def require_few_pairs(pairs: int, place: str) -> None:
    """Refuses more token files than one blend can have.

    Raises:
        InputError: names the remedy.
    """
    if pairs > MOST_PAIRS:
        raise InputError(
            f"{place}: {pairs:,} shards, and Megatron blends at most {MOST_PAIRS:,} token files; raise "
            f"corpus.documents_per_shard"
        )


def _joined(
    batch: list[Any], eod: int | None, count: int, named: Callable[[int], str]
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """The ids of these documents one after the other, and where each ends; ``count`` documents came before."""
    lengths = np.fromiter(map(len, batch), dtype=np.int64, count=len(batch))
    if not lengths.all() or lengths.max() >= _LONGEST:
        at = int(np.argmin(lengths)) if not lengths.all() else int(np.argmax(lengths))
        raise InputError(f"{named(count + at)}: {lengths[at]} tokens; give each document 1 to {_LONGEST - 1}")
    end = [] if eod is None else [eod]
    if all(type(document) is list for document in batch):
        flat = array("I")  # several times as fast as numpy at taking lists of Python's numbers
        for at, document in enumerate(batch):
            try:
                flat.fromlist(document)
                flat.extend(end)
            except (OverflowError, TypeError) as error:
                raise InputError(f"{named(count + at)}: {error}; give ids as whole numbers from 0 on") from error
        ids: NDArray[Any] = np.frombuffer(flat, dtype=np.uintc)
    else:
        tail = np.array(end, dtype=np.uint32)
        parts = [np.asarray(document) for document in batch]
        ids = np.concatenate([part for each in parts for part in (each, tail)] if end else parts)
    if ids.dtype.kind not in "iu":
        raise InputError(f"{named(count)}: ids of type {ids.dtype}; give whole numbers")
    return ids, np.cumsum(lengths + len(end))


def _require_known(
    ids: NDArray[np.integer], ends: NDArray[np.int64], vocabulary: int, count: int, named: Callable[[int], str]
) -> None:
    """Refuses ids outside the vocabulary; the document that ends at ``ends[0]`` is number ``count``."""
    if ids.min() < 0 or ids.max() >= vocabulary:
        first = int(np.flatnonzero((ids < 0) | (ids >= vocabulary))[0])
        place = named(count + int(np.searchsorted(ends, first, side="right")))
        raise InputError(f"{place}: an id of {ids[first]}; give ids from 0 to {vocabulary - 1}")


def _write_all(file: BinaryIO, ids: NDArray[Any]) -> None:
    """All bytes: an unbuffered file may take fewer at a time."""
    rest = np.ascontiguousarray(ids).data.cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def _write_index(idx_path: Path, lengths: NDArray[np.int32], dtype: np.dtype[Any]) -> None:
    """The index of documents with one sequence each, byte by byte as megatron-core's ``_IndexWriter`` has it."""
    code = _indexed("DType").code_from_dtype(dtype.type)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    with idx_path.open("wb") as file:
        file.write(_HEADER + struct.pack("<QBQQ", 1, code, lengths.size, lengths.size + 1))
        file.write(lengths.astype("<i4", copy=False).tobytes())
        file.write(np.concatenate([[0], ends])[: lengths.size].astype("<i8").tobytes())
        file.write(np.arange(lengths.size + 1, dtype="<i8").tobytes())


@dataclass(frozen=True, eq=False)
class TokenFile:
    """One ``.bin``/``.idx`` pair.

    ``lengths`` and ``offsets`` int64 [documents] in tokens, end-of-document tokens included; ``dtype`` of the ids.
    """

    bin_path: Path
    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]
    dtype: np.dtype[Any]

    @classmethod
    def open(cls, prefix: str | Path) -> Self:
        """Opens ``<prefix>.bin`` and ``<prefix>.idx``.

        Raises:
            InputError: a file is missing, is no Megatron index, or the two do not belong together.
        """
        return cls.open_pair(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))

    @classmethod
    def open_pair(cls, bin_path: Path, idx_path: Path) -> Self:
        """As ``open``, for two files whose names share no prefix."""
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise InputError(f"{path}: no such file; a token file is a pair of .bin and .idx")
        ends, lengths, dtype = _read_index(idx_path)
        sums = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if bin_path.stat().st_size != sums[-1] * dtype.itemsize:
            raise InputError(
                f"{bin_path}: {bin_path.stat().st_size} bytes, {idx_path.name} says {sums[-1] * dtype.itemsize}; "
                f"one of the two is truncated or from another run, so write them again"
            )
        bounds = sums[ends]
        return cls(bin_path, np.diff(bounds), bounds[:-1], dtype)

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return self.lengths.size

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""
        return int(self.lengths.sum())

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """All ids in file order, as a memory map of its own."""
        if self.n_tokens == 0:
            return np.empty(0, dtype=self.dtype)
        return np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    def document(self, i: int) -> NDArray[Any]:
        """A copy of the ids of document ``i``."""
        return np.array(self.tokens[self.offsets[i] : self.offsets[i] + self.lengths[i]])


@dataclass(frozen=True)
class TokenCheck:
    """Distinct ids and the entropy (nats) of single ids in a sample of the data."""

    distinct: int
    entropy: float


def check_tokens(tokens: NDArray[Any], vocabulary: int, place: str) -> TokenCheck:
    """Refuses data that no model should be trained on; looks at a million ids at most, evenly spaced.

    Raises:
        InputError: no ids, ids outside the vocabulary, or (almost) constant data; ``place`` says where.
    """
    flat = tokens.reshape(-1)
    sample = np.asarray(flat[:: max(1, flat.size // _SAMPLE)])
    if sample.size == 0:
        raise InputError(f"{place}: no tokens; select more documents")
    if sample.min() < 0 or sample.max() >= vocabulary:
        raise InputError(
            f"{place}: ids from {sample.min()} to {sample.max()}, the vocabulary has {vocabulary}; use the tokenizer "
            f"that wrote them"
        )
    counts = np.bincount(sample.astype(np.int64))
    share = counts[counts > 0] / sample.size
    entropy = float(-(share * np.log(share)).sum())
    if share.size < _FEWEST_IDS or entropy < _LEAST_ENTROPY:
        raise InputError(
            f"{place}: {share.size} distinct ids with an entropy of {entropy:.2f} nats among {sample.size}; this is "
            f"not text, so write the token files again"
        )
    return TokenCheck(int(share.size), entropy)


def _read_index(idx_path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], np.dtype[Any]]:
    """Copies of document ends and sequence lengths, and the type, as megatron-core's reader sees them."""
    reader_class = _indexed("_IndexReader")  # IndexedDataset would want both files under one prefix
    try:
        index = reader_class(str(idx_path), multimodal=False)
        ends = np.array(index.document_indices, dtype=np.int64)
        lengths = np.array(index.sequence_lengths, dtype=np.int64)
        dtype = np.dtype(index.dtype)
        are_joined = np.array_equal(index.sequence_pointers, (np.cumsum(lengths) - lengths) * dtype.itemsize)
    except (AssertionError, ValueError, OverflowError, OSError, KeyError, struct.error) as error:
        raise InputError(
            f"{idx_path}: not a whole Megatron index ({type(error).__name__}); write the token files again"
        ) from error
    if ends.size == 0 or ends[0] != 0 or ends[-1] != lengths.size or (np.diff(ends) < 0).any():
        raise InputError(f"{idx_path}: its documents do not cover its sequences; write the token files again")
    if not are_joined or (lengths < 0).any():
        raise InputError(f"{idx_path}: its sequences do not lie one after the other; write the token files again")
    if dtype.kind not in "iu":
        raise InputError(f"{idx_path}: holds {dtype}, and ids are whole numbers; write the token files again")
    return ends, lengths, dtype


def _indexed(name: str) -> Any:
    """A class of megatron-core, which warns on import about GPU libraries that token files do not need."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return getattr(indexed_dataset, name)
