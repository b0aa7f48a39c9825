"""What all figures share: their style, the size of their parts in pixels, and ``Drawing``, the finished figure.

A drawing follows the page: colours become CSS variables, so one drawing serves the light and the dark scheme; text
stays text; ids are prefixed with the figure's name; equal data gives equal bytes. ``Drawing.save`` writes files that
stand alone.
"""

import contextlib
import hashlib
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree  # reads back only what matplotlib has just written

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.atomic import atomic_path
from quadmix_plugin.errors import InputError

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
BESIDE: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
_ROLE_OF = {value: name for name, value in COLOURS.items()}
_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_TEXT = 11  # px, as all lengths below
_PIXELS_PER_INCH = 72  # so that one px is one point
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
    "grid.color": COLOURS["line"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 10),
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure: ``svg`` for the page, ``save`` for files; equal data gives equal bytes in all of them.

    ``title`` and ``description`` are also in the SVG, for screen readers. ``wide``: on a narrow screen it scrolls in
    its own box, where others shrink. ``figure`` is matplotlib's, from which the PNG is drawn.
    """

    name: str
    title: str
    description: str
    svg: str = field(repr=False)
    wide: bool
    figure: Any = field(repr=False, compare=False)

    @classmethod
    def of(cls, figure: Any, name: str, title: str, description: str, wide: bool = False) -> Self:
        """Finishes a matplotlib figure, inside ``style()``; ``name`` must be the only one of its kind on a page."""
        title, description = plain(title), plain(description)
        return cls(name, title, description, _page_svg(figure, name, title, description), wide, figure)

    @property
    def stem(self) -> str:
        """A file name without suffix made from ``name``: ASCII, short, and marked where ``name`` had more than that."""
        kept = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name).strip("-.")[:80] or "figure"
        if re.fullmatch(r"[A-Za-z0-9_. -]+", self.name) and kept == self.name.replace(" ", "-"):
            return kept
        return f"{kept}-{hashlib.sha256(self.name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"

    def save(self, folder: Path, stem: str | None = None) -> list[Path]:
        """Writes ``<stem>.svg`` and ``<stem>.png`` (twice the size in pixels), both on white, whole or not at all.

        Raises:
            InputError: ``stem`` is not a plain file name.
            StorageError: the folder cannot be written.
        """
        stem = self.stem if stem is None else stem
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", stem):
            raise InputError(f"figure {self.title!r}: {stem!r} is not a file name; use letters, digits, '.', '_', '-'")
        buffer = io.BytesIO()
        with style():
            self.figure.savefig(
                buffer, format="png", dpi=2 * _PIXELS_PER_INCH, facecolor="white", metadata={"Software": None}
            )
        written = []
        for suffix, content in (("svg", _standalone(self.svg).encode()), ("png", buffer.getvalue())):
            path = Path(folder) / f"{stem}.{suffix}"
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
            written.append(path)
        return written


@dataclass(frozen=True)
class EndLabel:
    """The name of a line, to be written beside its end at ``value`` of the vertical axis."""

    value: float
    text: str
    colour: str
    dash: Any = "-"
    marker: str | None = None
    bold: bool = False


def plain(text: object, limit: int | None = None) -> str:
    """``text`` without control and invisible characters (which XML forbids or which hide), cut to ``limit``."""
    spaced = "".join(" " if c.isspace() else c for c in str(text))
    shown = "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in spaced)
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Our settings of matplotlib, for as long as a figure is drawn."""
    import matplotlib as mpl

    with mpl.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has the font, not we
        yield


def sheet(width: int, height: int, left: int, right: int, top: int, bottom: int) -> tuple[Any, Any]:
    """A figure of this size and its axes inside these margins, all in pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH), dpi=_PIXELS_PER_INCH)
    inside = ((width - left - right) / width, (height - top - bottom) / height)
    return figure, figure.add_axes((left / width, bottom / height, *inside))


def heading(figure: Any, text: str) -> None:
    """The name of what is shown, in bold at the upper left of the figure, cut to its width."""
    width, height = (_PIXELS_PER_INCH * size for size in figure.get_size_inches())
    shown = plain(text, int((width - 12) / 7.4))
    figure.text(6 / width, 1 - 5 / height, shown, va="top", fontweight="bold")


def label_width(labels: Sequence[str]) -> int:
    """Pixels that the longest of these row labels takes."""
    return 14 + int(6.1 * max((len(label) for label in labels), default=0))


def label_rows(axes: Any, labels: Sequence[str]) -> None:
    """Makes the vertical axis a list of rows, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def heat_cells(axes: Any, values: Array, form: str) -> None:
    """Values [rows, columns] in 0 … 1 as the cells of a table, the stronger the colour the larger."""
    from matplotlib.patches import Rectangle

    for (row, column), value in np.ndenumerate(values):
        at = (column - 0.49, row - 0.46)
        axes.add_patch(Rectangle(at, 0.98, 0.92, facecolor=COLOURS["heat"], alpha=value, linewidth=0))
        # The contrast to the cell is above 4.3 at each limit, in both schemes.
        text = "heat-low" if value < 0.5 else "heat-mid" if value < 0.75 else "heat-high"
        axes.text(column, row, form.format(value), ha="center", va="center", color=COLOURS[text], fontsize=10)
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def line_style(i: int) -> tuple[str, Any]:
    """Colour and dashes of the i-th line; neighbours differ in both."""
    return COLOURS[f"series{i % 5 + 1}"], _DASHES[i % len(_DASHES)]


