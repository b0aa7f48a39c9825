"""Step 5: every selection as a pair of Megatron token files, gathered out of the pool."""

import time

from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.proxies import pool_prefixes, write_pool
from quadmix_plugin.pipelines.select import QUADMIX, baseline_copies, selected_copies
from quadmix_plugin.stages.export_tokens import vocabulary_of, write_selection

TRAIN = "train"
"""θ*'s selection is ``tokens/train.bin`` and ``.idx``; the compared ones carry their names."""


def export(run: Run) -> None:
    """Writes ``tokens/train.bin``/``.idx`` and a pair for each compared selection."""
    step = run.step("export")
    if step.is_done:
        return
    started = time.monotonic()
    write_pool(run, run.step("proxies"))
    tokenizer = load_tokenizer(run.recipe.tokenizer.model, run.recipe.tokenizer.revision)
    vocabulary, prefixes = vocabulary_of(tokenizer), pool_prefixes(run)
    selections = {TRAIN: selected_copies(run), **baseline_copies(run)}
    facts = {}
    for done, (name, copies) in enumerate(selections.items()):
        run.progress("export", done, len(selections))
        facts[name] = write_selection(
            prefixes, run.table.doc_ids, copies, run.seed_for("shuffle"), step, name, vocabulary
        )
    run.progress("export", len(selections), len(selections))
    train = facts[TRAIN]
    step.finish(
        selections={QUADMIX if name == TRAIN else name: each for name, each in facts.items()},
        seconds=round(time.monotonic() - started, 2),
        headline=f"{train['rows']:,} documents with copies, {train['tokens']:,} tokens in tokens/train.bin",
    )
