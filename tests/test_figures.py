"""The figures: they show the numbers they are given, every word is legible, and equal data gives equal files."""

import functools
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.image import imread

from quadmix_plugin import figures
from quadmix_plugin.errors import InputError
from quadmix_plugin.figures.drawing import style
from quadmix_plugin.parameters import sample_parameters

SVG = "{http://www.w3.org/2000/svg}"
NAMES = (
    "Adult Arts_and_Entertainment Autos_and_Vehicles Beauty_and_Fitness Books_and_Literature "
    "Business_and_Industrial Computers_and_Electronics Finance Food_and_Drink Games Health Hobbies_and_Leisure "
    "Home_and_Garden Internet_and_Telecom Jobs_and_Education Law_and_Government News Online_Communities "
    "People_and_Society Pets_and_Animals Real_Estate Science Sensitive_Subjects Shopping Sports "
    "Travel_and_Transportation"
)
DOMAINS = NAMES.split(" ")
SCORERS = ["ask-llm", "fineweb-edu", "dclm-fasttext"]
TASKS = ["openhermes-response-only", "hellaswag", "arc", "mmlu-stem-high-school", "triviaqa", "commonsense-qa-long"]
SELECTORS = ["quadmix", "random", *(f"top_k {scorer}" for scorer in SCORERS), "criteria-mix", "dsir", "regmix"]
NAMED = ["θ*", "paper's search", "best observed proxy", "Random", "top_k fineweb-edu"]
HOSTILE = "<script>\"'&]]> $x^{2$ \x00\u202e ../../etc"


def _shares() -> figures.Drawing:
    before, after = np.random.default_rng(0).dirichlet(np.ones(26), 2) * 100
    return figures.domain_shares(DOMAINS, before, after)


def _theta():
    return sample_parameters(1, 3, 26, 1, domains=DOMAINS, scorers=SCORERS)[0]


def _errors() -> figures.Drawing:
    numbers, rng = np.array([32, 64, 128, 256, 512, 1024, 2048, 3000]), np.random.default_rng(1)
    names = ("lightgbm", "svr-linear", "svr-rbf", "gp", "auto")
    table = {name: (numbers, (0.2 + 0.02 * rng.random((8, 5))) / np.sqrt(numbers)[:, None]) for name in names}
    return figures.error_by_proxies(TASKS[3], table, noise_mae=0.004)


def _draws(n: int = 2000) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    rng = np.random.default_rng(2)
    draws = {task: 3 + 0.2 * i + rng.normal(0, 0.03, n) for i, task in enumerate(["objective", *TASKS])}
    shifts = dict(zip(NAMED, (-0.11, -0.109, -0.07, 0.03, 0.05), strict=True))
    marks = {name: {task: float(np.median(of) + shift) for task, of in draws.items()} for name, shift in shifts.items()}
    del marks["Random"]["arc"]
    return draws, marks


def _importance() -> figures.Drawing:
    names = [f"alpha[{scorer}, {domain}]" for scorer in SCORERS for domain in DOMAINS]
    values = np.random.default_rng(3).exponential(0.002, len(names))
    return figures.importance(names, values, 0.2 * values, task=TASKS[0])


def _pareto() -> figures.Drawing:
    (draws, marks), (x_task, y_task) = _draws(5000), TASKS[:2]
    x, y = draws[x_task], draws[y_task]
    best = np.minimum.accumulate(y[np.argsort(x)])
    front = np.isin(y, best)
    return figures.pareto_front(x_task, y_task, x, y, front, marks)


def _predicted() -> figures.Drawing:
    real, noise = np.random.default_rng(4).normal(0, 0.03, (2, 200))
    return figures.predicted_real(TASKS[0], 3 + real, 3 + real + noise / 2, 0.01, "Spearman 0.87")


def _seeds() -> figures.Drawing:
    losses = {name: [3 + 0.01 * i + seed for seed in (0, 0.005, -0.005)] for i, name in enumerate(SELECTORS)}
    return figures.seed_dots("openhermes-response-only (weighted)", losses, "quadmix")


