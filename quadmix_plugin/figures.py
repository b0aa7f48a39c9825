"""The figures of the report, each an inline SVG string drawn by matplotlib.

Figures follow the page: colours become CSS variables, so one drawing serves the light and the dark scheme; text
stays text; ids are prefixed with the figure's name; equal data gives equal bytes. What is shown and why is decided
in ``report``; nothing here computes a statistic beyond means for drawing.
"""

import contextlib
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree  # reads back only what matplotlib has just written

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.parameters import Parameters

Array = NDArray[np.float64]

# Light-scheme value of every colour role; the page defines --NAME for both schemes. Okabe-Ito, darkened for text.
COLOURS = {
    "ink": "#1b1f24",
    "muted": "#59636f",
    "line": "#d0d7de",
    "paper": "#fffffe",
    "accent": "#0067a5",
    "before": "#8b949e",
    "heat": "#08519c",
    "heat-low": "#1b1f25",
    "heat-mid": "#000000",
    "heat-high": "#ffffff",
    "series1": "#d55e00",
    "series2": "#00855f",
    "series3": "#b0578d",
    "series4": "#9a6700",
    "series5": "#5b5bd6",
}
_ROLE_OF = {value: name for name, value in COLOURS.items()}
_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_TEXT = 11  # px, as all lengths below
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quadmix-plugin",
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
    "font.size": _TEXT,
    "font.family": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": _TEXT,
    "axes.titleweight": "bold",
    "grid.color": COLOURS["line"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 10),
}


def plain(text: object, limit: int | None = None) -> str:
    """``text`` without control and invisible characters (which XML forbids or which hide), cut to ``limit``."""
    spaced = "".join(" " if c.isspace() else c for c in str(text))
    shown = "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in spaced)
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def domain_shares(domains: Sequence[str], before: ArrayLike, after: ArrayLike) -> str:
    """Share of tokens per domain [M] before and after selection, in percent, one row per domain."""
    old, new = (np.asarray(values, dtype=np.float64) for values in (before, after))
    labels = [plain(name, 27) for name in domains]
    left, row = _label_width(labels), 18
    with _style():
        figure, axes = _axes(left + 420, 66 + row * len(labels), left, 62, 22, 44)
        rows = np.arange(len(labels))
        axes.hlines(rows, old, new, color=COLOURS["line"], linewidth=3)
        axes.plot(old, rows, "o", color=COLOURS["before"], markersize=6.5, markerfacecolor=COLOURS["paper"])
        axes.plot(new, rows, "o", color=COLOURS["accent"], markersize=6.5)
        _rows(axes, labels)
        axes.set_xlim(0, max(1e-9, 1.06 * max(old.max(), new.max())))
        axes.set_xlabel("share of tokens (%)")
        axes.grid(axis="x")
        for y, o, n in zip(rows, old, new, strict=True):
            text = f"×{n / o:.2f}" if o > 0 else "new"
            axes.annotate(text, (1, y), (50, 0), **_BESIDE, ha="right", va="center", fontsize=10)
        axes.annotate("change", (1, -0.5), (50, 8), **_BESIDE, ha="right", va="center", fontsize=10)
        axes.annotate("○ before", (0, -0.5), (0, 8), **_BESIDE, va="center", color=COLOURS["muted"])
        axes.annotate("● after", (0, -0.5), (72, 8), **_BESIDE, va="center", color=COLOURS["accent"])
        top = np.argsort(np.abs(new - old))[::-1][:3]
        described = "; ".join(f"{labels[m]} {old[m]:.1f} to {new[m]:.1f} percent" for m in top)
        return _svg(figure, "shares", "Domain shares before and after selection", f"Largest changes: {described}.")


