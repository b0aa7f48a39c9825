# pyright: reportAttributeAccessIssue=false
# pyarrow makes its compute functions at import; no checker sees them.
"""What σ is fitted from: a small state of the scores that merges in any order, so that no one ever holds the corpus.

A histogram per scorer whose cells are those of the number format itself: all scores that share sign, exponent and 14
bits of mantissa, which is to say that agree to one part in 16,384. Counts are integers and ends are actual scores, so
the state of a corpus is the same however it was cut.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.schema import OTHER_DOMAIN, ScoreTable

_DROPPED_BITS = 9
"""Of the 23 bits of mantissa; the other 14 name the cell."""

_SCHEMA = pa.schema(
    [
        ("scorer", pa.string()),
        ("domain", pa.string()),
        ("cell", pa.int32()),
        ("documents", pa.int64()),
        ("tokens", pa.int64()),
        ("low", pa.float32()),
        ("high", pa.float32()),
    ]
)


@dataclass(frozen=True, eq=False)
class Cells:
    """The occupied cells of one scorer in ascending order of score; all arrays [k].

    ``key`` int32 names the cell; ``documents`` and ``tokens`` int64; ``low`` and ``high`` float32 are the lowest and
    highest score that occurs in it.
    """

    key: NDArray[np.int32]
    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    @classmethod
    def of(cls, scores: NDArray[np.float32], tokens: NDArray[np.int64]) -> Self:
        """The cells of these documents; both [n], finite."""
        ordered = ordered_bits(scores)
        # Key and row in one integer: sorting those is several times faster than an argsort.
        packed = (ordered.astype(np.int64) << 32) | np.arange(scores.size)
        packed.sort()
        ordered, rows = (packed >> 32).astype(np.int32), packed & 0xFFFFFFFF
        key = ordered >> _DROPPED_BITS
        first = _starts(key)
        last = np.append(first[1:], key.size)[: first.size] - 1
        sums = np.add.reduceat(tokens[rows], first) if first.size else np.empty(0, np.int64)
        return cls(key[first], last - first + 1, sums, _scores(ordered[first]), _scores(ordered[last]))

    @classmethod
    def merge(cls, parts: Sequence[Self]) -> Self:
        """The cells of the documents of several."""
        key = np.concatenate([part.key for part in parts])
        order = np.argsort(key, kind="stable")
        first = _starts(key[order])
        if not first.size:
            return parts[0]

        def reduced(ufunc: np.ufunc, name: str) -> NDArray[Any]:
            return ufunc.reduceat(np.concatenate([getattr(part, name) for part in parts])[order], first)

        return cls(
            key[order][first],
            reduced(np.add, "documents"),
            reduced(np.add, "tokens"),
            reduced(np.minimum, "low"),
            reduced(np.maximum, "high"),
        )


@dataclass(frozen=True, eq=False)
class ScoreSketch:
    """The scores of some documents, scorer by scorer, and the size and range of every domain.

    ``cells`` in the order of ``scorers``; ``domains`` sorted, those with documents only, with ``documents`` and
    ``tokens`` [M] int64 and the range of their raw scores, ``low`` and ``high`` [M, N] float32.
    """

    scorers: tuple[str, ...]
    cells: tuple[Cells, ...]
    domains: tuple[str, ...]
    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        scorers: Sequence[str],
        scores: Sequence[NDArray[np.float32]],
        tokens: NDArray[np.int64],
        domains: Sequence[str],
        domain_ids: NDArray[np.int64],
    ) -> Self:
        """The state of these documents.

        ``scores``: one finite float32 [n] for each scorer; ``tokens`` [n] positive; ``domain_ids`` [n] into
        ``domains``, whose names differ.
        """
        m = len(domains)
        documents, token_sums = np.bincount(domain_ids, minlength=m), np.zeros(m, dtype=np.int64)
        np.add.at(token_sums, domain_ids, tokens)
        low = np.full((m, len(scorers)), np.inf, dtype=np.float32)
        high = -low
        cells = []
        for n, column in enumerate(scores):
            values = column + np.float32(0)  # makes -0.0 and 0.0 one value
            np.minimum.at(low[:, n], domain_ids, values)
            np.maximum.at(high[:, n], domain_ids, values)
            cells.append(Cells.of(values, tokens))
        rows = [row for row in np.argsort(np.array(domains, dtype=object)) if documents[row]]
        names = tuple(str(domains[row]) for row in rows)
        return cls(tuple(scorers), tuple(cells), names, documents[rows], token_sums[rows], low[rows], high[rows])

    @classmethod
    def of_table(cls, table: ScoreTable) -> Self:
        """The state of a score table."""
        columns = [np.ascontiguousarray(table.scores[:, n]) for n in range(len(table.scorers))]
        return cls.of(table.scorers, columns, table.tokens, table.domains, table.domain_ids)

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """The state of the documents of several; neither their order nor how documents were cut into them matters.

        Raises:
            InputError: parts of different scorers, or nothing to merge.
        """
        given = list(parts)
        filled = [part for part in given if part.n] or given[:1]
        if not filled:
            raise InputError("score sketch: nothing to merge; give at least one part")
        scorers = filled[0].scorers
        if other := next((part.scorers for part in filled if part.scorers != scorers), None):
            raise InputError(
                f"score sketch: parts of the scorers {', '.join(scorers)} and of {', '.join(other)}; merge parts of "
                f"one corpus, labelled by the same scorers in the same order"
            )
        names = tuple(sorted({name for part in filled for name in part.domains}))
        cells = tuple(Cells.merge([part.cells[n] for part in filled]) for n in range(len(scorers)))
        return cls(scorers, cells, names, *_domain_totals(filled, dict(zip(names, range(len(names)), strict=True))))

    @property
    def n(self) -> int:
        """Number of documents."""
        return int(self.documents.sum())

    def fold_small_domains(self, fewest_tokens: int) -> Self:
        """The state in which domains with fewer tokens than ``fewest_tokens`` are one domain, ``other``."""
        kept = {name for name, tokens in zip(self.domains, self.tokens, strict=True) if tokens >= fewest_tokens}
        if kept.issuperset(self.domains):
            return self
        names = tuple(sorted(kept | {OTHER_DOMAIN}))
        position = {name: names.index(name if name in kept else OTHER_DOMAIN) for name in self.domains}
        return type(self)(self.scorers, self.cells, names, *_domain_totals([self], position))

    def to_table(self) -> pa.Table:
        """The state as one flat Arrow table: a row for each domain and scorer, and one for each cell."""
        parts = []
        for n, scorer in enumerate(self.scorers):
            cells, m, k = self.cells[n], len(self.domains), self.cells[n].key.size
            columns = [
                pa.array([scorer]).take(pa.array(np.zeros(m + k, dtype=np.int32))),
                pa.concat_arrays([pa.array(self.domains, pa.string()), pa.nulls(k, pa.string())]),
                pa.concat_arrays([pa.nulls(m, pa.int32()), pa.array(cells.key)]),
                np.concatenate([self.documents, cells.documents]),
                np.concatenate([self.tokens, cells.tokens]),
                np.concatenate([self.low[:, n], cells.low]),
                np.concatenate([self.high[:, n], cells.high]),
            ]
            parts.append(pa.table(columns, schema=_SCHEMA))
        return pa.concat_tables(parts) if parts else _SCHEMA.empty_table()

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """The inverse of ``to_table``; a table without rows is the state of no documents."""
        scorers = tuple(table["scorer"].unique().to_pylist())
        cells, domains, low, high = [], None, [], []
        for scorer in scorers:
            rows = table.filter(pc.equal(table["scorer"], scorer))
            of_domain = rows["cell"].is_null()
            domains = rows.filter(of_domain)
            low.append(domains["low"].to_numpy())
            high.append(domains["high"].to_numpy())
            of_cells = rows.filter(rows["cell"].is_valid())
            columns = (of_cells[name].to_numpy() for name in ("cell", "documents", "tokens", "low", "high"))
            cells.append(Cells(*columns))
        if domains is None:
            none, empty = np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.float32)
            return cls((), (), (), none, none, empty, empty)
        found = (tuple(domains["domain"].to_pylist()), domains["documents"].to_numpy(), domains["tokens"].to_numpy())
        return cls(scorers, tuple(cells), *found, np.stack(low, axis=1), np.stack(high, axis=1))


def ordered_bits(scores: NDArray[np.float32]) -> NDArray[np.int32]:
    """Integers in the order of these finite scores, one for each float32; there must be no -0.0."""
    bits = np.ascontiguousarray(scores).view(np.int32)
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _scores(ordered: NDArray[np.int32]) -> NDArray[np.float32]:
    return np.where(ordered < 0, ordered ^ np.int32(0x7FFFFFFF), ordered).view(np.float32)


def _starts(key: NDArray[np.int32]) -> NDArray[np.int64]:
    new = np.ones(key.size, dtype=bool)
    new[1:] = key[1:] != key[:-1]
    return np.flatnonzero(new)


def _domain_totals(parts: Sequence[ScoreSketch], position: dict[str, int]) -> tuple[NDArray[Any], ...]:
    """Documents, tokens, lowest and highest scores of all parts by the position of their domains' names."""
    m = max(position.values(), default=-1) + 1
    documents, tokens = np.zeros((2, m), dtype=np.int64)
    low = np.full((m, len(parts[0].scorers)), np.inf, dtype=np.float32)
    high = -low
    for part in parts:
        rows = np.array([position[name] for name in part.domains], dtype=np.int64)
        np.add.at(documents, rows, part.documents)
        np.add.at(tokens, rows, part.tokens)
        np.minimum.at(low, rows, part.low)
        np.maximum.at(high, rows, part.high)
    return documents, tokens, low, high
