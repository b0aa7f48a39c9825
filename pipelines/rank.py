"""The rank map of a corpus: passes over it with small mergeable states between them; nothing is shuffled."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from nemo_curator.backends.base import BaseExecutor
from nemo_curator.pipeline import Pipeline
from nemo_curator.pipeline.workflow import WorkflowBase, WorkflowRunResult
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import DocumentBatch, Task
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.rank_map import Method, RankMap, Ties
from quadmix_plugin.rank_states import BINS, RankHistogram
from quadmix_plugin.schema import DOC_ID
from quadmix_plugin.stages import FitRank, FitTail
from quadmix_plugin.stages.merge_rank import load_normaliser, load_theta


@dataclass
class FitRankMap(WorkflowBase):
    """Pass 1 of rank and sample, as a Curator workflow: reads a corpus and makes its ``RankMap``.

    Args:
        read: stages that give batches with the columns that ``FitRank`` reads.
        theta, normaliser, method, ties, summary, bins, documents, per_domain, seed, id_field: as in ``FitRank``.
        tasks_per_pass: so many tasks' states are on their way to the driver at once.
        batches_per_state: so many batches give one state.
    """

    read: list[ProcessingStage]
    theta: Parameters | str
    normaliser: Normaliser | str | None = None
    method: Method = "histogram"
    ties: Ties = "paper"
    summary: DomainSummary | None = None
    bins: int = BINS
    documents: int = 10_000
    per_domain: bool = True
    seed: int = 0
    id_field: str = DOC_ID
    tasks_per_pass: int = 256
    batches_per_state: int = 1

    def __post_init__(self) -> None:
        self.theta = load_theta(self.theta)
        self.normaliser = load_normaliser(self.normaliser)

    def run(self, executor: BaseExecutor | None = None, initial_tasks: list[Task] | None = None) -> WorkflowRunResult:
        """Runs the passes; the map is ``result.get_metadata("rank_map")``."""
        result = WorkflowRunResult("fit_rank_map")
        if self.method == "exact":
            histogram = self.histogram(executor, initial_tasks)
            rank_map = self.exact(histogram, self._theta.omega, executor, initial_tasks)
        else:
            states = self._states(self._fit(self.method), executor, initial_tasks)
            rank_map = RankMap.of_states(states, self.ties)
        result.add_metadata("rank_map", rank_map)
        return result

    def histogram(self, executor: BaseExecutor | None = None, initial_tasks: list[Task] | None = None) -> RankHistogram:
        """The first pass alone."""
        states = self._states(self._fit("histogram"), executor, initial_tasks)
        return RankHistogram.merge(RankHistogram.from_table(state) for state in states)

    def exact(
        self,
        histogram: RankHistogram,
        omega: ArrayLike,
        executor: BaseExecutor | None = None,
        initial_tasks: list[Task] | None = None,
    ) -> RankMap:
        """The second pass for exact ranks: a map that is exact wherever r̄ <= ``omega`` [M]; elsewhere a histogram's."""
        last = histogram.last_bins(omega)
        tail = FitTail(
            theta=self.theta, normaliser=self.normaliser, grid=histogram.grid, last=last, ties=self.ties,
            seed=self.seed, id_field=self.id_field,
        )  # fmt: skip
        tails = RankMap.merge(map(RankMap.from_table, self._states(tail, executor, initial_tasks)))
        return RankMap.of_histogram(histogram, self.ties).with_exact_tail(tails, last)

    def columns(self) -> list[str]:
        """What the passes read."""
        return self._fit(self.method).inputs()[1]

    @property
    def _theta(self) -> Parameters:
        assert isinstance(self.theta, Parameters)  # noqa: S101 - set in __post_init__
        return self.theta

    def _fit(self, method: Method) -> FitRank:
        return FitRank(
            theta=self.theta, normaliser=self.normaliser, method=method, ties=self.ties, summary=self.summary,
            bins=self.bins, documents=self.documents, per_domain=self.per_domain, seed=self.seed,
            id_field=self.id_field, batch_size=self.batches_per_state,
        )  # fmt: skip

    def _states(
        self, stage: ProcessingStage, executor: BaseExecutor | None, initial_tasks: list[Task] | None
    ) -> Iterator[pa.Table]:
        """The states of all batches, a pass of tasks at a time."""
        step = self.tasks_per_pass
        parts: list[list[Task] | None] = [None]
        if initial_tasks is not None:
            parts = [initial_tasks[i : i + step] for i in range(0, len(initial_tasks), step)]
        for part in parts:
            states = Pipeline(stage.name, stages=[*self.read, stage]).run(executor, initial_tasks=part) or []
            yield from (state.to_pyarrow() for state in states if isinstance(state, DocumentBatch))


def widened(omega: NDArray[Any], by: float = 0.05) -> NDArray[Any]:
    """ω a little wider, at most 1: room for a budget's factor to move once ranks are exact."""
    return (omega * (1 + by)).clip(max=1.0)
