"""QualityScore: adds one raw score of every document, by a scorer of the group ``scorers``.

The score stays as the model gives it; its direction is the scorer's ``higher_is_better``, which the normaliser reads.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.errors import InputError
from quadmix_plugin.schema import TEXT, score_column
from quadmix_plugin.stages.checked_rows import InvalidScores, check_choice
from quadmix_plugin.stages.labelling import PluginHandle, read_column, read_texts, with_column


@dataclass
class QualityScore(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Adds ``score_<scorer>`` (float32, raw) to each batch.

    Args:
        scorer: a name in the entry-point group ``quadmix_plugin.scorers``.
        options: the scorer's options, such as ``model`` and ``revision``.
        column: name of the new column; by default ``score_<scorer>``.
        text_field: column with the text.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        invalid_scores: what to do with a score that is not finite: ``error``, or ``drop``, which leaves it for
            ``NormaliseScores`` to drop and count.
        name: by default ``quality_score_<scorer>``.
        resources: by default one core, and one GPU when the scorer runs on one.

    Raises:
        RecipeError: an unknown scorer or option.
        InputError: no such model or device; at ``setup`` a model that cannot be loaded; at ``process`` a scorer that
            returns another number of scores, or one that is not finite.
    """

    scorer: str = "fineweb-edu"
    options: dict[str, Any] = field(default_factory=dict)
    column: str | None = None
    text_field: str = TEXT
    device: str = "auto"
    invalid_scores: InvalidScores = "error"
    name: str = ""
    resources: Resources = None  # type: ignore[assignment]
    batch_size: int = 1

    def __post_init__(self) -> None:
        check_choice(self.invalid_scores)
        self._handle = PluginHandle("scorers", self.scorer, dict(self.options), self.device)
        self.column = self.column or score_column(self.scorer)
        self.name = self.name or f"quality_{self.column}"
        self.resources = self.resources or self._handle.resources

    @property
    def higher_is_better(self) -> bool:
        """The direction of the scores."""
        return bool(self._handle.plugin.higher_is_better)

    def check(self, *, fetch: bool = True) -> None:
        """Finds what is wrong with the model before the first document, as far as the plug-in can tell.

        Without ``fetch`` a model that is not on this machine is left unchecked.
        """
        if fetch or self._handle.is_here:
            self._handle.check()

    def facts(self) -> dict[str, Any]:
        """What is known of the scorer; for the run's provenance."""
        return self._handle.facts()

    def inputs(self) -> tuple[list[str], list[str]]:
        """The column that the scorer reads."""
        return ["data"], [self._handle.input_column(self.text_field)]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The score column."""
        return ["data"], [str(self.column)]

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
        scores = np.asarray(self._handle.ready().score(values), dtype=np.float32)
        if scores.shape != (len(values),):
            raise InputError(
                f"{self.scorer}: scores of shape {scores.shape} for {len(values)} documents; mend the plug-in"
            )
        if (bad := ~np.isfinite(scores)).any() and self.invalid_scores == "error":
            i = int(np.argmax(bad))
            raise InputError(
                f"{self.column}: {int(bad.sum())} of {bad.size} scores are not finite, first row {i} of "
                f"{values[i]!r:.60}; mend the scorer, or drop such documents: invalid_scores: drop (in a recipe under "
                f"normalise)"
            )
        return with_column(task, str(self.column), scores, pa.float32())
