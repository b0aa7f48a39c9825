"""Step 2: the token pool, parameters drawn or proposed, one proxy model for each, and the noise of their losses."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pyarrow as pa
from nemo_curator.pipeline import Pipeline
from numpy.typing import NDArray

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError
from quadmix_plugin.pipelines.context import Run, trainer_options
from quadmix_plugin.pipelines.lowest_loss import LowestLoss
from quadmix_plugin.pipelines.proxy_data import pool_prefixes, require_pool, write_pool, write_validation
from quadmix_plugin.pipelines.proxy_rounds import (
    keep_round,
    lowest_by_round,
    propose_round,
    require_first_round,
    round_name,
    token_constraint,
)
from quadmix_plugin.pipelines.proxy_trust import fidelity_report, final_part, halving_rule, noise_report
from quadmix_plugin.pipelines.proxy_work import first_round, with_work, without_baselines, write_baselines
from quadmix_plugin.proxy.attempts import Attempts
from quadmix_plugin.proxy.fidelity import HalvingRule
from quadmix_plugin.proxy.parts import DRAW, REPEAT, merge_parts, part_path, to_do
from quadmix_plugin.proxy.selection import Draws, MatchedEpochs, ProxyTable
from quadmix_plugin.proxy.training import tokens_per_batch
from quadmix_plugin.search.features import FeatureMap
from quadmix_plugin.stages import TrainProxies
from quadmix_plugin.stages.train_proxies import proxy_tasks
from quadmix_plugin.store import Step

THETAS, THINNING = "proxies/thetas.parquet", "proxies/thinning.json"
_SPARE = 1.05  # of the tokens of the smallest selection over those of a proxy, for the luck of the draw


def proxies(run: Run) -> None:
    """Writes ``proxies/losses.parquet``, ``curves.parquet`` and ``noise.json``; every proxy is kept as it ends.

    Raises:
        InputError: validation rows that cannot be used, too few θ for a fit between rounds, or no proxy that could be
            trained.
    """
    step = run.step("proxies")
    if step.is_done:
        return
    started = time.monotonic()
    run.require("normalise")
    token_constraint(run)  # an impossible budget is said before anything is trained
    require_first_round(run)
    vocabulary, _ = write_validation(run, step, "proxy", "proxies/validation.parquet")
    first = first_round(run)
    if run.recipe.search.rounds:
        keep_round(step, 0, lambda: first)
    else:
        _keep(step, THETAS, first)
    selected_tokens = _expected_tokens(run, first)
    draws = _draws(run, step, selected_tokens)
    write_pool(run, step, draws.below)
    _keep(step, "proxies/table.parquet", ProxyTable.of(run.table, run.normalised).to_arrow())
    train = _trainer(run, step, draws, vocabulary)
    train = replace(train, baselines=write_baselines(run, step, selected_tokens))
    work, rule = _train_all(run, step, train, first)
    _keep(step, THETAS, work)
    _finish(run, step, work, rule, started)


def _keep(step: Step, path: str, table: pa.Table) -> None:
    if step.entry(path) is None:
        step.write_table(path, table)


def _trainer(run: Run, step: Step, draws: Draws, vocabulary: int) -> TrainProxies:
    """The stage over what is written already.

    Raises:
        InputError: a pool that cannot be trained on, or a repetition that leaves less than a batch.
    """
    recipe, pool = run.recipe, pool_prefixes(run)
    require_pool(run, pool, vocabulary)
    return TrainProxies(
        step=step,
        table=str(step.read_path("proxies/table.parquet")),
        pool=pool,
        validation=str(step.read_path("proxies/validation.parquet")),
        tokens=recipe.proxy.tokens,
        vocabulary=vocabulary,
        trainer=recipe.proxy.trainer,
        options=trainer_options(run, recipe.proxy.trainer, recipe.proxy.options),
        draws=draws,
        matched=_matched(run),
        weights_seed=recipe.seed,
        eval_at=tuple(recipe.proxy.curve_at),
        per_gpu=recipe.proxy.per_gpu,
    )


def _train_all(run: Run, step: Step, train: TrainProxies, work: pa.Table) -> tuple[pa.Table, HalvingRule | None]:
    """Trains what is not there yet, round after round; returns the work of all rounds, and the rule of halving.

    Under successive halving the pilot and the repeats come first.
    """
    attempts, settings, rounds = Attempts(step.root, train.session), run.recipe.proxy, run.recipe.search.rounds
    attempts.clear()
    rule = None
    if settings.fidelity == "successive_halving":
        numbers = np.array(work["proxy"].to_pylist())
        first = (np.array(work["kind"].to_pylist()) == REPEAT) | (numbers < settings.pilots)
        _train(run, step, train, work.filter(pa.array(first)))
        rule = halving_rule(run, step, numbers[: settings.pilots].tolist())
        train = replace(train, halving=rule.to_dict() if rule else None)
    _train(run, step, train, work, round_name(rounds, 0))
    for number in range(1, len(rounds)):
        proposed = keep_round(step, number, lambda n=number, done=work: propose_round(run, step, n, done))
        work = pa.concat_tables([work, proposed]).sort_by("proxy")
        _train(run, step, train, work, round_name(rounds, number))
    attempts.clear()
    return work, rule


def _train(run: Run, step: Step, train: TrainProxies, work: pa.Table, name: str = "") -> None:
    numbers = work["proxy"].to_pylist()
    todo = work.filter(pa.array([to_do(step, part_path(n), train.session) for n in numbers]))
    if todo.num_rows:
        best = LowestLoss(run, step, without_baselines(work)["proxy"].to_pylist(), name)
        with run.workers(_workers(run, train)), run.watched_by(best) as executor:
            Pipeline("proxies", stages=[train]).run(executor, initial_tasks=list(proxy_tasks(todo)))


def _workers(run: Run, train: TrainProxies) -> int | None:
    """Worker processes of a local cluster: as many as share a GPU, or as have cores; None where the default serves."""
    if train.resources.gpus:
        return run.recipe.proxy.per_gpu if run.recipe.proxy.per_gpu > 1 else None
    from dask.system import CPU_COUNT  # those that this process may use

    return max(CPU_COUNT // int(train.resources.cpus), 1) if train.resources.cpus > 1 else None


def _matched(run: Run) -> MatchedEpochs | None:
    recipe = run.recipe
    if not recipe.proxy.match_epochs:
        return None
    most_copies = 2**recipe.space.eta_max + recipe.space.epsilon_max
    selected = recipe.select.target_tokens or int(run.table.tokens.sum() * most_copies)
    most = recipe.proxy.tokens * selected / recipe.pretrain.tokens
    batch = tokens_per_batch(registry.create("trainers", recipe.proxy.trainer, recipe.proxy.options, "proxy.options"))
    if most < batch:
        raise InputError(
            f"proxy.match_epochs: a proxy of {recipe.proxy.tokens:,} tokens at the repetition of a final run of "
            f"{recipe.pretrain.tokens:,} keeps {most:,.0f} tokens at most, fewer than a batch of {batch:,}; raise "
            f"proxy.tokens, lower pretrain.tokens, or leave match_epochs out"
        )
    return MatchedEpochs(
        recipe.proxy.tokens, recipe.pretrain.tokens, recipe.select.target_tokens, run.seed_for("matched epochs")
    )


def _expected_tokens(run: Run, work: pa.Table) -> Callable[[], NDArray[np.float64]]:
    """What each drawn θ is expected to select [n1]; computed when first asked for, as it reads the whole corpus."""
    vectors = work.filter(pa.array(np.array(work["kind"].to_pylist()) == DRAW))["theta"].to_pylist()
    return cache(lambda: FeatureMap.of(run.table, run.normalised).statistics(np.array(vectors)).selected_tokens)


def _draws(run: Run, step: Step, selected_tokens: Callable[[], NDArray[np.float64]]) -> Draws:
    """How documents are drawn; under ``pool: thinned``, the factor on every S and the share of documents it leaves."""
    proxy, rank = run.recipe.proxy, run.recipe.rank
    draws = Draws(
        rank.method, rank.ties, rank.bins, rank.subset_documents, rank.subset_per_domain, run.recipe.seed,
        independent=proxy.draws == "independent",
    )  # fmt: skip
    if proxy.pool == "whole":
        return draws
    if step.entry(THINNING) is None:
        fewest = float(selected_tokens().min())
        thin = min(1.0, _SPARE * proxy.tokens / max(fewest, 1.0))
        below = min(1.0, thin * (2**run.recipe.space.eta_max + run.recipe.space.epsilon_max))
        step.write_json(THINNING, {"thin": thin, "below": below, "fewest_selected_tokens": fewest})
    facts = step.read_json(THINNING)
    return replace(draws, thin=facts["thin"], below=facts["below"])


def _finish(run: Run, step: Step, work: pa.Table, rule: HalvingRule | None, started: float) -> None:
    paths = [part_path(number) for number in work["proxy"].to_pylist()]
    losses, curves, failures = merge_parts(step, paths, ["proxy"], lambda part: final_part(part, rule))
    losses = with_work(losses, work)
    step.write_table("proxies/losses.parquet", losses)
    step.write_table("proxies/curves.parquet", curves)
    noises = noise_report(work, losses, run.recipe.proxy.pilots if rule else None)
    step.write_json("proxies/noise.json", noises)
    fidelity = fidelity_report(run, step, without_baselines(work)["proxy"].to_pylist(), rule)
    step.write_json("proxies/fidelity.json", fidelity)
    ratios = {task: each["signal_to_noise"] or 0.0 for task, each in noises.items()}
    clearest = max(ratios, key=ratios.__getitem__) if ratios else None
    said = [f"{losses.num_rows} proxies × {run.recipe.proxy.tokens:,} tokens"]
    said += [f"{len(failures)} failed"] if failures else []
    said += [f"{sum(fidelity['stopped'].values())} stopped early"] if fidelity["stopped"] else []
    said += [f"{fidelity['not_learnt']} above the unigram entropy"] if fidelity["not_learnt"] else []
    rounds = f"{lowest_by_round(run, losses)}; " if run.recipe.search.rounds else ""
    signal = f"clearest signal to noise {ratios[clearest]:.1f} ({clearest})" if clearest else "noise unknown"
    step.finish(
        seconds=round(time.monotonic() - started, 2),
        failures=failures,
        headline=f"{', '.join(said)}; {rounds}{signal}",
    )
