"""Benchmarks over one's own files, without a network: JSON Lines or Parquet rows as a task of lm-evaluation-harness.

The rows are read and checked here and handed to the harness in memory, so that nothing is cached anywhere.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from quadmix_plugin.corpus import list_files, read_records
from quadmix_plugin.errors import InputError

Kind = Literal["multiple_choice", "bits_per_byte", "exact_match"]

_NEW_TOKENS = 64  # of an answer that is generated


@dataclass(frozen=True)
class LocalTask:
    """One entry of ``evaluate.local``; the columns that its kind reads. ``shots``: examples before each question."""

    name: str
    paths: tuple[str, ...]
    kind: Kind | None = None
    prompt: str | None = "prompt"
    choices: str = "choices"
    answer: str = "answer"
    response: str = "response"
    mask_prompt: bool = True
    delimiter: str = " "
    shots: int | None = None

    @property
    def place(self) -> str:
        """Where the recipe has it."""
        return f"evaluate.local.{self.name}"


@dataclass(frozen=True)
class Questions:
    """The rows of a local task as the harness takes them, and how many were dropped for which reason."""

    kind: Kind
    rows: list[dict[str, Any]]
    dropped: dict[str, int] = field(default_factory=dict)


def read_questions(task: LocalTask) -> Questions:
    """All usable rows. A row without a question, without two choices, or without an answer is dropped and counted.

    Rows of ``multiple_choice`` have prompt, choices, answer (an index from 0); of the other kinds prompt, response.

    Raises:
        InputError: no such file or column, an empty file, a value of another type, an answer that is not the index
            of a choice, no usable row, or fewer rows than the examples before a question need.
    """
    files = list_files(list(task.paths), f"{task.place}.path")
    records = [(f"{file.path}: row {i}", record) for file in files for i, record in read_records(file)]
    columns = dict.fromkeys(name for _, record in records for name in record)
    kind: Kind = task.kind or ("multiple_choice" if task.choices in columns else "bits_per_byte")
    wanted = _wanted(task, kind, columns)
    dropped: Counter[str] = Counter()
    rows = []
    for place, record in records:
        row = {key: record.get(name) for key, name in wanted.items()}
        if (reason := _lack(row)) is not None:
            dropped[reason] += 1
        else:
            rows.append(_row(row, kind, task, place))
    if len(rows) <= (task.shots or 0):
        lacking = ", ".join(f"{n:,} with {reason}" for reason, n in dropped.items())
        raise InputError(
            f"{task.place}: {len(rows):,} usable rows{f' ({lacking})' if lacking else ''} in {', '.join(task.paths)}; "
            f"give at least {(task.shots or 0) + 1:,}" + (", or lower fewshot" if task.shots else "")
        )
    return Questions(kind, rows, dict(dropped))


def task_config(task: LocalTask, questions: Questions) -> dict[str, Any]:
    """The configuration from which the harness makes the task; nothing in it is a template of the user's text."""
    import datasets

    data = datasets.Dataset.from_list(questions.rows)
    shots = 0 if questions.kind == "bits_per_byte" and not _is_conditional(task) else task.shots or 0
    return {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": data},
        "test_split": "test",
        "fewshot_split": "test",  # the harness leaves out the question itself
        "num_fewshot": shots,
        **{"multiple_choice": _multiple_choice, "bits_per_byte": _bits_per_byte, "exact_match": _exact_match}[
            questions.kind
        ](task),
    }


def _multiple_choice(task: LocalTask) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": task.delimiter,
        "metric_list": [_metric(name, "mean", True) for name in ("acc", "acc_norm")],
    }


def _exact_match(task: LocalTask) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "response",
        "target_delimiter": task.delimiter,
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": _NEW_TOKENS},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{**_metric("exact_match", "mean", True), "ignore_case": True}],
    }


def _bits_per_byte(task: LocalTask) -> dict[str, Any]:
    """The response given the prompt, or the whole text from its first token on."""
    conditional = _is_conditional(task)
    metrics = {"bits_per_byte": "bits_per_byte", "bits_per_byte_stderr": _stderr_of_bits}
    metrics |= dict.fromkeys(("byte_perplexity", "word_perplexity"), "weighted_perplexity")
    return {
        "output_type": "loglikelihood" if conditional else "loglikelihood_rolling",
        "doc_to_text": "prompt" if conditional else "",
        "doc_to_target": "response",
        "target_delimiter": "",  # it is a part of the text that is predicted
        "process_results": _likelihood,
        "metric_list": [_metric(name, aggregation, False) for name, aggregation in metrics.items()],
    }


