# pyright: reportAttributeAccessIssue=false
# pyarrow makes its compute functions at import; no checker sees them.
"""FitNormaliser and NormaliseScores: σ over a corpus of any size, in two streaming passes.

Pass 1 (FitNormaliser) turns batches into states that merge in any order; σ is fitted on their sum. Pass 2
(NormaliseScores) applies it. Both look at every row first: what has no place in a score table is an error that says
which documents, or is dropped by a stated reason.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.schema import DOC_ID, DOMAIN, OTHER_DOMAIN, TOKENS, normalised_column, score_column
from quadmix_plugin.score_sketch import ScoreSketch
from quadmix_plugin.stages.checked_rows import InvalidScores, check_choice, checked_rows
from quadmix_plugin.stages.labelling import with_column


@dataclass
class FitNormaliser(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Pass 1: from batches of labels to their state; merge with ``ScoreSketch.merge``, fit with ``Normaliser.fit``.

    Args:
        scorers: names of the scorers, whose raw columns are ``score_<scorer>``.
        invalid_scores: what to do with a row whose score is missing, NaN or infinite: ``error``, or ``drop``.
        batch_size: so many batches give one state.

    Raises:
        InputError: as ``checked_rows``.
    """

    scorers: list[str]
    invalid_scores: InvalidScores = "error"
    name: str = "fit_normaliser"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        self.scorers = [str(scorer) for scorer in self.scorers]  # Hydra gives a list of its own kind
        check_choice(self.invalid_scores)

    def inputs(self) -> tuple[list[str], list[str]]:
        """``doc_id``, ``domain``, ``tokens`` and the raw score columns."""
        return ["data"], [DOC_ID, DOMAIN, TOKENS, *map(score_column, self.scorers)]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The columns of ``ScoreSketch.to_table``."""
        return ["data"], ["scorer", "domain", "cell", "documents", TOKENS, "low", "high"]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The state of one batch."""
        return self.process_batch([task])[0]

    def process_batch(self, tasks: list[DocumentBatch]) -> list[DocumentBatch]:
        """One state of all these batches; its metadata are the first one's, with the counts of all."""
        states, counts = [], []
        for task in tasks:
            rows = checked_rows(task, self.scorers, self.invalid_scores)
            domain = rows.columns[DOMAIN].dictionary_encode()
            ids = domain.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            tokens = rows.columns[TOKENS].to_numpy()
            states.append(ScoreSketch.of(self.scorers, rows.scores, tokens, domain.dictionary.to_pylist(), ids))
            counts.append(_counted(task, rows.dropped))
        metadata = {**tasks[0]._metadata, "rows_in": sum(each["rows_in"] for each in counts)}
        metadata["dropped"] = _added(each["dropped"] for each in counts)
        state = DocumentBatch(
            dataset_name=tasks[0].dataset_name,
            data=ScoreSketch.merge(states).to_table(),
            _metadata=metadata,
            _stage_perf=list(tasks[0]._stage_perf),
        )
        return [state]


@dataclass
class NormaliseScores(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Pass 2: adds ``normalised_<scorer>`` for every scorer of the normaliser (float32, smaller = better).

    Args:
        normaliser: σ, or the path of a ``normaliser.json``.
        invalid_scores: what to do with a row whose score is missing, NaN or infinite: ``error``, or ``drop`` and count
            it in the batch's metadata.
        domains: names of domains; any other becomes ``other``. None leaves all as they are, and needs no such column.

    Raises:
        InputError: as ``checked_rows``.
    """

    normaliser: Normaliser | str
    invalid_scores: InvalidScores = "error"
    domains: list[str] | None = None
    name: str = "normalise_scores"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.normaliser, Normaliser):
            self.normaliser = Normaliser.load(self.normaliser)
        self.domains = None if self.domains is None else [str(name) for name in self.domains]
        check_choice(self.invalid_scores)

    def inputs(self) -> tuple[list[str], list[str]]:
        """``doc_id``, the raw score columns, and ``domain`` where domains are named."""
        return ["data"], [DOC_ID, *([] if self.domains is None else [DOMAIN]), *map(score_column, _sigma(self).scorers)]

    def outputs(self) -> tuple[list[str], list[str]]:
        """σ of each scorer."""
        return ["data"], [normalised_column(scorer) for scorer in _sigma(self).scorers]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Adds the columns to one batch."""
        rows = checked_rows(task, _sigma(self).scorers, self.invalid_scores, self.inputs()[1])
        data: Any = task.data
        if rows.kept is not None:
            data = data.loc[rows.kept] if isinstance(data, pd.DataFrame) else data.filter(pa.array(rows.kept))
        result = DocumentBatch(
            dataset_name=task.dataset_name,
            data=data,
            _metadata={**task._metadata, **_counted(task, rows.dropped)},
            _stage_perf=list(task._stage_perf),
        )
        if self.domains is not None:
            known = pc.is_in(rows.columns[DOMAIN], value_set=pa.array(self.domains, pa.string()))
            folded = pc.if_else(known, rows.columns[DOMAIN], OTHER_DOMAIN).to_numpy(zero_copy_only=False)
            result = with_column(result, DOMAIN, folded, pa.string())
        for each, raw in zip(_sigma(self).maps, rows.scores, strict=True):
            result = with_column(result, normalised_column(each.scorer), each.apply(raw), pa.float32())
        return result


def _sigma(stage: NormaliseScores) -> Normaliser:
    assert isinstance(stage.normaliser, Normaliser)  # noqa: S101 - set in __post_init__
    return stage.normaliser


def _counted(task: DocumentBatch, dropped: dict[str, int]) -> dict[str, Any]:
    """Rows in and rows dropped by reason, those of earlier stages with them."""
    return {
        "rows_in": task._metadata.get("rows_in", len(task.data)),
        "dropped": _added([task._metadata.get("dropped", {}), dropped]),
    }


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for reason, n in count.items():
            total[reason] = total.get(reason, 0) + n
    return total
