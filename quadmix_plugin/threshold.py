"""The documents with the smallest keys up to a budget of tokens, found in a few passes over a corpus of any size.

A document's code is its key and then its hash, 128 bits in one order. Every pass adds up the tokens of each of 65,536
intervals of codes, and the next looks into the one in which the budget ends; what is left at last is sorted. All
sums are of integers, so the threshold is the exact one, the same for any partitioning. Groups of documents, such as
domains, may have a budget each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64
from quadmix_plugin.labelled_corpus import LabelledCorpus, domain_ids
from quadmix_plugin.schema import DOC_ID, DOMAIN, TOKENS

Codes = NDArray[np.uint64]

_BITS = 16  # of a code that one pass tells apart
_SORTED_AT_ONCE = 1 << 17  # documents that are few enough to be sorted on the driver
_WHOLE = 1 << 128
_GROUP, _PLACE, _HIGH, _LOW, _ROWS = "group", "place", "high", "low", "rows"


class Key(Protocol):
    """What documents are ordered by; instances are pickled."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``of`` reads."""
        ...

    def of(self, batch: pa.Table) -> NDArray[np.float64]:
        """The key of every document [n], smaller = taken first; a document whose key is NaN is never taken."""
        ...


@dataclass(frozen=True)
class ByHash:
    """Every document has the same key, so the hash alone orders them: a uniform random order."""

    columns: tuple[str, ...] = ()

    def of(self, batch: pa.Table) -> NDArray[np.float64]:
        """Zeros [n]."""
        return np.zeros(batch.num_rows)


@dataclass(frozen=True)
class Coded:
    """Codes and groups of documents under a key: ``domains`` are the groups, or all documents are one.

    ``seed``: of the hash that orders documents of one key.
    """

    key: Key
    seed: int
    domains: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``of`` reads."""
        return (DOC_ID, *([DOMAIN] if self.domains else []), *self.key.columns)

    @property
    def n_groups(self) -> int:
        """How many groups there are."""
        return max(len(self.domains), 1)

    def of(self, batch: pa.Table) -> tuple[NDArray[np.int64], Codes, Codes, NDArray[np.bool_]]:
        """Group, upper and lower half of the code, and whether it may be taken, of every document [n]."""
        keys = np.asarray(self.key.of(batch), dtype=np.float64)
        groups = domain_ids(batch, self.domains) if self.domains else np.zeros(batch.num_rows, dtype=np.int64)
        return groups, ordered_bits(keys), hash64(batch[DOC_ID], self.seed), ~np.isnan(keys)


def ordered_bits(keys: NDArray[np.float64]) -> Codes:
    """Unsigned integers [n] in the order of these floats; -0 counts as 0."""
    bits = (keys + 0.0).view(np.uint64)
    negative = bits >> np.uint64(63) == 1
    return np.where(negative, ~bits, bits | np.uint64(1 << 63))


@dataclass(frozen=True)
class Interval:
    """Codes from ``start`` up to but not with ``start + 2**width``; ``start`` is a multiple of that."""

    start: int
    width: int

    @property
    def end(self) -> int:
        """The first code behind it."""
        return self.start + (1 << self.width)

    @classmethod
    def around(cls, lowest: int, highest: int) -> Self:
        """The smallest such interval that has both."""
        width = (lowest ^ highest).bit_length()
        return cls(lowest >> width << width, width)

    def part(self, place: int) -> Self:
        """One of the 65,536 intervals that it is cut into, or of its single codes where it has fewer."""
        width = max(self.width - _BITS, 0)
        return type(self)(self.start + (place << width), width)


@dataclass(frozen=True)
class _Extent:
    """Fold: the lowest and the highest code of each group, its tokens and its documents."""

    coded: Coded

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.coded.columns, TOKENS)

    def of(self, batch: pa.Table) -> pa.Table:
        groups, high, low, takes = self.coded.of(batch)
        return _extents(groups[takes], high[takes], low[takes], batch[TOKENS].to_numpy()[takes])

    def merge(self, states: Sequence[pa.Table]) -> pa.Table:
        """Two rows a group, its lowest and its highest code; the first has the sums."""
        groups, high, low, tokens, rows = _columns(states, _GROUP, _HIGH, _LOW, TOKENS, _ROWS)
        return _extents(groups, high, low, tokens, rows)


def _extents(
    groups: NDArray[Any], high: Codes, low: Codes, tokens: NDArray[Any], rows: NDArray[Any] | None = None
) -> pa.Table:
    order = np.lexsort((low, high, groups))
    groups, high, low = groups[order], high[order], low[order]
    present, first, counts = np.unique(groups, return_index=True, return_counts=True)
    sums = [np.add.reduceat(each[order], first) if present.size else np.empty(0, np.int64)
            for each in (tokens.astype(np.int64), np.ones(order.size, np.int64) if rows is None else rows)]  # fmt: skip
    ends = np.stack([first, first + counts - 1], axis=1).ravel().astype(np.int64)
    zeros = np.zeros(present.size, dtype=np.int64)
    return pa.table(
        {
            _GROUP: np.repeat(present, 2).astype(np.int64),
            _HIGH: high[ends],
            _LOW: low[ends],
            TOKENS: np.stack([sums[0], zeros], axis=1).ravel(),
            _ROWS: np.stack([sums[1], zeros], axis=1).ravel(),
        }
    )


@dataclass(frozen=True)
class _Places:
    """Fold: tokens and documents of each part of each group's interval."""

    coded: Coded
    intervals: dict[int, Interval]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.coded.columns, TOKENS)

    def of(self, batch: pa.Table) -> pa.Table:
        groups, high, low, takes = self.coded.of(batch)
        tokens, found = batch[TOKENS].to_numpy(), []
        for group, interval in self.intervals.items():
            rows = _inside(groups, high, low, takes, group, interval)
            places = _places(high[rows], low[rows], interval)
            found.append(
                _sums(np.full(rows.size, group), places, tokens[rows].astype(np.int64), np.ones(rows.size, np.int64))
            )
        return pa.concat_tables(found)

    def merge(self, states: Sequence[pa.Table]) -> pa.Table:
        return _sums(*_columns(states, _GROUP, _PLACE, TOKENS, _ROWS))


