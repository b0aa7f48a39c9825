"""`quadmix fit`: tables joined on their keys, faults named before any work, metrics of unseen rows only."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quadmix_plugin import registry
from quadmix_plugin.cli import main
from quadmix_plugin.errors import InputError, RecipeError, UsageError
from quadmix_plugin.pipelines.fit import FitSettings, fit, parse_options
from quadmix_plugin.search.evaluation import Metrics, bootstrap_intervals
from quadmix_plugin.search.tables import choose_targets, join, read_pair

REGMIX = Path(__file__).parents[2] / "shared" / "data" / "regmix"
PRIOR = Path(__file__).parents[1] / "benchmarks" / "regmix_prior.json"
COLUMNS = ["books", "code", "law", "web"]
QUICK = {"regressor": "lightgbm", "options": {"trees": 30}, "draws": 300, "figures": False}


def mixtures(n, seed, prefix="m"):
    """Shares that sum to 1, and two losses: `web` helps the first, `code` the second."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(4), n)
    features = pd.DataFrame(shares, columns=COLUMNS)
    features.insert(0, "id", [f"{prefix}{i}" for i in range(n)])
    noise = 0.02 * rng.normal(size=(2, n))
    losses = pd.DataFrame({
        "id": features["id"],
        "loss/web": 4 - np.sqrt(shares[:, 3]) + noise[0],
        "loss/code": 4 - np.sqrt(shares[:, 1]) + noise[1],
    })  # fmt: skip
    return features, losses


class Case:
    """Tables in a folder; ``settings`` names them."""

    def __init__(self, folder, n=40, n_test=0):
        self.folder = folder
        self.features, self.losses = mixtures(n, 0)
        self.test = mixtures(n_test, 1, "t") if n_test else None

    def settings(self, **options):
        given = {"features": self.folder / "f.csv", "losses": self.folder / "l.csv", "out": self.folder / "out"}
        self.features.to_csv(given["features"], index=False)
        self.losses.to_csv(given["losses"], index=False)
        if self.test:
            given |= {"test_features": self.folder / "tf.csv", "test_losses": self.folder / "tl.csv"}
            self.test[0].to_csv(given["test_features"], index=False)
            self.test[1].to_csv(given["test_losses"], index=False)
        return FitSettings(**{**given, **QUICK, **options})


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


def test_the_order_of_rows_does_not_matter_but_their_keys_do(tmp_path):
    plain, shuffled, wrong = (Case(tmp_path / name) for name in ("a", "b", "c"))
    for each in (plain, shuffled, wrong):
        each.folder.mkdir()
    shuffled.losses = shuffled.losses.sample(frac=1, random_state=1)
    shuffled.features = shuffled.features.sample(frac=1, random_state=2)
    wrong.losses["id"] = list(wrong.losses["id"][::-1])
    first, same, other = (fit(each.settings(targets=("web",))) for each in (plain, shuffled, wrong))
    assert json.dumps(first) == json.dumps(same)
    assert first["targets"]["loss/web"]["spearman"] > 0.85
    assert other["targets"]["loss/web"]["spearman"] < 0.3


def test_metrics_are_of_the_test_rows_alone_and_of_what_was_fitted_to_the_others(tmp_path):
    case = Case(tmp_path, n_test=25)
    metrics = fit(case.settings(targets=("web",)))
    assert metrics["measured_on"] == "test rows"
    assert (metrics["rows"], metrics["test_rows"], list(metrics["targets"])) == (40, 25, ["loss/web"])
    table = pd.read_parquet(tmp_path / "out" / "predictions.parquet").set_index("key")
    assert sorted(table.index) == sorted(case.test[0]["id"])
    model = registry.create("regressors", "lightgbm", {"trees": 30})
    in_order = np.argsort(case.features["id"].to_numpy(dtype=str), kind="stable")  # rows are fitted in this order
    model.fit(case.features[COLUMNS].to_numpy()[in_order], case.losses["loss/web"].to_numpy()[in_order])
    expected = pd.Series(model.predict(case.test[0][COLUMNS]), case.test[0]["id"])
    np.testing.assert_allclose(table["predicted"], expected[table.index], rtol=1e-9)
    real = case.test[1].set_index("id")["loss/web"][table.index]
    said = Metrics.of(real, table["predicted"]).to_dict()
    assert {name: metrics["targets"]["loss/web"][name] for name in said} == pytest.approx(said)
    low, high = metrics["targets"]["loss/web"]["interval"]["mae"]
    assert low < said["mae"] < high
    error = float(np.sqrt(((real - table["predicted"]) ** 2).mean()))
    at = metrics["predicted"]["loss/web"]
    half = 1.96 * np.hypot(error, at["sd"])
    assert at["loss"] - at["low"] == pytest.approx(half)
    assert at["checked"] == pytest.approx(table["predicted"].min())
    assert at["high"] == pytest.approx(max(at["loss"], at["checked"]) + half)


