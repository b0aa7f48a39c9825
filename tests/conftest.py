"""Fixtures that are dear to make: a real Dask cluster on loopback and a finished run, shared by the whole session."""

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


@pytest.fixture(scope="session")
def recipe_path(tmp_path_factory):
    """A recipe over a tenth of the quickstart corpus."""
    from small_run import write_small_recipe

    return write_small_recipe(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory):
    """A recipe whose labels are columns and whose parameters are given; a run until its export takes a second."""
    from faults import write_tiny_recipe

    return write_tiny_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_contents(tiny_recipe, tmp_path_factory):
    """File → sha256 of that run until its export, undisturbed and in one process; see ``faults.contents``."""
    from faults import SHORT, contents

    from quadmix_plugin.config import load_recipe
    from quadmix_plugin.pipelines.context import open_run
    from quadmix_plugin.pipelines.run import run_steps

    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with open_run(load_recipe(tiny_recipe), out) as run:
        run_steps(run, SHORT)
    return contents(out)


@pytest.fixture(scope="session")
def finished(recipe_path):
    """The run directory of that recipe after an undisturbed run in one process; tests only read it."""
    from quadmix_plugin.config import load_recipe
    from quadmix_plugin.pipelines.context import open_run
    from quadmix_plugin.pipelines.run import run_steps

    out = recipe_path.parent / "out"
    with open_run(load_recipe(recipe_path), out) as run:
        run_steps(run)
    return out
