"""The report: its verdict follows the numbers, and the page is one safe, whole, repeatable file."""

import dataclasses
import functools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest

from quadmix_plugin import figures
from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import sample_parameters
from quadmix_plugin.report import (
    ReportData,
    ScoreHistogram,
    SearchOutcome,
    SelectorShares,
    StepRows,
    render,
)
from quadmix_plugin.search.gain import Prediction, gain_over
from quadmix_plugin.verdict import OBJECTIVE, compare, judge

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> $x^{2$ {{ 7*7 }} \x00\u202e&amp; javascript:a()"
SVG = "{http://www.w3.org/2000/svg}"
SEEDS = np.array([0.0, 0.01, -0.01])


def report_data(n_domains: int = 5, gain: float = 0.1, name: str = "") -> ReportData:
    """A whole run; ``name`` is appended to every name that a user or a model can choose."""
    rng = np.random.default_rng(7)
    domains = [f"Domain_{m:02d}{name}" for m in range(n_domains)]
    scorers = [f"scorer-{n}{name}" for n in range(3)]
    tasks = [f"task-{t}{name}" for t in range(2)]
    selectors = {"quadmix": -gain, f"random{name}": 0.05, f"top_k{name}": 0.0}
    tokens = np.arange(1, n_domains + 1) * 1000
    results, curves, predictions = [], [], []
    for selector, shift in selectors.items():
        for seed, noise in enumerate(SEEDS):
            losses = {f"loss_{task}": 6 + shift + noise + i for i, task in enumerate(tasks)}
            facts = {"tokens_seen": 50_000, "unique_tokens": 9_000, "epochs": 5.6, "seconds": 3.0}
            results.append({"selector": selector, "seed": seed, **losses, **facts})
            for step in range(20):
                point = {"step": step, "tokens_seen": (step + 1) * 512, "train_loss": 8 - step / 10 + noise}
                curves.append({"selector": selector, "seed": seed, **point})
    for task in tasks:
        for proxy in range(12):
            real = float(rng.normal(6, 0.1))
            predictions.append({"proxy": proxy, "task": task, "real": real, "predicted": real + 0.01})
    shares = {"documents_before": tokens // 100, "tokens_before": tokens, "documents_after": tokens // 500}
    return ReportData(
        title=f"A run{name}",
        created_from={f"recipe{name}": "ab" * 32},
        steps=[StepRows(f"label{name}", 100, 97, {f"empty text{name}": 3}, 61.2, f"note{name}")],
        domains=pa.table(
            {"domain": domains, **shares, "tokens_after": tokens[::-1] // 10, "unique_tokens_after": tokens // 20}
        ),
        scores=[ScoreHistogram(s, "raw", np.linspace(0, 5, 11), np.ones(10), np.arange(10)) for s in scorers],
        theta=sample_parameters(1, 3, n_domains, 1, domains=domains, scorers=scorers)[0],
        predictions=pa.Table.from_pylist(predictions),
        metrics={
            tasks[0]: {"spearman": 0.81, "pearson": 0.72, "r2": -0.34, "mae": 0.0123}
            | {"interval": {"mae": [0.01, 0.02], "spearman": [0.55, 0.93]}},
            tasks[1]: {"spearman": 0.81, "mae": 0.0123},
        },
        noise={task: {"theta_sd": 0.1, "noise_sd": 0.02, "signal_to_noise": 5.0, "repeats": 3} for task in tasks},
        search=SearchOutcome({tasks[0]: 1.0}, 5.9, 5.95, 4, {f"regressor{name}": f"lightgbm{name}"}),
        results=pa.Table.from_pylist(results),
        selections=[SelectorShares(s, dict.fromkeys(domains, 1.0), 0.25) for s in selectors],
        curves=pa.Table.from_pylist(curves),
        methods=[
            {"name": f"default search{name}", "predicted": 5.9, "low": 5.8, "high": 6.1, "real": 5.95},
            {"name": "best observed proxy", "predicted": None},
        ],
        ablations=[
            {"excluded": scorers[0], "predicted": 5.87, "low": 5.7, "high": 6.2, "verdict": f"No evidence{name}"},
            {"excluded": f"{scorers[0]}, {scorers[1]}"},
        ],
        drawings=[figures.importance([f"omega[{d}]" for d in domains[:2]], [0.2, 0.1], task=tasks[0])],
        gate={
            "verdict": f"No evidence of gain{name}",
            "evidence": False,
            "unit": f"nats per token{name}",
            "rows": [
                {"rival": f"random{name}", "loss": 6.0, "gain": 0.1, "in_noise": -0.5, "low": -0.05, "high": 0.25}
                | {"overlap": 0.375},
                {"rival": "top_k", "loss": 6.0, "gain": 0.1},
            ],
        },
        provenance={"versions": {f"torch{name}": f"2.11{name}"}, "seeds": [0, 1]},
        warnings=[f"A warning{name}"],
    )


@functools.cache
def rendered(name: str = "") -> str:
    return render(report_data(name=name))


def comparison_only() -> ReportData:
    """A run of which only the comparison is shown: quick to draw."""
    kept = {"title", "search", "results", "selections", "quadmix"}
    return ReportData(**{field: getattr(report_data(), field) for field in kept})


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._quiet = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self._quiet = tag if tag == "style" else ""

    def handle_data(self, data: str) -> None:
        if not self._quiet:
            self.text += data

    def words(self) -> str:
        return " ".join(self.text.split())


def cells(page: str) -> str:
    """The words of a page with its table cells marked off by bars."""
    return Page(re.sub("(<t[hd]|</tr>)", r" | \1", page)).words()


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]  # noqa: S314


def test_difference_beyond_the_noise_is_better_and_its_mirror_worse():
    assert compare(5.9 + SEEDS, 6.0 + SEEDS).outcome == "better"
    assert compare(6.0 + SEEDS, 5.9 + SEEDS).outcome == "worse"


def test_difference_below_one_pooled_sd_is_a_near_tie_however_many_seeds():
    many = np.tile(SEEDS, 200)
    result = compare(6.0 + many, 6.006 + many)
    assert result.low > 0
    assert result.outcome == "near-tie"


def test_difference_of_two_sd_that_three_seeds_do_not_settle_is_unclear():
    result = compare(6.0 + SEEDS, 6.02 + SEEDS)
    assert result.difference > result.pooled_sd
    assert result.low < 0
    assert result.outcome == "unclear"


def test_welch_interval_and_pooled_sd_equal_the_textbook_formulas():
    ours, theirs = np.array([5.9, 5.93, 5.88]), np.array([6.0, 6.1])
    va, vb = ours.var(ddof=1) / 3, theirs.var(ddof=1) / 2
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 1)
    from scipy.stats import t

    half = t.ppf(0.975, freedom) * np.sqrt(va + vb)
    result = compare(ours, theirs)
    assert result.difference == pytest.approx(theirs.mean() - ours.mean())
    assert (result.low, result.high) == pytest.approx((result.difference - half, result.difference + half))
    assert result.pooled_sd == pytest.approx(np.sqrt((2 * ours.var(ddof=1) + theirs.var(ddof=1)) / 3))


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ([5.0], [6.0, 6.1], "fewer than two seeds"),
        ([5.0, 5.1], [6.0], "fewer than two seeds"),
        ([5.0, np.nan], [6.0, 6.1], "no finite loss"),
        ([5.0, 5.0], [6.0, 6.0], "same loss"),
    ],
)
def test_without_a_measured_noise_there_is_no_judgement(ours, theirs, reason):
    result = compare(ours, theirs)
    assert result.outcome == "unknown"
    assert reason in result.reason


