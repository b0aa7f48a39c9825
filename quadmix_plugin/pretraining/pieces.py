"""A job for a trainer that takes pieces, and knows nothing of checkpoints: trained in one go, in this process."""

import time
from typing import TYPE_CHECKING, Any

from quadmix_plugin.pretraining.result import write_result
from quadmix_plugin.proxy.pieces import cut_pieces
from quadmix_plugin.proxy.pool import TokenPool
from quadmix_plugin.proxy.validation import load_validation_sets

if TYPE_CHECKING:
    from quadmix_plugin.pretraining.job import PretrainJob


def train_on_pieces(trainer: Any, job: "PretrainJob") -> None:
    """Trains on pieces of the selection in a shuffle by the job's seed, and writes the model and the result.

    Raises:
        InputError, QuadmixError: as the trainer's ``train``, and as ``cut_pieces``.
    """
    started = time.perf_counter()
    pool = TokenPool.open(job.prefixes)
    pieces = cut_pieces(pool, None, None, trainer.context, job.tokens, job.seed, trainer.batch_size)
    sets = load_validation_sets(job.validation, "report")
    result = trainer.train(pieces, sets, seed=job.seed, vocabulary=job.vocabulary)
    write_result(job, result, sets, pieces.selected_tokens, started)
