"""What the fastText plug-ins share: options, finding the file, and the child process that runs it.

What the labels mean is each plug-in's own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quadmix_plugin import models
from quadmix_plugin.errors import InputError
from quadmix_plugin.fasttext_process import FastTextProcess, digest


@dataclass
class FastTextModel:
    """A supervised fastText model in a child process, which a damaged file may crash (``fasttext_process``).

    A file in which labels are exchanged is sound: only ``sha256`` tells. The digest of the file that was used is in the
    run's provenance.

    Args:
        model: a ``.bin`` or ``.ftz`` file, a folder that holds one ``.bin``, or a hub id with ``revision``.
        revision: the 40 hex digits of a commit on the hub.
        file: name of the file in the folder or on the hub, where there are several.
        sha256: digest that the file must have; fastText itself checks nothing when it loads.
    """

    model: str
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        models.check_source(self.model, self.revision)
        self._process: Any = None

    def __reduce__(self) -> tuple[Any, ...]:  # a copy has the options and no process
        return type(self), (self.model, self.revision, self.file, self.sha256)

    def download(self) -> None:
        """Fetches the file, once per machine."""
        model_path(self.model, self.revision, self.file)

    def facts(self) -> dict[str, Any]:
        """The file and its digest, for the run's provenance and to pin it."""
        path = model_path(self.model, self.revision, self.file)
        return {"model": self.model, "revision": self.revision, "file": path.name, "sha256": digest(path)}

    def check(self) -> None:
        """Loads the model for a moment, so that a fault shows before the first document.

        Raises:
            InputError: as ``setup``.
        """
        self.setup("cpu")
        self._process.close()
        self._process = None

    def setup(self, device: str) -> None:
        """Loads the model; ``device`` is of no consequence, fastText runs on the CPU.

        Raises:
            InputError: no such file, not a fastText model, damaged, another digest, or other labels than wanted.
        """
        path = model_path(self.model, self.revision, self.file)
        process = FastTextProcess(path, self.sha256)
        try:
            self.read_labels(path, process.labels)
        except InputError:
            process.close()
            raise
        self._process = process

    def read_labels(self, path: Path, labels: list[str]) -> None:
        """Takes the model's labels, or refuses them."""


def model_path(model: str, revision: str | None, file: str | None) -> Path:
    """The file that the options of a plug-in mean; fetches it into the hub's cache when ``model`` is a hub id.

    Raises:
        InputError: none or several in a folder, no ``file`` for a hub id, or the hub cannot be reached.
    """
    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir():
        found = [path / file] if file else sorted(path.glob("*.bin"))
        if len(found) != 1 or not found[0].is_file():
            names = ", ".join(p.name for p in found) or "no .bin"
            raise InputError(f"{path}: holds {names}; give file: the name of the fastText model")
        return found[0]
    return _fetched(model, revision, file)


def _fetched(model: str, revision: str | None, file: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    if not file:
        raise InputError(f"model {model!r}: give file: the name of the .bin on the hub")
    try:
        return Path(hf_hub_download(model, file, revision=revision))
    except Exception as error:  # the hub's client raises many kinds
        raise InputError(
            f"model {model!r}, {file} at {revision}: cannot be fetched ({type(error).__name__}: "
            f"{models.first_line(error)}); check the network, or download it and give its path"
        ) from error