@pytest.mark.parametrize(
    ("ours", "baselines", "tone", "opening"),
    [
        (5.8, {"random": 6.0, "top_k": 5.9}, "gain", "Gain: QuaDMix θ* beats all 2 baselines"),
        (5.903, {"random": 6.0, "top_k": 5.9}, "none", "No evidence of gain: QuaDMix θ* and the strongest baseline, "),
        (5.88, {"random": 6.0, "top_k": 5.9}, "none", "No evidence of gain: QuaDMix θ* is ahead of the strongest"),
        (6.1, {"random": 6.0, "top_k": 5.9}, "worse", "Worse: QuaDMix θ* loses to all 2 baselines on"),
    ],
)
def test_headline_says_what_came_out(ours, baselines, tone, opening):
    losses = {"quadmix": {OBJECTIVE: ours + SEEDS}} | {k: {OBJECTIVE: v + SEEDS} for k, v in baselines.items()}
    verdict = judge(losses)
    assert verdict.tone == tone
    assert verdict.headline.startswith(opening)
    assert verdict.objective[0].rival == "top_k"
    assert "the strongest baseline" in verdict.numbers


def test_one_seed_each_gives_no_verdict():
    verdict = judge({"quadmix": {OBJECTIVE: [5.0]}, "random": {OBJECTIVE: [6.0]}})
    assert verdict.tone == "unknown"
    assert "fewer than two seeds" in verdict.headline


