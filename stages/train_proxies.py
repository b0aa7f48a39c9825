"""TrainProxies: one row of work is one θ; out come a proxy model's losses, as an artifact of its own.

The stage carries paths and options; tables, token files and validation rows are opened once per worker. A proxy that
is already there is not trained again, so a run resumes after anything. One that fails is recorded with its reason
and left out of the fit.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch
from numpy.typing import NDArray

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError, QuadmixError, StorageError
from quadmix_plugin.hashing import uniform
from quadmix_plugin.models import choose_device
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.proxy.pool import TokenPool
from quadmix_plugin.proxy.validation import ValidationSet, load_validation_sets
from quadmix_plugin.rank_map import Method, Ties
from quadmix_plugin.rank_states import BINS
from quadmix_plugin.sampling import count_copies
from quadmix_plugin.schema import DOC_ID, TOKENS, ScoreTable
from quadmix_plugin.score_index import ScoreIndex
from quadmix_plugin.store import Step

logger = logging.getLogger(__name__)

_WORTH_AN_INDEX = 200_000  # documents; below, one pass over all of them takes milliseconds


@dataclass(frozen=True)
class Draws:
    """How a proxy's documents are chosen from the table.

    ``method``, ``ties``, ``bins``, ``subset_documents``, ``subset_per_domain``: how r̄ is computed; ``seed``: of the
    draw; ``independent``: θ do not share their uniforms; ``thin``: factor on every S; ``below``: the pool has the
    documents whose u is below it.
    """

    method: Method = "histogram"
    ties: Ties = "paper"
    bins: int = BINS
    subset_documents: int = 10_000
    subset_per_domain: bool = True
    seed: int = 0
    independent: bool = False
    thin: float = 1.0
    below: float = 1.0


@dataclass(frozen=True, eq=False)
class ProxyTable:
    """What a proxy's selection is computed from; rows in the order of the pool's documents.

    ``doc_ids`` [n] Arrow; ``domain_ids`` and ``tokens`` int64 [n]; ``normalised`` float32 [n, N].
    """

    doc_ids: pa.Array
    domain_ids: NDArray[np.int64]
    tokens: NDArray[np.int64]
    normalised: NDArray[np.float32]
    domains: tuple[str, ...]
    scorers: tuple[str, ...]

    @classmethod
    def of(cls, table: ScoreTable, normalised: NDArray[np.float32]) -> Self:
        """From the score table of a corpus and σ of its scores."""
        return cls(table.doc_ids, table.domain_ids, table.tokens, normalised, table.domains, table.scorers)

    def index(self, draws: Draws) -> ScoreIndex | None:
        """The table laid out for many θ; None where that does not pay, or ranks are of a subset of documents."""
        if draws.method == "subset" or self.tokens.size < _WORTH_AN_INDEX:
            return None
        return ScoreIndex.of(
            self.normalised, self.domain_ids, self.tokens, self.doc_ids, draws.seed, draws.bins, len(self.domains)
        )

    def to_arrow(self) -> pa.Table:
        """One column each, names in the schema's metadata; write it as ``proxies/table.parquet``."""
        columns = {DOC_ID: self.doc_ids, "domain_id": pa.array(self.domain_ids), TOKENS: pa.array(self.tokens)}
        columns |= {f"normalised_{s}": pa.array(self.normalised[:, n]) for n, s in enumerate(self.scorers)}
        names = {"domains": json.dumps(self.domains), "scorers": json.dumps(self.scorers)}
        return pa.table(columns).replace_schema_metadata(names)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The inverse of ``to_arrow``, from a Parquet file.

        Raises:
            InputError: no such file.
        """
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; run the step 'proxies' from its beginning")
        table = pq.read_table(path).combine_chunks()
        metadata = table.schema.metadata
        domains, scorers = (tuple(json.loads(metadata[key])) for key in (b"domains", b"scorers"))
        normalised = np.stack([table[f"normalised_{s}"].to_numpy() for s in scorers], axis=1)
        ids = pa.concat_arrays(table[DOC_ID].chunks) if table[DOC_ID].num_chunks != 1 else table[DOC_ID].chunk(0)
        return cls(ids, table["domain_id"].to_numpy(), table[TOKENS].to_numpy(), normalised, domains, scorers)


@dataclass
class TrainProxies(ProcessingStage[DocumentBatch, DocumentBatch]):
    """Trains one proxy per row of ``proxy``, ``kind``, ``seed``, ``theta`` and writes ``proxies/parts/<proxy>.json``.

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
    weights_seed: int = 0
    name: str = "train_proxies"
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0))
    batch_size: int = 1

    def __post_init__(self) -> None:
        self.resources = trainer_resources(self.trainer, self.options)
        self._data: _Data | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def inputs(self) -> tuple[list[str], list[str]]:
        """The work: which θ, and the seed of the order of its data."""
        return ["data"], ["proxy", "kind", "seed", "theta"]

    def outputs(self) -> tuple[list[str], list[str]]:
        """The proxy's number; ``loss_<task>`` and facts beside it."""
        return ["data"], ["proxy", "kind", "seed"]

    def setup(self, worker_metadata: Any = None) -> None:
        """Opens the table, the pool and the validation rows."""
        if self._data is None:
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
        path = part_path(work["proxy"])
        if self.step.entry(path) is None:
            identity = {key: work[key] for key in ("proxy", "kind", "seed")}
            self.step.write_json(path, {**identity, **self._train(work)})
        return flat_row(self.step.read_json(path))

    def _train(self, work: dict[str, Any]) -> dict[str, Any]:
        self.setup()
        assert self._data is not None  # noqa: S101 - set in setup
        table, pool, trainer, in_pool = self._data.table, self._data.pool, self._data.trainer, self._data.in_pool
        theta = Parameters.from_vector(work["theta"], len(table.scorers), table.domains, table.scorers)
        copies = self._data.copies(theta, work["proxy"] if work["kind"] == "draw" else 0)
        started = time.perf_counter()
        try:
            domains = table.domain_ids[in_pool]
            pieces = pool.pieces(
                copies[in_pool], domains, trainer.context, self.tokens, work["seed"], trainer.batch_size
            )
            sets = self._data.sets
            result = trainer.train(pieces.tokens, sets, seed=self.weights_seed, vocabulary=self.vocabulary)
        except StorageError:
            raise
        except QuadmixError as error:  # too small a selection, or diverged: this θ only
            logger.warning("proxy %s: %s", work["proxy"], error)
            return {"failure": str(error)}
        domain_tokens = np.zeros(len(table.domains), dtype=np.int64)
        domain_tokens[: pieces.domain_tokens.size] = pieces.domain_tokens
        return {
            "losses": result.losses,
            "tokens_seen": pieces.tokens_seen,
            "selected_tokens": pieces.selected_tokens,
            "unique_tokens": pieces.unique_tokens,
            "epochs": pieces.epochs,
            "seconds": time.perf_counter() - started,
            "unigram_entropy": result.unigram_entropy,
            "domain_tokens": dict(zip(table.domains, domain_tokens.tolist(), strict=True)),
            "curve": [asdict(point) for point in result.curve],
        }