def end_labels(axes: Any, labels: Sequence[EndLabel], limits: tuple[float, float], pixels: int) -> None:
    """Names beside the ends of their lines, moved apart so that none covers another; ``pixels``: height of the axes."""
    low, high = limits
    step = 15 * (high - low) / pixels
    places: list[float] = []
    ordered = sorted(labels, key=lambda label: label.value)
    for label in ordered:
        places.append(max(label.value, places[-1] + step) if places else label.value)
    excess = max(0.0, places[-1] - high) if places else 0.0
    for label, y in zip(ordered, places, strict=True):
        at = (y - excess - low) / (high - low)
        look: Any = {"transform": axes.transAxes, "clip_on": False, "color": label.colour}
        axes.plot([1.01, 1.05], [at, at], linestyle=label.dash, **look)
        if label.marker:
            axes.plot([1.03], [at], label.marker, markersize=5, **look)
        weight: Any = "bold" if label.bold else "normal"
        look = {"transform": axes.transAxes, "va": "center", "color": label.colour, "fontsize": 10}
        axes.text(1.065, at, plain(label.text, 20), fontweight=weight, **look)


def _page_svg(figure: Any, name: str, title: str, description: str) -> str:
    """The figure as SVG text: titled for screen readers, ids unique to ``name``, colours as CSS variables."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - matplotlib's own output
    prefix = f"f{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}-"
    # The metadata names outside addresses; the style sheet would apply to the whole page.
    for element in [root, *root.iter(f"{{{_SVG}}}defs")]:
        for child in [*element.findall(f"{{{_SVG}}}metadata"), *element.findall(f"{{{_SVG}}}style")]:
            element.remove(child)
    for element in root.iter():
        _follow_page(element, prefix)
    for group in root.iter("g"):
        _share_style(group)
    width, height = (round(float(root.attrib[side].removesuffix("pt"))) for side in ("width", "height"))
    root.attrib = {"xmlns": _SVG, "width": str(width), "height": str(height), "viewBox": root.attrib["viewBox"]}
    root.attrib |= {"style": f"--least: {round(0.8 * width)}px", "role": "img"}
    root.attrib["aria-labelledby"] = f"{prefix}title {prefix}desc"
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        child = ElementTree.Element(tag, {"id": prefix + tag})
        child.text = text
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


def _share_style(group: ElementTree.Element) -> None:
    """Says once what all markers of a line look like, which else is the greater part of a scatter of thousands."""
    markers = list(group)
    if {marker.tag for marker in markers} != {"use"}:
        return
    looks = {marker.attrib.get("style") for marker in markers}
    if len(looks) == 1 and "style" not in group.attrib and None not in looks:
        group.attrib["style"] = markers[0].attrib["style"]
        for marker in markers:
            del marker.attrib["style"]


def _as_variable(match: re.Match[str]) -> str:
    role = _ROLE_OF.get(match.group())
    return f"var(--{role}, {match.group()})" if role else match.group()


def _standalone(svg: str) -> str:
    """The SVG of a page as a file of its own: fixed colours, any sans-serif font, white ground."""
    root = ElementTree.fromstring(svg)  # noqa: S314 - our own output
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
        if "style" in element.attrib:
            element.attrib["style"] = re.sub(r"var\(--[a-z0-9-]+, ([^)]*)\)", r"\1", element.attrib["style"])
        if "href" in element.attrib:  # viewers older than SVG 2 know only the other spelling
            element.attrib["xlink:href"] = element.attrib.pop("href")
    del root.attrib["style"]
    root.attrib = {"xmlns": _SVG, "xmlns:xlink": _HREF[1:].removesuffix("}href"), **root.attrib}
    sheet_text = ElementTree.Element("style")
    sheet_text.text = "* { stroke-linejoin: round; stroke-linecap: butt; }"  # as the page's own sheet says
    ground = ElementTree.Element("rect", {"width": "100%", "height": "100%", "style": "fill: #ffffff"})
    root[2:2] = [sheet_text, ground]  # after title and desc
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
