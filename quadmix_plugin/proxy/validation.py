"""Validation sets: questions with answers, tokenised once, and a model's loss on the answers.

Every row belongs to ``search`` or ``report`` by a hash of its content: parameters are searched on the one half and
final models compared on the other. Nothing here trains.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from quadmix_plugin.corpus import CorpusFile, read_records
from quadmix_plugin.errors import InputError
from quadmix_plugin.parquet import read_parquet

if TYPE_CHECKING:
    from quadmix_plugin.proxy.model import Decoder

Part = Literal["search", "report"]

_TOKENS_PER_BATCH = 4096
_LOGITS_PER_CHUNK = 1 << 21


@dataclass(frozen=True)
class Row:
    """A question and its answer, of one task."""

    task: str
    prompt: str
    response: str

    @property
    def content_hash(self) -> int:
        """A 64-bit hash of all three."""
        return xxhash.xxh64_intdigest(json.dumps([self.task, self.prompt, self.response]).encode())

    @property
    def part(self) -> Part:
        """The half that the row belongs to, by its content alone."""
        return "search" if self.content_hash >> 63 else "report"


@dataclass(frozen=True, eq=False)
class ValidationSet:
    """The rows of one task as ids, shortest first.

    ``ids`` int64 [rows, longest], padded with 0; ``lengths`` and ``starts`` int64 [rows]: positions ``starts`` to
    ``lengths`` - 1 are predicted. ``truncated``: rows that were cut to the context; ``n_bytes``: UTF-8 bytes of the
    text that is predicted, for losses in bits per byte, which tokenizers share (0: not known).
    """

    task: str
    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64]
    truncated: int = 0
    n_bytes: int = 0

    @property
    def n_targets(self) -> int:
        """Number of tokens that the loss is the mean of."""
        return int((self.lengths - self.starts).sum())


def to_row(record: dict[str, Any], prompt: str, response: str, task: str | None, default_task: str, place: str) -> Row:
    """One record of a file as a row; ``task`` None gives it ``default_task``.

    Raises:
        InputError: a missing key or an empty response; ``place`` says where.
    """
    wanted = [prompt, response] + ([task] if task else [])
    for key in wanted:
        if not isinstance(record.get(key), str):
            raise InputError(
                f"{place}: no text under {key!r}; found {', '.join(sorted(record))}; name the columns under validation "
                f"in the recipe"
            )
    if not record[response].strip():
        raise InputError(f"{place}: {response!r} is empty; remove rows without a response")
    return Row(record[task] if task else default_task, record[prompt], record[response])


def read_rows(files: Sequence[CorpusFile], prompt: str, response: str, task: str | None) -> list[Row]:
    """All rows of JSON Lines or Parquet files; without a ``task`` column each file is one task, named after it.

    Raises:
        InputError: as ``to_row`` and ``read_records``; names file and line.
    """
    rows = []
    for file in files:
        name = Path(file.name).name.split(".")[0]
        for i, record in read_records(file):
            rows.append(to_row(record, prompt, response, task, name, f"{file.path}: row {i}"))
    return rows


def choose_rows(rows: Sequence[Row], rows_per_task: int | None) -> list[Row]:
    """At most so many rows of each task and part, those with the smallest content hash; order kept."""
    if rows_per_task is None:
        return list(rows)
    groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((row.task, row.part), []).append((row.content_hash, i))
    half = -(-rows_per_task // 2)
    kept = {i for group in groups.values() for _, i in sorted(group)[:half]}
    return [row for i, row in enumerate(rows) if i in kept]


def tokenise_rows(rows: Sequence[Row], tokenizer: Any, eod: int, context: int, mask_prompt: bool = True) -> pa.Table:
    """Rows as ids: end-of-document token, prompt, response; columns task, part, ids, start, truncated, bytes.

    Prompt and response are tokenised apart, with a space between them unless there is white space. A row longer than
    the context loses the beginning of its prompt, and what then remains too long the end of its response.

    Raises:
        InputError: no rows, or a response without tokens.
    """
    if not rows:
        raise InputError("validation: no rows; give a file with at least one question and answer")
    prompts = tokenizer.encode_batch([row.prompt for row in rows], add_special_tokens=False)
    responses = tokenizer.encode_batch([_joint(row) + row.response for row in rows], add_special_tokens=False)
    ids, starts, cut, n_bytes = [], [], [], []
    for row, prompt, response in zip(rows, prompts, responses, strict=True):
        if not response.ids:
            raise InputError(f"validation: task {row.task!r}: response {row.response!r} has no tokens; remove the row")
        answer = response.ids[:context]
        room = context - len(answer)
        question = prompt.ids[max(0, len(prompt.ids) - room) :]
        ids.append([eod, *question, *answer])
        starts.append(1 + len(question) if mask_prompt else 1)
        cut.append(len(question) + len(answer) < len(prompt.ids) + len(response.ids))
        text = _last(row.prompt, prompt, len(question)) if not mask_prompt else ""
        text += _first(_joint(row) + row.response, response, len(answer))
        n_bytes.append(len(text.encode()))
    columns = {
        "task": pa.array([row.task for row in rows], pa.string()),
        "part": pa.array([row.part for row in rows], pa.string()),
        "ids": pa.array(ids, pa.list_(pa.int32())),
        "start": pa.array(starts, pa.int32()),
        "truncated": pa.array(cut, pa.bool_()),
        "bytes": pa.array(n_bytes, pa.int32()),
    }
    return pa.table(columns)


def validation_sets(table: pa.Table, part: Part) -> list[ValidationSet]:
    """The sets of one part, by name of the task.

    Raises:
        InputError: a task without rows in this part.
    """
    sets = []
    frame = table.to_pandas()
    for task, rows in frame.groupby("task", sort=True):
        half = rows[rows["part"] == part]
        if half.empty:
            raise InputError(
                f"validation: task {task!r} has {len(rows)} rows, none of them in the part {part!r}; give it more rows"
            )
        lengths = half["ids"].map(len).to_numpy(dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        ids = np.zeros((len(half), int(lengths.max())), dtype=np.int64)
        for i, at in enumerate(order):
            ids[i, : lengths[at]] = half["ids"].iloc[at]
        starts = half["start"].to_numpy(dtype=np.int64)[order]
        facts = int(half["truncated"].sum()), int(half["bytes"].sum())
        sets.append(ValidationSet(str(task), ids, lengths[order], starts, *facts))
    if not sets:
        raise InputError("validation: no rows; give a file with at least one question and answer")
    return sets


def load_validation_sets(path: str | Path, part: Part) -> list[ValidationSet]:
    """The sets of one part from a Parquet file with the columns of ``tokenise_rows``."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; run the step that tokenises the validation rows first")
    return validation_sets(read_parquet(path), part)


