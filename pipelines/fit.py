"""``quadmix fit``: search without training, on any table of inputs and a table of the losses they led to.

The same regressors, evaluation and search as in a run, for mixtures or any other numbers. Everything that can be wrong
with the tables is found before anything is fitted, and nothing is written before all is computed.
"""

import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin import registry
from quadmix_plugin.atomic import atomic_path, write_json
from quadmix_plugin.errors import InputError, UsageError
from quadmix_plugin.parquet import write_parquet
from quadmix_plugin.pipelines.fit_gain import Judged, gain
from quadmix_plugin.search.evaluation import Metrics, bootstrap_intervals, cross_validate
from quadmix_plugin.search.gain import Prediction
from quadmix_plugin.search.objective import Objective
from quadmix_plugin.search.proposals import Method, Proposal, SearchSettings, propose
from quadmix_plugin.search.regressors import Regressor
from quadmix_plugin.search.spaces import mixture_or_box
from quadmix_plugin.search.surrogate import Surrogate, knows_its_error
from quadmix_plugin.search.tables import (
    FitRows,
    Side,
    choose_targets,
    join,
    read_pair,
    read_prior,
    require_learnable,
    require_same_corpus,
    require_unseen,
)
from quadmix_plugin.strict_yaml import read_value

if TYPE_CHECKING:
    from quadmix_plugin.figures import Drawing

Array = NDArray[np.float64]
Progress = Callable[[str, int, int | None], None]

METRICS, OPTIMUM, PREDICTIONS, REGRESSOR = "metrics.json", "optimum.json", "predictions.parquet", "regressor.txt"
FIGURES = "figures"
_REPEATS = 3


@dataclass(frozen=True)
class FitSettings:
    """What ``quadmix fit`` is told; the options of the command have the same names.

    ``targets``: columns of losses, or parts of their names, which weigh equally; none: all. ``options``: of the
    regressor. ``prior``: a JSON file, of mixtures only. ``early_stop_on_test``: the regressor stops by the rows that
    are also reported, as RegMix' notebook did.
    """

    features: Path
    losses: Path
    out: Path
    test_features: Path | None = None
    test_losses: Path | None = None
    targets: tuple[str, ...] = ()
    regressor: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    method: Method = "trust_region"
    draws: int = 100_000
    top: int = 10
    prior: Path | None = None
    seed: int = 0
    folds: int = 5
    early_stop_on_test: bool = False
    drop_unmatched: bool = False
    figures: bool = True

    def __post_init__(self) -> None:
        if (self.test_features is None) != (self.test_losses is None):
            raise InputError("--test-features and --test-losses: one without the other; give both or neither")
        if self.early_stop_on_test and self.test_features is None:
            raise InputError("--early-stop-on-test: there are no test rows; give --test-features and --test-losses")
        if self.folds < 2:
            raise InputError(f"--folds {self.folds}: give at least 2")
        if self.method not in get_args(Method):
            raise InputError(f"--method {self.method!r}: unknown; give {' or '.join(get_args(Method))}")


def fit(settings: FitSettings, progress: Progress = lambda stage, done, total: None) -> dict[str, Any]:
    """Fits, measures, searches, and writes ``metrics.json``, ``optimum.json``, ``predictions.parquet``,
    ``regressor.txt`` and ``figures/`` into ``settings.out``; returns the content of ``metrics.json``.

    Raises:
        InputError: settings, tables or rows that cannot be used, or an ``out`` that holds something else than a former
            fit; before anything is fitted or written.
        RecipeError: an unknown regressor or option of it.
        StorageError: ``out`` cannot be written.
    """  # noqa: D205 - a list of files
    search = SearchSettings(settings.method, settings.draws, settings.top, seed=settings.seed)
    make = _maker(settings)
    former = _former(settings.out)
    train, test = _rows(settings)
    space = mixture_or_box(train.names, train.x, read_prior(settings.prior, train.names) if settings.prior else None)
    with _quiet():
        surrogate = _surrogate(settings, make, train, test, progress)
        judged = _judge(settings, make, surrogate, train, test, progress)
        proposal = propose(
            space,
            train.x,
            train.losses,
            make,
            settings=search,
            surrogate=surrogate,
            progress=lambda done: progress("search", done, settings.draws),
        )
        drawings = _drawings(settings, make, train, judged, surrogate, progress) if settings.figures else []
    metrics = _metrics(settings, train, test, judged, proposal)
    _write(settings.out, former, metrics, judged, proposal, drawings)
    return metrics


