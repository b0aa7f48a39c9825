"""Progress while proxies are trained: beside their number the lowest loss until now."""

from pathlib import Path

from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.proxy.parts import PARTS, part_path
from quadmix_plugin.store import Step


class LowestLoss:
    """Progress of the training with the lowest mean loss until now; each ended proxy is read once."""

    def __init__(self, run: Run, step: Step, numbers: list[int]):
        self._run, self._step = run, step
        self._open = {Path(part_path(number)).name: number for number in numbers}
        self._lowest: tuple[float, int] | None = None

    def __call__(self, stage: str, done: int, total: int | None, /, note: str = "") -> None:
        """Passes progress on, with the proxy of the lowest loss, the tasks weighed as in the objective."""
        written = {path.name for path in (self._step.root / PARTS).glob("*.json")}
        for name in written & self._open.keys():
            if self._step.entry(PARTS + name) is not None:
                self._read(self._open.pop(name))
        said = f"lowest loss {self._lowest[0]:.3f} (proxy {self._lowest[1]})" if self._lowest else note
        self._run.progress(stage, done, total, said)

    def _read(self, number: int) -> None:
        part = self._step.read_json(part_path(number))
        if part.get("share") != 1.0:
            return
        losses, weights = part["losses"], self._run.recipe.search.objective or dict.fromkeys(part["losses"], 1)
        value = sum(weights.get(task, 0) * loss for task, loss in losses.items()) / sum(weights.values())
        self._lowest = min(self._lowest or (value, number), (value, number))