@dataclass
class _Data:
    """What a worker opens once."""

    table: ProxyTable
    pool: TokenPool
    sets: list[ValidationSet]
    trainer: Any
    draws: Draws
    in_pool: NDArray[np.bool_]
    index: ScoreIndex | None

    @classmethod
    def open(cls, stage: TrainProxies) -> Self:
        table, pool, draws = ProxyTable.load(stage.table), TokenPool.open(stage.pool), stage.draws
        in_pool = uniform(table.doc_ids, draws.seed) < draws.below
        tokens = table.tokens[in_pool]
        if tokens.shape != pool.lengths.shape or (tokens + 1 != pool.lengths).any():
            raise InputError(
                f"{stage.table}: {tokens.size} documents with {int(tokens.sum())} tokens, the pool has "
                f"{pool.n_documents} with {int(pool.lengths.sum()) - pool.n_documents}; label and export with one "
                f"tokenizer"
            )
        sets = load_validation_sets(stage.validation, "search")
        trainer = registry.create("trainers", stage.trainer, stage.options, "proxy.options")
        return cls(table, pool, sets, trainer, draws, in_pool, table.index(draws))

    def copies(self, theta: Parameters, stream: int) -> NDArray[np.int32]:
        """The copies of every document of the table under θ."""
        draws, table = self.draws, self.table
        stream = stream if draws.independent else 0
        if self.index is not None:
            chosen = self.index.select(theta, draws.method, draws.ties, draws.thin, stream)  # type: ignore[arg-type]
            return chosen.by_row(table.tokens.size)
        return count_copies(
            table.normalised,
            table.domain_ids,
            table.tokens,
            table.doc_ids,
            theta,
            draws.seed,
            draws.method,
            draws.ties,
            draws.bins,
            subset_documents=draws.subset_documents,
            subset_per_domain=draws.subset_per_domain,
            thin=draws.thin,
            stream=stream,
        )


def trainer_resources(trainer: str, options: dict[str, Any]) -> Resources:
    """One core, and a GPU where the trainer's device is one; makes the trainer, so that mistakes show at once."""
    made = registry.create("trainers", trainer, options, "options of the trainer")
    device = choose_device(getattr(made, "device", "cpu"))
    return Resources(cpus=1.0, gpus=1.0 if device.startswith("cuda") else 0.0)


def proxy_tasks(thetas: pa.Table) -> list[DocumentBatch]:
    """One task per proxy from ``proxies/thetas.parquet`` (proxy, kind, seed, theta)."""
    return [
        DocumentBatch(dataset_name=f"proxy-{number}", data=thetas.slice(i, 1), _metadata={"shard": f"proxy-{number}"})
        for i, number in enumerate(thetas["proxy"].to_pylist())
    ]


def part_path(proxy: int) -> str:
    """The artifact of one proxy."""
    return f"proxies/parts/{int(proxy):06d}.json"


def flat_row(part: dict[str, Any]) -> dict[str, Any]:
    """A part as one row of a table: its plain values, and ``loss_<task>`` for each loss."""
    plain = {key: value for key, value in part.items() if not isinstance(value, dict | list)}
    return {**plain, **{f"loss_{task}": loss for task, loss in part.get("losses", {}).items()}}


def merge_parts(step: Step, paths: Sequence[str], keys: Sequence[str]) -> tuple[pa.Table, pa.Table, dict[str, str]]:
    """Losses, learning curves, and failures (path → reason) of these parts; ``keys`` name a row in the curves.

    Raises:
        QuadmixError: a part is missing, or none of them succeeded.
    """
    parts = {path: step.read_json(path) for path in paths}
    failures = {path: part["failure"] for path, part in parts.items() if "failure" in part}
    whole = [part for path, part in parts.items() if path not in failures]
    if not whole:
        reason = next(iter(failures.values()), "there are none")
        raise QuadmixError(f"{step.root}: none of {len(parts)} models could be trained; the first: {reason}")
    curves = [{**{key: part[key] for key in keys}, **point} for part in whole for point in part["curve"]]
    return pa.Table.from_pylist([flat_row(part) for part in whole]), pa.Table.from_pylist(curves), failures
