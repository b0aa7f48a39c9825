"""What is known of every domain once σ is applied: its size, and the range of each normalised score.

Small, mergeable and exact: later passes place their histogram bins by it without reading a document.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.normalisation import Normaliser
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.score_sketch import ScoreSketch


@dataclass(frozen=True, eq=False)
class DomainSummary:
    """Documents, tokens and range of σ of every domain.

    ``documents`` and ``tokens`` [M] int64 in the order of ``domains``; ``low`` and ``high`` [M, N] float32, the lowest
    (best) and highest (worst) σ, columns in the order of ``scorers``; NaN where a domain has no document.
    """

    domains: tuple[str, ...]
    scorers: tuple[str, ...]
    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    @classmethod
    def of(cls, table: ScoreTable, normalised: ArrayLike) -> Self:
        """The summary of these documents; ``normalised`` [n, N] is their σ(q).

        Raises:
            InputError: ``normalised`` has another shape than the table's scores, or a value that is not finite.
        """
        sigma = np.asarray(normalised, dtype=np.float32)
        if sigma.shape != table.scores.shape:
            raise InputError(
                f"normalised: shape {sigma.shape}; the table has {table.scores.shape}; give one σ per score"
            )
        if bad := int((~np.isfinite(sigma)).sum()):
            raise InputError(f"normalised: {bad} values are not finite; apply a normaliser to finite scores")
        m = len(table.domains)
        low, high = np.full((2, m, len(table.scorers)), np.nan, dtype=np.float32)
        order = np.argsort(table.domain_ids, kind="stable")
        present, first = np.unique(table.domain_ids[order], return_index=True)
        if present.size:
            ordered = sigma[order] + np.float32(0)  # makes -0.0 and 0.0 one value
            low[present] = np.minimum.reduceat(ordered, first)
            high[present] = np.maximum.reduceat(ordered, first)
        documents = np.bincount(table.domain_ids, minlength=m).astype(np.int64)
        return cls(table.domains, table.scorers, documents, table.domain_tokens, low, high)

    @classmethod
    def of_sketch(cls, sketch: ScoreSketch, normaliser: Normaliser) -> Self:
        """The summary of a sketch's documents: σ is monotone, so the ends of its range are σ of the raw ends."""
        ends = np.stack([normaliser.apply(sketch.low), normaliser.apply(sketch.high)])
        low, high = ends.min(axis=0) + np.float32(0), ends.max(axis=0) + np.float32(0)
        return cls(sketch.domains, sketch.scorers, sketch.documents, sketch.tokens, low, high)

    @classmethod
    def of_range(cls, normaliser: Normaliser, domains: tuple[str, ...]) -> Self:
        """A summary that only knows the range of σ itself, the same for every domain."""
        ends = np.array([[each.value[0], each.value[-1]] for each in normaliser.maps], dtype=np.float32)
        low, high = (np.tile(end, (len(domains), 1)) for end in (ends.min(axis=1), ends.max(axis=1)))
        none = np.zeros(len(domains), dtype=np.int64)
        return cls(domains, normaliser.scorers, none, none, low, high)

    def in_order(self, domains: tuple[str, ...], scorers: tuple[str, ...]) -> Self:
        """The same with its rows in the order of ``domains``; one that is not known here has no documents.

        Raises:
            InputError: other scorers, or documents of a domain that is not among ``domains``.
        """
        if scorers != self.scorers:
            raise InputError(
                f"domain summary: of the scorers {', '.join(self.scorers)}, wanted {', '.join(scorers)}; use the files "
                f"of one run"
            )
        if lost := [name for name, n in zip(self.domains, self.documents, strict=True) if n and name not in domains]:
            raise InputError(
                f"domain summary: documents of {', '.join(lost[:5])}, which the parameters do not name; use parameters "
                f"of this corpus"
            )
        rows = [self.domains.index(name) if name in self.domains else -1 for name in domains]
        known = np.array(rows, dtype=np.int64) >= 0
        documents, tokens = (np.where(known, each[rows], 0) for each in (self.documents, self.tokens))
        low, high = (np.where(known[:, None], each[rows], np.float32(np.nan)) for each in (self.low, self.high))
        return type(self)(domains, self.scorers, documents, tokens, low, high)

    @classmethod
    def merge(cls, parts: Iterable[Self]) -> Self:
        """The summary of the documents of several; their order does not matter.

        Domains are matched by name; where the parts name different ones, the result has all of them, sorted.

        Raises:
            InputError: no parts, or parts of different scorers.
        """
        summaries = list(parts)
        if not summaries:
            raise InputError("domain summary: nothing to merge; give at least one summary")
        if len({part.scorers for part in summaries}) > 1:
            found = " and ".join(sorted({", ".join(part.scorers) for part in summaries}))
            raise InputError(f"domain summary: parts of different scorers ({found}); merge summaries of one run")
        scorers, domains = summaries[0].scorers, summaries[0].domains
        if any(part.domains != domains for part in summaries):
            domains = tuple(sorted({name for part in summaries for name in part.domains}))
        position = {name: m for m, name in enumerate(domains)}
        documents, tokens = np.zeros((2, len(domains)), dtype=np.int64)
        low, high = np.full((2, len(domains), len(scorers)), np.nan, dtype=np.float32)
        for part in summaries:
            rows = [position[name] for name in part.domains]
            documents[rows] += part.documents
            tokens[rows] += part.tokens
            low[rows] = np.fmin(low[rows], part.low)  # fmin and fmax pass over the NaN of a domain without documents
            high[rows] = np.fmax(high[rows], part.high)
        return cls(domains, scorers, documents, tokens, low, high)

    def to_dict(self) -> dict[str, Any]:
        """Plain content for ``domains.json``; a range that does not exist is null."""
        rows = {}
        for m, name in enumerate(self.domains):
            ends = zip(self.scorers, self.low[m].tolist(), self.high[m].tolist(), strict=True)
            ranges = {scorer: None if low != low else [low, high] for scorer, low, high in ends}  # noqa: PLR0124 - NaN
            rows[name] = {"documents": int(self.documents[m]), "tokens": int(self.tokens[m]), "normalised": ranges}
        return {"scorers": list(self.scorers), "order": list(self.domains), "domains": rows}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        domains, scorers = tuple(content["order"]), tuple(content["scorers"])
        rows = [content["domains"][name] for name in domains]
        ends = [[row["normalised"][scorer] or [np.nan, np.nan] for scorer in scorers] for row in rows]
        low, high = np.moveaxis(np.array(ends, dtype=np.float32).reshape(len(domains), len(scorers), 2), 2, 0)
        documents, tokens = (np.array([row[k] for row in rows], dtype=np.int64) for k in ("documents", "tokens"))
        return cls(domains, scorers, documents, tokens, low.copy(), high.copy())
