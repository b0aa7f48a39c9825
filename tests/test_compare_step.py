"""The step `compare`: every selector at one budget, only what is new is made, and nothing depends on how it ran."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from proxy_runs import MODEL
from proxy_runs import write_recipe as write_proxy_recipe
from small_run import MODELS, corpus_texts, write_small_recipe
from tokenizers import Tokenizer

from quadmix_plugin import registry, sample_parameters
from quadmix_plugin.cli import main
from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import RecipeError
from quadmix_plugin.parameters import Parameters, ParameterSpace
from quadmix_plugin.pipelines import compare
from quadmix_plugin.pipelines.context import Run, open_run
from quadmix_plugin.pipelines.mixtures import MixtureProxies
from quadmix_plugin.pipelines.plan import make_plan
from quadmix_plugin.pipelines.run import run_comparison, run_steps, steps_until
from quadmix_plugin.pipelines.run_corpus import RunCorpus
from quadmix_plugin.store import RunDirectory

N = 900
DOMAINS, SCORERS = ("books", "code", "web"), ("length", "s")
THETA = sample_parameters(1, 2, 3, seed=8, space=ParameterSpace(omega_max=0.3), domains=DOMAINS, scorers=SCORERS)[0]
MIXTURE = {"books": 0.5, "code": 0.2, "web": 0.3}
SELECTORS: dict[str, dict[str, Any]] = {
    "random": {},
    "best": {"selector": "top_k", "scorer_name": "s"},
    "criteria_mix": {},
    "anew": {"selector": "quadmix"},
    "dsir": {"min_words": 5},
    "samplemix": {"clusters": 6, "sample": 300},
    "mixed": {"selector": "regmix", "mixture": "mixture.json"},
    "regmix": {"proxies": 8, "regressor": "gp", "draws": 2000, "top": 16},
}
THRESHOLDED = ("random", "best", "criteria_mix", "dsir")
FEW = {name: SELECTORS[name] for name in ("random", "best")}


def _corpus(n: int = N) -> pa.Table:
    rng = np.random.default_rng(0)
    domains = np.array(DOMAINS)[rng.choice(3, n, p=[0.15, 0.3, 0.55])]
    texts = [text[: int(cut)] for text, cut in zip(corpus_texts(n), rng.integers(60, 700, n), strict=True)]
    return pa.table(
        {
            "doc_id": [f"d{i}" for i in range(n)],
            "text": texts,
            "domain": domains,
            "length": [float(len(text)) for text in texts],
            "s": rng.random(n).round(2),
        }
    )


def _write(folder: Path, selectors: dict[str, dict] = SELECTORS, per_shard: int = 150, **sections: dict) -> Path:
    """A recipe whose labels are columns and whose θ is given, so that the comparison is nearly all that it does."""
    path = write_small_recipe(folder, corpus={"path": "mine.parquet", "documents_per_shard": per_shard})
    pq.write_table(_corpus(), folder / "mine.parquet")
    THETA.save(folder / "theta.json")
    (folder / "mixture.json").write_text(json.dumps(MIXTURE), encoding="utf-8")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe |= {
        "domain": {"classifier": "column", "column": "domain"},
        "scorers": {name: {"scorer": "column", "column": name} for name in SCORERS},
        "rank": {"merge_small_domains": 0},
        "select": {"theta": "theta.json"},
        "proxy": {"tokens": 500, "options": MODEL},
        "pretrain": {"tokens": 1_000, "seeds": [1, 2], "options": MODEL},
        "compare": {"selectors": selectors},
    }
    recipe["validation"]["rows_per_task"] = 12
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    path.write_text(json.dumps(recipe), encoding="utf-8")  # which is YAML as well
    return path


def _only(selectors: dict[str, dict]) -> str:
    """The override that puts these selectors in the place of the recipe's."""
    return f"compare.selectors={json.dumps(selectors)}"


