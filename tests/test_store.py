"""The run directory under faults: crashes, damage, full and read-only disks, two runs at once, hostile names."""

import contextlib
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from quadmix_plugin.atomic import atomic_path, sha256_file, storage_errors, write_json
from quadmix_plugin.errors import QuadmixError, RunLockedError, StorageError
from quadmix_plugin.store import RunDirectory, Step, content_key, merge_counts

TABLE = pa.table({"doc_id": list(range(500)), "text": [f"document {i}" for i in range(500)]})


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def is_sound(step: Step) -> bool:
    """Whether everything that the step shows is really there."""
    return all(sha256_file(step.path(entry.path)) == entry.sha256 for entry in step.entries())


# --- what is written is what is read


def test_artifacts_come_back_with_their_entries(tmp_path: Path) -> None:
    step = RunDirectory.open(tmp_path / "run").step("label", "k1")
    step.write_table("labels/a.parquet", TABLE, rows_in=600, dropped={"no tokens": 100})
    step.write_json("labels/corpus.json", {"b": [1.5, None], "a": "ä"})
    step.write_text("report.html", "<p>ä</p>")
    assert step.read_table("labels/a.parquet").equals(TABLE)
    assert step.read_table("labels/a.parquet", ["doc_id"]).column_names == ["doc_id"]
    assert step.read_json("labels/corpus.json") == {"b": [1.5, None], "a": "ä"}
    assert step.read_path("report.html").read_text(encoding="utf-8") == "<p>ä</p>"
    assert [entry.path for entry in step.entries()] == ["labels/a.parquet", "labels/corpus.json", "report.html"]
    entry = step.entry("labels/a.parquet")
    assert entry is not None
    assert entry.facts == {"rows": 500, "rows_in": 600, "dropped": {"no tokens": 100}}
    assert entry.bytes == step.path("labels/a.parquet").stat().st_size
    assert RunDirectory(step.root).verify() == (3, [])


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    for run in "ab":
        step = RunDirectory.open(tmp_path / run).step("label", "k")
        step.write_table("t.parquet", TABLE)
        step.write_json("c.json", {"x": 0.1, "y": [1]} if run == "a" else {"y": [1], "x": 0.1})
        step.finish(seconds=1)
    files = [p.relative_to(tmp_path / "a") for p in sorted((tmp_path / "a").rglob("*")) if p.is_file()]
    assert len(files) == 5
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    step = RunDirectory.open(tmp_path / "run=1").step("label", "k")
    step.write_table("t.parquet", TABLE)
    assert step.read_table("t.parquet").column_names == ["doc_id", "text"]


