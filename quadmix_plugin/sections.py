"""The sections of a recipe: every key with its type, its bounds and its default. docs/recipe.md says what each does.

A section is data without paths resolved or plug-ins looked up; ``config`` reads, completes and checks whole recipes.
"""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from quadmix_plugin.paper_tasks import SUITE
from quadmix_plugin.parameters import ParameterSpace

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Options = dict[str, Any]

_SIZE = r"^[0-9]+(\.[0-9]+)? ?([kKMGT]i?)?B?$"
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
    min_signal_to_noise: float = Field(default=1.2, ge=0)
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
    compared: list[str] = Field(default_factory=lambda: ["gp", "lightgbm", "svr-linear", "svr-rbf"])
    """Regressors whose error against the number of proxies is measured and drawn."""
    rounds: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Proxies of each round: the first are drawn, later ones proposed by the fit so far; empty: all are drawn."""

    @model_validator(mode="after")
    def _enough_draws(self) -> "Search":
        if self.top > self.draws:
            raise ValueError(f"top {self.top} of {self.draws} draws; average fewer, or draw more")
        return self

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
    """The selection under θ*."""

    target_tokens: int | None = Field(default=None, ge=1)
    """Scales every ω by one factor to reach this many tokens; None leaves θ* as it is."""
    theta: str | None = None
    """A theta.json to use in place of this run's own search."""


class Export(Section):
    """What is written of the selection beside its token files."""

    text: bool = False
    """The selected documents as Parquet too, with their copies and the reasons; may be asked for later."""


class Pretrain(Section):
    """The models trained on θ*'s selection, one per seed, and in a comparison on every other."""

    tokens: int = Field(default=500_000_000_000, ge=1)
    seeds: list[Seed] = Field(default_factory=lambda: [1, 2], min_length=1)
    """One model each; a comparison needs two for a verdict."""
    trainer: str = "megatron"
    options: Options = Field(default_factory=dict)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed is given twice; each names a model of its own")
        return value


class Compare(Section):
    """Selections by other methods beside that of θ*, at one budget, and the same models trained on each."""

    tokens: int | None = Field(default=None, ge=1)
    """The budget of every selection, copies counted; None: as many as θ*'s selection has."""
    selectors: dict[Name, Options] = Field(default_factory=lambda: {"random": {}})
    """A name → the options of its ``selector``, and ``times``, a factor on the budget."""

    @field_validator("selectors")
    @classmethod
    def _free_names(cls, value: dict[str, Options]) -> dict[str, Options]:
        if "quadmix" in value:
            raise ValueError("'quadmix' stands for the selection of θ* itself; choose another name")
        for name, options in value.items():
            times = options.get("times", 1)
            if isinstance(times, bool) or not isinstance(times, int | float) or not 0 < times < float("inf"):
                raise ValueError(f"{name}.times: {times!r}; give a factor on the budget, a number above 0")
        return value


class LocalQuestions(Section):
    """Questions in files of one's own, as a benchmark that needs no network."""

    path: str | list[str]
    """JSON Lines or Parquet: a file, a folder, a glob, or a list of them."""
    kind: Literal["multiple_choice", "bits_per_byte", "exact_match"] | None = None
    """None: ``multiple_choice`` where there is a column of choices, else ``bits_per_byte``."""
    prompt: str | None = "prompt"
    """Column of the question; None: the text stands alone."""
    choices: str = "choices"
    answer: str = "answer"
    """Column of the index of the right choice, from 0."""
    response: str = "response"
    """Column of the text whose bits are counted, or of the answer, or list of answers, that must be generated."""
    mask_prompt: bool = True
    """Bits of the response given the prompt, or of both together."""
    delimiter: str = " "
    """Between prompt and choice or response."""
    fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question, other rows of the same files; None: ``evaluate.fewshot``."""


class Evaluate(Section):
    """Benchmarks of lm-evaluation-harness for every trained model; without tasks there are none."""

    tasks: dict[str, Annotated[int, Field(ge=0)] | None] = Field(default_factory=dict)
    """Names of the harness or of ``task_folder``, a list or name → examples before each question; None: as the task
    says. ``paper`` stands for the paper's nine."""
    local: dict[Name, LocalQuestions] = Field(default_factory=dict)
    """Name → questions in files of one's own."""
    task_folder: str | None = None
    """A folder with YAML files of tasks of one's own."""
    fewshot: int | None = Field(default=None, ge=0)
    """Examples before each question where nothing else is said; None: as each task says, and none for local ones."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many questions of each task."""
    batch_size: int = Field(default=8, ge=1)
    """Requests at a time; no influence on the scores beyond rounding."""

    @model_validator(mode="before")
    @classmethod
    def _listed_tasks(cls, content: Any) -> Any:
        """A list of names as the mapping that it stands for."""
        tasks = content.get("tasks") if isinstance(content, dict) else None
        if tasks is None or isinstance(tasks, dict):
            return content
        if not isinstance(tasks, list) or not all(isinstance(name, str) for name in tasks):
            raise ValueError(f"tasks is {tasks!r}; give a list of names, or a mapping of names to examples")
        if twice := [name for name, times in Counter(tasks).items() if times > 1]:
            raise ValueError(f"tasks: {twice[0]!r} is given twice; name it once")
        fewshot = content.get("fewshot")
        return {**content, "tasks": {name: None if name == SUITE else fewshot for name in tasks}}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is evaluated."""
        return not self.tasks and not self.local


class Executor(Section):
    """Where the work runs; apart from the device it has no influence on any result."""

    name: Literal["inline", "dask", "ray_data", "xenna"] = "dask"
    workers: int | None = Field(default=None, ge=1)
    """Worker processes; None: one per core, or one per GPU."""
    max_workers: int | None = Field(default=None, ge=1)
    """Dask starts further workers, up to so many, while there is work for them."""
    address: str | None = None
    """An existing Dask scheduler: tls://host:port, or tcp:// on this machine."""
    scheduler_file: str | None = None
    """The file that an existing Dask scheduler wrote, in place of its address."""
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    """PEM files for TLS with an existing scheduler; None: as Dask's own configuration says."""
    rmm_pool_size: Annotated[str, Field(pattern=_SIZE)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of each GPU worker, for cupy: a size such as 20GB, or a share of its memory; None: no pool."""
    protocol: Literal["tcp", "ucx"] = "tcp"
    """Between GPU workers."""
    memory_limit: str = Field(default="auto", pattern=rf"^auto$|{_SIZE}")
    """Of each Dask worker: ``auto`` shares the machine's memory; or a size such as 4GiB."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _one_place(self) -> "Executor":
        given = [key for key in ("address", "scheduler_file") if getattr(self, key) is not None]
        if len(given) == 2:
            raise ValueError("address and scheduler_file are both given; leave one of them out")
        for key in ("workers", "max_workers", "rmm_pool_size") if given else ():
            if getattr(self, key) is not None:
                raise ValueError(f"{key} is given, and the workers behind {given[0]} are there already; leave it out")
        return self
