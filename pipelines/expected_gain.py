"""What is to be expected of θ* before anything is trained on it: gain and overlap against Random and each top-k."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.proxy_trust import baseline_losses
from quadmix_plugin.pipelines.proxy_work import baseline_selectors
from quadmix_plugin.proxy.parts import DRAW, LOSS_PREFIX, REPEAT
from quadmix_plugin.sampling import count_copies
from quadmix_plugin.search.evaluation import CrossValidation, noise
from quadmix_plugin.search.gain import Prediction, gain_over, jaccard, verdict, weighted
from quadmix_plugin.search.objective import Objective
from quadmix_plugin.search.proposals import Candidate, Proposal


def expected_gain(
    run: Run, proposal: Proposal, judged: Mapping[str, CrossValidation], theta: Parameters
) -> dict[str, Any]:
    """Rows of rivals with measured loss, predicted gain of θ* and overlap; and the sentence that sums them up.

    Losses are means over the tasks that count, weighted, in nats per token.
    """
    weights = proposal.objective.weights
    prediction, noise_sd = prediction_of(proposal.best, judged, proposal.objective), _noise(run, weights)
    overlap = _overlaps(run, theta)
    measured = baseline_losses(run)
    rivals = {name: weighted(losses, weights) for name, losses in measured.items()}
    gains = [gain_over(name, losses, prediction, noise_sd, overlap.get(name)) for name, losses in rivals.items()]
    evidence, sentence = verdict(gains)
    best = float(weighted(proposal.best_proxy.losses, weights))
    return {
        "verdict": sentence,
        "evidence": evidence,
        "noise_sd": noise_sd,
        "predicted": prediction.to_dict(),
        "best_proxy": gain_over("best observed proxy", [best], prediction, noise_sd).to_dict(),
        "rows": [each.to_dict() for each in gains],
        "overlap": overlap,
        "losses": {name: {t: float(y.mean()) for t, y in each.items()} for name, each in measured.items()},
        "unit": "nats per token",
    }


def prediction_of(candidate: Candidate, judged: Mapping[str, CrossValidation], objective: Objective) -> Prediction:
    """The weighted loss of a candidate with its interval, from cross-validated errors and its own uncertainty."""
    weights = {task: objective.weights[task] for task in objective.tasks}
    predicted = weighted({task: judged[task].predicted for task in weights}, weights)
    errors = predicted - weighted({task: judged[task].real for task in weights}, weights)
    return Prediction(
        loss=float(weighted(candidate.losses, weights)),
        error=float(np.sqrt(np.mean(errors**2))),
        sd=float(weighted({task: candidate.sd.get(task, 0.0) for task in weights}, weights)),
        checked=float(predicted.mean(axis=0).min()),
    )


def _noise(run: Run, weights: Mapping[str, float]) -> float | None:
    """Standard deviation over seeds of the weighted loss; None where no θ has two."""
    step = run.step("proxies")
    thetas = step.read_table("proxies/thetas.parquet")
    table = step.read_table("proxies/losses.parquet")
    theta_of = dict(zip(thetas["proxy"].to_pylist(), map(str, thetas["theta"].to_pylist()), strict=True))
    names = [name for name in table.column_names if name.startswith(LOSS_PREFIX)]
    values = weighted({name.removeprefix(LOSS_PREFIX): table[name].to_numpy() for name in names}, weights)
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
        run.normalised, table.domain_ids, table.tokens, table.doc_ids, theta, seed=run.recipe.seed, ties=rank.ties
    )
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
        chosen[name] = selector.select(run.table, run.normalised, budget, run.seed_for(f"baseline {name}"))
    return chosen
