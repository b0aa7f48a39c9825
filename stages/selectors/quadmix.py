"""QuaDMix as a selector: parameters that a search found, scaled to the budget."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from quadmix_plugin.budget import scale_to_budget
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.drawn_tokens import sd_tokens
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64, tie_hash
from quadmix_plugin.labelled_corpus import LabelledCorpus, Law, require_scorers
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.rank_map import RankMap, Ties
from quadmix_plugin.rank_states import BINS, Grid, RankHistogram
from quadmix_plugin.ranking import merge_quality
from quadmix_plugin.sampling import draw_hashes, sampling_value
from quadmix_plugin.schema import DOC_ID, DOMAIN, TOKENS, normalised_column
from quadmix_plugin.stages.merge_rank import load_theta
from quadmix_plugin.stages.score_columns import domain_ids, read_normalised


@dataclass(frozen=True, eq=False)
class _Histogram:
    """Fold: the tokens of every bin of every domain's q̄."""

    theta: Parameters
    grid: Grid

    @property
    def columns(self) -> tuple[str, ...]:
        return (DOMAIN, TOKENS, *map(normalised_column, self.theta.scorers))

    def of(self, batch: pa.Table) -> pa.Table:
        ids = domain_ids(batch, self.theta)
        merged = merge_quality(read_normalised(batch, self.theta, None), ids, self.theta)
        return RankHistogram.of(merged, ids, batch[TOKENS].to_numpy(), self.grid).to_table()

    def merge(self, states: Sequence[pa.Table]) -> pa.Table:
        return RankHistogram.merge(map(RankHistogram.from_table, states)).to_table()


@dataclass(frozen=True, eq=False)
class Sampled:
    """The law of Eq. 1 to 3 under θ, ranks as frozen in a map.

    The tokens that are drawn have the mean ``expected_tokens`` and the standard deviation ``sd_tokens``.
    """

    theta: Parameters
    ranks: RankMap
    seed: int
    expected_tokens: float
    sd_tokens: float = np.nan

    @property
    def columns(self) -> tuple[str, ...]:
        """The id, the domain and the scores."""
        return (DOC_ID, DOMAIN, *map(normalised_column, self.theta.scorers))

    def copies(self, batch: pa.Table) -> NDArray[np.int32]:
        """Copies of every document [n]."""
        return draw_hashes(self.expected(batch), hash64(batch[DOC_ID], self.seed))

    def expected(self, batch: pa.Table) -> NDArray[np.float64]:
        """Expected copies of every document [n], Eq. 3."""
        ids = domain_ids(batch, self.theta)
        merged = merge_quality(read_normalised(batch, self.theta, None), ids, self.theta)
        tie = tie_hash(hash64(batch[DOC_ID], self.seed)) if self.ranks.ties == "hash" else None
        return sampling_value(self.ranks.rank(merged, ids, tie), ids, self.theta)


@dataclass
class QuaDMix:
    """Eq. 1 to 3 under θ, every ω scaled by one factor so that the expected tokens meet the budget.

    Args:
        theta: the path of a ``theta.json`` of this corpus; None takes the run's own search.
        exclude_scorers: takes θ of a search by the same proxies without these scorers (the paper's Table 2).
        ties: as in ``rank.ties``.
        bins: of each domain's histogram of q̄, as in ``rank.bins``.
    """

    name: ClassVar[str] = "quadmix"
    repeats: ClassVar[bool] = True
    theta: str | None = None
    exclude_scorers: list[str] = field(default_factory=list)
    ties: Ties = "paper"
    bins: int = BINS

    def __post_init__(self) -> None:
        if self.theta is not None and self.exclude_scorers:
            raise InputError("exclude_scorers searches anew, and theta is given; leave one of them out")

    def check(self, summary: DomainSummary, budget_tokens: int) -> None:
        """Raises InputError for an unknown scorer, or if no scorer is left."""
        del budget_tokens
        require_scorers(self.exclude_scorers, summary.scorers, "exclude_scorers")
        if len(set(self.exclude_scorers)) == len(summary.scorers):
            raise InputError("exclude_scorers: every scorer is excluded; leave at least one")

    def fit(self, corpus: LabelledCorpus, budget_tokens: int, seed: int) -> Law:
        """The law of the scaled θ.

        Raises:
            InputError: parameters of other domains or scorers, none at all, or a budget that cannot be reached.
        """
        theta = corpus.theta(self.exclude_scorers) if self.theta is None else load_theta(self.theta)
        summary = corpus.summary
        if set(theta.domains) < set(summary.domains) or theta.scorers != summary.scorers:
            raise InputError(
                f"{self.theta or 'theta'}: made for other domains or scorers; use the theta.json of this corpus"
            )
        known = summary.in_order(theta.domains, theta.scorers)
        state = corpus.fold(_Histogram(theta, Grid.of(theta, known, self.bins)))
        ranks = RankMap.of_histogram(RankHistogram.from_table(state), self.ties)
        budget = scale_to_budget(theta, ranks, budget_tokens, known.tokens)
        law = Sampled(budget.theta, ranks, seed, budget.expected_tokens)
        return replace(law, sd_tokens=sd_tokens(corpus, law))
