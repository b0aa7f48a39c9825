"""Step 9: report.html over whatever the run directory holds; it makes nothing that is not already there."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from quadmix_plugin.parameters import Parameters
from quadmix_plugin.pipelines.compare import CURVES, RESULTS, TABLE, losses_of, weights_of
from quadmix_plugin.pipelines.context import STEPS, Run
from quadmix_plugin.pipelines.evaluate import read_summary
from quadmix_plugin.pipelines.provenance import provenance
from quadmix_plugin.pipelines.search_figures import named_ways, search_drawings
from quadmix_plugin.pipelines.select import QUADMIX, selected_copies
from quadmix_plugin.rank_map import RankMap
from quadmix_plugin.report import (
    ReportData,
    ScoreHistogram,
    SearchOutcome,
    SelectorShares,
    StepRows,
    render,
)
from quadmix_plugin.search.gain import weighted
from quadmix_plugin.store import Step, content_key
from quadmix_plugin.verdict import OBJECTIVE, Verdict, judge

REPORT = "report.html"

_BINS = 40
_RANK_ERROR = 0.01
_ABLATION = "search-without-"


def report(run: Run) -> None:
    """Writes ``report.html``; steps that have not run are named in it."""
    done = {name for name in STEPS if name != "report" and run.step(name).is_done}
    data = ReportData(
        title=run.recipe.name,
        created_from={name: run.keys[name][:16] for name in STEPS if name in done},
        steps=_steps(run, done),
        domains=_domains(run, done) if "normalise" in done else None,
        scores=_scores(run, done) if "normalise" in done else None,
        theta=_theta(run, done),
        provenance={key: value for key, value in provenance(run).items() if key != "steps"},
        warnings=_warnings(run, done),
        evaluation=read_summary(run) if "evaluate" in done else None,
        **_search(run, done),
        **_models(run, done),
    )
    page = render(data)
    run.directory.write_text(REPORT, page)


def verdict(run: Run) -> Verdict | None:
    """What the comparison shows, in words; None while ``compare`` or ``search`` has not run."""
    if not (run.step("compare").is_done and run.step("search").is_done):
        return None
    weights, judged = weights_of(run), {}
    for selector, losses in losses_of(run.step("compare").read_table(RESULTS)).items():
        objective = weighted({task: np.asarray(each) for task, each in losses.items()}, weights)
        judged[selector] = {OBJECTIVE: objective.tolist(), **losses}
    return judge(judged, QUADMIX)


def _steps(run: Run, done: set[str]) -> list[StepRows]:
    rows = []
    for name in STEPS:
        facts = run.step(name).summary() if name in done else None
        if facts is not None:
            rows_in = run.table.n if name not in ("label", "normalise") else facts["rows_in"]
            rows_in = facts.get("rows_in", rows_in)
            dropped, seconds = facts.get("dropped", {}), facts.get("seconds")
            kept = facts.get("rows_kept", rows_in)
            rows.append(StepRows(name, rows_in, kept, dropped, seconds, facts.get("headline", "")))
    return rows


def _domains(run: Run, done: set[str]) -> pa.Table:
    table, m = run.table, len(run.table.domains)
    ids = table.domain_ids
    columns: dict[str, Any] = {
        "domain": list(table.domains),
        "documents_before": np.bincount(ids, minlength=m),
        "tokens_before": table.domain_tokens,
    }
    if "select" in done:
        copies = selected_copies(run)
        taken = copies > 0
        columns["documents_after"] = np.bincount(ids[taken], minlength=m)
        columns["tokens_after"] = np.bincount(ids, weights=table.tokens * copies, minlength=m).astype(np.int64)
        columns["unique_tokens_after"] = np.bincount(ids[taken], weights=table.tokens[taken], minlength=m).astype(
            np.int64
        )
    return pa.table(columns)


def _scores(run: Run, done: set[str]) -> list[ScoreHistogram]:
    table = run.table
    after = table.tokens * selected_copies(run) if "select" in done else None
    histograms = []
    for n, scorer in enumerate(table.scorers):
        for kind, values in (("raw", table.scores[:, n]), ("normalised", run.normalised[:, n])):
            before, edges = np.histogram(values, bins=_BINS, weights=table.tokens)
            chosen = None if after is None else np.histogram(values, bins=edges, weights=after)[0].astype(float)
            histograms.append(ScoreHistogram(scorer, kind, edges.astype(float), before.astype(float), chosen))
    return histograms


def _theta(run: Run, done: set[str]) -> Parameters | None:
    if "select" in done:
        return Parameters.from_dict(run.step("select").read_json("selection/theta.json"))
    if "search" in done:
        return Parameters.from_dict(run.step("search").read_json("search/theta.json"))
    return None


def _trust(step: Step) -> dict[str, dict[str, Any]]:
    """Noise per task, and in words how early the ranks of the proxies hold."""
    noise, fidelity = step.read_json("proxies/noise.json"), step.read_json("proxies/fidelity.json")
    said = {
        task: ", ".join(f"{value:.2f} at {float(share):.0%}" for share, value in by_share.items() if value is not None)
        for task, by_share in fidelity["agreement"].items()
    }
    return {task: {**noise.get(task, {}), "agreement": said.get(task)} for task in {**noise, **said}}


def _search(run: Run, done: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "proxies" in done:
        found["noise"] = _trust(run.step("proxies"))
    if "search" not in done:
        return found
    step = run.step("search")
    metrics = step.read_json("search/metrics.json")
    optimum = metrics["optimum"]
    weights = {task: weight for task, weight in optimum["objective_of"]["weights"].items() if weight > 0}
    best = optimum["best_proxy"]
    gain = metrics["gain"]
    facts = {
        "regressor": _regressor(run, metrics["chosen"]),
        "features": run.recipe.search.features,
        "method": next(iter(named_ways(optimum))).removesuffix(" (θ*)"),
        "draws predicted": optimum["draws"],
        "draws averaged": len(optimum["top"]),
    }
    if metrics["excluded_scorers"]:
        facts["scorers excluded"] = ", ".join(metrics["excluded_scorers"])
    return {
        **found,
        "predictions": step.read_table("search/predictions.parquet"),
        "metrics": {
            **metrics["targets"],
            "objective": {**metrics["objective"], "mae": metrics["objective"]["mae"] * _scale(optimum)},
        },
        "search": SearchOutcome(
            weights, gain["predicted"]["loss"], best["measure"], best["number"], facts, optimum["unit"]
        ),
        "drawings": list(search_drawings(step).values()),
        "methods": _methods(optimum),
        "ablations": ablations(run),
        "gate": gain,
    }


def ablations(run: Run) -> list[dict[str, Any]]:
    """A row for every finished search without some scorers that is of this recipe, as ``ReportData`` has them."""
    rows = []
    for name in filter(lambda name: name.startswith(_ABLATION), run.directory.step_names()):
        for key in sorted(run.directory.recorded_keys(name)):
            step = run.directory.step(name, key)
            metrics = step.read_json(f"search/{name.removeprefix('search-')}/metrics.json") if step.is_done else {}
            # A folder's name may be cut, so which scorers were left out is read; the key then says of which recipe.
            excluded = metrics.get("excluded_scorers", [])
            if key != content_key("ablation", excluded, run.keys["search"]):
                continue
            gain = metrics["gain"]
            loss, low, high = (gain["predicted"][end] for end in ("loss", "low", "high"))
            row = {"excluded": ", ".join(excluded), "predicted": loss, "low": low, "high": high}
            rows.append({**row, "verdict": gain["verdict"]})
    return rows


def _regressor(run: Run, chosen: dict[str, str]) -> str:
    """The recipe's regressor, and which ones ``auto`` chose for how many tasks."""
    name, each = run.recipe.search.regressor, Counter(chosen.values())
    return f"{name} ({', '.join(f'{model} for {n} tasks' for model, n in each.items())})" if each else name


