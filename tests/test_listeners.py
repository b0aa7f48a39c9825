"""While a run works, none of its processes listens where another machine could reach it."""

import ipaddress
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hostile_corpus import write_corpus_recipe

from quadmix_plugin.pretraining.launch import processes_here

RECIPE_OF = {"documents": [f"{i}" for i in range(60)], "texts": ["some words of a text", "and other words"]}


def _addresses(process: psutil.Popen) -> Iterator[tuple[str, str]]:
    """Where the process and its descendants listen now: TCP, and UDP sockets that are bound."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in family:
        try:
            found, name = each.net_connections("inet"), each.name()
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
            continue
        for socket in found:
            if socket.status == psutil.CONN_LISTEN or (socket.status == psutil.CONN_NONE and not socket.raddr):
                yield name, socket.laddr.ip


def _run(folder: Path, *options: str) -> tuple[set[tuple[str, str]], int]:
    """The listeners that were seen in samples from begin to end of ``quadmix run``, and how many samples saw any."""
    recipe = write_corpus_recipe(folder, RECIPE_OF["documents"], ["d", "e"], RECIPE_OF["texts"])
    command = [sys.executable, "-m", "quadmix_plugin", "run", str(recipe), "--until", "label", *options]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (folder / "log").open("wb") as log:
        process = psutil.Popen(
            [*command, "--out", str(folder / "out")], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        seen, samples = _watched(process)
    assert process.returncode == 0, (folder / "log").read_text(encoding="utf-8")[-3000:]
    return seen, samples


def _watched(process: psutil.Popen) -> tuple[set[tuple[str, str]], int]:
    """The listeners of a process until it ends, and how many samples saw any."""
    seen: set[tuple[str, str]] = set()
    samples = 0
    while process.poll() is None:
        now = set(_addresses(process))
        seen |= now
        samples += bool(now)
        try:
            process.wait(0.1)
        except psutil.TimeoutExpired:
            continue
    return seen, samples


def _off_loopback(seen: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """What is left without 127.0.0.0/8, also as gRPC writes it (``::ffff:127.0.0.1``), and ``::1``."""
    found = {}
    for name, address in seen:
        parsed = ipaddress.ip_address(address)
        found[name, address] = getattr(parsed, "ipv4_mapped", None) or parsed
    return {each for each, parsed in found.items() if not parsed.is_loopback}


def test_a_listener_on_every_address_would_be_seen() -> None:
    """The probe of this file, on a process that does what ours must not."""
    program = "import socket; s = socket.create_server(('0.0.0.0', 0)); print('on', flush=True); input()"
    with psutil.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert _off_loopback(set(_addresses(process)))
        process.communicate(b"\n")


@pytest.mark.slow
def test_processes_of_one_machine_meet_on_loopback_only(tmp_path: Path) -> None:
    """torchrun's own way to bring them together listens on every address, and unpickles what it is told there."""
    script = tmp_path / "meet.py"
    script.write_text(
        "import os, sys, torch\n"
        "from quadmix_plugin.proxy.megatron_model import start_parallel_state\n"
        "start_parallel_state(torch.device('cpu'), 2)\n"
        "total = torch.ones(1)\n"
        "torch.distributed.all_reduce(total)\n"
        "open(sys.argv[1] + os.environ['RANK'], 'w').write(str(total.item()))\n"
        "torch.distributed.barrier()\n",
        encoding="utf-8",
    )
    with processes_here(2) as (command, variables):
        folder = next(Path(word.partition("=")[2]).parent for word in command if "endpoint" in word)
        process = psutil.Popen([*command, str(script), str(tmp_path / "sum")], env={**os.environ, **variables})
        seen, samples = _watched(process)
    assert process.returncode == 0
    assert [(tmp_path / f"sum{rank}").read_text(encoding="utf-8") for rank in range(2)] == ["2.0", "2.0"]
    assert samples
    assert _off_loopback(seen) == set()
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["dask", "ray_data"])
def test_a_run_listens_on_loopback_only(executor: str, tmp_path: Path) -> None:
    """Xenna, whose pipelines take a minute each to start, is asked in test_executors.py."""
    seen, samples = _run(tmp_path, "--executor", executor)
    assert samples >= 5
    assert _off_loopback(seen) == set()
