"""A run in progress: the recipe, its directory, the executor, and what each step's artifacts are made from.

A step's key is the hash of the recipe sections it reads, of the content of the files these name, and of the key
of the step before it. Changing a key of the recipe therefore invalidates its own step and what follows, nothing
before; executor settings are in no key.
"""

import hashlib
import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import xxhash
import yaml
from nemo_curator.backends.base import BaseExecutor
from numpy.typing import NDArray

from quadmix_plugin import registry
from quadmix_plugin.atomic import sha256_file
from quadmix_plugin.config import Recipe, differing_keys, dump_recipe, scheduler_of, scorer_plugin
from quadmix_plugin.corpus import CorpusFile, list_files
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError, QuadmixError, RecipeError
from quadmix_plugin.models import choose_device
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.schema import DOC_ID, DOMAIN, TOKENS, ScoreTable, normalised_column, score_column
from quadmix_plugin.sections import Executor
from quadmix_plugin.store import RunDirectory, Step, content_key

logger = logging.getLogger(__name__)

STEPS = ("label", "normalise", "proxies", "search", "select", "export", "pretrain", "evaluate", "compare", "report")

RECIPE = "recipe.yaml"

_SECTIONS: dict[str, tuple[str, ...]] = {
    "label": ("tokenizer", "domain", "scorers", "invalid_scores"),
    "normalise": ("normalise", "small_domains"),
    "proxies": ("seed", "space", "validation", "proxy", "proxy_context", "ranks"),
    "search": ("search", "search_context"),
    "select": ("select", "rank"),
    "export": (),
    "pretrain": ("pretrain",),
    "evaluate": (),  # each model's scores are named by what is asked, so that other tasks leave what is made as it is
    "compare": (),  # each selection is named by what it is made from, so that another one leaves the rest as it is
    "report": ("name",),
}


_PROPOSING = (
    "objective", "min_signal_to_noise", "regressor", "options", "features", "exclude_scorers", "at_budget",
)  # fmt: skip
"""Keys of the search that proposals of later rounds depend on."""


class Progress(Protocol):
    """Called with a stage's name, tasks done, tasks expected (None while unknown), and what else there is to say."""

    def __call__(self, stage: str, done: int, total: int | None, /, note: str = "") -> None:
        """Reports it."""


def _silent(stage: str, done: int, total: int | None, /, note: str = "") -> None:
    pass


