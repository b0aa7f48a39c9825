"""Runs in an object store: the bytes of a local run, whatever the store refuses, loses or delays; one run at a time."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults import SHORT, contents
from object_stores import BUCKET, Faulty, new_store, s3_server

from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import RecipeError, RunLockedError, StorageError
from quadmix_plugin.lease import Lease
from quadmix_plugin.pipelines.context import open_run
from quadmix_plugin.pipelines.run import run_steps
from quadmix_plugin.places import WORK_FOLDERS, ObjectFolder, place_at
from quadmix_plugin.store import RunDirectory


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[dict[str, str], Faulty]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as started:
        yield started


@pytest.fixture
def store(server, monkeypatch, tmp_path) -> Iterator[str]:
    """The URL of a new bucket; the environment leads there, and to a work folder of its own."""
    environment, faulty = server
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(WORK_FOLDERS, str(tmp_path / "work"))
    bucket = f"{BUCKET}-{time.monotonic_ns()}"
    new_store().mkdir(bucket)
    yield f"s3://{bucket}/runs/a"
    faulty.share, faulty.kill = 0.0, None


def _run(recipe: Path, out: str) -> dict[str, Any]:
    with open_run(load_recipe(recipe), out) as run:
        return run_steps(run, SHORT)


def _stored(url: str, folder: Path) -> dict[str, str]:
    """The content of all objects of a run but its lease, compared as files."""
    new_store().get(f"{url}/", str(folder), recursive=True)
    return {name: digest for name, digest in contents(folder).items() if not name.startswith(".lock/")}


def test_a_run_in_an_object_store_is_that_of_a_folder(store, server, tiny_recipe, tiny_contents, tmp_path):
    _run(tiny_recipe, store)
    assert _stored(store, tmp_path / "copy") == tiny_contents
    assert len(tiny_contents) > 30
    headlines = _run(tiny_recipe, store)["headlines"]
    assert len(headlines) == len(SHORT)
    assert all("already done" in line for line in headlines)
    checked, faults = RunDirectory.at(store).verify()
    assert (checked > 10, faults) == (True, [])
    secret = server[0]["AWS_SECRET_ACCESS_KEY"].encode()
    files = [path for path in (*(tmp_path / "copy").rglob("*"), *(tmp_path / "work").rglob("*")) if path.is_file()]
    assert len(files) > 60
    assert [path for path in files if secret in path.read_bytes()] == []


def test_another_machine_goes_on_with_what_is_there(store, tiny_recipe, tiny_contents, tmp_path, monkeypatch):
    with open_run(load_recipe(tiny_recipe), store) as run:
        run_steps(run, SHORT[:2])
    monkeypatch.setenv(WORK_FOLDERS, str(tmp_path / "another"))
    summary = _run(tiny_recipe, store)
    assert ["already done" in line for line in summary["headlines"]] == [True, True, False, False]
    assert _stored(store, tmp_path / "copy") == tiny_contents


def test_another_recipe_is_refused_there_too(store, tiny_recipe):
    with open_run(load_recipe(tiny_recipe), store) as run:
        run_steps(run, SHORT[:1])
    with (
        pytest.raises(RecipeError, match=rf"^{store}: the step 'label' .*documents_per_shard: 40 → 41"),
        open_run(load_recipe(tiny_recipe, ["corpus.documents_per_shard=41"]), store),
    ):
        pass


@pytest.mark.slow
def test_a_store_that_is_slow_refuses_and_forgets_costs_only_time(store, server, tiny_recipe, tiny_contents, tmp_path):
    faulty = server[1]
    faulty.share = 0.1
    _run(tiny_recipe, store)
    faulty.share = 0.0
    assert min(faulty.refused, faulty.dropped, faulty.slow) > 3
    assert _stored(store, tmp_path / "copy") == tiny_contents
    assert RunDirectory.at(store).verify()[1] == []


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(store, server, tiny_recipe, tiny_contents, tmp_path):
    """A request that the store has carried out and its process has not heard of, again and again."""
    faulty, kills = server[1], 0
    code = "import sys; from test_object_store import _child; _child(sys.argv[1], sys.argv[2])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tiny_recipe), store], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        faulty.kill = faulty.served + 30 + 25 * kills, process.pid
        process.wait(timeout=300)
        faulty.kill = None
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        assert RunDirectory.at(store).verify()[1] == []
        assert kills < 40
    assert kills > 3
    assert _stored(store, tmp_path / "copy") == tiny_contents


def _child(recipe: str, out: str) -> None:
    loaded = load_recipe(recipe)
    print("ready", flush=True)
    with open_run(loaded, out) as run:
        run_steps(run, SHORT)


def test_an_entry_is_made_once(store):
    step = RunDirectory.open(store).step("s", "k")
    step.write_json("a.json", [1])
    place = step.place
    assert isinstance(place, ObjectFolder)
    entry = place.read("manifest/s/a.json.json")
    assert entry is not None
    place.enter("manifest/s/a.json.json", entry)  # a repetition of the same work
    with pytest.raises(StorageError, match=r"manifest/s/a.json.json: another process has entered something else"):
        place.enter("manifest/s/a.json.json", entry.replace(b'"k"', b'"x"'))
    assert step.read_json("a.json") == [1]
    step.write_json("a.json", [2])
    assert step.read_json("a.json") == [2]


def test_of_many_that_enter_at_once_one_does(store):
    place, done = place_at(store), []
    assert isinstance(place, ObjectFolder)

    def enter(i: int) -> None:
        done.append(place.create("manifest/s/x.json", b"%d" % i))

    threads = [threading.Thread(target=enter, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [False] * 7 + [True]


def test_damage_in_the_store_is_found_and_never_read(store, tmp_path, monkeypatch):
    directory = RunDirectory.open(store)
    step = directory.step("s", "k")
    for name in ("a", "b", "c", "d"):
        step.write_json(f"x/{name}.json", [name] * 50)
    step.finish()
    fs = new_store()
    content = bytearray(fs.cat_file(f"{store}/x/a.json"))
    content[30] ^= 1
    fs.pipe_file(f"{store}/x/a.json", bytes(content))
    fs.pipe_file(f"{store}/x/b.json", b"[]")
    fs.rm_file(f"{store}/x/c.json")
    fs.pipe_file(f"{store}/manifest/s/x%d.json.json", b"{")
    checked, faults = RunDirectory.at(store).verify()
    assert checked == 4
    assert [fault.partition(":")[0] for fault in faults] == [
        "x/a.json",
        "x/b.json",
        "x/c.json",
        "manifest/s/x%d.json.json",
        "manifest/s/_SUCCESS.json",
    ]
    monkeypatch.setenv(WORK_FOLDERS, str(tmp_path / "another"))
    elsewhere = RunDirectory.at(store).step("s", "k")
    with pytest.raises(StorageError, match=r"x/a.json: content differs from its sha256"):
        elsewhere.read_json("x/a.json")
    assert [entry.path for entry in elsewhere.entries()] == ["x/a.json"]
    assert not elsewhere.is_done


def test_a_work_folder_that_was_changed_is_fetched_again(store):
    step = RunDirectory.open(store).step("s", "k")
    step.write_json("a.json", [1, 2])
    step.read_path("a.json").write_text("[3]")
    assert step.read_json("a.json") == [1, 2]
    path = step.read_path("a.json")
    path.unlink()
    step.bring(path)
    assert json.loads(path.read_text()) == [1, 2]


# --- the lease


def test_a_run_that_is_held_here_is_refused_and_free_afterwards(store):
    directory = RunDirectory.open(store)
    with directory.lock():
        with pytest.raises(RunLockedError, match=rf"in use by process {os.getpid()} on "), directory.lock():
            pass
        with pytest.raises(RunLockedError, match=r"^s3://.* in use by process \d+ on "), Lease(directory.place).held():
            pass
    with directory.lock():
        pass
    assert len(new_store().ls(f"{store}/.lock")) == 1


def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(store):
    place = _objects(store)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    facts = {"pid": process.pid, "started": psutil.Process(process.pid).create_time(), "host": socket.gethostname()}
    place.write(".lock/00000007.json", json.dumps({**facts, "beat": 3}).encode())
    with pytest.raises(RunLockedError, match=rf"in use by process {process.pid} on"), Lease(place).held():
        pass
    process.kill()
    process.wait()
    with Lease(place).held():
        assert [Path(name).name for name in new_store().ls(f"{store}/.lock")] == ["00000008.json"]


def test_the_lease_of_another_machine_is_taken_over_when_it_is_not_renewed(store):
    place = _objects(store)
    facts = {"pid": 1, "started": 0.0, "host": "elsewhere", "beat": 3}
    place.write(".lock/00000001.json", json.dumps(facts).encode())
    with Lease(place, renewal=0.2, patience=0.6).held():
        pass
    place.write(".lock/00000009.json", json.dumps(facts).encode())
    renewed = threading.Timer(0.3, place.write, (".lock/00000009.json", json.dumps({**facts, "beat": 4}).encode()))
    renewed.start()
    with pytest.raises(RunLockedError, match="in use by process 1 on elsewhere"):
        Lease(place, renewal=0.2, patience=5.0)._acquire()
    renewed.join()


def test_whoever_has_lost_its_lease_is_stopped(store):
    place = _objects(store)
    facts = {"pid": 1, "started": 0.0, "host": "elsewhere", "beat": 0}

    def hold() -> None:
        with Lease(place, renewal=0.1, patience=0.5).held():
            place.create(".lock/00000002.json", json.dumps(facts).encode())
            time.sleep(20)

    with pytest.raises(RunLockedError, match=r"taken over by process 1 on elsewhere, since this process did not renew"):
        hold()
    assert json.loads(place.read(".lock/00000002.json") or b"") == facts


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff", b'{"free": true}'])
def test_an_unreadable_lease_is_taken_over(store, content):
    place = _objects(store)
    place.write(".lock/00000003.json", content)
    place.write(".lock/notes.json", b"{}")
    with Lease(place, renewal=0.1, patience=0.2).held():
        pass
    assert b'"free": true' in (place.read(".lock/00000004.json") or b"")


def _objects(url: str) -> ObjectFolder:
    place = place_at(url)
    assert isinstance(place, ObjectFolder)
    place.probe()
    return place


# --- what cannot work


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        (
            "s3://no-such-bucket/run",
            r"^s3://no-such-bucket/run: .*does not exist; create the bucket, or give another --out",
        ),
        ("nosuch://bucket/run", r"^nosuch://bucket/run: .*nosuch"),
    ],
)
def test_a_place_that_is_none_is_named(store, url, fault):
    with pytest.raises(StorageError, match=fault):
        RunDirectory.open(url)


@pytest.mark.slow
def test_a_store_that_is_not_there_is_our_error(store, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    new_store()
    with pytest.raises(StorageError, match=r"^s3://.*: .*Could not connect.*check the store, its address and the cred"):
        RunDirectory.open(store)
    new_store()


def test_a_file_url_is_a_folder(tmp_path):
    assert place_at(f"file://{tmp_path}/run").root == tmp_path / "run"
    assert RunDirectory.at(f"file://{tmp_path}/run").url is None
