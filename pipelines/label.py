"""Step 1: domain, quality scores and token count of every document."""

import json
import time
from collections.abc import Sequence
from typing import Any

from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.stages.text.io.reader.jsonl import JsonlReaderStage
from nemo_curator.stages.text.io.reader.parquet import ParquetReaderStage
from nemo_curator.tasks import FileGroupTask, Task

from quadmix_plugin.config import scorer_plugin
from quadmix_plugin.corpus import CorpusFile, inspect
from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.megatron import require_few_pairs
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.schema import DOC_ID, DOMAIN, DOMAIN_TOP, DOMAIN_TOP_PROBABILITY, TEXT, TOKENS, score_column
from quadmix_plugin.stages import CountTokens, DomainClassify, PrepareDocuments, QualityScore, WriteShards
from quadmix_plugin.stages.count_tokens import ESTIMATE_ERROR
from quadmix_plugin.stages.prepare_documents import shard_stem
from quadmix_plugin.store import merge_counts
from quadmix_plugin.token_counts import estimate_error

_PARQUET = {"page_checksum_verification": True}  # of files whose writer has added them
# Curator's default engine takes ids that look like times for times, and stops at a key, even one that nobody reads,
# whose values are of several types.
_JSON_LINES = {"engine": "pandas", "dtype": False, "convert_dates": False, "precise_float": True}


def label(run: Run) -> None:
    """Writes ``labels/<shard>.parquet``: doc_id, domain, tokens and one raw column per scorer.

    Raises:
        InputError: as ``corpus.inspect``; models and plug-ins are checked before the corpus is read.
    """
    step = run.step("label")
    if step.is_done:
        return
    started = time.monotonic()
    recipe = run.recipe
    stages = label_stages(run)
    plugins = _facts(stages)
    found = inspect(
        run.corpus_files, recipe.corpus.text, recipe.corpus.id, recipe.corpus.invalid_rows, columns_read(stages)
    )
    require_few_pairs(sum(-(-rows // recipe.corpus.documents_per_shard) for rows in found.rows.values()), "corpus")
    top = [DOMAIN_TOP, DOMAIN_TOP_PROBABILITY] if recipe.domain.top_k else []
    columns = [DOC_ID, DOMAIN, *top, TOKENS, *map(score_column, run.scorers)]
    done = frozenset(entry.path.removeprefix("labels/").removesuffix(".parquet") for entry in step.entries())
    files = [file for file in run.corpus_files if found.rows[file.path]]
    run_over_documents(run, [*stages, WriteShards(step=step, folder="labels", columns=columns)], done, files)
    totals = merge_counts(entry.facts for entry in step.entries())
    if totals["rows_in"] != found.documents:
        raise QuadmixError(
            f"label: {totals['rows_in']} rows were labelled, the corpus has {found.documents}; it changed while it was "
            f"read, so run again into another --out"
        )
    if not totals["rows_kept"]:
        raise InputError(f"{run.corpus_files[0].path}: no usable document; dropped {totals['dropped']}")
    if recipe.tokenizer.estimate:
        error = estimate_error(entry.facts[ESTIMATE_ERROR] for entry in step.entries())
        totals |= {ESTIMATE_ERROR: error, "headline": _headline(error)}
    step.finish(**totals, plugins=plugins, seconds=round(time.monotonic() - started, 2), files=len(run.corpus_files))


def _headline(error: dict[str, Any]) -> str:
    if error["mean_error"] is None:
        return "token counts are estimates; no document was counted whole, so their error is not known"
    return (
        f"token counts are estimates: off by {error['mean_error']:.1%} a document and {error['bias']:+.1%} in sum, "
        f"measured on {error['documents']:,} documents"
    )


def _facts(stages: list[ProcessingStage]) -> dict[str, Any]:
    """What each plug-in says of itself, asked before work that would be lost where it cannot be written."""
    facts = {stage.name: stage.facts() for stage in stages if isinstance(stage, DomainClassify | QualityScore)}
    for name, said in facts.items():
        try:
            json.dumps(said, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: its facts are not plain values ({error}); mend the plug-in") from error
    return facts


def label_stages(run: Run) -> list[ProcessingStage]:
    """The labelling stages of the recipe, in order; they can be added to any Curator pipeline."""
    recipe, device = run.recipe, run.recipe.executor.device
    domain = recipe.domain
    stages: list[ProcessingStage] = [
        DomainClassify(classifier=domain.classifier, options=domain.options, top_k=domain.top_k, device=device)
    ]
    for name, given in recipe.scorers.items():
        plugin, rest = scorer_plugin(name, given)
        stages.append(
            QualityScore(
                scorer=plugin,
                options=rest,
                column=score_column(name),
                device=device,
                invalid_scores=recipe.normalise.invalid_scores,
            )
        )
    tokenizer = recipe.tokenizer
    stages.append(CountTokens(tokenizer.model, revision=tokenizer.revision, estimate=tokenizer.estimate))
    return stages


def run_over_documents(
    run: Run, stages: list[ProcessingStage], done: frozenset[str], files: Sequence[CorpusFile] | None = None
) -> list[Task]:
    """Reads the corpus with Curator's readers, cuts it into shards and runs ``stages`` over those not in ``done``.

    ``files``: those with documents, since Curator's readers stop at others; None once the corpus is labelled.
    """
    corpus = run.recipe.corpus
    if files is None:
        labelled = {shard.rpartition("-")[0] for shard in run.label_shards}
        files = [file for file in run.corpus_files if shard_stem(file.name) in labelled]
    prepare = PrepareDocuments(
        id_field=corpus.id,
        text_field=corpus.text,
        keep=columns_read(stages),
        documents_per_shard=corpus.documents_per_shard,
        invalid_rows=corpus.invalid_rows,
        done=done,
    )
    results: list[Task] = []
    for parquet in (True, False):
        alike = [file for file in files if file.is_parquet is parquet]
        if not alike:
            continue
        tasks: list[Task] = [
            FileGroupTask(
                dataset_name=run.recipe.name,
                data=[file.path],
                # Until there are shards, an error names the file.
                _metadata={"source_files": [file.path], "source_name": file.name, "shard": file.path},
            )
            for file in alike
        ]
        fields = prepare.inputs()[1]
        reader = (
            ParquetReaderStage(fields=fields, read_kwargs=_PARQUET)
            if parquet
            else JsonlReaderStage(fields=fields, read_kwargs=_JSON_LINES)
        )
        pipeline = Pipeline(name=stages[-1].name, stages=[reader, prepare, *stages])
        results += pipeline.run(run.executor, initial_tasks=tasks) or []
    return results


def columns_read(stages: list[ProcessingStage]) -> list[str]:
    """Columns of the corpus that these stages read beside the id and the text, sorted.

    A column counts that is read before a stage makes it: ``domain`` may be in the corpus already.
    """
    made, wanted = {TEXT, DOC_ID}, set()
    for stage in stages:
        read, written = stage.inputs(), stage.outputs()
        wanted |= set(read[1] if isinstance(read, tuple) else []) - made
        made |= set(written[1] if isinstance(written, tuple) else [])
    return sorted(wanted)
