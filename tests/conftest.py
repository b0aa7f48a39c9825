"""Fixtures for tests that need a real Dask cluster: worker processes on loopback, shared by the whole session."""

import pytest


@pytest.fixture(scope="session")
def dask_client(tmp_path_factory):
    """A client of two real worker processes; a test that kills one gets it back, nobody closes it."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit="2GiB",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            local_directory=str(tmp_path_factory.mktemp("dask")),
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def dask_executor(dask_client):
    """A ``DaskExecutor`` on the shared workers."""
    from quadmix_plugin.executors import DaskExecutor

    return DaskExecutor(client=dask_client)


@pytest.fixture
def run_dir(tmp_path):
    """An empty run directory."""
    from quadmix_plugin.store import RunDirectory

    return RunDirectory.open(tmp_path / "run")
