"""The regressors on RegMix' public tables: 512 mixtures of 17 domains, 13 losses, 256 test mixtures.

    OMP_NUM_THREADS=1 python benchmarks/regmix.py FOLDER

First the published procedure, early stopping on the test rows included, against the published numbers; then every
regressor on fewer rows: Spearman ×100 on the test rows, mean over random subsets, the same for all regressors.
``FOLDER`` holds {train,test}_mixture_1m.csv and {train,test}_pile_loss_1m.csv of sail-sg/regmix.
"""

import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from measuring import markdown, progress, report
from numpy.typing import NDArray

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError
from quadmix_plugin.pipelines.fit import FitSettings, fit
from quadmix_plugin.search.evaluation import Metrics
from quadmix_plugin.search.spaces import MixtureSpace
from quadmix_plugin.search.tables import FitRows, choose_targets, join, read_pair, read_prior

SIZES = (32, 64, 128, 256, 512)
TARGET = "metric/the_pile_pile_cc_val_loss"
PRIOR = Path(__file__).with_name("regmix_prior.json")
PUBLISHED = (99.60, 99.71, 99.08, 99.45, 97.20, 99.77, 99.73, 99.18, 98.92, 96.87, 98.51, 99.19, 99.12)
OPTIMUM = {"pile_cc": 0.8909, "ubuntu_irc": 0.0614, "pubmed_abstracts": 0.0123}


class Plan(NamedTuple):
    """How many subsets a regressor gets, by size, and up to how many rows it gets all 13 losses."""

    subsets: dict[int, int]
    all_until: int = 512


FIVE = dict.fromkeys(SIZES[:-1], 5)
PLANS = {
    "lightgbm-published": Plan(FIVE),
    "lightgbm": Plan(FIVE),
    "svr-linear": Plan(dict.fromkeys(SIZES[:-1], 2)),
    "svr-rbf": Plan(dict.fromkeys(SIZES[:-1], 2)),
    "gp": Plan({**FIVE, 256: 2}),
    "auto": Plan(FIVE, all_until=64),
}


def tables(folder: Path) -> tuple[FitRows, FitRows]:
    """Training and test rows, all 13 losses."""
    both = []
    for part in ("train", "test"):
        features, losses = read_pair(folder / f"{part}_mixture_1m.csv", folder / f"{part}_pile_loss_1m.csv")
        both.append(join(features, losses, choose_targets(losses.names, (), losses.path)))
    return both[0], both[1]


def spearman(
    name: str, train: FitRows, test: FitRows, target: str, rows: NDArray[np.int64], stop_on_test: bool = False
) -> float:
    """×100 on the test rows; NaN where the regressor cannot be fitted to so few rows."""
    model = registry.create("regressors", name)
    held = {"held": (test.x, test.losses[target])} if stop_on_test else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's, of length scales at their bounds
            model.fit(train.x[rows], train.losses[target][rows], **held)
    except InputError:
        return float("nan")
    return 100 * Metrics.of(test.losses[target], model.predict(test.x)).spearman


def by_rows(train: FitRows, test: FitRows) -> list[str]:
    """A table of means for Pile-CC, and one of all losses."""
    found: dict[tuple[int, str, str], float] = {}
    counts: dict[tuple[int, str], int] = {}
    for size in SIZES:
        for name, plan in PLANS.items():
            began = time.monotonic()
            subsets = plan.subsets.get(size, 1)
            chosen = [np.sort(np.random.default_rng(seed).permutation(512)[:size]) for seed in range(subsets)]
            counts[size, name] = subsets
            for target in train.losses if size <= plan.all_until else (TARGET,):
                found[size, name, target] = float(
                    np.mean([spearman(name, train, test, target, rows) for rows in chosen])
                )
            progress(f"{size} rows, {name}: {time.monotonic() - began:.0f} s, {found[size, name, TARGET]:.2f}")
    first = [[name, *(_shown(found[size, name, TARGET]) for size in SIZES)] for name in PLANS]
    second = [
        [f"{size}, {name}", str(counts[size, name]), *(_shown(found[size, name, target]) for target in train.losses)]
        for size in SIZES
        for name, plan in PLANS.items()
        if size <= plan.all_until
    ]
    return [
        "Pile-CC, Spearman ×100 on the 256 test rows by rows fitted on, mean of as many subsets as below:\n\n"
        + markdown(["regressor", *(f"{size} rows" for size in SIZES)], first),
        "All losses; –: refused, early stopping leaves fewer than the 40 rows that two leaves need:\n\n"
        + markdown(["rows, regressor", "subsets", *_titles(train)], second),
    ]


def published(folder: Path, train: FitRows, test: FitRows) -> list[str]:
    """The published settings: all 13 losses, stopped on the test rows or by an inner split, and the optimum."""
    rows = [["published", *(f"{value:.2f}" for value in PUBLISHED)]]
    everything = np.arange(len(train.keys))
    for name, leak in (
        ("stopped on the test rows, as published", True),
        ("stopped on a tenth of the training rows", False),
    ):
        found = [
            spearman("lightgbm-published", train, test, target, everything, stop_on_test=leak)
            for target in train.losses
        ]
        rows.append([name, *map(_shown, found)])
    points = {
        "NumPy's default stream": _fitted_optimum(folder),
        "NumPy's old stream, as published": _optimum_of_old_stream(train, test),
    }
    shares = [["published", *(f"{value:.4f}" for value in OPTIMUM.values())]]
    shares += [[name, *(f"{at[f'train_the_pile_{domain}']:.4f}" for domain in OPTIMUM)] for name, at in points.items()]
    return [
        "The published settings, Spearman ×100:\n\n" + markdown(["", *_titles(train)], rows),
        "The optimum for Pile-CC, mean of the best 128 of 100,000 draws:\n\n" + markdown(["", *OPTIMUM], shares),
    ]


def _fitted_optimum(folder: Path) -> dict[str, float]:
    """By ``quadmix fit``."""
    with tempfile.TemporaryDirectory() as out:
        return fit(
            FitSettings(
                *(folder / f"train_{kind}_1m.csv" for kind in ("mixture", "pile_loss")),
                Path(out),
                *(folder / f"test_{kind}_1m.csv" for kind in ("mixture", "pile_loss")),
                (TARGET,),
                regressor="lightgbm-published",
                method="paper",
                top=128,
                prior=PRIOR,
                seed=42,
                early_stop_on_test=True,
                figures=False,
            )
        )["optimum"]


def _optimum_of_old_stream(train: FitRows, test: FitRows) -> dict[str, float]:
    """With the draws of the notebook itself."""
    model = registry.create("regressors", "lightgbm-published")
    model.fit(train.x, train.losses[TARGET], held=(test.x, test.losses[TARGET]))
    space = MixtureSpace(train.names, read_prior(PRIOR, train.names), legacy=True)
    draws = np.concatenate([points for _, points in space.draw(100_000, 42)])
    best = np.argsort(model.predict(draws), kind="stable")[:128]
    return space.describe(draws[best].mean(axis=0))


def _titles(rows: FitRows) -> list[str]:
    return [target.removeprefix("metric/the_pile_").removesuffix("_val_loss") for target in rows.losses]


def _shown(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    only: Annotated[str | None, typer.Option(help="published or rows.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also writes the report here.")] = None,
) -> None:
    """Prints the report."""
    train, test = tables(folder)
    sections = published(folder, train, test) if only != "rows" else []
    sections += by_rows(train, test) if only != "published" else []
    report("Regressors on RegMix' tables", sections, out)


if __name__ == "__main__":
    typer.run(main)
