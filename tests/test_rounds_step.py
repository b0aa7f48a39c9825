"""Rounds of proxies: later θ come from the losses of earlier ones, and a run that is stopped goes on with the same."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from proxy_runs import columns, label_once, measured, rows, trained

from quadmix_plugin import registry
from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import RecipeError
from quadmix_plugin.parameters import sample_parameter_vectors
from quadmix_plugin.pipelines import proxy_rounds
from quadmix_plugin.pipelines.context import open_run
from quadmix_plugin.pipelines.plan import make_plan
from quadmix_plugin.proxy.parts import part_path
from quadmix_plugin.search.features import FeatureMap
from quadmix_plugin.search.rounds import next_round
from quadmix_plugin.store import Step

SIZES = [8, 4, 2]
THETAS = 14
OBJECTIVE = {"mmlu": 1.0, "hellaswag": 0.5}
ROUNDS = (
    f"proxy.number={THETAS}", f"search.rounds={SIZES}", "proxy.repeated=1", "proxy.baselines=1",
    "search.regressor=lightgbm", "search.options={trees: 20, min_child_samples: 2}", "search.features=theta",
    "search.min_signal_to_noise=0",
    f"search.objective={OBJECTIVE}", "search.exclude_scorers=[words]",
)  # fmt: skip


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label_once(tmp_path_factory)


@pytest.fixture(scope="module")
def notes() -> list[tuple[str, int, int | None, str]]:
    """What was reported while ``whole`` was trained."""
    return []


@pytest.fixture(scope="module")
def whole(labelled: Path, tmp_path_factory: pytest.TempPathFactory, notes: list) -> Step:
    """A run with three rounds that nothing has disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return trained(
        labelled, out, *ROUNDS, progress=lambda stage, done, total, note="": notes.append((stage, done, total, note))
    )


def vectors(step: Step, number: int | None = None) -> np.ndarray:
    """The θ of all proxies that have one, or those of one round."""
    table = step.read_table("proxies/thetas.parquet").to_pylist()
    return np.array([row["theta"] for row in table if row["kind"] in ("draw", "proposal") and row["round"] == number])


def test_every_proxy_has_the_number_and_seed_that_the_recipe_gives_it(labelled: Path, whole: Step) -> None:
    table = whole.read_table("proxies/thetas.parquet").to_pylist()
    assert [row["proxy"] for row in table] == list(range(18))
    kinds = ["draw"] * 8 + ["proposal"] * 6 + ["repeat"] + ["baseline"] * 3
    assert [row["kind"] for row in table] == kinds
    assert [row["round"] for row in table] == [0] * 8 + [1] * 4 + [2] * 2 + [0] * 4
    assert [row["stream"] for row in table[:15]] == [*range(14), 0]
    assert {row["seed"] for row in table if row["kind"] != "repeat"} == {table[0]["seed"]} != {table[14]["seed"]}
    assert all((row["reason"] in ("best", "lcb", "diverse", "random")) == (row["kind"] == "proposal") for row in table)
    with open_run(load_recipe(labelled, list(ROUNDS)), whole.root) as run:
        space, domains = run.recipe.space.to_parameter_space(), len(run.table.domains)
        drawn = sample_parameter_vectors(THETAS, 2, domains, run.recipe.seed, space=space)
    np.testing.assert_array_equal(vectors(whole, 0), drawn[:8])
    losses = whole.read_table("proxies/losses.parquet").to_pylist()
    assert [(row["proxy"], row["kind"], row["round"]) for row in losses] == [
        (row["proxy"], row["kind"], row["round"]) for row in table
    ]


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_is_proposed_from_the_losses_of_all_before_it(labelled: Path, whole: Step, number: int) -> None:
    before = sum(SIZES[:number])
    seen = {n: row for kind in ("draw", "proposal") for n, row in rows(whole, kind).items() if n < before}
    with open_run(load_recipe(labelled, list(ROUNDS)), whole.root) as run:
        settings, domains = run.recipe.search, len(run.table.domains)
        batch = next_round(
            SIZES[number],
            np.concatenate([vectors(whole, k) for k in range(number)]),
            {task: np.array([seen[n][f"loss_{task}"] for n in range(before)]) for task in ("hellaswag", "mmlu")},
            FeatureMap.of(run.table, run.normalised, "theta"),
            lambda: registry.create("regressors", "lightgbm", settings.options, "here"),
            weights=OBJECTIVE,
            space=run.recipe.space.to_parameter_space(),
            excluded=(1,),
            seed=run.seed_for(f"round {number}"),
        )
    np.testing.assert_array_equal(batch.vectors, vectors(whole, number))
    assert (batch.vectors[:, 1 : 2 * domains : 2] == 0).all()  # the weights of the scorer that is left out
    kept = whole.read_table(f"proxies/rounds/{number}.parquet")
    assert kept["reason"].to_pylist() == list(batch.reasons)
    assert kept["proxy"].to_pylist() == list(range(before, before + SIZES[number]))