def _sums(groups: NDArray[Any], places: NDArray[Any], tokens: NDArray[Any], rows: NDArray[Any]) -> pa.Table:
    codes, at = np.unique((groups.astype(np.int64) << _BITS) | places.astype(np.int64), return_inverse=True)
    sums = np.zeros((2, codes.size), dtype=np.int64)
    np.add.at(sums[0], at, tokens)
    np.add.at(sums[1], at, rows)
    columns = {_GROUP: codes >> _BITS, _PLACE: codes & ((1 << _BITS) - 1), TOKENS: sums[0], _ROWS: sums[1]}
    return pa.table(columns)


@dataclass(frozen=True)
class _Candidates:
    """Fold: the codes and tokens of the documents in each group's interval."""

    coded: Coded
    intervals: dict[int, Interval]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.coded.columns, TOKENS)

    def of(self, batch: pa.Table) -> pa.Table:
        groups, high, low, takes = self.coded.of(batch)
        tokens = batch[TOKENS].to_numpy().astype(np.int64)
        rows = np.concatenate(
            [np.empty(0, np.int64), *(_inside(groups, high, low, takes, g, i) for g, i in self.intervals.items())]
        )
        return pa.table({_GROUP: groups[rows], _HIGH: high[rows], _LOW: low[rows], TOKENS: tokens[rows]})

    def merge(self, states: Sequence[pa.Table]) -> pa.Table:
        groups, high, low, tokens = _columns(states, _GROUP, _HIGH, _LOW, TOKENS)
        order = np.lexsort((low, high, groups))
        columns = (groups, high, low, tokens)
        return pa.table({name: each[order] for name, each in zip((_GROUP, _HIGH, _LOW, TOKENS), columns, strict=True)})


def _columns(states: Sequence[pa.Table], *names: str) -> list[NDArray[Any]]:
    kinds = {_HIGH: np.uint64, _LOW: np.uint64}
    return [
        np.concatenate([np.empty(0, kinds.get(name, np.int64)), *(state[name].to_numpy() for state in states)])
        for name in names
    ]


def _halves(code: int) -> tuple[np.uint64, np.uint64]:
    return np.uint64(code >> 64), np.uint64(code & ((1 << 64) - 1))


def _below(high: Codes, low: Codes, code: int) -> NDArray[np.bool_]:
    """Which codes [n] are below this one."""
    if code >= _WHOLE:
        return np.ones(high.size, dtype=bool)
    above, rest = _halves(code)
    return (high < above) | ((high == above) & (low < rest))


def _inside(
    groups: NDArray[np.int64], high: Codes, low: Codes, takes: NDArray[np.bool_], group: int, interval: Interval
) -> NDArray[np.int64]:
    here = takes & (groups == group) & _below(high, low, interval.end) & ~_below(high, low, interval.start)
    return np.flatnonzero(here)


def _places(high: Codes, low: Codes, interval: Interval) -> NDArray[np.int64]:
    """In which part of the interval each of its codes lies [n]."""
    shift = max(interval.width - _BITS, 0)
    if shift >= 64:
        found = high >> np.uint64(shift - 64)
    elif shift == 0:
        found = low
    else:
        found = (low >> np.uint64(shift)) | (high << np.uint64(64 - shift))
    return (found & np.uint64((1 << min(interval.width, _BITS)) - 1)).astype(np.int64)