def _compare(recipe: Path, out: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    with open_run(load_recipe(recipe, list(overrides)), out, **options) as run:
        return run_comparison(run)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The run directory after an undisturbed comparison of all selectors; tests only read it."""
    _compare(recipe, recipe.parent / "out")
    return recipe.parent / "out"


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy of that directory which a test may change."""
    return shutil.copytree(whole, tmp_path / "out")


def _table(out: Path) -> dict[str, Any]:
    return json.loads((out / "compare" / "comparison.json").read_text(encoding="utf-8"))


def _rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["selector"]: row for row in _table(out)["rows"]}


def _results(out: Path) -> list[dict[str, Any]]:
    """The models' losses, without what the clock says."""
    return pq.read_table(out / "compare" / "results.parquet").drop_columns(["seconds"]).to_pylist()


def _folder(out: Path, name: str) -> Path:
    (found,) = out.glob(f"compare/{name}-????????????")
    return found


def _stamps(*places: Path) -> dict[str, tuple[int, bytes]]:
    """When these files, or those in these folders, were written, and what is in them."""
    files = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def _made(out: Path) -> dict[str, bytes]:
    """What a comparison leaves that must not depend on how it ran."""
    patterns = ("*/selection/*", "*/columns/*/*", "*/tokens/*", "**/*.safetensors", "comparison.md", "comparison.csv")
    found = [path for pattern in patterns for path in (out / "compare").glob(pattern)]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def test_models_of_every_selector_and_seed_are_in_the_table(whole: Path) -> None:
    results = _results(whole)
    names = ["quadmix", *SELECTORS]
    assert [(row["selector"], row["seed"]) for row in results] == [(name, seed) for name in names for seed in (1, 2)]
    rows = _rows(whole)
    assert list(rows) == names
    for name, row in rows.items():
        losses = [each["loss_hellaswag"] for each in results if each["selector"] == name]
        assert row["hellaswag"] == pytest.approx(np.mean(losses))
        assert row["hellaswag sd"] == pytest.approx(np.std(losses, ddof=1))
        assert row["objective"] == pytest.approx(row["hellaswag"])  # the weights of search.objective
    text = (whole / "compare" / "comparison.md").read_text(encoding="utf-8")
    read = list(csv.DictReader((whole / "compare" / "comparison.csv").open(encoding="utf-8")))
    assert [row["selector"] for row in read] == names
    assert [float(row["objective"]) for row in read] == [row["objective"] for row in rows.values()]
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert [name for name in names if f"| `{name}` |" not in text] == []
    assert [name for name in SELECTORS if not re.search(f">{name}[ <]", page)] == []
    assert RunDirectory(whole).verify()[1] == []


def test_every_budget_is_that_of_theta_and_met(whole: Path) -> None:
    rows, facts = _rows(whole), _table(whole)["facts"]
    budget = rows["quadmix"]["tokens"]
    longest = max(pq.read_table(path)["tokens"].to_numpy().max() for path in (whole / "normalise").glob("*.parquet"))
    assert budget > 50 * longest  # so that a document is little
    assert {row["budget"] for name, row in rows.items() if name != "quadmix"} == {budget}
    for name in THRESHOLDED:
        assert abs(rows[name]["tokens"] - budget) <= longest / 2 + 1
        assert rows[name]["budget met"].endswith("within one document")
        assert rows[name]["copies per document"] == 1
    for name, share in MIXTURE.items():
        assert abs(facts["mixed"]["domain_tokens"][name] - share * budget) <= longest / 2 + 1
    assert abs(facts["anew"]["expected_tokens"] - budget) <= longest
    assert facts["samplemix"]["expected_tokens"] == budget
    assert abs(rows["samplemix"]["tokens"] - budget) < 4 * facts["samplemix"]["sd_tokens"]
    assert rows["samplemix"]["budget met"].endswith("σ of its draws")
    assert rows["quadmix"]["budget met"] == "sets the budget"


