"""Training data of a job: megatron-core's own data sets over its token files, and what can be known of them before.

Which sample an update sees depends on its number alone, so that a job that goes on sees what it would have seen. The
validation files are a split of their own.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from quadmix_plugin.atomic import storage_errors
from quadmix_plugin.errors import InputError
from quadmix_plugin.megatron import TokenFile, check_tokens
from quadmix_plugin.parquet import read_parquet
from quadmix_plugin.proxy.megatron_model import quiet_import
from quadmix_plugin.schema import DOC_ID

if TYPE_CHECKING:
    import torch

    from quadmix_plugin.pretraining.job import PretrainJob

_CHECKED = 1 << 20  # ids looked at before training, at least one stretch of every file
_STRETCH = 2048


@dataclass(frozen=True)
class _Tokenizer:
    """What megatron-core's data sets ask of a tokenizer; the ids are in the files already."""

    vocab_size: int
    eod: int
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """Part of the name of the cached indices."""
        return {"class": "quadmix", "vocab_size": self.vocab_size, "eod": self.eod}


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Samples [context + 1] of a job, by their number; ``validation`` is None where its file is shorter than one.

    ``documents``: paths of the tables that name the documents of each token file; ``entropy`` (nats) of single ids.
    """

    train: Any
    validation: Any
    documents: tuple[str, ...]
    batch_size: int
    entropy: float

    @classmethod
    def open(cls, job: "PretrainJob", context: int, batch_size: int, updates: int) -> Self:
        """Looks at the files, then builds the indices of the data sets; all processes of the group call it.

        Raises:
            InputError: files that are damaged, empty, constant, or of another tokenizer; no index is built then.
            StorageError: the indices cannot be written.
        """
        files = _check_files(job)
        entropy = check_tokens(_sample(files), job.vocabulary, f"{job.selector}: training data").entropy
        whole = _check_file(job.validation_tokens, job).n_tokens > context
        with quiet_import():
            from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
        config = GPTDatasetConfig(
            random_seed=job.seed % (1 << 31),
            sequence_length=context,
            blend_per_split=[
                (list(job.prefixes), [float(each.n_tokens) for each in files] if len(files) > 1 else None),
                ([job.validation_tokens], None) if whole else None,
                None,
            ],
            path_to_cache=str(job.place / "indices"),
            tokenizer=_Tokenizer(job.vocabulary, job.eod),  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        train, validation = _build(config, updates * batch_size, job.place / "indices")
        return cls(train, validation if whole else None, job.documents, batch_size, entropy)

    def batches(
        self, first: int, end: int, rank: int, processes: int, device: "torch.device"
    ) -> Iterator["torch.Tensor"]:
        """The part of process ``rank`` in the batches of updates ``first`` to ``end``, int64 [b, context + 1]."""
        from torch.utils.data import DataLoader

        numbers = _Numbers(first, end, self.batch_size, self.batch_size // processes, rank)
        on_gpu = device.type == "cuda"
        samples: Any = _Samples(self.train)
        loader = DataLoader(samples, batch_sampler=numbers, num_workers=2 if on_gpu else 0, pin_memory=on_gpu)
        return (batch.to(device, non_blocking=True) for batch in loader)

    def validation_batches(
        self, size: int, rank: int, processes: int, device: "torch.device"
    ) -> Iterator["torch.Tensor"]:
        """The part of process ``rank`` in the whole validation split, ``size`` samples at a time."""
        import torch

        mine = range(rank, len(self.validation), processes)
        for start in range(0, len(mine), size):
            yield torch.stack([_ids(self.validation[i]) for i in mine[start : start + size]]).to(device)

    def documents_of(self, update: int) -> list[Any]:
        """The ids of the documents in the batch of an update, each once, in their order."""
        found: dict[Any, None] = {}
        tables: dict[int, Any] = {}
        for number in range(update * self.batch_size, (update + 1) * self.batch_size):
            file, sample = 0, number
            part = self.train
            if hasattr(part, "datasets"):
                file, sample = int(part.dataset_index[number]), int(part.dataset_sample_index[number])
                part = part.datasets[file]
            positions = part._query_document_sample_shuffle_indices(sample)[1]
            if file not in tables:
                tables[file] = read_parquet(self.documents[file], [DOC_ID])[DOC_ID]
            found |= dict.fromkeys(tables[file].take([int(i) for i in positions]).to_pylist())
        return list(found)


@dataclass(frozen=True)
class _Numbers:
    """The samples of process ``rank`` in each batch, made as they are needed: a long training has billions."""

    first: int
    end: int
    batch_size: int
    share: int
    rank: int

    def __len__(self) -> int:
        return self.end - self.first

    def __iter__(self) -> Iterator[list[int]]:
        for update in range(self.first, self.end):
            begin = update * self.batch_size + self.rank * self.share
            yield list(range(begin, begin + self.share))


@dataclass(frozen=True)
class _Samples:
    """The samples of a data set as plain tensors [context + 1]."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> "torch.Tensor":
        return _ids(self.source[i])


def _ids(item: dict[str, Any]) -> "torch.Tensor":
    """Inputs and the last target of a sample."""
    import torch

    return torch.cat([item["tokens"], item["labels"][-1:]])


def _build(config: Any, samples: int, indices: Path) -> tuple[Any, Any]:
    """Both data sets, by new indices: those that a killed process left may be cut off, or of files that were others."""
    import torch

    with quiet_import():
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(indices, ignore_errors=True)
    torch.distributed.barrier()
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, None, None], lambda: True, config)  # type: ignore[arg-type]
    with storage_errors(indices):
        try:
            train, validation, _ = builder.build()
        except Exception as error:  # megatron-core wraps it
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise
    return train, validation


def _check_files(job: "PretrainJob") -> list[TokenFile]:
    """The training files; raises as ``TrainingData.open``."""
    if not job.prefixes:
        raise InputError(f"{job.selector}: no token files; the selection is empty, so raise its budget")
    return [_check_file(prefix, job) for prefix in job.prefixes]


def _check_file(prefix: str, job: "PretrainJob") -> TokenFile:
    file = TokenFile.open(Path(prefix))
    if not file.n_tokens:
        raise InputError(f"{prefix}.bin: no tokens; export the selection again")
    with quiet_import():
        from megatron.core.datasets.indexed_dataset import DType
    wanted = np.dtype(DType.optimal_dtype(job.vocabulary))
    again = "export again with the tokenizer of this recipe"
    if file.dtype != wanted:
        raise InputError(
            f"{prefix}.bin: ids of {file.dtype}, a vocabulary of {job.vocabulary:,} takes {wanted}; {again}"
        )
    last = int(file.document(0)[-1])
    if last != job.eod:
        raise InputError(
            f"{prefix}.bin: its first document ends with id {last}, this tokenizer's end of a document is {job.eod}; "
            f"{again}"
        )
    sample = _sample([file])
    if sample.min() < 0 or sample.max() >= job.vocabulary:
        raise InputError(
            f"{prefix}.bin: ids from {sample.min()} to {sample.max()}, the vocabulary has {job.vocabulary:,}; {again}"
        )
    return file


def _sample(files: Sequence[TokenFile]) -> NDArray[Any]:
    """Evenly spaced stretches of ids, which touch far less of a disk than single ones."""
    every = _STRETCH * max(1, sum(each.n_tokens for each in files) // _CHECKED)
    return np.concatenate([each.tokens[at : at + _STRETCH] for each in files for at in range(0, each.n_tokens, every)])
