"""Step 2 as a whole: curves, baselines, retries, halving by a pilot, matched epochs, bad input, kill -9."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from proxy_runs import (
    PER_STEP,
    STEPS,
    TASKS,
    TOKENS,
    columns,
    label_once,
    measured,
    part,
    rows,
    trained,
    write_recipe,
)
from scipy.stats import spearmanr

from quadmix_plugin import Parameters, count_copies, registry
from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import InputError, QuadmixError, RecipeError
from quadmix_plugin.executors import InlineExecutor
from quadmix_plugin.labelled_corpus import select_in_memory
from quadmix_plugin.megatron import TokenFile, write_documents
from quadmix_plugin.pipelines.context import Run, open_run
from quadmix_plugin.pipelines.proxies import _finish, proxies
from quadmix_plugin.pipelines.proxy_data import pool_prefixes, write_pool
from quadmix_plugin.pipelines.proxy_trust import baseline_losses
from quadmix_plugin.pipelines.run import run_steps, steps_until
from quadmix_plugin.pipelines.search import search
from quadmix_plugin.proxy.parts import part_path
from quadmix_plugin.proxy.pieces import cut_pieces
from quadmix_plugin.proxy.pool import TokenPool
from quadmix_plugin.proxy.validation import load_validation_sets
from quadmix_plugin.search.features import FeatureMap
from quadmix_plugin.stages.selectors.random import Random
from quadmix_plugin.stages.selectors.top_k import TopK
from quadmix_plugin.store import RunDirectory, Step

logger = logging.getLogger(__name__)

HALVING = ("proxy.fidelity=successive_halving", "proxy.pilot=8", "proxy.curve_at=[0.6, 0.9]")
FEW = ("proxy.number=8", "proxy.repeated=1", "proxy.baselines=0")

# A trainer that goes wrong on the selections of so many tokens, as often as their fault says: "raise 2".
FAULTY = """
import dataclasses, os, signal
from pathlib import Path
from quadmix_plugin.errors import InputError
from quadmix_plugin.proxy.trainer import TorchTrainer

@dataclasses.dataclass
class Faulty(TorchTrainer):
    faults: dict[str, str] = dataclasses.field(default_factory=dict)

    def train(self, pieces, *args, **kwargs):
        how, times = self.faults.get(str(pieces.selected_tokens), "none 0").split()
        calls = Path(os.environ["QUADMIX_TEST_CALLS"]) / str(pieces.selected_tokens)
        with calls.open("a") as stream:
            stream.write(".")
        if calls.stat().st_size > int(times):
            return super().train(pieces, *args, **kwargs)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "diverge":
            return TorchTrainer.train(dataclasses.replace(self, learning_rate=1e30), pieces, *args, **kwargs)
        raise {"raise": RuntimeError, "input": InputError, "interrupt": KeyboardInterrupt}[how]("no such luck")
