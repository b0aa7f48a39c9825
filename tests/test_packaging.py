"""What a user installs and imports: one import root, a light import, and a wheel with all of its files."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import quadmix_plugin
import quadmix_plugin.stages

ROOT = Path(__file__).parents[1]


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("import stages", "import from quadmix_plugin.stages, as in: from quadmix_plugin.stages import MergeRank"),
        ("import stages.merge_rank", "import from quadmix_plugin.stages, as in"),
        ("import pipelines", "import from quadmix_plugin.pipelines, as in: from quadmix_plugin.pipelines import run"),
        ("from pipelines import context", "import from quadmix_plugin.pipelines, as in"),
    ],
)
def test_the_short_names_say_how_to_import(statement: str, says: str) -> None:
    done = python("-c", statement, cwd=ROOT)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert f"ImportError: {says}" in message
    if ", as in: " in message:
        advice = python("-c", message.split(", as in: ")[1], cwd=ROOT)
        assert advice.returncode == 0, advice.stderr


def test_a_stage_is_one_class_however_it_is_reached() -> None:
    from quadmix_plugin.stages import MergeRank
    from quadmix_plugin.stages.merge_rank import MergeRank as Same

    assert MergeRank is Same
    assert MergeRank.__module__ == "quadmix_plugin.stages.merge_rank"
    assert "stages" not in sys.modules


@pytest.mark.parametrize("name", quadmix_plugin.stages.__all__)
def test_every_stage_that_is_named_imports(name: str) -> None:
    assert getattr(quadmix_plugin.stages, name).__name__ == name
    assert name in dir(quadmix_plugin.stages)


@pytest.mark.parametrize("name", quadmix_plugin.__all__)
def test_every_stable_name_imports(name: str) -> None:
    assert getattr(quadmix_plugin, name).__name__ == name


@pytest.mark.parametrize("package", ["quadmix_plugin", "quadmix_plugin.stages"])
def test_an_unknown_name_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nothing'"):
        _ = importlib.import_module(package).Nothing


# What an import must not load; the first line is the package itself, the second its mathematics.
HEAVY = {
    "quadmix_plugin": {"torch", "dask", "ray", "nemo_curator", "numpy", "pandas", "pyarrow", "pydantic", "scipy"},
    "quadmix_plugin.stages": {"torch", "dask", "ray", "nemo_curator", "numpy", "pandas", "pyarrow"},
    "quadmix_plugin.sampling": {"torch", "dask", "ray", "nemo_curator", "transformers", "matplotlib", "lightgbm"},
    "quadmix_plugin.store": {"torch", "dask", "ray", "nemo_curator", "transformers", "matplotlib", "lightgbm"},
    "quadmix_plugin.registry": {"torch", "dask", "ray", "nemo_curator", "transformers", "matplotlib", "lightgbm"},
}


@pytest.mark.parametrize("package", HEAVY)
def test_an_import_loads_nothing_heavy(package: str) -> None:
    code = f"import sys, json, {package}; print(json.dumps(sorted(name.split('.')[0] for name in sys.modules)))"
    done = python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert HEAVY[package] & set(json.loads(done.stdout)) == set()


def test_the_version_is_that_of_the_distribution() -> None:
    assert version("quadmix-plugin") == quadmix_plugin.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built from a copy so that nothing is left in it."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "tests", "examples")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    done = python("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(copy / "out"), cwd=copy)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "out").glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_has_every_source_file_once(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "quadmix_plugin"
    folders = [(package, "quadmix_plugin"), *((ROOT / n, f"quadmix_plugin/{n}") for n in ("stages", "pipelines"))]
    wanted = set()
    for folder, inside in folders:
        for path in folder.rglob("*"):  # does not follow the two symlinks
            relative = path.relative_to(folder)
            hidden = any(part.startswith((".", "__pycache__")) for part in relative.parts)
            if path.is_file() and not hidden:
                wanted.add(f"{inside}/{relative.as_posix()}")
    assert names == wanted
    assert "quadmix_plugin/py.typed" in names
    assert any(name.startswith("quadmix_plugin/templates/") for name in names)
    assert any(name.startswith("quadmix_plugin/pipelines/recipes/") and name.endswith(".yaml") for name in names)
    assert "quadmix_plugin/stages/merge_rank.py" in names
    assert {name.split("/")[0] for name in names} == {"quadmix_plugin"}


def test_the_wheel_works_without_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import json, sys, importlib.util as u, quadmix_plugin, quadmix_plugin.stages.sigmoid_sample as s\n"
        "from importlib.metadata import distribution\n"
        "scripts = [p.name for p in distribution('quadmix-plugin').entry_points]\n"
        "print(json.dumps([quadmix_plugin.__file__, s.__file__, scripts, u.find_spec('stages') is None]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = python("-P", "-c", code, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    package, stage, scripts, no_short_name = json.loads(done.stdout.splitlines()[-1])
    assert package == str(tmp_path / "quadmix_plugin" / "__init__.py")
    assert stage == str(tmp_path / "quadmix_plugin" / "stages" / "sigmoid_sample.py")
    assert no_short_name
    assert {"quadmix", "fineweb-edu", "lightgbm"} <= set(scripts)
