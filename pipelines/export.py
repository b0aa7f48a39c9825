"""Step 5: a selection as Megatron token files, one pair per shard, with the lists of them that Megatron-LM reads.

Tokens are gathered out of the proxies' pool where it has every document; else the selected ones are tokenised here.
Workers write the shards; nothing here holds a row per document.
"""

import sys
import time
from dataclasses import dataclass

import pyarrow as pa
from nemo_curator.pipeline import Pipeline

from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.megatron import require_few_pairs, write_documents
from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.label import run_over_documents
from quadmix_plugin.pipelines.proxy_data import POOL, tokenised_rows
from quadmix_plugin.schema import (
    COPIES,
    DOC_ID,
    DOMAIN,
    MERGED_QUALITY,
    QUALITY_RANK,
    SAMPLING_VALUE,
    TEXT,
    TOKENS,
)
from quadmix_plugin.stages import ExportTokens, GatherTokens, ReadShards, WriteShards
from quadmix_plugin.stages.corpus_passes import ReadColumns
from quadmix_plugin.stages.export_tokens import end_of_document, pair_entry, readable_pair, vocabulary_of
from quadmix_plugin.stages.shards import shard_tasks
from quadmix_plugin.store import Step
from quadmix_plugin.training_data import shard_facts

TOKEN_FOLDER, TEXT_FOLDER, SELECTION = "tokens", "selected", "selection"

VALIDATION = "tokens/validation"
"""The validation rows that nothing was searched on, with ``.bin`` and ``.idx``."""

_STEM = "train-"
_REASONS = [COPIES, DOMAIN, TOKENS, MERGED_QUALITY, QUALITY_RANK, SAMPLING_VALUE]


@dataclass(frozen=True)
class TokenFiles:
    """A selection's token files: those of shards with documents, in the order of the shards.

    ``prefixes``: absolute paths without ``.bin``; ``tokens`` and ``rows`` with copies, ends of documents included;
    ``unique_tokens`` of each document once; ``documents``: absolute paths of the tables beside the pairs.
    """

    prefixes: tuple[str, ...]
    tokens: int
    unique_tokens: int
    rows: int
    documents: tuple[str, ...]


def export(run: Run) -> None:
    """Writes ``tokens/``: training data, validation data and blends; where asked, ``selected/`` with the text.

    Raises:
        InputError: nothing selected, too many shards, no validation rows, or token files that do not belong together.
    """
    step, select = run.step("export"), run.require("select")
    if is_done(run):
        return
    started = time.monotonic()
    _write_validation(run, step)
    files = export_selection(run, step, TOKEN_FOLDER, select, SELECTION)
    if run.recipe.export.text:
        _write_text(run, step, select)
    pairs = len(files.prefixes)
    step.finish(
        selection={"rows": files.rows, "tokens": files.tokens, "unique_tokens": files.unique_tokens, "pairs": pairs},
        text=run.recipe.export.text,
        seconds=round(time.monotonic() - started, 2),
        headline=f"{files.rows:,} documents with copies, {files.tokens:,} tokens in {pairs:,} token files",
    )


def is_done(run: Run) -> bool:
    """Whether the export is finished with what the recipe asks of it."""
    facts = run.step("export").summary()
    return facts is not None and "text" in facts and (facts["text"] or not run.recipe.export.text)


def export_selection(run: Run, step: Step, folder: str, selection_step: Step, selection_folder: str) -> TokenFiles:
    """Writes ``<folder>/train-<shard>`` for every ``<selection_folder>/<shard>.parquet``, and the blends.

    A shard that is there is not written again.

    Raises:
        InputError: nothing selected, too many shards for one blend, or token files that do not belong together.
    """
    selected = _rows(run, selection_step, selection_folder)
    if not sum(selected.values()):
        raise InputError(f"{folder}: no document is selected; raise the budget")
    require_few_pairs(sum(rows > 0 for rows in selected.values()), folder)
    todo = [shard for shard in run.label_shards if shard_facts(step, f"{folder}/{_STEM}{shard}") is None]
    if todo and has_whole_pool(run):
        _gather(run, step, folder, selection_step, selection_folder, todo)
    elif todo:
        _tokenise(run, step, folder, selection_step, selection_folder, todo)
    parts = _parts(run, step, folder)
    _write_blends(step, folder, parts)
    return _token_files(step, parts)


def exported(run: Run, step: Step, folder: str = TOKEN_FOLDER) -> TokenFiles:
    """The token files of a selection that has been exported.

    Raises:
        QuadmixError: a shard is not there.
    """
    return _token_files(step, _parts(run, step, folder))


def validation_prefix(run: Run) -> str:
    """The absolute path, without ``.bin``, of the validation rows as token files."""
    return readable_pair(run.require("export"), VALIDATION)


def has_whole_pool(run: Run) -> bool:
    """Whether the proxies' token files hold every document of the corpus."""
    return "proxies" in run.steps and run.recipe.proxy.pool == "whole"