def test_a_lost_baseline_outweighs_a_beaten_one():
    losses = {"quadmix": 5.95, "random": 6.1, "top_k": 5.8}
    verdict = judge({name: {OBJECTIVE: value + SEEDS} for name, value in losses.items()})
    assert verdict.tone == "worse"
    assert "random" not in verdict.headline


def test_without_the_judged_selector_or_a_baseline_there_is_no_verdict():
    assert "no run of 'quadmix'" in judge({"random": {OBJECTIVE: [6.0, 6.1]}}).headline
    assert "no baseline" in judge({"quadmix": {OBJECTIVE: [6.0, 6.1]}}).headline


def test_page_states_verdict_counts_and_provenance():
    text = Page(rendered()).words()
    for words in (
        "Gain: QuaDMix θ* beats all 2 baselines",
        "Mean objective 5.9000 against 6.0000 of top_k, the strongest baseline: 0.1000 lower",
        "empty text 3",
        "1 min 01 s",
        "versions.torch",
        "No task is worse than a baseline outside the noise",
    ):
        assert words in text


def test_objective_weighs_the_tasks_as_the_search_did():
    data = comparison_only()
    runs = data.results.to_pylist()
    for run in runs:  # θ* wins task 0 and loses task 1
        run["loss_task-1"] = 14 - run["loss_task-0"]
    data = dataclasses.replace(data, results=pa.Table.from_pylist(runs))
    assert "Gain: QuaDMix" in render(data)
    other = dataclasses.replace(data, search=SearchOutcome({"task-1": 2.0}, 5.9))
    page = Page(render(other)).words()
    assert "Worse: QuaDMix θ* loses to all 2 baselines" in page
    assert "Tasks that get worse, outside the noise: task-1 (than every baseline)" in page


def test_objective_over_a_task_without_losses_is_refused():
    with pytest.raises(InputError, match="absent"):
        render(dataclasses.replace(comparison_only(), search=SearchOutcome({"absent": 1.0}, 5.9)))


def test_hostile_names_stay_text_everywhere():
    page = rendered(HOSTILE)
    parsed = Page(page)
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form"} & set(parsed.tags)
    assert not [key for _, key, _ in parsed.attributes if key.startswith("on")]
    assert parsed.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7*7 }}" in parsed.text
    assert not {"\x00", "\u202e"} & set(page)


def test_page_refers_to_nothing_outside_itself():
    page = rendered(HOSTILE)
    parsed = Page(page)
    addresses = [v for _, key, v in parsed.attributes if key in {"href", "src", "xlink:href", "action", "srcset"}]
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    assert {url for url in re.findall(r"url\((.)", page)} == {"#"}
    assert "@import" not in page
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    policies = [v for tag, key, v in parsed.attributes if tag == "meta" and v.startswith("default-src")]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")


