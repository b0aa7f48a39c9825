"""How many tokens a law with draws selects: their mean and their standard deviation over the whole corpus.

Sums are of integers, whole parts and rests apart, so that they are the same for any partitioning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.labelled_corpus import LabelledCorpus
from quadmix_plugin.schema import TOKENS

_REST_UNIT = 2.0**-30  # the sum of the rests fits int64 for 8 billion documents
_VARIANCE_UNIT = 2.0**20  # tokens²
_WHOLE, _REST = "whole", "rest"


class Drawn(Protocol):
    """A law whose copies are the integer part of an expectation and a draw of the rest."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``expected`` reads."""
        ...

    def expected(self, batch: pa.Table) -> NDArray[np.float64]:
        """Expected copies of every document [n]."""
        ...


def mean_tokens(corpus: LabelledCorpus, law: Drawn) -> float:
    """Σ tokens · expected copies."""
    return _value(corpus.fold(_Sum(law)))


def sd_tokens(corpus: LabelledCorpus, law: Drawn) -> float:
    """The standard deviation of the drawn tokens: √ Σ tokens² · f(1 - f), f the fraction of an expectation."""
    return sqrt(_value(corpus.fold(_Sum(law, variance=True))) * _VARIANCE_UNIT)


@dataclass(frozen=True, eq=False)
class _Sum:
    """Fold: expected tokens of all documents, or the variance of the drawn ones in units."""

    law: Drawn
    variance: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return (TOKENS, *self.law.columns)

    def of(self, batch: pa.Table) -> pa.Table:
        tokens, copies = batch[TOKENS].to_numpy().astype(np.float64), self.law.expected(batch)
        values = tokens * copies
        if self.variance:
            drawn = copies - np.floor(copies)
            values = tokens**2 * drawn * (1 - drawn) / _VARIANCE_UNIT
        whole = np.floor(values)
        rest = np.rint((values - whole) / _REST_UNIT)
        return pa.table({_WHOLE: [int(whole.astype(np.int64).sum())], _REST: [int(rest.astype(np.int64).sum())]})

    def merge(self, states: Sequence[pa.Table]) -> pa.Table:
        return pa.table({name: [sum(int(s[name].to_numpy().sum()) for s in states)] for name in (_WHOLE, _REST)})


def _value(state: pa.Table) -> float:
    return state[_WHOLE][0].as_py() + state[_REST][0].as_py() * _REST_UNIT
