"""The report of a run: one self-contained HTML page that says what was done and whether it helped.

``render`` turns a ``ReportData`` into the page. It reads no files and trains nothing; whoever has the run directory
fills ``ReportData``. A part whose data is None is left out, and the page says which step has not run. The page loads
nothing, runs nothing and escapes every name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin import figures
from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.verdict import OBJECTIVE, RULE, Verdict, judge

LOSS_PREFIX = "loss_"


@dataclass(frozen=True)
class StepRows:
    """One step: documents in = kept + dropped by reason; ``seconds`` is None when not measured."""

    name: str
    rows_in: int
    rows_kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class ScoreHistogram:
    """Tokens per bin of one scorer: ``edges`` [b + 1]; ``before`` [b]; ``after`` [b] counts copies, None if none.

    ``kind`` is "raw" or "normalised" (σ, smaller = better).
    """

    scorer: str
    kind: str
    edges: NDArray[np.float64]
    before: NDArray[np.float64]
    after: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class SearchOutcome:
    """What the search found; losses are values of the objective, Σ weight·loss / Σ weight over the tasks.

    ``weights``: task → weight. ``predicted`` of θ*; ``best_observed`` among the proxies and that proxy's number.
    ``facts``: anything else worth a row (regressor, draws predicted, draws averaged, scale of ω).
    """

    weights: Mapping[str, float]
    predicted: float
    best_observed: float | None = None
    best_proxy: int | None = None
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class SelectorShares:
    """One selector's selection: tokens with copies per domain, and its overlap with the selection of θ*.

    ``overlap``: unique tokens in both / unique tokens of this selector, in [0, 1].
    """

    selector: str
    domain_tokens: Mapping[str, float]
    overlap: float | None = None


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything a report shows. None means that the step has not run, and its section says so.

    Tables (pyarrow), columns in the order of use; losses in nats per token:
        domains: domain, documents_before, tokens_before; and after selection documents_after (unique), tokens_after
            (copies counted), unique_tokens_after.
        predictions: proxy, task, real, predicted (out-of-fold).
        results: selector, seed, loss_<task>…, tokens_seen, unique_tokens, epochs, seconds; optionally objective,
            which is otherwise the weighted mean of the losses.
        curves: selector, seed, step, tokens_seen, train_loss.
    """

    title: str
    created_from: Mapping[str, str] = field(default_factory=dict)
    """What the report was made from: name → hash, such as recipe, theta.json."""
    steps: Sequence[StepRows] | None = None
    domains: pa.Table | None = None
    scores: Sequence[ScoreHistogram] | None = None
    theta: Parameters | None = None
    """θ*."""
    predictions: pa.Table | None = None
    metrics: Mapping[str, Mapping[str, float]] | None = None
    """Cross-validated, per task (and "objective"): spearman, mae, and what else was measured."""
    noise: Mapping[str, Mapping[str, Any]] | None = None
    """Per task: theta_sd, noise_sd, signal_to_noise, repeats, and ``agreement`` of ranks before the end, in words."""
    search: SearchOutcome | None = None
    results: pa.Table | None = None
    selections: Sequence[SelectorShares] | None = None
    curves: pa.Table | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions, hashes, seeds, hardware, seconds per step; values may be mappings of their own."""
    warnings: Sequence[str] = ()
    quadmix: str = "quadmix"
    """The selector that stands for θ* in ``results``, ``selections`` and ``curves``."""


@dataclass(frozen=True)
class Figure:
    """An SVG of ``figures`` and whether it may shrink below its size (small ones) or scrolls instead."""

    svg: str
    label: str
    wide: bool = False


def render(data: ReportData) -> str:
    """The whole page as HTML text; equal data gives equal text.

    Raises:
        InputError: a table without one of its columns, or steps whose rows do not add up.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quadmix_plugin", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: figures.plain(value) if type(value) is str else value,
    )
    environment.filters |= {"tokens": _tokens, "duration": _duration, "number": _number}
    environment.filters |= {"loss": partial(_number, form=".4f"), "signed": partial(_number, form="+.4f")}
    results = _results(data)
    verdict = judge(results["losses"], data.quadmix) if results else None
    context = {
        "data": data,
        "rule": RULE,
        "verdict": verdict,
        "steps": _steps(data.steps),
        "domains": _domains(data),
        "scores": _scores(data.scores),
        "weights": data.theta and Figure(figures.merge_weights(data.theta), "Merge weights per domain", wide=True),
        "sampling": _sampling(data.theta),
        "predictions": _predictions(data),
        "results": results,
        "tasks": _tasks(verdict),
        "curves": _curves(data),
        "provenance": _flat(data.provenance),
        "warnings": [*data.warnings, *_unequal(results)],
    }
    return environment.get_template("report.html.j2").render(context) + "\n"


def _column(table: pa.Table, name: str, where: str) -> list[Any]:
    if name not in table.column_names:
        raise InputError(
            f"report: {where} has no column {name!r}; found {', '.join(table.column_names)}; run its step again"
        )
    return table[name].to_pylist()


