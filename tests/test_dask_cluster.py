"""Where Dask work may run: schedulers that are there, by TLS off loopback; clusters that grow; what is refused."""

import contextlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
from distributed import Client, LocalCluster
from distributed.security import Security
from nemo_curator.pipeline import Pipeline
from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import DocumentBatch
from nemo_curator.tasks.utils import TaskPerfUtils
from small_run import write_small_recipe

from quadmix_plugin.config import load_recipe
from quadmix_plugin.dask_cluster import OwnCluster, check_address
from quadmix_plugin.errors import QuadmixError, RecipeError
from quadmix_plugin.executors import DaskExecutor, InlineExecutor

Batch = DocumentBatch
_CERTIFICATE = {"tls_ca_file": "ca", "tls_client_cert": "cert", "tls_client_key": "key"}


@dataclass
class Where(ProcessingStage[Batch, Batch]):
    """Says which process a task was in, and whether its host had been set up; takes a while."""

    seconds: float = 0.0
    marker: str = ""
    name: str = "where"

    def setup_on_node(self, node_info=None, worker_metadata=None) -> None:
        Path(self.marker).write_text(node_info.node_id)

    def process(self, task: Batch) -> Batch:
        time.sleep(self.seconds)
        data = pd.DataFrame({"id": task.to_pandas()["id"], "pid": os.getpid(), "host": Path(self.marker).read_text()})
        return Batch(dataset_name="d", data=data, _metadata=task._metadata, _stage_perf=list(task._stage_perf))


def _tasks(n: int) -> list[Batch]:
    return [Batch(dataset_name="d", data=pd.DataFrame({"id": [i]})) for i in range(n)]


def _run(executor, n: int, **options) -> list[Batch]:
    return list(Pipeline(name="p", stages=[Where(**options)]).run(executor=executor, initial_tasks=_tasks(n)) or [])


def _ids(tasks: list[Batch]) -> list[int]:
    return [int(task.to_pandas()["id"].iloc[0]) for task in tasks]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> dict[str, str]:
    folder, security = tmp_path_factory.mktemp("tls"), Security.temporary()
    paths = {}
    for name, file in _CERTIFICATE.items():
        paths[file] = str(folder / f"{file}.pem")
        Path(paths[file]).write_text(getattr(security, name))
    return paths


@contextlib.contextmanager
def _dask(command: str, *options: str, **tls: str) -> Iterator[subprocess.Popen]:
    """A process of Dask's own command line, ended with the block."""
    flags = [text for name, path in tls.items() for text in ({"ca": "--tls-ca-file"}.get(name, f"--tls-{name}"), path)]
    arguments = [sys.executable, "-m", "distributed.cli." + command, *options, *flags]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    output = subprocess.DEVNULL
    process = subprocess.Popen(arguments, stdout=output, stderr=output, env=environment)
    family = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        family += family[0].children(recursive=True)
        process.terminate()
        process.wait(timeout=30)
        for left in psutil.wait_procs(family, timeout=10)[1]:
            left.kill()


def test_a_scheduler_reached_by_tls_and_found_by_its_file(certificates, tmp_path):
    file = tmp_path / "scheduler.json"
    where = ("--host", "127.0.0.1", "--no-dashboard")
    options = {f"tls_{name}": path for name, path in certificates.items()}
    with (
        _dask(
            "dask_scheduler", "--protocol", "tls", "--port", "0", "--scheduler-file", str(file), *where, **certificates
        ),
        _dask("dask_worker", "--scheduler-file", str(file), "--nthreads", "1", *where, **certificates),
    ):
        _wait_for(file)
        address = json.loads(file.read_text())["address"]
        assert address.startswith("tls://127.0.0.1:")
        with DaskExecutor(scheduler_file=str(file), **options) as executor:
            tasks = _run(executor, 5, marker=str(tmp_path / "node"))
        assert _ids(tasks) == list(range(5))
        assert os.getpid() not in {int(task.to_pandas()["pid"].iloc[0]) for task in tasks}
        with pytest.raises(RecipeError, match=r"wants TLS and no certificates are named; give tls_ca"):
            _run(DaskExecutor(address=address), 1, marker=str(tmp_path / "node"))


def _wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists() or not file.read_text():
        assert time.monotonic() < end, f"{file} was not written"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "address", ["tcp://192.0.2.7:8786", "tcp://0.0.0.0:8786", "ws://192.0.2.7:1", "ucx://a.test:8786"]
)
def test_a_scheduler_off_loopback_without_tls_is_refused_before_anything_is_sent(address, tmp_path):
    with pytest.raises(RecipeError, match=r"^executor.address: .* without TLS, where anyone .* give tls://…"):
        DaskExecutor(address=address)
    path = write_small_recipe(tmp_path, executor={"name": "dask", "address": address})
    with pytest.raises(RecipeError, match=r"^executor.address: .* without TLS"):
        load_recipe(path)
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": address}))
    with pytest.raises(RecipeError, match=r"^executor.scheduler_file: .*scheduler.json: .* without TLS"):
        DaskExecutor(scheduler_file=str(file))._connect()


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:8786", "tcp://localhost:1", "tcp://[::1]:8786", "tls://a.test:8786"]
)
def test_loopback_and_tls_are_allowed(address):
    check_address(address)


