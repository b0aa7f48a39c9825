"""Figures of candidates: what the regressor predicts for the drawn θ, and where the named ones stand among them.

A named candidate has one marker shape and one colour in every panel, so that neither has to be told by colour alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.figures.drawing import COLOURS, Array, Drawing, plain, sheet, style

Marks = Mapping[str, Mapping[str, float]]
_MARKERS, _ROLES = "*s^DvPX<>h", ("accent", "series1", "series2", "series3", "series4", "series5")
_WIDTH = 430
_MOST_POINTS = 800
_CLOUD: Any = {"color": COLOURS["before"], "markersize": 3, "markeredgewidth": 0}
_FRONT: Any = {"color": COLOURS["ink"], "markersize": 4, "linewidth": 1.4}
_LANE, _PANEL = 12, 15  # px: height per mark, and of the row's title
_BANDS = ((1, 99, 0.30), (25, 75, 0.55))


def predicted_candidates(draws: Mapping[str, ArrayLike], marks: Marks, unit: str = "nats per token") -> Drawing:
    """The predicted losses of all drawn θ per task, and those of named candidates among them (the paper's Figure 5).

    ``draws``: task → predicted losses [n]; ``marks``: name → task → loss, where a task may be missing. A row per task
    on a scale of its own: pale band 1-99 % of the draws, darker 25-75 %, line at the median.
    """
    legend = [*((name, look) for name, look in _looks(marks)), *_band_entries()]
    head = _legend_height(legend)
    lanes = 8 + _LANE * max(2, len(marks))
    row = _PANEL + lanes + 26
    height = head + row * max(1, len(draws)) + 36
    with style():
        figure, axes = sheet(_WIDTH, height, 0, 0, 0, 0)
        _draw_legend(axes, height, legend)
        described = []
        for i, (task, values) in enumerate(draws.items()):
            finite = np.asarray(values, dtype=np.float64).ravel()
            finite = finite[np.isfinite(finite)]
            bottom = height - head - i * row - _PANEL - lanes
            panel = figure.add_axes((14 / _WIDTH, bottom / height, (_WIDTH - 32) / _WIDTH, lanes / height))
            found = {name: float(of[task]) for name, of in marks.items() if np.isfinite(of.get(task, np.nan))}
            _strip(panel, finite, found, marks)
            panel.set_title(plain(task, 54), pad=3, loc="left", fontsize=11, fontweight="bold")
            best = min(found, key=found.__getitem__, default=None)
            if best is not None:
                described.append(f"{plain(task)} {plain(best)} {found[best]:.4f}")
        axes.text(14, 20, f"predicted loss ({plain(unit, 24)}), lower is better", va="bottom")
        axes.text(14, 5, "each row has its own scale", va="bottom", fontsize=10, color=COLOURS["muted"])
        text = f"Pale band: 1-99 % of the draws; dark band: 25-75 %. Lowest candidate per task: {'; '.join(described)}."
        return Drawing.of(figure, "candidates", "Predicted loss of candidates per task", text)


def pareto_front(
    x_task: str,
    y_task: str,
    x: ArrayLike,
    y: ArrayLike,
    on_front: ArrayLike,
    marks: Marks,
    unit: str = "nats per token",
) -> Drawing:
    """Predicted losses of two tasks [n] each: the candidates that no other beats on both (``on_front`` [n]) connected.

    ``marks`` as in ``predicted_candidates``; one without both tasks is left out. Of more candidates than can be told
    apart, an even part is drawn, the front always whole.

    Raises:
        InputError: x, y and on_front differ in length.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (x, y))
    others, best = _front_and_others(first, second, np.asarray(on_front, dtype=bool))
    drawn = others[:: max(1, -(-others.size // _MOST_POINTS))]
    places = {name: (of.get(x_task, np.nan), of.get(y_task, np.nan)) for name, of in marks.items()}
    named = [(name, look) for name, look in _looks(marks) if np.isfinite(places[name]).all()]
    legend = [*named, ("Pareto front", "front"), ("other candidates", "cloud")]
    head = _legend_height(legend)
    with style():
        figure, axes = sheet(_WIDTH, head + 372, 78, 14, head + 4, 58)
        _draw_legend(figure.add_axes((0, 0, 1, 1), zorder=-1), head + 372, legend)
        axes.plot(first[drawn], second[drawn], "o", **_CLOUD, alpha=0.6)
        axes.plot(first[best], second[best], "-o", **_FRONT, zorder=3)
        for name, look in reversed(named):  # the first on top
            _mark(axes, *places[name], look, 1.25)
        axes.locator_params(nbins=5)
        axes.grid()
        for write, task in ((axes.set_xlabel, x_task), (axes.set_ylabel, y_task)):
            write(f"{plain(task, 38)}\npredicted loss ({plain(unit, 24)})")
        part = "" if drawn.size == others.size else f"; {drawn.size} of the {others.size} other candidates are drawn"
        text = f"Lower left is better; {best.size} candidates on the front{part}."
        title = f"Trade-off between {plain(x_task)} and {plain(y_task)}"
        return Drawing.of(figure, f"pareto {x_task} {y_task}", title, text)


def _front_and_others(x: Array, y: Array, front: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which candidates are not on the front, and which are, from left to right; the finite ones of both."""
    if not x.shape == y.shape == front.shape:
        raise InputError(f"Pareto front: x {x.shape}, y {y.shape}, on_front {front.shape}; give as many of each")
    finite = np.isfinite(x) & np.isfinite(y)
    best = np.flatnonzero(finite & front)
    return np.flatnonzero(finite & ~front), best[np.lexsort((-y[best], x[best]))]


def _looks(marks: Marks) -> list[tuple[str, tuple[str, str]]]:
    """Marker and colour role of each name; as markers and roles differ in number, 30 names look different."""
    return [(name, (_MARKERS[i % len(_MARKERS)], _ROLES[i % len(_ROLES)])) for i, name in enumerate(marks)]


def _strip(panel: Any, draws: Array, found: Mapping[str, float], marks: Marks) -> None:
    """One row: bands of the draws over its whole height, and a lane for every mark, so that none covers another."""
    lanes = max(2, len(marks))
    if draws.size:
        for low, high, alpha in _BANDS:
            ends = np.percentile(draws, (low, high))
            panel.axvspan(*ends, color=COLOURS["before"], alpha=alpha, linewidth=0)
        panel.axvline(np.median(draws), color=COLOURS["ink"], linewidth=1.2)
    for lane, (name, look) in enumerate(_looks(marks)):
        if name in found:
            _mark(panel, found[name], lane, look)
    if not draws.size and not found:
        panel.text(0.5, 0.5, "no prediction", transform=panel.transAxes, ha="center", va="center")
    panel.set_ylim(lanes - 0.3, -0.7)
    panel.set_yticks([])
    panel.spines["left"].set_visible(False)
    panel.margins(x=0.04)
    panel.locator_params(axis="x", nbins=5)
    panel.tick_params(axis="x", length=3, pad=2)


def _mark(axes: Any, x: float, y: float, look: tuple[str, str], scale: float = 1.0) -> None:
    marker, role = look
    size = (14 if marker == "*" else 8) * scale
    edge: Any = {"markeredgecolor": COLOURS["paper"], "markeredgewidth": 0.8}
    axes.plot([x], [y], marker, color=COLOURS[role], markersize=size, zorder=4, clip_on=False, **edge)


def _band_entries() -> list[tuple[str, Any]]:
    return [*((f"{low}–{high} % of draws", alpha) for low, high, alpha in _BANDS), ("median draw", "median")]


def _flow(names: Sequence[str]) -> list[tuple[int, int]]:
    """Column in px and line of each legend entry, filled like words of a paragraph."""
    places, x, line = [], 14, 0
    for name in names:
        needed = 34 + int(6.4 * len(plain(name, 30)))
        if x > 14 and x + needed > _WIDTH:
            x, line = 14, line + 1
        places.append((x, line))
        x += needed
    return places


def _legend_height(entries: Sequence[tuple[str, Any]]) -> int:
    return 8 + 16 * (1 + _flow([name for name, _ in entries])[-1][1])


def _draw_legend(axes: Any, height: int, entries: Sequence[tuple[str, Any]]) -> None:
    """Marker and name of every entry on axes that cover the whole figure, in px."""
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(0, height)
    axes.set_axis_off()
    for (name, look), (x, line) in zip(entries, _flow([name for name, _ in entries]), strict=True):
        y = height - 12 - 16 * line
        if isinstance(look, tuple):
            _mark(axes, x + 7, y, look)
        elif isinstance(look, float):
            for _, _, alpha in _BANDS[: 1 + [band[2] for band in _BANDS].index(look)]:  # each lies on the wider ones
                axes.fill_between([x, x + 14], y - 5, y + 5, color=COLOURS["before"], alpha=alpha, linewidth=0)
        elif look == "median":
            axes.plot([x + 7, x + 7], [y - 6, y + 6], color=COLOURS["ink"], linewidth=1.2)
        elif look == "front":
            axes.plot([x, x + 7, x + 14], [y, y, y], "-o", **_FRONT)
        else:
            axes.plot([x + 3, x + 11], [y, y], "o", **_CLOUD)
        axes.text(x + 20, y, plain(name, 30), va="center", fontsize=10)
