"""Several hosts: network namespaces of this machine, each with an address of its own, TLS between them, links cut.

A scheduler, three workers and the driver have a namespace each; a further one holds the bridge between them. They share
nothing but the disk, as hosts of a cluster share a file system. Needs root and ``ip netns``.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from distributed.security import Security
from small_run import MODELS, write_small_recipe

from quadmix_plugin.parameters import ParameterSpace, sample_parameters

ADDRESSES = {"scheduler": 1, "driver": 2, "worker-1": 11, "worker-2": 12, "worker-3": 13}
WORKERS = [name for name in ADDRESSES if name.startswith("worker")]
SCORERS = ("ask-llm", "dclm-fasttext")
CERTIFICATE = {"tls_ca_file": "ca", "tls_client_cert": "cert", "tls_client_key": "key"}
IMPATIENT = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s",  # when a silent link counts as lost; Dask takes 11 s at least
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "10s",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)]),
}


def _why_not() -> str:
    """Why there can be no namespaces here; empty where they can be made."""
    if shutil.which("ip") is None:
        return "there is no command ip (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"quadmix-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    veth = ["ip", "-n", name, "link", "add", "name", "here", "type", "veth", "peer", "name", "there"]
    linked = subprocess.run(veth, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], check=True)
    return f"ip link add type veth: {linked.stderr.strip()}" if linked.returncode else ""


class Network:
    """Hosts of a bridge, by name; ``ip`` of each as ``address``."""

    def __init__(self) -> None:
        self._prefix = f"quadmix-{os.getpid()}-"
        self._switch = f"{self._prefix}switch"
        self._made: list[str] = []

    def make(self) -> None:
        """Namespaces, links and addresses."""
        self._add(self._switch)
        _ip("-n", self._switch, "link", "add", "name", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "dev", "bridge", "up")
        for name in ADDRESSES:
            host = self._prefix + name
            self._add(host)
            _ip("-n", host, "link", "set", "dev", "lo", "up")
            _ip("-n", host, "link", "add", "name", "eth0", "type", "veth", "peer", "name", name, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", "dev", name, "master", "bridge", "up")
            _ip("-n", host, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "dev", "eth0", "up")

    def _add(self, namespace: str) -> None:
        _ip("netns", "add", namespace)
        self._made.append(namespace)

    def remove(self) -> None:
        """Ends what still runs in the namespaces, and removes them; their links go with them."""
        with contextlib.ExitStack() as every:  # whatever one of them raises
            for namespace in self._made:
                every.callback(_remove, namespace)

    def address(self, name: str) -> str:
        """The address of a host."""
        return f"10.77.0.{ADDRESSES[name]}"

    @contextlib.contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """Takes the link of a host down for the time being: nothing gets through, nobody is told."""
        _ip("-n", self._switch, "link", "set", "dev", name, "down")
        try:
            yield
        finally:
            _ip("-n", self._switch, "link", "set", "dev", name, "up")

    def start(self, name: str, log: Path, *arguments: str) -> subprocess.Popen:
        """A Python of this environment on a host."""
        command = ["ip", "netns", "exec", self._prefix + name, sys.executable, *arguments]
        with log.open("w", encoding="utf-8") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **IMPATIENT}, cwd=log.parent
            )


def _remove(namespace: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
    for pid in map(int, listed.stdout.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _ip("netns", "del", namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """The hosts; what runs on them ends with the module."""
    if reason := _why_not():
        pytest.skip(f"no several hosts on this machine: {reason}")
    network = Network()
    try:
        network.make()
        yield network
    finally:
        network.remove()


def _certificates(folder: Path) -> dict[str, str]:
    folder.mkdir()
    security = Security.temporary()
    paths = {}
    for name, file in CERTIFICATE.items():
        path = folder / f"{file}.pem"
        path.write_text(getattr(security, name))
        paths[file] = str(path)
    return paths


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> dict[str, str]:
    return _certificates(tmp_path_factory.mktemp("tls") / "cluster")


class Cluster:
    """A scheduler and workers on their hosts, and runs from the driver's."""

    def __init__(self, network: Network, certificates: Mapping[str, str], folder: Path) -> None:
        self.network, self.folder, self.file = network, folder, folder / "scheduler.json"
        self._certificates = certificates
        self._processes: list[subprocess.Popen] = []
        self.workers: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Scheduler and workers; returns when all workers have registered."""
        self._dask("scheduler", "dask_scheduler", "--protocol", "tls", "--port", "8786")
        _wait_until(
            lambda: self.file.exists() and bool(self.file.read_text()), "the scheduler's file", *self._processes
        )
        for name in WORKERS:
            options = ("--nthreads", "1", "--nworkers", "1", "--memory-limit", "2GiB")
            self.workers[name] = self._dask(name, "dask_worker", *options, "--local-directory", str(self.folder / name))
        registered = lambda: self.log("scheduler").count("Register worker") >= len(WORKERS)  # noqa: E731
        _wait_until(registered, "the workers", *self.workers.values())

    def _dask(self, name: str, command: str, *options: str) -> subprocess.Popen:
        tls = [text for key, path in self._certificates.items() for text in (_FLAGS[key], path)]
        where = ("--host", self.network.address(name), "--scheduler-file", str(self.file), "--no-dashboard")
        process = self.network.start(
            name, self.folder / f"{name}.log", "-m", f"distributed.cli.{command}", *options, *where, *tls
        )
        self._processes.append(process)
        return process

    def log(self, name: str) -> str:
        """What a process has said."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8")

    def has_lost(self, name: str) -> bool:
        """Whether the scheduler has given a worker up."""
        place = f"tls://{self.network.address(name)}:"
        return any("Remove worker" in line and place in line for line in self.log("scheduler").splitlines())

    def begin(self, recipe: Path, out: Path, until: str = "export", **executor: str) -> subprocess.Popen:
        """``quadmix run`` on the driver's host."""
        section = {"name": "dask"} | {f"tls_{key}": path for key, path in self._certificates.items()} | executor
        if "address" not in section:
            section["scheduler_file"] = str(self.file)
        given = [text for key, value in section.items() for text in ("--set", f"executor.{key}={value}")]
        arguments = ["-m", "quadmix_plugin", "run", str(recipe), "--out", str(out), "--until", until, "--json"]
        return self.network.start("driver", self.folder / "driver.log", *arguments, *given)

    def end(self) -> None:
        """Stops what was started."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


_FLAGS = {"ca": "--tls-ca-file", "cert": "--tls-cert", "key": "--tls-key"}


@pytest.fixture
def cluster(network, certificates, tmp_path) -> Iterator[Cluster]:
    folder = tmp_path / "cluster"
    folder.mkdir()
    cluster = Cluster(network, certificates, folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()


def _wait_until(holds: Callable[[], bool], what: str, *processes: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < end, f"{what}: not there after 300 s"
        assert all(process.poll() is None for process in processes), f"{what}: a process has ended before"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Label, normalise, select by given parameters, export; 37 shards."""
    folder = tmp_path_factory.mktemp("hosts")
    path = write_small_recipe(folder, corpus={"documents_per_shard": 30}, rank={"merge_small_domains": 0})
    domains = tuple(sorted(set(pq.read_table(folder / "corpus.parquet")["true_domain"].to_pylist())))
    space = ParameterSpace(omega_max=0.5)
    theta = sample_parameters(1, len(SCORERS), len(domains), 0, space=space, domains=domains, scorers=SCORERS)[0]
    theta.save(folder / "theta.json")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["domain"] = {"classifier": "column", "column": "true_domain"}
    content["scorers"] = {name: {"model": str(MODELS / name)} for name in SCORERS}
    content["select"] = {"theta": "theta.json"}
    content["compare"] = {"selectors": {"random": {}}}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> dict[str, bytes]:
    """The artifacts of one process."""
    out = tmp_path_factory.mktemp("inline") / "out"
    command = [sys.executable, "-m", "quadmix_plugin", "run", str(recipe), "--out", str(out), "--until", "export"]
    subprocess.run(command, check=True, capture_output=True)
    return _artifacts(out)