def test_what_is_written_is_what_is_returned(case):
    metrics = fit(case.settings(regressor="auto", options={}, targets=("web",)))
    out = case.folder / "out"
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert json.loads((out / "optimum.json").read_text()) == metrics["optimum"]
    assert metrics["measured_on"] == "cross-validation"
    assert metrics["chosen"]["loss/web"] in ("gp", "lightgbm")
    assert list(metrics["optimum"]) == COLUMNS
    assert sum(metrics["optimum"].values()) == pytest.approx(1)
    assert max(metrics["optimum"], key=metrics["optimum"].get) == "web"
    assert set(metrics["ways"]) == {"draws", "paper", "trust_region"}
    assert (out / "regressor.txt").read_text().startswith("# loss/web\n")
    best = case.losses.loc[case.losses["loss/web"].idxmin()]
    assert metrics["best_row"]["key"] == best["id"]
    assert metrics["best_row"]["losses"]["loss/web"] == pytest.approx(best["loss/web"])
    assert not (out / "figures").exists()


def test_a_gain_is_claimed_where_there_is_one_and_not_of_noise(case):
    real = fit(case.settings(targets=("web",)))["gain"]
    assert real["mean_row"]["evidence"]
    assert real["mean_row"]["sentence"].startswith("A gain is to be expected over the mean row")
    assert real["mean_row"]["gain"] == pytest.approx(case.losses["loss/web"].mean() - real["predicted"]["loss"])
    case.losses["loss/web"] = np.random.default_rng(5).normal(size=40)
    noise = fit(case.settings(targets=("web",)))["gain"]
    assert not noise["mean_row"]["evidence"]
    assert noise["mean_row"]["sentence"].startswith("No evidence of gain over the mean row")
    assert "the best measured row (id m" in noise["best_row"]["sentence"]


def test_failed_and_unmatched_rows_are_counted_and_left_out(case):
    case.losses.loc[[3, 7], ["loss/web", "loss/code"]] = np.nan
    case.losses = case.losses.drop(index=[11])
    metrics = fit(case.settings(drop_unmatched=True))
    assert (metrics["rows"], metrics["failed"], metrics["unmatched"]) == (37, 2, 1)
    keys = set(pd.read_parquet(case.folder / "out" / "predictions.parquet")["key"])
    assert keys == set(case.features["id"]) - {"m3", "m7", "m11"}


def test_several_targets_weigh_equally_and_repeats_of_one_count_once(case):
    names = ["metric/a_loss", "metric/ab_loss", "other"]
    path = Path("l.csv")
    assert choose_targets(names, (), path) == names
    assert choose_targets(names, ("other", "ab_", "oth"), path) == ["other", "metric/ab_loss"]
    assert choose_targets([*names, "a"], ("a",), path) == ["a"]
    metrics = fit(case.settings(targets=("code", "web")))
    both = sorted(metrics["optimum"], key=metrics["optimum"].get)[-2:]
    assert sorted(both) == ["code", "web"]
    assert metrics["gain"]["unit"] == "standard deviations of the losses"


def spoil(table, row, column, value):
    def change(case):
        frame = getattr(case, table)
        frame[column] = frame[column].astype(object)
        frame.loc[row, column] = value

    return change


