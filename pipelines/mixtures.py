"""Proxies on mixtures of domains: what RegMix learns from, trained as the proxies of θ are."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from nemo_curator.pipeline import Pipeline
from numpy.typing import NDArray

from quadmix_plugin.pipelines.context import Run, trainer_options
from quadmix_plugin.pipelines.proxy_data import pool_prefixes, require_pool, write_pool, write_validation
from quadmix_plugin.proxy.attempts import Attempts
from quadmix_plugin.proxy.parts import LOSS_PREFIX, MIXTURE, merge_parts, part_path, to_do
from quadmix_plugin.proxy.selection import Draws, ProxyTable
from quadmix_plugin.stages import TrainProxies
from quadmix_plugin.stages.train_proxies import proxy_tasks
from quadmix_plugin.store import Step

TABLE, POOL, VALIDATION = "compare/table.parquet", "compare/pool", "compare/proxy-validation.parquet"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MixtureProxies:
    """Trains a proxy per mixture with the settings of ``proxy``; each is kept in ``folder`` as it ends."""

    run: Run
    step: Step
    folder: str

    def __call__(self, mixtures: Array, seed: int) -> dict[str, Array]:
        """Losses of every task [k] after training on these shares of tokens [k, M]; NaN of one that failed.

        Raises:
            QuadmixError: none could be trained.
        """
        work, stage = self._work(mixtures), self._stage(seed)
        paths = [part_path(number, stage.parts) for number in work["proxy"].to_pylist()]
        attempts = Attempts(self.step.root, stage.session)
        attempts.clear()
        todo = work.filter(pa.array([to_do(self.step, path, stage.session) for path in paths]))
        if todo.num_rows:
            Pipeline("mixtures", stages=[stage]).run(self.run.executor, initial_tasks=list(proxy_tasks(todo)))
        attempts.clear()
        losses, _, _ = merge_parts(self.step, paths, ["proxy"])
        found = {}
        for name in losses.column_names:
            if name.startswith(LOSS_PREFIX):
                column = np.full(mixtures.shape[0], np.nan)
                column[losses["proxy"].to_numpy()] = losses[name].to_numpy()
                found[name.removeprefix(LOSS_PREFIX)] = column
        return found

    def _work(self, mixtures: Array) -> pa.Table:
        order = self.run.seed_for("data order")
        number = np.arange(mixtures.shape[0])
        columns = {"proxy": number, "kind": [MIXTURE] * number.size, "seed": [order] * number.size, "stream": number}
        return pa.table({**columns, "theta": expected_copies(mixtures, self._domain_tokens, self._tokens).tolist()})

    def _stage(self, seed: int) -> TrainProxies:
        run, step, recipe = self.run, self.step, self.run.recipe
        vocabulary, _ = write_validation(run, step, "proxy", VALIDATION)
        if step.entry(TABLE) is None:
            step.write_table(TABLE, ProxyTable.of(run.table, run.normalised).to_arrow())
        pool = whole_pool(run, step)
        require_pool(run, pool, vocabulary)
        return TrainProxies(
            step=step,
            table=str(step.read_path(TABLE)),
            pool=pool,
            validation=str(step.read_path(VALIDATION)),
            tokens=self._tokens,
            vocabulary=vocabulary,
            trainer=recipe.proxy.trainer,
            options=trainer_options(run, recipe.proxy.trainer, recipe.proxy.options),
            draws=Draws(seed=seed),
            weights_seed=recipe.seed,
            parts=f"{self.folder}/proxies/",
        )

    @property
    def _tokens(self) -> int:
        return self.run.recipe.proxy.tokens

    @property
    def _domain_tokens(self) -> NDArray[np.int64]:
        return self.run.table.domain_tokens


def expected_copies(mixtures: Array, domain_tokens: NDArray[np.int64], tokens: int) -> Array:
    """How often a document of each domain [M] is expected in the data of each mixture [k, M].

    As many tokens as there are without repeats, but at least ``tokens``, since a proxy sees a sample of its data by
    domain: the more documents, the less its losses depend on which.
    """
    size = np.maximum(domain_tokens, 1).astype(np.float64)
    with np.errstate(divide="ignore"):
        room = np.where(mixtures > 0, size / mixtures, np.inf).min(axis=1)
    total = np.clip(room, 1.1 * tokens, float(domain_tokens.sum()) + 1.1 * tokens)
    return mixtures / mixtures.sum(axis=1, keepdims=True) * total[:, None] / size


def whole_pool(run: Run, step: Step) -> list[str]:
    """Token files of every document: the pool of the proxies where it is whole, else one of the comparison's own."""
    if "proxies" in run.steps and run.recipe.proxy.pool == "whole":
        return pool_prefixes(run)
    write_pool(run, step, folder=POOL)
    return pool_prefixes(run, step, POOL)
