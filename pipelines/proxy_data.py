"""What proxies are trained and measured on: the token pool of the corpus and the validation rows as ids."""

import logging
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError
from quadmix_plugin.megatron import check_tokens
from quadmix_plugin.models import load_tokenizer
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.pipelines.label import run_over_documents
from quadmix_plugin.proxy.pool import TokenPool
from quadmix_plugin.proxy.training import tokens_per_batch
from quadmix_plugin.proxy.validation import choose_rows, read_rows, tokenise_rows
from quadmix_plugin.stages import ExportTokens
from quadmix_plugin.stages.export_tokens import end_of_document, pair_entry, readable_pair, vocabulary_of
from quadmix_plugin.store import Step

logger = logging.getLogger(__name__)

POOL = "proxies/pool"

_LOOKED_AT = 1 << 20  # ids of the pool, from the beginnings of its files


def write_validation(run: Run, step: Step, section: Literal["proxy", "pretrain"], path: str) -> tuple[int, int]:
    """Tokenises the validation rows once, for the models of a section; returns vocabulary and end-of-document id.

    Raises:
        InputError: as ``read_rows`` and ``tokenise_rows``.
    """
    tokenizer, eod = _tokenizer(run)
    if step.entry(path) is None:
        settings = getattr(run.recipe, section)
        context = registry.create("trainers", settings.trainer, settings.options, f"{section}.options").context
        table = tokenised_rows(run, context)
        if cut := sum(table["truncated"].to_pylist()):
            logger.warning(
                "validation: %d of %d rows are longer than the context of %d tokens and are cut, the beginning of the "
                "prompt first", cut, table.num_rows, context,
            )  # fmt: skip
        step.write_table(path, table)
    return vocabulary_of(tokenizer), eod


def tokenised_rows(run: Run, context: int) -> pa.Table:
    """The validation rows of the recipe as ids, for models of this context; raises as ``write_validation``."""
    section, (tokenizer, eod) = run.recipe.validation, _tokenizer(run)
    rows = read_rows(run.validation_files, section.prompt, section.response, section.task)
    return tokenise_rows(choose_rows(rows, section.rows_per_task), tokenizer, eod, context, section.mask_prompt)


def _tokenizer(run: Run) -> tuple[Any, int]:
    """The recipe's tokenizer and its end-of-document id."""
    section = run.recipe.tokenizer
    tokenizer = load_tokenizer(section.model, section.revision)
    return tokenizer, end_of_document(tokenizer, section.eod, section.model)


def write_pool(run: Run, step: Step, below: float = 1.0, folder: str = POOL) -> None:
    """Tokenises every document of the score table whose u is ``below``, once; one pair of token files per shard."""
    tokenizer, normalised = run.recipe.tokenizer, run.require("normalise")
    export = ExportTokens(
        step=step,
        tokenizer=tokenizer.model,
        revision=tokenizer.revision,
        eod=tokenizer.eod,
        folder=folder,
        kept=normalised if (normalised.summary() or {}).get("dropped") else None,
        below=below,
        seed=run.recipe.seed,
    )
    done = frozenset(shard for shard in run.label_shards if pair_entry(step, f"{folder}/{shard}") is not None)
    if len(done) < len(run.label_shards):
        run_over_documents(run, [export], done)


def pool_prefixes(run: Run, step: Step | None = None, folder: str = POOL) -> list[str]:
    """A pool's pairs in the order of the score table: by default that of the proxies."""
    step = step or run.step("proxies")
    return [readable_pair(step, f"{folder}/{shard}") for shard in run.label_shards]


def require_pool(run: Run, prefixes: list[str], vocabulary: int) -> None:
    """Looks at the token files before any proxy is trained.

    Raises:
        InputError: a truncated file, ids of another vocabulary, no text, or fewer tokens than one batch.
    """
    pool = TokenPool.open(prefixes)
    each = _LOOKED_AT // len(pool.files)
    beginnings = [np.array(file.tokens[: max(each, 1)]) for file in pool.files]
    settings, tokens = run.recipe.proxy, int(pool.lengths.sum())
    trainer = registry.create("trainers", settings.trainer, settings.options, "proxy.options")
    batch = tokens_per_batch(trainer)
    if tokens <= batch:
        raise InputError(
            f"{run.directory.root}: the pool has {tokens:,} tokens, a batch {batch:,}; give a larger corpus, or lower "
            f"batch_size or context under proxy.options"
        )
    for prefix, ids in zip(prefixes, beginnings, strict=True):
        if ids.size and int(ids.max()) >= vocabulary:
            raise InputError(
                f"{prefix}.bin: an id of {int(ids.max())}, the vocabulary has {vocabulary}; use the tokenizer that "
                f"wrote it"
            )
    check_tokens(np.concatenate(beginnings), vocabulary, f"{run.directory.root / POOL}")