def test_equal_data_gives_equal_bytes_and_no_date():
    first, second = rendered(), render(report_data())
    assert first.encode() == second.encode()
    assert not re.search(r"20\d\d-\d\d-\d\d", first)


def test_a_step_that_has_not_run_is_named_in_place_of_its_sections():
    assert "has not run" not in rendered()
    trained = {"steps": None, "domains": None, "scores": None, "theta": None, "predictions": None, "metrics": None}
    trained |= {"search": None, "methods": (), "ablations": (), "drawings": ()}
    page = Page(render(dataclasses.replace(report_data(), **trained))).words()
    assert [page.count(f"the step {step} has not run") for step in ("label", "search", "compare")] == [3, 3, 0]
    planned = dataclasses.replace(report_data(n_domains=2), results=None, curves=None, scores=None)
    page = Page(render(planned)).words()
    assert page.count("The step compare has not run") == 1
    assert [page.count(f"the step {step} has not run") for step in ("compare", "pretrain")] == [2, 1]


def test_an_empty_run_is_still_a_page():
    page = Page(render(ReportData("Nothing yet"))).words()
    assert "No verdict: nothing has been trained" in page
    assert page.count("Not shown:") == 10


def test_what_to_expect_is_said_before_the_comparison_with_every_number():
    page = Page(rendered())
    words = cells(rendered())
    assert "– No evidence of gain The loss of θ* is predicted: nothing has been trained on its selection" in words
    assert "| Rival | Its measured loss | Predicted gain of θ* |" in words
    assert "| random | 6.0000 | +0.1000 | −0.0500 to +0.2500 | −0.50 | 38 % |" in words
    assert "| top_k | 6.0000 | +0.1000 | – | – | – |" in words
    order = [value for tag, key, value in page.attributes if (tag, key) == ("section", "id")]
    assert order.index("predictions") < order.index("gate") == order.index("selectors") - 1
    expected = ReportData("x", gate={"verdict": "A gain is likely", "evidence": True})
    assert "✓ A gain is likely Selectors" in Page(render(expected)).words()


def test_a_gain_as_the_search_states_it_is_shown_with_all_of_its_numbers():
    prediction = Prediction(loss=5.9, error=0.03, sd=0.04, checked=6.0)
    gain = gain_over("random", [6.0, 6.1], prediction, 0.02, overlap=0.375)
    words = cells(render(ReportData("x", gate={"verdict": "v", "rows": [gain.to_dict()]})))
    # half an interval: 1.96 * hypot(.05, .02 / sqrt 2) = .1018; upwards .1 more, up to what was checked
    assert "| random | 6.0500 | +0.1500 | −0.0518 to +0.2518 | +7.50 | 38 % |" in words


def test_an_overlap_is_the_same_measure_wherever_it_is_shown():
    words = cells(rendered())
    assert words.count("| Overlap (Jaccard) with θ* |") == 2
    assert "Share also in θ*" not in words


def test_the_selections_are_shown_with_their_budgets_and_what_stands_near_the_best():
    data = comparison_only()
    names = list(dict.fromkeys(data.results["selector"].to_pylist()))
    facts = {"method": "m<b>", "documents": 1234, "tokens": 5678, "unique_tokens": 5000, "copies per document": 1.136,
             "training epochs": 0.25, "budget met": "+3 tokens, within one document"}  # fmt: skip
    standings = ["best", "near-tie", *["worse"] * (len(names) - 2)]
    rows = [{"selector": name, **facts, "task-0 standing": s} for name, s in zip(names, standings, strict=True)]
    overlap = {a: {b: 1.0 if a == b else 0.25 for b in names} for a in names}
    page = render(dataclasses.replace(data, comparison=rows, overlap=overlap))
    words = cells(page)
    for name in names:
        assert f"| {name} | m<b> | 1,234 | 5,678 | 5,000 | 1.14 | 0.25 | +3 tokens, within one document |" in words
    assert "m<b>" not in page
    assert "Overlap of the selections" in page
    assert page.count(">25%<") == len(names) * (len(names) - 1)
    assert [page.count(mark) for mark in (" lowest<br>", " ≈<br>")] == [1, 1]


