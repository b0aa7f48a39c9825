"""One run on every executor: the artifacts of one process, byte for byte."""

import psutil
import pytest
from faults import SHORT, contents

from quadmix_plugin.config import load_recipe
from quadmix_plugin.executors import DaskExecutor, make_executor
from quadmix_plugin.pipelines.context import open_run
from quadmix_plugin.pipelines.run import run_steps


@pytest.mark.parametrize(
    "executor",
    ["dask", pytest.param("ray_data", marks=pytest.mark.slow), pytest.param("xenna", marks=pytest.mark.slow)],
)
def test_every_executor_makes_the_same_bytes(executor, tiny_recipe, tiny_contents, dask_client, tmp_path):
    make = (lambda: DaskExecutor(client=dask_client)) if executor == "dask" else (lambda: make_executor(executor))
    before = {process.pid for process in psutil.process_iter()}
    with open_run(load_recipe(tiny_recipe), tmp_path / "out", make) as run:
        run_steps(run, SHORT)
    left = [each for each in psutil.process_iter(["name"]) if each.pid not in before and "ray" in each.info["name"]]
    assert left == []
    assert contents(tmp_path / "out") == tiny_contents
