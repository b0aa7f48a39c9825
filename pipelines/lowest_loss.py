"""Progress while proxies are trained: beside their number the lowest loss until now."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.proxy.parts import PARTS, part_path
from quadmix_plugin.store import Step


def mean_loss(run: Run, losses: Mapping[str, Any]) -> Any:
    """The mean of the tasks' losses (numbers, or arrays [n]), weighed as in the objective, in nats per token."""
    weights = run.recipe.search.objective or dict.fromkeys(losses, 1)
    return sum(weights.get(task, 0) * loss for task, loss in losses.items()) / sum(weights.values())


class LowestLoss:
    """Progress of the training with the lowest mean loss until now; each ended proxy is read once.

    ``name`` of what is trained, such as a round, is said before it.
    """

    def __init__(self, run: Run, step: Step, numbers: list[int], name: str = ""):
        self._run, self._step, self._name = run, step, name
        self._open = {Path(part_path(number)).name: number for number in numbers}
        self._lowest: tuple[float, int] | None = None

    def __call__(self, stage: str, done: int, total: int | None, /, note: str = "") -> None:
        """Passes progress on, with the proxy of the lowest loss, the tasks weighed as in the objective."""
        names = {PARTS + name: name for name in self._open}
        for place in self._step.place.sizes(names):
            if self._step.entry(place) is not None:
                self._read(self._open.pop(names[place]))
        said = f"lowest loss {self._lowest[0]:.3f} (proxy {self._lowest[1]})" if self._lowest else note
        self._run.progress(stage, done, total, ", ".join(part for part in (self._name, said) if part))

    def _read(self, number: int) -> None:
        part = self._step.read_json(part_path(number))
        if part.get("share") != 1.0:
            return
        value = mean_loss(self._run, part["losses"])
        self._lowest = min(self._lowest or (value, number), (value, number))