def test_another_key_makes_artifacts_invisible(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    old, new = run.step("label", "old"), run.step("label", "new")
    old.write_json("a.json", 1)
    old.finish()
    assert old.is_done
    assert new.entry("a.json") is None
    assert new.entries() == []
    assert new.summary() is None
    with pytest.raises(QuadmixError, match=r"a\.json: not there, or not from this recipe; run the step 'label' first"):
        new.read_json("a.json")


def test_finish_keeps_the_summary_until_an_artifact_goes(tmp_path: Path) -> None:
    step = RunDirectory.open(tmp_path).step("label", "k")
    assert step.summary() is None
    step.write_json("a.json", 1)
    step.write_json("b.json", 2)
    assert not step.is_done
    step.finish(rows_in=7, seconds=0.5)
    assert step.summary() == {"rows_in": 7, "seconds": 0.5}
    step.path("b.json").unlink()
    assert not step.is_done
    step.write_json("b.json", 2)
    assert step.is_done


def test_a_step_travels_to_workers(tmp_path: Path) -> None:
    step = RunDirectory.open(tmp_path).step("label", "k")
    there = pickle.loads(pickle.dumps(step))  # noqa: S301
    there.write_json("a.json", 1)
    assert there == step
    assert step.read_json("a.json") == 1


def test_names_that_only_differ_in_their_separator_are_two_artifacts(tmp_path: Path) -> None:
    step = RunDirectory.open(tmp_path).step("label", "k")
    step.write_json("a/b.json", 1)
    step.write_json("a__b.json", 2)
    assert (step.read_json("a/b.json"), step.read_json("a__b.json")) == (1, 2)
    assert len(step.entries()) == 2


def test_two_artifacts_of_one_commit_fail_together(tmp_path: Path) -> None:
    step = RunDirectory.open(tmp_path).step("export", "k")

    def fail() -> None:
        with step.writing("t.bin", "t.idx") as (tokens, _):
            tokens.write_bytes(b"1234")
            raise RuntimeError("the writer failed")

    with pytest.raises(RuntimeError):
        fail()
    assert step.entries() == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with step.writing("t.bin", "t.idx", documents=1) as (tokens, index):
        tokens.write_bytes(b"1234")
        index.write_bytes(b"12")
    assert [(entry.path, entry.facts) for entry in step.entries()] == [
        ("t.bin", {"documents": 1}),
        ("t.idx", {"documents": 1}),
    ]


def test_keys_and_counts() -> None:
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert len({content_key(1), content_key("1"), content_key([1]), content_key(1, 1)}) == 4
    counts = [
        {"rows_in": 5, "rows_kept": 3, "dropped": {"empty": 2}},
        {"rows_in": 4, "rows_kept": 2, "dropped": {"empty": 1, "no tokens": 1}},
    ]
    assert merge_counts(counts) == {"rows_in": 9, "rows_kept": 5, "dropped": {"empty": 3, "no tokens": 1}}


# --- crashes


CRASH = """
import os, shutil, signal, sys
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet
from quadmix_plugin.store import RunDirectory

root, kind = Path(sys.argv[1]), sys.argv[2]
step = None

def commit(step, byte):
    if kind == "pair":
        with step.writing("t.bin", "t.idx") as (tokens, index):
            tokens.write_bytes(bytes([byte]) * 1000)
            event()
            index.write_bytes(bytes([byte]) * 10)
            event()
    elif kind == "table":
        step.write_table("t.parquet", pa.table({"x": [byte] * 1000}))
    else:
        step.write_json("t.json", [byte] * 100)
    step.finish(byte=byte)

def event():
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1

def around(function):
    def wrapped(*args, **kwargs):
        event()
        result = function(*args, **kwargs)
        event()
        return result
    return wrapped

left = -1
if os.fork() == 0:
    commit(RunDirectory.open(root / "old").step("s", "old"), 1)
    os._exit(0)
os.wait()
for point in range(200):
    shutil.copytree(root / "old", root / str(point))
    child = os.fork()
    if child == 0:
        run = RunDirectory.open(root / str(point))
        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, around(getattr(os, name)))
        left = point
        commit(run.step("s", "new"), 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
print(point)
"""


@pytest.mark.parametrize("kind", ["json", "table", "pair"])
def test_a_crash_at_any_point_of_a_commit_shows_nothing_that_is_not_whole(tmp_path: Path, kind: str) -> None:
    # Both contents have one size, so only the order of renames and entries can tell them apart.
    done = run_script(CRASH, tmp_path, kind)
    assert done.returncode == 0, done.stderr
    points = int(done.stdout)
    assert points >= 12
    names = {"pair": ["t.bin", "t.idx"], "table": ["t.parquet"], "json": ["t.json"]}[kind]
    shown = set()
    for point in range(points):
        run = RunDirectory.open(tmp_path / str(point))
        old, new = run.step("s", "old"), run.step("s", "new")
        assert is_sound(old), point
        assert is_sound(new), point
        assert not (old.is_done and new.entries()), point
        shown.add((len(old.entries()), len(new.entries())))
        if new.is_done:
            assert [entry.path for entry in new.entries()] == names
        run.sweep()
        assert list(run.root.rglob("*.tmp")) == []
    n = len(names)
    assert {(n, 0), (0, 0), (0, n)} <= shown  # before, between and after the commit were all hit


HALF_WRITTEN = """
import os, sys
from quadmix_plugin.store import RunDirectory
step = RunDirectory.open(sys.argv[1]).step("s", "k")
with step.writing("t.bin") as (path,):
    path.write_bytes(b"half")
    os._exit(3)
"""


def test_a_half_written_file_is_swept_and_never_seen(tmp_path: Path) -> None:
    assert run_script(HALF_WRITTEN, tmp_path).returncode == 3
    run = RunDirectory.open(tmp_path)
    step = run.step("s", "k")
    assert step.entry("t.bin") is None
    assert step.entries() == []
    assert not step.path("t.bin").exists()
    assert run.verify() == (0, [])
    assert run.sweep() == 1
    assert run.sweep() == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- damage


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.open(tmp_path / "run")
    step = run.step("label", "k")
    step.write_table("labels/a.parquet", TABLE, dropped={"empty": 3})
    step.write_json("labels/corpus.json", {"rows": 500, "names": ["a", "b"]})
    step.finish(rows=500)
    return run


def damage(path: Path, generator: random.Random) -> str:
    """Flips one bit or cuts the file; says which."""
    content = bytearray(path.read_bytes())
    at = generator.randrange(len(content) - 1)  # without the last byte, a line end, JSON says the same
    if generator.random() < 0.3:
        path.write_bytes(content[:at])
        return f"{path.name} cut at {at}"
    bit = generator.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name} bit {bit} of byte {at}"


