"""How often the training of a proxy was begun in one session, so that one which kills its process is given up.

A process that is killed can record nothing afterwards, so each attempt is written down before it begins. A session is
one command: what a killed command had begun does not count against its proxies.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from quadmix_plugin.atomic import storage_errors

_FOLDER = ".attempts"


@dataclass(frozen=True)
class Attempts:
    """The attempts of one session in a run directory, on a file system that all workers share."""

    root: Path
    session: str

    def begin(self, proxy: int) -> int:
        """Writes down one more attempt; returns how many there are now."""
        path = self.root / _FOLDER / self.session / str(proxy)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(".")
            return path.stat().st_size

    def clear(self) -> None:
        """Forgets the attempts of all sessions."""
        shutil.rmtree(self.root / _FOLDER, ignore_errors=True)