def assign(**changes):
    return lambda case: [setattr(case, name, change(getattr(case, name))) for name, change in changes.items()]


FAULTS = {
    "lost losses": (
        assign(features=lambda f: f.drop(index=[2, 5])),
        r"l\.csv: rows id m2, m5 have no features in .*f\.csv",
    ),
    "lost features": (
        assign(losses=lambda t: t.drop(index=[2])),
        r"f\.csv: rows id m2 have no losses in .*--drop-unmatched",
    ),
    "twice the key": (spoil("losses", 4, "id", "m9"), r"l\.csv: id m9 occur more than once"),
    "no key": (spoil("features", 4, "id", ""), r"f\.csv: rows 5 \(counted from 1\) have no 'id'"),
    "same features": (
        assign(features=lambda f: f.assign(**{c: f[c].where(f.index != 8, f[c][3]) for c in COLUMNS})),
        r"f\.csv: rows id m3, m8 have the same features",
    ),
    "missing feature": (
        spoil("features", 6, "law", np.nan),
        r"f\.csv: features of rows id m6 are missing or not finite in law \(empty\)",
    ),
    "infinite feature": (spoil("features", 6, "law", np.inf), r"rows id m6 are missing or not finite in law \(inf\)"),
    "text": (spoil("features", 6, "law", "much"), r"f\.csv: column 'law' is not numeric in rows id m6 \('much'\)"),
    "some losses missing": (
        spoil("losses", 12, "loss/code", np.nan),
        r"l\.csv: losses of rows id m12 are missing or not finite in loss/code",
    ),
    "constant": (
        assign(losses=lambda t: t.assign(**{"loss/web": 3.25})),
        r"l\.csv: all 40 rows have the same loss/web \(3\.25\)",
    ),
    "few rows": (
        assign(features=lambda f: f[:7], losses=lambda t: t[:7]),
        r"f\.csv: 7 rows with losses .*at least 8 are needed",
    ),
    "no shared column": (
        assign(losses=lambda t: t.rename(columns={"id": "name"})),
        r"no column to join on \(columns are id, books, code, law, web and name, loss/web",
    ),
    "a loss as a feature": (
        lambda case: case.features.insert(1, "loss/web", case.losses["loss/web"]),
        r"loss/web in both tables, so a loss would be predicted from itself",
    ),
    "no features": (assign(features=lambda f: f[["id"]]), r"f\.csv: no numeric column besides 'id'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_table_is_named_before_any_work(fault, case):
    change, message = FAULTS[fault]
    change(case)
    stages = []
    with pytest.raises(InputError, match=message):
        fit(case.settings(), lambda stage, done, total: stages.append(stage))
    assert stages == []
    assert not (case.folder / "out").exists()


OPTIONS = {
    "unknown target": ({"targets": ("loss/cods",)}, "no column of losses 'loss/cods'; did you mean 'loss/code'"),
    "ambiguous target": ({"targets": ("loss",)}, r"--target 'loss' is a part of loss/web, loss/code"),
    "folds": ({"folds": 41}, "40 rows with losses .*at least 41 are needed"),
    "test tables by half": ({"test_features": Path("x.csv")}, "one without the other"),
    "early stop without tests": ({"early_stop_on_test": True}, "there are no test rows"),
    "top": ({"top": 301}, "top 301 of 300 draws"),
    "method": ({"method": "best"}, "--method 'best': unknown; give trust_region or paper"),
    "no such file": ({"losses": Path("none.csv")}, r"none\.csv: no such file"),
    "no table": ({"losses": Path("notes.txt")}, r"notes\.txt: neither \.csv nor \.parquet"),
}


@pytest.mark.parametrize("fault", OPTIONS)
def test_a_faulty_option_is_named_before_any_work(fault, case):
    options, message = OPTIONS[fault]
    with pytest.raises(InputError, match=message):
        fit(case.settings(**options))
    assert not (case.folder / "out").exists()


def test_a_regressors_options_are_checked_and_read(case):
    with pytest.raises(RecipeError, match=r"--set\.tres: unknown key; did you mean 'trees'"):
        fit(case.settings(options={"tres": 3}))
    assert parse_options(["trees=30", "learning_rate=0.1", "stop_on=either"]) == {
        "trees": 30,
        "learning_rate": 0.1,
        "stop_on": "either",
    }
    with pytest.raises(UsageError, match="--set trees: give KEY=VALUE"):
        parse_options(["trees"])


def test_a_file_that_is_no_table_is_named(case):
    settings = case.settings()
    path = case.folder / "bad.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"bad\.parquet: cannot be read"):
        fit(replace(settings, losses=path))


def test_a_prior_is_of_mixtures_and_of_their_columns(case):
    path = case.folder / "prior.json"
    path.write_text(json.dumps({"prior": dict(zip(COLUMNS, [1, 1, 1, 30], strict=True))}))
    drawn = fit(case.settings(prior=path, targets=("code",), method="paper"))["optimum"]
    assert drawn["web"] > 0.6  # where the prior is, though `code` would be better
    path.write_text(json.dumps({"books": 1.0, "wbe": 2.0}))
    with pytest.raises(InputError, match="the prior lacks code, law, web and has wbe besides"):
        fit(case.settings(prior=path))
    path.write_text("[1, 2]")
    with pytest.raises(InputError, match="give 4 numbers"):
        fit(case.settings(prior=path))
    path.write_text("[1, 1, 1, 1]")
    case.features[COLUMNS] *= 3.0
    with pytest.raises(InputError, match="not mixtures"):
        fit(case.settings(prior=path))


def seen_before(features, losses):
    return features.assign(**mixtures(40, 0)[0].loc[[5], COLUMNS].squeeze().to_dict()), losses


OTHER_TESTS = {
    "features": (
        lambda f, t: (f.rename(columns={"law": "laws"}), t),
        r"tf\.csv: a table of another corpus: it lacks law and has laws besides",
    ),
    "losses": (
        lambda f, t: (f, t.drop(columns="loss/code")),
        r"tl\.csv: a table of another corpus: it lacks loss/code",
    ),
    "training rows": (seen_before, r"tf\.csv: rows id t0, .* have the features of training rows"),
}


@pytest.mark.parametrize("fault", OTHER_TESTS)
def test_test_tables_of_another_corpus_or_of_training_rows_are_refused(fault, tmp_path):
    change, message = OTHER_TESTS[fault]
    case = Case(tmp_path, n_test=10)
    case.test = change(*case.test)
    with pytest.raises(InputError, match=message):
        fit(case.settings())


def test_test_columns_may_come_in_another_order(tmp_path):
    case = Case(tmp_path, n_test=25)
    first = fit(case.settings(targets=("web",)))
    case.test = (case.test[0][["id", *COLUMNS[::-1]]], case.test[1])
    assert fit(case.settings(targets=("web",))) == first


def test_early_stopping_on_the_test_rows_is_what_it_says(tmp_path):
    case = Case(tmp_path, n=60, n_test=25)
    options = {"regressor": "lightgbm-published", "options": {}, "targets": ("web",), "draws": 50, "method": "paper"}
    metrics = fit(case.settings(**options, early_stop_on_test=True))
    assert metrics["early_stopped_on_test"]
    order = np.argsort(case.features["id"].to_numpy(dtype=str), kind="stable")
    other = np.argsort(case.test[0]["id"].to_numpy(dtype=str), kind="stable")
    model = registry.create("regressors", "lightgbm-published")
    held = (case.test[0][COLUMNS].to_numpy()[other], case.test[1]["loss/web"].to_numpy()[other])
    model.fit(case.features[COLUMNS].to_numpy()[order], case.losses["loss/web"].to_numpy()[order], held=held)
    text = (tmp_path / "out" / "regressor.txt").read_text()
    assert text == f"# loss/web\n{model.to_text()}"
    with pytest.raises(InputError, match="'gp' does not stop early"):
        fit(case.settings(regressor="gp", options={}, early_stop_on_test=True))


def run_tables(folder):
    """As a run writes them: two columns of losses, repeats and baselines, and a drawn θ whose training failed."""
    rng = np.random.default_rng(3)
    thetas = rng.random((24, 3))
    kinds = ["draw"] * 16 + ["proposal"] * 4 + ["repeat"] * 4
    vectors = [*thetas[:20].tolist(), *[thetas[0].tolist()] * 4, None, None]
    thetas_table = pa.table({
        "proxy": pa.array(range(26), pa.int32()), "kind": [*kinds, "baseline", "baseline"], "theta": vectors,
        "seed": [1] * 26,
    })  # fmt: skip
    kept = [number for number in range(26) if number != 5]
    losses = 3 + np.array([0.0 if v is None else v[0] for v in vectors])[kept]
    losses_table = pa.table({
        "proxy": kept, "kind": [thetas_table["kind"][i].as_py() for i in kept], "seconds": losses * 7,
        "loss_arc": losses, "loss_mmlu": losses + 1, "bpb_arc": losses / 2,
    })  # fmt: skip
    pq.write_table(thetas_table, folder / "thetas.parquet")
    pq.write_table(losses_table, folder / "losses.parquet")
    return folder / "thetas.parquet", folder / "losses.parquet"


def test_a_runs_own_tables_are_read_as_what_they_are(tmp_path):
    sides = read_pair(*run_tables(tmp_path))
    rows = join(*sides, choose_targets(sides[1].names, (), sides[1].path))
    assert rows.key == "proxy"
    assert rows.names == ("theta[0]", "theta[1]", "theta[2]")
    assert list(rows.losses) == ["loss_arc", "loss_mmlu"]
    assert rows.keys == [str(i) for i in range(20) if i != 5]
    assert (rows.failed, rows.unmatched) == (["5"], [])
    np.testing.assert_allclose(rows.losses["loss_arc"], 3 + rows.x[:, 0])
    features, losses = run_tables(tmp_path)
    metrics = fit(FitSettings(features, losses, tmp_path / "out", targets=("arc",), **QUICK))
    assert (metrics["rows"], metrics["failed"]) == (19, 1)
    assert set(metrics["optimum"]) == set(rows.names)


def test_only_a_former_fit_is_overwritten_and_nothing_of_it_stays(tmp_path):
    case = Case(tmp_path, n=20)
    first = fit(case.settings(figures=True))
    out = case.folder / "out"
    kept = {path.name for path in (out / "figures").iterdir()}
    assert kept == set(first["figures"])
    assert len(kept) == 2 * 4  # two targets; error by rows and importance of the first
    assert all(path.stat().st_size > 1000 for path in (out / "figures").iterdir())
    (out / "figures" / "mine.png").write_bytes(b"mine")
    second = fit(case.settings(targets=("code",)))
    assert [path.name for path in (out / "figures").iterdir()] == ["mine.png"]
    assert json.loads((out / "metrics.json").read_text())["targets"] == json.loads(json.dumps(second["targets"]))
    other = case.folder / "other"
    other.mkdir()
    (other / "metrics.json").write_text('{"targets": {}, "optimum": {}}')  # as of a run's search
    with pytest.raises(InputError, match="other: not empty, and not of a former fit"):
        fit(case.settings(out=other))


def test_intervals_hold_the_metric_and_narrow_with_the_rows():
    rng = np.random.default_rng(0)
    y = rng.normal(size=400)
    p = y + 0.5 * rng.normal(size=400)
    metrics = Metrics.of(y, p).to_dict()
    wide, narrow = bootstrap_intervals(y[:40], p[:40], 1), bootstrap_intervals(y, p, 1)
    for name, value in metrics.items():
        low, high = narrow[name]
        assert low < value < high
        assert high - low < wide[name][1] - wide[name][0]
    assert bootstrap_intervals(y, np.stack([p, p]), 1) == narrow
    bent = bootstrap_intervals(y, np.exp(3 * y))  # equal ranks, unequal distances
    assert bent["spearman"] == pytest.approx((1.0, 1.0))
    assert bent["pearson"][1] < 0.9
    assert bootstrap_intervals(y, np.zeros(400))["spearman"] == (0.0, 0.0)


def test_about_95_of_100_intervals_hold_the_real_correlation():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(2, 200, 60))
    found = [bootstrap_intervals(x, x + y, 0)["pearson"] for x, y in zip(a, b, strict=True)]
    assert np.mean([low < 0.5**0.5 < high for low, high in found]) == pytest.approx(0.94, abs=0.04)


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["quadmix", "fit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_prints_json_or_a_table_and_its_faults(case, monkeypatch, capsys):
    settings = case.settings()
    tables = ["--features", settings.features, "--losses", settings.losses, "--out", settings.out, "--no-figures"]
    quick = [*tables, "--regressor", "lightgbm", "--set", "trees=30", "--draws", "300", "--target", "web"]
    code, out, err = command(monkeypatch, capsys, *quick, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((settings.out / "metrics.json").read_text())
    assert json.loads(out) == json.loads(json.dumps(fit(replace(settings, targets=("web",)))))
    code, out, err = command(monkeypatch, capsys, *quick)
    assert code == 0
    assert "measured on cross-validation" in out
    assert "A gain is to be expected over the mean row" in out
    assert "optimum, largest first: web" in out
    assert "search: 300 done" in err
    code, out, err = command(monkeypatch, capsys, *quick, "--target", "wbe")
    assert (code, out) == (1, "")
    assert "error: " in err
    assert "did you mean" in err


def regmix(out, part="train", **options):
    if not REGMIX.is_dir():
        pytest.skip(f"the public RegMix tables are not at {REGMIX}")
    tables = [REGMIX / f"{p}_{kind}_1m.csv" for p in ("train", "test") for kind in ("mixture", "pile_loss")]
    return FitSettings(tables[0], tables[1], out, tables[2], tables[3], **{"figures": False, **options})


@pytest.mark.slow
def test_the_published_numbers_come_out(tmp_path):
    published = [99.60, 99.71, 99.08, 99.45, 97.20, 99.77, 99.73, 99.18, 98.92, 96.87, 98.51, 99.19, 99.12]
    options = {"regressor": "lightgbm-published", "early_stop_on_test": True, "method": "paper", "seed": 42}
    metrics = fit(regmix(tmp_path / "a", **options, draws=500))
    found = [100 * each["spearman"] for each in metrics["targets"].values()]
    np.testing.assert_allclose(found, published, atol=0.02)
    optimum = fit(regmix(tmp_path / "b", **options, top=128, prior=PRIOR, targets=("pile_cc",)))["optimum"]
    shares = [optimum[f"train_the_pile_{domain}"] for domain in ("pile_cc", "ubuntu_irc", "pubmed_abstracts")]
    np.testing.assert_allclose(shares, [0.8909, 0.0614, 0.0123], atol=0.01)


@pytest.mark.slow
def test_an_inner_split_does_as_well_without_the_leak(tmp_path):
    options = {"regressor": "lightgbm-published", "targets": ("pile_cc",), "draws": 500}
    metrics = fit(regmix(tmp_path / "out", **options))
    assert metrics["targets"]["metric/the_pile_pile_cc_val_loss"]["spearman"] >= 0.987


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "least"), [(64, 0.970), (128, 0.985)])
def test_the_default_regressor_ranks_with_few_rows(rows, least, tmp_path):
    settings = regmix(tmp_path)
    assert settings.regressor == "auto"
    train, test = (
        join(*read_pair(f, t), ["metric/the_pile_pile_cc_val_loss"])
        for f, t in ((settings.features, settings.losses), (settings.test_features, settings.test_losses))
    )
    (y,), (real,) = train.losses.values(), test.losses.values()
    found = []
    for seed in range(5):
        some = np.sort(np.random.default_rng(seed).permutation(512)[:rows])
        model = registry.create("regressors", settings.regressor)
        model.fit(train.x[some], y[some])
        found.append(Metrics.of(real, model.predict(test.x)).spearman)
    assert np.mean(found) >= least