def test_the_headline_and_the_progress_name_the_rounds(whole: Step, notes: list) -> None:
    found = {n: row for kind in ("draw", "proposal") for n, row in rows(whole, kind).items()}
    mean = {n: (row["loss_mmlu"] + 0.5 * row["loss_hellaswag"]) / 1.5 for n, row in found.items()}
    lowest = [min(mean[n] for n, row in found.items() if row["round"] == k) for k in range(3)]
    assert f"; 3 rounds with lowest loss {', '.join(f'{each:.3f}' for each in lowest)};" in str(whole.summary())
    said = [(total, note) for stage, _, total, note in notes if stage == "train_proxies"]
    for number, size in enumerate((12, 4, 2)):  # the repeat and the baselines are trained with the draws
        last = [note for total, note in said if note.startswith(f"round {number + 1} of 3") and total == size][-1]
        best = min(mean[n] for n, row in found.items() if row["round"] <= number)
        proxy = next(n for n in found if mean[n] == best)
        assert last == f"round {number + 1} of 3, lowest loss {best:.3f} (proxy {proxy})"


class Stopped(KeyboardInterrupt):
    """Somebody presses Ctrl-C."""


def stop_after(proxies: int):
    """Progress that stops a run once so many of its proxies have ended."""
    left = [proxies]

    def progress(stage: str, done: int, total: int | None, note: str = "") -> None:
        left[0] -= stage == "train_proxies" and done > 0
        if left[0] <= 0:
            raise Stopped

    return progress