def test_errors_of_the_fit_are_shown_whole_and_gaps_as_dashes():
    words = cells(rendered())
    assert "| task-0 | 0.81 | 0.55 to 0.93 | 0.72 | −0.34 | 0.0123 |" in words
    assert "| task-1 | 0.81 | – | – | – | 0.0123 |" in words


def test_searches_without_scorers_are_listed_with_prediction_and_verdict():
    words = cells(rendered())
    assert "| scorer-0 | 5.8700 | 5.7000 to 6.2000 | No evidence |" in words
    assert "| scorer-0, scorer-1 | – | – | – |" in words
    assert "The interval of a prediction need not be symmetric" in words
    alone = Page(render(ReportData("x", ablations=report_data().ablations))).words()
    assert "No evidence" in alone


def test_an_objective_of_several_tasks_is_told_in_its_own_unit():
    unit, data = "standard deviations over the proxies", report_data()
    kept = {"methods": data.methods, "ablations": data.ablations, "metrics": data.metrics}
    words = cells(render(ReportData("x", search=SearchOutcome({"task-0": 1, "task-1": 1}, -1.25, unit=unit), **kept)))
    assert f"θ* has a predicted objective of −1.2500 ({unit})" in words
    assert f"Ways to find θ, by the objective in {unit}" in words
    assert f"forced to 0; objective in {unit}" in words
    assert f"the error of the objective in {unit}" in words


def test_ways_to_find_theta_are_compared_and_drawings_stand_under_their_titles():
    words = cells(rendered())
    assert "| default search | 5.9000 | 5.8000 to 6.1000 | 5.9500 |" in words
    assert "| best observed proxy | – | – | – |" in words
    assert "What matters: task-0. Permutation importance, increase of MAE: omega[Domain_00] 0.2" in words
    alone = ReportData("x", drawings=report_data().drawings)
    assert "Errors of the regressor" not in render(alone)
    assert "What matters: task-0." in Page(render(alone)).words()


@pytest.mark.parametrize("empty", [{"gate": None}, {"gate": {}}, {"methods": ()}, {"ablations": ()}, {"drawings": []}])
def test_parts_of_the_search_that_are_empty_are_left_out(empty):
    run = report_data()
    data = ReportData("x", gate=run.gate, methods=run.methods, ablations=run.ablations, drawings=run.drawings)
    marks = {"gate": "Is there a gain to expect?", "methods": "Ways to find θ", "drawings": "grid drawings"}
    marks |= {"ablations": "Searches without some scorers"}
    whole, page = render(data), render(dataclasses.replace(data, **empty))
    assert [name for name, mark in marks.items() if mark not in whole] == []
    assert [name for name, mark in marks.items() if mark not in page] == list(empty)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"gate": {"rows": []}}, "gate has no 'verdict'"),
        ({"gate": {"verdict": "v", "rows": [{"loss": 1.0}]}}, "a row of gate has no 'rival'; found loss"),
        ({"methods": [{"predicted": 1.0}]}, "a row of methods has no 'name'"),
        ({"ablations": [{"predicted": 1.0}]}, "a row of ablations has no 'excluded'"),
    ],
)
def test_a_gate_or_way_without_its_words_is_refused(part, words):
    with pytest.raises(InputError, match=words):
        render(ReportData("x", **part))


def test_two_drawings_of_one_name_are_refused():
    with pytest.raises(InputError, match="two drawings are named 'importance task-0'"):
        render(ReportData("x", drawings=[*report_data().drawings, *report_data().drawings]))


