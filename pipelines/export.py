"""Step 5: a selection as a pair of Megatron token files.

Tokens are gathered out of the proxies' pool where it has every document; else the selected ones are tokenised here.
"""

import time
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.label import run_over_documents
from quadmix_plugin.pipelines.proxy_data import pool_prefixes
from quadmix_plugin.pipelines.select import selected_copies
from quadmix_plugin.stages import ExportTokens
from quadmix_plugin.stages.export_tokens import pair_entry, vocabulary_of, write_selection
from quadmix_plugin.store import Step

TRAIN = "tokens/train"
"""θ*'s selection, with ``.bin`` and ``.idx``."""


def export(run: Run) -> None:
    """Writes ``tokens/train.bin`` and ``.idx``."""
    step = run.step("export")
    if step.is_done:
        return
    started = time.monotonic()
    facts = export_selection(run, step, TRAIN, selected_copies(run), "export/documents")
    step.finish(
        selection=facts,
        seconds=round(time.monotonic() - started, 2),
        headline=f"{facts['rows']:,} documents with copies, {facts['tokens']:,} tokens in {TRAIN}.bin",
    )


def export_selection(run: Run, step: Step, prefix: str, copies: NDArray[np.int32], folder: str) -> dict[str, Any]:
    """Writes the documents of a selection, ``copies`` [n] as in ``run.table``, as one pair; returns its facts.

    Where there is no whole pool, they are tokenised into ``folder`` first. A pair that is there is not written again.
    """
    if (facts := pair_entry(step, prefix)) is not None:
        return facts
    table = run.table
    vocabulary = vocabulary_of(load_tokenizer(run.recipe.tokenizer.model, run.recipe.tokenizer.revision))
    seed = run.seed_for("shuffle")
    if "proxies" in run.steps and run.recipe.proxy.pool == "whole":
        return write_selection(pool_prefixes(run), table.doc_ids, copies, seed, step, prefix, vocabulary)
    taken = copies > 0
    doc_ids = table.doc_ids.filter(pa.array(taken))
    parts = _tokenise(run, step, doc_ids, folder)
    return write_selection(parts, doc_ids, copies[taken], seed, step, prefix, vocabulary)


def _tokenise(run: Run, step: Step, doc_ids: pa.Array, folder: str) -> list[str]:
    """Token files of these documents, one pair per shard; their prefixes in the order of the score table."""
    tokenizer = run.recipe.tokenizer
    stage = ExportTokens(
        step=step,
        tokenizer=tokenizer.model,
        revision=tokenizer.revision,
        eod=tokenizer.eod,
        folder=folder,
        selection=doc_ids,
    )
    done = frozenset(shard for shard in run.label_shards if pair_entry(step, f"{folder}/{shard}") is not None)
    if len(done) < len(run.label_shards):
        run_over_documents(run, [stage], done)
    return [str(step.read_path(f"{folder}/{shard}.idx").with_suffix("")) for shard in run.label_shards]