"""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label_once(tmp_path_factory)


@pytest.fixture(scope="module")
def full(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Step:
    return trained(labelled, tmp_path_factory.mktemp("full") / "out")


@pytest.fixture(scope="module")
def halved(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Step:
    return trained(labelled, tmp_path_factory.mktemp("halved") / "out", *HALVING)


def test_curves_hold_the_losses_at_the_shares_asked_and_those_of_the_end(full: Step) -> None:
    curves = full.read_table("proxies/curves.parquet").to_pandas()
    losses = full.read_table("proxies/losses.parquet").to_pandas().set_index("proxy")
    assert set(curves["proxy"]) == set(losses.index) == set(range(32))
    for number, curve in curves.groupby("proxy"):
        known = curve[curve["loss_mmlu"].notna()]
        assert known["share"].tolist() == [0.1, 0.25, 0.5, 1.0]
        assert known["step"].tolist() == [3, 8, 16, STEPS]
        assert (curve["tokens_seen"].diff().dropna() > 0).all()
        assert (curve["tokens_seen"] == np.minimum(curve["step"] * PER_STEP, -(-TOKENS // 32) * 32)).all()
        for column in ("loss_hellaswag", "loss_mmlu"):
            assert known[column].iloc[-1] == losses.loc[number, column]
            assert known[column].nunique() == 4


def test_noise_is_that_of_several_thetas(full: Step) -> None:
    drawn, again = rows(full), rows(full, "repeat")
    assert sorted(again) == [24, 25]
    found = full.read_json("proxies/noise.json")
    for task in TASKS:
        pairs = np.array([[drawn[i][f"loss_{task}"], again[24 + i][f"loss_{task}"]] for i in range(2)])
        assert [again[24 + i]["selected_tokens"] for i in range(2)] == [drawn[i]["selected_tokens"] for i in range(2)]
        assert (np.diff(pairs) != 0).all()  # another seed, other losses
        assert (found[task]["thetas"], found[task]["repeats"]) == (2, 4)
        assert found[task]["noise_sd"] == pytest.approx(np.sqrt(pairs.var(axis=1, ddof=1).mean()))
        assert found[task]["theta_sd"] == pytest.approx(np.std([row[f"loss_{task}"] for row in drawn.values()], ddof=1))


BASELINES = ("random", "top_k[characters]", "top_k[words]")


@pytest.fixture(scope="module")
def selected(labelled: Path, full: Step) -> dict[str, np.ndarray]:
    """The copies that the selectors give, called by hand with the median of what the drawn θ are expected to select."""
    with open_run(load_recipe(labelled), full.root) as run:
        table, normalised = run.table, run.normalised
        vectors = np.array(full.read_table("proxies/thetas.parquet")["theta"].to_pylist()[:24])
        expected = FeatureMap.of(table, normalised).statistics(vectors).selected_tokens
        selectors = dict(zip(BASELINES, (Random(), TopK("characters"), TopK("words")), strict=True))
        budget = round(float(np.median(expected)))
        seeds = {name: run.seed_for(f"baseline {name}") for name in selectors}
        return {n: select_in_memory(s, table, normalised, budget, seeds[n]) for n, s in selectors.items()}


def test_baselines_are_trained_on_the_documents_of_the_selectors(labelled: Path, full: Step, selected: dict) -> None:
    kept = full.read_table("proxies/baselines.parquet").to_pandas()
    work = full.read_table("proxies/thetas.parquet").to_pandas()
    assert list(dict.fromkeys(kept["selection"])) == list(BASELINES)
    with open_run(load_recipe(labelled), full.root) as run:
        table, pool = run.table, TokenPool.open(pool_prefixes(run))
        sets = load_validation_sets(full.read_path("proxies/validation.parquet"), "search")
        trainer = registry.create("trainers", "torch", run.recipe.proxy.options, "here")
    for i, name in enumerate(BASELINES):
        documents = kept[kept["selection"] == name]
        np.testing.assert_array_equal(documents["row"], np.flatnonzero(selected[name]))
        assert (documents["copies"] == 1).all()
        tokens = np.bincount(table.domain_ids, (table.tokens + 1) * selected[name], len(table.domains))
        for j, number in enumerate((26 + 2 * i, 27 + 2 * i)):
            found, row = part(full, number), work.loc[number]
            assert (found["kind"], row["kind"], row["selection"], row["theta"]) == ("baseline", "baseline", name, None)
            assert row["seed"] == work.loc[24 * j, "seed"]  # of the draws, and of their repeats
            assert found["domain_tokens"] == dict(zip(table.domains, tokens.astype(int).tolist(), strict=True))
        seed = int(work.loc[26 + 2 * i, "seed"])
        pieces = cut_pieces(pool, selected[name], table.domain_ids, 32, TOKENS, seed, trainer.batch_size)
        again = trainer.train(pieces, sets, seed=run.recipe.seed, vocabulary=4096)
        assert again.losses == part(full, 26 + 2 * i)["losses"]


def test_baselines_have_losses_by_name_task_and_seed_without_those_that_failed(
    labelled: Path, full: Step, tmp_path: Path
) -> None:
    out = shutil.copytree(full.root, tmp_path / "out")
    with open_run(load_recipe(labelled), out) as run:
        step, drawn = run.step("proxies"), rows(full, "baseline")
        found = baseline_losses(run)
        assert list(found) == list(BASELINES)
        for i, name in enumerate(BASELINES):
            for task in TASKS:
                assert found[name][task].tolist() == [drawn[26 + 2 * i + j][f"loss_{task}"] for j in range(2)]
        for number in (26, 28, 29):
            step.write_json(part_path(number), {"proxy": number, "kind": "baseline", "seed": 1, "failure": "diverged"})
        step.write_json(part_path(27), {**part(full, 27), "attempts": 2, "learnt": False})
        _finish(run, step, step.read_table("proxies/thetas.parquet"), None, 0.0)
        assert sorted((step.summary() or {})["failures"]) == [part_path(n) for n in (26, 28, 29)]
        assert {name: each["mmlu"].tolist() for name, each in baseline_losses(run).items()} == {
            "random": [drawn[27]["loss_mmlu"]],
            "top_k[words]": [drawn[n]["loss_mmlu"] for n in (30, 31)],
        }
    for name in ("noise", "fidelity"):
        assert step.read_json(f"proxies/{name}.json") == full.read_json(f"proxies/{name}.json")


def agreement(step: Step, proxies: int, shares: tuple[float, ...]) -> dict:
    """By task and share, Spearman's correlation of the first drawn proxies' losses there with those at the end."""
    curves = step.read_table("proxies/curves.parquet").to_pandas()
    losses = curves[curves["proxy"] < proxies].pivot(index="proxy", columns="share")
    early_and_late = {t: (losses[f"loss_{t}"], losses[f"loss_{t}"][1.0]) for t in TASKS}
    return {
        task: {str(share): pytest.approx(spearmanr(early[share], late)[0]) for share in shares}
        for task, (early, late) in early_and_late.items()
    }


def test_agreement_is_told_of_every_task_and_share(full: Step) -> None:
    found = full.read_json("proxies/fidelity.json")
    assert found["agreement"] == agreement(full, 24, (0.1, 0.25, 0.5))
    assert (found["proxies_in_full"], found["stopped"], found["trained_share"]) == (24, {}, 1.0)


def test_under_halving_the_pilot_alone_stands_for_all_thetas(halved: Step) -> None:
    assert halved.read_json("proxies/fidelity.json")["agreement"] == agreement(halved, 8, (0.6, 0.9))
    drawn, found = rows(halved), halved.read_json("proxies/noise.json")
    for task in TASKS:
        sd = np.std([drawn[n][f"loss_{task}"] for n in range(8)], ddof=1)
        assert (found[task]["theta_sd"], found[task]["thetas"]) == (pytest.approx(sd), 2)


def test_stopped_proxies_have_a_share_and_kept_ones_the_losses_of_full_fidelity(full: Step, halved: Step) -> None:
    whole = {n: measured(row) for n, row in (rows(full) | rows(full, "repeat")).items()}
    rungs = {rung["share"]: rung for rung in halved.read_json("proxies/halving.json")["rungs"]}
    stopped, kept = set(), set()
    for n, row in (rows(halved) | rows(halved, "repeat")).items():
        if row["share"] == 1.0:
            assert measured(row) == whole[n]
            kept.add(n)
            continue
        stopped.add(n)
        assert row["tokens_seen"] == round(STEPS * row["share"]) * PER_STEP < whole[n]["tokens_seen"]
        told = part(halved, n)
        for task in TASKS:
            line = rungs[row["share"]]["forecasts"][task]
            expected = line["intercept"] + line["slope"] * told["losses"][task]
            assert row[f"loss_{task}"] == pytest.approx(expected)
            bits_per_nat = told["bits_per_byte"][task] / told["losses"][task]
            assert row[f"bpb_{task}"] == pytest.approx(expected * bits_per_nat)
            assert abs(row[f"loss_{task}"] - whole[n][f"loss_{task}"]) < 5 * line["error"]
    assert {n: measured(row) for n, row in rows(halved, "baseline").items()} == {
        n: measured(row) for n, row in rows(full, "baseline").items()
    }
    assert {*range(8), 24, 25} <= kept
    assert stopped
    assert kept - {*range(8), 24, 25}


def test_fidelity_says_what_halving_saved(halved: Step) -> None:
    shares = [row["share"] for row in rows(halved).values()]
    found = halved.read_json("proxies/fidelity.json")
    counts = {str(share): shares.count(share) for share in sorted(set(shares) - {1.0})}
    assert found["stopped"] == counts
    assert found["proxies_in_full"] == shares.count(1.0) == 24 - sum(counts.values())
    assert 0.6 < found["trained_share"] < 1
    assert found["trained_share"] == pytest.approx(np.mean(shares))
    assert set(found["forecast_errors"]) == set(found["agreement"]["mmlu"]) == {"0.6", "0.9"}
    assert f"{sum(counts.values())} stopped early" in str(halved.summary())


def test_halving_goes_on_by_the_rule_that_it_began_with(labelled: Path, halved: Step, tmp_path: Path) -> None:
    out = shutil.copytree(halved.root, tmp_path / "out")
    rule, losses = out / "proxies" / "halving.json", columns(halved, "losses")
    before = rule.stat().st_mtime_ns
    for number in range(1, 26, 2):
        (out / part_path(number)).unlink()
    again = trained(labelled, out, *HALVING)
    assert columns(again, "losses") == losses
    assert columns(again, "curves") == columns(halved, "curves")
    assert rule.stat().st_mtime_ns == before


def test_parameters_are_searched_on_the_losses_that_stopped_proxies_are_expected_to_have(
    labelled: Path, halved: Step, tmp_path: Path
) -> None:
    out = shutil.copytree(halved.root, tmp_path / "out")
    with open_run(load_recipe(labelled, list(HALVING)), out) as run:
        search(run)
        found = run.step("search").read_table("search/predictions.parquet").to_pylist()
        assert len(run.step("search").read_json("search/theta.json")["domains"]) == len(run.table.domains)
    losses = rows(halved)
    assert {(row["proxy"], row["task"], row["real"]) for row in found} == {
        (n, task, row[f"loss_{task}"]) for n, row in losses.items() for task in TASKS
    }
    assert len(losses) == 24


def test_another_objective_makes_proxies_stale_only_where_it_stops_them(
    labelled: Path, full: Step, halved: Step
) -> None:
    other = "search.objective={mmlu: 1.0}"
    with open_run(load_recipe(labelled, [other, "proxy.per_gpu=3"]), full.root) as run:
        assert run.step("proxies").is_done
    with (
        pytest.raises(RecipeError, match=r"step 'proxies'.*search\.objective"),
        open_run(load_recipe(labelled, [*HALVING, other]), halved.root),
    ):
        pass


@pytest.fixture
def faulty(labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trains in ``out`` with a stranger's trainer that goes wrong on some proxies; gives the step and its calls."""
    site, calls = tmp_path / "site", tmp_path / "calls"
    info = site / "faulty_trainer-1.0.dist-info"
    info.mkdir(parents=True)
    calls.mkdir()
    (site / "faulty_trainer.py").write_text(FAULTY, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-trainer\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[quadmix_plugin.trainers]\nfaulty = faulty_trainer:Faulty\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("QUADMIX_TEST_CALLS", str(calls))

    def train(full: Step, faults: dict[int, str], *settings: str, **options):
        sizes = [part(full, number)["selected_tokens"] for number in range(8)]
        assert len(set(sizes)) == 8
        given = {str(sizes[number]): fault for number, fault in faults.items()}
        overrides = [*FEW, "proxy.trainer=faulty", f"proxy.options.faults={json.dumps(given)}", *settings]
        step = trained(labelled, tmp_path / "out", *overrides, **options)
        return step, [(calls / str(size)).stat().st_size for size in sizes]

    yield train
    sys.modules.pop("faulty_trainer", None)


def test_what_goes_wrong_once_is_tried_again_and_what_goes_wrong_twice_left_out(faulty, full: Step) -> None:
    step, calls = faulty(full, {1: "diverge 1", 2: "raise 1", 3: "raise 99", 4: "diverge 99", 5: "input 99"})
    assert calls == [2, 2, 2, 2, 2, 1, 1, 1]  # proxy 0 has a repeat, of another seed
    attempts = [part(step, number)["attempts"] for number in range(9)]
    assert attempts == [1, 2, 2, 2, 2, 1, 1, 1, 1]
    reference, found = rows(full), rows(step)
    assert sorted(found) == [0, 1, 2, 6, 7]
    assert all(measured(found[n]) == measured(reference[n]) for n in found)
    assert set(step.read_table("proxies/curves.parquet")["proxy"].to_pylist()) == {0, 1, 2, 6, 7, 8}
    summary = step.summary()
    assert sorted(summary["failures"]) == [part_path(n) for n in (3, 4, 5)]
    assert summary["failures"][part_path(3)] == "RuntimeError: no such luck"
    assert summary["failures"][part_path(4)].startswith("QuadmixError: training diverged at step")
    assert summary["failures"][part_path(5)] == "no such luck"
    assert "3 failed" in summary["headline"]
    assert step.read_json("proxies/fidelity.json")["retried"] == 2


def test_what_failed_is_tried_again_by_the_next_command_unless_it_lies_in_the_theta(faulty, full: Step) -> None:
    everything = dict.fromkeys(range(8), "raise 2") | {0: "raise 4", 6: "input 99"}  # proxy 0 has a repeat
    with pytest.raises(QuadmixError, match=r"none of 9 models could be trained; the first: RuntimeError: no such luck"):
        faulty(full, everything)
    step, calls = faulty(full, everything)
    assert calls == [6, 3, 3, 3, 3, 3, 1, 3]
    reference, found = rows(full), rows(step)
    assert sorted(found) == [0, 1, 2, 3, 4, 5, 7]
    assert all(measured(found[n]) == measured(reference[n]) for n in found)
    assert step.summary()["failures"] == {part_path(6): "no such luck"}


def test_a_pilot_proxy_that_fails_keeps_its_reason_and_the_others_give_the_rule(faulty, full: Step) -> None:
    halving = ("proxy.number=12", "proxy.fidelity=successive_halving", "proxy.pilot=9", "proxy.curve_at=[0.6, 0.9]")
    step, calls = faulty(full, {3: "raise 99"}, *halving)
    assert calls[3] == part(step, 3)["attempts"] == 2
    assert step.summary()["failures"] == {part_path(3): "RuntimeError: no such luck"}
    assert step.read_json("proxies/halving.json")["pilots"] == 8


def test_a_proxy_that_kills_its_worker_costs_no_other(faulty, full: Step, dask_client, dask_executor) -> None:
    site, folder = sys.path[0], os.environ["QUADMIX_TEST_CALLS"]  # workers that come later inherit both
    dask_client.run(lambda: (sys.path.insert(0, site), os.environ.update(QUADMIX_TEST_CALLS=folder)))
    step, calls = faulty(full, {2: "kill 99", 5: "kill 1"}, make_executor=lambda: dask_executor)
    assert calls == [2, 1, 2, 1, 1, 2, 1, 1]
    assert [part(step, number)["attempts"] for number in range(9)] == [1, 1, 2, 1, 1, 2, 1, 1, 1]
    reference, found = rows(full), rows(step)
    assert sorted(found) == [0, 1, 3, 4, 5, 6, 7]
    assert all(measured(found[n]) == measured(reference[n]) for n in found)
    assert list(step.summary()["failures"]) == [part_path(2)]
    assert "worker process was lost 2 times" in step.summary()["failures"][part_path(2)]


def test_what_an_interrupted_session_had_begun_is_no_attempt(faulty, full: Step) -> None:
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            faulty(full, {1: "interrupt 3"})
    step, calls = faulty(full, {1: "interrupt 3"})
    assert calls[1] == 4
    assert part(step, 1)["attempts"] == 1
    assert measured(rows(step)[1]) == measured(rows(full)[1])


@pytest.mark.parametrize("budget", [False, True])
def test_epochs_are_those_of_the_final_run(labelled: Path, full: Step, tmp_path: Path, budget: bool) -> None:
    final, target = 3 * TOKENS, None
    overrides = [*FEW, "proxy.match_epochs=true", f"pretrain.tokens={final}"]
    if budget:  # which half of the proxies reach only if they keep everything
        target = int(np.median([part(full, number)["selected_tokens"] for number in range(8)])) * final // TOKENS
        overrides.append(f"select.target_tokens={target}")
    else:  # documents drawn by ε alone: a u that left out others too would leave out none
        overrides += ["space.omega_max=1.0e-9", "space.epsilon_max=0.9"]
    step = trained(labelled, tmp_path / "out", *overrides)
    vectors = step.read_table("proxies/thetas.parquet")["theta"].to_pylist()
    with open_run(load_recipe(labelled, overrides), tmp_path / "out") as run:
        table, normalised, seed = run.table, run.normalised, run.recipe.seed
    shares = set()
    for number in range(8):
        theta = Parameters.from_vector(vectors[number], 2, table.domains, table.scorers)
        drawn = count_copies(normalised, table.domain_ids, table.tokens, table.doc_ids, theta, seed)
        selected, ends = int((drawn * table.tokens).sum()), int(drawn.sum())
        share = min(1.0, TOKENS / (final / (target or selected)) / selected)
        found = part(step, number)
        tokens = (drawn * (table.tokens + 1)).astype(float)
        luck = 4.5 * np.sqrt(share * (1 - share) * (tokens**2).sum())
        assert abs(found["selected_tokens"] - share * (selected + ends)) <= luck
        assert found["epochs"] == found["tokens_seen"] / found["selected_tokens"]
        if share == 1.0:
            assert measured(rows(step)[number]) == measured(rows(full)[number])
        shares.add(share < 1)
    assert shares == ({True, False} if budget else {True})


def test_matched_epochs_need_the_whole_pool(labelled: Path) -> None:
    with pytest.raises(RecipeError, match=r"match_epochs needs all documents.*set pool: whole"):
        load_recipe(labelled, ["proxy.match_epochs=true", "proxy.pool=thinned"])


def nothing_trained(out: Path) -> bool:
    return not (out / "proxies" / "parts").exists()


def test_a_pool_smaller_than_a_batch_is_refused_before_training(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the pool has [0-9,]+ tokens, a batch 320,000; .*lower batch_size"):
        trained(labelled, tmp_path / "out", "proxy.options.batch_size=10000")
    assert nothing_trained(tmp_path / "out")


@pytest.mark.parametrize(("content", "reason"), [("", "none.jsonl: empty file"), ("\n\n", "validation: no rows")])
def test_no_validation_rows_are_refused_before_training(
    labelled: Path, tmp_path: Path, content: str, reason: str
) -> None:
    (labelled.parent / "none.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=reason):
        trained(labelled, tmp_path / "out", "validation.path=none.jsonl")
    assert nothing_trained(tmp_path / "out")


def test_a_pool_of_another_tokenizer_is_refused_and_a_truncated_one_written_anew(
    labelled: Path, full: Step, tmp_path: Path
) -> None:
    out = shutil.copytree(labelled.parent / "out", tmp_path / "out")
    with open_run(load_recipe(labelled, list(FEW)), out) as run:
        write_pool(run, run.step("proxies"))
        prefix = Path(pool_prefixes(run)[1])
    pair, file = (prefix.with_suffix(".bin"), prefix.with_suffix(".idx")), TokenFile.open(prefix)
    whole = pair[0].read_bytes()
    documents = [file.document(i).astype(np.int64) + 4_000 for i in range(file.n_documents)]
    write_documents(documents, *pair, 60_000)
    with pytest.raises(InputError, match=rf"{prefix.name}\.bin: an id of [0-9]+, the vocabulary has 4096"):
        trained(labelled, out, *FEW)
    assert nothing_trained(out)
    pair[0].write_bytes(whole[:-2])
    assert columns(trained(labelled, out, *FEW), "losses")[0] == columns(full, "losses")[0]
    assert pair[0].read_bytes() == whole


def test_a_shard_of_one_short_document_is_no_fault_of_the_pool(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    corpus = pq.read_table(tmp_path / "corpus.parquet").slice(0, 101)
    texts = [*corpus["text"].to_pylist()[:-1], "Hi."]
    pq.write_table(corpus.set_column(corpus.column_names.index("text"), "text", [texts]), tmp_path / "corpus.parquet")
    with open_run(load_recipe(path, list(FEW)), tmp_path / "out") as run:
        run_steps(run, steps_until("label"))
        proxies(run)
        assert [TokenFile.open(prefix).n_documents for prefix in pool_prefixes(run)] == [100, 1]


def test_repeats_have_the_documents_of_their_theta_under_independent_draws(labelled: Path, tmp_path: Path) -> None:
    step = trained(labelled, tmp_path / "out", "proxy.number=8", "proxy.repeated=4", "proxy.draws=independent")
    for i, again in enumerate(part(step, 8 + theta) for theta in range(4)):
        drawn = part(step, i)
        assert (again["domain_tokens"], again["unique_tokens"]) == (drawn["domain_tokens"], drawn["unique_tokens"])
        assert again["losses"] != drawn["losses"]


@pytest.mark.slow
def test_killed_at_random_times_it_ends_with_the_same_losses(tmp_path: Path) -> None:
    """SIGKILL for the command alone, on one process and on Dask in turn: workers must end by themselves."""
    path = write_recipe(tmp_path)
    command = [sys.executable, "-m", "quadmix_plugin.cli", "run", str(path), "--until", "proxies", "--json"]
    command += ["--set", "proxy.number=48", "--set", "proxy.tokens=12000", "--set", "executor.workers=2"]
    started = time.monotonic()
    subprocess.run([*command, "--out", str(tmp_path / "whole"), "--executor", "inline"], check=True, timeout=900)
    whole = time.monotonic() - started
    hits, out = 0, tmp_path / "out"
    for i, share in enumerate(np.random.default_rng(7).uniform(0.05, 0.2, 20)):
        executor = ("inline", "dask")[i % 2]
        with subprocess.Popen(
            [*command, "--out", str(out), "--executor", executor], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            try:
                errors = process.communicate(timeout=float(share) * whole * (1 + i % 2))[
                    1
                ]  # workers take time to start
                assert process.returncode == 0, errors
                break
            except subprocess.TimeoutExpired:
                process.kill()
                hits += 1
    logger.info("%d kills in the middle of a run of %.0f s", hits, whole)
    assert hits >= 10
    subprocess.run([*command, "--out", str(out), "--executor", "inline"], check=True, timeout=900)
    steps = [
        Run(load_recipe(out / "recipe.yaml"), RunDirectory(each), InlineExecutor).step("proxies")
        for each in (tmp_path / "whole", out)
    ]
    for name in ("losses", "curves"):
        assert columns(steps[1], name) == columns(steps[0], name)
    assert RunDirectory(out).verify()[1] == []
    assert [each for each in out.rglob("*") if each.name.endswith(".tmp") or each.name == ".attempts"] == []
