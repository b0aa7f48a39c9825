"""The states that rank maps are made of: what one pass over some documents leaves, merged in any order.

All sums are of integers, so a state does not depend on how the documents were cut up. ``rank_map`` makes ranks of them.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.arguments import as_floats, require_domain_ids, require_finite, require_one_length, require_tokens
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import stream_hash
from quadmix_plugin.parameters import Parameters

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

BINS = 2048
CELL_FIELDS = ("tokens", "lowest", "highest", "at_lowest", "at_highest")
_SUBSET = 0x5B5E  # the stream that chooses a subset, so that it says nothing of a document's draw


@dataclass(frozen=True, eq=False)
class Grid:
    """``n_bins`` equal bins of q̄ from ``low`` to ``high`` [M] of every domain; what lies outside is in the end bins."""

    low: Array
    high: Array
    n_bins: int = BINS

    def __post_init__(self) -> None:
        if self.n_bins < 1:
            raise InputError(f"bins={self.n_bins}; give at least 1")

    @classmethod
    def of(cls, theta: Parameters, summary: DomainSummary, n_bins: int = BINS) -> Self:
        """Bins over the range that Eq. 1 can reach in each domain, in the same arithmetic as Eq. 1."""
        if (theta.n_domains, theta.n_scorers) != summary.low.shape:
            raise InputError(
                f"the parameters have {theta.n_domains} domains and {theta.n_scorers} scorers, the summary of the "
                f"corpus {summary.low.shape[0]} and {summary.low.shape[1]}; use parameters of this corpus"
            )
        low, high = np.zeros((2, theta.n_domains))
        for n in range(theta.n_scorers):
            low += theta.alpha[:, n] * np.nan_to_num(summary.low[:, n].astype(np.float64))
            high += theta.alpha[:, n] * np.nan_to_num(summary.high[:, n].astype(np.float64))
        return cls(low, high, n_bins)

    @classmethod
    def of_values(cls, merged: Array, ids: Ints, n_domains: int, n_bins: int = BINS) -> Self:
        """Bins over the range of these documents."""
        from quadmix_plugin.kernels import cpu

        low, high = np.full(n_domains, np.inf), np.full(n_domains, -np.inf)
        cpu.value_range(merged, ids, low, high)
        empty = low > high
        low[empty] = high[empty] = 0.0
        return cls(low, high, n_bins)

    @cached_property
    def scale(self) -> Array:
        """Bins per unit of q̄ [M]; 0 where the range is a single value."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            scale = self.n_bins / (self.high - self.low)
        return np.where(np.isfinite(scale), scale, 0.0)

    @property
    def n_domains(self) -> int:
        """M."""
        return self.low.size

    def same(self, other: "Grid") -> bool:
        """Whether both put every q̄ into the same bin."""
        ends = np.array_equal(self.low, other.low) and np.array_equal(self.high, other.high)
        return ends and self.n_bins == other.n_bins

    def rows_upto(self, last: Ints, merged: Array, ids: Ints) -> Ints:
        """Rows of the documents [n] in bins up to ``last`` [M]."""
        from quadmix_plugin.kernels import cpu

        rows = np.empty(merged.size + 1, dtype=np.int64)
        return rows[: cpu.in_bins_upto(merged, ids, self.low, self.scale, self.n_bins, last, rows)]


@dataclass(frozen=True, eq=False)
class Totals:
    """Per domain [M] int64: ``documents``, ``tokens``, and Σ tokens², for the error of a sample of them.

    ``squares`` + 2^32 · ``large_squares``, since the sum of a corpus of books goes beyond int64.
    """

    documents: Ints
    tokens: Ints
    squares: Ints
    large_squares: Ints

    @classmethod
    def of(cls, ids: Ints, tokens: Ints, n_domains: int) -> Self:
        """The totals of these documents."""
        from quadmix_plugin.kernels import cpu

        sums = np.zeros((4, n_domains), dtype=np.int64)
        cpu.totals(ids, tokens, *sums)
        return cls(*sums)

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """Of the documents of several; shorter ones lack the last domains."""
        listed = list(parts)
        size = max((part.documents.size for part in listed), default=0)
        sums = np.zeros((4, size), dtype=np.int64)
        for part in listed:
            sums[:, : part.documents.size] += part.as_rows()
        return cls(*sums)

    def as_rows(self) -> Ints:
        """[4, M]."""
        return np.stack([self.documents, self.tokens, self.squares, self.large_squares])

    @property
    def mean(self) -> Array:
        """Tokens per document [M]."""
        return self.tokens / np.maximum(self.documents, 1)

    @property
    def design_effect(self) -> Array:
        """By how much unequal lengths raise the variance of a token share, n·Σ tokens² / (Σ tokens)² [M]."""
        squares = self.squares.astype(np.float64) + self.large_squares * 2.0**32
        return self.documents * squares / np.maximum(self.tokens.astype(np.float64), 1) ** 2


