"""The report of a run: one self-contained HTML page that says what was done and whether it helped.

``render`` turns a ``ReportData`` into the page. It reads no files and trains nothing; whoever has the run directory
fills ``ReportData``. A part whose data is None is left out, and the page says which step has not run. The page loads
nothing, runs nothing and escapes every name.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import figures
from quadmix_plugin.benchmark_scores import LEGEND, average_in_words, in_order
from quadmix_plugin.errors import InputError
from quadmix_plugin.figures import Drawing
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.report_data import (
    LOSS_PREFIX,
    ReportData,
    ScoreHistogram,
    SearchOutcome,
    SelectorShares,
    StepRows,
    column,
)
from quadmix_plugin.verdict import OBJECTIVE, RULE, Verdict, judge

__all__ = [
    "LOSS_PREFIX",
    "ReportData",
    "ScoreHistogram",
    "SearchOutcome",
    "SelectorShares",
    "StepRows",
    "render",
    "sampling_curves",
]


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
        "weights": data.theta and figures.merge_weights(data.theta),
        "sampling": _sampling(data.theta),
        "predictions": _predictions(data),
        "gate": _gate(data.gate),
        "results": results,
        "tasks": _tasks(verdict),
        "curves": _curves(data),
        "benchmarks": _benchmarks(data.evaluation),
        "provenance": _flat(data.provenance),
        "warnings": [*data.warnings, *_unequal(data, results)],
    }
    return environment.get_template("report.html.j2").render(context) + "\n"


def sampling_curves(theta: Parameters) -> list[Drawing]:
    """The sampling curve of every domain of θ, all on the same axes."""
    limits = min(1.0, 1.15 * float(theta.omega.max())), max(1.0, 1.1 * float(_best(theta).max()))
    return [figures.sampling_curve(theta, m, *limits) for m in range(theta.n_domains)]


def _best(theta: Parameters) -> NDArray[np.float64]:
    """S of the best document of every domain [M]."""
    from quadmix_plugin.sampling import sampling_value

    return sampling_value(np.full(theta.n_domains, np.finfo(np.float64).tiny), np.arange(theta.n_domains), theta)


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
    table = {name: column(data.domains, name, "domains") for name in ("domain", "documents_before", "tokens_before")}
    after = "tokens_after" in data.domains.column_names
    if after:
        names = ("documents_after", "tokens_after", "unique_tokens_after")
        table |= {name: column(data.domains, name, "domains") for name in names}
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
        figure = figures.domain_shares([row["domain"] for row in rows], *shares)
    return {"rows": rows, "totals": totals, "after": after, "figure": figure}


def _scores(scores: Sequence[ScoreHistogram] | None) -> list[Drawing] | None:
    if not scores:
        return None
    return [
        figures.score_histogram(s.scorer, s.kind, s.edges, s.before, s.after)
        for s in sorted(scores, key=lambda s: s.kind != "raw")
    ]


def _sampling(theta: Parameters | None) -> dict[str, Any] | None:
    """A curve per domain on shared axes, and the numbers behind it."""
    if theta is None:
        return None
    names = theta.domains or tuple(f"domain {m}" for m in range(theta.n_domains))
    keys = ("domain", "lam", "omega", "eta", "epsilon", "best")
    columns = (names, theta.lam, theta.omega, theta.eta, theta.epsilon, _best(theta))
    return {
        "figures": sampling_curves(theta),
        "rows": [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)],
    }


def _predictions(data: ReportData) -> dict[str, Any] | None:
    """A scatter per task, one row per task of errors and noise, the ways to find θ, and whatever else was drawn."""
    if (
        data.predictions is None
        and data.metrics is None
        and data.search is None
        and not (data.methods or data.drawings or data.ablations)
    ):
        return None
    metrics, noise = data.metrics or {}, data.noise or {}
    points: dict[str, list[tuple[float, float]]] = {}
    if data.predictions is not None:
        columns = (column(data.predictions, name, "predictions") for name in ("task", "real", "predicted"))
        for task, real, predicted in zip(*columns, strict=True):
            points.setdefault(task, []).append((real, predicted))
    drawn = []
    for task, pairs in points.items():
        real, predicted = np.array(pairs, dtype=np.float64).T
        rho = metrics.get(task, {}).get("spearman")
        note = "" if rho is None else f"Spearman {rho:.2f}"
        drawn.append(figures.predicted_real(task, real, predicted, noise.get(task, {}).get("noise_sd"), note))
    rows = [_errors(task, metrics.get(task, {}), noise.get(task, {})) for task in {**points, **metrics}]
    mae = metrics.get(OBJECTIVE, {}).get("mae")
    found = data.search
    lead = None if found is None or found.best_observed is None else found.best_observed - found.predicted
    named = [drawing.name for drawing in data.drawings]
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise InputError(f"report: two drawings are named {twice!r}, so their ids would clash; give one of each")
    methods = _rows(data.methods, "methods", "name", ("predicted", "low", "high", "real"))
    ablations = _rows(data.ablations, "ablations", "excluded", ("predicted", "low", "high", "verdict"))
    found = {"figures": drawn, "rows": rows, "mae": mae, "lead": lead, "methods": methods, "ablations": ablations}
    return {**found, "spans": any(row["low"] is not None for row in (*methods, *ablations))}


def _errors(task: str, metrics: Mapping[str, Any], noise: Mapping[str, Any]) -> dict[str, Any]:
    """A row of what is known of the errors and the noise of one task."""
    row = {"task": task, **{name: metrics.get(name) for name in ("spearman", "pearson", "r2", "mae")}}
    row["low"], row["high"] = (metrics.get("interval") or {}).get("spearman") or (None, None)
    return row | {k: noise.get(k) for k in ("theta_sd", "noise_sd", "signal_to_noise", "repeats", "agreement")}


def _gate(gate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What is expected before training, against every rival."""
    if not gate:
        return None
    if not gate.get("verdict"):
        raise InputError("report: gate has no 'verdict'; say in words whether there is evidence of a gain")
    numbers = ("loss", "gain", "in_noise", "low", "high", "overlap")
    rows = _rows(gate.get("rows") or (), "gate", "rival", numbers)
    facts = {"verdict": gate["verdict"], "evidence": bool(gate.get("evidence")), "unit": gate.get("unit", "")}
    return {**facts, "rows": rows}


