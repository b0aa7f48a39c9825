"""DomainClassify: adds the ``domain`` of every document, by a classifier of the group ``domain_classifiers``."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.schema import DOMAIN, DOMAIN_TOP, DOMAIN_TOP_PROBABILITY, TEXT
from quadmix_plugin.stages.labelling import PluginHandle, read_column, read_texts, with_column


@dataclass
class DomainClassify(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds ``domain`` (text) to each batch.

    Args:
        classifier: a name in the entry-point group ``quadmix_plugin.domain_classifiers``.
        options: the classifier's options, such as ``model`` and ``revision``.
        top_k: adds ``domain_top`` (the so many most probable domains, best first; list of text) and
            ``domain_top_probability`` (list of float32) too. 0 adds neither.
        text_field: column with the text.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        resources: by default one core, and one GPU when the classifier runs on one.

    Raises:
        RecipeError: an unknown classifier or option; ``top_k`` with a classifier that has no probabilities.
        InputError: no such model or device; at ``setup`` a model that cannot be loaded.
    """

    classifier: str = "nvidia-domain"
    options: dict[str, Any] = field(default_factory=dict)
    top_k: int = 0
    text_field: str = TEXT
    device: str = "auto"
    name: str = "domain_classify"
    resources: Resources = None  # type: ignore[assignment]
    batch_size: int = 1

    def __post_init__(self) -> None:
        self._handle = PluginHandle("domain_classifiers", self.classifier, dict(self.options), self.device)
        self.resources = self.resources or self._handle.resources
        if self.top_k < 0:
            raise RecipeError(f"domain.top_k: {self.top_k}; give 0 for none, or how many")
        if self.top_k and not hasattr(self._handle.plugin, "probabilities"):
            raise RecipeError(f"domain.top_k: {self.classifier} gives no probabilities; leave top_k out")

    def check(self, *, fetch: bool = True) -> None:
        """Finds what is wrong with the model before the first document, as far as the plug-in can tell.

        Without ``fetch`` a model that is not on this machine is left unchecked.
        """
        if fetch or self._handle.is_here:
            self._handle.check()

    def facts(self) -> dict[str, Any]:
        """What is known of the classifier; for the run's provenance."""
        return self._handle.facts()

    def inputs(self) -> tuple[list[str], list[str]]:
        """The column that the classifier reads."""
        return ["data"], [self._handle.input_column(self.text_field)]

    def outputs(self) -> tuple[list[str], list[str]]:
        """``domain``, and with ``top_k`` the two columns of the most probable ones."""
        return ["data"], [DOMAIN, *((DOMAIN_TOP, DOMAIN_TOP_PROBABILITY) if self.top_k else ())]

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
        if self.top_k:
            return self._with_probabilities(task, values)
        domains = self._handle.ready().classify(values)
        self._require(len(domains), len(values))
        return with_column(task, DOMAIN, domains, pa.string())

    def _with_probabilities(self, task: DocumentBatch, values: list[Any]) -> DocumentBatch:
        labels, probabilities = self._handle.ready().probabilities(values)
        self._require(len(probabilities), len(values))
        if not np.isfinite(probabilities).all():
            raise InputError(f"{self.classifier}: probabilities that are not finite; mend the plug-in or its model")
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : self.top_k]
        top = [[labels[m] for m in row] for row in order]
        shares = list(np.take_along_axis(probabilities, order, axis=1).astype(np.float32))
        task = with_column(task, DOMAIN, [row[0] for row in top], pa.string())
        task = with_column(task, DOMAIN_TOP, top, pa.list_(pa.string()))
        return with_column(task, DOMAIN_TOP_PROBABILITY, shares, pa.list_(pa.float32()))

    def _require(self, found: int, wanted: int) -> None:
        if found != wanted:
            raise InputError(f"{self.classifier}: {found} labels for {wanted} documents; mend the plug-in")