@pytest.mark.parametrize("address", ["127.0.0.1:8786", "tcp://127.0.0.1", "host", "tcp://127.0.0.1:port", ""])
def test_what_is_no_address_is_named(address):
    with pytest.raises(RecipeError, match=r"is no address of a Dask scheduler; give one such as tls://host:8786$"):
        check_address(address)


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"address": 3}', "\x00\xff"])
def test_a_file_of_no_scheduler_is_named(content, tmp_path):
    file = tmp_path / "scheduler.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RecipeError, match=r"^executor.scheduler_file: .*scheduler.json"):
        DaskExecutor(scheduler_file=str(file))._connect()


def test_certificates_are_checked_before_anything_is_sent(certificates, tmp_path):
    address = "tls://127.0.0.1:8786"
    with pytest.raises(
        RecipeError, match=r"^executor.tls_key: missing; TLS needs tls_ca, tls_cert and tls_key together$"
    ):
        DaskExecutor(address=address, tls_ca=certificates["ca"], tls_cert=certificates["cert"])
    options = {f"tls_{name}": path for name, path in certificates.items()}
    with pytest.raises(RecipeError, match=r"^executor.tls_cert: .*none.pem: no such file"):
        DaskExecutor(address=address, **{**options, "tls_cert": str(tmp_path / "none.pem")})
    (tmp_path / "bad.pem").write_text("no certificate")
    executor = DaskExecutor(address=address, **{**options, "tls_cert": str(tmp_path / "bad.pem")})
    with pytest.raises(RecipeError, match=r"^executor.tls_ca, tls_cert, tls_key: not usable"):
        executor._connect()


@pytest.mark.parametrize(
    ("executor", "fault"),
    [
        ({"address": "tls://a.test:1", "scheduler_file": "f"}, "address and scheduler_file are both given"),
        ({"address": "tls://a.test:1", "workers": 2}, "workers is given, and the workers behind address are there"),
        ({"scheduler_file": "f", "max_workers": 2}, "the workers behind scheduler_file are there already"),
        ({"tls_ca": "recipe.yaml", "tls_cert": "recipe.yaml", "tls_key": "recipe.yaml"}, "give its address too"),
        ({"rmm_pool_size": 1.5}, "rmm_pool_size"),
        ({"rmm_pool_size": "much"}, "rmm_pool_size"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(executor, fault, tmp_path):
    with pytest.raises(RecipeError, match=fault):
        load_recipe(write_small_recipe(tmp_path, executor={"name": "dask", **executor}))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"max_workers": 1, "n_workers": 2}, r"^executor.max_workers: 1 is less than workers, 2$"),
        ({"max_workers": 2, "gpu_workers": True}, r"^executor.max_workers: with one worker per GPU"),
        ({"rmm_pool_size": "1GB"}, r"^executor.rmm_pool_size: only for one worker per GPU"),
        ({"protocol": "ucx"}, r"^executor.protocol: "),
        ({"address": "tcp://127.0.0.1:1", "max_workers": 2}, r"^executor.max_workers: the workers behind 'address'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, fault):
    with pytest.raises(RecipeError, match=fault):
        DaskExecutor(**options)


def test_no_scheduler_there_is_our_error(tmp_path):
    from dask import config

    with (
        config.set({"distributed.comm.timeouts.connect": "2s"}),
        pytest.raises(QuadmixError, match="no Dask scheduler"),
    ):
        DaskExecutor(address="tcp://127.0.0.1:1")._connect()


@pytest.mark.slow
def test_an_adaptive_cluster_grows_with_its_work(tmp_path):
    with DaskExecutor(n_workers=1, max_workers=2) as executor:
        tasks = _run(executor, 60, seconds=0.5, marker=str(tmp_path / "node"))
    assert _ids(tasks) == list(range(60))
    assert len({int(task.to_pandas()["pid"].iloc[0]) for task in tasks}) == 2


@pytest.mark.slow
def test_a_host_that_comes_late_is_set_up_before_its_first_task(tmp_path):
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        executor = DaskExecutor(client=client)
        late = ("--host", "127.0.0.2", "--no-dashboard", "--nthreads", "1")
        executor._connect()
        with _dask("dask_worker", cluster.scheduler_address, *late):
            tasks = _run(executor, 120, seconds=0.25, marker=str(tmp_path / "node"))
    assert _ids(tasks) == list(range(120))
    hosts = {task.to_pandas()["host"].iloc[0] for task in tasks}
    assert hosts == {"127.0.0.1", "127.0.0.2"}


def test_statistics_of_stages_are_those_of_curator(dask_executor, tmp_path):
    found = [
        TaskPerfUtils.collect_stage_metrics(_run(executor, 4, marker=str(tmp_path / "node")))
        for executor in (InlineExecutor(), dask_executor)
    ]
    for metrics in found:
        assert list(metrics) == ["where"]
        assert metrics["where"]["num_items_processed"].tolist() == [1.0] * 4
        assert (metrics["where"]["process_time"] > 0).all()


@pytest.mark.skipif(
    importlib.util.find_spec("dask_cuda") is None, reason="dask-cuda (the extra cuda12) is not installed"
)
def test_options_of_gpu_workers_are_those_of_dask_cuda():
    from dask_cuda import LocalCUDACluster  # pyright: ignore[reportMissingImports]

    known = {
        *inspect.signature(LocalCUDACluster.__init__).parameters,
        *inspect.signature(LocalCluster.__init__).parameters,
    }
    options = OwnCluster(gpu_workers=True, rmm_pool_size=0.3)._gpu_options()
    assert set(options) <= known