@dataclass(frozen=True, eq=False)
class RankHistogram:
    """The state of a pass over some documents: ``bins`` [M, B] (see ``kernels.cpu.BIN``) and the totals."""

    grid: Grid
    totals: Totals
    bins: NDArray[Any]

    @classmethod
    def of(cls, merged: ArrayLike, domain_ids: ArrayLike, tokens: ArrayLike, grid: Grid) -> Self:
        """The state of these documents, all arrays [n]; errors as ``quality_rank``."""
        return cls.of_batches([(merged, domain_ids, tokens)], grid)

    @classmethod
    def of_batches(cls, batches: Iterable[tuple[ArrayLike, ArrayLike, ArrayLike]], grid: Grid) -> Self:
        """The state of several batches of q̄, domain ids and tokens, one after the other."""
        from quadmix_plugin.kernels import cpu

        bins, totals = _empty_bins(grid), []
        for merged, domain_ids, tokens in batches:
            values, ids, weights = documents(merged, domain_ids, tokens, grid.n_domains)
            cpu.fill_bins(values, ids, weights, grid.low, grid.scale, bins)
            totals.append(Totals.of(ids, weights, grid.n_domains))
        return cls(grid, Totals.merge(totals), bins)

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """The state of the documents of several, which must share a grid; the order does not matter.

        Reads ``parts`` one at a time, so an iterator needs the memory of two.
        """
        merged: Self | None = None
        for part in parts:
            if merged is None:
                merged = cls(part.grid, part.totals, part.bins.copy())
                continue
            if not part.grid.same(merged.grid):
                raise InputError("rank histogram: states of different bins; fit them with one θ, one σ and one summary")
            merged = cls(merged.grid, Totals.merge([merged.totals, part.totals]), _merge_bins(merged.bins, part.bins))
        if merged is None:
            raise InputError("rank histogram: nothing to merge; give at least one state")
        return merged

    def last_bins(self, share: ArrayLike) -> Ints:
        """The bin [M] by whose end more than ``share`` [M] of the domain's tokens lie: beyond it r̄ > share."""
        through = np.cumsum(self.bins["tokens"], axis=1) / np.maximum(self.totals.tokens, 1)[:, None]
        reached = through > np.asarray(share)[:, None]
        return np.where(reached.any(axis=1), reached.argmax(axis=1), self.grid.n_bins - 1)

    def to_table(self) -> pa.Table:
        """Its filled bins as rows, the rest in the schema's metadata; the inverse is ``from_table``."""
        domain, at = np.nonzero(self.bins["tokens"])
        columns = {"domain_id": domain, "bin": at}
        columns |= {name: self.bins[name][domain, at] for name in CELL_FIELDS}
        return with_facts(pa.table(columns), "histogram", self.totals, self.grid)

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """From ``to_table``."""
        grid, totals, _ = facts_of(table, "histogram")
        bins = _empty_bins(grid)
        at = (table["domain_id"].to_numpy(), table["bin"].to_numpy())
        for name in CELL_FIELDS:
            bins[name][at] = table[name].to_numpy()
        return cls(grid, totals, bins)


