"""FitRank and MergeRank: Eq. 1 and Eq. 2 over a corpus of any size, in streaming passes.

Pass 1 (FitRank) turns batches into small states that merge in any order; ``RankMap.of_states`` makes one map of them.
Pass 2 (MergeRank) looks every document up in it. Nothing is shuffled, and a document's rank is the same however the
corpus is cut. For exact ranks there is a pass between (FitTail), over the documents that can be in the window.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch
from numpy.typing import NDArray

from quadmix_plugin.arguments import require_tokens
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64, tie_hash
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.parquet import read_parquet
from quadmix_plugin.rank_map import Method, RankMap, Ties, check_ties
from quadmix_plugin.rank_states import BINS, Grid, RankHistogram, RankSample
from quadmix_plugin.ranking import merge_quality
from quadmix_plugin.schema import DOC_ID, DOMAIN, MERGED_QUALITY, QUALITY_RANK, TOKENS
from quadmix_plugin.stages.labelling import with_column
from quadmix_plugin.stages.score_columns import arrow, domain_ids, read_normalised, read_numbers, score_columns


@dataclass
class _Scored(ProcessingStage[DocumentBatch, DocumentBatch]):
    """What the stages share: θ and σ, given as objects or files, and Eq. 1 on a batch."""

    theta: Parameters | str
    normaliser: Normaliser | str | None = None

    def __post_init__(self) -> None:
        self.theta = load_theta(self.theta)
        self.normaliser = load_normaliser(self.normaliser)
        if self.normaliser is not None and self.theta.scorers != self.normaliser.scorers:
            raise InputError(
                f"theta has the scorers {', '.join(self.theta.scorers)}, the normaliser "
                f"{', '.join(self.normaliser.scorers)}; use the two files of one run"
            )

    def _merge(self, table: pa.Table) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """q̄ and the domain of each row."""
        assert isinstance(self.theta, Parameters)  # noqa: S101 - set in __post_init__
        assert not isinstance(self.normaliser, str)  # noqa: S101 - likewise
        ids = domain_ids(table, self.theta)
        return merge_quality(read_normalised(table, self.theta, self.normaliser), ids, self.theta), ids

    def _score_columns(self) -> list[str]:
        return score_columns(self.theta, self.normaliser)  # type: ignore[arg-type]


@dataclass
class FitRank(_Scored):
    """Pass 1: from batches to their rank state; make the map with ``RankMap.of_states``.

    Args:
        theta: parameters with named domains and scorers, or the path of a ``theta.json``.
        normaliser: σ, or the path of a ``normaliser.json``; None reads the columns ``normalised_<scorer>``.
        method: ``histogram`` (small states), ``exact`` (a state per distinct q̄), or ``subset`` (the paper's).
        ties: ``paper`` counts a whole tie group, ``mid`` half of it, ``hash`` orders it by the document hash.
        summary: range of σ in each domain, by which bins are placed; None takes the range of σ itself.
        bins: bins of each domain, for ``histogram``.
        documents, per_domain: size of the subset, of each domain or in all.
        seed, id_field: of the hash that breaks ties and chooses the subset.
        batch_size: so many batches give one state.
    """

    method: Method = "histogram"
    ties: Ties = "paper"
    summary: DomainSummary | None = None
    bins: int = BINS
    documents: int = 10_000
    per_domain: bool = True
    seed: int = 0
    id_field: str = DOC_ID
    name: str = "fit_rank"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ties(self.ties)
        if self.method not in ("histogram", "exact", "subset"):
            raise InputError(f"method={self.method!r}; choose 'histogram', 'exact' or 'subset'")
        self._grid: Grid | None = None
        if self.method == "histogram":
            self._grid = self._make_grid()

    def inputs(self) -> tuple[list[str], list[str]]:
        """``domain``, ``tokens`` and the scores; the id where a hash is needed."""
        ids = [self.id_field] if self._hashed else []
        return ["data"], [*ids, DOMAIN, TOKENS, *self._score_columns()]

    def outputs(self) -> tuple[list[str], list[str]]:
        """A state as a table."""
        return ["data"], ["domain_id", TOKENS]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The rank state of one batch."""
        return self.process_batch([task])[0]

    def process_batch(self, tasks: list[DocumentBatch]) -> list[DocumentBatch]:
        """One state of all these batches."""
        tables = map(arrow, tasks)
        merged: RankHistogram | RankMap | RankSample
        if self._grid is not None:
            merged = RankHistogram.of_batches(map(self._columns, tables), self._grid)
        else:
            states = list(map(self._state, tables))
            merged = states[0] if len(states) == 1 else type(states[0]).merge(states)  # type: ignore[arg-type]
        state = DocumentBatch(
            dataset_name=tasks[0].dataset_name,
            data=merged.to_table(),
            _metadata=tasks[0]._metadata,
            _stage_perf=list(tasks[0]._stage_perf),
        )
        return [state]

    @property
    def _hashed(self) -> bool:
        return self.method == "subset" or (self.ties == "hash" and self.method == "exact")

    def _columns(self, table: pa.Table) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        merged, ids = self._merge(table)
        return merged, ids, require_tokens(read_numbers(table, TOKENS, "integers"))

    def _state(self, table: pa.Table) -> RankMap | RankSample:
        merged, ids, tokens = self._columns(table)
        hashes = hash64(table[self.id_field], self.seed) if self._hashed else None
        if self.method == "subset" and hashes is not None:
            return RankSample.of(merged, ids, tokens, hashes, self.documents, self.per_domain)
        return RankMap.exact(merged, ids, tokens, self.ties, None if hashes is None else tie_hash(hashes))

    def _make_grid(self) -> Grid:
        assert isinstance(self.theta, Parameters)  # noqa: S101 - set in __post_init__
        summary = self.summary
        if summary is None:
            if not isinstance(self.normaliser, Normaliser):
                raise InputError(
                    "FitRank: without a normaliser the histogram needs summary=, the range of every normalised score; "
                    "give DomainSummary.from_dict of a run's normalise/domains.json"
                )
            summary = DomainSummary.of_range(self.normaliser, self.theta.domains)
        return Grid.of(self.theta, summary.in_order(self.theta.domains, self.theta.scorers), self.bins)


@dataclass
class FitTail(_Scored):
    """The pass between, for exact ranks: from a batch to the exact cells of its documents in bins up to ``last``.

    Args:
        theta, normaliser: as in ``FitRank``.
        grid: bins of the merged histogram; ``last`` [M]: its ``last_bins`` for the widest window.
        ties, seed, id_field: as in ``FitRank``.
    """

    grid: Grid | None = None
    last: NDArray[np.int64] | None = None
    ties: Ties = "paper"
    seed: int = 0
    id_field: str = DOC_ID
    name: str = "fit_tail"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid is None or self.last is None:
            raise InputError("FitTail: give grid and last of the merged histogram")

    def inputs(self) -> tuple[list[str], list[str]]:
        """``domain``, ``tokens`` and the scores; the id where ties are broken by hash."""
        ids = [self.id_field] if self.ties == "hash" else []
        return ["data"], [*ids, DOMAIN, TOKENS, *self._score_columns()]

    def outputs(self) -> tuple[list[str], list[str]]:
        """A state as a table."""
        return ["data"], ["domain_id", TOKENS]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The exact cells of one batch."""
        assert self.grid is not None  # noqa: S101 - checked in __post_init__
        assert self.last is not None  # noqa: S101 - likewise
        table = arrow(task)
        merged, ids = self._merge(table)
        rows = self.grid.rows_upto(self.last, merged, ids)
        tokens = require_tokens(read_numbers(table, TOKENS, "integers"))
        hashes = tie_hash(hash64(table[self.id_field], self.seed))[rows] if self.ties == "hash" else None
        return DocumentBatch(
            dataset_name=task.dataset_name,
            data=RankMap.exact(merged[rows], ids[rows], tokens[rows], self.ties, hashes).to_table(),
            _metadata=task._metadata,
            _stage_perf=list(task._stage_perf),
        )


@dataclass
class MergeRank(_Scored):
    """Pass 2, Eq. 1 and 2: adds ``merged_quality`` and ``quality_rank`` (both float64, smaller = better).

    Args:
        theta: parameters with named domains and scorers, or the path of a ``theta.json``.
        normaliser: σ, or the path of a ``normaliser.json``; None reads the columns ``normalised_<scorer>``.
        rank_map: the map of the whole corpus, or the path of a ``rank_map.parquet``; it also says how ties count.
        seed, id_field: of the hash that breaks ties, where the map's ties are by hash.

    Raises:
        InputError: θ without names, a normaliser of other scorers, or a map of other domains.
    """

    rank_map: RankMap | str | None = None
    seed: int = 0
    id_field: str = DOC_ID
    name: str = "merge_rank"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_map is None:
            raise InputError("MergeRank: give rank_map, of RankMap.of_states or a run's selection/rank_map.parquet")
        if not isinstance(self.rank_map, RankMap):
            self.rank_map = RankMap.from_table(read_parquet(_existing(self.rank_map)))
        assert isinstance(self.theta, Parameters)  # noqa: S101 - set above
        if self.rank_map.domains and self.rank_map.domains != self.theta.domains:
            raise InputError(
                f"rank_map is of the domains {', '.join(self.rank_map.domains)}, theta of "
                f"{', '.join(self.theta.domains)}; use the two files of one run"
            )

    def inputs(self) -> tuple[list[str], list[str]]:
        """``domain`` and the scores; the id where ties are broken by hash."""
        return ["data"], [*([self.id_field] if self._map.ties == "hash" else []), DOMAIN, *self._score_columns()]

    def outputs(self) -> tuple[list[str], list[str]]:
        """Eq. 1 and Eq. 2."""
        return ["data"], [MERGED_QUALITY, QUALITY_RANK]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Adds the two columns to one batch."""
        table = arrow(task)
        merged, ids = self._merge(table)
        hashes = tie_hash(hash64(table[self.id_field], self.seed)) if self._map.ties == "hash" else None
        ranks = self._map.rank(merged, ids, hashes)
        return with_column(with_column(task, MERGED_QUALITY, merged, pa.float64()), QUALITY_RANK, ranks, pa.float64())

    @property
    def _map(self) -> RankMap:
        assert isinstance(self.rank_map, RankMap)  # noqa: S101 - set in __post_init__
        return self.rank_map


def load_theta(theta: Parameters | str | Path) -> Parameters:
    """θ itself, or read from a ``theta.json``; refuses θ whose domains and scorers have no names."""
    loaded = theta if isinstance(theta, Parameters) else Parameters.load(theta)
    if not loaded.domains or not loaded.scorers:
        raise InputError("theta: domains and scorers have no names; a stage matches columns by name, so set them")
    return loaded


def load_normaliser(normaliser: Normaliser | str | Path | None) -> Normaliser | None:
    """σ itself, or read from a ``normaliser.json``."""
    return normaliser if normaliser is None or isinstance(normaliser, Normaliser) else Normaliser.load(normaliser)


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give an artifact of a run directory")
    return Path(path)