@dataclass(frozen=True)
class UpTo:
    """The law of a threshold: ``base`` copies of every document of a group, and one more below the group's code.

    ``base`` and ``ends`` are lists [groups]; an end of 2^128 takes all documents of its group, 0 none.
    """

    coded: Coded
    ends: tuple[int, ...]
    base: tuple[int, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``copies`` reads."""
        return self.coded.columns

    def copies(self, batch: pa.Table) -> NDArray[np.int32]:
        """Copies of every document [n]."""
        groups, high, low, takes = self.coded.of(batch)
        copies = np.asarray(self.base, dtype=np.int32)[groups]
        for group, end in enumerate(self.ends):
            copies[(groups == group) & _below(high, low, end)] += 1
        return np.where(takes, copies, 0).astype(np.int32)


def up_to_budget(corpus: LabelledCorpus, key: Key, budget_tokens: int, seed: int) -> UpTo:
    """One copy of each document with the smallest keys, until their tokens are nearest to the budget.

    Raises:
        InputError: fewer tokens can be taken than the budget has.
    """
    coded = Coded(key, seed)
    extent = corpus.fold(_Extent(coded))
    if budget_tokens > (available := sum(extent[TOKENS].to_pylist())):
        raise InputError(
            f"a budget of {budget_tokens:,} tokens, and the documents that may be taken have {available:,}; lower the "
            f"budget"
        )
    return _threshold(corpus, coded, [budget_tokens], extent)


def up_to_budgets(corpus: LabelledCorpus, coded: Coded, budgets: Sequence[int]) -> UpTo:
    """In every group whole copies of all its documents while they fit, then one more of those with the smallest codes.

    ``budgets`` [groups] in tokens; each is met by the nearest number of documents. A group without documents has none.
    """
    return _threshold(corpus, coded, budgets, corpus.fold(_Extent(coded)))


def _threshold(corpus: LabelledCorpus, coded: Coded, budgets: Sequence[int], extent: pa.Table) -> UpTo:
    base, rest, left = [0] * coded.n_groups, [0] * coded.n_groups, {}
    intervals: dict[int, Interval] = {}
    groups, high, low, tokens, rows = (extent[name].to_pylist() for name in extent.column_names)
    for i in range(0, len(groups), 2):
        group = groups[i]
        base[group], rest[group] = divmod(int(budgets[group]), tokens[i])
        if rest[group]:
            intervals[group] = Interval.around(high[i] << 64 | low[i], high[i + 1] << 64 | low[i + 1])
            left[group] = rows[i]
    while sum(left.values()) > _SORTED_AT_ONCE and any(interval.width for interval in intervals.values()):
        wide = {group: interval for group, interval in intervals.items() if interval.width}
        for group, interval, before, inside in _narrowed(corpus.fold(_Places(coded, wide)), wide, rest):
            intervals[group], left[group] = interval, inside
            rest[group] -= before
    ends = [0] * coded.n_groups
    if intervals:
        ends = _cut(corpus.fold(_Candidates(coded, intervals)), intervals, rest, ends)
    return UpTo(coded, tuple(ends), tuple(base))


def _narrowed(
    sums: pa.Table, intervals: dict[int, Interval], rest: Sequence[int]
) -> list[tuple[int, Interval, int, int]]:
    """Of every group the part in which its budget ends, the tokens of its interval before that, and the part's rows."""
    groups, places, tokens, rows = _columns([sums], _GROUP, _PLACE, TOKENS, _ROWS)
    found = []
    for group, interval in intervals.items():
        here = np.flatnonzero(groups == group)
        total = np.cumsum(tokens[here])
        at = min(int(np.searchsorted(total, rest[group])), here.size - 1)
        before = int(total[at] - tokens[here[at]])
        found.append((group, interval.part(int(places[here[at]])), before, int(rows[here[at]])))
    return found


def _cut(candidates: pa.Table, intervals: dict[int, Interval], rest: Sequence[int], ends: list[int]) -> list[int]:
    """The first code of every group that is not taken any more."""
    groups, high, low, tokens = _columns([candidates], _GROUP, _HIGH, _LOW, TOKENS)
    for group, interval in intervals.items():
        here = np.flatnonzero(groups == group)
        total = np.concatenate([[0], np.cumsum(tokens[here])])
        taken = int(np.argmin(np.abs(total - rest[group])))
        ends[group] = interval.end if taken == here.size else int(high[here[taken]]) << 64 | int(low[here[taken]])
    return ends