@dataclass(frozen=True, eq=False)
class RankSample:
    """The state of the paper's way: a subset of documents, those with the lowest hashes.

    ``domain_ids``, ``merged``, ``tokens``, ``hashes`` [k]; at most ``limit`` documents, of each domain or in all.
    """

    domain_ids: Ints
    merged: Array
    tokens: Ints
    hashes: Hashes
    limit: int
    per_domain: bool

    @classmethod
    def of(
        cls,
        merged: ArrayLike,
        domain_ids: ArrayLike,
        tokens: ArrayLike,
        hashes: Hashes,
        limit: int = 10_000,
        per_domain: bool = True,
    ) -> Self:
        """The subset of these documents, all arrays [n]; ``hashes``: ``hash64`` of the ids."""
        if limit < 1:
            raise InputError(f"documents={limit} of the subset; give at least 1")
        values, ids, weights = documents(merged, domain_ids, tokens)
        require_one_length(merged=values, doc_ids=hashes)
        return cls(ids, values, weights, hashes, limit, per_domain)._lowest()

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """The subset of the documents of several; the order does not matter."""
        merged: Self | None = None
        for part in parts:
            if merged is not None:
                if (part.limit, part.per_domain) != (merged.limit, merged.per_domain):
                    sizes = [
                        f"{one.limit} {'of each domain' if one.per_domain else 'in all'}" for one in (merged, part)
                    ]
                    raise InputError(f"rank subset: states of {' and of '.join(sizes)}; fit them with one FitRank")
                each = (merged, part)
                part = cls(  # noqa: PLW2901
                    np.concatenate([one.domain_ids for one in each]),
                    np.concatenate([one.merged for one in each]),
                    np.concatenate([one.tokens for one in each]),
                    np.concatenate([one.hashes for one in each]),
                    part.limit,
                    part.per_domain,
                )._lowest()
            merged = part
        if merged is None:
            raise InputError("rank subset: nothing to merge; give at least one state")
        return merged

    def _lowest(self) -> Self:
        order = stream_hash(self.hashes, _SUBSET)
        if self.per_domain:
            by_domain = np.lexsort((order, self.domain_ids))
            first = np.searchsorted(self.domain_ids[by_domain], self.domain_ids[by_domain])
            rows = by_domain[np.arange(order.size) - first < self.limit]
        else:
            rows = np.argsort(order, kind="stable")[: self.limit]
        chosen = (self.domain_ids[rows], self.merged[rows], self.tokens[rows], self.hashes[rows])
        return type(self)(*chosen, self.limit, self.per_domain)

    def to_table(self) -> pa.Table:
        """The documents as rows; the inverse is ``from_table``."""
        columns = {"domain_id": self.domain_ids, "merged": self.merged, "tokens": self.tokens, "hash": self.hashes}
        return with_facts(pa.table(columns), "subset", limit=self.limit, per_domain=self.per_domain)

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """From ``to_table``."""
        _, _, facts = facts_of(table, "subset")
        ids, merged, tokens, hashes = (table[name].to_numpy() for name in ("domain_id", "merged", "tokens", "hash"))
        return cls(ids, merged, tokens, hashes, facts["limit"], facts["per_domain"])


def documents(
    merged: ArrayLike, domain_ids: ArrayLike, tokens: ArrayLike, n_domains: int | None = None
) -> tuple[Array, Ints, Ints]:
    """q̄, domain ids and token counts of documents, checked; errors as ``quality_rank``."""
    values = require_finite(as_floats(merged, "merged").astype(np.float64, copy=False), "merged")
    weights = require_tokens(tokens)
    ids = require_domain_ids(domain_ids, n_domains)
    require_one_length(merged=values, domain_ids=ids, tokens=weights)
    return values, ids, weights


def _merge_bins(bins: NDArray[Any], more: NDArray[Any]) -> NDArray[Any]:
    """Adds ``more`` to ``bins``."""
    for end, at, nearer in (("lowest", "at_lowest", np.less), ("highest", "at_highest", np.greater)):
        same, replace = more[end] == bins[end], nearer(more[end], bins[end])
        bins[at] = np.where(replace, more[at], bins[at] + np.where(same, more[at], 0))
        bins[end] = np.where(replace, more[end], bins[end])
    bins["tokens"] += more["tokens"]
    return bins


def _empty_bins(grid: Grid) -> NDArray[Any]:
    from quadmix_plugin.kernels.cpu import BIN

    bins = np.zeros((grid.n_domains, grid.n_bins), dtype=BIN)
    bins["lowest"], bins["highest"] = np.inf, -np.inf
    return bins


def with_facts(
    table: pa.Table, state: str, totals: Totals | None = None, grid: Grid | None = None, **more: Any
) -> pa.Table:
    """``table`` with what its rows do not say in the schema's metadata."""
    facts: dict[str, Any] = {"state": state, **more}
    if totals is not None:
        facts["totals"] = totals.as_rows().tolist()
    if grid is not None:
        facts |= {"low": grid.low.tolist(), "high": grid.high.tolist(), "n_bins": grid.n_bins}
    return table.replace_schema_metadata({"rank": json.dumps(facts)})


def facts_of(table: pa.Table, state: str | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """Grid, totals and all else that ``with_facts`` added.

    Raises:
        InputError: the table is of something else.
    """
    try:
        facts = json.loads((table.schema.metadata or {})[b"rank"])
    except (KeyError, ValueError) as error:
        raise InputError("rank map: the table does not say of what; give a rank_map.parquet of a run") from error
    if state is not None and facts["state"] != state:
        raise InputError(f"rank map: the table holds a {facts['state']}, not a {state}; give one of the same method")
    grid = totals = None
    if "low" in facts:
        grid = Grid(np.array(facts["low"], dtype=float), np.array(facts["high"], dtype=float), facts["n_bins"])
    if "totals" in facts:
        totals = Totals(*np.array(facts["totals"], dtype=np.int64).reshape(4, -1))
    return grid, totals, facts
