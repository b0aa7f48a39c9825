"""Step 2: σ, fitted on the labels or taken as it is, and applied to every document.

Two streaming passes: the driver holds the state of the scores, never the documents.
"""

import logging
import time
from collections.abc import Iterator
from typing import Any

from nemo_curator.pipeline import Pipeline
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin import registry
from quadmix_plugin.config import scorer_plugin
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError, QuadmixError, RecipeError
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.schema import DOC_ID, DOMAIN, TOKENS, normalised_column, score_column
from quadmix_plugin.score_sketch import ScoreSketch
from quadmix_plugin.stages import FitNormaliser, NormaliseScores, ReadShards, WriteShards
from quadmix_plugin.stages.shards import shard_tasks
from quadmix_plugin.store import Step, merge_counts

logger = logging.getLogger(__name__)

NORMALISER, DOMAINS = "normalise/normaliser.json", "normalise/domains.json"

# A state is as large as the scores that it is made from until many of them share a cell. So one state is made of many
# shards, and only so many states are on their way to the driver at once.
_ROWS_PER_STATE = 250_000
_ROWS_PER_PASS = 4_000_000


# A bound of the error of σ, as a share of the tokens, above which the log says so.
_COARSE = 0.05


def normalise(run: Run) -> None:
    """Writes ``normaliser.json``, ``domains.json`` and the shards of the score table under ``normalise/``.

    A shard has doc_id, domain (small ones folded), tokens, and a raw and a normalised column per scorer.

    Raises:
        InputError: labels that cannot be used, or none that are left.
        RecipeError: a frozen normaliser of other scorers, directions or method.
    """
    step = run.step("normalise")
    if step.is_done:
        return
    started = time.monotonic()
    frozen = frozen_normaliser(run)
    if step.entry(NORMALISER) is None or step.entry(DOMAINS) is None:
        sketch = _sketch(run).fold_small_domains(run.recipe.rank.merge_small_domains)
        normaliser = frozen or Normaliser.fit(sketch, directions(run), run.recipe.normalise.method)
        if frozen is None:
            _warn_of_coarse_scores(normaliser)
        step.write_json(NORMALISER, normaliser.to_dict())
        step.write_json(DOMAINS, DomainSummary.of_sketch(sketch, normaliser).to_dict())
    summary = DomainSummary.from_dict(step.read_json(DOMAINS))
    _apply(run, step, summary)
    totals = merge_counts(entry.facts for entry in step.entries() if "rows_in" in entry.facts)
    if totals["rows_kept"] != (fitted := int(summary.documents.sum())):
        raise QuadmixError(
            f"normalise: σ was fitted on {fitted} documents and applied to {totals['rows_kept']}; labels changed in "
            f"between, so run `quadmix verify {run.directory.root}`"
        )
    step.finish(**totals, seconds=round(time.monotonic() - started, 2))


def directions(run: Run) -> dict[str, bool]:
    """Of every scorer of the recipe, whether its high scores are the good ones."""
    found = {}
    for name, options in run.recipe.scorers.items():
        plugin, rest = scorer_plugin(name, options)
        found[name] = registry.create("scorers", plugin, rest, f"scorers.{name}").higher_is_better
    return found


def frozen_normaliser(run: Run) -> Normaliser | None:
    """σ that the recipe gives, or None where it is to be fitted.

    Raises:
        InputError: no such file, or it holds something else.
        RecipeError: it is of other scorers, directions or another method than the recipe.
    """
    path = run.recipe.normalise.frozen
    if path is None:
        return None
    frozen, wanted = Normaliser.load(path), directions(run)
    if frozen.scorers != run.scorers:
        raise RecipeError(
            f"normalise.frozen: {path} is of the scorers {', '.join(frozen.scorers)}; scorers has "
            f"{', '.join(run.scorers)}; give the normaliser of the same ones in the same order"
        )
    if turned := [each.scorer for each in frozen.maps if each.higher_is_better != wanted[each.scorer]]:
        raise RecipeError(
            f"normalise.frozen: {path} takes {'low' if wanted[turned[0]] else 'high'} scores of {', '.join(turned)} as "
            f"good, the recipe's scorer does not; give a normaliser of this scorer, or leave the key out to fit one"
        )
    if frozen.method != run.recipe.normalise.method:
        raise RecipeError(
            f"normalise.frozen: {path} was fitted by {frozen.method}; set normalise.method to that, found "
            f"{run.recipe.normalise.method}"
        )
    return frozen