def _steps(steps: Sequence[StepRows] | None) -> list[StepRows] | None:
    for step in steps or ():
        if step.rows_in != step.rows_kept + sum(step.dropped.values()):
            raise InputError(
                f"report: step {step.name!r} has {step.rows_in} rows in, {step.rows_kept} kept and "
                f"{sum(step.dropped.values())} dropped, which does not add up; run the step again"
            )
    return list(steps) if steps is not None else None


def _domains(data: ReportData) -> dict[str, Any] | None:
    """Rows per domain, largest first, with shares in percent; the figure when there is an after."""
    if data.domains is None or data.domains.num_rows == 0:
        return None
    table = {name: _column(data.domains, name, "domains") for name in ("domain", "documents_before", "tokens_before")}
    after = "tokens_after" in data.domains.column_names
    if after:
        names = ("documents_after", "tokens_after", "unique_tokens_after")
        table |= {name: _column(data.domains, name, "domains") for name in names}
    totals = {name: sum(values) for name, values in table.items() if name != "domain"}
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    for row in rows:
        row["share_before"] = 100 * row["tokens_before"] / (totals["tokens_before"] or 1)
        if after:
            row["share_after"] = 100 * row["tokens_after"] / (totals["tokens_after"] or 1)
            row["epochs"] = row["tokens_after"] / row["unique_tokens_after"] if row["unique_tokens_after"] else None
    rows.sort(key=lambda row: (-row["tokens_before"], row["domain"]))
    figure = None
    if after:
        shares = [[row[name] for row in rows] for name in ("share_before", "share_after")]
        svg = figures.domain_shares([row["domain"] for row in rows], *shares)
        figure = Figure(svg, "Domain shares before and after", wide=True)
    return {"rows": rows, "totals": totals, "after": after, "figure": figure}


def _scores(scores: Sequence[ScoreHistogram] | None) -> list[Figure] | None:
    if not scores:
        return None
    return [
        Figure(figures.score_histogram(s.scorer, s.kind, s.edges, s.before, s.after), f"{s.kind} {s.scorer}")
        for s in sorted(scores, key=lambda s: s.kind != "raw")
    ]


def _sampling(theta: Parameters | None) -> dict[str, Any] | None:
    """A curve per domain on shared axes, and the numbers behind it."""
    if theta is None:
        return None
    from quadmix_plugin.sampling import sampling_value

    domains = np.arange(theta.n_domains)
    best = sampling_value(np.full(theta.n_domains, np.finfo(np.float64).tiny), domains, theta)
    limits = min(1.0, 1.15 * float(theta.omega.max())), max(1.0, 1.1 * float(best.max()))
    names = theta.domains or tuple(f"domain {m}" for m in domains)
    drawn = [Figure(figures.sampling_curve(theta, int(m), *limits), f"S of {names[m]}") for m in domains]
    keys = ("domain", "lam", "omega", "eta", "epsilon", "best")
    columns = (names, theta.lam, theta.omega, theta.eta, theta.epsilon, best)
    return {"figures": drawn, "rows": [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]}


def _predictions(data: ReportData) -> dict[str, Any] | None:
    """A scatter per task and one row per task of errors and noise."""
    if data.predictions is None and data.metrics is None and data.search is None:
        return None
    metrics, noise = data.metrics or {}, data.noise or {}
    points: dict[str, list[tuple[float, float]]] = {}
    if data.predictions is not None:
        columns = (_column(data.predictions, name, "predictions") for name in ("task", "real", "predicted"))
        for task, real, predicted in zip(*columns, strict=True):
            points.setdefault(task, []).append((real, predicted))
    drawn = []
    for task, pairs in points.items():
        real, predicted = np.array(pairs, dtype=np.float64).T
        rho = metrics.get(task, {}).get("spearman")
        note = "" if rho is None else f"Spearman {rho:.2f}"
        svg = figures.predicted_real(task, real, predicted, noise.get(task, {}).get("noise_sd"), note)
        drawn.append(Figure(svg, f"Predicted against real: {task}"))
    rows = [{"task": t, **{k: metrics.get(t, {}).get(k) for k in ("spearman", "mae")}} for t in {**points, **metrics}]
    for row in rows:
        of_task = noise.get(row["task"], {})
        row |= {k: of_task.get(k) for k in ("theta_sd", "noise_sd", "signal_to_noise", "repeats", "agreement")}
    mae = metrics.get(OBJECTIVE, {}).get("mae")
    found = data.search
    lead = None if found is None or found.best_observed is None else found.best_observed - found.predicted
    return {"figures": drawn, "rows": rows, "mae": mae, "lead": lead}


