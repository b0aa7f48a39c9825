"""Step 5: every selection as a pair of Megatron token files.

Tokens are gathered out of the proxies' pool where it has every document; else the selected ones are tokenised here.
"""

import time

import numpy as np
import pyarrow as pa

from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.label import run_over_documents
from quadmix_plugin.pipelines.proxy_data import pool_prefixes
from quadmix_plugin.pipelines.select import QUADMIX, baseline_copies, selected_copies
from quadmix_plugin.stages import ExportTokens
from quadmix_plugin.stages.export_tokens import pair_entry, vocabulary_of, write_selection
from quadmix_plugin.store import Step

TRAIN = "train"
"""θ*'s selection is ``tokens/train.bin`` and ``.idx``; the compared ones carry their names."""

_DOCUMENTS = "export/documents"


def export(run: Run) -> None:
    """Writes ``tokens/train.bin``/``.idx`` and a pair for each compared selection."""
    step = run.step("export")
    if step.is_done:
        return
    started = time.monotonic()
    selections = {TRAIN: selected_copies(run), **baseline_copies(run)}
    needed = np.ones(run.table.n, dtype=bool)
    if "proxies" in run.steps and run.recipe.proxy.pool == "whole":
        prefixes = pool_prefixes(run)
    else:
        needed = np.any([copies > 0 for copies in selections.values()], axis=0)
        prefixes = _tokenise(run, step, run.table.doc_ids.filter(pa.array(needed)))
    vocabulary = vocabulary_of(load_tokenizer(run.recipe.tokenizer.model, run.recipe.tokenizer.revision))
    doc_ids, seed, facts = run.table.doc_ids.filter(pa.array(needed)), run.seed_for("shuffle"), {}
    for done, (name, copies) in enumerate(selections.items()):
        run.progress("export", done, len(selections))
        facts[name] = write_selection(prefixes, doc_ids, copies[needed], seed, step, name, vocabulary)
    run.progress("export", len(selections), len(selections))
    train = facts[TRAIN]
    step.finish(
        selections={QUADMIX if name == TRAIN else name: each for name, each in facts.items()},
        seconds=round(time.monotonic() - started, 2),
        headline=f"{train['rows']:,} documents with copies, {train['tokens']:,} tokens in tokens/train.bin",
    )


def _tokenise(run: Run, step: Step, doc_ids: pa.Array) -> list[str]:
    """Token files of these documents, one pair per shard; their prefixes in the order of the score table."""
    tokenizer = run.recipe.tokenizer
    stage = ExportTokens(
        step=step,
        tokenizer=tokenizer.model,
        revision=tokenizer.revision,
        eod=tokenizer.eod,
        folder=_DOCUMENTS,
        selection=doc_ids,
    )
    done = frozenset(shard for shard in run.label_shards if pair_entry(step, f"{_DOCUMENTS}/{shard}") is not None)
    if len(done) < len(run.label_shards):
        run_over_documents(run, [stage], done)
    return [str(step.read_path(f"{_DOCUMENTS}/{shard}.idx").with_suffix("")) for shard in run.label_shards]
