"""What a job leaves when it is done: the model as a folder of its own, and what was measured of it."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from quadmix_plugin.hugging_face import write_model
from quadmix_plugin.proxy.parts import measured

if TYPE_CHECKING:
    from quadmix_plugin.pretraining.job import PretrainJob
    from quadmix_plugin.proxy.training import TrainResult
    from quadmix_plugin.proxy.validation import ValidationSet


def write_result(
    job: "PretrainJob", result: "TrainResult", sets: "Sequence[ValidationSet]", selected_tokens: int, started: float
) -> None:
    """Enters the model and then the result, which says that the job is done; ``started``: by ``time.perf_counter``.

    ``selected_tokens``: of the files that were trained on, copies counted.

    Raises:
        InputError, StorageError: as ``write_model``.
    """
    write_model(job.results, job.model, result.model, job.eod, job.tokenizer)
    content = {
        "selector": job.selector,
        "seed": job.seed,
        **measured(result, sets),
        "selected_tokens": selected_tokens,
        "unique_tokens": job.unique_tokens,
        "epochs": result.tokens_seen / selected_tokens,
        "seconds": time.perf_counter() - started,
    }
    job.results.write_json(job.part, content)
