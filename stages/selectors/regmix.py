"""RegMix (Liu et al. 2024, arXiv 2407.01492): a mixture of domains found by proxies, random documents within them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from quadmix_plugin import registry
from quadmix_plugin.domain_summary import DomainSummary
from quadmix_plugin.errors import InputError
from quadmix_plugin.labelled_corpus import LabelledCorpus, Law
from quadmix_plugin.search.mixture_draws import MixtureDraws
from quadmix_plugin.search.objective import Objective
from quadmix_plugin.search.spaces import MixtureSpace
from quadmix_plugin.threshold import ByHash, Coded, up_to_budgets

Array = NDArray[np.float64]


@dataclass
class RegMix:
    """Takes random documents in the shares of the mixture whose predicted objective is lowest.

    Proxies are trained on drawn mixtures, a regressor is fitted from shares to the loss of each task, and the best of
    many draws from the prior (the domains' shares of the corpus) are averaged. Within a domain, documents are taken
    by their hash; a domain that is too small for its share is repeated whole. Published for one target; here several
    are weighed as in ``search.objective``, each standardised over the proxies. Proxies are those of the recipe's
    section ``proxy``, not the published ones.

    Args:
        mixture: the path of a JSON file, domain → share, in place of the search; shares are normalised.
        proxies: how many mixtures are trained (published: 512).
        regressor: a name of the group ``regressors``, with ``options``; published are LightGBM's settings.
        draws, top: of ``draws`` mixtures the ``top`` best are averaged (published code: 128; its paper says 100).
        most_repeats: no share of a trained mixture is above so many times the domain's share of the corpus.
    """

    name: ClassVar[str] = "regmix"
    repeats: ClassVar[bool] = True
    mixture: str | None = None
    proxies: Annotated[int, Field(ge=8)] = 512
    regressor: str = "lightgbm-published"
    options: dict[str, Any] = field(default_factory=dict)
    draws: Annotated[int, Field(ge=1)] = 100_000
    top: Annotated[int, Field(ge=1)] = 128
    most_repeats: Annotated[float, Field(ge=1)] = 15.0

    def check(self, summary: DomainSummary, budget_tokens: int) -> None:
        """Raises InputError for a file that is no mixture of the corpus, an unknown regressor, or a single domain."""
        del budget_tokens
        if self.mixture is not None:
            read_mixture(self.mixture, summary.domains)
            return
        if len(summary.domains) < 2:
            raise InputError("regmix: the corpus has a single domain, so there is nothing to mix; label its domains")
        regressor = registry.create("regressors", self.regressor, self.options, "options")
        if self.proxies < (fewest := getattr(regressor, "fewest_rows", 2)):
            raise InputError(f"proxies: {self.regressor} needs {fewest} of them; train more than {self.proxies}")
        if self.top > self.draws:
            raise InputError(f"top: {self.top} of {self.draws} draws; average fewer, or draw more")

    def fit(self, corpus: LabelledCorpus, budget_tokens: int, seed: int) -> Law:
        """The law that meets each domain's part of the budget.

        Raises:
            InputError: as ``check``, or proxies of which too few could be trained.
        """
        summary = corpus.summary
        shares = self._search(corpus, seed) if self.mixture is None else read_mixture(self.mixture, summary.domains)
        budgets = [round(budget_tokens * share) for share in (shares / shares.sum()).tolist()]
        return up_to_budgets(corpus, Coded(ByHash(), seed, summary.domains), budgets)

    def _search(self, corpus: LabelledCorpus, seed: int) -> Array:
        prior = corpus.summary.tokens / corpus.summary.tokens.sum()
        mixtures = MixtureDraws(most_repeats=self.most_repeats).draw(prior, self.proxies, seed)
        losses = corpus.train_mixtures(mixtures, seed)
        trained = np.isfinite(next(iter(losses.values())))
        losses = {task: each[trained] for task, each in losses.items()}
        objective = Objective.of(losses, corpus.objective)
        points = np.concatenate([p for _, p in MixtureSpace(corpus.summary.domains, prior).draw(self.draws, seed)])
        predicted = {task: self._predict(mixtures[trained], losses[task], points) for task in objective.tasks}
        best = np.argsort(objective.value(predicted), kind="stable")[: self.top]
        return points[best].mean(axis=0)

    def _predict(self, mixtures: Array, losses: Array, points: Array) -> Array:
        regressor = registry.create("regressors", self.regressor, self.options, "options")
        regressor.fit(mixtures, losses)
        return regressor.predict(points)


def read_mixture(path: str, domains: tuple[str, ...]) -> Array:
    """The share of every domain [M], which sum to 1; one that the file does not name has none.

    Raises:
        InputError: no such file, not a JSON object of numbers, an unknown domain, or no share above 0.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"mixture: {path}: cannot be read ({error}); give a JSON file, domain to share") from error
    numbers = isinstance(content, dict) and all(type(v) in (int, float) and v >= 0 for v in content.values())
    if not numbers or not 0 < sum(content.values()) < np.inf:
        raise InputError(f"mixture: {path}: not an object of shares, of which one is above 0; give domain to share")
    if unknown := [name for name in content if name not in domains]:
        raise InputError(f"mixture: {path}: {unknown[0]!r} is not among the domains {', '.join(domains)}")
    shares = np.array([content.get(name, 0.0) for name in domains], dtype=np.float64)
    return shares / shares.sum()
