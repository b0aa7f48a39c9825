"""EvaluateModels: one row of work is one trained model; out come its benchmark scores, an artifact for each task."""

from dataclasses import dataclass, field

import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.harness import HarnessSettings, evaluate_model
from quadmix_plugin.models import choose_device
from quadmix_plugin.store import Step


@dataclass
class EvaluateModels(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Runs lm-evaluation-harness on one model per row and writes the scores of each task as JSON.

    A row has ``model`` (a folder in Hugging Face's format), ``tasks`` and ``scores`` (the artifact of each).

    Args:
        step: where the scores are entered.
        tokenizer: folder of the tokenizer that the models were trained with.
        settings: tasks and few-shot setting.
        device: as ``executor.device``.
        seed: of few-shot examples.
    """

    step: Step
    tokenizer: str
    settings: HarnessSettings
    device: str = "auto"
    seed: int = 0
    name: str = "evaluate_models"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        self.resources = Resources(cpus=1.0, gpus=1.0 if choose_device(self.device).startswith("cuda") else 0.0)

    def inputs(self) -> tuple[list[str], list[str]]:
        """The work: which model, which tasks, and where their scores go."""
        return ["data"], ["model", "tasks", "scores"]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The same."""
        return ["data"], ["model", "tasks", "scores"]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Evaluates the models of one batch that have no scores yet."""
        for row in task.to_pyarrow().to_pylist():
            todo = {
                name: path
                for name, path in zip(row["tasks"], row["scores"], strict=True)
                if self.step.entry(path) is None
            }
            if todo:
                device, settings = choose_device(self.device), self.settings.only(list(todo))
                self.step.bring(row["model"])
                found = evaluate_model(row["model"], self.tokenizer, settings, device, self.seed)
                for name, path in todo.items():
                    self.step.write_json(path, found[name])
        return task


def evaluation_tasks(work: pa.Table) -> list[DocumentBatch]:
    """One task per row of work."""
    return [
        DocumentBatch(dataset_name=paths[0], data=work.slice(i, 1), _metadata={"shard": paths[0]})
        for i, paths in enumerate(work["scores"].to_pylist())
    ]