def _warn_of_coarse_scores(normaliser: Normaliser) -> None:
    for each in normaliser.maps:
        if normaliser.method == "ecdf" and each.error > _COARSE:
            logger.warning(
                "%s: many scores agree to one part in 16,384, so σ of a document may be off by up to %.1f %% of the "
                "tokens; their order is kept (a scorer that gives logits in place of probabilities spreads them)",
                score_column(each.scorer),
                100 * each.error,
            )


def _sketch(run: Run) -> ScoreSketch:
    """The state of all labels."""
    label, settings = run.require("label"), run.recipe.normalise
    facts = {entry.path: entry.facts for entry in label.entries()}
    rows = {shard: int(facts[f"labels/{shard}.parquet"]["rows_kept"]) for shard in run.label_shards}
    per_state = max(1, _ROWS_PER_STATE * len(rows) // max(1, sum(rows.values())))
    stages = [
        ReadShards(step=label, folder="labels", columns=[DOC_ID, DOMAIN, TOKENS, *map(score_column, run.scorers)]),
        FitNormaliser(
            scorers=list(run.scorers), invalid_scores=settings.invalid_scores, batch_size=min(per_state, len(rows))
        ),
    ]
    held: list[ScoreSketch] = []
    dropped: dict[str, int] = {}
    for shards in _passes(rows):
        states = Pipeline("fit_normaliser", stages=stages).run(run.executor, initial_tasks=shard_tasks(shards)) or []
        found = [state for state in states if isinstance(state, DocumentBatch)]
        held = [ScoreSketch.merge([*held, *(ScoreSketch.from_table(state.to_pyarrow()) for state in found)])]
        dropped = merge_counts([{"rows_in": 0, "rows_kept": 0, "dropped": dropped}, *map(_counts, found)])["dropped"]
    if not held or not held[0].n:
        raise InputError(
            f"normalise: none of the {sum(rows.values())} labelled documents is left; dropped {dropped}; repair the "
            f"scorer and label again"
        )
    return held[0]


def _counts(state: DocumentBatch) -> dict[str, Any]:
    return {"rows_in": state._metadata["rows_in"], "rows_kept": 0, "dropped": state._metadata["dropped"]}


def _passes(rows: dict[str, int]) -> Iterator[list[str]]:
    """Shards in groups of about ``_ROWS_PER_PASS`` rows."""
    group: list[str] = []
    held = 0
    for shard, n in rows.items():
        group.append(shard)
        held += n
        if held >= _ROWS_PER_PASS:
            yield group
            group, held = [], 0
    if group:
        yield group


def _apply(run: Run, step: Step, summary: DomainSummary) -> None:
    """Writes the shards that are not there yet."""
    todo = [shard for shard in run.label_shards if step.entry(f"normalise/{shard}.parquet") is None]
    if not todo:
        return
    raw = [DOC_ID, DOMAIN, TOKENS, *map(score_column, run.scorers)]
    stages = [
        ReadShards(step=run.require("label"), folder="labels", columns=raw),
        NormaliseScores(
            normaliser=Normaliser.from_dict(step.read_json(NORMALISER)),
            invalid_scores=run.recipe.normalise.invalid_scores,
            domains=list(summary.domains),
        ),
        WriteShards(step=step, folder="normalise", columns=[*raw, *map(normalised_column, run.scorers)]),
    ]
    Pipeline("normalise", stages=stages).run(run.executor, initial_tasks=shard_tasks(todo))
