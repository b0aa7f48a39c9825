"""Figures of what was selected: domain shares, scores, merge weights and sampling curves."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from quadmix_plugin.figures.drawing import (
    BESIDE,
    COLOURS,
    Array,
    Drawing,
    heading,
    heat_cells,
    label_rows,
    label_width,
    plain,
    sheet,
    style,
)
from quadmix_plugin.parameters import Parameters


def domain_shares(domains: Sequence[str], before: ArrayLike, after: ArrayLike) -> Drawing:
    """Share of tokens per domain [M] before and after selection, in percent, one row per domain."""
    old, new = (np.asarray(values, dtype=np.float64) for values in (before, after))
    labels = [plain(name, 27) for name in domains]
    left, row = label_width(labels), 18
    with style():
        figure, axes = sheet(left + 284, 66 + row * len(labels), left, 62, 22, 44)
        rows = np.arange(len(labels))
        axes.hlines(rows, old, new, color=COLOURS["line"], linewidth=3)
        axes.plot(old, rows, "o", color=COLOURS["before"], markersize=6.5, markerfacecolor=COLOURS["paper"])
        axes.plot(new, rows, "o", color=COLOURS["accent"], markersize=6.5)
        label_rows(axes, labels)
        axes.set_xlim(0, max(1e-9, 1.06 * max(old.max(), new.max())))
        axes.set_xlabel("share of tokens (%)")
        axes.grid(axis="x")
        for y, o, n in zip(rows, old, new, strict=True):
            text = f"×{n / o:.2f}" if o > 0 else "new"
            axes.annotate(text, (1, y), (50, 0), **BESIDE, ha="right", va="center", fontsize=10)
        axes.annotate("change", (1, -0.5), (50, 8), **BESIDE, ha="right", va="center", fontsize=10)
        axes.annotate("○ before", (0, -0.5), (0, 8), **BESIDE, va="center", color=COLOURS["muted"])
        axes.annotate("● after", (0, -0.5), (72, 8), **BESIDE, va="center", color=COLOURS["accent"])
        top = np.argsort(np.abs(new - old))[::-1][:3]
        described = "; ".join(f"{labels[m]} {old[m]:.1f} to {new[m]:.1f} percent" for m in top)
        return Drawing.of(
            figure, "shares", "Domain shares before and after selection", f"Largest changes: {described}.", wide=True
        )


def score_histogram(scorer: str, kind: str, edges: ArrayLike, before: ArrayLike, after: ArrayLike | None) -> Drawing:
    """Token-weighted histogram of one scorer: ``edges`` [b + 1], ``before`` and ``after`` [b] in tokens."""
    with style():
        figure, axes = sheet(320, 210, 46, 10, 26, 44)
        old = _percent(before)
        axes.stairs(old, np.asarray(edges), fill=True, color=COLOURS["before"], alpha=0.45, linewidth=0)
        highest = old.max()
        if after is not None:
            new = _percent(after)
            highest = max(highest, new.max())
            axes.stairs(new, np.asarray(edges), color=COLOURS["accent"], linewidth=1.8, baseline=None)
        axes.set_ylim(0, 1.12 * max(highest, 1e-9))
        heading(figure, scorer)
        axes.set_xlabel("raw score" if kind == "raw" else "normalised score σ(q), best = 0")
        axes.set_ylabel("tokens (%)")
        axes.grid(axis="y")
        return Drawing.of(
            figure,
            f"score {kind} {scorer}",
            f"{kind} scores of {plain(scorer)}",
            "Token shares before (filled) and after (line).",
        )


def merge_weights(theta: Parameters) -> Drawing:
    """Heat map of α [M, N]: how much each scorer counts in each domain."""
    domains, scorers = _names(theta)
    labels, columns = [plain(name, 27) for name in domains], [plain(name, 14) for name in scorers]
    left, column, row = label_width(labels), max(58, min(84, 300 // len(columns))), 20
    with style():
        figure, axes = sheet(left + column * len(columns) + 24, 48 + row * len(labels), left, 24, 44, 4)
        heat_cells(axes, theta.alpha, "{:.2f}")
        label_rows(axes, labels)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_xlabel("weight α of each scorer (rows sum to 1)", labelpad=7, loc="right")
        means = ", ".join(f"{name} {value:.2f}" for name, value in zip(columns, theta.alpha.mean(0), strict=True))
        return Drawing.of(
            figure, "weights", "Merge weights per domain", f"Mean weight over domains: {means}.", wide=True
        )


def sampling_curve(theta: Parameters, domain: int, rank_limit: float, value_limit: float) -> Drawing:
    """S(r̄) of one domain (Eq. 3) on shared axes: r̄ up to ``rank_limit`` in (0, 1], S up to ``value_limit``."""
    from quadmix_plugin.sampling import sampling_value

    name, omega = plain(_names(theta)[0][domain]), float(theta.omega[domain])
    grid = np.unique(np.concatenate([np.linspace(0, rank_limit, 160)[1:], [omega, np.nextafter(omega, 2)]]))
    grid = grid[(grid > 0) & (grid <= rank_limit)]
    value = sampling_value(grid, np.full(grid.size, domain), theta)
    with style():
        figure, axes = sheet(188, 152, 40, 14, 22, 38)
        axes.fill_between(100 * grid, value, color=COLOURS["accent"], alpha=0.18, linewidth=0)
        axes.plot(100 * grid, value, color=COLOURS["accent"])
        axes.set_xlim(0, 100 * rank_limit)
        axes.set_ylim(0, value_limit)
        axes.locator_params(nbins=4)
        figure.text(0.02, 0.93, plain(name, 26), fontsize=10, fontweight="bold")
        axes.set_xlabel("r̄ (% of domain tokens)", fontsize=10, labelpad=2)
        axes.set_ylabel("S (copies)", fontsize=10, labelpad=2)
        axes.grid()
        described = f"{value[0]:.2f} expected copies of the best document; window up to {100 * omega:.2f} percent."
        return Drawing.of(figure, f"curve {domain} {name}", f"Sampling curve of {name}", described)


def _names(theta: Parameters) -> tuple[Sequence[str], Sequence[str]]:
    domains = theta.domains or [f"domain {m}" for m in range(theta.n_domains)]
    return domains, theta.scorers or [f"scorer {n}" for n in range(theta.n_scorers)]


def _percent(tokens: ArrayLike) -> Array:
    values = np.asarray(tokens, dtype=np.float64)
    return 100 * values / (values.sum() or 1.0)
