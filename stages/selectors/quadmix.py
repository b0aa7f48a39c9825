"""QuaDMix as a selector: parameters that a search found, scaled to the budget."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.budget import scale_to_budget
from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import hash64, tie_hash
from quadmix_plugin.rank_map import RankMap, Ties
from quadmix_plugin.ranking import merge_quality
from quadmix_plugin.sampling import draw_copies, sampling_value
from quadmix_plugin.schema import ScoreTable
from quadmix_plugin.stages.merge_rank import load_theta


@dataclass
class QuaDMix:
    """Eq. 1 to 3 under ``theta``, every ω scaled by one factor so that the expected tokens meet the budget.

    Args:
        theta: the path of a ``theta.json`` of this corpus.
        ties: as in ``rank.ties``.
    """

    name: ClassVar[str] = "quadmix"
    theta: str
    ties: Ties = "paper"

    def select(
        self, table: ScoreTable, normalised: NDArray[np.float32], budget_tokens: int, seed: int
    ) -> NDArray[np.int32]:
        """The number of copies of every document [n].

        Raises:
            InputError: parameters of other domains or scorers, or a budget that cannot be reached.
        """
        theta = load_theta(self.theta)
        if theta.domains != table.domains or theta.scorers != table.scorers:
            raise InputError(f"{self.theta}: made for other domains or scorers; use the theta.json of this corpus")
        merged = merge_quality(normalised, table.domain_ids, theta)
        hashes = tie_hash(hash64(table.doc_ids, seed)) if self.ties == "hash" else None
        ranks = RankMap.exact(merged, table.domain_ids, table.tokens, self.ties, hashes)
        budget = scale_to_budget(theta, ranks, budget_tokens)
        rank = ranks.rank(merged, table.domain_ids, hashes)
        return draw_copies(sampling_value(rank, table.domain_ids, budget.theta), table.doc_ids, seed)
