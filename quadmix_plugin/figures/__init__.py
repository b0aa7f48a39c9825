"""The figures of the report and of ``quadmix fit``, drawn by matplotlib; each function returns a ``Drawing``.

What is shown and why is decided by the callers; nothing here computes a statistic beyond means, ranges and quantiles
for drawing. Importing this package does not import matplotlib.
"""

from quadmix_plugin.figures.candidates import pareto_front, predicted_candidates
from quadmix_plugin.figures.comparison import overlaps, seed_dots, training_curves
from quadmix_plugin.figures.corpus import domain_shares, merge_weights, sampling_curve, score_histogram
from quadmix_plugin.figures.drawing import COLOURS, Drawing, plain
from quadmix_plugin.figures.search import (
    error_by_proxies,
    importance,
    predicted_real,
)

__all__ = [
    "COLOURS",
    "Drawing",
    "domain_shares",
    "error_by_proxies",
    "importance",
    "merge_weights",
    "overlaps",
    "pareto_front",
    "plain",
    "predicted_candidates",
    "predicted_real",
    "sampling_curve",
    "score_histogram",
    "seed_dots",
    "training_curves",
]