def _scale(optimum: dict[str, Any]) -> float:
    """One standard deviation of the objective in its unit: of one task in nats, of several they are the unit."""
    counting = [task for task, weight in optimum["objective_of"]["weights"].items() if weight > 0]
    return optimum["objective_of"]["sd"][counting[0]] if len(counting) == 1 else 1.0


def _methods(optimum: dict[str, Any]) -> list[dict[str, Any]]:
    """Every way to θ with its predicted loss and interval; what was measured of the best proxy."""
    rows = []
    for name, way in named_ways(optimum).items():
        interval = way["interval"]
        rows.append({"name": name, "predicted": interval["loss"], "low": interval["low"], "high": interval["high"]})
    best, seen = optimum["best_proxy"], optimum["best_proxy_predicted"]
    return [
        *rows,
        {"name": f"best observed proxy ({best['number']})", "real": best["measure"], "predicted": seen["measure"]},
    ]


def _models(run: Run, done: set[str]) -> dict[str, Any]:
    if "compare" in done:
        step = run.step("compare")
        content = step.read_json(f"{TABLE}.json")
        shares = {name: facts["domain_tokens"] for name, facts in content["facts"].items()}
        overlap = content["overlap"]
        return {
            "selections": [
                SelectorShares(name, each, None if name == QUADMIX else overlap[name][QUADMIX])
                for name, each in shares.items()
            ],
            "comparison": content["rows"],
            "benchmarks": content["benchmarks"],
            "overlap": overlap,
            "results": step.read_table(RESULTS),
            "curves": step.read_table(CURVES),
        }
    found: dict[str, Any] = {}
    if "select" in done:
        facts = run.step("select").read_json("selection/summary.json")["selection"]
        found["selections"] = [SelectorShares(QUADMIX, facts["domain_tokens"])]
    if "pretrain" in done:
        found["results"] = run.step("pretrain").read_table("pretrain/results.parquet")
        found["curves"] = run.step("pretrain").read_table("pretrain/curves.parquet")
    return found