@dataclass
class Run:
    """Everything that the functions of ``pipelines`` share. Create it with ``open_run``."""

    recipe: Recipe
    directory: RunDirectory
    make_executor: Callable[[], BaseExecutor]
    progress: Progress = field(default=_silent)
    n_workers: int | None = None
    """Of a local Dask cluster; None is the default."""

    @cached_property
    def executor(self) -> BaseExecutor:
        """Started on first use; ``close`` ends it."""
        executor = self.make_executor()
        if hasattr(executor, "on_progress"):
            executor.on_progress = self.progress  # type: ignore[attr-defined]
        return executor

    @contextmanager
    def workers(self, number: int | None) -> Iterator[None]:
        """A local Dask cluster of so many workers for the time being, where the recipe does not say how many."""
        if number is None or self.n_workers == number:
            yield
            return
        self.close()
        self.n_workers = number
        try:
            yield
        finally:
            self.close()
            self.n_workers = None

    @contextmanager
    def watched_by(self, progress: Progress) -> Iterator[BaseExecutor]:
        """The executor, reporting to ``progress`` for the time being."""
        executor = self.executor
        before = getattr(executor, "on_progress", None)
        executor.on_progress = progress  # type: ignore[attr-defined]
        try:
            yield executor
        finally:
            executor.on_progress = before  # type: ignore[attr-defined]

    def close(self) -> None:
        """Ends the executor's processes, if any were started."""
        if "executor" in self.__dict__ and hasattr(self.executor, "close"):
            self.executor.close()  # type: ignore[attr-defined]
            del self.__dict__["executor"]

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of this recipe: where it gives parameters, none are searched."""
        return tuple(name for name in STEPS if not (self.recipe.select.theta and name in ("proxies", "search")))

    @cached_property
    def corpus_files(self) -> list[CorpusFile]:
        """The corpus' files; raises InputError as ``list_files``."""
        return list_files(self.recipe.corpus.path)

    @cached_property
    def validation_files(self) -> list[CorpusFile]:
        """The validation files."""
        return list_files(self.recipe.validation.path, "validation.path")

    @cached_property
    def keys(self) -> dict[str, str]:
        """The key of every step."""
        content = self.recipe.model_dump(mode="json")
        content["invalid_scores"] = content["normalise"]["invalid_scores"]
        content["small_domains"] = content["rank"].pop("merge_small_domains")
        content["proxy_context"] = _proxy_context(self.recipe)
        content["search_context"] = _search_context(self.recipe)
        del content["proxy"]["per_gpu"]  # how, not what
        content["ranks"] = {key: value for key, value in content["rank"].items() if key != "frozen"}
        corpus = {k: v for k, v in content["corpus"].items() if k != "path"}
        files = [(file.name, file.bytes, file.version) for file in self.corpus_files]
        keys, previous = {}, content_key(corpus, files)
        for name in STEPS:
            sections = {section: self._section_fingerprint(section, content[section]) for section in _SECTIONS[name]}
            previous = keys[name] = content_key(name, sections, previous)
        return keys

    def _section_fingerprint(self, name: str, content: Any) -> Any:
        if name == "scorers":  # their order is that of the columns of α, and JSON would sort it away
            return [
                [scorer, fingerprint(options), *foreign("scorers", scorer_plugin(scorer, options)[0])]
                for scorer, options in content.items()
            ]
        if name == "domain" and (version := foreign("domain_classifiers", content["classifier"])):
            return [fingerprint(content), *version]
        if name == "search" and (version := foreign("regressors", content["regressor"])):
            return [fingerprint(content), *version]
        if name == "validation":
            return {**content, "path": files_fingerprint(content["path"], "validation.path")}
        return fingerprint(content)

    def step(self, name: str) -> Step:
        """A step with the key that this recipe gives it."""
        return self.directory.step(name, self.keys[name])

    def require(self, name: str) -> Step:
        """A finished step.

        Raises:
            QuadmixError: it has not been run yet.
        """
        step = self.step(name)
        if not step.is_done:
            command = "label" if name == "normalise" else name
            raise QuadmixError(f"{self.directory.place}: step {name!r} is not finished; run `quadmix {command}` first")
        return step

    def seed_for(self, purpose: str) -> int:
        """A seed of its own for each use of randomness, so that no two draws share their uniforms."""
        return xxhash.xxh64_intdigest(purpose.encode(), self.recipe.seed) >> 1

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorers' names, in the order of the recipe."""
        return tuple(self.recipe.scorers)

    @cached_property
    def label_shards(self) -> list[str]:
        """Names of the shards of ``labels/``, in order."""
        found = [entry.path for entry in self.require("label").entries() if entry.path.endswith(".parquet")]
        return [Path(path).stem for path in found]

    @cached_property
    def table(self) -> ScoreTable:
        """The score table of the whole corpus, rows in the order of ``label_shards``; small domains folded."""
        columns = [DOC_ID, DOMAIN, TOKENS, *map(score_column, self.scorers)]
        return ScoreTable.from_labels(self._normalised_shards(columns), self.scorers, self.summary.domains)

    @cached_property
    def normaliser(self) -> Normaliser:
        """σ as fitted on this corpus, or as the recipe gives it."""
        return Normaliser.from_dict(self.require("normalise").read_json("normalise/normaliser.json"))

    @cached_property
    def summary(self) -> DomainSummary:
        """Size and range of σ of every domain."""
        return DomainSummary.from_dict(self.require("normalise").read_json("normalise/domains.json"))

    @cached_property
    def normalised(self) -> NDArray[Any]:
        """σ(q) of the whole corpus, float32 [n, N], rows as in ``table``."""
        table = self._normalised_shards([normalised_column(scorer) for scorer in self.scorers])
        return np.stack([column.to_numpy() for column in table.columns], axis=1)

    def _normalised_shards(self, columns: list[str]) -> pa.Table:
        step = self.require("normalise")
        return pa.concat_tables(step.read_table(f"normalise/{shard}.parquet", columns) for shard in self.label_shards)


@contextmanager
def open_run(
    recipe: Recipe,
    out: str | Path,
    make_executor: Callable[[], BaseExecutor] | None = None,
    progress: Progress | None = None,
) -> Iterator[Run]:
    """Opens the run directory under its lock, refuses one that another recipe has begun, and ends the executor.

    Raises:
        StorageError: the directory cannot be written or is in use.
        RecipeError: finished or begun steps there were made from other settings; lists the differing keys.
    """
    directory = RunDirectory.open(out)
    with directory.lock():
        if swept := directory.sweep():
            logger.info("removed %d unfinished files of an interrupted run", swept)
        run = Run(recipe, directory, make_executor or (lambda: executor_of(recipe, run.n_workers)))
        if progress is not None:
            run.progress = progress
        refuse_other_recipe(run)
        directory.write_text(RECIPE, dump_recipe(recipe))
        try:
            yield run
        finally:
            run.close()


def executor_of(recipe: Recipe, n_workers: int | None = None) -> BaseExecutor:
    """The executor that the recipe names; ``n_workers`` of a local cluster where the recipe does not say."""
    from quadmix_plugin.executors import make_executor

    section = recipe.executor
    options: dict[str, Any] = {}
    if section.name == "dask":
        there = scheduler_of(section)
        keys = ("address", "scheduler_file", "tls_ca", "tls_cert", "tls_key")
        options = {key: getattr(section, key) for key in keys} if there else _local_cluster(section, n_workers)
    return make_executor(section.name, options)


