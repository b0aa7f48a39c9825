"""What is measured while a job trains: ``metrics.jsonl``, TensorBoard and, if asked for, Weights & Biases.

A job that goes on from a checkpoint first drops the lines that were written after it, so that the file reads as if
nothing had happened.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from quadmix_plugin.atomic import atomic_path, storage_errors
from quadmix_plugin.errors import InputError

if TYPE_CHECKING:
    from quadmix_plugin.proxy.model import Shape

FILE = "metrics.jsonl"

_PEAK_FLOPS = {"H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
               "H800": 989e12, "GB200": 2500e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
               "L40S": 362e12}  # fmt: skip
"""Dense bfloat16 peaks of NVIDIA's data sheets; the first name that is part of the device's counts."""


def peak_flops(device_name: str) -> float | None:
    """The dense bfloat16 peak of a GPU by its name, or None where it is not known."""
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in device_name), None)


def flops_per_token(shape: "Shape") -> float:
    """Of training: 6 × the weights that a token passes through, and attention to half the context on average."""
    through = shape.parameters - (0 if shape.tied else shape.vocabulary * shape.width)
    return 6.0 * through + 6.0 * shape.layers * shape.heads * shape.head_width * shape.context


@dataclass(frozen=True)
class Metrics:
    """Lines of metrics, one per call of ``write``; use it as a context manager."""

    path: Path
    board: Any
    tracker: Any

    @classmethod
    def open(cls, folder: Path, update: int, project: str | None, name: str) -> Self:
        """Goes on after ``update``; ``project`` of Weights & Biases, where a run of this name goes on too.

        Raises:
            InputError: Weights & Biases is asked for and not installed.
        """
        from torch.utils.tensorboard import SummaryWriter

        tracker = _tracker(project, name)
        path = folder / FILE
        kept = [line for line in read(path) if line["step"] <= update]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
        return cls(path, SummaryWriter(str(folder / "tensorboard"), purge_step=update + 1), tracker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.board.close()
        if self.tracker is not None:
            self.tracker.finish()

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """Appends a line; values that are None are left out.

        Raises:
            StorageError: it cannot be written.
        """
        known = {name: value for name, value in values.items() if value is not None}
        with storage_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **known}) + "\n")
        for key, value in known.items():
            self.board.add_scalar(key, value, step)
        self.board.flush()  # or a killed job would go on from a checkpoint after lines that are in the file only
        if self.tracker is not None:
            self.tracker.log(known, step=step)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last one that was cut off by a crash is left out."""
    return list(_lines(path)) if path.exists() else []


def require_tracker(project: str | None) -> None:
    """Raises InputError where Weights & Biases is asked for and not installed."""
    from importlib.util import find_spec

    if project is not None and find_spec("wandb") is None:
        raise InputError(f"trainer: wandb {project!r}: wandb is not installed; pip install wandb, or leave the key out")


def _tracker(project: str | None, name: str) -> Any:
    require_tracker(project)
    if project is None:
        return None
    import wandb  # type: ignore[import-not-found]

    return wandb.init(project=project, name=name, id=name, resume="allow")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            return
        if isinstance(found, dict) and "step" in found:
            yield found
