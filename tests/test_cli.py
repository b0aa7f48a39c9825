"""The command line: exit codes, one clear line for every fault, JSON that is JSON and nothing else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_run import MODELS, QUICKSTART, write_small_recipe

from quadmix_plugin.cli import main
from quadmix_plugin.sampling import hash64


def _quadmix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Runs the command in this process; returns exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["quadmix", *args])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


CORPUS_FAULTS = {
    "no such file": (lambda folder: (folder / "corpus.parquet").unlink(), "no such file or folder"),
    "no text column": (
        lambda folder: pq.write_table(pa.table({"doc_id": ["a"], "body": ["x"]}), folder / "corpus.parquet"),
        "no column 'text'; found doc_id, body; set corpus.text in the recipe",
    ),
    "empty file": (lambda folder: (folder / "corpus.parquet").write_bytes(b""), "empty file (0 bytes)"),
    "null text": (
        lambda folder: pq.write_table(pa.table({"doc_id": ["a", "b"], "text": ["x", None]}), folder / "corpus.parquet"),
        "row 1 of row group 0 has no text",
    ),
    "duplicate ids": (
        lambda folder: pq.write_table(pa.table({"doc_id": ["a", "a"], "text": ["x", "y"]}), folder / "corpus.parquet"),
        "1 ids occur more than once, such as a",
    ),
    "unreadable parquet": (
        lambda folder: (folder / "corpus.parquet").write_bytes(b"PAR1 no"),
        "cannot be read as Parquet",
    ),
    "no validation": (lambda folder: (folder / "validation.jsonl").unlink(), "validation.path"),
}


@pytest.mark.parametrize("fault", CORPUS_FAULTS)
def test_corpus_fault_is_one_line_before_any_work(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_small_recipe(tmp_path / "in")
    spoil, expected = CORPUS_FAULTS[fault]
    spoil(tmp_path / "in")
    code, out, err = _quadmix(monkeypatch, capsys, "run", str(recipe), "--out", str(tmp_path / "out"))
    assert (code, out) == (1, "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert not list((tmp_path / "out").glob("labels/*"))


def test_json_line_that_is_not_json(tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = write_small_recipe(tmp_path, corpus={"path": "corpus.jsonl"})
    (tmp_path / "corpus.jsonl").write_text('{"doc_id": "a", "text": "b"}\n{"doc_id": \n')
    code, _, err = _quadmix(monkeypatch, capsys, "label", str(recipe), "--out", str(tmp_path / "out"))
    assert code == 1
    assert "corpus.jsonl: line 2 is not JSON" in err


def test_bad_validation_rows_are_found_before_labelling(tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = write_small_recipe(tmp_path)
    (tmp_path / "validation.jsonl").write_text('{"task": "a", "prompt": "q"}\n')
    code, _, err = _quadmix(monkeypatch, capsys, "run", str(recipe), "--out", str(tmp_path / "out"))
    assert code == 1
    assert "response" in err
    assert not list((tmp_path / "out").glob("labels/*"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("proxy.nubmer=8", "did you mean 'number'?"),
        ("proxy.number=lots", "found 'lots'"),
        ("scorers.fineweb-eud={}", "did you mean 'fineweb-edu'?"),
        ("search.objective={hellaswga: 1.0}", "hellaswga"),
        ("tokenizer.eod=</s>", "no token '</s>'"),
        ("domain.model=/nowhere", "no such folder"),
        ("proxy.options={shape: huge}", "proxy.options: shape"),
        ("pretrain.options={device: tpu}", "pretrain.options: device 'tpu': unknown"),
        ("proxy.tokens=100", "proxy.tokens: 100 are fewer than one batch of 512"),
    ],
)
def test_recipe_fault_exits_78(override: str, expected: str, tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = write_small_recipe(tmp_path)
    code, out, err = _quadmix(
        monkeypatch, capsys, "run", str(recipe), "--out", str(tmp_path / "out"), "--set", override
    )
    assert (code, out) == (78, "")
    assert expected in err
    assert not list((tmp_path / "out").glob("labels/*"))


def test_theta_with_a_domain_that_the_corpus_lacks(tmp_path: Path, monkeypatch, capsys) -> None:
    from quadmix_plugin import sample_parameters

    scorers = ("fineweb-edu", "dclm-fasttext", "ask-llm")
    sample_parameters(1, 3, 2, 0, domains=("Moon", "Science"), scorers=scorers)[0].save(tmp_path / "theta.json")
    recipe = write_small_recipe(tmp_path, select={"theta": "theta.json"})
    code, _, err = _quadmix(monkeypatch, capsys, "run", str(recipe), "--out", str(tmp_path / "out"))
    assert code == 1
    assert "domains Moon are in the parameters but not in the corpus" in err
    code, _, err = _quadmix(monkeypatch, capsys, "search", str(recipe), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "select.theta is given" in err
    code, out, _ = _quadmix(monkeypatch, capsys, "plan", str(recipe), "--out", str(tmp_path / "other"), "--json")
    assert code == 0
    assert not {"proxies", "search"} & {row["step"] for row in json.loads(out)["steps"]}


def test_run_directory_that_is_a_file(tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = write_small_recipe(tmp_path)
    (tmp_path / "out").write_text("x")
    code, _, err = _quadmix(monkeypatch, capsys, "run", str(recipe), "--out", str(tmp_path / "out"))
    assert code == 74
    assert "give a folder as --out" in err


@pytest.mark.parametrize(("options", "expected"), [("size=64k", "the disk is full"), ("ro", "is read-only")])
def test_full_or_read_only_run_directory(options: str, expected: str, tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = write_small_recipe(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(out)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        code, _, err = _quadmix(monkeypatch, capsys, "label", str(recipe), "--out", str(out))
        assert code == 74
        assert expected in err
        assert not list(out.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


def test_usage_errors_exit_2(tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = write_small_recipe(tmp_path)
    assert _quadmix(monkeypatch, capsys, "run", str(recipe), "--until", "lable")[0] == 2
    assert _quadmix(monkeypatch, capsys, "run")[0] == 2
    assert _quadmix(monkeypatch, capsys, "verify", str(tmp_path))[0] == 2


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("proxies", "label"),
        ("search", "proxies"),
        ("select", "search"),
        ("export", "select"),
        ("pretrain", "export"),
        ("evaluate", "pretrain"),
    ],
)
def test_step_before_its_turn_names_the_first_and_writes_nothing(
    command: str, first: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    recipe = write_small_recipe(tmp_path)
    code, _, err = _quadmix(monkeypatch, capsys, command, str(recipe), "--out", str(tmp_path / "out"))
    assert code == 1
    assert f"is not finished; run `quadmix {first}` first" in err
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_plan_counts_without_starting_anything(tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = write_small_recipe(tmp_path)
    code, out, _ = _quadmix(monkeypatch, capsys, "plan", str(recipe), "--out", str(tmp_path / "out"), "--json")
    made = json.loads(out)
    assert code == 0
    assert made["quantities"]["documents"] == pq.read_metadata(tmp_path / "corpus.parquet").num_rows
    assert {row["state"] for row in made["steps"]} == {"to do"}
    assert not (tmp_path / "out").exists()
    assert "about" in _quadmix(monkeypatch, capsys, "plan", str(recipe))[1]


@pytest.mark.parametrize(
    ("override", "code", "expected"),
    [
        ("corpus.text=txt", 1, "no column 'txt'; did you mean 'text'?"),
        ("validation.prompt=promt", 1, "promt"),
        ("search.objective={nothing: 1.0}", 78, "no validation rows of nothing"),
        ("scorers.mine={scorer: column, column: quality}", 1, "no column 'quality'"),
        ("proxy.number=9", 78, "proxy.number: 9 proxies leave 7 to fit on"),
    ],
)
def test_plan_refuses_what_a_run_would_refuse(
    override: str, code: int, expected: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    recipe = write_small_recipe(tmp_path)
    for command in ("plan", "run"):
        out = str(tmp_path / "out")
        ended, _, err = _quadmix(monkeypatch, capsys, command, str(recipe), "--out", out, "--set", override)
        assert (command, ended) == (command, code)
        assert expected in err


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow),
    ],
)
def test_signal_ends_a_run_on_dask_with_its_code_and_leaves_nothing(
    number: signal.Signals, code: int, word: str, tmp_path: Path
) -> None:
    """As Ctrl-C in a terminal does, the signal goes to the whole process group, workers included."""
    recipe = write_small_recipe(tmp_path, executor={"name": "dask", "workers": 2}, corpus={"documents_per_shard": 50})
    out = tmp_path / "out"
    command = [sys.executable, "-m", "quadmix_plugin.cli", "run", str(recipe), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob("manifest/label/*.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"error: {word}; run the same command again to go on" in err
    assert "Traceback" not in err
    deadline = time.monotonic() + 10  # multiprocessing's resource tracker ends after its parent
    while left := subprocess.run(
        ["pgrep", "-ag", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout:
        assert time.monotonic() < deadline, left
    assert _verified(out)


def _verified(out: Path) -> bool:
    from quadmix_plugin.store import RunDirectory

    return RunDirectory(out).verify()[1] == []


def test_plugins_lists_what_loads(monkeypatch, capsys) -> None:
    code, out, _ = _quadmix(monkeypatch, capsys, "plugins", "--json")
    rows = {(row["group"], row["name"]): row["status"] for row in json.loads(out)["plugins"]}
    assert code == 0
    assert rows["scorers", "ask-llm"] == rows["trainers", "torch"] == "ok"


def test_init_finds_the_columns_and_its_recipe_loads(tmp_path: Path, monkeypatch, capsys) -> None:
    shutil.copy(QUICKSTART / "corpus.parquet", tmp_path / "mine.parquet")
    args = ["init", str(tmp_path / "new"), "--corpus", str(tmp_path / "mine.parquet"), "--json"]
    args += ["--validation", str(QUICKSTART / "validation.jsonl"), "--models", str(MODELS)]
    code, out, _ = _quadmix(monkeypatch, capsys, *args)
    assert code == 0
    assert "text from text, ids from doc_id" in " ".join(json.loads(out)["notes"])
    code, out, _ = _quadmix(monkeypatch, capsys, "plan", str(tmp_path / "new" / "recipe.yaml"), "--json")
    assert code == 0
    assert json.loads(out)["quantities"]["documents"] == 11058
    assert _quadmix(monkeypatch, capsys, *args)[0] == 2  # there already


def test_init_quotes_paths_and_names_that_yaml_would_read_otherwise(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "my data: v2 #1"
    folder.mkdir()
    pq.write_table(pa.table({"id": [1], "text": ["x"]}), folder / "c.parquet")
    args = ["--corpus", str(folder), "--models", str(folder / "models")]
    assert _quadmix(monkeypatch, capsys, "init", str(tmp_path / "2024"), *args)[0] == 0
    content = yaml.safe_load((tmp_path / "2024" / "recipe.yaml").read_text(encoding="utf-8"))
    assert content["name"] == "2024"
    assert content["corpus"]["path"] == str(folder)
    assert content["domain"]["model"] == str(folder / "models" / "domain")


def test_init_names_a_corpus_that_cannot_be_read(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    args = ["init", str(tmp_path / "new"), "--corpus", str(tmp_path / "c.parquet")]
    code, _, err = _quadmix(monkeypatch, capsys, *args)
    assert code == 1
    assert "c.parquet: cannot be read as Parquet" in err


def test_error_under_json_is_json(tmp_path: Path, monkeypatch, capsys) -> None:
    code, out, _ = _quadmix(monkeypatch, capsys, "run", str(tmp_path / "none.yaml"), "--json")
    assert code == 78
    assert json.loads(out)["exit_code"] == 78


def test_id_hash_of_the_command_is_that_of_the_library() -> None:
    """The draw of a document is the same in another process with another hash seed."""
    program = "from quadmix_plugin.sampling import hash64; print(hash64(['a', 'b'], 5).tolist())"
    environment = {"PYTHONHASHSEED": "77", "PATH": ""}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(ended.stdout) == hash64(["a", "b"], 5).tolist()


def test_an_output_that_cannot_be_written_is_said_on_stderr() -> None:
    command = [sys.executable, "-m", "quadmix_plugin", "--version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (74, 1), done.stderr
    assert done.stderr.startswith("error: standard output: No space left on device")