def _is_conditional(task: LocalTask) -> bool:
    return task.mask_prompt and task.prompt is not None


def _metric(name: str, aggregation: str | Callable, higher_is_better: bool) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


def _likelihood(row: dict[str, Any], results: Sequence[Any]) -> dict[str, tuple[float, int]]:
    """Natural log-likelihood of a text beside its bytes or words; the harness divides their sums."""
    found = results[0]
    likelihood = float(found[0] if isinstance(found, tuple | list) else found)
    n_bytes, words = len(row["response"].encode()), len(row["response"].split())
    return {
        "bits_per_byte": (likelihood, n_bytes),
        "bits_per_byte_stderr": (likelihood, n_bytes),  # after the metric, whose error the harness leaves open
        "byte_perplexity": (likelihood, n_bytes),
        "word_perplexity": (likelihood, words),
    }


def _stderr_of_bits(items: Sequence[tuple[float, int]]) -> float:
    """Standard error of the ratio of two sums over rows, by the delta method; NaN of a single row."""
    n, total = len(items), sum(n_bytes for _, n_bytes in items)
    ratio = sum(likelihood for likelihood, _ in items) / total
    squares = sum((likelihood - ratio * n_bytes) ** 2 for likelihood, n_bytes in items)
    return math.sqrt(squares * n / (n - 1)) / total / math.log(2) if n > 1 else math.nan


def _wanted(task: LocalTask, kind: Kind, columns: Iterable[str]) -> dict[str, str]:
    """What the kind reads → the column that the recipe names for it, all of which must be there."""
    wanted = {"prompt": task.prompt} if task.prompt is not None else {}
    wanted |= {"choices": task.choices, "answer": task.answer} if kind == "multiple_choice" else {}
    wanted |= {"response": task.response} if kind != "multiple_choice" else {}
    for key, name in wanted.items():
        if name not in columns:
            raise InputError(
                f"{task.place}.{key}: no column {name!r} in {', '.join(task.paths)}; found "
                f"{', '.join(columns) or 'no rows'}; name the column"
                + (", or set prompt: null where there is none" if key == "prompt" else "")
            )
    return wanted


def _lack(row: dict[str, Any]) -> str | None:
    """Why a row is of no use; None where it is."""
    for key, value in row.items():
        if value is None or value == [] or (isinstance(value, str) and not value.strip()):
            return f"no {key}"
    return "one choice" if isinstance(row.get("choices"), list) and len(row["choices"]) == 1 else None


def _row(row: dict[str, Any], kind: Kind, task: LocalTask, place: str) -> dict[str, Any]:
    """One row whose values are all there."""
    prompt = _text(row.get("prompt", ""), f"{place}: {task.prompt!r}")
    if kind == "multiple_choice":
        return {"prompt": prompt, "choices": _choices(row, task, place), "answer": _answer(row, task, place)}
    column = f"{place}: {task.response!r}"
    if kind == "exact_match":
        accepted = row["response"] if isinstance(row["response"], list) else [row["response"]]
        return {"prompt": prompt, "response": [_answer_text(each, column).strip() for each in accepted]}
    response = _text(row["response"], column)
    if task.prompt is None:
        return {"prompt": "", "response": response}
    if task.mask_prompt:
        return {"prompt": prompt, "response": task.delimiter + response}
    return {"prompt": "", "response": prompt + task.delimiter + response}


def _choices(row: dict[str, Any], task: LocalTask, place: str) -> list[str]:
    given = row["choices"]
    if not isinstance(given, list):
        raise InputError(f"{place}: {task.choices!r} is {given!r:.60}; give a list of texts")
    texts = [_text(each, f"{place}: {task.choices!r}: choice {i}") for i, each in enumerate(given)]
    if not all(texts):
        raise InputError(f"{place}: {task.choices!r}: choice {texts.index('')} is empty; give a text")
    return texts


def _answer(row: dict[str, Any], task: LocalTask, place: str) -> int:
    answer, n = row["answer"], len(row["choices"])
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise InputError(f"{place}: {task.answer!r} is {answer!r:.60}; give the index of the right choice, from 0")
    if not 0 <= answer < n:
        raise InputError(f"{place}: {task.answer!r} is {answer}, and there are {n} choices; give 0 to {n - 1}")
    return answer


def _answer_text(value: Any, where: str) -> str:
    """Numbers are accepted as answers, as they are written."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else _text(value, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} is {value!r:.60}; give a text")
    return value
