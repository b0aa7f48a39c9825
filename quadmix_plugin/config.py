"""Recipes: one YAML file that says what a run does, checked whole before any work starts.

A recipe is data: ``yaml.safe_load`` with duplicate keys refused, no names of code to import, strict types. Paths
are relative to the recipe's folder. A fault is one line with the place, the value and the remedy.
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from quadmix_plugin.errors import RecipeError
from quadmix_plugin.parameters import ParameterSpace
from quadmix_plugin.strict_yaml import read_mapping

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Options = dict[str, Any]

_FIRST_ROUND = 8  # proxies, as many as a search needs in all


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Corpus(Section):
    """The documents: Parquet or JSON Lines (.jsonl, .jsonl.gz, .jsonl.zst)."""

    path: str | list[str]
    """A file, a folder, a glob, or a list of them; any fsspec path."""
    id: str | None = None
    """Column with unique document ids; without it ids are made from file name and row."""
    text: str = "text"
    documents_per_shard: int = Field(default=2000, ge=1)
    """The unit of parallel work and of resuming."""
    invalid_rows: Literal["error", "drop"] = "error"
    """What to do with a null text."""


class Tokenizer(Section):
    """The tokenizer that counts tokens and writes token files."""

    model: str
    """A folder with tokenizer.json, or a hub id."""
    revision: str | None = None
    eod: str = "<|endoftext|>"
    """The token that ends a document."""
    estimate: bool = False
    """Counts tokens in a sample of each document; the error is measured on every 64th and reported."""


class DomainSection(Section):
    """How documents get their domain; further keys are options of the classifier."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    classifier: str = "nvidia-domain"
    top_k: int = Field(default=0, ge=0)
    """Keeps the so many most probable domains of each document, with their probabilities, in labels/."""

    @property
    def options(self) -> Options:
        """The options of the classifier."""
        return {key: value for key, value in self.model_dump().items() if key not in ("classifier", "top_k")}


class Normalise(Section):
    """σ."""

    method: Literal["ecdf", "zscore", "minmax"] = "ecdf"
    frozen: str | None = None
    """A normaliser.json to use unchanged, so that shards added to a corpus keep the scale of the first ones."""
    invalid_scores: Literal["error", "drop"] = "error"
    """What to do with a document whose score is missing, NaN or infinite."""


class Rank(Section):
    """Eq. 2."""

    method: Literal["histogram", "exact", "subset"] = "histogram"
    ties: Literal["paper", "mid", "hash"] = "paper"
    bins: int = Field(default=2048, ge=16, le=65536)
    """Bins of each domain, for ``histogram``."""
    subset_documents: int = Field(default=10_000, ge=1)
    """Size of the subset, for ``subset``."""
    subset_per_domain: bool = True
    """So many documents of each domain, or in all."""
    frozen: str | None = None
    """A rank_map.parquet of an earlier run, to which these documents are ranked."""
    merge_small_domains: int = Field(default=0, ge=0)
    """Domains with fewer tokens than this are folded into one domain, ``other``."""