def _rows(rows: Sequence[Mapping[str, Any]], where: str, key: str, numbers: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that all have ``key`` and, where it is known, each of ``numbers``."""
    for row in rows:
        if key not in row:
            raise InputError(f"report: a row of {where} has no {key!r}; found {', '.join(map(str, row))}")
    return [{key: row[key], **{name: row.get(name) for name in numbers}} for row in rows]


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
    selectors = dict.fromkeys(column(table, "selector", "results"))
    losses = {s: {m: [r[m] for r in runs if r["selector"] == s] for m in measures} for s in selectors}
    order = sorted(losses, key=lambda s: (np.isnan(mean := float(np.mean(losses[s][OBJECTIVE]))), mean))
    losses = {s: losses[s] for s in order}
    drawn = [figures.seed_dots(m, {s: losses[s][m] for s in order}, data.quadmix) for m in measures]
    return {
        "losses": losses,
        "measures": measures,
        "weights": weights,
        "rows": [_selector_row(s, losses[s], runs) for s in order],
        "runs": runs,
        "figures": drawn,
        "shares": _shares(data, order),
        **_selections(data, order),
    }


def _selections(data: ReportData, order: Sequence[str]) -> dict[str, Any]:
    """What each selection is, how its losses stand to the best, and how much every two share."""
    rows = {row["selector"]: row for row in data.comparison}
    known = [name for name in order if name in rows]
    marks = {"best": "lowest", "near-tie": "≈", "unclear": "?"}
    standings = {
        (name, key.removesuffix(" standing")): marks.get(value, "")
        for name, row in rows.items()
        for key, value in row.items()
        if key.endswith(" standing")
    }
    drawn = figures.overlaps(data.overlap, [name for name in order if name in data.overlap]) if data.overlap else None
    return {"selections": [rows[name] for name in known], "standings": standings, "overlap": drawn}


def _selector_row(selector: str, losses: Mapping[str, Sequence[float]], runs: Sequence[dict]) -> dict[str, Any]:
    own = [run for run in runs if run["selector"] == selector]
    means = {m: (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else None) for m, v in losses.items()}
    facts = {
        name: float(np.mean([run[name] for run in own])) if all(run.get(name) is not None for run in own) else None
        for name in ("tokens_seen", "unique_tokens", "epochs", "seconds")
    }
    return {"selector": selector, "seeds": len(own), "means": means, **facts}


def _shares(data: ReportData, order: Sequence[str]) -> dict[str, Any] | None:
    """Share of tokens per domain and selector in percent, and how much of each selection θ* selects as well."""
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
        "shared": {s.selector: s.shared for s in chosen},
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


def _benchmarks(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A row per task, and the paper's average in words."""
    if evaluation is None:
        return None
    average = evaluation["average"] and average_in_words(evaluation["average"])
    facts = {name: evaluation[name] for name in ("harness", "limit")}
    return {"rows": in_order(evaluation), "average": average, "legend": LEGEND, **facts}


def _curves(data: ReportData) -> Drawing | None:
    if data.curves is None or data.curves.num_rows == 0:
        return None
    columns = [column(data.curves, c, "curves") for c in ("selector", "seed", "tokens_seen", "train_loss")]
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
    return figures.training_curves(curves, data.quadmix)


def _unequal(data: ReportData, results: dict[str, Any] | None) -> list[str]:
    """Warnings when selectors did not train on equal terms."""
    found = []
    trained, selected = (results or {"rows": []})["rows"], data.comparison
    for rows, name, words in ((trained, "tokens_seen", "trained tokens"), (selected, "tokens", "selected tokens")):
        values = {row["selector"]: row[name] for row in rows if row[name]}
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
