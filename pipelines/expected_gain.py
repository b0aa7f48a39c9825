"""What is to be expected of θ* before anything is trained on it: gain and overlap against Random and each top-k."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError
from quadmix_plugin.labelled_corpus import select_in_memory
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.proxy_trust import baseline_losses
from quadmix_plugin.pipelines.proxy_work import baseline_selectors
from quadmix_plugin.proxy.parts import DRAW, LOSS_PREFIX, REPEAT
from quadmix_plugin.sampling import count_copies
from quadmix_plugin.search.evaluation import CrossValidation, noise
from quadmix_plugin.search.gain import Prediction, gain_over, jaccard, verdict
from quadmix_plugin.search.objective import Objective
from quadmix_plugin.search.proposals import Candidate, Proposal


def expected_gain(
    run: Run, proposal: Proposal, judged: Mapping[str, CrossValidation], theta: Parameters
) -> dict[str, Any]:
    """Rows of rivals with measured loss, predicted gain of θ* and overlap; and the sentence that sums them up.

    ``loss`` is that of the one task that counts, in nats per token, or the objective of several (``unit``).
    """
    objective = proposal.objective
    prediction, noise_sd = prediction_of(proposal.best, judged, objective), _noise(run, objective)
    overlap = _overlaps(run, theta)
    measured = baseline_losses(run)
    rivals = {name: objective.measure(losses) for name, losses in measured.items()}
    failed = [name for name in baseline_selectors(run.scorers) if name not in measured and run.recipe.proxy.baselines]
    gains = [gain_over(name, losses, prediction, noise_sd, overlap.get(name)) for name, losses in rivals.items()]
    evidence, sentence = verdict(gains, failed)
    if run.recipe.select.target_tokens and not run.recipe.search.at_budget:
        sentence += " This is at the size that θ* has of its own; select.target_tokens scales it afterwards."
    best = float(objective.measure(proposal.best_proxy.losses))
    return {
        "verdict": sentence,
        "evidence": evidence,
        "noise_sd": noise_sd,
        "predicted": prediction.to_dict(),
        "best_proxy": gain_over("best observed proxy", [best], prediction, noise_sd).to_dict(),
        "rows": [each.to_dict() for each in gains],
        "overlap": overlap,
        "losses": {name: {t: float(y.mean()) for t, y in each.items()} for name, each in measured.items()},
        "unit": objective.unit,
    }


def prediction_of(candidate: Candidate, judged: Mapping[str, CrossValidation], objective: Objective) -> Prediction:
    """What the objective measures of a candidate, with its interval: cross-validated error, and its own uncertainty."""
    tasks = objective.tasks
    predicted = objective.measure({task: judged[task].predicted for task in tasks})
    errors = predicted - objective.measure({task: judged[task].real for task in tasks})
    sd = sum(objective.weights[task] * candidate.sd.get(task, 0.0) / objective.sd[task] for task in tasks)
    return Prediction(
        loss=float(objective.measure(candidate.losses)),
        error=float(np.sqrt(np.mean(errors**2))),
        sd=float(sd * objective.scale),
        checked=float(predicted.mean(axis=0).min()),
    )


def _noise(run: Run, objective: Objective) -> float | None:
    """Standard deviation over seeds of what the objective measures; None where no θ has two."""
    step = run.step("proxies")
    thetas = step.read_table("proxies/thetas.parquet")
    table = step.read_table("proxies/losses.parquet")
    theta_of = dict(zip(thetas["proxy"].to_pylist(), map(str, thetas["theta"].to_pylist()), strict=True))
    names = [name for name in table.column_names if name.startswith(LOSS_PREFIX)]
    values = objective.measure({name.removeprefix(LOSS_PREFIX): table[name].to_numpy() for name in names})
    kinds = np.array(table["kind"].to_pylist())
    which = np.array([theta_of[number] for number in table["proxy"].to_pylist()])
    trained = np.isin(kinds, (DRAW, REPEAT)) & (np.array(table["share"].to_pylist()) == 1.0)
    groups = [values[trained & (which == theta)] for theta in sorted(set(which[kinds == REPEAT]))]
    if not any(group.size > 1 for group in groups):
        return None
    return noise(groups, values[kinds == DRAW]).noise_sd or None


def _overlaps(run: Run, theta: Parameters) -> dict[str, float]:
    """Token-weighted Jaccard of θ's selection with each baseline at the same unique tokens."""
    table, rank = run.table, run.recipe.rank
    copies = count_copies(
        run.normalised, table.domain_ids, table.tokens, table.doc_ids, theta, run.recipe.seed, rank.method, rank.ties,
        rank.bins, rank.subset_documents, rank.subset_per_domain,
    )  # fmt: skip
    budget = int(table.tokens[copies > 0].sum())
    if not budget:
        raise InputError(
            "search: θ* selects no document; widen space.omega_max, set rank.ties: mid, or merge small domains"
        )
    return {name: jaccard(table.tokens, copies, each) for name, each in _baselines(run, budget).items()}


def _baselines(run: Run, budget: int) -> dict[str, NDArray[Any]]:
    chosen = {}
    for name, (plugin, options) in baseline_selectors(run.scorers).items():
        selector = registry.create("selectors", plugin, options, f"baseline {name}")
        seed = run.seed_for(f"baseline {name}")
        chosen[name] = select_in_memory(selector, run.table, run.normalised, budget, seed)
    return chosen