def test_stopped_in_and_between_rounds_it_has_the_same_thetas_and_losses(
    labelled: Path, whole: Step, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for proxies in (3, 8, 1, 3, 1, 1, 1):  # in the first round and at its end, then inside and at the end of the others
        with pytest.raises(Stopped):
            trained(labelled, out, *ROUNDS, progress=stop_after(proxies))
    step = trained(labelled, out, *ROUNDS)
    for name in ("losses", "curves", "thetas", "rounds/0", "rounds/1", "rounds/2"):
        assert columns(step, name) == columns(whole, name)


def unfinished(whole: Step, out: Path, keep: int) -> Path:
    """A copy of the run as it was when the first ``keep`` θ had been trained and nothing more was proposed."""
    shutil.copytree(whole.root, out)
    manifest = out / "manifest" / "proxies"
    gone = [f"proxies/{name}.parquet" for name in ("losses", "curves", "thetas")]
    gone += [part_path(n) for n in range(keep, THETAS)]
    gone += [f"proxies/rounds/{k}.parquet" for k in range(3) if sum(SIZES[:k]) >= keep]
    for name in gone:
        (out / name).unlink()
        (manifest / f"{name.replace('/', '%')}.json").unlink()
    (manifest / "_SUCCESS.json").unlink()
    return out


def test_a_round_that_is_kept_is_not_proposed_again(
    labelled: Path, whole: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proposed(*_: object, **__: object) -> None:
        raise AssertionError("proposed again")

    out = unfinished(whole, tmp_path / "out", keep=13)  # in the middle of the last round
    monkeypatch.setattr(proxy_rounds, "next_round", proposed)
    step = trained(labelled, out, *ROUNDS)
    assert columns(step, "losses") == columns(whole, "losses")


def test_a_proxy_that_failed_is_left_out_of_the_next_fit(
    labelled: Path, whole: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(n, thetas, losses, *others, **options):
        seen.append((thetas, losses))
        return next_round(n, thetas, losses, *others, **options)

    out = unfinished(whole, tmp_path / "out", keep=8)
    with open_run(load_recipe(labelled, list(ROUNDS)), out) as run:
        failure = {"proxy": 3, "kind": "draw", "seed": 1, "failure": "diverged", "final": True}
        run.step("proxies").write_json(part_path(3), failure)
    monkeypatch.setattr(proxy_rounds, "next_round", watched)
    step = trained(labelled, out, *ROUNDS)
    left = [n for n in range(8) if n != 3]
    drawn = rows(whole)
    np.testing.assert_array_equal(seen[0][0], vectors(whole, 0)[left])
    assert seen[0][1]["mmlu"].tolist() == [drawn[n]["loss_mmlu"] for n in left]
    assert len(seen[1][0]) == 11
    assert sorted(rows(step) | rows(step, "proposal")) == [n for n in range(THETAS) if n != 3]
    assert list((step.summary() or {})["failures"]) == [part_path(3)]


@pytest.mark.slow
def test_rounds_do_not_change_what_a_theta_is_trained_to(labelled: Path, whole: Step, tmp_path: Path) -> None:
    """The draws of a run in rounds are those of a run without, and so are their losses."""
    given = [each for each in ROUNDS if not each.startswith(("proxy.number", "search.rounds", "proxy.baselines"))]
    step = trained(labelled, tmp_path / "out", *given, "proxy.number=8", "proxy.baselines=0")
    one, three = rows(step), rows(whole)
    assert sorted(one) == list(range(8))
    assert all(measured(one[n]) == measured(three[n]) for n in one)
    assert not (tmp_path / "out" / "proxies" / "rounds").exists()
    assert not (tmp_path / "out" / "proxies" / "baselines.parquet").exists()


def test_what_proposes_makes_the_proxies_stale_only_where_there_are_rounds(labelled: Path, whole: Step) -> None:
    with open_run(load_recipe(labelled, [*ROUNDS, "search.draws=200", "search.folds=3"]), whole.root) as run:
        assert run.step("proxies").is_done
    for other in (
        "search.features=theta+derived",
        "search.objective={mmlu: 1.0}",
        "search.options={trees: 30}",
        "search.exclude_scorers=[]",
    ):
        with (
            pytest.raises(RecipeError, match=r"step 'proxies'.*search\."),
            open_run(load_recipe(labelled, [*ROUNDS, other]), whole.root),
        ):
            pass


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["search.rounds=[8, 4, 3]"], r"rounds \[8, 4, 3\] are 15 proxies, proxy.number is 14; set proxy.number: 15"),
        (["search.rounds=[4, 10]"], r"the first of 2 rounds has 4 proxies; give at least 8"),
        (["search.rounds=[8, 0, 6]"], r"search.rounds.1: input should be greater than or equal to 1"),
        (
            ["proxy.fidelity=successive_halving", "proxy.pilot=8"],
            r"successive_halving takes its .*; set proxy.fidelity",
        ),
        (["proxy.repeated=9"], r"proxy.repeated is 9, the first round has 8 proxies; repeat fewer"),
    ],
)
def test_rounds_that_cannot_be_are_refused(labelled: Path, overrides: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_recipe(labelled, [*ROUNDS, *overrides])


def test_a_first_round_too_small_for_the_regressor_is_refused_before_training(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"search.rounds: the first round has 8 proxies to fit on; lightgbm needs"):
        trained(labelled, tmp_path / "out", *ROUNDS, "search.options={min_child_samples: 9}")
    assert not (tmp_path / "out" / "proxies").exists()


def test_the_plan_counts_rounds_repeats_and_baselines(labelled: Path, tmp_path: Path) -> None:
    plan = make_plan(load_recipe(labelled, list(ROUNDS)), tmp_path / "out", trial=False)
    said = "18 (14 θ in rounds of 8, 4, 2, 1 repeats of 1, 3 of baselines)"
    assert plan["quantities"]["proxies"] == said
    assert "18 models" in next(row["work"] for row in plan["steps"] if row["step"] == "proxies")
