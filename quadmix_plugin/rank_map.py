"""Eq. 2 frozen: the rank of every q̄, made of states that merge in any order.

``histogram``: equal bins of q̄ over each domain's range, with their tokens, also those at the lowest and highest q̄.
``exact``: the same, and within the bins that can hold the window r̄ <= ω every distinct q̄ (all of them by default).
``subset``: every distinct q̄ of a subset of documents, the paper's way.

All three end as cells (see ``kernels.cpu``): at the ends of a cell Eq. 2 holds exactly, between them tokens are taken
to lie evenly. A document's rank does not depend on any other pass over the corpus, so documents added later leave old
ranks as they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.arguments import as_floats, require_domain_ids, require_finite, require_one_length
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import tie_hash
from quadmix_plugin.rank_states import (
    CELL_FIELDS,
    Array,
    Grid,
    Hashes,
    Ints,
    RankHistogram,
    RankSample,
    Totals,
    documents,
    facts_of,
    with_facts,
)

Ties = Literal["paper", "mid", "hash"]
Method = Literal["histogram", "exact", "subset"]

_NO_HASHES = np.empty(0, dtype=np.uint64)


def check_ties(ties: str) -> None:
    """Raises InputError unless it is a rule for ties."""
    if ties not in ("paper", "mid", "hash"):
        raise InputError(f"ties={ties!r}; choose 'paper', 'mid' or 'hash'")


@dataclass(frozen=True, eq=False)
class RankMap:
    """The rank r̄ of every q̄, frozen.

    ``domain_ids`` [k] and ``cells`` [k] (``kernels.cpu.BIN``) in ascending order; ``tie`` [k] where documents of equal
    q̄ are cells of their own, in the order of their hash, else empty. ``domains`` names the domain ids, where known.
    """

    method: Method
    ties: Ties
    grid: Grid
    totals: Totals
    domain_ids: Ints
    cells: NDArray[Any]
    tie: Hashes
    domains: tuple[str, ...] = ()

    @classmethod
    def exact(
        cls,
        merged: ArrayLike,
        domain_ids: ArrayLike,
        tokens: ArrayLike,
        ties: Ties = "paper",
        hashes: Hashes | None = None,
    ) -> Self:
        """Every distinct q̄ of these documents, all arrays [n]; ``hashes``: ``tie_hash`` of the ids, for ``hash``."""
        values, ids, weights = documents(merged, domain_ids, tokens)
        totals = Totals.of(ids, weights, int(ids.max()) + 1 if ids.size else 0)
        return cls("exact", ties, *_sorted_cells(values, ids, weights, _tie(ties, hashes, values.size), totals))

    @classmethod
    def of_histogram(cls, histogram: RankHistogram, ties: Ties = "paper") -> Self:
        """From the merged states of a pass over the whole corpus."""
        check_ties(ties)
        domain, at = np.nonzero(histogram.bins["tokens"])
        return cls("histogram", ties, histogram.grid, histogram.totals, domain, histogram.bins[domain, at], _NO_HASHES)

    @classmethod
    def of_sample(cls, sample: RankSample, ties: Ties = "paper") -> Self:
        """From the subset of the whole corpus."""
        hashes = tie_hash(sample.hashes) if ties == "hash" else None
        return replace(cls.exact(sample.merged, sample.domain_ids, sample.tokens, ties, hashes), method="subset")

    @classmethod
    def of_states(cls, states: Iterable[pa.Table], ties: Ties = "paper") -> Self:
        """From the tables that ``FitRank`` gives for the batches of a corpus, in any order.

        Raises:
            InputError: no states, or states of several kinds.
        """
        tables = iter(states)
        first = next(tables, None)
        if first is None:
            raise InputError("rank map: no states; the corpus is empty")
        kind = facts_of(first)[2]["state"]
        rest = (table for each in ([first], tables) for table in each)
        if kind == "histogram":
            return cls.of_histogram(RankHistogram.merge(map(RankHistogram.from_table, rest)), ties)
        if kind == "subset":
            return cls.of_sample(RankSample.merge(map(RankSample.from_table, rest)), ties)
        merged = cls.merge(map(cls.from_table, rest))
        if merged.ties != ties:
            raise InputError(f"rank map: states made with ties {merged.ties!r}; ask for the same, found {ties!r}")
        return merged

    @classmethod
    def merge(cls, maps: Iterable[Self]) -> Self:
        """One exact map of the documents of several exact ones; the order does not matter."""
        parts = list(maps)
        if not parts:
            none = np.empty(0)
            return cls.exact(none, none.astype(np.int64), none.astype(np.int64))
        first = parts[0]
        if any(part.method != "exact" or part.ties != first.ties for part in parts):
            raise InputError("rank map: only exact maps of one rule for ties merge; merge histograms before the map")
        totals = Totals.merge(part.totals for part in parts)
        cells = np.concatenate([part.cells for part in parts])
        ids, tie = (np.concatenate([getattr(part, name) for part in parts]) for name in ("domain_ids", "tie"))
        values, weights = (np.ascontiguousarray(cells[name]) for name in ("lowest", "tokens"))
        return cls("exact", first.ties, *_sorted_cells(values, ids, weights, tie, totals))

    def with_exact_tail(self, tail: Self, last: Ints) -> Self:
        """This map with its cells in bins up to ``last`` [M] replaced by the exact cells of the documents there."""
        kept = self._bins > last[self.domain_ids]
        domain = np.concatenate([tail.domain_ids, self.domain_ids[kept]])
        order = np.argsort(domain, kind="stable")  # within a domain the tail is in order and comes first
        tie = _NO_HASHES
        if tail.tie.size:
            tie = np.concatenate([tail.tie, np.zeros(int(kept.sum()), dtype=np.uint64)])[order]
        cells = np.concatenate([tail.cells, self.cells[kept]])[order]
        return replace(self, method="exact", domain_ids=domain[order], cells=cells, tie=tie)

    def rank(self, merged: ArrayLike, domain_ids: ArrayLike, hashes: Hashes | None = None) -> Array:
        """r̄ of documents: those of this map, or later ones, which get the rank their q̄ would have had here.

        Shapes: all [n]; ``hashes``: ``tie_hash`` of the ids, for ``ties: hash``. Returns float64 [n] in (0, 1].

        Raises:
            InputError: shapes that differ, q̄ not finite, or a domain of which the map has no document (of a subset:
                such documents get rank 1).
        """
        from quadmix_plugin.kernels import cpu

        values = require_finite(as_floats(merged, "merged").astype(np.float64, copy=False), "merged")
        ids = require_domain_ids(domain_ids)
        require_one_length(merged=values, domain_ids=ids)
        tie = _tie(self.ties, hashes, values.size)
        self.require_known(ids)
        ranks = np.empty(values.size)
        wide = self.of_domains(int(ids.max(initial=-1)) + 1)
        cpu.rank(values, ids, tie, wide.arrays, cpu.TIES[self.ties], ranks)
        return ranks

    def require_known(self, ids: Ints) -> None:
        """Raises InputError for a domain of which the map has no document, unless it is of a subset."""
        if self.method == "subset" or (self.totals.documents.all() and ids.max(initial=-1) < self.grid.n_domains):
            return
        absent = np.append(self.totals.documents == 0, True)
        unknown = absent[np.minimum(ids, absent.size - 1)]
        if unknown.any():
            raise InputError(f"domain id {ids[unknown][0]}: the rank map has no document of it; fit it on this corpus")

    def of_domains(self, n_domains: int) -> Self:
        """The map for at least so many domains; the added ones have no documents."""
        more = max(0, n_domains - self.grid.n_domains)
        if not more:
            return self
        low, high = (np.append(ends, np.zeros(more)) for ends in (self.grid.low, self.grid.high))
        totals = Totals(*np.pad(self.totals.as_rows(), ((0, 0), (0, more))))
        return replace(self, grid=replace(self.grid, low=low, high=high), totals=totals)

    def cut(self, omega: ArrayLike) -> Array:
        """The q̄ [M] beyond which no document has r̄ <= ω."""
        inside = self.before / self.totals.tokens[self.domain_ids] <= np.asarray(omega)[self.domain_ids]
        cut = np.full(self.totals.tokens.size, -np.inf)
        np.maximum.at(cut, self.domain_ids[inside], self.cells["highest"][inside])
        return cut

    def expected_error(self, omega: ArrayLike) -> Array:
        """Relative error [M] of each domain's selected tokens at ω that is to be expected (one standard deviation).

        A histogram's: how far tokens within the bin that ω falls in can be from even, for documents of the domain's
        spread of lengths; 0 where that bin's ends hold all its tokens. A subset's: that of a random sample of its size.
        """
        share = np.asarray(omega, dtype=np.float64)
        if share.size > self.grid.n_domains:
            return self.of_domains(share.size).expected_error(share)
        totals = self.totals
        if self.method == "subset":
            k = np.maximum(totals.documents, 1)
            return np.where(totals.documents > 0, np.sqrt(totals.design_effect * share * (1 - share) / k) / share, 1.0)
        error = np.zeros(totals.tokens.size)
        target = (share * totals.tokens)[self.domain_ids]
        inner = self.cells["tokens"] - self.cells["at_lowest"] - self.cells["at_highest"]
        place = target - self.before - self.cells["at_lowest"]
        at = np.flatnonzero((inner > 0) & (place > 0) & (place < inner))
        m, p = self.domain_ids[at], place[at] / inner[at]
        deviation = np.sqrt(totals.design_effect[m] * inner[at] * totals.mean[m] * p * (1 - p))
        error[m] = np.minimum(deviation, inner[at]) / target[at]
        return error

    @cached_property
    def before(self) -> Ints:
        """Tokens of the domain in the cells before each one [k]."""
        tokens = self.cells["tokens"]
        through = np.cumsum(tokens)
        starts = np.searchsorted(self.domain_ids, np.arange(self.totals.tokens.size))
        return through - tokens - np.concatenate([[0], through])[starts][self.domain_ids]

    @cached_property
    def arrays(self) -> Any:
        """What the kernels read."""
        from quadmix_plugin.kernels.cpu import CELL, Cells

        n_bins = self.grid.n_bins
        edges = np.arange(self.grid.n_domains)[:, None] * n_bins + np.arange(n_bins + 1)
        cell = np.empty(self.cells.size, dtype=CELL)
        cell["before"] = self.before
        for name in CELL_FIELDS:
            cell[name] = self.cells[name]
        first = np.searchsorted(self.domain_ids * n_bins + self._bins, edges)
        return Cells(self.grid.low, self.grid.scale, first, cell, self.tie, self.totals.tokens, self.totals.mean)

    @property
    def _bins(self) -> Ints:
        with np.errstate(over="ignore", invalid="ignore"):
            at = (self.cells["lowest"] - self.grid.low[self.domain_ids]) * self.grid.scale[self.domain_ids]
        return np.clip(np.nan_to_num(at), 0, self.grid.n_bins - 1).astype(np.int64)

    def to_table(self) -> pa.Table:
        """The map as an Arrow table, for ``rank_map.parquet``; the inverse is ``from_table``."""
        columns: dict[str, Any] = {"domain_id": self.domain_ids}
        columns |= {name: np.ascontiguousarray(self.cells[name]) for name in CELL_FIELDS}
        if self.tie.size:
            columns["tie"] = self.tie
        names = {"method": self.method, "ties": self.ties, "domains": list(self.domains)}
        return with_facts(pa.table(columns), "map", self.totals, self.grid, **names)

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """From ``to_table``."""
        from quadmix_plugin.kernels.cpu import BIN

        grid, totals, facts = facts_of(table, "map")
        cells = np.empty(table.num_rows, dtype=BIN)
        for name in CELL_FIELDS:
            cells[name] = table[name].to_numpy()
        tie = table["tie"].to_numpy() if "tie" in table.column_names else _NO_HASHES
        ids, domains = table["domain_id"].to_numpy(), tuple(facts["domains"])
        return cls(facts["method"], facts["ties"], grid, totals, ids, cells, tie, domains)


def exact_ranks(
    merged: ArrayLike, domain_ids: ArrayLike, tokens: ArrayLike, ties: Ties, hashes: Hashes | None
) -> Array:
    """Equal to ``RankMap.exact(…).rank(…)`` on the same documents, without the map."""
    from quadmix_plugin.kernels import cpu

    values, ids, weights = documents(merged, domain_ids, tokens)
    tie, ranks = _tie(ties, hashes, values.size), np.empty(values.size)
    if values.size:
        totals = Totals.of(ids, weights, int(ids.max()) + 1)
        grid = Grid.of_values(values, ids, totals.tokens.size, _bins_for(values.size, totals.tokens.size))
        ordered = cpu.order_by_cell(values, ids, tie, grid.low, grid.scale, grid.n_bins)
        cpu.ranks_in_order(*ordered, ids, weights, totals.tokens, cpu.TIES[ties], ranks)
    return ranks


def _tie(ties: str, hashes: Hashes | None, n: int) -> Hashes:
    check_ties(ties)
    if ties != "hash":
        return _NO_HASHES
    if hashes is None:
        raise InputError("ties='hash' needs the hashes of the documents' ids; give tie_hash(hash64(doc_ids, seed))")
    if hashes.shape != (n,):
        raise InputError(f"hashes of doc_ids {hashes.shape} and {n} documents must be of one length")
    return hashes


def _bins_for(n_documents: int, n_domains: int) -> int:
    """Bins of a counting sort: some documents in each, and no more memory than they take."""
    return int(np.clip(n_documents // (4 * max(n_domains, 1)), 1, 1 << 16))


def _sorted_cells(values: Array, ids: Ints, weights: Ints, tie: Hashes, totals: Totals) -> tuple[Any, ...]:
    """A grid, the totals, and domain_ids, cells and tie of the distinct values."""
    from quadmix_plugin.kernels import cpu

    n_domains = totals.documents.size
    if values.size:
        grid = Grid.of_values(values, ids, n_domains, _bins_for(values.size, n_domains))
        ordered = cpu.order_by_cell(values, ids, tie, grid.low, grid.scale, grid.n_bins)
        ids, values, weights, order = cpu.distinct(*ordered, ids, weights)
        tie = order if tie.size else tie
    grid = Grid.of_values(values, ids, n_domains, _bins_for(values.size, n_domains))
    cells = np.empty(values.size, dtype=cpu.BIN)
    cells["lowest"] = cells["highest"] = values
    cells["tokens"] = cells["at_lowest"] = cells["at_highest"] = weights
    return grid, totals, ids, cells, tie