def score_histogram(scorer: str, kind: str, edges: ArrayLike, before: ArrayLike, after: ArrayLike | None) -> str:
    """Token-weighted histogram of one scorer: ``edges`` [b + 1], ``before`` and ``after`` [b] in tokens."""
    with _style():
        figure, axes = _axes(320, 210, 46, 10, 26, 44)
        old = _percent(before)
        axes.stairs(old, np.asarray(edges), fill=True, color=COLOURS["before"], alpha=0.45, linewidth=0)
        highest = old.max()
        if after is not None:
            new = _percent(after)
            highest = max(highest, new.max())
            axes.stairs(new, np.asarray(edges), color=COLOURS["accent"], linewidth=1.8, baseline=None)
        axes.set_ylim(0, 1.12 * max(highest, 1e-9))
        axes.set_title(plain(scorer, 34))
        axes.set_xlabel("raw score" if kind == "raw" else "normalised score σ(q), best = 0")
        axes.set_ylabel("tokens (%)")
        axes.grid(axis="y")
        return _svg(
            figure,
            f"score {kind} {scorer}",
            f"{kind} scores of {plain(scorer)}",
            "Token shares before (filled) and after (line).",
        )


def merge_weights(theta: Parameters) -> str:
    """Heat map of α [M, N]: how much each scorer counts in each domain."""
    from matplotlib.patches import Rectangle

    domains, scorers = _names(theta)
    labels, columns = [plain(name, 27) for name in domains], [plain(name, 14) for name in scorers]
    left, column, row = _label_width(labels), max(58, min(100, 300 // len(columns))), 20
    with _style():
        figure, axes = _axes(left + column * len(columns) + 24, 44 + row * len(labels), left, 24, 40, 4)
        for (m, n), weight in np.ndenumerate(theta.alpha):
            cell = Rectangle((n - 0.49, m - 0.46), 0.98, 0.92, facecolor=COLOURS["heat"], alpha=weight, linewidth=0)
            axes.add_patch(cell)
            # The contrast to the cell is above 4.3 at each limit, in both schemes.
            text = "heat-low" if weight < 0.5 else "heat-mid" if weight < 0.75 else "heat-high"
            axes.text(n, m, f"{weight:.2f}", ha="center", va="center", color=COLOURS[text], fontsize=10)
        _rows(axes, labels)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_xticks(range(len(columns)), columns)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("weight α of each scorer (rows sum to 1)")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        means = ", ".join(f"{name} {value:.2f}" for name, value in zip(columns, theta.alpha.mean(0), strict=True))
        return _svg(figure, "weights", "Merge weights per domain", f"Mean weight over domains: {means}.")


def sampling_curve(theta: Parameters, domain: int, rank_limit: float, value_limit: float) -> str:
    """S(r̄) of one domain (Eq. 3) on shared axes: r̄ up to ``rank_limit`` in (0, 1], S up to ``value_limit``."""
    from quadmix_plugin.sampling import sampling_value

    name, omega = plain(_names(theta)[0][domain]), float(theta.omega[domain])
    grid = np.unique(np.concatenate([np.linspace(0, rank_limit, 160)[1:], [omega, np.nextafter(omega, 2)]]))
    grid = grid[(grid > 0) & (grid <= rank_limit)]
    value = sampling_value(grid, np.full(grid.size, domain), theta)
    with _style():
        figure, axes = _axes(188, 152, 40, 6, 22, 38)
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
        return _svg(figure, f"curve {domain} {name}", f"Sampling curve of {name}", described)


def predicted_real(task: str, real: ArrayLike, predicted: ArrayLike, noise_sd: float | None, note: str = "") -> str:
    """Out-of-fold predicted against real loss of each proxy [T], with a band of one seed sd; ``note`` at its corner."""
    x, y = np.asarray(real, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    both = np.concatenate([x[finite], y[finite]]) if finite.any() else np.array([0.0, 1.0])
    pad = 0.06 * (np.ptp(both) or 1.0)
    limits = np.array([both.min() - pad, both.max() + pad])
    with _style():
        figure, axes = _axes(320, 310, 58, 12, 26, 46)
        if noise_sd is not None and np.isfinite(noise_sd):
            band = (limits - noise_sd, limits + noise_sd)
            axes.fill_between(limits, *band, color=COLOURS["before"], alpha=0.25, linewidth=0)
        axes.plot(limits, limits, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(x[finite], y[finite], "o", color=COLOURS["accent"], alpha=0.75, markersize=5, markeredgewidth=0)
        axes.set_xlim(*limits)
        axes.set_ylim(*limits)
        axes.locator_params(nbins=5)
        axes.grid()
        axes.set_title(plain(task, 22))
        axes.set_title(plain(note), loc="right", fontsize=10, fontweight="normal", color=COLOURS["muted"])
        axes.set_xlabel("real loss (nats per token)")
        axes.set_ylabel("predicted loss (nats per token)")
        title, described = f"Predicted against real loss: {plain(task)}", f"{int(finite.sum())} proxies."
        return _svg(figure, f"prediction {task}", title, described)


def seed_dots(measure: str, losses: Mapping[str, Sequence[float]], highlight: str) -> str:
    """One row per selector: a dot per seed, the mean as a bar, ± one sd as a line; ``highlight`` is coloured."""
    labels = [plain(name, 24) for name in losses]
    left = _label_width(labels)
    with _style():
        figure, axes = _axes(left + 206, 76 + 26 * len(labels), left, 14, 28, 44)
        described = []
        for y, (name, values) in enumerate(losses.items()):
            seeds = np.asarray(values, dtype=np.float64)
            seeds = seeds[np.isfinite(seeds)]
            if not seeds.size:
                axes.annotate("no finite loss", (0, y), (4, 0), **_BESIDE, va="center", color=COLOURS["muted"])
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
        _rows(axes, labels)
        if highlight in losses:
            axes.get_yticklabels()[list(losses).index(highlight)].set_fontweight("bold")
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x")
        axes.set_title(plain(measure, 40))
        axes.set_xlabel("loss (nats per token), lower is better")
        title = f"Loss per selector and seed: {plain(measure)}"
        return _svg(figure, f"seeds {measure}", title, f"Means: {'; '.join(described)}.")


def training_curves(curves: Mapping[str, Sequence[tuple[Array, Array]]], highlight: str) -> str:
    """Training loss against tokens seen, a line per selector (mean over seeds) with the range of its seeds.

    ``curves``: selector → one (tokens_seen [s], loss [s]) per seed, tokens rising.
    """
    names = [name for name in curves if curves[name]]
    scale, unit = _token_unit(max(float(x[-1]) for name in names for x, _ in curves[name]))
    drawn = {name: _mean_curve(curves[name]) for name in names}
    with _style():
        figure, axes = _axes(680, 330, 54, 166, 12, 46)
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
        _end_labels(axes, drawn, highlight, (low, high), 272)
        ends = "; ".join(f"{plain(name)} {drawn[name][1][-1]:.3f}" for name in names)
        return _svg(figure, "training", "Training loss against tokens seen", f"Final training loss: {ends}.")


_BESIDE: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


def _line(i: int, highlighted: bool) -> tuple[str, Any, float]:
    if highlighted:
        return COLOURS["accent"], "-", 2.6
    return COLOURS[f"series{i % 5 + 1}"], _DASHES[i % len(_DASHES)], 1.5


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


def _end_labels(axes: Any, drawn: Mapping[str, Any], highlight: str, limits: tuple[float, float], pixels: int) -> None:
    """Names beside the ends of their lines, moved apart so that none covers another."""
    (low, high), names = limits, list(drawn)
    step = 15 * (high - low) / pixels
    order = sorted(range(len(names)), key=lambda i: drawn[names[i]][1][-1])
    places: list[float] = []
    for i in order:
        end = float(drawn[names[i]][1][-1])
        places.append(max(end, places[-1] + step) if places else end)
    excess = max(0.0, places[-1] - high)
    for i, y in zip(order, places, strict=True):
        colour, dash, _ = _line(i, names[i] == highlight)
        at = (y - excess - low) / (high - low)
        axes.plot([1.01, 1.05], [at, at], transform=axes.transAxes, clip_on=False, color=colour, linestyle=dash)
        label = axes.text(1.065, at, plain(names[i], 20), transform=axes.transAxes, va="center", color=colour)
        label.set_fontweight("bold" if names[i] == highlight else "normal")


def _token_unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if largest >= scale:
            return scale, unit
    return 1.0, ""


def _names(theta: Parameters) -> tuple[Sequence[str], Sequence[str]]:
    domains = theta.domains or [f"domain {m}" for m in range(theta.n_domains)]
    return domains, theta.scorers or [f"scorer {n}" for n in range(theta.n_scorers)]


def _percent(tokens: ArrayLike) -> Array:
    values = np.asarray(tokens, dtype=np.float64)
    return 100 * values / (values.sum() or 1.0)


def _label_width(labels: Sequence[str]) -> int:
    return 14 + int(6.1 * max((len(label) for label in labels), default=0))


def _rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has the font, not we
        yield


def _axes(width: int, height: int, left: int, right: int, top: int, bottom: int) -> tuple[Any, Any]:
    """A figure of this size and its axes inside these margins, all in pixels (72 per inch: one px is one point)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    inside = ((width - left - right) / width, (height - top - bottom) / height)
    return figure, figure.add_axes((left / width, bottom / height, *inside))


def _svg(figure: Any, name: str, title: str, description: str) -> str:
    """The figure as SVG text: titled for screen readers, ids unique to ``name``, colours as CSS variables."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - matplotlib's own output
    prefix = "f-" + re.sub(r"[^A-Za-z0-9]", lambda m: f"-{ord(m.group()):x}", name) + "-"
    # The metadata names outside addresses; the style sheet would apply to the whole page.
    for element in [root, *root.iter(f"{{{_SVG}}}defs")]:
        for child in [*element.findall(f"{{{_SVG}}}metadata"), *element.findall(f"{{{_SVG}}}style")]:
            element.remove(child)
    for element in root.iter():
        _follow_page(element, prefix)
    width, height = (round(float(root.attrib[side].removesuffix("pt"))) for side in ("width", "height"))
    root.attrib = {"xmlns": _SVG, "width": str(width), "height": str(height), "viewBox": root.attrib["viewBox"]}
    root.attrib |= {"style": f"--least: {round(0.8 * width)}px", "role": "img"}
    root.attrib["aria-labelledby"] = f"{prefix}title {prefix}desc"
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        child = ElementTree.Element(tag, {"id": prefix + tag})
        child.text = plain(text)
        root.insert(position, child)
    return ElementTree.tostring(root, encoding="unicode")


def _follow_page(element: ElementTree.Element, prefix: str) -> None:
    """Makes one element fit for a page: plain tag, ids where they are referred to, colours and font of the page."""
    element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    element.tail = None
    if element.tag != "text":
        element.text = None
    found = element.attrib
    if element.tag == "g":
        found.pop("id", None)
    if found.get("transform", "").startswith("rotate(-0 "):
        del found["transform"]
    if reference := found.pop(_HREF, None):
        found["href"] = f"#{prefix}{reference.removeprefix('#')}"
    if "id" in found:
        found["id"] = prefix + found["id"]
    if "clip-path" in found:
        found["clip-path"] = found["clip-path"].replace("url(#", f"url(#{prefix}")
    for name in {"d", "x", "y"} & found.keys():
        found[name] = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number.group()):.2f}", found[name])
    if "style" in found:
        style = re.sub(r"'DejaVu Sans'[^;]*", "var(--sans, sans-serif)", found["style"])
        found["style"] = re.sub(r"#[0-9a-f]{6}", _as_variable, style)


def _as_variable(match: re.Match[str]) -> str:
    role = _ROLE_OF.get(match.group())
    return f"var(--{role}, {match.group()})" if role else match.group()