def test_domains_without_a_selection_are_shown_before_only():
    data = report_data()
    before = data.domains.select(["domain", "documents_before", "tokens_before"])
    page = Page(render(dataclasses.replace(data, domains=before))).words()
    assert "the step select has not run" in page
    assert "Domain_04" in page


def test_26_domains_each_have_a_row_and_a_curve():
    page = render(report_data(n_domains=26))
    titles = [svg.find(SVG + "title").text for svg in svgs(page)]
    assert sum(title.startswith("Sampling curve of Domain_") for title in titles) == 26
    shares = next(svg for svg in svgs(page) if svg.find(SVG + "title").text.startswith("Domain shares"))
    labels = {text.text for text in shares.iter(SVG + "text")}
    assert {f"Domain_{m:02d}" for m in range(26)} <= labels


def test_every_figure_is_well_formed_titled_and_has_its_own_ids():
    page = rendered(HOSTILE)
    found = svgs(page)
    # scores, shares, weights, curves, tasks, drawings, measures, training
    assert len(found) == 3 + 1 + 1 + 5 + 2 + 1 + 3 + 1
    for svg in found:
        assert svg.find(SVG + "title").text
        assert svg.find(SVG + "desc").text
        assert svg.get("role") == "img"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_figures_take_their_colours_from_the_page():
    page = rendered()
    defined = set(re.findall(r"(--[a-z0-9-]+):", page))
    used = set(re.findall(r"var\((--[a-z0-9-]+)", page))
    assert used - {"--cell"} <= defined
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]+", drawn)


def test_table_headers_have_a_scope():
    parsed = Page(rendered())
    assert parsed.tags.count("th") == sum(tag == "th" and key == "scope" for tag, key, _ in parsed.attributes)


def test_rows_that_do_not_add_up_are_refused():
    with pytest.raises(InputError, match="does not add up"):
        render(ReportData("x", steps=[StepRows("label", 10, 8, {"empty": 1})]))


def test_a_table_without_a_column_is_refused_by_name():
    data = report_data()
    with pytest.raises(InputError, match="curves has no column 'train_loss'"):
        render(dataclasses.replace(data, curves=data.curves.drop_columns(["train_loss"])))


def test_unequal_training_is_warned_about():
    data = comparison_only()
    runs = data.results.to_pylist()
    runs[0]["tokens_seen"] *= 2
    page = Page(render(dataclasses.replace(data, results=pa.Table.from_pylist(runs)))).words()
    assert "Selectors differ in trained tokens" in page


def test_a_run_without_a_finite_loss_is_shown_and_not_judged():
    data = comparison_only()
    runs = data.results.to_pylist()
    runs[-1] |= {"loss_task-0": float("nan"), "loss_task-1": None}
    page = Page(render(dataclasses.replace(data, results=pa.Table.from_pylist(runs)))).words()
    assert "a run has no finite loss" in page
    assert "Gain: QuaDMix θ* beats the strongest baseline, random" in page
    assert "2 of 4 comparisons cannot be judged" in page


def test_sampling_curve_ends_at_the_window_of_its_domain():
    theta = sample_parameters(1, 2, 2, 3)[0]
    theta = dataclasses.replace(theta, omega=[0.05, 0.1], epsilon=[0.0, 0.0])
    (svg,) = svgs(figures.sampling_curve(theta, 0, 0.1, 2.0).svg)
    paths = [path.get("d", "") for path in svg.iter(SVG + "path") if "accent" in path.get("style", "")]
    points = re.findall(r"([\d.]+) ([\d.]+)", max(paths, key=len))
    x, y = np.array(points, dtype=float).T
    falls = np.flatnonzero(np.diff(y) > 20)  # y grows downwards
    left, right = 40, 188 - 14
    assert [x[i] for i in falls] == pytest.approx([(left + right) / 2], abs=0.1)
