"""PretrainSelections: one row of work trains a model on one selection's token files with one seed.

The validation rows are those on which nothing was searched. A model that is there is not trained again; one that was
begun goes on from its last checkpoint where its trainer keeps any.
"""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin import registry
from quadmix_plugin.pretraining.job import PretrainJob
from quadmix_plugin.pretraining.pieces import train_on_pieces
from quadmix_plugin.proxy.parts import flat_row
from quadmix_plugin.stages.train_proxies import trainer_resources
from quadmix_plugin.store import Step

_OF_A_ROW = (
    "selector", "seed", "prefixes", "documents", "selected_tokens", "unique_tokens", "part", "model", "folder",
)  # fmt: skip
_LISTS = ("prefixes", "documents")


@dataclass
class PretrainSelections(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Trains on the token files of each row and writes its model and results.

    A row has the fields of ``PretrainJob`` that differ from job to job: ``selector``, ``seed``, ``prefixes``,
    ``documents``, ``selected_tokens``, ``unique_tokens``, ``part``, ``model`` and ``folder``.

    Args:
        step: where the results are entered.
        validation: path of a Parquet file of ``tokenise_rows``; the rows of the part ``report`` are used.
        validation_tokens: prefix of the token files that trainers with a validation loss of their own take it on.
        tokens: training tokens of each model.
        vocabulary: number of ids.
        eod: id of the end-of-document token.
        tokenizer: folder of the tokenizer.
        trainer: a name of the group ``trainers``, with ``options``.
    """

    step: Step
    validation: str
    validation_tokens: str
    tokens: int
    vocabulary: int
    eod: int
    tokenizer: str
    trainer: str = "megatron"
    options: dict[str, Any] = field(default_factory=dict)
    name: str = "pretrain_selections"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        self.resources = trainer_resources(self.trainer, self.options)

    def inputs(self) -> tuple[list[str], list[str]]:
        """The work: which selection, and the seed."""
        return ["data"], list(_OF_A_ROW)

    def outputs(self) -> tuple[list[str], list[str]]:
        """Selection and seed; ``loss_<task>`` and facts beside them."""
        return ["data"], ["selector", "seed"]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Trains the models of one batch that are not there yet."""
        rows = [self._row(work) for work in task.to_pyarrow().to_pylist()]
        return DocumentBatch(
            dataset_name=task.dataset_name,
            data=pa.Table.from_pylist(rows),
            _metadata=task._metadata,
            _stage_perf=list(task._stage_perf),
        )

    def job(self, work: dict[str, Any]) -> PretrainJob:
        """The job of a row."""
        given: Any = {name: tuple(work[name]) if name in _LISTS else work[name] for name in _OF_A_ROW}
        return PretrainJob(
            root=str(self.step.root),
            step=self.step.name,
            key=self.step.key,
            tokens=self.tokens,
            validation=self.validation,
            validation_tokens=self.validation_tokens,
            vocabulary=self.vocabulary,
            eod=self.eod,
            tokenizer=self.tokenizer,
            trainer=self.trainer,
            options=self.options,
            url=self.step.url,
            **given,
        )

    def _row(self, work: dict[str, Any]) -> dict[str, Any]:
        path = work["part"]
        if self.step.entry(path) is None:
            job = self.job(work)
            job.bring()
            trainer = registry.create("trainers", self.trainer, self.options, "pretrain.options")
            if hasattr(trainer, "pretrain"):
                trainer.pretrain(job)
            else:
                train_on_pieces(trainer, job)
        return flat_row(self.step.read_json(path))


def pretrain_tasks(work: pa.Table) -> list[DocumentBatch]:
    """One task per row of work."""
    names = [f"{row['selector']}-{row['seed']}" for row in work.select(["selector", "seed"]).to_pylist()]
    return [
        DocumentBatch(dataset_name=name, data=work.slice(i, 1), _metadata={"shard": name})
        for i, name in enumerate(names)
    ]
