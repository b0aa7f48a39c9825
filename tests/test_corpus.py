"""The corpus check: whatever is wrong is found before any model is loaded, with file, row, value and remedy."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from quadmix_plugin.corpus import inspect, list_files
from quadmix_plugin.errors import InputError


def _parquet(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def _check(path: Path, **options: str | None) -> int:
    settings = {"text": "text", "id_field": "id", **options}
    return inspect(list_files(str(path)), **settings).documents  # type: ignore[arg-type]


def test_counts_rows_of_all_formats_in_a_folder(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", id=["1", "2"], text=["x", "y"])
    lines = "".join(json.dumps({"id": f"j{i}", "text": "z"}) + "\n" for i in range(3))
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.replace("j", "k").encode()))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines.replace("j", "l").encode()))
    (tmp_path / "_SUCCESS").write_text("")
    assert _check(tmp_path) == 11


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty file"),
        (b"not parquet at all", "cannot be read as Parquet"),
    ],
)
def test_unreadable_parquet_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        _check(path)
    assert str(path) in str(caught.value)


def test_truncated_parquet_is_named(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", id=[str(i) for i in range(1000)], text=["x" * 50] * 1000)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        _check(path)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('{"id": 1, "text": "a"}\n{"id": 2, text}\n', "line 2 is not JSON"),
        ('{"id": 1, "text": "a"}\n[1]\n', "line 2 holds list"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "doc_id: 1 ids occur more than once, such as 1"),
        ('{"id": 1, "text": "a"}\n{"id": 2, "text": null}\n', "line 2 has no text"),
        ('{"id": 1, "text": "a"}\n{"id": 2, "txt": "b"}\n', "line 2: no column 'text'; did you mean 'txt'?"),
        ('{"id": 1, "text": "a"}\n{"id": "2", "text": "b"}\n', "line 2: 'id' is '2'; ids must be all integers"),
        ('{"id": 1, "text": 5}\n', "line 1: 'text' is 5; the text must be a string"),
        ("\n\n", "no documents"),
    ],
)
def test_json_line_faults_name_the_line(tmp_path: Path, lines: str, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError) as caught:
        _check(path)
    assert expected in str(caught.value)


def test_latin1_json_lines_are_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"id": 1, "text": "é"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        _check(path)


def test_truncated_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": 1, "text": "a"}\n' * 1000)[:-12])
    with pytest.raises(InputError, match="cannot be read"):
        _check(path)


def test_parquet_column_faults_name_the_column(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", doc_id=["1"], content=["x"])
    with pytest.raises(InputError, match=r"no column 'text'.*found doc_id, content; set corpus.text"):
        _check(path)
    with pytest.raises(InputError, match=r"no column 'id'.*did you mean 'doc_id'"):
        _check(path, text="content")
    numbers = _parquet(tmp_path / "n.parquet", id=["1"], text=[5])
    with pytest.raises(InputError, match="column 'text' is int64"):
        _check(numbers)


def test_null_text_is_an_error_unless_dropped(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", id=["1", "2", "3"], text=["x", None, None])
    with pytest.raises(InputError, match="row 1 of row group 0 has no text \\(2 such rows"):
        _check(path)
    assert _check(path, invalid_rows="drop") == 3


def test_duplicate_ids_across_files_are_found(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", id=["1", "2"], text=["x", "y"])
    _parquet(tmp_path / "b.parquet", id=["2", "3"], text=["x", "y"])
    with pytest.raises(InputError, match="1 ids occur more than once, such as 2"):
        _check(tmp_path)


def test_ids_of_two_types_are_refused(tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", id=["1"], text=["x"])
    _parquet(tmp_path / "b.parquet", id=[2], text=["x"])
    with pytest.raises(InputError, match="use one type"):
        _check(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"corpus.path: .*no such file or folder"):
        list_files(str(tmp_path / "nope"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="not a corpus file"):
        list_files(str(tmp_path / "a.txt"))


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        _parquet(tmp_path / folder / "a.parquet", id=[folder], text=["x"])
    with pytest.raises(InputError, match="have the same name"):
        list_files([str(tmp_path / "x" / "a.parquet"), str(tmp_path / "y" / "a.parquet")])
    assert [file.name for file in list_files(str(tmp_path))] == ["x/a.parquet", "y/a.parquet"]


def test_null_text_behind_a_struct_is_found(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", meta=[{"a": 1, "b": 2}] * 2, id=["1", "2"], text=["x", None])
    with pytest.raises(InputError, match="row 1 of row group 0 has no text"):
        _check(path)


def test_json_id_beyond_64_bits_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "text": "x"}\n{"id": 99999999999999999999, "text": "x"}\n')
    with pytest.raises(InputError, match="line 2: 'id' is 99999999999999999999; give ids of at most 64 bits"):
        _check(path)