def _results(data: ReportData) -> dict[str, Any] | None:
    """Losses per selector and measure, one row per selector (best objective first), and a figure per measure."""
    if data.results is None or data.results.num_rows == 0:
        return None
    table = data.results
    tasks = [c.removeprefix(LOSS_PREFIX) for c in table.column_names if c.startswith(LOSS_PREFIX)]
    weights = dict(data.search.weights) if data.search is not None else dict.fromkeys(tasks, 1.0)
    if unknown := [task for task in weights if task not in tasks]:
        raise InputError(f"report: the objective weighs {unknown[0]!r}, of which results have no loss column")
    runs = table.to_pylist()
    for run in runs:
        total = sum(weight * _float(run[LOSS_PREFIX + task]) for task, weight in weights.items())
        run[OBJECTIVE] = _float(run.get(OBJECTIVE, total / sum(weights.values())))
        run |= {task: _float(run[LOSS_PREFIX + task]) for task in tasks}
    measures = [OBJECTIVE, *tasks]
    selectors = dict.fromkeys(_column(table, "selector", "results"))
    losses = {s: {m: [r[m] for r in runs if r["selector"] == s] for m in measures} for s in selectors}
    order = sorted(losses, key=lambda s: (np.isnan(mean := float(np.mean(losses[s][OBJECTIVE]))), mean))
    losses = {s: losses[s] for s in order}
    drawn = [
        Figure(figures.seed_dots(m, {s: losses[s][m] for s in order}, data.quadmix), f"Loss per selector: {m}")
        for m in measures
    ]
    return {
        "losses": losses,
        "measures": measures,
        "weights": weights,
        "rows": [_selector_row(s, losses[s], runs) for s in order],
        "runs": runs,
        "figures": drawn,
        "shares": _shares(data, order),
    }


def _selector_row(selector: str, losses: Mapping[str, Sequence[float]], runs: Sequence[dict]) -> dict[str, Any]:
    own = [run for run in runs if run["selector"] == selector]
    means = {m: (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else None) for m, v in losses.items()}
    facts = {
        name: float(np.mean([run[name] for run in own])) if all(run.get(name) is not None for run in own) else None
        for name in ("tokens_seen", "unique_tokens", "epochs", "seconds")
    }
    return {"selector": selector, "seeds": len(own), "means": means, **facts}


def _shares(data: ReportData, order: Sequence[str]) -> dict[str, Any] | None:
    """Share of tokens per domain and selector in percent, and the overlap with θ*'s selection."""
    if not data.selections:
        return None
    position = {name: i for i, name in enumerate(order)}
    chosen = sorted(data.selections, key=lambda s: position.get(s.selector, len(position)))
    totals = [sum(s.domain_tokens.values()) or 1 for s in chosen]
    names = sorted({name for s in chosen for name in s.domain_tokens})
    rows = [
        (name, [100 * s.domain_tokens.get(name, 0) / t for s, t in zip(chosen, totals, strict=True)]) for name in names
    ]
    rows.sort(key=lambda row: -max(row[1]))
    return {
        "selectors": [s.selector for s in chosen],
        "overlap": {s.selector: s.overlap for s in chosen},
        "rows": rows,
    }


def _tasks(verdict: Verdict | None) -> list[dict[str, Any]]:
    """Per task: every comparison, the baselines that are better there, and those ahead inside the noise."""
    if verdict is None:
        return []
    names = dict.fromkeys(c.measure for c in verdict.tasks)
    rows = [{"task": name, "cells": [c for c in verdict.tasks if c.measure == name]} for name in names]
    for row in rows:
        row["worse"] = [c for c in row["cells"] if c.outcome == "worse"]
        row["behind"] = [c for c in row["cells"] if c.outcome != "worse" and c.difference < 0]
    return rows


def _curves(data: ReportData) -> Figure | None:
    if data.curves is None or data.curves.num_rows == 0:
        return None
    columns = [_column(data.curves, c, "curves") for c in ("selector", "seed", "tokens_seen", "train_loss")]
    runs: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for selector, seed, tokens, loss in zip(*columns, strict=True):
        if loss is not None and np.isfinite(loss):
            runs.setdefault((selector, seed), []).append((tokens, loss))
    curves: dict[str, list[tuple[NDArray, NDArray]]] = {}
    for (selector, _), points in runs.items():
        x, y = np.array(sorted(points), dtype=np.float64).T
        curves.setdefault(selector, []).append((x, y))
    if not curves:
        return None
    return Figure(figures.training_curves(curves, data.quadmix), "Training loss against tokens seen", wide=True)


def _unequal(results: dict[str, Any] | None) -> list[str]:
    """Warnings when selectors did not train on equal terms."""
    found = []
    for name, words in (("tokens_seen", "trained tokens"), ("unique_tokens", "unique tokens")):
        values = {row["selector"]: row[name] for row in (results or {"rows": []})["rows"] if row[name]}
        if values and max(values.values()) > 1.05 * min(values.values()):
            low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
            found.append(
                f"Selectors differ in {words}: {low} {_tokens(values[low])}, {high} {_tokens(values[high])}; "
                f"the comparison is not on equal terms."
            )
    return found


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            rows.append((f"{prefix}{key}", ", ".join(str(v) for v in value)))
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _float(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _tokens(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return "–"
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= scale:
            return f"{value / (1e3 if unit == 'k' else scale):.3g}{unit}" if abs(value) < 1e15 else f"{value:.3g}"
    return f"{value:,.0f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _number(value: float | None, form: str = ".3g") -> str:
    return "–" if value is None or not np.isfinite(value) else format(value, form).replace("-", "−")