def _rows(run: Run, selection: Step, folder: str) -> dict[str, int]:
    """Selected documents of every shard, as the manifest says."""
    found = {}
    for shard in run.label_shards:
        path = f"{folder}/{shard}.parquet"
        if (entry := selection.entry(path)) is None:
            raise QuadmixError(
                f"{selection.place}/{path}: not there, or changed since; run the step {selection.name!r}"
            )
        found[shard] = int(entry.facts["rows"])
    return found


def _parts(run: Run, step: Step, folder: str) -> list[tuple[str, dict[str, int]]]:
    """Prefix and facts of every shard, those without documents too."""
    parts = []
    for shard in run.label_shards:
        prefix = f"{folder}/{_STEM}{shard}"
        facts = shard_facts(step, prefix)
        if facts is None:
            raise QuadmixError(f"{step.place}/{prefix}: not there, or not from this recipe; run the step {step.name!r}")
        parts.append((prefix, facts))
    return parts


def _token_files(step: Step, parts: list[tuple[str, dict[str, int]]]) -> TokenFiles:
    places = [str(step.path(prefix)) for prefix, facts in parts if facts["rows"]]
    tokens, unique, rows = (sum(facts[name] for _, facts in parts) for name in ("tokens", "unique_tokens", "rows"))
    return TokenFiles(tuple(places), tokens, unique, rows, tuple(f"{place}.documents.parquet" for place in places))


def _gather(run: Run, step: Step, folder: str, selection: Step, selected: str, todo: list[str]) -> None:
    """Out of the proxies' pool."""
    tokenizer = run.recipe.tokenizer
    gather = GatherTokens(
        step=step,
        pool=run.step("proxies"),
        table=run.require("normalise"),
        vocabulary=vocabulary_of(load_tokenizer(tokenizer.model, tokenizer.revision)),
        tokenizer=tokenizer.model,
        folder=folder,
        stem=_STEM,
        pool_folder=POOL,
        seed=run.seed_for("shuffle"),
        counted=not tokenizer.estimate,
    )
    stages = [ReadShards(step=selection, folder=selected, columns=[DOC_ID, COPIES, TOKENS]), gather]
    Pipeline("export", stages=stages).run(run.executor, initial_tasks=shard_tasks(todo))


def _tokenise(run: Run, step: Step, folder: str, selection: Step, selected: str, todo: list[str]) -> None:
    """From the text of the corpus."""
    tokenizer = run.recipe.tokenizer
    export_tokens = ExportTokens(
        step=step,
        tokenizer=tokenizer.model,
        revision=tokenizer.revision,
        eod=tokenizer.eod,
        folder=folder,
        stem=_STEM,
        copies_field=COPIES,
        counted_field=None if tokenizer.estimate else TOKENS,
        seed=run.seed_for("shuffle"),
    )
    read = ReadColumns(selection, [DOC_ID, TEXT, COPIES, TOKENS], folder=selected)
    run_over_documents(run, [read, export_tokens], frozenset(run.label_shards) - frozenset(todo))


def _write_blends(step: Step, folder: str, parts: list[tuple[str, dict[str, int]]]) -> None:
    """Lists of the pairs with their tokens as weights; prefixes are relative to the run directory."""
    pairs = [(str(facts["tokens"]), prefix) for prefix, facts in parts if facts["rows"]]
    if step.entry(f"{folder}/blend.txt") is None:
        step.write_text(f"{folder}/blend.txt", "".join(f"{weight} {prefix}\n" for weight, prefix in pairs))
    if step.entry(f"{folder}/blend.json") is None:
        train = [part for pair in pairs for part in pair]
        step.write_json(f"{folder}/blend.json", {"train": train, "valid": [VALIDATION], "test": None})


def _write_validation(run: Run, step: Step) -> None:
    """The part of the validation rows that nothing is searched on: prompt, response and an end, whole."""
    if pair_entry(step, VALIDATION) is not None:
        return
    section = run.recipe.tokenizer
    tokenizer = load_tokenizer(section.model, section.revision)
    table = tokenised_rows(run, context=sys.maxsize)
    report = table.filter(pa.array([part == "report" for part in table["part"].to_pylist()]))
    if not report.num_rows:
        raise InputError(
            f"validation: {table.num_rows} rows, none of them in the part 'report', which is exported; give more rows"
        )
    eod = end_of_document(tokenizer, section.eod, section.model)
    documents = [ids[1:] for ids in report["ids"].to_pylist()]  # the first is an end of document
    facts = {"rows": len(documents), "tokens": sum(map(len, documents)) + len(documents)}
    with step.writing(f"{VALIDATION}.bin", f"{VALIDATION}.idx", **facts) as (bin_path, idx_path):
        write_documents(documents, bin_path, idx_path, vocabulary_of(tokenizer), eod)


def _write_text(run: Run, step: Step, selection: Step) -> None:
    """The selected documents with text, copies and the reasons."""
    done = frozenset(s for s in run.label_shards if step.entry(f"{TEXT_FOLDER}/{s}.parquet") is not None)
    if len(done) == len(run.label_shards):
        return
    columns = [DOC_ID, TEXT, *_REASONS]
    write = WriteShards(step=step, folder=TEXT_FOLDER, columns=columns)
    run_over_documents(run, [ReadColumns(selection, columns, folder=SELECTION), write], done)
