"""The table of a comparison: what every selection is, what models trained on it lose, and which differences are noise.

Pure functions over numbers; ``pipelines.compare`` makes the numbers.
"""

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quadmix_plugin.search.gain import weighted
from quadmix_plugin.verdict import OBJECTIVE, compare

_SIGMAS = 3.0
_REFERENCE = "quadmix"  # θ*'s own selection

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Selected:
    """A selection and what models trained on it lose.

    ``facts``: plugin, budget_tokens, documents, copies, tokens, unique_tokens, epochs, domain_tokens; where copies are
    drawn also expected_tokens and sd_tokens. ``losses``: task → one per seed. ``overlap``: token-weighted Jaccard with
    the selection of θ*. ``scores``: benchmark → one per seed, higher is better but for those in ``lower``.
    """

    name: str
    facts: Mapping[str, Any]
    losses: Mapping[str, Sequence[float]]
    overlap: float
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    lower: Collection[str] = ()


def comparison_rows(
    selected: Sequence[Selected], weights: Mapping[str, float], trained_tokens: int, largest: int
) -> Rows:
    """One row per selection: sizes, and of the objective and every task mean, sd, and how it stands to the best.

    ``weights`` of the tasks in the objective, the weighted mean loss; empty: all equally. ``trained_tokens`` of each
    model; ``largest``: tokens of the longest document. A measure's standing is "best", "near-tie", "unclear" or
    "worse", as ``verdict.compare`` judges it against the best; "unknown" without two seeds. Benchmarks come after the
    losses, likewise judged, the highest as the best, or the lowest of bits and perplexity.
    """
    measures = {each.name: _measures(each.losses, weights) | dict(each.scores) for each in selected}
    tasks = list(dict.fromkeys(task for each in selected for task in measures[each.name]))
    higher = {task for each in selected for task in each.scores if task not in each.lower}
    signs = {task: -1.0 if task in higher else 1.0 for task in tasks}
    best = {t: min(selected, key=lambda each: _by_mean(measures[each.name][t], signs[t])).name for t in tasks}
    rows = []
    for each in selected:
        facts = each.facts
        row: dict[str, Any] = {
            "selector": each.name,
            "method": facts["plugin"],
            "seeds": len(measures[each.name][OBJECTIVE]),
        }
        for task in tasks:
            losses, rivals = measures[each.name][task], measures[best[task]][task]
            found = compare(signs[task] * np.asarray(rivals), signs[task] * np.asarray(losses)).outcome
            standing = "best" if best[task] == each.name else found
            sd = float(np.std(losses, ddof=1)) if len(losses) > 1 else None
            row[task] = float(np.mean(losses))
            row[f"{task} sd"] = sd
            row[f"{task} standing"] = {"better": "worse"}.get(standing, standing)
        row |= {name: facts[name] for name in ("documents", "copies", "tokens", "unique_tokens")}
        row["copies per document"] = facts["epochs"]
        row["training epochs"] = trained_tokens / facts["tokens"]
        row["overlap with quadmix"] = each.overlap
        row["against quadmix"] = _against(measures.get(_REFERENCE, {}), measures[each.name])
        row["budget"] = facts.get("budget_tokens")
        row["budget met"] = budget_met(facts, largest)
        rows.append(row)
    return rows


def _against(reference: Mapping[str, Sequence[float]], own: Mapping[str, Sequence[float]]) -> str:
    """How the objective of a selection stands to that of θ*: "better", "near-tie", "unclear", "worse" or "unknown"."""
    if OBJECTIVE not in reference:
        return "unknown"
    return compare(own[OBJECTIVE], reference[OBJECTIVE]).outcome


