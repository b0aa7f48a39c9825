"""The token pool: every document tokenised once into Megatron token files, read by memory map.

The data of a proxy is a number of copies of each document; ``pieces`` cuts training data from them. The pool knows
neither θ nor models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.megatron import TokenFile


@dataclass(frozen=True, eq=False)
class TokenPool:
    """The documents of many token files, in the order of the files.

    ``lengths`` int64 [documents], end-of-document tokens included.
    """

    files: tuple[TokenFile, ...]
    lengths: NDArray[np.int64]

    @classmethod
    def open(cls, prefixes: Sequence[str | Path]) -> Self:
        """Opens ``<prefix>.bin`` and ``<prefix>.idx`` of each prefix.

        Raises:
            InputError: no prefixes, as ``TokenFile.open``, or files with ids of different types.
        """
        if not prefixes:
            raise InputError("pool: no token files; export the tokens first")
        files = tuple(TokenFile.open(prefix) for prefix in prefixes)
        if len({file.dtype for file in files}) > 1:
            raise InputError(f"pool: {files[0].bin_path} and others differ in the type of ids; use one tokenizer")
        return cls(files, np.concatenate([file.lengths for file in files]))

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return self.lengths.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the ids."""
        return self.files[0].dtype

    @property
    def n_bytes(self) -> int:
        """Size of all ids."""
        return int(self.lengths.sum()) * self.dtype.itemsize

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each document begins if the files lay one after the other [documents]."""
        before = np.cumsum([0, *(file.tokens.size for file in self.files)])
        return np.concatenate([file.offsets + start for file, start in zip(self.files, before, strict=False)])

    @cached_property
    def _first_documents(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(file.n_documents for file in self.files)])

    def document(self, i: int) -> NDArray[Any]:
        """A copy of the ids of document ``i``."""
        return self.gather(np.array([i]), np.zeros(1, dtype=np.int64), self.lengths[[i]])

    def gather(
        self, documents: NDArray[np.int64], begin: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[Any]:
        """The ids of spans, one after the other: ``lengths[i]`` ids of ``documents[i]`` from ``begin[i]`` on."""
        out = np.empty(int(lengths.sum()), dtype=self.dtype)
        places = np.cumsum(lengths) - lengths
        first = self._first_documents
        owner = np.searchsorted(first, documents, side="right") - 1
        for f in np.unique(owner):
            of_file = owner == f
            source = self.files[f].offsets[documents[of_file] - first[f]] + begin[of_file]
            length = lengths[of_file]
            out[spans(places[of_file], length)] = self.files[f].tokens[spans(source, length)]
        return out


def spans(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0] + 1, … (lengths[0] numbers), then those of starts[1], and so on."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)
