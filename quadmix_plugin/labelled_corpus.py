"""What a selector sees of a labelled corpus: batches of columns, in passes that leave small states or new columns.

A selector never holds the corpus. It folds batches into states that merge in any order, adds columns that it needs
more than once, and ends with a law, which gives any batch its copies. So the same selector works on a table in memory
and on the shards of a run, and its selection cannot depend on how the documents are cut up.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.schema import DOC_ID, DOMAIN, TEXT, TOKENS, ScoreTable, normalised_column, score_column


class Fold(Protocol):
    """A pass that leaves a state: a table, whose rows say what the documents of a batch add up to.

    Sums must be of integers, so that the merged state does not depend on the batches. Instances are pickled.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``of`` reads."""
        ...

    def of(self, batch: pa.Table) -> pa.Table:
        """The state of one batch."""
        ...

    def merge(self, states: Sequence[pa.Table]) -> pa.Table:
        """The state of the documents of several; of none where there are none."""
        ...


class Derive(Protocol):
    """A pass that makes columns, which later passes read as if the corpus had them. Instances are pickled.

    One that can use a GPU has ``on_device(device)``, which gives the same pass for ``cpu``, ``cuda`` or ``cuda:N``.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``of`` reads; ``text`` among them reads the corpus again."""
        ...

    @property
    def makes(self) -> tuple[str, ...]:
        """The columns that ``of`` makes."""
        ...

    def of(self, batch: pa.Table) -> pa.Table:
        """The new columns, one row per document; a document's values must not depend on the rest of its batch."""
        ...


class Law(Protocol):
    """A fitted selection: gives each document of a batch its copies, whatever batch it is in. Instances are pickled.

    A law whose draws scatter may have ``expected_tokens`` and ``sd_tokens``, floats, of the tokens that it selects; any
    may have ``facts``, plain values that are kept beside the selection.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``copies`` reads; those that the selector has added to the corpus among them."""
        ...

    def copies(self, batch: pa.Table) -> NDArray[np.int32]:
        """Copies of every document [n]."""
        ...


class MixtureTrainer(Protocol):
    """Trains proxies on mixtures of domains and says what they lose."""

    def __call__(self, mixtures: NDArray[np.float64], seed: int) -> dict[str, NDArray[np.float64]]:
        """Losses of every task [k] after training on each of these shares of tokens [k, M]; NaN of one that failed."""
        ...


class LabelledCorpus(Protocol):
    """Documents with domain, tokens and scores, of a run or in memory.

    Columns: ``doc_id``, ``domain``, ``tokens``, ``score_<scorer>``, ``normalised_<scorer>`` (σ, smaller = better),
    ``text``, and those that ``add_columns`` has added.
    """

    @property
    def summary(self) -> DomainSummary:
        """Names of domains and scorers, and the size of every domain."""
        ...

    def fold(self, fold: Fold) -> pa.Table:
        """The merged state of one pass over all documents."""
        ...

    def add_columns(self, derive: Derive) -> None:
        """Gives the corpus the columns that a pass makes; they are computed once, and later passes read them."""
        ...

    def target_texts(self, tasks: Sequence[str] | None = None) -> list[str]:
        """Questions with their answers, of the validation rows on which one may search; of all tasks or some.

        Raises:
            InputError: no validation rows, or none of such a task.
        """
        ...

    def theta(self, exclude_scorers: Sequence[str] = ()) -> Parameters:
        """θ* that was searched for this corpus, or that of a search without some scorers.

        Raises:
            InputError: nothing has been searched.
        """
        ...

    @property
    def train_mixtures(self) -> MixtureTrainer:
        """Trains proxies on mixtures of this corpus.

        Raises:
            InputError: there is no trainer.
        """
        ...

    @property
    def objective(self) -> dict[str, float]:
        """The weight of each task; empty: all count equally."""
        ...


class Selector(Protocol):
    """A selection method: the plug-ins of the group ``selectors``, dataclasses whose fields are their options.

    A method ``check(summary, budget_tokens)`` is optional; it raises InputError for what is known to be wrong before
    any pass. So is a class attribute ``repeats`` (bool): whether a budget beyond the corpus' own tokens can be met.
    """

    def fit(self, corpus: LabelledCorpus, budget_tokens: int, seed: int) -> Law:
        """The law whose copies have ``budget_tokens`` tokens in all."""
        ...


def check_selector(selector: Any, summary: DomainSummary, budget_tokens: int) -> None:
    """Refuses what is known to be wrong before any pass over the documents.

    Raises:
        InputError: a budget of no tokens, or of more than there are where the selector repeats no document; or what the
            selector's own ``check`` says.
    """
    available = int(summary.tokens.sum())
    if budget_tokens < 1:
        raise InputError(f"a budget of {budget_tokens:,} tokens; give at least 1")
    if budget_tokens > available and not getattr(selector, "repeats", False):
        raise InputError(
            f"a budget of {budget_tokens:,} tokens, and the corpus has {available:,}, of which this selector repeats "
            f"none; lower the budget to {available:,} at most"
        )
    if hasattr(selector, "check"):
        selector.check(summary, budget_tokens)


def require_scorers(names: Iterable[str], scorers: Sequence[str], option: str) -> None:
    """Raises InputError for a scorer that the corpus has no scores of."""
    if missing := [name for name in names if name not in scorers]:
        raise InputError(f"{option}: {missing[0]!r} is not among {', '.join(scorers)}; name one of these")