def _training() -> figures.Drawing:
    x = np.linspace(1e6, 5e8, 60)
    curves = {name: [(x, 3 + 6 * np.exp(-x / 5e7) + 0.03 * i)] for i, name in enumerate(SELECTORS)}
    return figures.training_curves(curves, "quadmix")


FIGURES: dict[str, Callable[[], figures.Drawing]] = {
    "shares": _shares,
    "weights": lambda: figures.merge_weights(_theta()),
    "curve": lambda: figures.sampling_curve(_theta(), 6, 0.11, 2.0),
    "score": lambda: figures.score_histogram(SCORERS[2], "raw", np.linspace(-4, 4, 11), np.ones(10), np.arange(10)),
    "predicted": _predicted,
    "errors": _errors,
    "candidates": lambda: figures.predicted_candidates(*_draws()),
    "importance": _importance,
    "pareto": _pareto,
    "seeds": _seeds,
    "training": _training,
}


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)  # noqa: S314 - our own output


@functools.cache
def drawn(kind: str) -> figures.Drawing:
    return FIGURES[kind]()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return functools.cache(lambda kind: drawn(kind).save(folder))


def texts(figure: figures.Drawing) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Every text that is drawn, with its box in px: left, top, right, bottom."""
    found = []

    class Recorder(RendererAgg):
        def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
            width, height, descent = self.get_text_width_height_descent(s, prop, False)
            if angle == 90:
                found.append((s, (x - height + descent, y - width, x + descent, y)))
            else:
                found.append((s, (x, y - height + descent, x + width, y + descent)))

    width, height = (72 * size for size in figure.figure.get_size_inches())
    with style():
        figure.figure.draw(Recorder(width, height, 72))
    return found


def cut(figure: figures.Drawing) -> list[str]:
    """The texts that do not lie whole within the figure."""
    width, height = 72 * figure.figure.get_size_inches()
    return [s for s, box in texts(figure) if min(box) < 0 or box[2] > width or box[3] > height]


@pytest.mark.parametrize("kind", FIGURES)
def test_with_26_domains_and_long_names_no_text_is_cut_or_covers_another(kind):
    found = texts(drawn(kind))
    assert found
    assert not cut(drawn(kind))
    covered = [
        (s, t)
        for (s, a), (t, b) in combinations(found, 2)
        if min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1.5
    ]
    assert not covered


def test_names_of_a_hundred_letters_are_shortened_to_fit():
    name = "a_name_of_eleven_" * 6
    (draws, _), theta = _draws(50), sample_parameters(1, 2, 2, 1, domains=[name, "b"], scorers=[name, "b"])[0]
    losses = {name: [3.0, 3.1], "b": [3.2, 3.3]}
    marks = {name: {name: 3.0, "b": 3.0}}
    made = [
        figures.domain_shares([name, "b"], [40, 60], [60, 40]),
        figures.merge_weights(theta),
        figures.sampling_curve(theta, 0, 0.1, 2.0),
        figures.score_histogram(name, "raw", [0, 1, 2], [1, 1], None),
        figures.predicted_real(name, [3.0, 3.1], [3.0, 3.1], None, "Spearman 1.00"),
        figures.error_by_proxies(name, {name: ([8, 16], [0.2, 0.1]), "b": ([8, 16], [0.2, 0.1])}),
        figures.predicted_candidates({name: draws["objective"]}, marks),
        figures.importance([name, "b"], [0.02, 0.01], [0.001, 0.001], task=name),
        figures.pareto_front(name, "b", [3.0, 3.1], [3.1, 3.0], [True, True], marks),
        figures.seed_dots(name, losses, "b"),
        figures.training_curves({k: [(np.arange(1.0, 9), np.arange(9.0, 1, -1))] for k in losses}, "b"),
    ]
    for figure in made:
        assert not cut(figure)
        assert any("…" in s for s, _ in texts(figure))


@pytest.mark.parametrize("kind", FIGURES)
def test_no_text_is_smaller_than_7_px_on_a_phone(kind):
    root = parsed(drawn(kind).svg)
    sizes = [
        float(size) for text in root.iter(SVG + "text") for size in re.findall(r"([\d.]+)px", text.get("style", ""))
    ]
    # A phone of 360 px has 332 px for a figure; what is wide shrinks by a fifth at most and scrolls.
    scale = 0.8 if drawn(kind).wide else min(1, 332 / int(root.attrib["width"]))
    assert min(sizes) * scale >= 7


@pytest.mark.parametrize("kind", FIGURES)
def test_equal_data_gives_equal_bytes_on_the_page_and_in_both_files(kind, saved, tmp_path):
    first, second = drawn(kind), FIGURES[kind]()
    assert first == second
    assert [path.name for path in saved(kind)] == [f"{first.stem}.svg", f"{first.stem}.png"]
    for one, other in zip(saved(kind), second.save(tmp_path), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("kind", FIGURES)
def test_files_stand_alone_on_white(kind, saved):
    svg, png = saved(kind)
    root = parsed(svg.read_text(encoding="utf-8"))
    assert [root.find(SVG + tag).text for tag in ("title", "desc")] == [drawn(kind).title, drawn(kind).description]
    assert "fill: #ffffff" in root.find(SVG + "rect").get("style")
    assert "var(" not in svg.read_text(encoding="utf-8")
    styles = [text.get("style") for text in root.iter(SVG + "text")]
    assert all("sans-serif" in style and "DejaVu" not in style for style in styles)
    pixels = imread(png)
    assert pixels.shape[:2] == (2 * int(root.get("height")), 2 * int(root.get("width")))
    assert np.all(pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 1)


def test_hostile_names_become_text_and_never_paths(tmp_path):
    numbers = ([8, 16], [[0.2], [0.1]])
    named = {HOSTILE: {HOSTILE: 3.0, "b": 3.0}}
    made = [
        figures.error_by_proxies(HOSTILE, {HOSTILE: numbers}, unit=HOSTILE),
        figures.predicted_candidates({HOSTILE: [2.0, 3.0]}, named, unit=HOSTILE),
        figures.importance([HOSTILE], [1.0], task=HOSTILE, unit=HOSTILE),
        figures.pareto_front(HOSTILE, "b", [1.0], [1.0], [True], named, unit=HOSTILE),
    ]
    for figure in made:
        paths = figure.save(tmp_path)
        assert {path.parent for path in paths} == {tmp_path}
        assert "\x00" not in parsed(paths[0].read_text(encoding="utf-8")).find(SVG + "title").text
    assert len(list(tmp_path.iterdir())) == 8


def test_names_that_differ_beyond_ascii_have_files_of_their_own():
    stems = [figures.importance(["a"], [1.0], task=task).stem for task in ("数学", "科学", "", "x" * 200, "x" * 201)]
    assert len(set(stems)) == 5
    assert all(stem.isascii() and len(stem) < 100 for stem in stems)


@pytest.mark.parametrize("stem", ["../up", "a/b", "", ".hidden", "a\x00b"])
def test_a_stem_that_is_no_file_name_is_refused(stem, tmp_path):
    with pytest.raises(InputError, match="not a file name"):
        drawn("curve").save(tmp_path / "folder", stem)
    assert not list(tmp_path.iterdir())


def test_error_lines_are_means_over_finite_repeats_with_their_range():
    table = {"gp": ([64, 32, 128], [[0.2, 0.4], [0.6, np.nan], [np.nan, np.inf]])}
    axes = figures.error_by_proxies("t", table, noise_mae=0.1).figure.axes[0]
    line = axes.lines[0]
    assert line.get_xdata() == pytest.approx([32, 64])
    assert line.get_ydata() == pytest.approx([0.6, 0.3])
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.2, 0.6))
    assert any(np.allclose(line.get_ydata(), 0.1) for line in axes.lines)
    assert axes.get_ylim()[0] == 0


def test_error_lines_differ_without_colour():
    lines = [line for line in drawn("errors").figure.axes[0].lines if len(line.get_xdata()) == 8]
    assert len({(line.get_marker(), str(line.get_linestyle())) for line in lines}) == 5
    assert len({line.get_marker() for line in lines}) == 5


def test_candidates_stand_at_their_losses_among_the_quantiles_of_their_own_task():
    draws, marks = _draws()
    _, *panels = drawn("candidates").figure.axes
    assert len(panels) == len(draws)
    shapes = {}
    for panel, (task, values) in zip(panels, draws.items(), strict=True):
        assert panel.get_title(loc="left") == task
        bands = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in panel.patches]
        assert np.allclose(bands, [np.percentile(values, (1, 99)), np.percentile(values, (25, 75))])
        median, *points = panel.lines
        assert median.get_xdata() == pytest.approx([np.median(values)] * 2)
        expected = [(name, of[task]) for name, of in marks.items() if task in of]
        assert [point.get_xdata()[0] for point in points] == pytest.approx([loss for _, loss in expected])
        for (name, _), point in zip(expected, points, strict=True):
            shapes.setdefault(name, set()).add((point.get_marker(), point.get_color(), point.get_ydata()[0]))
    assert all(len(looks) == 1 for looks in shapes.values())
    assert len({next(iter(looks))[0] for looks in shapes.values()}) == len(NAMED)


def test_importance_shows_the_largest_first_and_says_how_many_there_were():
    figure = figures.importance(["low", "none", "high", "mid"], [-0.1, np.nan, 0.5, 0.2], [0.01, 0, 0.1, 0.1], top=3)
    axes = figure.figure.axes[0]
    bars = sorted(axes.patches, key=lambda bar: bar.get_y())
    assert [bar.get_width() for bar in bars] == pytest.approx([0.5, 0.2, -0.1])
    words = [text.get_text() for text in axes.texts]
    assert words == ["high", "0.500", "mid", "0.200", "low", "−0.100"]
    whiskers = axes.containers[1].lines[2][0].get_segments()
    assert np.allclose(whiskers[0][:, 0], [0.4, 0.6])
    assert "20 largest of 78" in drawn("importance").description


def test_the_front_is_drawn_whole_and_connected_while_the_cloud_is_thinned():
    rng = np.random.default_rng(5)
    x = rng.random(5000)
    y = 1 - x + rng.random(5000)
    front = np.zeros(5000, dtype=bool)
    front[:40] = True
    y[:40] = -x[:40]
    figure = figures.pareto_front("a", "b", x, y, front, {"both": {"a": 0.5, "b": 0.5}, "one": {"a": 0.5}})
    cloud, line, *marks = figure.figure.axes[0].lines
    assert 400 < len(cloud.get_xdata()) <= 800
    assert set(cloud.get_xdata()).isdisjoint(x[:40])
    assert list(line.get_xdata()) == sorted(x[:40])
    assert line.get_linestyle() == "-"
    assert [(mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks] == [(0.5, 0.5)]
    assert "of the 4960 other candidates" in figure.description


def test_nothing_to_show_is_an_empty_figure_and_not_an_error(tmp_path):
    empty = [
        figures.error_by_proxies("t", {}, noise_mae=float("nan")),
        figures.predicted_candidates({"t": [np.nan]}, {"θ*": {}}),
        figures.importance([], []),
        figures.pareto_front("a", "b", [], [], [], {}),
    ]
    for figure in empty:
        assert parsed(figure.svg).find(SVG + "title").text == figure.title
    assert "no prediction" in [s for s, _ in texts(empty[1])]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: figures.error_by_proxies("t", {"gp": ([1, 2, 3], [[1.0], [2.0]])}), "errors of 'gp'"),
        (lambda: figures.importance(["a", "b"], [1.0]), "2 names, 1 values"),
        (lambda: figures.importance(["a"], [1.0], [1.0, 2.0]), "2 whiskers"),
        (lambda: figures.pareto_front("a", "b", [1.0, 2.0], [1.0], [True], {}), "on_front"),
    ],
)
def test_lengths_that_differ_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_a_scatter_of_thousands_stays_small():
    real = np.random.default_rng(6).normal(size=3000)
    assert len(figures.predicted_real("task", real, real, None).svg) < 300_000


def test_png_has_the_stated_resolution(saved):
    content = saved("curve")[1].read_bytes()
    at = content.index(b"pHYs") + 4
    per_metre, _, unit = struct.unpack(">IIB", content[at : at + 9])
    assert (round(per_metre * 0.0254), unit) == (144, 1)


def test_importing_the_figures_does_not_import_matplotlib():
    code = "import sys, quadmix_plugin.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
