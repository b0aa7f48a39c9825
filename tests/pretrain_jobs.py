"""A job of pretraining on real text that takes a second or two, and what tests do with it."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from quadmix_plugin import models
from quadmix_plugin.corpus import list_files
from quadmix_plugin.megatron import write_documents
from quadmix_plugin.pretraining.job import PretrainJob
from quadmix_plugin.pretraining.metrics import FILE, read
from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer
from quadmix_plugin.proxy.validation import choose_rows, read_rows, tokenise_rows

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
TOKENIZER = QUICKSTART / "models" / "tokenizer"
VOCABULARY, EOD, CONTEXT = 4096, 0, 64
SHAPE = {"layers": 2, "width": 32, "ffn": 64, "heads": 2, "context": CONTEXT}
OPTIONS = {
    "shape_options": SHAPE,
    "device": "cpu",
    "learning_rate": 1e-2,
    "batch_size": 4,
    "save_every": 10,
    "log_every": 4,
    "eval_every": 20,
}
PER_UPDATE = OPTIONS["batch_size"] * CONTEXT
ROWS = (100, 220, 60)  # documents of the training files
TIMING = ("tokens_per_second", "mfu", "memory_gib")


@dataclasses.dataclass(frozen=True)
class Data:
    """Token files of the quickstart corpus: ``train-0`` to ``train-2`` and ``validation``, and the questions."""

    folder: Path

    @property
    def prefixes(self) -> list[Path]:
        return [self.folder / f"train-{i}" for i in range(len(ROWS))]

    @property
    def validation(self) -> Path:
        return self.folder / "validation"

    def job(self, root: Path, updates: int = 40, **changes: Any) -> PretrainJob:
        """A job of so many updates; ``options`` among the changes are added to ``OPTIONS``."""
        given = {
            "root": str(root),
            "step": "pretrain",
            "key": "key",
            "selector": "quadmix",
            "seed": 3,
            "prefixes": tuple(map(str, self.prefixes)),
            "documents": tuple(f"{prefix}.documents.parquet" for prefix in self.prefixes),
            "tokens": updates * PER_UPDATE,
            "selected_tokens": 200_000,
            "unique_tokens": 150_000,
            "validation_tokens": str(self.validation),
            "validation": str(self.folder / "validation.parquet"),
            "vocabulary": VOCABULARY,
            "eod": EOD,
            "tokenizer": str(TOKENIZER),
            "trainer": "megatron",
            "part": "pretrain/parts/quadmix-3.json",
            "model": "pretrain/models/quadmix-3",
            "folder": "pretrain/training/quadmix-3",
        }
        changes["options"] = {**OPTIONS, **changes.get("options", {})}
        return PretrainJob(**{**given, **changes})


def write_data(folder: Path) -> Data:
    tokenizer = models.load_tokenizer(str(TOKENIZER))
    corpus = pq.read_table(QUICKSTART / "corpus.parquet", columns=["doc_id", "text"])
    data, first = Data(folder), 0
    for prefix, rows in zip([*data.prefixes, data.validation], [*ROWS, 8], strict=True):
        part = corpus.slice(first, rows)
        first += rows
        encodings = tokenizer.encode_batch(part["text"].to_pylist(), add_special_tokens=False)
        write_tokens(prefix, [encoding.ids for encoding in encodings], part["doc_id"].to_pylist())
    rows = choose_rows(read_rows(list_files(str(QUICKSTART / "validation.jsonl")), "prompt", "response", "task"), 12)
    pq.write_table(tokenise_rows(rows, tokenizer, EOD, CONTEXT), folder / "validation.parquet")
    return data


def write_tokens(prefix: Path, documents: Sequence[Any], doc_ids: Sequence[str], vocabulary: int = VOCABULARY) -> None:
    """One token file with the table that names its documents."""
    write_documents(documents, Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), vocabulary, EOD)
    table = {"doc_id": doc_ids, "copy": [0] * len(doc_ids), "tokens": [len(ids) + 1 for ids in documents]}
    pq.write_table(pa.table(table), f"{prefix}.documents.parquet")


def train(job: PretrainJob) -> None:
    """In this process."""
    MegatronTrainer(**job.options).pretrain(job)


def lines(job: PretrainJob) -> list[dict[str, Any]]:
    """What the metrics say, but for the clock."""
    return [{key: value for key, value in line.items() if key not in TIMING} for line in read(job.place / FILE)]


def losses(job: PretrainJob) -> dict[str, Any]:
    """The result, but for the clock."""
    part = job.results.read_json(job.part)
    return {key: value for key, value in part.items() if key != "seconds"}


def outcome(job: PretrainJob) -> dict[str, Any]:
    """All that must be the same however often training was interrupted."""
    weights = job.results.read_path(f"{job.model}/model.safetensors").read_bytes()
    return {"lines": lines(job), "losses": losses(job), "weights": weights}


def checkpoints(job: PretrainJob) -> list[int]:
    """The updates of those that are there."""
    return sorted(int(path.name.split("-")[1]) for path in (job.place / "checkpoints").glob("step-*"))


def environment(**changes: str) -> dict[str, str]:
    """Of a child: tests are on its path, and it uses no more than one core."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}