def test_token_files_hold_the_selection_of_each(whole: Path) -> None:
    from quadmix_plugin.megatron import TokenFile

    for name, row in _rows(whole).items():
        if name == "quadmix":
            continue
        folder = _folder(whole, name)
        parts = pa.concat_tables(pq.read_table(path) for path in sorted((folder / "selection").glob("*.parquet")))
        assert int((parts["tokens"].to_numpy() * parts["copies"].to_numpy()).sum()) == row["tokens"]
        assert parts["copies"].to_numpy().min() > 0
        prefixes = (folder / "tokens" / "blend.txt").read_text(encoding="utf-8").split()[1::2]
        assert all((whole / prefix).parent == folder / "tokens" for prefix in prefixes)
        lengths = np.concatenate([TokenFile.open(whole / prefix).lengths for prefix in prefixes])
        assert len(lengths) == row["copies"]
        assert int(lengths.sum()) == row["tokens"] + row["copies"]  # and the end of every document


def test_overlaps_are_of_tokens_that_both_select(whole: Path) -> None:
    overlap = _table(whole)["overlap"]
    tokens: dict[str, int] = {}
    taken: dict[str, set[str]] = {}
    for name in ("random", "best"):
        parts = pa.concat_tables(pq.read_table(path) for path in (_folder(whole, name) / "selection").glob("*.parquet"))
        taken[name] = set(parts["doc_id"].to_pylist())
        tokens |= dict(zip(parts["doc_id"].to_pylist(), parts["tokens"].to_pylist(), strict=True))
    both, either = taken["random"] & taken["best"], taken["random"] | taken["best"]
    expected = sum(tokens[i] for i in both) / sum(tokens[i] for i in either)
    assert overlap["random"]["best"] == overlap["best"]["random"] == pytest.approx(expected)
    assert all(overlap[name][name] == 1 for name in overlap)


def test_again_it_does_nothing(recipe: Path, whole: Path) -> None:
    before = _stamps(whole / "compare", whole / "manifest")
    summary = _compare(recipe, whole)
    assert all("already done" in line for line in summary["headlines"] if line.startswith("compare"))
    assert _stamps(whole / "compare", whole / "manifest") == before


def test_a_selector_that_is_added_is_all_that_runs(recipe: Path, whole: Path, out: Path) -> None:
    untouched = [out / name for name in ("labels", "normalise", "selection", "tokens", "pretrain")]
    untouched += [_folder(out, name) for name in SELECTORS]
    before, there = _stamps(*untouched), set(_stamps(out / "compare"))
    long = {"selector": "top_k", "scorer_name": "length", "per_domain": True}
    summary = _compare(recipe, out, _only({**SELECTORS, "long": long}))
    (headline,) = (line for line in summary["headlines"] if line.startswith("compare"))
    assert "already done" not in headline
    assert _stamps(*untouched) == before
    new = str(_folder(out, "long"))
    assert all(path.startswith(new) for path in set(_stamps(out / "compare")) - there)
    assert list(_rows(out)) == ["quadmix", *SELECTORS, "long"]
    measured = ("tokens", "objective", "hellaswag sd")
    for name, row in _rows(whole).items():
        assert [_rows(out)[name][key] for key in measured] == [row[key] for key in measured]


def test_a_selector_that_is_removed_leaves_the_table_and_keeps_its_artifacts(recipe: Path, out: Path) -> None:
    kept = _stamps(*(_folder(out, name) for name in SELECTORS))
    both = {name: SELECTORS[name] for name in ("dsir", "best")}
    _compare(recipe, out, _only(both))
    assert list(_rows(out)) == ["quadmix", "dsir", "best"]
    assert len(_results(out)) == 6
    assert "samplemix" not in (out / "compare" / "comparison.md").read_text(encoding="utf-8")
    assert _stamps(*(_folder(out, name) for name in SELECTORS)) == kept
    _compare(recipe, out)  # and back: the table is all that is made
    assert list(_rows(out)) == ["quadmix", *SELECTORS]
    assert _stamps(*(_folder(out, name) for name in SELECTORS)) == kept