def _maker(settings: FitSettings) -> Callable[[], Regressor]:
    def make() -> Regressor:
        return registry.create("regressors", settings.regressor, settings.options, "--set")

    if settings.early_stop_on_test and "held" not in inspect.signature(make().fit).parameters:
        raise InputError(
            f"--early-stop-on-test: the regressor {settings.regressor!r} does not stop early; give lightgbm-published"
        )
    make()  # so that options are checked before any file is read
    return make


def _former(out: Path) -> dict[str, Any] | None:
    """The metrics of a former fit in ``out``; None where there is nothing."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        content = json.loads((out / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or "measured_on" not in content:  # a run's search has metrics.json as well
        raise InputError(f"{out}: not empty, and not of a former fit; give another --out")
    return content


def _rows(settings: FitSettings) -> tuple[FitRows, FitRows | None]:
    sides = read_pair(settings.features, settings.losses)
    targets = choose_targets(sides[1].names, settings.targets, settings.losses)
    train = join(*sides, targets, drop_unmatched=settings.drop_unmatched)
    require_learnable(train, settings.folds, settings.features, settings.losses)
    if settings.test_features is None or settings.test_losses is None:
        return train, None
    test_sides: tuple[Side, Side] = require_same_corpus(train, read_pair(settings.test_features, settings.test_losses))
    test = join(*test_sides, targets, drop_unmatched=settings.drop_unmatched)
    require_unseen(train, test, settings.test_features)
    return train, test


@dataclass
class _StoppedBy:
    """A regressor that stops early by these rows, not by some of those that it is fitted to."""

    regressor: Any
    held: tuple[Array, Array]

    @classmethod
    def of(cls, make: Callable[[], Regressor], held: tuple[Array, Array]) -> "_StoppedBy":
        return cls(make(), held)

    def fit(self, x: ArrayLike, y: ArrayLike) -> None:
        self.regressor.fit(x, y, held=self.held)

    def predict(self, x: ArrayLike) -> Array:
        return self.regressor.predict(x)

    def predict_with_sd(self, x: ArrayLike) -> tuple[Array, Array]:
        return self.regressor.predict_with_sd(x)

    @property
    def knows_its_error(self) -> bool:
        return knows_its_error(self.regressor)

    def to_text(self) -> str:
        return self.regressor.to_text()


def _surrogate(
    settings: FitSettings, make: Callable[[], Regressor], train: FitRows, test: FitRows | None, progress: Progress
) -> Surrogate:
    """Every target fitted on all training rows."""
    regressors: dict[str, Regressor] = {}
    refits: dict[str, list[Regressor]] = {}
    for done, (target, y) in enumerate(train.losses.items()):
        progress("fit", done, len(train.losses))
        held = (test.x, test.losses[target]) if settings.early_stop_on_test and test is not None else None
        maker = make if held is None else partial(_StoppedBy.of, make, held)
        one = {target: y}
        fitted = Surrogate.fit(maker, train.x, one, Objective.of(one), seed=settings.seed)
        regressors |= fitted.regressors
        refits |= fitted.refits
    progress("fit", len(train.losses), len(train.losses))
    return Surrogate(regressors, refits, Objective.of(train.losses))


def _judge(
    settings: FitSettings,
    make: Callable[[], Regressor],
    surrogate: Surrogate,
    train: FitRows,
    test: FitRows | None,
    progress: Progress,
) -> dict[str, Judged]:
    if test is not None:
        predicted = surrogate.losses(test.x)
        return {
            target: Judged(test.keys, y, predicted[target][None], Metrics.of(y, predicted[target]))
            for target, y in test.losses.items()
        }
    repeats = 1 if settings.regressor == "auto" else _REPEATS  # auto cross-validates within each fold as well
    judged = {}
    for done, (target, y) in enumerate(train.losses.items()):
        progress("cross-validation", done, len(train.losses))
        found = cross_validate(make, train.x, {target: y}, folds=settings.folds, repeats=repeats, seed=settings.seed)[
            target
        ]
        judged[target] = Judged(train.keys, y, found.predicted, found.metrics)
    progress("cross-validation", len(train.losses), len(train.losses))
    return judged


def _metrics(
    settings: FitSettings, train: FitRows, test: FitRows | None, judged: Mapping[str, Judged], proposal: Proposal
) -> dict[str, Any]:
    best, space = proposal.best, proposal.space
    regressors = proposal.surrogate.regressors
    chosen = {target: model.chosen for target, model in regressors.items() if hasattr(model, "chosen")}  # type: ignore[attr-defined]
    row = proposal.best_proxy
    return {
        "targets": {
            target: {
                **each.metrics.to_dict(),
                "interval": bootstrap_intervals(each.real, each.predicted, settings.seed),
            }
            for target, each in judged.items()
        },
        "regressor": settings.regressor,
        **({"chosen": chosen} if chosen else {}),
        "options": dict(settings.options),
        "optimum": space.describe(best.point),
        "method": settings.method,
        "measured_on": "cross-validation" if test is None else "test rows",
        **({"early_stopped_on_test": True} if settings.early_stop_on_test else {}),
        "key": train.key,
        "rows": len(train.keys),
        **({"test_rows": len(test.keys)} if test is not None else {}),
        "failed": len(train.failed),
        "unmatched": len(train.unmatched),
        "predicted": {
            target: Prediction(
                best.losses[target], each.error, best.sd.get(target, 0.0), float(each.predicted.mean(axis=0).min())
            ).to_dict()
            for target, each in judged.items()
        },
        "best_row": {"key": train.keys[row.number], "losses": row.losses, "objective": row.objective},
        "ways": {
            name: {"objective": each.objective, "losses": each.losses, "point": space.describe(each.point)}
            for name, each in proposal.ways.items()
        },
        "gain": gain(train, judged, proposal),
    }


def _drawings(
    settings: FitSettings,
    make: Callable[[], Regressor],
    train: FitRows,
    judged: Mapping[str, Judged],
    surrogate: Surrogate,
    progress: Progress,
) -> list["Drawing"]:
    from quadmix_plugin.pipelines.fit_figures import insight_drawings, prediction_drawings

    shown = {target: (each.real, each.predicted.mean(axis=0), each.metrics.spearman) for target, each in judged.items()}
    target = next(iter(train.losses))
    chosen = getattr(surrogate.regressors[target], "chosen", "")
    maker = registry.load("regressors", chosen) if chosen else make  # what auto chose, not its choice over again
    return [*prediction_drawings(shown), *insight_drawings(target, train, maker, settings.seed, progress)]


def _write(
    out: Path,
    former: Mapping[str, Any] | None,
    metrics: dict[str, Any],
    judged: Mapping[str, Judged],
    proposal: Proposal,
    drawings: list["Drawing"],
) -> None:
    """All files, each whole or not at all; ``metrics.json`` last, so that what has it is complete."""
    parts = [
        pa.table({
            "key": each.keys,
            "target": [target] * len(each.keys),
            "real": each.real,
            "predicted": each.predicted.mean(axis=0),
        })
        for target, each in judged.items()
    ]  # fmt: skip
    with atomic_path(out / PREDICTIONS) as temporary:
        write_parquet(pa.concat_tables(parts), temporary)
    write_json(out / OPTIMUM, metrics["optimum"])
    text = "\n".join(f"# {target}\n{model.to_text()}" for target, model in proposal.surrogate.regressors.items())
    with atomic_path(out / REGRESSOR) as temporary:
        temporary.write_text(text, encoding="utf-8")
    metrics[FIGURES] = sorted(path.name for drawing in drawings for path in drawing.save(out / FIGURES))
    for name in set((former or {}).get(FIGURES, [])) - set(metrics[FIGURES]):
        if Path(name).name == name:  # of a former fit with other targets
            (out / FIGURES / name).unlink(missing_ok=True)
    write_json(out / METRICS, metrics)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without scikit-learn's warnings of a kernel's bounds, which are wide and do no harm."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options of a regressor from ``KEY=VALUE`` texts; a value is YAML.

    Raises:
        UsageError: no ``=``, or a value that is no YAML.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            options[key] = read_value(value)
        except yaml.YAMLError:
            equals = ""
        if not (key and equals):
            raise UsageError(f"--set {pair}: give KEY=VALUE of the regressor, such as trees=300")
    return options