@pytest.mark.parametrize(
    "name",
    [
        "labels/a.parquet",
        "labels/corpus.json",
        "manifest/label/labels%a.parquet.json",
        "manifest/label/labels%corpus.json.json",
        "manifest/label/_SUCCESS.json",
    ],
)
def test_verify_finds_every_flipped_bit_and_cut(finished: RunDirectory, name: str) -> None:
    assert finished.verify() == (2, [])
    generator = random.Random(name)  # noqa: S311
    path = finished.root / name
    whole = path.read_bytes()
    for _ in range(150):
        what = damage(path, generator)
        faults = finished.verify()[1]
        assert faults, what
        assert all("\n" not in fault for fault in faults), what
        path.write_bytes(whole)
    path.unlink()
    assert finished.verify()[1] or name.endswith("_SUCCESS.json")
    path.write_bytes(whole)
    assert finished.verify() == (2, [])


def test_readers_report_damage_as_our_error(finished: RunDirectory) -> None:
    generator = random.Random(2)  # noqa: S311
    step = finished.step("label", "k")
    said = []
    for name, read in (("labels/a.parquet", step.read_table), ("labels/corpus.json", step.read_json)):
        path = step.path(name)
        whole = path.read_bytes()
        for _ in range(150):
            damage(path, generator)
            try:
                read(name)  # a flip that only changes a comment of the file may pass; verify finds those
            except QuadmixError as error:
                said.append(str(error))
            path.write_bytes(whole)
    assert len(said) > 100
    assert all(str(step.root / "labels") in line and "run the step 'label'" in line for line in said)


def test_a_flipped_bit_in_a_page_is_never_read(finished: RunDirectory) -> None:
    step = finished.step("label", "k")
    path = step.path("labels/a.parquet")
    whole = path.read_bytes()
    data_end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    generator = random.Random(3)  # noqa: S311
    for _ in range(150):
        content = bytearray(whole)
        content[generator.randrange(4, data_end)] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        with contextlib.suppress(QuadmixError):
            assert step.read_table("labels/a.parquet").equals(TABLE)


def test_verify_names_what_is_wrong(finished: RunDirectory) -> None:
    step = finished.step("label", "k")
    step.path("labels/a.parquet").unlink()
    step.path("labels/corpus.json").write_text("{}", encoding="utf-8")
    checked, faults = finished.verify()
    assert checked == 2
    assert faults == ["labels/a.parquet: missing", f"labels/corpus.json: 2 bytes, the manifest says {STEP_BYTES}"]


STEP_BYTES = len(json.dumps({"names": ["a", "b"], "rows": 500}, indent=1)) + 1