def test_another_option_or_another_file_behind_it_is_another_selection(recipe: Path, out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"books": 1}), encoding="utf-8")
    same = tmp_path / "same.json"
    same.write_text(json.dumps(MIXTURE), encoding="utf-8")
    old = {name: _folder(out, name) for name in ("best", "mixed")}
    stamps = _stamps(*old.values())
    moved = {"best": SELECTORS["best"], "mixed": {"selector": "regmix", "mixture": str(same)}}
    _compare(recipe, out, _only(moved))  # the same content elsewhere is the same selection
    assert {name: _folder(out, name) for name in old} == old
    changed = {
        "best": {"selector": "top_k", "scorer_name": "length"},
        "mixed": {"selector": "regmix", "mixture": str(other)},
    }
    _compare(recipe, out, _only(changed))
    assert _stamps(*old.values()) == stamps
    assert {name: len(list(out.glob(f"compare/{name}-*"))) for name in old} == {"best": 2, "mixed": 2}
    assert _table(out)["facts"]["mixed"]["domain_tokens"]["code"] == 0


def _forget(out: Path, *artifacts: str) -> None:
    for name in artifacts:
        (out / "manifest" / "compare" / f"{name.replace('/', '%')}.json").unlink()
        (out / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    "lost",
    [
        ("parts/dsir-1.json",),
        ("parts/dsir-1.json", "models/dsir-1/model.safetensors"),
        ("summary.json", "selection/{shard}"),
        ("summary.json", "selection/{shard}", "columns/dsir_log_weight/{shard}"),
        ("summary.json",),
        ("tokens/train-{stem}.idx",),
        ("tokens/train-{stem}.json", "tokens/train-{stem}.bin", "tokens/blend.json"),
    ],
)
def test_what_is_lost_is_made_again_and_the_same(recipe: Path, whole: Path, out: Path, lost: tuple[str, ...]) -> None:
    folder = _folder(out, "dsir")
    shard = sorted((folder / "selection").glob("*.parquet"))[2]
    names = [name.format(shard=shard.name, stem=shard.stem) for name in lost]
    _forget(out, "_SUCCESS", *(f"compare/{folder.name}/{name}" for name in names))
    others = [_folder(out, name) for name in SELECTORS if name != "dsir"]
    kept = _stamps(*others, folder / "models" / "dsir-2", *(folder / "columns").rglob("*.parquet"))
    _compare(recipe, out)
    assert _made(out) == _made(whole)
    assert _results(out) == _results(whole)
    assert _stamps(*map(Path, kept)) == kept
    assert RunDirectory(out).verify()[1] == []


class Stopped(KeyboardInterrupt):
    """Somebody presses Ctrl-C."""


