"""PretrainSelections: one row of work trains a model on one selection's token file with one seed, for the comparison.

Same trainer and same loss as the proxies, but more tokens, and the validation rows on which nothing was searched.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin import registry
from quadmix_plugin.proxy.parts import flat_row, measured
from quadmix_plugin.proxy.pieces import cut_pieces
from quadmix_plugin.proxy.pool import TokenPool
from quadmix_plugin.proxy.validation import load_validation_sets
from quadmix_plugin.stages.train_proxies import trainer_resources
from quadmix_plugin.store import Step


@dataclass
class PretrainSelections(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Trains on one token file per row and writes its results.

    A row has ``selector``, ``seed`` (initial weights and order of the data), ``prefix`` (path without ``.bin``),
    ``unique_tokens``, ``part`` (the artifact of the results) and ``model`` (folder of the model in Hugging Face's Llama
    format).

    Args:
        step: where the results are entered.
        validation: path of a Parquet file of ``tokenise_rows``; the rows of the part ``report`` are used.
        tokens: training tokens of each model.
        vocabulary: number of ids.
        eod: id of the end-of-document token.
        trainer: a name of the group ``trainers``, with ``options``.
    """

    step: Step
    validation: str
    tokens: int
    vocabulary: int
    eod: int
    trainer: str = "torch"
    options: dict[str, Any] = field(default_factory=dict)
    name: str = "pretrain_selections"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        self.resources = trainer_resources(self.trainer, self.options)

    def inputs(self) -> tuple[list[str], list[str]]:
        """The work: which selection, and the seed."""
        return ["data"], ["selector", "seed", "prefix", "unique_tokens", "part", "model"]

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

    def _row(self, work: dict[str, Any]) -> dict[str, Any]:
        path = work["part"]
        if self.step.entry(path) is None:
            self.step.write_json(path, self._train(work))
        return flat_row(self.step.read_json(path))

    def _train(self, work: dict[str, Any]) -> dict[str, Any]:
        from quadmix_plugin.proxy.model import save_weights

        started = time.perf_counter()
        trainer = registry.create("trainers", self.trainer, self.options, "pretrain.options")
        pool = TokenPool.open([work["prefix"]])
        pieces = cut_pieces(pool, None, None, trainer.context, self.tokens, work["seed"], trainer.batch_size)
        sets = load_validation_sets(self.validation, "report")
        result = trainer.train(pieces, sets, seed=work["seed"], vocabulary=self.vocabulary)
        folder = work["model"]
        with self.step.writing(f"{folder}/model.safetensors", f"{folder}/config.json") as (weights, config):
            save_weights(result.model, weights, config, self.eod)
        return {
            "selector": work["selector"],
            "seed": work["seed"],
            **measured(result, sets),
            "selected_tokens": pieces.selected_tokens,
            "unique_tokens": work["unique_tokens"],
            "epochs": pieces.epochs,
            "seconds": time.perf_counter() - started,
        }


def pretrain_tasks(work: pa.Table) -> list[DocumentBatch]:
    """One task per row of work."""
    names = [f"{row['selector']}-{row['seed']}" for row in work.select(["selector", "seed"]).to_pylist()]
    return [
        DocumentBatch(dataset_name=name, data=work.slice(i, 1), _metadata={"shard": name})
        for i, name in enumerate(names)
    ]
