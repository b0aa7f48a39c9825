"""Which documents a proxy trains on: copies of every document of the pool under one θ, or of a baseline.

The table is what selections are computed from, one row per document of the corpus. Thinning and matching of epochs
leave documents out by hash, so that a proxy's data is a sample of what its θ selects, not the beginning of it.
Baselines are selections without θ, made elsewhere; here they are kept as a table and treated as those of θ are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import uniform
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.parquet import read_parquet
from quadmix_plugin.rank_map import Method, Ties
from quadmix_plugin.rank_states import BINS
from quadmix_plugin.sampling import count_copies, draw_copies
from quadmix_plugin.schema import COPIES, DOC_ID, TOKENS, ScoreTable
from quadmix_plugin.score_index import ScoreIndex
from quadmix_plugin.selections import ROW

SELECTION = "selection"
"""The column that names a baseline."""

_WORTH_AN_INDEX = 200_000  # documents; below, one pass over all of them takes milliseconds


@dataclass(frozen=True)
class Draws:
    """How a proxy's documents are chosen from the table.

    ``method``, ``ties``, ``bins``, ``subset_documents``, ``subset_per_domain``: how r̄ is computed; ``seed``: of the
    draw; ``independent``: θ do not share their uniforms; ``thin``: factor on every S; ``below``: the pool has the
    documents whose u is below it.
    """

    method: Method = "histogram"
    ties: Ties = "paper"
    bins: int = BINS
    subset_documents: int = 10_000
    subset_per_domain: bool = True
    seed: int = 0
    independent: bool = False
    thin: float = 1.0
    below: float = 1.0


@dataclass(frozen=True)
class MatchedEpochs:
    """The repetition of the final run, for proxies to be trained at.

    ``proxy_tokens`` and ``final_tokens`` of training; ``selected_tokens`` of the final selection, None where θ alone
    says how many; ``seed`` of the documents left out.
    """

    proxy_tokens: int
    final_tokens: int
    selected_tokens: int | None
    seed: int

    def share(self, selected: int) -> float:
        """Which part of its ``selected`` tokens a proxy keeps to see them as often as the final run does; at most 1."""
        if selected < 1:
            return 1.0
        final_selection = selected if self.selected_tokens is None else self.selected_tokens
        return min(1.0, self.proxy_tokens * final_selection / (self.final_tokens * selected))


@dataclass(frozen=True, eq=False)
class ProxyTable:
    """What a proxy's selection is computed from; rows in the order of the pool's documents.

    ``doc_ids`` [n] Arrow; ``domain_ids`` and ``tokens`` int64 [n]; ``normalised`` float32 [n, N].
    """

    doc_ids: pa.Array
    domain_ids: NDArray[np.int64]
    tokens: NDArray[np.int64]
    normalised: NDArray[np.float32]
    domains: tuple[str, ...]
    scorers: tuple[str, ...]

    @classmethod
    def of(cls, table: ScoreTable, normalised: NDArray[np.float32]) -> Self:
        """From the score table of a corpus and σ of its scores."""
        return cls(table.doc_ids, table.domain_ids, table.tokens, normalised, table.domains, table.scorers)

    def to_arrow(self) -> pa.Table:
        """One column each, names in the schema's metadata; write it as ``proxies/table.parquet``."""
        columns = {DOC_ID: self.doc_ids, "domain_id": pa.array(self.domain_ids), TOKENS: pa.array(self.tokens)}
        columns |= {f"normalised_{s}": pa.array(self.normalised[:, n]) for n, s in enumerate(self.scorers)}
        names = {"domains": json.dumps(self.domains), "scorers": json.dumps(self.scorers)}
        return pa.table(columns).replace_schema_metadata(names)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The inverse of ``to_arrow``, from a Parquet file.

        Raises:
            InputError: no such file.
        """
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; run the step 'proxies' from its beginning")
        table = read_parquet(path).combine_chunks()
        metadata = table.schema.metadata
        domains, scorers = (tuple(json.loads(metadata[key])) for key in (b"domains", b"scorers"))
        normalised = np.stack([table[f"normalised_{s}"].to_numpy() for s in scorers], axis=1)
        ids = pa.concat_arrays(table[DOC_ID].chunks) if table[DOC_ID].num_chunks != 1 else table[DOC_ID].chunk(0)
        return cls(ids, table["domain_id"].to_numpy(), table[TOKENS].to_numpy(), normalised, domains, scorers)


class ProxySelection:
    """The copies of every document under any θ; prepared once for many of them.

    Args:
        table: the corpus.
        draws: how documents are drawn.
        matched: the repetition that proxies are trained at; None: whatever their tokens give.
    """

    def __init__(self, table: ProxyTable, draws: Draws, matched: MatchedEpochs | None = None):
        self.table, self._draws, self._matched = table, draws, matched
        self._keep = None if matched is None else uniform(table.doc_ids, matched.seed)
        self._index = None
        if draws.method != "subset" and table.tokens.size >= _WORTH_AN_INDEX:
            self._index = ScoreIndex.of(
                table.normalised, table.domain_ids, table.tokens, table.doc_ids, draws.seed, draws.bins,
                len(table.domains),
            )  # fmt: skip

    @property
    def in_pool(self) -> NDArray[np.bool_]:
        """Which documents of the table the pool has [n]."""
        return uniform(self.table.doc_ids, self._draws.seed) < self._draws.below

    def parameters(self, vector: list[float]) -> Parameters:
        """θ from its vector.

        Raises:
            InputError: θ of another number of scorers or domains.
        """
        domains, scorers = self.table.domains, self.table.scorers
        return Parameters.from_vector(vector, len(scorers), domains, scorers)

    def copies(self, theta: Parameters, stream: int = 0) -> NDArray[np.int32]:
        """Copies of every document [n]; ``stream`` tells proxies apart where draws are independent."""
        return self._repeated(self._drawn(theta, stream if self._draws.independent else 0))

    def of_domains(self, expected: list[float]) -> NDArray[np.int32]:
        """Copies of every document [n] of which so many are expected in its domain [M]."""
        value = np.asarray(expected, dtype=np.float64)[self.table.domain_ids]
        return draw_copies(value, self.table.doc_ids, self._draws.seed)

    def of_baseline(self, copies: NDArray[np.int32]) -> NDArray[np.int32]:
        """What a proxy trains on of a baseline's ``copies`` [n], as if they were the S of a θ.

        Under a thinned pool each is kept with the probability that θ's are, by the same uniforms, so all lie in the
        pool; at matched epochs the same documents are left out. Otherwise they are the copies given.
        """
        thinned = draw_copies(copies * self._draws.thin, self.table.doc_ids, self._draws.seed)
        return self._repeated(np.where(self.in_pool, thinned, 0).astype(np.int32))

    def _repeated(self, chosen: NDArray[np.int32]) -> NDArray[np.int32]:
        """What is left of copies [n] at the repetition that proxies are trained at."""
        if self._matched is None or self._keep is None:
            return chosen
        share = self._matched.share(int((chosen * self.table.tokens).sum()))
        return np.where(self._keep < share, chosen, 0).astype(np.int32)

    def _drawn(self, theta: Parameters, stream: int) -> NDArray[np.int32]:
        draws, table = self._draws, self.table
        if self._index is not None:
            chosen = self._index.select(theta, draws.method, draws.ties, draws.thin, stream)  # type: ignore[arg-type]
            return chosen.by_row(table.tokens.size)
        return count_copies(
            table.normalised,
            table.domain_ids,
            table.tokens,
            table.doc_ids,
            theta,
            draws.seed,
            draws.method,
            draws.ties,
            draws.bins,
            subset_documents=draws.subset_documents,
            subset_per_domain=draws.subset_per_domain,
            thin=draws.thin,
            stream=stream,
        )


def baselines_table(baselines: Mapping[str, NDArray[np.int32]]) -> pa.Table:
    """Baselines, name → copies [n], as one row for each selected document: ``selection``, ``row`` and ``copies``.

    ``row`` is the document's place in the proxy table.
    """
    schema = pa.schema([(SELECTION, pa.string()), (ROW, pa.int64()), (COPIES, pa.int32())])
    parts = [schema.empty_table()]
    for name, copies in baselines.items():
        rows = np.flatnonzero(copies)
        parts.append(pa.table({SELECTION: [name] * rows.size, ROW: rows, COPIES: copies[rows]}, schema=schema))
    return pa.concat_tables(parts)


def read_baseline(path: str | Path, name: str, n: int) -> NDArray[np.int32]:
    """The copies of all ``n`` documents in one baseline of a ``baselines_table`` kept as Parquet [n].

    Raises:
        InputError: no such file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; run the step 'proxies' from its beginning")
    table = read_parquet(path, filters=[(SELECTION, "=", name)])
    copies = np.zeros(n, dtype=np.int32)
    copies[table[ROW].to_numpy()] = table[COPIES].to_numpy()
    return copies
