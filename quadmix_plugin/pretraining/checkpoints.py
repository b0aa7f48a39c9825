"""The checkpoints of a job: written beside the last ones and then renamed, checked by digests before they are read.

One holds the model, the optimizer and how far training has come. A damaged one is passed over for the one before it;
one of another model is refused.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quadmix_plugin.atomic import sha256_file, storage_errors, write_json
from quadmix_plugin.errors import InputError
from quadmix_plugin.proxy.megatron_checkpoint import load_state, save_state
from quadmix_plugin.store import content_key

if TYPE_CHECKING:
    import torch

    from quadmix_plugin.proxy.megatron_learner import GPTLearner

logger = logging.getLogger(__name__)

_DIGESTS = "quadmix.json"


@dataclass
class Progress:
    """How far training has come: updates, and the losses since the last line of metrics."""

    update: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a folder; ``identity`` is what a model must share with them to go on."""

    folder: Path
    identity: dict[str, Any]
    keep: int
    device: "torch.device"
    rank: int = 0

    def save(self, learner: "GPTLearner", progress: Progress) -> None:
        """Writes ``step-<update>`` and removes those that are no longer kept; all processes of the group call it.

        Raises:
            StorageError: it cannot be written; those that are there stay.
        """
        import torch

        final = self.folder / f"step-{progress.update:09d}"
        temporary = self.folder / f".{final.name}.tmp"
        with storage_errors(final):
            if self.rank == 0:
                for left in (temporary, final):
                    shutil.rmtree(left, ignore_errors=True)
                temporary.mkdir(parents=True)
            torch.distributed.barrier()
            try:
                save_state(learner.state(), temporary, self.device)
                if self.rank == 0:
                    self._publish(temporary, final, progress)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            torch.distributed.barrier()

    def resume(self, learner: "GPTLearner") -> Progress:
        """Loads the last whole checkpoint into ``learner``; progress 0 where there is none.

        Raises:
            InputError: it is of another model, of other data or of another schedule.
        """
        for folder in self._finished():
            content = _whole(folder)
            if content is None:
                logger.warning("%s: damaged, so the checkpoint before it is taken", folder)
                continue
            self._refuse_other(folder, content["identity"])
            learner.load(load_state(learner.state(loading=True), folder))
            logger.info("going on from %s", folder)
            return Progress(**content["progress"])
        if any(self._finished()):
            logger.warning("%s: no whole checkpoint, so training begins anew", self.folder)
        return Progress()

    def _publish(self, temporary: Path, final: Path, progress: Progress) -> None:
        digests = {path.name: sha256_file(path) for path in sorted(temporary.iterdir())}
        content = {"identity": self.identity, "progress": asdict(progress), "files": digests}
        write_json(temporary / _DIGESTS, {**content, "sha256": content_key(content)})
        os.replace(temporary, final)
        later = [path for path in self._finished() if path.name > final.name]  # damaged, for they were passed over
        for old in (*later, *list(self._finished())[len(later) + self.keep :]):
            shutil.rmtree(old)

    def _finished(self) -> Iterator[Path]:
        """The last one first."""
        return iter(sorted(self.folder.glob("step-*"), reverse=True))

    def _refuse_other(self, folder: Path, there: dict[str, Any]) -> None:
        differing = [name for name in {**there, **self.identity} if there.get(name) != self.identity.get(name)]
        if differing:
            said = "; ".join(
                f"{name}: {there.get(name)!r} there, {self.identity.get(name)!r} here" for name in differing
            )
            raise InputError(
                f"{folder}: a checkpoint of another model ({said}); give the former settings back, or remove "
                f"{folder.parent}"
            )


def _whole(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself, or None where a file of it is missing or is not what was written."""
    try:
        content = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        said = content.pop("sha256")
        if content_key(content) == said and all(sha256_file(folder / a) == b for a, b in content["files"].items()):
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None
