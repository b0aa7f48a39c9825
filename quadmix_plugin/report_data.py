"""What a report is made from: plain values, which whoever has the run directory fills."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.figures import Drawing
from quadmix_plugin.parameters import Parameters

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
    """What the search found; losses are values of the objective in ``unit``: one task's, or of several standardised.

    ``weights``: task → weight. ``predicted`` of θ*; ``best_observed`` among the proxies and that proxy's number.
    ``facts``: anything else worth a row (regressor, draws predicted, draws averaged, scale of ω). ``unit`` is also
    that of ``methods``, ``ablations`` and the error of "objective" in ``metrics``.
    """

    weights: Mapping[str, float]
    predicted: float
    best_observed: float | None = None
    best_proxy: int | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    unit: str = "nats per token"


@dataclass(frozen=True)
class SelectorShares:
    """One selector's selection: tokens with copies per domain, and its overlap with the selection of θ*.

    ``shared``: tokens of documents in both / in either, in [0, 1].
    """

    selector: str
    domain_tokens: Mapping[str, float]
    shared: float | None = None


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
    metrics: Mapping[str, Mapping[str, Any]] | None = None
    """Cross-validated, per task (and "objective"): spearman, pearson, r2, mae; where known ``interval``, the 95 %
    bootstrap interval of each, name → (low, high)."""
    noise: Mapping[str, Mapping[str, Any]] | None = None
    """Per task: theta_sd, noise_sd, signal_to_noise, repeats, and ``agreement`` of ranks before the end, in words."""
    search: SearchOutcome | None = None
    methods: Sequence[Mapping[str, Any]] = ()
    """Ways to find θ, a row each: ``name``; where known, ``predicted`` objective, ``low`` and ``high`` end of its
    interval, and ``real``, the objective measured by training."""
    ablations: Sequence[Mapping[str, Any]] = ()
    """Searches without some scorers, a row each: ``excluded`` (their names), and where known ``predicted`` objective,
    ``low`` and ``high`` end of its interval, ``verdict`` in words."""
    drawings: Sequence[Drawing] = ()
    """Further figures of the search, each shown under its title; their names must differ."""
    gate: Mapping[str, Any] | None = None
    """Whether a gain is to be expected before anything is trained on θ*: ``verdict`` in words, ``evidence`` (bool),
    ``unit``, and ``rows`` of ``rival``, ``loss`` (measured), ``gain`` (that minus the predicted loss of θ*),
    ``in_noise`` (the gain in sd across seeds), ``low`` and ``high`` of the gain, ``overlap`` (token-weighted Jaccard
    with θ*, in [0, 1])."""
    results: pa.Table | None = None
    selections: Sequence[SelectorShares] | None = None
    comparison: Sequence[Mapping[str, Any]] = ()
    """Rows of ``comparison.comparison_rows``."""
    benchmarks: Sequence[str] = ()
    """Measures of ``comparison`` that are scores of benchmarks, higher = better."""
    evaluation: Mapping[str, Any] | None = None
    """Benchmarks of θ*'s models: ``benchmark_scores.summarise``, with ``harness`` and ``limit``; None: no tasks."""
    overlap: Mapping[str, Mapping[str, float]] | None = None
    """Token-weighted Jaccard of every two selections, in [0, 1]."""
    curves: pa.Table | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions, hashes, seeds, hardware, seconds per step; values may be mappings of their own."""
    warnings: Sequence[str] = ()
    quadmix: str = "quadmix"
    """The selector that stands for θ* in ``results``, ``selections`` and ``curves``."""


def column(table: pa.Table, name: str, where: str) -> list[Any]:
    """One column of a table of ``ReportData``; an ``InputError`` that names it when it is not there."""
    if name not in table.column_names:
        raise InputError(
            f"report: {where} has no column {name!r}; found {', '.join(table.column_names)}; run its step again"
        )
    return table[name].to_pylist()
