"""Figures of the search: how well the regressor predicts, what it says of candidates, and which inputs matter."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from quadmix_plugin.errors import InputError
from quadmix_plugin.figures.drawing import (
    COLOURS,
    Array,
    Drawing,
    EndLabel,
    end_labels,
    heading,
    line_style,
    plain,
    sheet,
    style,
)

_MARKERS = "os^DvPX"


def predicted_real(task: str, real: ArrayLike, predicted: ArrayLike, noise_sd: float | None, note: str = "") -> Drawing:
    """Out-of-fold predicted against real loss of each proxy [T], with a band of one seed sd; ``note`` at its corner."""
    x, y = np.asarray(real, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    both = np.concatenate([x[finite], y[finite]]) if finite.any() else np.array([0.0, 1.0])
    pad = 0.06 * (np.ptp(both) or 1.0)
    limits = np.array([both.min() - pad, both.max() + pad])
    with style():
        figure, axes = sheet(320, 324, 58, 12, 40, 46)
        if noise_sd is not None and np.isfinite(noise_sd):
            band = (limits - noise_sd, limits + noise_sd)
            axes.fill_between(limits, *band, color=COLOURS["before"], alpha=0.25, linewidth=0)
        axes.plot(limits, limits, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(x[finite], y[finite], "o", color=COLOURS["accent"], alpha=0.75, markersize=5, markeredgewidth=0)
        axes.set_xlim(*limits)
        axes.set_ylim(*limits)
        axes.locator_params(nbins=5)
        axes.grid()
        heading(figure, task)
        axes.set_title(plain(note), loc="left", fontsize=10, color=COLOURS["muted"])
        axes.set_xlabel("real loss (nats per token)")
        axes.set_ylabel("predicted loss (nats per token)")
        title, described = f"Predicted against real loss: {plain(task)}", f"{int(finite.sum())} proxies."
        return Drawing.of(figure, f"prediction {task}", title, described)


def error_by_proxies(
    task: str,
    errors: Mapping[str, tuple[ArrayLike, ArrayLike]],
    unit: str = "nats per token",
    noise_mae: float | None = None,
) -> Drawing:
    """Mean absolute error of each regressor against the number of proxies it was fitted to.

    ``errors``: regressor → (numbers of proxies [k], errors [k, repeats]); the line is the mean over the repeats, the
    band their range; repeats that are not finite are left out. ``noise_mae``: the error of a perfect prediction, which
    is the noise of one training run.

    Raises:
        InputError: numbers and errors of a regressor differ in length.
    """
    lines = {name: _error_line(name, *values) for name, values in errors.items()}
    lines = {name: line for name, line in lines.items() if line[0].size}
    noise = noise_mae if noise_mae is not None and np.isfinite(noise_mae) else 0.0
    limits = (0.0, 1.06 * max([noise, *(float(highest.max()) for *_, highest in lines.values())]) or 1.0)
    with style():
        figure, axes = sheet(430, 300, 56, 144, 26, 46)
        _axis_of_proxies(axes, [numbers for numbers, *_ in lines.values()])
        axes.set_ylim(*limits)
        ends = []
        for i, (name, (x, mean, low, high)) in enumerate(lines.items()):
            colour, dash = line_style(i)
            marker = _MARKERS[i % len(_MARKERS)]
            axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
            axes.plot(x, mean, marker=marker, color=colour, linestyle=dash, markersize=5, zorder=3)
            ends.append(EndLabel(float(mean[-1]), name, colour, dash, marker))
        if noise:
            ends.append(EndLabel(noise, "noise alone", COLOURS["muted"], (0, (1, 2))))
            axes.axhline(noise, linewidth=1.4, color=ends[-1].colour, linestyle=ends[-1].dash)
        end_labels(axes, ends, limits, 228)
        axes.grid()
        heading(figure, task)
        axes.set_ylabel(f"mean absolute error ({plain(unit, 24)})")
        final = "; ".join(f"{plain(name)} {line[1][-1]:.4g} at {line[0][-1]:g}" for name, line in lines.items())
        described = f"Line: mean over repeats; band: their range. Mean absolute error in {unit}: {final}."
        return Drawing.of(figure, f"error by proxies {task}", f"Error by number of proxies: {plain(task)}", described)


def importance(
    names: Sequence[str],
    values: ArrayLike,
    spread: ArrayLike | None = None,
    top: int = 20,
    unit: str = "increase of MAE",
    task: str = "",
) -> Drawing:
    """Bars of the permutation importance [n] of the inputs, largest first; ``spread`` [n]: length of each whisker.

    Values that are not finite are left out. ``task`` keeps the figures of several tasks apart.

    Raises:
        InputError: names, values and spread differ in length.
    """
    sizes, whiskers = _sizes(names, values, spread)
    order = [int(i) for i in np.argsort(-sizes, kind="stable") if np.isfinite(sizes[i])]
    shown, row = order[:top], 30
    with style():
        figure, axes = sheet(430, 74 + row * max(1, len(shown)), 24, 24, 26, 44)
        rows = np.arange(len(shown))
        bars, ends = sizes[shown], whiskers[shown]
        axes.barh(rows + 0.2, bars, height=0.34, color=COLOURS["accent"], alpha=0.75, linewidth=0)
        if spread is not None:
            axes.errorbar(bars, rows + 0.2, xerr=ends, fmt="none", ecolor=COLOURS["ink"], elinewidth=1.2, capsize=3)
        axes.axvline(0, color=COLOURS["muted"], linewidth=0.8)
        _row_texts(axes, [names[i] for i in shown], bars)
        axes.set_ylim(max(1, len(shown)) - 0.5, -0.5)
        axes.set_yticks([])
        low, high = 1.04 * (bars - ends).min(initial=0.0), 1.04 * (bars + ends).max(initial=0.0)
        axes.set_xlim(low, high if high > low else 1.0)
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x")
        left_out = "" if len(order) == len(shown) else f", {len(shown)} largest of {len(order)}"
        heading(figure, task)
        axes.set_xlabel(f"{plain(unit, 44)}{left_out}")
        title = f"What matters: {plain(task)}" if task else "What matters"
        first = "; ".join(f"{plain(names[i])} {sizes[i]:.3g}" for i in shown[:3])
        return Drawing.of(figure, f"importance {task}", title, f"Permutation importance, {unit}{left_out}: {first}.")


def _sizes(names: Sequence[str], values: ArrayLike, spread: ArrayLike | None) -> tuple[Array, Array]:
    sizes = np.asarray(values, dtype=np.float64)
    whiskers = np.zeros(sizes.size) if spread is None else np.nan_to_num(np.asarray(spread, dtype=np.float64))
    if not len(names) == sizes.size == whiskers.size:
        raise InputError(f"importance: {len(names)} names, {sizes.size} values, {whiskers.size} whiskers; give as many")
    return sizes, whiskers


def _row_texts(axes: Any, names: Sequence[str], values: Array) -> None:
    """Above each bar its name at the left end and its number, of equally many decimals, at the right."""
    place: Any = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 10, "annotation_clip": False}
    decimals = int(np.clip(2 - np.floor(np.log10(np.abs(values).max(initial=0.0) or 1.0)), 0, 9))
    for y, (name, value) in enumerate(zip(names, values, strict=True)):
        axes.annotate(plain(name, 50), (0, y - 0.2), ha="left", **place)
        axes.annotate(
            f"{value:.{decimals}f}".replace("-", "−"), (1, y - 0.2), ha="right", color=COLOURS["muted"], **place
        )


def _error_line(name: str, numbers: ArrayLike, errors: ArrayLike) -> tuple[Array, Array, Array, Array]:
    """Numbers of proxies, rising, and mean, lowest and highest error of the finite repeats."""
    x, y = np.asarray(numbers, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if x.ndim != 1 or y.ndim not in (1, 2) or len(y) != x.size:
        raise InputError(f"errors of {name!r}: numbers {x.shape} against errors {y.shape}; give [k] and [k, repeats]")
    table = np.ma.masked_invalid(y.reshape(x.size, -1))
    order = [int(i) for i in np.argsort(x, kind="stable") if table[i].count() and x[i] > 0]
    kept = table[order]
    return x[order], np.asarray(kept.mean(1)), np.asarray(kept.min(1)), np.asarray(kept.max(1))


def _axis_of_proxies(axes: Any, parts: Sequence[Array]) -> None:
    """A logarithmic axis that names the numbers which were measured, as far as they have room."""
    numbers = np.unique(np.concatenate([*parts])) if parts else np.ones(1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(numbers[0] / 1.15, numbers[-1] * 1.15)
    axes.set_xticks(shown := _apart(numbers, 30 / 230), [f"{n:g}" for n in shown])
    axes.minorticks_off()
    axes.set_xlabel("number of proxies (logarithmic scale)")


def _apart(numbers: Array, share: float) -> Array:
    """Of these rising numbers the last, and those before it that are this share of the logarithmic axis apart."""
    least = share * np.log(numbers[-1] / numbers[0])
    kept = [numbers[-1]]
    for number in numbers[-2::-1]:
        if np.log(kept[-1] / number) >= least:
            kept.append(number)
    return np.array(kept[::-1])
