"""Megatron token files: ``.bin`` with the ids of all documents, ``.idx`` with their lengths.

Written by megatron-core's own builder and read through its own reader; nothing here knows a run directory. The
arrays of megatron's readers die with them, so what leaves this module is a copy or a memory map of its own.
"""

import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError, QuadmixError

_SAMPLE = 1 << 20
_FEWEST_IDS = 8
_LEAST_ENTROPY = 0.5  # nats; English text has 6 to 7 by subwords, 3 by bytes


@dataclass(frozen=True)
class Written:
    """What was written: number of documents and of tokens, end-of-document tokens included."""

    documents: int
    tokens: int


def write_documents(
    documents: Iterable[ArrayLike], bin_path: Path, idx_path: Path, vocabulary: int, eod: int | None = None
) -> Written:
    """Writes each array of ids as one document, ``eod`` (if given) after each, and reads the pair back.

    The ids take 2 bytes below a vocabulary of 65,500 and 4 from there on, as in megatron-core.

    Raises:
        InputError: a document without tokens, or an id outside the vocabulary; nothing usable is left then.
        QuadmixError: the files do not read back as written.
    """
    builder_class, dtypes = _indexed("IndexedDatasetBuilder"), _indexed("DType")
    dtype = dtypes.optimal_dtype(vocabulary)
    end = np.array([] if eod is None else [eod], dtype=np.int64)
    builder = builder_class(str(bin_path), dtype=dtype)
    count = tokens = 0
    try:
        for document in documents:
            ids = np.concatenate([np.asarray(document, dtype=np.int64), end])
            if ids.size == 0 or ids.min() < 0 or ids.max() >= vocabulary:
                what = "has no tokens" if ids.size == 0 else f"has ids from {ids.min()} to {ids.max()}"
                raise InputError(f"document {count}: {what}; give ids from 0 to {vocabulary - 1}")
            builder.add_document(ids.astype(dtype), [ids.size])
            count, tokens = count + 1, tokens + ids.size
        builder.finalize(str(idx_path))
    finally:
        builder.data_file.close()
    back = TokenFile.open_pair(bin_path, idx_path)
    if (back.n_documents, back.n_tokens) != (count, tokens):
        raise QuadmixError(
            f"{bin_path}: reads back as {back.n_documents} documents with {back.n_tokens} tokens, not {count} with "
            f"{tokens}; check the disk"
        )
    return Written(count, tokens)


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
    except (AssertionError, ValueError, OSError, KeyError, struct.error) as error:
        raise InputError(
            f"{idx_path}: not a whole Megatron index ({type(error).__name__}); write the token files again"
        ) from error
    if ends.size == 0 or ends[0] != 0 or ends[-1] != lengths.size or (np.diff(ends) < 0).any():
        raise InputError(f"{idx_path}: its documents do not cover its sequences; write the token files again")
    return ends, lengths, dtype


def _indexed(name: str) -> Any:
    """A class of megatron-core, which warns on import about GPU libraries that token files do not need."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return getattr(indexed_dataset, name)
