"""The labelled corpus of a run as selectors see it: every pass is a Curator pipeline over its shards.

Columns that a selector makes are artifacts in its folder, so an interrupted comparison goes on where it stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch, Task

from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.labelled_corpus import Derive, Fold, Law, MixtureTrainer, texts_of
from quadmix_plugin.models import choose_device
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.label import run_over_documents
from quadmix_plugin.pipelines.mixtures import MixtureProxies
from quadmix_plugin.pipelines.search import ablate
from quadmix_plugin.proxy.validation import read_rows
from quadmix_plugin.schema import COPIES, DOC_ID, DOMAIN, TEXT, TOKENS
from quadmix_plugin.stages import WriteShards
from quadmix_plugin.stages.corpus_passes import ApplyLaw, DeriveBatches, Derived, FoldBatches, ReadColumns
from quadmix_plugin.stages.merge_rank import load_theta
from quadmix_plugin.stages.shards import shard_tasks
from quadmix_plugin.store import Step

_ROWS_PER_STATE = 2_000_000
_STATES_AT_ONCE = 16  # on their way to the driver, where they are merged; also the least parallelism that a pass leaves


@dataclass(frozen=True)
class RunCorpus:
    """The corpus of a run; ``folder`` of ``step`` is where one selector keeps what it makes."""

    run: Run
    step: Step
    folder: str
    derived: list[Derived] = field(default_factory=list)

    @property
    def summary(self) -> DomainSummary:
        """Names of domains and scorers, and the size of every domain."""
        return self.run.summary

    def fold(self, fold: Fold) -> pa.Table:
        """The merged state of one pass over all documents; groups of shards are merged as they come."""
        shards = self.run.label_shards
        per_state = self._shards_per_state(len(shards))
        stages = [self._read(fold.columns), FoldBatches(fold, batch_size=per_state)]
        if TEXT in fold.columns:
            return fold.merge(_states(run_over_documents(self.run, stages, frozenset())))
        held: list[pa.Table] = []
        group = per_state * _STATES_AT_ONCE
        for begin in range(0, len(shards), group):
            tasks = shard_tasks(shards[begin : begin + group])
            results = Pipeline("fold", stages=stages).run(self.run.executor, initial_tasks=tasks) or []
            held = [fold.merge([*held, *_states(results)])]
        return held[0] if held else fold.merge([])

    def add_columns(self, derive: Derive) -> None:
        """Gives the corpus the columns that a pass makes; shards that are there are not made again."""
        made = Derived(self.step, f"{self.folder}/columns/{'-'.join(derive.makes)}", derive.makes)
        shards = self.run.label_shards
        todo = [shard for shard in shards if self.step.entry(f"{made.folder}/{shard}.parquet") is None]
        if todo:
            device = choose_device(self.run.recipe.executor.device) if hasattr(derive, "on_device") else "cpu"
            placed = derive.on_device(device) if hasattr(derive, "on_device") else derive  # type: ignore[attr-defined]
            stage = DeriveBatches(self.step, made.folder, placed)
            stage.resources = Resources(cpus=1.0, gpus=1.0 if device.startswith("cuda") else 0.0)
            stages = [self._read(derive.columns), stage]
            if TEXT in derive.columns:
                run_over_documents(self.run, stages, frozenset(shards) - frozenset(todo))
            else:
                Pipeline("derive", stages=stages).run(self.run.executor, initial_tasks=shard_tasks(todo))
        self.derived.append(made)

    def write(self, law: Law) -> None:
        """Writes the selected documents of every shard as ``<folder>/selection/<shard>.parquet``."""
        folder = f"{self.folder}/selection"
        todo = [s for s in self.run.label_shards if self.step.entry(f"{folder}/{s}.parquet") is None]
        written = [DOC_ID, COPIES, DOMAIN, TOKENS]
        read = [name for name in dict.fromkeys([*written, *law.columns]) if name != COPIES]
        stages = [self._read(read), ApplyLaw(law), WriteShards(step=self.step, folder=folder, columns=written)]
        if not todo:
            return
        if TEXT in read:
            run_over_documents(self.run, stages, frozenset(self.run.label_shards) - frozenset(todo))
        else:
            Pipeline("select", stages=stages).run(self.run.executor, initial_tasks=shard_tasks(todo))

    def target_texts(self, tasks: Sequence[str] | None = None) -> list[str]:
        """Questions with their answers, of the validation rows on which the search measures as well."""
        section = self.run.recipe.validation
        targets: dict[str, list[str]] = {}
        for row in read_rows(self.run.validation_files, section.prompt, section.response, section.task):
            if row.part == "search":
                targets.setdefault(row.task, []).append(f"{row.prompt} {row.response}")
        return texts_of(targets, tasks)

    def theta(self, exclude_scorers: Sequence[str] = ()) -> Parameters:
        """θ* of this run, or of a search by the same proxies without some scorers."""
        if not exclude_scorers and (path := self.run.recipe.select.theta):
            return load_theta(path)
        if not exclude_scorers:
            return Parameters.from_dict(self.run.require("search").read_json("search/theta.json"))
        self.run.require("proxies")
        step = ablate(self.run, exclude_scorers)
        return Parameters.from_dict(step.read_json(f"search/{step.name.removeprefix('search-')}/theta.json"))

    @property
    def train_mixtures(self) -> MixtureTrainer:
        """Trains proxies on mixtures, with the settings of ``proxy``."""
        return MixtureProxies(self.run, self.step, self.folder)

    @property
    def objective(self) -> dict[str, float]:
        """``search.objective``."""
        return dict(self.run.recipe.search.objective)

    def _read(self, columns: Sequence[str]) -> ReadColumns:
        return ReadColumns(self.run.require("normalise"), list(columns), list(self.derived))

    def _shards_per_state(self, shards: int) -> int:
        rows = max(int(self.summary.documents.sum()), 1)
        return max(1, min(_ROWS_PER_STATE * shards // rows, shards // _STATES_AT_ONCE))


def _states(results: Sequence[Task]) -> list[pa.Table]:
    return [each.to_pyarrow() for each in results if isinstance(each, DocumentBatch)]
