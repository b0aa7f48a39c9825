"""One run on every executor: the artifacts of one process, byte for byte."""

from pathlib import Path

import psutil
import pytest
from faults import contents, write_tiny_recipe

from quadmix_plugin.config import load_recipe
from quadmix_plugin.executors import DaskExecutor, InlineExecutor, make_executor
from quadmix_plugin.pipelines.context import open_run
from quadmix_plugin.pipelines.run import run_steps

STEPS = ("label", "normalise", "select", "export")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def one_process(recipe, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("inline") / "out"
    with open_run(load_recipe(recipe), out, InlineExecutor) as run:
        run_steps(run, STEPS)
    return contents(out)


@pytest.mark.parametrize(
    "executor",
    ["dask", pytest.param("ray_data", marks=pytest.mark.slow), pytest.param("xenna", marks=pytest.mark.slow)],
)
def test_every_executor_makes_the_same_bytes(executor, recipe, one_process, dask_client, tmp_path):
    make = (lambda: DaskExecutor(client=dask_client)) if executor == "dask" else (lambda: make_executor(executor))
    before = {process.pid for process in psutil.process_iter()}
    with open_run(load_recipe(recipe), tmp_path / "out", make) as run:
        run_steps(run, STEPS)
    left = [each for each in psutil.process_iter(["name"]) if each.pid not in before and "ray" in each.info["name"]]
    assert left == []
    found = {name: digest for name, digest in contents(tmp_path / "out").items() if name != "recipe.yaml"}
    assert found == {name: digest for name, digest in one_process.items() if name != "recipe.yaml"}
