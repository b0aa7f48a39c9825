"""What fuzzing found, each as a small case that goes through the target that found it (fuzz/), without atheris."""

import json
import struct
import sys
from pathlib import Path

import pytest

from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.store import RunDirectory

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
try:
    import driver
    import index
    import manifest
    import recipe
finally:
    sys.path.pop(0)

RECIPES = {
    "a list as a key": (b"? [a]\n: 1", "line 1: a list as a key; give a name"),
    "a date that is none": (b"a: 2024-13-45", "type 'timestamp'; put text in quotes"),
    "text as a number": (b"a: !!int foo", "'foo' is not of the type 'int'; put text in quotes"),
    "text as true or false": (b"a: !!bool x", "'x' is not of the type 'bool'"),
    "a list as a mapping": (b"!!map [a]", "line 1: expected a mapping node"),
    "a letter beyond Unicode": (b'a: "\\UFFFFFFFF"', "not valid YAML"),
    "half a surrogate pair": (b'a: "\\uD800"', "half a surrogate pair; leave it out"),
    "NUL": (b'a: "\\0"', "has a NUL"),
    "not a number": (recipe.MINIMAL + b"search: {trust_radius: .nan}", "nan is not a finite number"),
    "a number of 5,000 digits": (recipe.MINIMAL + b"seed: 0x" + b"f" * 5000, "a number of 5002 characters"),
    "many values": (b"a: [" + b"a," * 10_000 + b"]", "line 1: more than 10000 values; give globs"),
    "deep": (b"a: " + b"[" * 100, "line 1: more than 64 levels"),
    "large": (b"#" * (1 << 19), "more than 262144 bytes"),
    "an alias in --set": (recipe.MINIMAL + recipe.SET + b"a=&a [*a]", "the value is not valid YAML"),
    "a date in --set": (recipe.MINIMAL + recipe.SET + b"a=2024-13-45", "the value is not valid YAML"),
    "a key of 3,000 parts": (recipe.MINIMAL + recipe.SET + b"a." * 3000 + b"b=1", "3001 parts of a key"),
    "an address with an open bracket": (
        recipe.MINIMAL + b"executor: {address: 'tls://[x'}",
        "'tls://[x' is no address of a Dask scheduler",
    ),
    "a host of no valid name": (
        recipe.MINIMAL + b"executor: {address: 'tcp://" + b"a" * 70 + b".b:1'}",
        "is reached over a network without TLS",
    ),
    "a number as a key": (recipe.MINIMAL + b"1: 2", "1: keys should be strings; found 1"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipe(tmp_path: Path, case: str) -> None:
    data, said = RECIPES[case]
    with pytest.raises(RecipeError) as caught:
        recipe.target(data, tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    driver.run(recipe.target, data, tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        recipe.MINIMAL,
        recipe.seeds()["set.yaml"],
        recipe.MINIMAL + recipe.SET + b"tokenizer.model=" + b"a" * 5000,  # as a folder, too long a name to ask for
        recipe.MINIMAL + b"select: {theta: 's3://a/?" + b"token" * 40_000 + b"'}",
    ],
    ids=["minimal", "set", "long", "a long query"],
)
def test_recipe_that_is_one(tmp_path: Path, data: bytes) -> None:
    driver.run(recipe.target, data, tmp_path)
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8").startswith("name: a\nseed: 0\n")


def _index(lengths: list[int], pointers: list[int], code: int = 4, count: int | None = None) -> bytes:
    """An input of the target ``index``: a ``.bin`` as large as these lengths ask for, one document per sequence."""
    n = len(lengths)
    ends = range(n + 1)
    size = sum(lengths) * {4: 4, 7: 4, 6: 8}[code]
    sizes = (n if count is None else count, n + 1)
    return struct.pack(f"<H9sQBQQ{n}i{n}q{n + 1}q", size, b"MMIDIDX\0\0", 1, code, *sizes, *lengths, *pointers, *ends)


INDEXES = {
    "more sequences than memory has addresses": (_index([2, 3], [0, 8], count=1 << 63), "not a whole Megatron index"),
    "a negative length": (_index([5, -3, 4], [0, 20, 8]), "do not lie one after the other"),
    "sequences that overlap": (_index([2, 3], [0, 4]), "do not lie one after the other"),
    "ids with fractions": (_index([2, 3], [0, 16], code=6), "holds float64, and ids are whole numbers"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_index(tmp_path: Path, case: str) -> None:
    data, said = INDEXES[case]
    with pytest.raises(InputError, match=said):
        index.target(data, tmp_path)


def test_index_that_is_one(tmp_path: Path) -> None:
    for data in (*index.seeds().values(), _index([2, 3], [0, 8])):
        driver.run(index.target, data, tmp_path)
        assert index.TokenFile.open(tmp_path / "t").n_tokens * 2 <= int.from_bytes(data[:2], "little")


ENTRY = {"path": "report.html", "bytes": 13, "sha256": "0" * 64, "key": "k", "facts": {}}
DEEP = "a/" * 100 + "b"

MANIFESTS = {
    "a list as key": ("report.html.json", json.dumps({**ENTRY, "key": ["k"]})),
    "a folder as an artifact": ("labels.json", json.dumps({**ENTRY, "path": "labels", "bytes": 4096})),
    "a list as the key of the step": ("_SUCCESS.json", json.dumps({"key": ["k"], "artifacts": 0, "facts": {}})),
    "not a number among the facts": ("_SUCCESS.json", '{"key": "k", "artifacts": 0, "facts": {"rows": NaN}}'),
    "a number that is infinite": ("report.html.json", json.dumps(ENTRY).replace("{}", '{"rows": 1e999}')),
    "half a surrogate pair": ("_SUCCESS.json", r'{"key": "k", "artifacts": 0, "facts": {"a": "\ud800"}}'),
    "deep": ("_SUCCESS.json", "[" * 100_000),
    "a name longer than a file's": (f"{DEEP.replace('/', '%')}.json", json.dumps({**ENTRY, "path": DEEP})),
    "a name longer than any path": ("a.json", json.dumps({**ENTRY, "path": "a/" * 5000 + "b"})),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifest(tmp_path: Path, case: str) -> None:
    name, content = MANIFESTS[case]
    driver.run(manifest.target, f"{name}\n{content}".encode(), tmp_path)
    run = RunDirectory(tmp_path / "run")
    assert (run.root / "manifest" / "label" / name).read_text(encoding="utf-8") == content
    assert [fault for fault in run.verify()[1] if name in fault or name.removesuffix(".json") in fault]
    assert run.step("label", "k").entries() == []
    assert not run.step("label", "k").is_done


def test_manifest_that_is_one(tmp_path: Path) -> None:
    driver.run(manifest.target, manifest.seeds()["all"], tmp_path)
    run = RunDirectory(tmp_path / "run")
    for path in (run.root / "manifest" / "label").iterdir():
        path.write_bytes(path.read_bytes() + b"\n")  # which no block ends with
    assert run.verify() == (2, [])
    assert run.step("label", "k").summary() == {"rows": 3}


def test_a_manifest_reader_that_looks_elsewhere_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_read", lambda run: (run.root.parent / "outside.json").exists())
    with pytest.raises(ValueError, match=r"looked at '.*outside\.json', which is not in the run directory"):
        manifest.target(b"", tmp_path)
    monkeypatch.setattr(manifest, "_read", lambda run: (run.root.parent / "outside.json").read_bytes())
    with pytest.raises(ValueError, match="which is not in the run directory"):
        manifest.target(b"", tmp_path)


def test_a_slow_input_and_a_foreign_error_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "MOST_SECONDS", -1.0)
    with pytest.raises(driver.SlowError, match="3 bytes took"):
        driver.run(lambda data, folder: None, b"abc", tmp_path)
    with pytest.raises(ZeroDivisionError):
        driver.run(lambda data, folder: 1 / 0, b"", tmp_path)
