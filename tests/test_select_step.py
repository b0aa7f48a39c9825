"""The step `select` and what hangs on it: rank methods, budget, frozen maps, dropped rows, the thinned pool."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_run import write_small_recipe

from quadmix_plugin import count_copies, sample_parameters
from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.hashing import uniform
from quadmix_plugin.megatron import TokenFile
from quadmix_plugin.parameters import Parameters, ParameterSpace
from quadmix_plugin.pipelines.context import open_run
from quadmix_plugin.pipelines.export import exported
from quadmix_plugin.pipelines.run import run_steps, steps_until
from quadmix_plugin.pipelines.select import sizes

N = 900
SPACE = ParameterSpace(omega_max=0.5)
THETA = sample_parameters(1, 2, 2, seed=8, space=SPACE, domains=("a", "b"), scorers=("length", "s"))[0]


def _corpus(n: int = N, seed: int = 0, **columns) -> pa.Table:
    rng = np.random.default_rng(seed)
    rows = {
        "doc_id": [f"{seed}-{i}" for i in range(n)],
        "text": [" ".join(f"word{j}" for j in rng.integers(0, 900, k)) for k in rng.integers(1, 30, n)],
        "domain": np.array(["a", "b"])[rng.integers(0, 2, n)],
        "length": rng.normal(size=n).round(1),
        "s": rng.random(n),
    }
    return pa.table(rows | columns)


def _recipe(folder: Path, documents: pa.Table, **sections) -> Path:
    """A recipe whose labels are columns of the corpus and whose parameters are given, so that nothing is trained."""
    path = write_small_recipe(folder, corpus={"path": "mine.parquet", "documents_per_shard": 150})
    pq.write_table(documents, folder / "mine.parquet")
    THETA.save(folder / "theta.json")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["domain"] = {"classifier": "column", "column": "domain"}
    recipe["scorers"] = {name: {"scorer": "column", "column": name} for name in THETA.scorers}
    recipe["rank"] = {"merge_small_domains": 0}
    recipe["select"] = {"theta": "theta.json"}
    recipe["compare"] = {"selectors": {"random": {}}}
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _run(recipe: Path, out: Path, last: str = "select"):
    with open_run(load_recipe(recipe), out) as run:
        run_steps(run, steps_until(last))
        parts = [run.step("select").read_table(f"selection/{shard}.parquet") for shard in run.label_shards]
        return run, pa.concat_tables(parts), run.step("select").read_json("selection/summary.json")


def _documents_in_pool(out: Path) -> int:
    return sum(len(TokenFile.open(path.with_suffix("")).lengths) for path in (out / "proxies" / "pool").glob("*.idx"))


@pytest.mark.parametrize(
    ("method", "ties"), [("histogram", "paper"), ("exact", "paper"), ("exact", "hash"), ("subset", "mid")]
)
def test_the_step_selects_what_the_pure_function_says(tmp_path: Path, method: str, ties: str) -> None:
    rank = {"method": method, "ties": ties, "bins": 64, "subset_documents": 200}
    run, selection, summary = _run(_recipe(tmp_path, _corpus(), rank=rank), tmp_path / "out")
    table = run.table
    copies = count_copies(
        run.normalised, table.domain_ids, table.tokens, table.doc_ids, THETA, 3, method, ties, 64, 200
    )  # fmt: skip
    wanted = {i: c for i, c in zip(table.doc_ids.to_pylist(), copies.tolist(), strict=True) if c}
    assert dict(zip(selection["doc_id"].to_pylist(), selection["copies"].to_pylist(), strict=True)) == wanted
    assert len(wanted) > 50
    facts = summary["expected"]
    assert facts["rank_method"] == method
    assert (facts["rank_error"] > 0.02) == (method == "subset")
    realised = summary["selection"]
    assert realised == sizes(table, copies)
    assert realised["tokens"] == int((table.tokens * copies).sum())
    assert realised["epochs"] == pytest.approx(realised["tokens"] / realised["unique_tokens"])
    assert abs(realised["tokens"] - facts["expected_tokens"]) < 0.15 * realised["tokens"]


@pytest.mark.parametrize("method", ["histogram", "exact"])
def test_a_budget_is_met_in_expectation_and_reported(tmp_path: Path, method: str) -> None:
    target = 4000
    recipe = _recipe(tmp_path, _corpus(), rank={"method": method}, select={"target_tokens": target})
    run, _, summary = _run(recipe, tmp_path / "out")
    scaling, realised = summary["scaling"], summary["selection"]
    assert scaling["target_tokens"] == target
    assert scaling["expected_tokens"] == pytest.approx(target, abs=60)  # a document at most
    assert summary["expected"]["expected_tokens"] == pytest.approx(scaling["expected_tokens"])
    assert abs(realised["tokens"] - target) < 0.1 * target
    used = Parameters.from_dict(run.step("select").read_json("selection/theta.json"))
    np.testing.assert_allclose(used.omega, np.minimum(THETA.omega * scaling["factor"], 1))


def test_later_documents_are_ranked_to_frozen_maps_and_old_draws_stay(tmp_path: Path) -> None:
    old, first, _ = _run(_recipe(tmp_path / "old", _corpus()), tmp_path / "old" / "out")
    both = pa.concat_tables([_corpus(), _corpus(300, seed=1)])
    frozen = {
        "normalise": {"frozen": str(tmp_path / "old" / "out" / "normalise" / "normaliser.json")},
        "rank": {"frozen": str(tmp_path / "old" / "out" / "selection" / "rank_map.parquet")},
    }
    later = _recipe(tmp_path / "new", both, **frozen)
    _, second, _ = _run(later, tmp_path / "new" / "out")
    columns = ["doc_id", "copies", "quality_rank", "sampling_value"]
    kept = second.filter(pa.array([not i.startswith("1-") for i in second["doc_id"].to_pylist()]))
    assert kept.select(columns).to_pylist() == first.select(columns).to_pylist()
    assert len(second) > len(first)
    _, anew, _ = _run(_recipe(tmp_path / "anew", both), tmp_path / "anew" / "out")
    refitted = anew.filter(pa.array([not i.startswith("1-") for i in anew["doc_id"].to_pylist()]))
    assert refitted.select(columns).to_pylist() != first.select(columns).to_pylist()  # so freezing did something
    del old


def test_frozen_ranks_must_fit_the_parameters(tmp_path: Path) -> None:
    _run(_recipe(tmp_path, _corpus()), tmp_path / "out")
    frozen = str(tmp_path / "out" / "selection" / "rank_map.parquet")
    with pytest.raises(RecipeError, match=r"rank\.frozen: .*/mine\.parquet: not a rank map"):
        _run(_recipe(tmp_path / "a", _corpus(), rank={"frozen": "mine.parquet"}), tmp_path / "a" / "out")
    with pytest.raises(RecipeError, match=r"has ties 'paper'; set rank\.ties to that, found 'mid'"):
        _run(_recipe(tmp_path / "b", _corpus(), rank={"frozen": frozen, "ties": "mid"}), tmp_path / "b" / "out")
    with pytest.raises(RecipeError, match=r"give select\.theta too"):
        _run(
            _recipe(tmp_path / "c", _corpus(), rank={"frozen": frozen}, select={"theta": None}), tmp_path / "c" / "out"
        )


def test_dropped_rows_are_counted_and_are_in_no_later_artifact(tmp_path: Path) -> None:
    scores = _corpus()["s"].to_numpy().copy()
    scores[::50] = np.nan
    recipe = _recipe(tmp_path, _corpus(s=scores), normalise={"invalid_scores": "drop"}, select={"theta": None},
                     proxy={"number": 14, "tokens": 800})  # fmt: skip
    with open_run(load_recipe(recipe), tmp_path / "out") as run:
        run_steps(run, steps_until("export"))
        facts = run.step("normalise").summary()
        assert facts is not None
        assert facts["dropped"] == {"score_s not finite": 18}
        assert facts["rows_in"] == facts["rows_kept"] + 18 == N
        assert run.table.n == N - 18
        assert _documents_in_pool(tmp_path / "out") == N - 18
    with pytest.raises(InputError, match="not finite"):
        _run(_recipe(tmp_path / "b", _corpus(s=scores)), tmp_path / "b" / "out")


def test_a_thinned_pool_holds_what_proxies_draw_and_keeps_their_law(tmp_path: Path) -> None:
    corpus = _corpus(6000)
    proxy = {"number": 14, "tokens": 1200, "pool": "thinned", "baselines": 0}
    recipe = _recipe(tmp_path, corpus, proxy=proxy, select={"theta": None}, corpus={"documents_per_shard": 1000})
    with open_run(load_recipe(recipe), tmp_path / "out") as run:
        run_steps(run, steps_until("export"))
        facts = json.loads((tmp_path / "out" / "proxies" / "thinning.json").read_text(encoding="utf-8"))
        below, table = facts["below"], run.table
        assert 0 < facts["thin"] < below < 1
        in_pool = uniform(table.doc_ids, 3) < below
        assert _documents_in_pool(tmp_path / "out") == int(in_pool.sum())
        thetas = run.step("proxies").read_table("proxies/thetas.parquet")["theta"].to_pylist()
        losses = run.step("proxies").read_table("proxies/losses.parquet").to_pylist()
        for row, vector in zip(losses, thetas, strict=True):
            theta = Parameters.from_vector(vector, 2, table.domains, table.scorers)
            copies = count_copies(
                run.normalised, table.domain_ids, table.tokens, table.doc_ids, theta, 3, thin=facts["thin"]
            )  # fmt: skip
            assert not copies[~in_pool].any()
            assert row["selected_tokens"] == int(((table.tokens + 1) * copies).sum())
        chosen = run.step("select").read_json("selection/summary.json")["selection"]
        written = [TokenFile.open(prefix).n_documents for prefix in exported(run, run.step("export")).prefixes]
        assert sum(written) == chosen["copies"]


def test_a_thinned_pool_needs_common_draws(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, _corpus(50), proxy={"pool": "thinned", "draws": "independent"})
    with pytest.raises(RecipeError, match="pool 'thinned' holds the documents of one draw"):
        load_recipe(recipe)