def test_verify_accepts_what_an_older_recipe_left_beside(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    for key, shards in (("old", 4), ("new", 2)):
        step = run.step("label", key)
        for i in range(shards):
            step.write_json(f"labels/{i}.json", [key, i])
        step.finish()
    assert len(run.step("label", "new").entries()) == 2
    assert not run.step("label", "old").is_done
    assert run.verify() == (4, [])


def test_a_manifest_cannot_point_outside_the_run(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("s", encoding="utf-8")
    run = RunDirectory.open(tmp_path / "run")
    step = run.step("label", "k")
    step.write_json("a.json", 1)
    entry = run.root / "manifest" / "label" / "a.json.json"
    content = json.loads(entry.read_text(encoding="utf-8"))
    for path in ("../secret.txt", str(secret), 5, None, ["a.json"]):
        write_json(entry, {**content, "path": path, "bytes": 1, "sha256": sha256_file(secret)})
        assert step.entries() == []
        assert step.entry("a.json") is None
        assert len(run.verify()[1]) == 1
    write_json(run.root / "manifest" / "label" / "not a name.json", content)
    assert step.entries() == []


# --- names


HOSTILE = [
    *("", ".", "..", "/", "//", "../a", "../../etc/passwd", "/etc/passwd", "a/../b", "a/..", "a/./b", "./a", "a//b"),
    *("a/", "/a", "~", "~/a", "a\\b", "..\\a", "C:\\a", "C:/a", "a b", "a\n", "\na", "a\0", "a\tb", "ä", "文", "a:b"),
    *(
        "a*",
        "a?",
        "$HOME",
        "`id`",
        "$(id)",
        "a;b",
        "a|b",
        "a&b",
        "<a>",
        "'a'",
        '"a"',
        "%2e%2e/a",
        "%2e",
        "a%b",
        "..%2fa",
    ),
    *("...", ".hidden", "a/.hidden.tmp", "x" * 129, "manifest/label/_SUCCESS.json", "_SUCCESS", "a/\u202eb", "\ud800"),
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    step = RunDirectory.open(tmp_path / "run").step("label", "k")
    with pytest.raises(StorageError, match="not an artifact name; use letters, digits"):
        step.write_json(name, 1)
    with pytest.raises(StorageError, match="not an artifact name"):
        step.entry(name)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_there_are_at_least_fifty_hostile_names() -> None:
    assert len(set(HOSTILE)) >= 50


# --- full and read-only places


FULL = """
import resource, sys
import pyarrow as pa
from quadmix_plugin.errors import StorageError
from quadmix_plugin.store import RunDirectory
run = RunDirectory.open(sys.argv[1])
step = run.step("label", "k")
step.write_json("small.json", 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for write in (
    lambda: step.write_table("big.parquet", pa.table({"x": [str(i * 7919) for i in range(50_000)]})),
    lambda: step.write_json("big.json", list(range(50_000))),
    lambda: step.write_text("big.txt", "x" * 50_000),
):
    try:
        write()
    except StorageError as error:
        print(error)
"""


def test_a_file_over_the_size_limit_is_our_error_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_script(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout
    for name, line in zip(("big.parquet", "big.json", "big.txt"), lines, strict=True):
        assert line == f"{tmp_path / name}: the file would exceed the size limit; raise it or give another --out"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"small.json", "small.json.json"}


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A small file system in memory, or a skip where mounting is not permitted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_our_error_and_finished_work_stays(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=256k") as disk:
        run = RunDirectory.open(disk)
        step = run.step("label", "k")
        written, said = [], []
        for i in range(60):
            try:
                step.write_text(f"{i}.txt", "x" * 10_000)
                written.append(f"{i}.txt")
            except StorageError as error:
                said.append(str(error))
        assert written
        assert said
        assert all("the disk is full; free some space or give another --out, finished" in line for line in said)
        assert sorted(entry.path for entry in step.entries()) == sorted(written)
        assert run.verify() == (len(written), [])
        assert list(disk.rglob("*.tmp")) == []
        with pytest.raises(StorageError, match=r"big\.parquet: the disk is full"):
            step.write_table("big.parquet", pa.table({"x": [str(i * 7919) for i in range(200_000)]}))
        assert not step.path("big.parquet").exists()


def test_a_read_only_place_is_our_error(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=256k") as disk:
        run = RunDirectory.open(disk)
        run.step("label", "k").write_json("a.json", 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match=f"{disk}: the file system is read-only; give another --out"):
            RunDirectory.open(disk)
        with pytest.raises(StorageError, match=r"a\.json: the file system is read-only"):
            run.step("label", "k").write_json("a.json", 2)
        with pytest.raises(StorageError, match="the file system is read-only"), run.lock():
            pass
        assert run.step("label", "k").read_json("a.json") == 1


def test_a_file_in_place_of_the_folder_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file", encoding="utf-8")
    with pytest.raises(StorageError, match="run: this is a file; give a folder as --out"):
        RunDirectory.open(tmp_path / "run")
    with pytest.raises(StorageError, match="below: a part of this path is a file; give another --out"):
        RunDirectory.open(tmp_path / "run" / "below")
    step = RunDirectory.open(tmp_path / "other").step("label", "k")
    (tmp_path / "other" / "labels").write_text("a file", encoding="utf-8")
    with pytest.raises(StorageError, match=r"labels/a\.json: this is a file"):
        step.write_json("labels/a.json", 1)


def test_errors_about_another_file_keep_their_own_words(tmp_path: Path) -> None:
    elsewhere = tmp_path / "file" / "below"
    elsewhere.parent.write_text("a file", encoding="utf-8")
    with pytest.raises(NotADirectoryError), atomic_path(tmp_path / "out" / "a.json"):
        elsewhere.read_text(encoding="utf-8")
    with pytest.raises(StorageError), storage_errors(elsewhere):
        elsewhere.read_text(encoding="utf-8")


# --- two runs in one directory


HOLD = """
import sys
from quadmix_plugin.store import RunDirectory
with RunDirectory.open(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(root: Path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_run_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    with holder(tmp_path) as process:
        who = f"process {process.pid} on {socket.gethostname()}"
        with pytest.raises(RunLockedError, match=f"{tmp_path}: in use by {who}; wait for it or give"), run.lock():
            pass
        process.communicate()  # its input ends, and it leaves in order
        assert process.returncode == 0
    with run.lock():
        pass


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    for _ in range(3):
        with holder(tmp_path) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
            with run.lock():
                assert f"process {os.getpid()} on" in (tmp_path / ".lock.holder").read_text(encoding="utf-8")
    assert not (tmp_path / ".lock.holder").exists()


def test_the_lock_holds_within_one_process_and_is_freed_on_an_error(tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path)
    with run.lock(), pytest.raises(RunLockedError, match=f"process {os.getpid()}"), RunDirectory.open(tmp_path).lock():
        pass

    def fail() -> None:
        with run.lock():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with run.lock():
        pass
