"""TrainProxies: one row of work is one θ or one baseline; out come a proxy's losses, as an artifact of its own.

The stage carries paths and options; tables, token files and validation rows are opened once per worker. A proxy that
is already there is not trained again, so a run resumes after anything. One that fails is tried once more, then
recorded with its reason and left out of the fit.
"""

import logging
import os
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch
from numpy.typing import NDArray

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError, StorageError
from quadmix_plugin.models import choose_device
from quadmix_plugin.proxy.attempts import Attempts
from quadmix_plugin.proxy.fidelity import HalvingRule
from quadmix_plugin.proxy.parts import BASELINE, DRAW, MIXTURE, PARTS, flat_row, measured, part_path, to_do
from quadmix_plugin.proxy.pieces import cut_pieces
from quadmix_plugin.proxy.pool import TokenPool
from quadmix_plugin.proxy.selection import (
    SELECTION,
    Draws,
    MatchedEpochs,
    ProxySelection,
    ProxyTable,
    read_baseline,
)
from quadmix_plugin.proxy.validation import ValidationSet, load_validation_sets
from quadmix_plugin.store import Step

logger = logging.getLogger(__name__)

_TRIES = 2


@dataclass
class TrainProxies(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Trains one proxy per row of work and writes ``<parts><proxy>.json``.

    A row has ``proxy``, ``kind`` (of ``proxy.parts``), ``seed``, ``stream`` (of independent draws) and ``theta``. In
    one of the kind ``baseline`` θ is null, and ``selection`` names the baseline; in one of the kind ``mixture`` it is
    how often a document of each domain is expected.

    All proxies share the draw of copies, unless ``draws`` says otherwise, and the initial weights (``weights_seed``);
    the row's seed orders the data. Passes on one row per proxy with its losses.

    Args:
        step: where the results are entered.
        table: path of a ``ProxyTable`` as Parquet.
        pool: prefixes of the token files of all documents, in the order of the table.
        validation: path of a Parquet file of ``tokenise_rows``; the rows of the part ``search`` are used.
        tokens: training tokens of each proxy.
        vocabulary: number of ids.
        trainer: a name of the group ``trainers``, with ``options``.
        draws: how the documents of a θ are drawn.
        matched: the repetition of the final run, for proxies to be trained at.
        weights_seed: of the initial weights.
        eval_at: shares of the training at which the losses are measured too, for the learning curves.
        baselines: path of a ``baselines_table`` as Parquet, for rows of the kind ``baseline``; None: there are none.
        halving: which proxies of the kind ``draw`` are stopped there (``HalvingRule.to_dict``); None: none.
        session: names this command; what others had begun does not count as an attempt.
        per_gpu: how many proxies train on a GPU at once, each in a process of its own.
        parts: beginning of the artifacts' names.
    """

    step: Step
    table: str
    pool: list[str]
    validation: str
    tokens: int
    vocabulary: int
    trainer: str = "torch"
    options: dict[str, Any] = field(default_factory=dict)
    draws: Draws = field(default_factory=Draws)
    matched: MatchedEpochs | None = None
    weights_seed: int = 0
    eval_at: tuple[float, ...] = ()
    baselines: str | None = None
    halving: dict[str, Any] | None = None
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    per_gpu: int = 1
    parts: str = PARTS
    name: str = "train_proxies"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        self.resources = trainer_resources(self.trainer, self.options, self.per_gpu)
        self._data: _Data | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def inputs(self) -> tuple[list[str], list[str]]:
        """The work: which θ or baseline, and the seed of the order of its data."""
        return ["data"], ["proxy", "kind", "seed", "stream", "theta"]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The proxy's number; ``loss_<task>`` and facts beside it."""
        return ["data"], ["proxy", "kind", "seed"]

    def setup(self, worker_metadata: Any = None) -> None:
        """Opens the table, the pool and the validation rows."""
        if self._data is None:
            if self.per_gpu > 1 and self.resources.gpus:
                import torch

                torch.cuda.set_per_process_memory_fraction(1 / self.per_gpu)
            self._data = _Data.open(self)

    def teardown(self) -> None:
        """Lets go of them."""
        self._data = None

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """Trains the proxies of one batch that are not there yet."""
        rows = [self._row(work) for work in task.to_pyarrow().to_pylist()]
        return DocumentBatch(
            dataset_name=task.dataset_name,
            data=pa.Table.from_pylist(rows),
            _metadata=task._metadata,
            _stage_perf=list(task._stage_perf),
        )

    def _row(self, work: dict[str, Any]) -> dict[str, Any]:
        path = part_path(work["proxy"], self.parts)
        if to_do(self.step, path, self.session):
            identity = {key: work[key] for key in ("proxy", "kind", "seed")}
            self.step.write_json(path, {**identity, **self._tried(work)})
        return flat_row(self.step.read_json(path))

    def _tried(self, work: dict[str, Any]) -> dict[str, Any]:
        """The result of training, or the reason why there is none after two attempts."""
        self.setup()
        number, attempts, final = work["proxy"], Attempts(self.step.root, self.session), False
        reason = f"the worker process was lost {_TRIES} times over it, killed or out of memory"
        while (tries := attempts.begin(number)) <= _TRIES:
            try:
                return {**self._train(work), "attempts": tries}
            except StorageError:  # nothing can be recorded
                raise
            except InputError as error:  # the same again the next time
                reason, final = str(error), True
                break
            except (Exception, SystemExit) as error:  # diverged, or whatever a trainer raises: this θ only
                _leave_spoilt_process(error)
                reason = f"{type(error).__name__}: {error}"
                logger.warning("proxy %s, attempt %s: %s", number, tries, reason)
        logger.warning("proxy %s is left out: %s", number, reason)
        return {"failure": reason, "final": final, "session": self.session, "attempts": min(tries, _TRIES)}

    def _train(self, work: dict[str, Any]) -> dict[str, Any]:
        assert self._data is not None  # noqa: S101 - set in setup
        data, trainer = self._data, self._data.trainer
        table = data.selection.table
        started = time.perf_counter()
        copies = self._copies(work)[data.in_pool]
        pieces = cut_pieces(
            data.pool, copies, table.domain_ids[data.in_pool], trainer.context, self.tokens, work["seed"],
            trainer.batch_size,
        )  # fmt: skip
        rule = data.rule if work["kind"] == DRAW else None
        result = trainer.train(
            pieces,
            data.sets,
            seed=self.weights_seed,
            vocabulary=self.vocabulary,
            eval_at=self.eval_at,
            stop=rule.stops if rule else None,
        )
        domain_tokens = np.zeros(len(table.domains), dtype=np.int64)
        domain_tokens[: pieces.domain_tokens.size] = pieces.domain_tokens
        return {
            **measured(result, data.sets),
            "selected_tokens": pieces.selected_tokens,
            "unique_tokens": pieces.unique_tokens,
            "epochs": result.tokens_seen / pieces.selected_tokens,
            "seconds": time.perf_counter() - started,
            "domain_tokens": dict(zip(table.domains, domain_tokens.tolist(), strict=True)),
        }

    def _copies(self, work: dict[str, Any]) -> NDArray[np.int32]:
        """The copies of every document of the table that a row of work is trained on [n]."""
        assert self._data is not None  # noqa: S101 - set in setup
        selection = self._data.selection
        if work["kind"] == MIXTURE:
            return selection.of_domains(work["theta"])
        if work["kind"] != BASELINE:
            return selection.copies(selection.parameters(work["theta"]), work["stream"])
        return selection.of_baseline(read_baseline(str(self.baselines), work[SELECTION], selection.table.tokens.size))


@dataclass
class _Data:
    """What a worker opens once."""

    selection: ProxySelection
    pool: TokenPool
    sets: list[ValidationSet]
    trainer: Any
    in_pool: NDArray[np.bool_]
    rule: HalvingRule | None

    @classmethod
    def open(cls, stage: TrainProxies) -> Self:
        pairs = (f"{prefix}{suffix}" for prefix in stage.pool for suffix in (".bin", ".idx"))
        stage.step.bring(stage.table, stage.validation, *pairs)
        pool = TokenPool.open(stage.pool)
        selection = ProxySelection(ProxyTable.load(stage.table), stage.draws, stage.matched)
        in_pool = selection.in_pool
        tokens = selection.table.tokens[in_pool]
        if tokens.shape != pool.lengths.shape or (tokens + 1 != pool.lengths).any():
            raise InputError(
                f"{stage.table}: {tokens.size} documents with {int(tokens.sum())} tokens, the pool has "
                f"{pool.n_documents} with {int(pool.lengths.sum()) - pool.n_documents}; label and export with one "
                f"tokenizer"
            )
        sets = load_validation_sets(stage.validation, "search")
        trainer = registry.create("trainers", stage.trainer, stage.options, "proxy.options")
        rule = HalvingRule.from_dict(stage.halving) if stage.halving else None
        return cls(selection, pool, sets, trainer, in_pool, rule)


def trainer_resources(trainer: str, options: dict[str, Any], per_gpu: int = 1) -> Resources:
    """The trainer's cores, and its part of a GPU where its device is one; makes it, so that mistakes show at once."""
    made = registry.create("trainers", trainer, options, "options of the trainer")
    getattr(made, "require_device", lambda: None)()
    device = choose_device(getattr(made, "device", "cpu"))
    cores = float(getattr(made, "threads", 1))
    return Resources(cpus=cores, gpus=1.0 / per_gpu if device.startswith("cuda") else 0.0)


def _leave_spoilt_process(error: BaseException) -> None:
    """After an error that spoils a process' CUDA context nothing trains there: Dask starts another, a run ends."""
    if "CUDA error" not in str(error):
        return
    from distributed import get_worker

    try:
        get_worker()
    except ValueError:
        raise error from None
    logger.warning("this worker process ends, for its GPU context is lost: %s", error)
    os._exit(1)


def proxy_tasks(thetas: pa.Table) -> list[DocumentBatch]:
    """One task per proxy: the rows of ``proxies/thetas.parquet``, or some of them."""
    return [
        DocumentBatch(dataset_name=f"proxy-{number}", data=thetas.slice(i, 1), _metadata={"shard": f"proxy-{number}"})
        for i, number in enumerate(thetas["proxy"].to_pylist())
    ]