@pytest.mark.slow
def test_stopped_again_and_again_it_ends_with_the_same_bytes(recipe: Path, whole: Path, tmp_path: Path) -> None:
    out, chosen = tmp_path / "out", ("samplemix", "dsir", "regmix", "random")
    override = _only({name: SELECTORS[name] for name in chosen})
    _until(recipe, out, "pretrain")
    stops = 0
    for reports in (9, 30, 45, 60, 3, 40, 2):
        left = [reports]

        def stop(stage: str, done: int, total: int | None, note: str = "", left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise Stopped

        try:
            _compare(recipe, out, override, progress=stop)
        except Stopped:
            stops += 1
    assert stops >= 5
    _compare(recipe, out, override)
    folders = tuple(f"compare/{_folder(whole, name).name}/" for name in chosen)
    wanted = {name: content for name, content in _made(whole).items() if name.startswith(folders)}
    assert {name: content for name, content in _made(out).items() if "comparison." not in name} == wanted
    assert _results(out) == [row for name in ("quadmix", *chosen) for row in _results(whole) if row["selector"] == name]
    assert RunDirectory(out).verify()[1] == []


def _until(recipe: Path, out: Path, last: str, *overrides: str) -> None:
    with open_run(load_recipe(recipe, list(overrides)), out) as run:
        run_steps(run, steps_until(last))


def _selections(run: Run) -> dict[str, dict[str, int]]:
    """The documents and copies that every selector of a run's recipe takes, made but not trained on."""
    step, found = run.step("compare"), {}
    for each in compare.contestants_of(run):
        compare._select(run, step, each)
        copies = compare.copies_of(run, step, each)
        taken = copies > 0
        ids = run.table.doc_ids.filter(pa.array(taken)).to_pylist()
        found[each.name] = dict(zip(ids, copies[taken].tolist(), strict=True))
    return found


@pytest.mark.parametrize(("per_shard", "shards"), [(1000, 1), pytest.param(15, 60, marks=pytest.mark.slow)])
def test_selections_do_not_depend_on_the_shards(
    whole: Path, recipe: Path, tmp_path: Path, per_shard: int, shards: int
) -> None:
    path = _write(tmp_path, per_shard=per_shard)
    with open_run(load_recipe(recipe), whole) as run:
        wanted = _selections(run)
        assert len(run.label_shards) == 6
    with open_run(load_recipe(path), tmp_path / "out") as run:
        run_steps(run, steps_until("select"))
        assert len(run.label_shards) == shards
        assert _selections(run) == wanted
    assert set(wanted) == set(SELECTORS)
    assert all(wanted.values())


@pytest.mark.slow
def test_dask_gives_the_same_bytes(recipe: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _compare(recipe, out, "executor.name=dask", "executor.workers=2")
    assert _made(out) == _made(whole)
    assert _results(out) == _results(whole)


def test_times_is_a_factor_on_the_budget(recipe: Path, out: Path) -> None:
    twice = {"selector": "random", "times": 2}
    half = {"selector": "random", "times": 0.5}
    _compare(recipe, out, _only({"random": {}, "twice": twice, "half": half}))
    rows = _rows(out)
    budget = rows["quadmix"]["tokens"]
    for name, factor in (("random", 1), ("twice", 2), ("half", 0.5)):
        assert rows[name]["budget"] == round(factor * budget)
        assert abs(rows[name]["tokens"] - factor * budget) <= 200
    taken = {name: {i for path in (_folder(out, name) / "selection").glob("*.parquet")
                    for i in pq.read_table(path)["doc_id"].to_pylist()} for name in ("random", "half")}  # fmt: skip
    assert taken["half"] < taken["random"]  # the same order of the documents


def test_a_budget_of_its_own_is_the_budget_of_all(recipe: Path, out: Path) -> None:
    _compare(recipe, out, _only(FEW), "compare.tokens=3000")
    rows = _rows(out)
    assert {name: row["budget"] for name, row in rows.items() if name != "quadmix"} == dict.fromkeys(FEW, 3000)
    assert all(abs(rows[name]["tokens"] - 3000) <= 200 for name in FEW)
    off = rows["quadmix"]["tokens"] - 3000  # θ*'s selection is as it is, and the table says how far off
    assert rows["quadmix"]["budget met"].startswith(f"+{off:,} tokens")


def test_without_selectors_the_table_is_of_theta_alone(recipe: Path, whole: Path, out: Path) -> None:
    _compare(recipe, out, "compare.selectors={}")
    assert list(_rows(out)) == ["quadmix"]
    assert _results(out) == _results(whole)[:2]
    assert _rows(out)["quadmix"]["objective standing"] == "best"


def test_a_search_without_a_scorer_takes_the_proxies_of_the_run(tmp_path: Path) -> None:
    path = write_proxy_recipe(tmp_path)
    selectors = {"without": {"selector": "quadmix", "exclude_scorers": ["words"]}, "regmix": SELECTORS["regmix"]}
    short = ["proxy.number=14", "proxy.repeated=1", "proxy.baselines=0", "search.draws=300", "search.compared=[]",
             "pretrain.tokens=1000", f"pretrain.options={json.dumps(MODEL)}"]  # fmt: skip
    _compare(path, tmp_path / "out", *short, "compare.selectors={}")
    before = _stamps(tmp_path / "out" / "proxies")
    _compare(path, tmp_path / "out", *short, _only(selectors))
    out = tmp_path / "out"
    assert _stamps(out / "proxies") == before
    alpha = Parameters.load(out / "search" / "without-words" / "theta.json").alpha
    assert (alpha[:, 1] == 0).all()
    assert (Parameters.load(out / "search" / "theta.json").alpha[:, 1] > 0).any()
    assert len(list(_folder(out, "regmix").rglob("proxies/**/*.json"))) == 8
    assert not (out / "compare" / "pool").exists()  # that of the proxies has every document
    rows = _rows(out)
    assert rows["without"]["overlap with quadmix"] < 1
    assert abs(_table(out)["facts"]["without"]["expected_tokens"] - rows["quadmix"]["tokens"]) < 500


def _quadmix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Runs the command in this process; returns exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["quadmix", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    printed, err = capsys.readouterr()
    return int(ended.value.code or 0), printed, err


def test_a_budget_beyond_the_corpus_is_refused_before_anything_is_selected(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _stamps(out / "compare", out / "manifest")
    more = {"mixed": SELECTORS["mixed"], "random": {}}  # the first could repeat, the second cannot
    args = [str(recipe), "--out", str(out), "--json", "--set", "compare.tokens=100000000", "--set", _only(more)]
    code, printed, _ = _quadmix(monkeypatch, capsys, "compare", *args)
    assert code == 78
    message = json.loads(printed)["error"]
    assert message.startswith("compare.selectors.random: a budget of 100,000,000 tokens, and the corpus has ")
    assert _stamps(out / "compare", out / "manifest") == before


def test_a_target_of_unknown_tasks_is_refused_before_anything_is_selected(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _stamps(out / "compare", out / "manifest")
    more = {"mixed": {**SELECTORS["mixed"], "times": 0.5}, "dsir": {"tasks": ["hellaswag", "nope"]}}
    code, printed, _ = _quadmix(
        monkeypatch, capsys, "compare", str(recipe), "--out", str(out), "--json", "--set", _only(more)
    )
    assert code == 78
    assert "compare.selectors.dsir: tasks: 'nope' is not among hellaswag, mmlu" in json.loads(printed)["error"]
    assert _stamps(out / "compare", out / "manifest") == before


@pytest.mark.parametrize(
    ("selectors", "message"),
    [
        ({"best": {"selector": "top_k", "scorer_name": "S"}}, r"best\.scorer_name: 'S' is not among scorers \(length"),
        ({"criteria_mix": {"scorer_names": ["s", "t"]}}, r"criteria_mix\.scorer_names: 't' is not among"),
        ({"anew": {"selector": "quadmix", "exclude_scorers": ["t"]}}, r"anew\.exclude_scorers: 't' is not among"),
        (
            {"anew": {"selector": "quadmix", "exclude_scorers": ["s"]}},
            r"exclude_scorers: \['s'\] searches anew, and select",
        ),
        ({"samplemix": {"quality": ["t"]}}, r"samplemix\.quality: 't' is not among"),
        ({"best": {"selector": "top_k", "scorer": "s"}}, r"best\.scorer: unknown key; did you mean 'scorer_name'"),
        ({"best": {"selector": "topk"}}, r"best: no plug-in 'topk' .* did you mean 'top_k'"),
        ({"random": {"times": 0}}, r"random\.times: 0; give a factor on the budget, a number above 0"),
        ({"random": {"times": "2"}}, r"random\.times: '2'; give a factor"),
        ({"random": {"times": True}}, r"random\.times: True; give a factor"),
        ({"quadmix": {}}, r"'quadmix' stands for the selection of θ\* itself; choose another name"),
        ({"a b": {"selector": "random"}}, r"compare\.selectors\.a b"),
    ],
)
def test_what_a_recipe_alone_shows_to_be_wrong_is_refused_as_it_is_read(
    recipe: Path, selectors: dict[str, dict], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, [_only(selectors)])


MISSING = {"mixed": {"selector": "regmix", "mixture": "no.json"}, "dsir": {"target": "no.jsonl"},
           "anew": {"selector": "quadmix", "theta": "no.json"}}  # fmt: skip


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_missing_file_is_refused_before_any_work(
    recipe: Path, whole: Path, tmp_path: Path, name: str, labelled: bool
) -> None:
    out = tmp_path / "out"
    if labelled:
        shutil.copytree(whole, out)
    before = _stamps(out / "compare")
    message = rf"compare\.selectors\.{name}\.(mixture|target|theta): .*no\.jsonl?: no such file"
    with pytest.raises(RecipeError, match=message):
        _compare(recipe, out, _only({"half": {"selector": "random", "times": 0.5}, name: MISSING[name]}))
    assert _stamps(out / "compare") == before
    assert (out / "labels").exists() == labelled


def test_a_plug_in_of_the_former_contract_is_refused_with_the_member_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "from dataclasses import dataclass\n\n@dataclass\nclass Old:\n    name: str = 'old'\n\n"
        "    def select(self, table, normalised, budget_tokens, seed):\n        return None\n"
    )
    (tmp_path / "former_selector.py").write_text(source, encoding="utf-8")
    info = tmp_path / "former_selector-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: former-selector\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[quadmix_plugin.selectors]\nold = former_selector:Old\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"plug-in 'old' of former-selector has no fit, which selectors need"):
        registry.create("selectors", "old", {}, "compare.selectors.old")


def test_the_command_prints_one_object_with_the_rows(
    recipe: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, _ = _quadmix(monkeypatch, capsys, "compare", str(recipe), "--out", str(whole), "--json")
    assert code == 0
    found = json.loads(printed)
    assert found["rows"] == _table(whole)["rows"]
    assert Path(found["table"]) == whole / "compare" / "comparison.md"
    code, printed, _ = _quadmix(monkeypatch, capsys, "compare", str(recipe), "--out", str(whole))
    assert code == 0
    assert [name for name in SELECTORS if name not in printed] == []


def test_the_plan_lists_the_comparison_and_whether_it_is_of_these_selectors(recipe: Path, whole: Path) -> None:
    def row(out: Path, *overrides: str) -> dict[str, str]:
        plan = make_plan(load_recipe(recipe, list(overrides)), out, trial=False)
        return next(each for each in plan["steps"] if each["step"] == "compare")

    assert row(whole)["state"] == "done"
    assert row(whole, _only(FEW))["state"] == "done for other selectors"
    fresh = row(recipe.parent / "none", _only({**FEW, "regmix": SELECTORS["regmix"]}))
    assert fresh["state"] == "to do"
    assert fresh["work"] == "random, best, regmix: 6 models, 8 proxies of regmix"


def test_losses_of_mixtures_are_in_the_order_of_the_mixtures_and_nan_where_one_failed(recipe: Path, out: Path) -> None:
    with open_run(load_recipe(recipe), out) as run:
        step, folder = run.step("compare"), _folder(out, "regmix").relative_to(out)
        paths = [str(path.relative_to(out)) for path in sorted((out / folder / "proxies").rglob("*.json"))]
        expected = [step.read_json(path)["losses"]["mmlu"] for path in paths]
        proxies = MixtureProxies(run, step, str(folder))
        mixtures = np.full((8, 3), 1 / 3)  # all are trained, so it does not matter which they are
        assert proxies(mixtures, seed=0)["mmlu"].tolist() == expected
        step.write_json(paths[2], {"proxy": 2, "kind": "mixture", "seed": 1, "failure": "diverged", "final": True})
        found = proxies(mixtures, seed=0)["mmlu"]
        assert np.flatnonzero(np.isnan(found)).tolist() == [2]
        assert np.delete(found, 2).tolist() == expected[:2] + expected[3:]


def test_the_target_is_of_the_questions_on_which_one_may_search(recipe: Path, whole: Path) -> None:
    with open_run(load_recipe(recipe), whole) as run:
        corpus = RunCorpus(run, run.step("compare"), "compare/none")
        texts, mmlu = corpus.target_texts(), corpus.target_texts(["mmlu"])
        lines = (recipe.parent / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        judged = pq.read_table(whole / "pretrain" / "validation.parquet").to_pylist()
    assert 0 < len(mmlu) < len(texts) < len(rows)
    assert set(mmlu) <= {f"{row['prompt']} {row['response']}" for row in rows if row["task"] == "mmlu"}
    tokenizer = Tokenizer.from_file(str(MODELS / "tokenizer" / "tokenizer.json"))
    texts = [" ".join(text.split()) for text in texts]
    parts = {part: [" ".join(tokenizer.decode(row["ids"]).split()) for row in judged if row["part"] == part]
            for part in ("search", "report")}  # fmt: skip
    assert [each for each in parts["search"] if not any(each in text for text in texts)] == []
    assert [each for each in parts["report"] if any(each in text for text in texts)] == []
    assert min(map(len, parts.values())) == 12


def test_regmix_trains_its_proxies_once(recipe: Path, whole: Path, out: Path) -> None:
    folder = _folder(out, "regmix")
    parts = sorted((folder / "proxies").rglob("*.json"))
    assert len(parts) == 8

    def losses() -> list[float]:
        return [json.loads(path.read_text(encoding="utf-8"))["losses"]["hellaswag"] for path in parts]

    first, stamps = losses(), _stamps(*parts)
    assert len(set(first)) == 8  # each of a mixture of its own
    relative = folder.relative_to(out)
    again = [f"{relative}/summary.json", *(f"{relative}/selection/{p.name}" for p in (folder / "selection").iterdir())]
    _forget(out, *again, "_SUCCESS")
    _compare(recipe, out)
    assert _stamps(*parts) == stamps
    assert _made(out) == _made(whole)
    _forget(out, *again, *(str(path.relative_to(out)) for path in parts[2:4]), "_SUCCESS")
    _compare(recipe, out)
    assert losses() == first
    assert _stamps(*parts[:2], *parts[4:]).items() <= stamps.items()
    assert _made(out) == _made(whole)


def test_benchmarks_of_theta_come_from_their_step_and_other_tasks_train_nothing_anew(tmp_path: Path) -> None:
    bits = {"path": "validation.jsonl", "mask_prompt": False}
    recipe = _write(tmp_path, {"random": {}}, evaluate={"local": {"bits": bits}, "limit": 10})
    out = tmp_path / "out"
    _compare(recipe, out)
    theta = json.loads((out / "evaluate" / "scores.json").read_text(encoding="utf-8"))["tasks"]["bits"]
    rows = _rows(out)
    assert rows["quadmix"]["bits (bits_per_byte)"] == theta["value"]
    made = sorted(path.name for path in (out / "compare" / "benchmarks").glob("bits-*/*"))
    assert made == [f"{_folder(out, 'random').name}-{seed}.json" for seed in (1, 2)]
    best = min(rows, key=lambda name: rows[name]["bits (bits_per_byte)"])
    assert rows[best]["bits (bits_per_byte) standing"] == "best"
    before = _stamps(out / "pretrain", *out.glob("compare/random-*"))
    more = {"bits": bits, "responses": {**bits, "prompt": None}}
    _compare(recipe, out, f"evaluate.local={json.dumps(more)}")
    assert _stamps(out / "pretrain", *out.glob("compare/random-*")) == before
    assert _rows(out)["random"]["bits (bits_per_byte)"] == rows["random"]["bits (bits_per_byte)"]
    assert _rows(out)["random"]["responses (bits_per_byte)"] > 0
    assert "higher is better, of bits lower" in (out / "compare" / "comparison.md").read_text(encoding="utf-8")
