"""The figures and rows of a search: files that a user finds, names that say what θ* is, ablations of this recipe."""

from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from small_run import write_small_recipe

from quadmix_plugin.config import load_recipe
from quadmix_plugin.parameters import sample_parameters
from quadmix_plugin.pipelines.context import open_run
from quadmix_plugin.pipelines.report import ablations
from quadmix_plugin.pipelines.search import ablate
from quadmix_plugin.pipelines.search_figures import named_ways, search_drawings, write_figures
from quadmix_plugin.report import sampling_curves
from quadmix_plugin.store import Step, content_key

TASKS = ("web/text", "web text", "Web-Text", "数学")
WAYS = {"trust_region": ("trust_region", "draws", "paper"), "paper": ("draws", "paper")}
SVG = "{http://www.w3.org/2000/svg}"


def written(root, tasks=TASKS[:2], method="trust_region") -> Step:
    """The artifacts of a search that its figures are made from."""
    rng, step = np.random.default_rng(0), Step(root, "search", "key")
    losses = {task: 3.0 + i for i, task in enumerate(tasks)}
    optimum = {
        "method": method,
        "objective_of": {"weights": {task: 1 / len(tasks) for task in tasks}, "sd": dict.fromkeys(tasks, 0.1)},
        "ways": {way: {"losses": losses} for way in WAYS[method]},
        "best_proxy": {"losses": losses},
    }
    error = {"gp": {"proxies": [8, 16], "mae": [[0.2, 0.3], [0.1, 0.2]]}}
    gain = {"losses": {"random": losses}, "noise_sd": 0.02}
    targets = {task: {"spearman": 0.5} for task in tasks}
    metrics = {"optimum": optimum, "error_by_proxies": error, "gain": gain, "targets": targets}
    step.write_json("search/metrics.json", metrics)
    drawn = {f"loss_{task}": rng.normal(loss, 0.1, 50) for task, loss in losses.items()}
    step.write_table("search/candidates.parquet", pa.table(drawn))
    rows = {"task": np.repeat(tasks, 4), "real": rng.random(4 * len(tasks)), "predicted": rng.random(4 * len(tasks))}
    step.write_table("search/predictions.parquet", pa.table(rows))
    step.write_table("search/importance.parquet", pa.table({"feature": ["a"], "importance": [0.1], "sd": [0.01]}))
    return step


def words(svg: str) -> set[str | None]:
    return {text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")}  # noqa: S314


def test_every_figure_has_the_plain_file_name_that_users_look_for(tmp_path):
    theta = sample_parameters(1, 2, 3, 1, domains=["Arts & Games", "../up", "科学"], scorers=["a", "b"])[0]
    step = written(tmp_path, TASKS)
    write_figures(step, "search", theta, {}, (theta.domains, [20, 30, 50], [50, 25, 25]))
    stems = {"candidates", "error_by_proxies", "importance", "pareto", "weights", "shares"}
    stems |= {f"predicted_real-{task}" for task in ("web-text", "web-text-2", "Web-Text-3", "task")}
    stems |= {"curve-00-Arts-Games", "curve-01-up", "curve-02"}
    files = {f"{stem}.{suffix}" for stem in stems for suffix in ("svg", "png")}
    assert {path.name for path in (tmp_path / "search" / "figures").iterdir()} == files
    assert {entry.path for entry in step.entries()} >= {f"search/figures/{name}" for name in files}
    drawn = ElementTree.parse(tmp_path / "search" / "figures" / "shares.svg").getroot()  # noqa: S314
    labels = [text.text for text in drawn.iter(f"{SVG}text")]
    assert [label for label in labels if label in theta.domains] == ["科学", "../up", "Arts & Games"]
    assert {"×0.50", "×0.83", "×2.50"} <= set(labels)


def test_without_shares_none_are_drawn(tmp_path):
    write_figures(written(tmp_path, TASKS[:1]), "search", sample_parameters(1, 2, 1, 1)[0], {})
    stems = {path.stem for path in (tmp_path / "search" / "figures").iterdir()}
    drawn = {"candidates", "error_by_proxies", "importance", "predicted_real-web-text", "weights", "curve-00"}
    assert stems == drawn


def test_sampling_curves_of_all_domains_share_axes_that_hold_the_widest_and_the_highest():
    theta = sample_parameters(1, 2, 5, 4)[0]
    axes = [drawing.figure.axes[0] for drawing in sampling_curves(theta)]
    assert len({(*each.get_xlim(), *each.get_ylim()) for each in axes}) == 1
    assert axes[0].get_xlim()[1] > 100 * theta.omega.max()
    assert axes[0].get_ylim()[1] > max(each.lines[0].get_ydata().max() for each in axes)


def test_under_paper_theta_is_the_mean_of_the_best_draws_and_the_other_is_not_called_the_papers(tmp_path):
    metrics = written(tmp_path / "paper", method="paper").read_json("search/metrics.json")
    assert list(named_ways(metrics["optimum"])) == ["mean of the best draws (θ*)", "same by LightGBM's defaults"]
    metrics = written(tmp_path / "ours").read_json("search/metrics.json")
    ours = ["trust region (θ*)", "mean of the best draws", "paper's procedure (LightGBM)"]
    assert list(named_ways(metrics["optimum"])) == ours
    del metrics["optimum"]["ways"]["paper"]  # too few rows for it
    assert list(named_ways(metrics["optimum"])) == ours[:2]


@pytest.mark.parametrize("method", WAYS)
def test_marks_in_the_figures_have_the_names_of_the_table(tmp_path, method):
    step = written(tmp_path, method=method)
    names = set(named_ways(step.read_json("search/metrics.json")["optimum"]))
    drawings = search_drawings(step)
    assert names <= words(drawings["candidates"].svg)
    assert names <= words(drawings["pareto"].svg)


def test_ablations_of_this_recipe_are_listed_and_those_of_another_are_not(tmp_path):
    recipe = load_recipe(write_small_recipe(tmp_path))
    with open_run(recipe, tmp_path / "out") as run:
        assert ablations(run) == []
        gain = {"predicted": {"loss": 5.9, "low": 5.8, "high": 6.1}, "verdict": "No evidence"}
        steps = {}
        for name, excluded, origin in (
            ("without-ask-llm", ["ask-llm"], run.keys["search"]),
            ("without-fineweb-edu-ask-ll-0123", ["fineweb-edu", "ask-llm"], run.keys["search"]),
            ("without-dclm-fasttext", ["dclm-fasttext"], "another"),
        ):
            steps[name] = step = run.directory.step(f"search-{name}", content_key("ablation", excluded, origin))
            step.write_json(f"search/{name}/metrics.json", {"gain": gain, "excluded_scorers": excluded})
        steps["without-ask-llm"].finish()
        steps["without-dclm-fasttext"].finish()
        assert ablate(run, ["ask-llm"]).is_done  # found by its key, not made anew
        row = {"excluded": "ask-llm", "predicted": 5.9, "low": 5.8, "high": 6.1, "verdict": "No evidence"}
        assert ablations(run) == [row]
        steps["without-fineweb-edu-ask-ll-0123"].finish()
        assert [row["excluded"] for row in ablations(run)] == ["ask-llm", "fineweb-edu, ask-llm"]
