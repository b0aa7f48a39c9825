"""Killed, interrupted, out of space, damaged: each real, and each ends with the bytes of an undisturbed run.

``benchmarks/faults.py`` runs the same functions with the numbers of docs/reliability.md. What has a test of its own
elsewhere is not here: every point of one commit, read-only places and the lock (test_store), lost workers of single
pipelines (test_executors, test_export_step, test_proxies_step), signals in a fixed place (test_cli).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fault_crashes import crashes
from fault_inputs import CHECKED, damaged_corpora
from fault_signals import interrupts, races, signal_in_a_callback
from fault_storage import EVERY_STEP, Unavailable, damage_of, last_bytes, write_errors
from fault_workers import kills, poison
from faults import in_clean_process
from small_run import ROOT


def _row(function: Any, *arguments: Any) -> dict[str, Any]:
    try:
        made = in_clean_process(function, *arguments)
    except Unavailable as error:
        pytest.skip(str(error))
    assert made["faults"] == []
    return made


@pytest.mark.slow
@pytest.mark.parametrize("step", EVERY_STEP)
def test_a_driver_killed_at_a_commit_point_goes_on_and_loses_one_shard_at_most(step: str) -> None:
    made = _row(crashes, [step], 4, 2, True)["steps"][step]
    assert (made["points"], made["identical"]) == (4, 4)
    assert made["most shards in flight"] <= 1
    assert made["most shards written again"] == 0


@pytest.mark.slow
def test_runs_that_lose_workers_are_complete_and_identical() -> None:
    counts = _row(kills, 5, 3)["counts"]
    assert counts["complete"] == counts["identical"] == 5
    assert counts["killed while it had work"] >= 3


@pytest.mark.slow
def test_of_two_runs_in_one_folder_one_goes_on() -> None:
    counts = _row(races, 4, 1)["counts"]
    assert counts == {"one works, the other is refused": 4, "identical": 4}


@pytest.mark.slow
def test_interrupts_at_random_times_end_with_their_code_and_leave_no_process() -> None:
    made = _row(interrupts, 4, 5)
    counts = made["counts"]
    assert counts["SIGINT exit code 130"] == counts["SIGTERM exit code 143"] == 2
    assert counts["orphans"] == counts["tracebacks"] == 0
    assert made["longest_to_exit_s"] <= 30


@pytest.mark.slow
def test_a_driver_killed_at_random_times_leaves_no_worker() -> None:
    counts = _row(interrupts, 3, 6, "export", ("KILL",))["counts"]
    assert counts["SIGKILL exit code -9"] == 3
    assert counts["orphans"] == 0


def test_a_signal_in_a_callback_of_the_garbage_collector_is_not_lost() -> None:
    ended = in_clean_process(signal_in_a_callback, signal.SIGTERM)
    assert ended.code == 143, ended.out
    assert "error: terminated; run the same command again to go on" in ended.out
    assert "Traceback" not in ended.out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "memory"])
def test_a_document_that_takes_every_worker_with_it_is_named_by_stage_and_shard(how: str) -> None:
    assert _row(poison, 1, 1, how)["counts"]["stage and shard named"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("means", ["tmpfs", "inodes", "limit"])
def test_a_full_disk_costs_nothing_but_the_same_command_again(means: str) -> None:
    counts = _row(write_errors, 5, 1, means)["counts"]
    assert counts["exit code 74"] >= 3
    assert counts["identical after the same command"] == 5
    assert counts["false completions"] == counts.get("corrupt visible files", 0) == 0


@pytest.mark.slow
def test_any_failing_call_is_our_error_whoever_makes_it() -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to make the library whose calls fail")
    counts = _counted("write-errors", "--number", "12", "--seed", "1")["counts"]
    assert counts["exit code 74"] == counts["identical after the same command"] == 12
    assert counts["false completions"] == counts.get("corrupt visible files", 0) == 0


def _counted(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=900, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_verify_finds_cuts_and_flipped_bits_of_every_kind_of_file(finished: Path, tmp_path: Path) -> None:
    made = damage_of(shutil.copytree(finished, tmp_path / "out"), 8, 1)
    assert made["counts"] == {"cut": 8, "cut found": 8, "flip": 8, "flip found": 8}


@pytest.mark.slow
def test_verify_finds_damage_in_each_kind_of_file(finished: Path, tmp_path: Path) -> None:
    made = damage_of(shutil.copytree(finished, tmp_path / "out"), 300, 2)
    assert made["kinds"] > 100
    assert made["counts"] == {"cut": 300, "cut found": 300, "flip": 300, "flip found": 300}


@pytest.mark.slow
def test_verify_finds_a_missing_or_added_last_byte(finished: Path, tmp_path: Path) -> None:
    assert last_bytes(shutil.copytree(finished, tmp_path / "out"))["faults"] == []


@pytest.mark.slow
def test_a_damaged_corpus_is_refused_by_name_or_read_as_it_was() -> None:
    made = _row(damaged_corpora, 12, 1)
    for name in CHECKED:
        for way in ("cut", "flip"):
            assert made["counts"][f"{name}: {way}"].get("refused", 0) > 0
