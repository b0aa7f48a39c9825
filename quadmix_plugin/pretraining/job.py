"""What is to be trained, as plain values that travel to other processes and machines as JSON."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from quadmix_plugin.atomic import atomic_path
from quadmix_plugin.errors import InputError
from quadmix_plugin.store import Step


@dataclass(frozen=True)
class PretrainJob:
    """One model: which tokens, which trainer, and where everything goes.

    Args:
        root, step, key: the run directory and the step that results are entered in.
        url: of a run in an object store, whose work folder ``root`` is; checkpoints stay there.
        selector, seed: name of the selection; ``seed`` draws the initial weights and the order of the data.
        prefixes: token files of the selection, each ``<prefix>.bin`` and ``.idx``.
        documents: one Parquet file for each of them, with the ``doc_id`` of every document in the order of the file.
        tokens: training tokens.
        selected_tokens, unique_tokens: of the selection, with copies and without.
        validation_tokens: prefix of the token files that the validation loss is measured on.
        validation: Parquet file of ``tokenise_rows``; the loss on the answers of the part ``report`` is the result.
        vocabulary, eod: number of ids, and the one that ends a document.
        tokenizer: folder of the tokenizer, which goes with the model.
        trainer, options: a name of the group ``trainers`` and its options.
        part, model, folder: in the run directory: the result (JSON), the folder of the model in Hugging Face's Llama
            format, and the folder of checkpoints and metrics.
    """

    root: str
    step: str
    key: str
    selector: str
    seed: int
    prefixes: tuple[str, ...]
    documents: tuple[str, ...]
    tokens: int
    selected_tokens: int
    unique_tokens: int
    validation_tokens: str
    validation: str
    vocabulary: int
    eod: int
    tokenizer: str
    trainer: str
    part: str
    model: str
    folder: str
    options: dict[str, Any] = field(default_factory=dict)
    url: str | None = None

    @property
    def results(self) -> Step:
        """Where the results are entered."""
        return Step(Path(self.root), self.step, self.key, self.url)

    @property
    def place(self) -> Path:
        """The folder of checkpoints and metrics."""
        return Path(self.root) / self.folder

    def bring(self) -> None:
        """Fetches what is read from an object store, where it is not on this machine."""
        pairs = (*self.prefixes, self.validation_tokens)
        files = [f"{prefix}{suffix}" for prefix in pairs for suffix in (".bin", ".idx")]
        self.results.bring(*files, *self.documents, self.validation)

    def write(self) -> Path:
        """Writes the job into its folder; returns the path."""
        path = self.place / "job.json"
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Reads what ``write`` wrote.

        Raises:
            InputError: no such file, or it is no job.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            lists = {name: tuple(content[name]) for name in ("prefixes", "documents")}
            return cls(**{**content, **lists})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: no job of a run ({error}); give the job.json that a run has written") from error
