"""FitRank and MergeRank: Eq. 1 and Eq. 2 over a corpus of any size, in two streaming passes.

Pass 1 (FitRank) turns every batch into a small state that merges in any order; the driver merges the states into
one ``RankMap``. Pass 2 (MergeRank) looks every document up in it. Nothing is shuffled, and a document's rank is
the same however the corpus is cut.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.ranking import RankMap, Ties, merge_quality
from quadmix_plugin.schema import DOMAIN, MERGED_QUALITY, OTHER_DOMAIN, QUALITY_RANK, TOKENS, score_column
from quadmix_plugin.stages.labelling import with_column


@dataclass
class FitRank(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Pass 1: from a batch of labels to its rank state; merge with ``RankMap.merge``.

    Args:
        theta: parameters with named domains and scorers, or the path of a ``theta.json``.
        normaliser: σ, or the path of a ``normaliser.json``.
    """

    theta: Parameters | str
    normaliser: Normaliser | str
    name: str = "fit_rank"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        self.theta = load_theta(self.theta)
        self.normaliser = load_normaliser(self.normaliser)
        _check_scorers(self.theta, self.normaliser)

    def inputs(self) -> tuple[list[str], list[str]]:
        """``domain``, ``tokens`` and the raw score columns."""
        return ["data"], [DOMAIN, TOKENS, *map(score_column, _theta(self).scorers)]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The columns of a ``RankMap``."""
        return ["data"], ["domain_id", MERGED_QUALITY, TOKENS]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The rank state of one batch."""
        table = task.to_pyarrow()
        ids = domain_ids(table, _theta(self))
        state = RankMap.fit(_merged(table, ids, _theta(self), self.normaliser), ids, table[TOKENS].to_numpy())
        return DocumentBatch(
            dataset_name=task.dataset_name,
            data=state.to_table(),
            _metadata=task._metadata,
            _stage_perf=list(task._stage_perf),
        )


@dataclass
class MergeRank(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Pass 2, Eq. 1 and 2: adds ``merged_quality`` and ``quality_rank`` (both float64, smaller = better).

    Args:
        theta: parameters with named domains and scorers, or the path of a ``theta.json``.
        normaliser: σ, or the path of a ``normaliser.json``.
        rank_map: the merged states of pass 1 over the whole corpus, or the path of a ``rank_map.parquet``.
        ties: ``paper`` counts a whole tie group, ``mid`` half of it.

    Raises:
        InputError: θ without names, a normaliser of other scorers, or a domain that θ does not know.
    """

    theta: Parameters | str
    normaliser: Normaliser | str
    rank_map: RankMap | str
    ties: Ties = "paper"
    name: str = "merge_rank"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        self.theta = load_theta(self.theta)
        self.normaliser = load_normaliser(self.normaliser)
        if not isinstance(self.rank_map, RankMap):
            self.rank_map = RankMap.from_table(pq.read_table(_existing(self.rank_map)))
        _check_scorers(self.theta, self.normaliser)

    def inputs(self) -> tuple[list[str], list[str]]:
        """``domain`` and the raw score columns."""
        return ["data"], [DOMAIN, *map(score_column, _theta(self).scorers)]

    def outputs(self) -> tuple[list[str], list[str]]:
        """Eq. 1 and Eq. 2."""
        return ["data"], [MERGED_QUALITY, QUALITY_RANK]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Adds the two columns to one batch."""
        table = task.to_pyarrow()
        ids = domain_ids(table, _theta(self))
        merged = _merged(table, ids, _theta(self), self.normaliser)
        assert isinstance(self.rank_map, RankMap)  # noqa: S101 - set in __post_init__
        ranks = self.rank_map.rank(merged, ids, self.ties)
        return with_column(with_column(task, MERGED_QUALITY, merged, pa.float64()), QUALITY_RANK, ranks, pa.float64())


def load_theta(theta: Parameters | str | Path) -> Parameters:
    """θ itself, or read from a ``theta.json``; refuses θ whose domains and scorers have no names."""
    loaded = theta if isinstance(theta, Parameters) else Parameters.load(theta)
    if not loaded.domains or not loaded.scorers:
        raise InputError("theta: domains and scorers have no names; a stage matches columns by name, so set them")
    return loaded


def load_normaliser(normaliser: Normaliser | str | Path) -> Normaliser:
    """σ itself, or read from a ``normaliser.json``."""
    if isinstance(normaliser, Normaliser):
        return normaliser
    path = _existing(normaliser)
    try:
        return Normaliser.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a normaliser ({error}); give the normaliser.json of a run") from error


def domain_ids(table: pa.Table, theta: Parameters) -> NDArray[np.int64]:
    """The position in θ of each row's domain; domains that θ does not name count as its domain ``other``.

    Raises:
        InputError: a domain that θ does not name, when it has no domain ``other``.
    """
    position = {name: m for m, name in enumerate(theta.domains)}
    names = table[DOMAIN].to_pylist()
    fallback = position.get(OTHER_DOMAIN)
    unknown = sorted({str(name) for name in names if name not in position})
    if unknown and fallback is None:
        raise InputError(
            f"domain: {', '.join(unknown[:5])} not among the domains of the parameters ({', '.join(theta.domains)}); "
            f"search parameters on a corpus that has them, or relabel"
        )
    return np.array([position.get(name, fallback) for name in names], dtype=np.int64)


def _theta(stage: FitRank | MergeRank) -> Parameters:
    assert isinstance(stage.theta, Parameters)  # noqa: S101 - set in __post_init__
    return stage.theta


def _merged(
    table: pa.Table, ids: NDArray[np.int64], theta: Parameters, normaliser: Normaliser | str
) -> NDArray[np.float64]:
    assert isinstance(normaliser, Normaliser)  # noqa: S101 - set in __post_init__
    raw = np.stack([table[score_column(s)].to_numpy().astype(np.float32) for s in theta.scorers], axis=1)
    return merge_quality(normaliser.apply(raw), ids, theta)


def _check_scorers(theta: Parameters, normaliser: Normaliser) -> None:
    if theta.scorers != normaliser.scorers:
        raise InputError(
            f"theta has the scorers {', '.join(theta.scorers)}, the normaliser {', '.join(normaliser.scorers)}; "
            f"use the two files of one run"
        )


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give an artifact of a run directory")
    return Path(path)
