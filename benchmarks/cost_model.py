"""What a job costs on G GPUs, as a formula over stated rates: a part of benchmarks/scaling.py.

Nothing here is measured. Rates of models on a GPU are assumptions: a share of the card's peak, 2 operations a weight
and token. Rates of cores and of the driver are rounded figures of this project on two shared cores; docs/scaling.md
names their sources. Every one can be given otherwise, and all are printed with the result.
"""

from dataclasses import asdict, dataclass
from typing import Any

_HOUR = 3600.0
_PASSES = 4  # over the score table: σ fitted, σ applied, ranks fitted, documents selected


@dataclass(frozen=True)
class Assumptions:
    """The job, the machine and the rates; sizes in documents, tokens, weights, operations and bytes."""

    documents: float = 1e9
    tokens_per_document: float = 1000.0
    documents_per_shard: float = 100_000.0
    selected_share: float = 0.06
    encoder_weights: float = 195e6  # of all encoders together that read a document: a domain model and a classifier
    encoder_tokens: float = 512.0  # that they read of it
    llm_weights: float = 780e6  # of the model that is asked
    llm_tokens: float = 512.0
    gpu_peak: float = 989e12  # operations per second in bfloat16, as the maker of an H100 states
    gpu_share: float = 0.3  # of the peak that inference reaches
    cores_per_gpu: float = 16.0
    tokens_per_core_s: float = 0.5e6  # by a tokenizer
    fasttext_per_core_s: float = 15_000.0  # documents
    rows_per_core_s: float = 5.0e6  # of one numeric pass, reading included
    units_per_s: float = 100.0  # calls of stages that the driver starts and ends
    units_per_shard: float = 18.0  # label 7, σ fitted 1 and applied 3, ranks 1, selection 3, export 3
    efficiency: float = 0.85  # what two workers reach of twice one

    def of(self, gpus: int) -> dict[str, Any]:
        """Hours of each part on so many GPUs, the cores beside them working at the same time."""
        operations = (
            2 * self.documents * (self.encoder_weights * self.encoder_tokens + self.llm_weights * self.llm_tokens)
        )
        gpu_hours = operations / (self.gpu_peak * self.gpu_share) / _HOUR
        cores, shards = gpus * self.cores_per_gpu, self.documents / self.documents_per_shard
        tokenise = self.documents * self.tokens_per_document * (1 + self.selected_share) / self.tokens_per_core_s
        fasttext = self.documents / self.fasttext_per_core_s
        passes = _PASSES * self.documents / self.rows_per_core_s
        on_gpus = gpu_hours / (gpus * self.efficiency)
        on_cores = (tokenise + fasttext) / (cores * self.efficiency) / _HOUR
        driver = shards * self.units_per_shard / self.units_per_s / _HOUR
        parts = {"models_h": on_gpus, "tokenizer_and_fasttext_h": on_cores, "driver_h": driver}
        return {
            "gpus": gpus,
            "gpu_hours": round(gpu_hours, 1),
            **{name: round(hours, 2) for name, hours in parts.items()},
            "numeric_passes_h": round(passes / (cores * self.efficiency) / _HOUR, 3),
            "bound_by": max(parts, key=parts.__getitem__).removesuffix("_h"),
            "hours": round(max(parts.values()) + passes / (cores * self.efficiency) / _HOUR, 2),
        }

    def to_dict(self) -> dict[str, float]:
        """All of them."""
        return asdict(self)