def _artifacts(out: Path) -> dict[str, bytes]:
    folders = ("labels", "normalise", "selection", "tokens")
    paths = [path for folder in folders for path in sorted((out / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def _labelled(out: Path) -> int:
    return len(list((out / "manifest" / "label").glob("*.json")))


def _finished(process: subprocess.Popen, cluster: Cluster) -> None:
    code = process.wait(timeout=600)
    assert code == 0, "\n".join(cluster.log(name)[-1500:] for name in ("driver", "scheduler", *WORKERS))


@pytest.mark.slow
def test_three_hosts_make_what_one_process_makes(cluster, recipe, undisturbed, tmp_path) -> None:
    _finished(cluster.begin(recipe, tmp_path / "out"), cluster)
    found = _artifacts(tmp_path / "out")
    assert found == undisturbed
    assert sum(name.startswith("labels/") for name in found) == 37
    address = f"tls://{cluster.network.address('scheduler')}:8786"
    assert json.loads(cluster.file.read_text())["address"] == address
    _finished(cluster.begin(recipe, tmp_path / "by address", until="label", address=address), cluster)
    assert _artifacts(tmp_path / "by address").items() <= undisturbed.items()
    assert _labelled(tmp_path / "by address") > 37


@pytest.mark.slow
def test_a_short_cut_of_a_link_loses_nothing(cluster, recipe, undisturbed, tmp_path) -> None:
    process = cluster.begin(recipe, tmp_path / "out")
    _wait_until(lambda: _labelled(tmp_path / "out") >= 3, "labels", process)
    with cluster.network.cut("worker-2"):
        time.sleep(2)  # less than Dask's patience, here 12 s
    _finished(process, cluster)
    assert not cluster.has_lost("worker-2")
    assert _artifacts(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_a_worker_behind_a_long_cut_is_given_up_and_its_work_done_again(cluster, recipe, undisturbed, tmp_path) -> None:
    process = cluster.begin(recipe, tmp_path / "out")
    _wait_until(lambda: _labelled(tmp_path / "out") >= 3, "labels", process)
    with cluster.network.cut("worker-2"):
        _wait_until(lambda: cluster.has_lost("worker-2"), "the loss of worker-2", process)
    _finished(process, cluster)
    _wait_until(lambda: cluster.workers["worker-2"].poll() is not None, "the end of a worker without a scheduler")
    assert _artifacts(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_a_driver_behind_a_long_cut_says_so_and_the_same_command_goes_on(
    cluster, recipe, undisturbed, tmp_path
) -> None:
    process = cluster.begin(recipe, tmp_path / "out")
    _wait_until(lambda: _labelled(tmp_path / "out") >= 3, "labels", process)
    with cluster.network.cut("driver"):
        assert process.wait(timeout=600) == 1
    assert "connection to the Dask scheduler was lost; run the command again" in cluster.log("driver")
    done = _labelled(tmp_path / "out")
    assert 3 <= done < 37
    _finished(cluster.begin(recipe, tmp_path / "out"), cluster)
    assert _artifacts(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_a_scheduler_in_the_clear_is_refused_and_so_is_a_strangers_certificate(cluster, recipe, tmp_path) -> None:
    host = cluster.network.address("scheduler")
    process = cluster.begin(recipe, tmp_path / "out", address=f"tcp://{host}:8786")
    assert process.wait(timeout=120) == 78
    assert f"tcp://{host}:8786 is reached over a network without TLS" in cluster.log("driver")
    theirs = {f"tls_{key}": path for key, path in _certificates(tmp_path / "theirs").items()}
    process = cluster.begin(recipe, tmp_path / "out", **theirs)
    assert process.wait(timeout=300) == 1
    assert f"no Dask scheduler at tls://{host}:8786" in cluster.log("driver")
    assert _labelled(tmp_path / "out") == 0
    assert psutil.pid_exists(cluster.workers["worker-1"].pid)
