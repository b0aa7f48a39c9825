"""``quadmix init``: a starter recipe for somebody's own data, its columns looked up where the data is given."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from quadmix_plugin.atomic import atomic_path
from quadmix_plugin.corpus import CorpusFile, list_files, read_json_lines
from quadmix_plugin.credentials import refuse_credentials
from quadmix_plugin.errors import InputError, UsageError

_ID_NAMES = ("doc_id", "id", "document_id", "uuid", "uid")
_TEXT_NAMES = ("text", "content", "raw_content", "document", "body")
_PROMPT_NAMES = ("prompt", "question", "instruction", "input", "query")
_RESPONSE_NAMES = ("response", "answer", "output", "completion", "target")
_TASK_NAMES = ("task", "dataset", "category", "subset")


def write_starter(
    folder: Path, corpus: str | None, validation: str | None, models: str | None
) -> tuple[Path, list[str]]:
    """Writes ``recipe.yaml`` into ``folder``; returns its path and what the user should look at.

    Raises:
        UsageError: there is a recipe already.
        InputError: the corpus or validation files cannot be read.
        RecipeError: an address with credentials in it.
    """
    path = folder / "recipe.yaml"
    if path.exists():
        raise UsageError(f"{path}: there already; give another folder")
    refuse_credentials({"corpus": corpus, "validation": validation, "models": models}, "quadmix init")
    notes: list[str] = []
    values: dict[str, str | float | None] = {
        "corpus_path": _absolute(corpus) or "data/corpus.parquet",
        "validation_path": _absolute(validation) or "data/validation.jsonl",
        "models": _absolute(models) or "models",
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", folder.absolute().name).lstrip(".")[:64] or "my-corpus",
        "merge_small": 0,
        "omega_max": 0.5,
    }
    values |= _corpus_columns(corpus, notes)
    values |= _validation_columns(validation, notes)
    if models and not (Path(models) / "tokenizer").is_dir():
        notes.append(f"models: no folder {models}/tokenizer; edit the paths under tokenizer, domain and scorers")
    if not models:
        notes.append(
            "models: put the folders tokenizer/, domain/ and one per scorer under models/, or edit their paths"
        )
    text = (files("quadmix_plugin.pipelines") / "recipes" / "starter.yaml").read_text(encoding="utf-8")
    text = re.sub(r"@(\w+)@(/[\w-]+)?", lambda found: _scalar(values[found[1]], found[2] or ""), text)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path, notes


def _absolute(path: str | None) -> str | None:
    return path if path is None or "://" in path else str(Path(path).absolute())


def _scalar(value: str | float | None, below: str) -> str:
    """A value as YAML, in quotes where it needs them: paths and columns are other people's."""
    content = f"{value}{below}" if isinstance(value, str) else value
    return yaml.safe_dump(content, width=1 << 20, allow_unicode=True).removesuffix("...\n").strip()


def _corpus_columns(corpus: str | None, notes: list[str]) -> dict[str, str | None]:
    if corpus is None:
        notes.append("corpus: set path, id and text")
        return {"corpus_id": None, "corpus_text": "text"}
    columns = _columns(list_files(corpus)[0])
    text = _pick(columns, _TEXT_NAMES)
    if text is None:
        notes.append(f"corpus.text: none of {', '.join(columns)} is a usual name for the text; set it")
    found_id = _pick(columns, _ID_NAMES)
    notes.append(f"corpus: text from {text or 'a column that you set'}, ids from {found_id or 'file name and row'}")
    return {"corpus_id": found_id, "corpus_text": text or "text"}


def _validation_columns(validation: str | None, notes: list[str]) -> dict[str, str | None]:
    columns = [] if validation is None else _columns(list_files(validation, "validation")[0])
    if validation is None:
        notes.append("validation: set path and the columns of prompt, response and task")
    picked = {
        "validation_prompt": _pick(columns, _PROMPT_NAMES),
        "validation_response": _pick(columns, _RESPONSE_NAMES),
        "validation_task": _pick(columns, _TASK_NAMES),
    }
    for key in ("validation_prompt", "validation_response"):
        if columns and picked[key] is None:
            notes.append(f"{key.replace('_', '.')}: none of {', '.join(columns)} is a usual name for it; set it")
    defaults = {"validation_prompt": "prompt", "validation_response": "response"}
    return {key: value or defaults.get(key, None if columns else "task") for key, value in picked.items()}


def _columns(file: CorpusFile) -> list[str]:
    if file.is_parquet:
        try:
            with fsspec.open(file.path, "rb") as stream:
                return list(pq.ParquetFile(stream).schema_arrow.names)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file.path}: cannot be read as Parquet ({error}); write it again") from error
    first: dict[str, Any] = next((content for _, content in read_json_lines(file)), {})
    return list(first)


def _pick(columns: list[str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in columns), None)
