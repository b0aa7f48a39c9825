"""SigmoidSample: Eq. 3 and the draw of the number of copies."""

from dataclasses import dataclass, field

import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin.parameters import Parameters
from quadmix_plugin.sampling import draw_copies, sampling_value
from quadmix_plugin.schema import COPIES, DOC_ID, DOMAIN, QUALITY_RANK, SAMPLING_VALUE
from quadmix_plugin.stages.labelling import with_column
from quadmix_plugin.stages.merge_rank import load_theta
from quadmix_plugin.stages.score_columns import arrow, domain_ids, read_numbers


@dataclass
class SigmoidSample(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Eq. 3: adds ``sampling_value`` (float64, expected copies) and ``copies`` (int32, drawn).

    Args:
        theta: parameters with named domains, or the path of a ``theta.json``.
        seed: seed of the draw; a document's copies depend on its id and this alone.
        id_field: column with the document's id.
        expand: True writes each document ``copies`` times, and those with none not at all, for pipelines that write
            text next; False (the default) keeps one row per document.
    """

    theta: Parameters | str
    seed: int = 0
    id_field: str = DOC_ID
    expand: bool = False
    name: str = "sigmoid_sample"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        self.theta = load_theta(self.theta)

    def inputs(self) -> tuple[list[str], list[str]]:
        """The id, the domain and its rank."""
        return ["data"], [self.id_field, DOMAIN, QUALITY_RANK]

    def outputs(self) -> tuple[list[str], list[str]]:
        """Expected and drawn copies."""
        return ["data"], [SAMPLING_VALUE, COPIES]

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Adds the two columns to one batch."""
        assert isinstance(self.theta, Parameters)  # noqa: S101 - set in __post_init__
        table = arrow(task)
        ids = domain_ids(table, self.theta)
        value = sampling_value(read_numbers(table, QUALITY_RANK), ids, self.theta)
        copies = draw_copies(value, table[self.id_field], self.seed)
        sampled = with_column(task, SAMPLING_VALUE, value, pa.float64())
        sampled = with_column(sampled, COPIES, copies, pa.int32())
        if self.expand:
            rows = copies.nonzero()[0].repeat(copies[copies > 0])
            sampled.data = sampled.data.take(rows) if not hasattr(sampled.data, "iloc") else sampled.data.iloc[rows]
        return sampled