def _local_cluster(section: Executor, n_workers: int | None) -> dict[str, Any]:
    """Options of a cluster on this machine: one worker per core, or per GPU where there are some."""
    workers = section.workers or n_workers
    keys = ("max_workers", "memory_limit", "rmm_pool_size", "protocol")
    options = {"n_workers": workers, **{key: getattr(section, key) for key in keys}}
    if not choose_device(section.device).startswith("cuda"):
        return options
    import torch

    gpus = torch.cuda.device_count()
    if find_spec("dask_cuda") is None:  # workers that share one GPU
        if gpus > 1:
            logger.warning(
                "%d GPUs are here and one is used; `pip install quadmix-plugin[cuda12]` gives each a worker", gpus
            )
        return {**options, "n_workers": workers or 1, "worker_resources": {"GPU": 1}}
    if workers is not None and workers > gpus:
        raise RecipeError(f"executor.workers: {workers} workers for {gpus} GPUs; give at most {gpus}, or leave it out")
    return {**options, "gpu_workers": True}


def trainer_options(run: Run, trainer: str, options: dict) -> dict:
    """The trainer's options, with the device of the recipe unless they name one or the trainer has no such option."""
    has_device = any(option.name == "device" for option in fields(registry.load("trainers", trainer)))
    return {"device": run.recipe.executor.device, **options} if has_device else options


def _proxy_context(recipe: Recipe) -> dict[str, Any]:
    """What proxies read of other sections.

    The final run that they match, the objective by which they are stopped, and what proposes θ between rounds.
    """
    context: dict[str, Any] = {}
    if recipe.proxy.match_epochs:
        context |= {"pretrain.tokens": recipe.pretrain.tokens, "select.target_tokens": recipe.select.target_tokens}
    if recipe.proxy.fidelity != "full":
        context["search.objective"] = recipe.search.objective
    if recipe.search.rounds:
        for name in ("rounds", *_PROPOSING):
            context[f"search.{name}"] = getattr(recipe.search, name)
        context |= {"search.regressor's version": foreign("regressors", recipe.search.regressor)}
        context |= _search_context(recipe)
    return context


def _search_context(recipe: Recipe) -> dict[str, Any]:
    """What the search reads of other sections: the budget that it is held to."""
    return {"select.target_tokens": recipe.select.target_tokens} if recipe.search.at_budget else {}


def fingerprint(value: Any) -> Any:
    """A section with every existing path replaced by the hash of what lies there."""
    if isinstance(value, dict):
        return {key: fingerprint(each) for key, each in value.items()}
    if isinstance(value, list):
        return [fingerprint(each) for each in value]
    if not isinstance(value, str) or not value.startswith("/") or not Path(value).exists():
        return value
    path = Path(value)
    if path.is_file():
        return {"sha256": sha256_file(path)}
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):  # downloads leave caches there
            digest.update(f"{name.as_posix()}\0{sha256_file(file)}\n".encode())
    return {"sha256": digest.hexdigest()}


def files_fingerprint(paths: str | list[str], place: str) -> Any:
    """Names and content of the files behind the path; a name may be that of a task. The path itself while it is bad."""
    try:
        files = list_files(paths, place)
    except InputError:
        return paths
    return [(file.name, file.version if "://" in file.path else sha256_file(Path(file.path))) for file in files]


def refuse_other_recipe(run: Run) -> None:
    """Refuses a run directory whose steps were made from other settings; see ``open_run``."""
    stale = [name for name in STEPS if _has_other_key(run, name)]
    if not stale:
        return
    old = yaml.safe_load(run.directory.read_text(RECIPE) or "{}")
    lines = [
        line
        for line in differing_keys(old or {}, run.recipe.model_dump(mode="json"))
        if not line.startswith("executor.")
    ]
    if sorted(before := (old or {}).get("scorers", {})) == sorted(run.scorers) and tuple(before) != run.scorers:
        lines.append(f"scorers: now in the order {', '.join(run.scorers)}")
    what = (
        "; ".join(lines)
        or "the files that the recipe names, or the versions of other packages' plug-ins, have changed since"
    )
    made = [name for name in STEPS[STEPS.index(stale[0]) :] if run.directory.recorded_keys(name)]
    remove = shlex.join(["rm", "-r", *(f"{run.directory.place}/manifest/{name}" for name in made)])
    raise RecipeError(
        f"{run.directory.place}: the step {stale[0]!r} there was made from other settings ({what}); give another "
        f"--out, or make it anew after: {remove}"
    )


def _has_other_key(run: Run, name: str) -> bool:
    return any(key != run.keys[name] for key in run.directory.recorded_keys(name))


def foreign(group: str, name: str) -> list[str]:
    """Distribution and version of a plug-in that is not of this one: another version may label otherwise."""
    origin = registry.origin(group, name)
    return [] if origin["distribution"] == "quadmix-plugin" else [origin["distribution"], origin["version"]]