def domain_ids(batch: pa.Table, domains: Sequence[str]) -> NDArray[np.int64]:
    """The position in ``domains`` of each document's domain [n].

    Raises:
        InputError: a domain that is not among them.
    """
    encoded = batch[DOMAIN].combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    position = {name: m for m, name in enumerate(domains)}
    names = encoded.dictionary.to_pylist()
    if unknown := [name for name in names if name not in position]:
        raise InputError(f"domain: {unknown[0]!r} is not among {', '.join(domains)}; label these documents again")
    lookup = np.array([position[name] for name in names], dtype=np.int64)
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    return lookup[codes] if codes.size else np.empty(0, dtype=np.int64)


@dataclass(eq=False)
class MemoryCorpus:
    """A labelled corpus as one table, cut into ``partitions`` for every pass.

    ``trainer``, ``searched`` (excluded scorers, sorted → θ*) and ``targets`` (task → texts) are what only a run has;
    without them the selectors that need them refuse.
    """

    table: pa.Table
    summary: DomainSummary
    partitions: int = 1
    targets: dict[str, list[str]] | None = None
    searched: dict[tuple[str, ...], Parameters] | None = None
    trainer: MixtureTrainer | None = None
    objective: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, table: ScoreTable, normalised: NDArray[np.float32], texts: Sequence[str] | None = None, **rest: Any
    ) -> Self:
        """From a score table, σ [n, N] and, where selectors read it, the text of every document."""
        columns: dict[str, Any] = {DOC_ID: table.doc_ids}
        columns[DOMAIN] = pa.DictionaryArray.from_arrays(pa.array(table.domain_ids, pa.int32()), list(table.domains))
        columns[DOMAIN] = columns[DOMAIN].cast(pa.string())
        columns[TOKENS] = table.tokens
        for n, scorer in enumerate(table.scorers):
            columns[score_column(scorer)] = table.scores[:, n]
            columns[normalised_column(scorer)] = normalised[:, n]
        if texts is not None:
            columns[TEXT] = pa.array(texts, pa.string())
        return cls(pa.table(columns), DomainSummary.of(table, normalised), **rest)

    def fold(self, fold: Fold) -> pa.Table:
        """The merged state of one pass over all documents."""
        return fold.merge([fold.of(batch) for batch in self._batches(fold.columns)])

    def add_columns(self, derive: Derive) -> None:
        """Gives the corpus the columns that a pass makes, in place of any of the same name."""
        made = pa.concat_tables([derive.of(batch) for batch in self._batches(derive.columns)])
        kept = [name for name in self.table.column_names if name not in derive.makes]
        table = self.table.select(kept)
        for name in derive.makes:
            table = table.append_column(name, made[name])
        self.table = table

    def target_texts(self, tasks: Sequence[str] | None = None) -> list[str]:
        """The texts of these tasks, or of all."""
        return texts_of(self.targets or {}, tasks)

    def theta(self, exclude_scorers: Sequence[str] = ()) -> Parameters:
        """θ* of a search without these scorers."""
        found = (self.searched or {}).get(tuple(sorted(exclude_scorers)))
        if found is None:
            raise InputError("quadmix: nothing has been searched on this corpus; give theta, the path of a theta.json")
        return found

    @property
    def train_mixtures(self) -> MixtureTrainer:
        """The trainer that was given."""
        if self.trainer is None:
            raise InputError("no proxies can be trained here; give the mixture itself, or run `quadmix compare`")
        return self.trainer

    def copies(self, law: Law) -> NDArray[np.int32]:
        """The copies of every document [n]."""
        return np.concatenate([law.copies(batch) for batch in self._batches(law.columns)])

    def _batches(self, columns: Sequence[str]) -> list[pa.Table]:
        lacking = [name for name in columns if name not in self.table.column_names]
        if lacking:
            found = ", ".join(self.table.column_names)
            raise InputError(
                f"no column {lacking[0]!r} in this corpus; it has {found}; give it, or choose another selector"
            )
        table, n = self.table.select(list(dict.fromkeys(columns))), self.table.num_rows
        ends = [n * i // self.partitions for i in range(self.partitions + 1)]
        return [table.slice(begin, end - begin) for begin, end in pairwise(ends)]


def texts_of(targets: dict[str, list[str]], tasks: Sequence[str] | None) -> list[str]:
    """The texts of these tasks, or of all, task by task in order of their names.

    Raises:
        InputError: none at all, or none of such a task.
    """
    if not targets:
        raise InputError("no validation rows to take as target; name them under validation.path")
    if unknown := [task for task in tasks or () if task not in targets]:
        raise InputError(f"tasks: {unknown[0]!r} is not among {', '.join(sorted(targets))}; name one of these")
    return [text for task in sorted(tasks or targets) for text in targets[task]]


def select_in_memory(
    selector: Selector, table: ScoreTable, normalised: NDArray[np.float32], budget_tokens: int, seed: int
) -> NDArray[np.int32]:
    """The copies of every document [n] of a score table by a selector that reads no text.

    Raises:
        InputError: as ``check_selector``, or a column that only a run has.
    """
    corpus = MemoryCorpus.of(table, normalised)
    check_selector(selector, corpus.summary, budget_tokens)
    return corpus.copies(selector.fit(corpus, budget_tokens, seed))