def _measures(losses: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> dict[str, list[float]]:
    chosen = {task: weight for task, weight in weights.items() if weight > 0} or dict.fromkeys(losses, 1.0)
    mean = weighted({task: np.asarray(each, dtype=np.float64) for task, each in losses.items()}, chosen)
    return {OBJECTIVE: np.atleast_1d(mean).tolist(), **{task: list(each) for task, each in losses.items()}}


def _by_mean(values: Sequence[float], sign: float) -> tuple[bool, float]:
    """The place of a measure in an order, the best mean first; one that is no number is last."""
    mean = sign * float(np.mean(values))
    return np.isnan(mean), mean


def budget_met(facts: Mapping[str, Any], largest: int) -> str:
    """How near a selection comes to its budget, in words."""
    budget, tokens = facts.get("budget_tokens"), facts["tokens"]
    expected, sd = facts.get("expected_tokens"), facts.get("sd_tokens")
    if budget is None:
        return "sets the budget"
    off, documents = f"{tokens - budget:+,} tokens", abs(tokens - budget) / largest
    if expected is None and documents <= 1:
        return f"{off}, within one document"
    if expected is None and documents <= len(facts["domain_tokens"]):
        return f"{off}, within one document of each domain"
    if expected is None:
        return f"{off}: missed by {tokens / budget - 1:+.1%}"
    if sd is None or sd <= 0:
        return f"{off}; {expected - budget:+,.0f} in expectation"
    sigmas = abs(tokens - budget) / sd
    return f"{off}, {sigmas:.1f}σ of its draws" + ("" if sigmas <= _SIGMAS else f": beyond {_SIGMAS:g}σ")


def to_markdown(
    rows: Rows,
    facts: Mapping[str, Mapping[str, Any]],
    overlap: Mapping[str, Mapping[str, float]],
    benchmarks: Sequence[str] = (),
) -> str:
    """Losses, sizes, overlaps and domain shares as Markdown tables, the lowest objective first.

    ``benchmarks``: the measures that are scores, not losses.
    """
    ordered = sorted(rows, key=lambda row: (np.isnan(row[OBJECTIVE]), row[OBJECTIVE]))
    names = [row["selector"] for row in ordered]
    tasks = [name.removesuffix(" standing") for name in rows[0] if name.endswith(" standing")]
    titles = {task: task if task in benchmarks else f"{task} loss" for task in tasks}
    if same := [task for task in tasks[1:] if all(row[task] == row[OBJECTIVE] for row in rows)]:
        titles = {task: title for task, title in titles.items() if task != OBJECTIVE}
        titles[same[0]] += " (the objective)"
    losses = [
        [
            _code(row["selector"]), row["method"], *(_loss(row, task) for task in titles),
            "–" if row["selector"] == _REFERENCE else row["against quadmix"],
        ]
        for row in ordered
    ]  # fmt: skip
    sizes = [
        [
            _code(row["selector"]), f"{row['documents']:,}", f"{row['tokens']:,}", f"{row['unique_tokens']:,}",
            f"{row['copies per document']:.2f}", f"{row['training epochs']:.2f}", row["budget met"],
        ]
        for row in ordered
    ]  # fmt: skip
    overlaps = [[_code(a), *(f"{100 * overlap[a][b]:.0f}" for b in names)] for a in names]
    domains = list(facts[names[0]]["domain_tokens"])
    shares = [[domain, *(f"{100 * _share(facts[name], domain):.1f}" for name in names)] for domain in domains]
    return "\n\n".join(
        [
            _markdown(["selection", "method", *titles.values(), "against θ*"], losses),
            "Loss in nats per token, mean ± standard deviation over "
            f"{rows[0]['seeds']} seeds; lower is better"
            + ("; benchmarks by lm-evaluation-harness: higher is better, of bits lower. " if benchmarks else ". ")
            + "**Bold**: the best mean. ≈: a near-tie with it (less than one pooled standard deviation). "
            "?: not settled by these seeds. Others are worse, outside the noise. Against θ*: the "
            "objective, likewise held against that of `quadmix`.",
            _markdown(
                ["selection", "documents", "tokens", "unique tokens", "copies each", "training epochs", "budget"],
                sizes,
            ),
            "Overlap, percent: tokens of documents in both as a share of those in either.",
            _markdown(["selection", *map(_code, names)], overlaps),
            "Share of the selected tokens with copies, percent.",
            _markdown(["domain", *map(_code, names)], shares),
        ]
    ) + "\n"  # fmt: skip


def to_csv(rows: Rows, facts: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as CSV, with a column ``share <domain>`` for each domain."""
    full = [
        {**row, **{f"share {d}": _share(facts[row["selector"]], d) for d in facts[row["selector"]]["domain_tokens"]}}
        for row in rows
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(full[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(full)
    return text.getvalue()


def _share(facts: Mapping[str, Any], domain: str) -> float:
    return facts["domain_tokens"].get(domain, 0) / max(facts["tokens"], 1)


def _loss(row: Mapping[str, Any], task: str) -> str:
    sd, standing = row[f"{task} sd"], row[f"{task} standing"]
    text = f"{row[task]:.4f}" + (f" ± {sd:.4f}" if sd is not None else "")
    return {"best": f"**{text}**", "near-tie": f"{text} ≈", "unclear": f"{text} ?"}.get(standing, text)


def _code(name: str) -> str:
    return f"`{name}`"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