def evaluate(model: "Decoder", rows: ValidationSet) -> float:
    """Mean loss in nats per predicted token, in float32; only predicted positions reach the output layer."""
    import torch
    from torch.nn import functional

    weight = model.lm_head.weight
    chunk = max(_LOGITS_PER_CHUNK // weight.shape[0], 1)
    total = 0.0
    with torch.inference_mode():
        for batch in _batches(rows):
            width = int(rows.lengths[batch][-1])
            ids = torch.from_numpy(rows.ids[batch, :width]).to(weight.device)
            positions = np.arange(1, width)
            predicted = (positions >= rows.starts[batch, None]) & (positions < rows.lengths[batch, None])
            mask = torch.from_numpy(predicted).to(weight.device)
            states, targets = model.hidden(ids[:, :-1])[mask].float(), ids[:, 1:][mask]
            for start in range(0, targets.numel(), chunk):
                logits = states[start : start + chunk] @ weight.t()
                total += float(functional.cross_entropy(logits, targets[start : start + chunk], reduction="sum"))
    return total / rows.n_targets


def _batches(rows: ValidationSet) -> Iterable[NDArray[np.int64]]:
    """Row numbers, shortest rows first, so that a batch holds little padding and few enough tokens."""
    first = 0
    for i in range(1, rows.lengths.size + 1):
        if i == rows.lengths.size or (i + 1 - first) * rows.lengths[i] > _TOKENS_PER_BATCH:
            yield np.arange(first, i)
            first = i


def _joint(row: Row) -> str:
    touching = row.prompt and not row.prompt[-1].isspace() and not row.response[0].isspace()
    return " " if touching else ""


def _first(text: str, encoding: Any, kept: int) -> str:
    """The text of the first ``kept`` tokens."""
    return text if kept == len(encoding.ids) else text[: encoding.offsets[kept - 1][1]]


def _last(text: str, encoding: Any, kept: int) -> str:
    """The text of the last ``kept`` tokens."""
    if kept == len(encoding.ids):
        return text
    return text[encoding.offsets[-kept - 1][1] :] if kept else ""  # a token's own beginning may leave out its space