def _warnings(run: Run, done: set[str]) -> list[str]:
    warnings = []
    if "select" in done and (stuck := domains_out_of_reach(run)):
        warnings.append(
            f"{len(stuck)} domains select almost nothing: the best document alone exceeds ω under the paper's rule "
            f"({', '.join(stuck)}). Set rank.merge_small_domains, or rank.ties: mid."
        )
    for name in ("label", "normalise"):
        dropped = (run.step(name).summary() or {}).get("dropped", {}) if name in done else {}
        warnings += [f"{n:,} documents dropped: {reason}." for reason, n in dropped.items()]
    if "select" in done:
        warnings += _rank_warnings(run)
    if "proxies" in done:
        warnings += _proxy_warnings(run.step("proxies"))
    if "search" in done:
        gated = run.step("search").read_json("search/metrics.json")["gated_out"]
        warnings += [
            f"{task} has no weight in the objective: its signal to noise over the proxies is {ratio:.1f}, below "
            f"search.min_signal_to_noise {run.recipe.search.min_signal_to_noise:g}."
            for task, ratio in gated.items()
        ]
    return warnings


def domains_out_of_reach(run: Run) -> list[str]:
    """Domains whose best tie group alone has a rank above their ω, so that only ε is left of Eq. 3."""
    step = run.step("select")
    theta = Parameters.from_dict(step.read_json("selection/theta.json"))
    ranks = RankMap.from_table(step.read_table("selection/rank_map.parquet"))
    present, first = np.unique(ranks.domain_ids, return_index=True)
    hashes = ranks.tie[first] if ranks.tie.size else np.zeros(first.size, dtype=np.uint64)
    best = ranks.rank(ranks.cells["lowest"][first], present, hashes)
    return [theta.domains[m] for m, rank in zip(present, best, strict=True) if rank > theta.omega[m]]


def _proxy_warnings(step: Step) -> list[str]:
    failures, fidelity = (step.summary() or {}).get("failures", {}), step.read_json("proxies/fidelity.json")
    warnings = []
    if failures:
        warnings.append(
            f"{len(failures)} proxies could not be trained and are left out of the fit; the first: "
            f"{next(iter(failures.values()))}."
        )
    if fidelity["not_learnt"]:
        warnings.append(
            f"{fidelity['not_learnt']} proxies ended with a training loss above the entropy of single tokens: they "
            f"learnt nothing from context, so their losses say little; check the learning rate, and the data."
        )
    if stopped := sum(fidelity["stopped"].values()):
        warnings.append(
            f"{stopped} of {stopped + fidelity['proxies_in_full']} proxies were stopped early, which left "
            f"{fidelity['trained_share']:.0%} of the training; their final losses are forecasts."
        )
    return warnings


def _rank_warnings(run: Run) -> list[str]:
    """What the method of the ranks is expected to cost, where that is more than a percent of the selected tokens."""
    facts = run.step("select").read_json("selection/summary.json")["expected"]
    if facts["rank_error"] <= _RANK_ERROR:
        return []
    return [
        f"Ranks by rank.method: {facts['rank_method']} are expected to be off by {facts['rank_error']:.1%} of each "
        f"domain's selected tokens; rank.method: exact has no such error."
    ]
