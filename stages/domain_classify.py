"""DomainClassify: adds the ``domain`` of every document, by a classifier of the group ``domain_classifiers``."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.errors import InputError
from quadmix_plugin.schema import DOMAIN, TEXT
from quadmix_plugin.stages.labelling import PluginHandle, read_column, read_texts, with_column


@dataclass
class DomainClassify(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds ``domain`` (text) to each batch.

    Args:
        classifier: a name in the entry-point group ``quadmix_plugin.domain_classifiers``.
        options: the classifier's options, such as ``model`` and ``revision``.
        text_field: column with the text.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        resources: by default one core, and one GPU when the classifier runs on one.

    Raises:
        RecipeError: an unknown classifier or option.
        InputError: no such model or device; at ``setup`` a model that cannot be loaded.
    """

    classifier: str = "nvidia-domain"
    options: dict[str, Any] = field(default_factory=dict)
    text_field: str = TEXT
    device: str = "auto"
    name: str = "domain_classify"
    resources: Resources = None  # type: ignore[assignment]
    batch_size: int = 1

    def __post_init__(self) -> None:
        self._handle = PluginHandle("domain_classifiers", self.classifier, dict(self.options), self.device)
        self.resources = self.resources or self._handle.resources

    def inputs(self) -> tuple[list[str], list[str]]:
        """The column that the classifier reads."""
        return ["data"], [self._handle.input_column(self.text_field)]

    def outputs(self) -> tuple[list[str], list[str]]:
        """``domain``."""
        return ["data"], [DOMAIN]

    def setup_on_node(self, node_info: Any = None, worker_metadata: Any = None) -> None:
        """Fetches the model once per machine."""
        self._handle.download()

    def setup(self, worker_metadata: Any = None) -> None:
        """Loads the model."""
        self._handle.ready()

    def teardown(self) -> None:
        """Lets go of the model."""
        self._handle.unload()

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Adds the column to one batch."""
        column = self._handle.input_column(self.text_field)
        read = read_texts if column == self.text_field else read_column
        values = read(task, column)
        domains = self._handle.ready().classify(values)
        if len(domains) != len(values):
            raise InputError(f"{self.classifier}: {len(domains)} labels for {len(values)} documents; mend the plug-in")
        return with_column(task, DOMAIN, domains, pa.string())