class Space(Section):
    """The ranges of Algorithm 1."""

    lam_min: float = Field(default=1.0, gt=0)
    lam_max: float = Field(default=1000.0, gt=0)
    omega_max: float = Field(default=0.1, gt=0, le=1)
    eta_max: float = Field(default=1.0, ge=0)
    epsilon_max: float = Field(default=0.001, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> "Space":
        if self.lam_max < self.lam_min:
            raise ValueError(f"lam_max {self.lam_max} is below lam_min {self.lam_min}")
        return self

    def to_parameter_space(self) -> ParameterSpace:
        """The same ranges as Algorithm 1 takes them."""
        return ParameterSpace(**self.model_dump())


class Validation(Section):
    """Questions and answers whose loss is the target; JSON Lines or Parquet."""

    path: str | list[str]
    prompt: str = "prompt"
    response: str = "response"
    task: str | None = "task"
    """Column that names the task of a row; None makes one task of each file."""
    mask_prompt: bool = True
    """Loss on the response only."""
    rows_per_task: int | None = Field(default=None, ge=2)
    """At most so many rows of each task, chosen by hash."""


class Proxy(Section):
    """The proxy models."""

    number: int = Field(default=3000, ge=8)
    tokens: int = Field(default=1_000_000_000, ge=1)
    """Tokens that each proxy is trained on."""
    repeats: int = Field(default=3, ge=2)
    """Seeds of each repeated θ, for the noise estimate; the first is that of the proxy itself."""
    repeated: int = Field(default=3, ge=1)
    """How many θ are repeated, the first drawn."""
    baselines: int = Field(default=1, ge=0)
    """Seeds of the proxies trained on Random and on the top-k of each scorer; the gain of θ* is held against them."""
    match_epochs: bool = False
    """Proxies see their documents as often as the final run does: they keep a part of what θ selects."""
    curve_at: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=lambda: [0.1, 0.25, 0.5])
    """Shares of a proxy's tokens at which its losses are measured too, to see how early ranks hold."""
    fidelity: Literal["full", "successive_halving"] = "full"
    """Every proxy is trained to its end, or hopeless ones are stopped at the shares of ``curve_at``."""
    pilot: int | None = Field(default=None, ge=8)
    """Proxies trained in full before any is stopped; None is a quarter of them, at least 16."""
    per_gpu: int = Field(default=1, ge=1)
    """Proxies that train on one GPU at once, each in a process of its own."""
    draws: Literal["common", "independent"] = "common"
    """All θ share the uniforms of the draw, or each has its own."""
    pool: Literal["whole", "thinned"] = "whole"
    """Every document is tokenised, or only those that a proxy of so few tokens can need."""
    trainer: str = "torch"
    options: Options = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_pool(self) -> "Proxy":
        if self.pool == "thinned" and self.draws == "independent":
            raise ValueError("pool 'thinned' holds the documents of one draw; set draws: common, or pool: whole")
        if self.pool == "thinned" and self.match_epochs:
            raise ValueError("match_epochs needs all documents that θ selects; set pool: whole")
        return self

    @model_validator(mode="after")
    def _enough_proxies(self) -> "Proxy":
        if self.repeated > self.number:
            raise ValueError(f"repeated {self.repeated} of {self.number} proxies; repeat fewer")
        if self.fidelity == "successive_halving" and not self.curve_at:
            raise ValueError("successive_halving stops proxies at the shares of curve_at; give at least one")
        if self.fidelity == "successive_halving" and self.pilots >= self.number:
            raise ValueError(f"successive_halving trains {self.pilots} of {self.number} in full first; lower pilot")
        return self

    @property
    def pilots(self) -> int:
        """Proxies trained in full before any is stopped."""
        return max(self.pilot or max(self.number // 4, 16), self.repeated)


class Search(Section):
    """From losses to θ*."""

    objective: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Weight of each task's standardised loss; empty: all tasks equally."""
    min_signal_to_noise: float = Field(default=1.0, ge=0)
    """Tasks below it have no weight, unless all are; 0 lets noise have its say."""
    regressor: str = "auto"
    options: Options = Field(default_factory=dict)
    features: Literal["theta", "theta+derived"] = "theta+derived"
    method: Literal["trust_region", "paper"] = "trust_region"
    """From the mean of the best draws into a trust region around it, or that mean itself."""
    draws: int = Field(default=100_000, ge=100)
    top: int = Field(default=10, ge=1)
    average: Literal["unit", "paper"] = "unit"
    trust_radius: float = Field(default=0.2, gt=0)
    """Of the trust region, as a share of the distance of a draw from the middle of the space."""
    pessimism: float = Field(default=1.0, ge=0)
    """Standard deviations of its error that are added to a prediction in the trust region."""
    exclude_scorers: list[Name] = Field(default_factory=list)
    """Scorers whose weight in θ* is 0 in every domain."""
    at_budget: bool = False
    """Every θ is scaled to ``select.target_tokens`` before its loss is predicted."""
    folds: int = Field(default=5, ge=2)
    rounds: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Proxies of each round: the first are drawn, later ones proposed by the fit so far; empty: all are drawn."""

    @field_validator("rounds")
    @classmethod
    def _first_round(cls, value: list[int]) -> list[int]:
        if value and value[0] < _FIRST_ROUND:
            raise ValueError(f"the first of {len(value)} rounds has {value[0]} proxies; give at least {_FIRST_ROUND}")
        return value

    @field_validator("objective")
    @classmethod
    def _some_weight(cls, value: dict[str, float]) -> dict[str, float]:
        if value and not any(value.values()):
            raise ValueError("all weights are 0; give at least one task a positive weight")
        return value


class Select(Section):
    """The selection under θ* and the methods it is compared with."""

    target_tokens: int | None = Field(default=None, ge=1)
    """Scales every ω by one factor to reach this many tokens; None leaves θ* as it is."""
    theta: str | None = None
    """A theta.json to use in place of this run's own search."""
    compare: dict[Name, Options] = Field(default_factory=lambda: {"random": {}})
    """Other selections at the same budget of unique tokens: a name and the options of its ``selector``."""

    @field_validator("compare")
    @classmethod
    def _free_names(cls, value: dict[str, Options]) -> dict[str, Options]:
        for name in ("quadmix", "train"):
            if name in value:
                raise ValueError(f"{name!r} stands for the selection of θ* itself; choose another name")
        return value


class Pretrain(Section):
    """The models trained on each selection, for the comparison."""

    tokens: int = Field(default=500_000_000_000, ge=1)
    seeds: list[Seed] = Field(default_factory=lambda: [1, 2], min_length=2)
    trainer: str = "torch"
    options: Options = Field(default_factory=dict)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed is given twice; each names a model of its own")
        return value


class Executor(Section):
    """Where the work runs; apart from the device it has no influence on any result."""

    name: Literal["inline", "dask", "ray_data", "xenna"] = "dask"
    workers: int | None = Field(default=None, ge=1)
    """Worker processes; None: one per core."""
    address: str | None = None
    """An existing Dask scheduler."""
    memory_limit: str = Field(default="auto", pattern=r"^(auto|[0-9]+(\.[0-9]+)? ?([kKMGT]i?)?B?)$")
    """Of each Dask worker: ``auto`` shares the machine's memory; or a size such as 4GiB."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Recipe(Section):
    """A whole run. See ``quadmix init`` for a commented one."""

    name: Name
    seed: Seed = 0
    corpus: Corpus
    tokenizer: Tokenizer
    domain: DomainSection
    scorers: dict[Name, Options] = Field(min_length=1)
    """Name → options of that scorer; ``scorer:`` among them when the name is not the plug-in's."""
    normalise: Normalise = Normalise()
    rank: Rank = Rank()
    space: Space = Space()
    validation: Validation
    proxy: Proxy = Proxy()
    search: Search = Search()
    select: Select = Select()
    pretrain: Pretrain = Pretrain()
    executor: Executor = Executor()

    @model_validator(mode="after")
    def _search_fits(self) -> "Recipe":
        if unknown := [name for name in self.search.exclude_scorers if name not in self.scorers]:
            raise ValueError(f"search.exclude_scorers: {unknown[0]!r} is not among scorers ({', '.join(self.scorers)})")
        if len(set(self.search.exclude_scorers)) == len(self.scorers):
            raise ValueError("search.exclude_scorers: every scorer is excluded; leave at least one")
        if self.search.at_budget and self.select.target_tokens is None:
            raise ValueError("search.at_budget needs select.target_tokens, the budget that it searches at")
        return self

    @field_validator("search")
    @classmethod
    def _rounds_of_proxies(cls, value: Search, info: ValidationInfo) -> Search:
        proxy, rounds = info.data.get("proxy"), value.rounds
        if not rounds or proxy is None:
            return value
        if sum(rounds) != proxy.number:
            raise ValueError(
                f"rounds {rounds} are {sum(rounds)} proxies, proxy.number is {proxy.number}; set proxy.number: "
                f"{sum(rounds)}, or other rounds"
            )
        if proxy.fidelity == "successive_halving":
            raise ValueError(
                "rounds propose θ unlike the draws of Algorithm 1 that successive_halving takes its thresholds from; "
                "set proxy.fidelity: full, or leave rounds out"
            )
        if proxy.repeated > rounds[0]:
            raise ValueError(
                f"proxy.repeated is {proxy.repeated}, the first round has {rounds[0]} proxies; repeat fewer of them"
            )
        return value


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe; ``overrides`` are ``key.key=value`` pairs of ``--set``. Paths come out absolute.

    Raises:
        RecipeError: no such file, not YAML, a key given twice, unknown (with the nearest) or missing, or a value of
            the wrong type; plug-in names and their options are checked as well.
    """
    path = Path(path)
    content = read_mapping(path)
    for override in overrides or []:
        _override(content, override)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_explain(error)}") from error
    recipe = _with_absolute_paths(recipe, path.absolute().parent)
    _check_plugins(recipe, path)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, each as ``key: old → new``."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} → {after!r}")
    return lines


def scorer_plugin(name: str, options: Options) -> tuple[str, Options]:
    """The plug-in behind an entry of ``scorers`` (or ``select.compare``) and its options."""
    rest = {key: value for key, value in options.items() if key not in ("scorer", "selector")}
    return str(options.get("scorer", options.get("selector", name))), rest


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: give key=value, such as proxy.number=64")
    target = content
    *parents, last = key.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise RecipeError(f"--set {override}: {parent!r} holds a value, not a section")
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML; quote it") from error


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    where = ".".join(loc) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        return f"{where}: unknown key; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")
    if first["type"] == "missing":
        return f"{where}: missing; give a value"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}; found {first['input']!r}"


def _known_keys(loc: list[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in loc:
        field = model.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return sorted(model.model_fields)


def _with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(each) for each in value]
        return os.path.normpath(base / value) if isinstance(value, str) and "://" not in value else value

    def model(value: Any) -> Any:
        """A model is a folder where one of that name is there or it is written like a path; otherwise a hub id."""
        looks_like_path = str(value).startswith((".", "/")) or (base / str(value)).exists()
        return absolute(value) if looks_like_path else value

    content = recipe.model_dump()
    for section in ("corpus", "validation"):
        content[section]["path"] = absolute(content[section]["path"])
    for section, key in (("normalise", "frozen"), ("rank", "frozen"), ("select", "theta")):
        if content[section][key]:
            content[section][key] = absolute(content[section][key])
    for options in content["select"]["compare"].values():
        if options.get("theta"):
            options["theta"] = absolute(options["theta"])
    for options in (content["tokenizer"], content["domain"], *content["scorers"].values()):
        if options.get("model"):
            options["model"] = model(options["model"])
    return Recipe.model_validate(content)


def _check_plugins(recipe: Recipe, path: Path) -> None:
    from quadmix_plugin import registry

    registry.create("domain_classifiers", recipe.domain.classifier, recipe.domain.options, f"{path}: domain")
    for name, given in recipe.scorers.items():
        plugin, rest = scorer_plugin(name, given)
        registry.create("scorers", plugin, rest, f"{path}: scorers.{name}")
    for name, given in recipe.select.compare.items():
        plugin, rest = scorer_plugin(name, given)
        registry.create("selectors", plugin, rest, f"{path}: select.compare.{name}")
        scorer = rest.get("scorer_name")
        if scorer is not None and scorer not in recipe.scorers:
            raise RecipeError(
                f"{path}: select.compare.{name}.scorer_name: {scorer!r} is not among scorers "
                f"({', '.join(recipe.scorers)})"
            )
    registry.create("regressors", recipe.search.regressor, recipe.search.options, f"{path}: search.options")
    registry.create("trainers", recipe.proxy.trainer, recipe.proxy.options, f"{path}: proxy.options")
    registry.create("trainers", recipe.pretrain.trainer, recipe.pretrain.options, f"{path}: pretrain.options")
