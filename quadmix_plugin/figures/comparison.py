"""Figures of the comparison: the losses of every selector and seed, and their training curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quadmix_plugin.figures.drawing import (
    BESIDE,
    COLOURS,
    Array,
    Drawing,
    EndLabel,
    end_labels,
    heading,
    heat_cells,
    label_rows,
    label_width,
    line_style,
    plain,
    sheet,
    style,
)


def seed_dots(measure: str, losses: Mapping[str, Sequence[float]], highlight: str) -> Drawing:
    """One row per selector: a dot per seed, the mean as a bar, ± one sd as a line; ``highlight`` is coloured."""
    labels = [plain(name, 24) for name in losses]
    left = label_width(labels)
    with style():
        figure, axes = sheet(left + 206, 76 + 26 * len(labels), left, 14, 28, 44)
        described = []
        for y, (name, values) in enumerate(losses.items()):
            seeds = np.asarray(values, dtype=np.float64)
            seeds = seeds[np.isfinite(seeds)]
            if not seeds.size:
                axes.annotate("no finite loss", (0, y), (4, 0), **BESIDE, va="center", color=COLOURS["muted"])
                continue
            colour, mean = COLOURS["accent" if name == highlight else "muted"], seeds.mean()
            if name == highlight:
                axes.axvline(mean, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=0.5)
            if seeds.size > 1:
                sd = seeds.std(ddof=1)
                axes.hlines(y, mean - sd, mean + sd, color=colour, linewidth=6, alpha=0.25)
            axes.vlines(mean, y - 0.28, y + 0.28, color=colour, linewidth=2.4)
            axes.plot(seeds, np.full(seeds.size, y), "o", color=colour, markersize=5, markeredgewidth=0, alpha=0.85)
            described.append(f"{labels[y]} {mean:.4f}")
        label_rows(axes, labels)
        if highlight in losses:
            axes.get_yticklabels()[list(losses).index(highlight)].set_fontweight("bold")
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x")
        heading(figure, measure)
        axes.set_xlabel("loss (nats per token), lower is better")
        title = f"Loss per selector and seed: {plain(measure)}"
        return Drawing.of(figure, f"seeds {measure}", title, f"Means: {'; '.join(described)}.")


def overlaps(overlap: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Drawing:
    """Heat map of how much every two selections share, in percent of the tokens in either; rows as ``names``."""
    labels = [plain(name, 24) for name in names]
    values = np.array([[overlap[a][b] for b in names] for a in names], dtype=np.float64)
    left, column, row, top = label_width(labels), 34, 20, 10 + int(4.4 * max(map(len, labels)))
    with style():
        figure, axes = sheet(left + column * len(names) + 60, top + 10 + row * len(names), left, 60, top, 10)
        heat_cells(axes, values, "{:.0%}")
        label_rows(axes, labels)
        axes.set_xticks(range(len(names)), labels, rotation=45, ha="left", rotation_mode="anchor")
        pairs = [(values[i, j], labels[i], labels[j]) for i in range(len(names)) for j in range(i)]
        most = "; ".join(f"{a} and {b} {share:.0%}" for share, a, b in sorted(pairs, reverse=True)[:3])
        title = "Overlap of the selections"
        return Drawing.of(figure, "overlap", title, f"Largest: {most or 'there is one selection'}.", wide=True)


def training_curves(curves: Mapping[str, Sequence[tuple[Array, Array]]], highlight: str) -> Drawing:
    """Training loss against tokens seen, a line per selector (mean over seeds) with the range of its seeds.

    ``curves``: selector → one (tokens_seen [s], loss [s]) per seed, tokens rising.
    """
    names = [name for name in curves if curves[name]]
    scale, unit = _token_unit(max(float(x[-1]) for name in names for x, _ in curves[name]))
    drawn = {name: _mean_curve(curves[name]) for name in names}
    with style():
        figure, axes = sheet(520, 330, 54, 154, 12, 46)
        for i, name in enumerate(names):
            x, mean, low, high = drawn[name]
            colour, dash, width = _line(i, name == highlight)
            axes.fill_between(x / scale, low, high, color=colour, alpha=0.14, linewidth=0)
            axes.plot(x / scale, mean, color=colour, linestyle=dash, linewidth=width, zorder=3)
        low, high = _visible(drawn)
        axes.set_ylim(low, high)
        axes.margins(x=0)
        axes.grid()
        axes.set_xlabel(f"tokens seen ({unit})" if unit else "tokens seen")
        axes.set_ylabel("training loss (nats per token)")
        ends = [
            EndLabel(float(drawn[name][1][-1]), name, *_line(i, name == highlight)[:2], bold=name == highlight)
            for i, name in enumerate(names)
        ]
        end_labels(axes, ends, (low, high), 272)
        final = "; ".join(f"{plain(name)} {drawn[name][1][-1]:.3f}" for name in names)
        title = "Training loss against tokens seen"
        return Drawing.of(figure, "training", title, f"Final training loss: {final}.", wide=True)


def _line(i: int, highlighted: bool) -> tuple[str, Any, float]:
    if highlighted:
        return COLOURS["accent"], "-", 2.6
    return *line_style(i), 1.5


def _mean_curve(seeds: Sequence[tuple[Array, Array]]) -> tuple[Array, Array, Array, Array]:
    start, stop = max(float(x[0]) for x, _ in seeds), min(float(x[-1]) for x, _ in seeds)
    grid = np.linspace(start, max(start, stop), 150)
    values = np.stack([np.interp(grid, x, y) for x, y in seeds])
    return grid, values.mean(0), values.min(0), values.max(0)


def _visible(drawn: Mapping[str, tuple[Array, Array, Array, Array]]) -> tuple[float, float]:
    """Limits of the loss axis that leave out the fall of the first 20 % of the tokens."""
    bottom = min(float(low.min()) for _, _, low, _ in drawn.values())
    top = max(float(high[x >= 0.2 * x[-1]].max()) for x, _, _, high in drawn.values())
    pad = 0.04 * ((top - bottom) or 1.0)
    return bottom - pad, top + pad


def _token_unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= scale:
            return scale, unit
    return 1.0, ""
