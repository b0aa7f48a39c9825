"""Every key of a recipe misspelt once: found before any work, exit code 78, and the right key is suggested."""

import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from quadmix_plugin import registry
from quadmix_plugin.cli import main
from quadmix_plugin.config import Recipe, load_recipe
from quadmix_plugin.errors import RecipeError

Keys = tuple[str, ...]

LETTERS = "abcdefghijklmnopqrstuvwxyz_"
LEAST_SHARE = 0.95


def _models(annotation: Any) -> Iterator[tuple[Keys, type[BaseModel]]]:
    """The sections in an annotation; of a mapping, the section is under the name ``x``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield (), annotation
    else:
        arguments = get_args(annotation)
        between = ("x",) if get_origin(annotation) is dict else ()
        yield from ((between + keys, model) for each in arguments for keys, model in _models(each))


def _keys(model: type[BaseModel], above: Keys = ()) -> Iterator[tuple[Keys, set[str]]]:
    """Every key of a model and of the sections in it, each with the keys beside it."""
    for name, field in model.model_fields.items():
        yield (*above, name), set(model.model_fields)
        for between, section in _models(field.annotation):
            yield from _keys(section, (*above, name, *between))


def _misspelt(key: str, beside: set[str]) -> str:
    """One letter dropped, doubled or replaced, or two swapped; always the same way, and never another key."""
    generator = random.Random(key)  # noqa: S311
    while True:
        at = generator.randrange(len(key))
        made = (
            key[:at] + key[at + 1 :],
            key[:at] + key[at] + key[at:],
            key[:at] + generator.choice(LETTERS) + key[at + 1 :],
            key[:at] + key[at : at + 2][::-1] + key[at + 2 :],
        )[generator.randrange(4)]
        if made and made not in beside:
            return made


KEYS = dict(_keys(Recipe))
# Keys that stand among the options of a plug-in, and so in no model.
KEYS |= {("scorers", "column", "scorer"): {"scorer"}}
KEYS |= {("compare", "selectors", "random", key): {"selector", "times"} for key in ("selector", "times")}

MINIMAL = {
    "name": "a",
    "corpus": {"path": "a.jsonl"},
    "tokenizer": {"model": "t"},
    "domain": {"classifier": "column", "column": "d"},
    "scorers": {"column": {"column": "s"}},
    "validation": {"path": "v.jsonl"},
}


def _recipe(folder: Path, keys: Keys, wrong: str) -> Path:
    """A recipe with one key misspelt, whatever its value was."""
    content: Any = yaml.safe_load(yaml.safe_dump(MINIMAL))
    target = content
    for key in keys[:-1]:
        target = target.setdefault(key, {})
    target[wrong] = target.pop(keys[-1], 1)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _share(what: str, cases: dict[str, tuple[str, Callable[[], object]]]) -> None:
    """Runs what must fail; each case has the key that the error must suggest."""
    missed = []
    for name, (key, call) in cases.items():
        with pytest.raises(RecipeError) as caught:
            call()
        assert caught.value.exit_code == 78
        assert "\n" not in str(caught.value)
        if f"{name}: unknown key; did you mean {key!r}?" not in str(caught.value):
            missed.append(f"{key}: {caught.value}")
    share = 1 - len(missed) / len(cases)
    print(f"{what}: {len(cases)} misspelt, {share:.1%} with the right suggestion", *missed, sep="\n  ")
    assert share >= LEAST_SHARE, missed


def _dotted(keys: Keys, wrong: str) -> str:
    return ".".join((*keys[:-1], wrong))


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_keys_are_those_of_every_section() -> None:
    assert len(KEYS) > 100
    assert {("name",), ("proxy", "number"), ("evaluate", "local", "x", "prompt"), ("domain", "top_k")} < set(KEYS)
    assert all(_misspelt(keys[-1], beside) not in beside for keys, beside in KEYS.items())


def test_in_the_file(tmp_path: Path) -> None:
    cases = {}
    for keys, beside in KEYS.items():
        wrong = _misspelt(keys[-1], beside)
        cases[_dotted(keys, wrong)] = (
            keys[-1],
            lambda keys=keys, wrong=wrong: load_recipe(_recipe(tmp_path, keys, wrong)),
        )
    _share("keys of a recipe", cases)


def test_in_set(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    cases = {}
    for keys, beside in KEYS.items():
        name = _dotted(keys, _misspelt(keys[-1], beside))
        cases[name] = (keys[-1], lambda name=name: load_recipe(path, [f"{name}=3"]))
    _share("keys of --set", cases)


@pytest.mark.slow
def test_options_of_every_plug_in() -> None:
    cases = {}
    for group in registry.GROUPS:
        for plugin in registry.names(group):
            known = {option.name for option in fields(registry.load(group, plugin)) if option.init}
            for key in sorted(known):
                wrong, place = _misspelt(key, known), f"{group}.{plugin}"
                cases[f"{place}.{wrong}"] = (
                    key,
                    lambda group=group, plugin=plugin, wrong=wrong, place=place: registry.create(
                        group, plugin, {wrong: 1}, place
                    ),
                )
    assert len(cases) > 80
    _share("options of plug-ins", cases)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("scorers.column.colum=s", "scorers.column.colum: unknown key; did you mean 'column'?"),
        ("scorers.x={scoer: column, column: s}", "scorers.x.scoer: unknown key; did you mean 'scorer'?"),
        (
            "compare.selectors.best.selectr=top_k",
            "compare.selectors.best.selectr: unknown key; did you mean 'selector'?",
        ),
        ("compare.selectors.top_k.per_domian=true", "top_k.per_domian: unknown key; did you mean 'per_domain'?"),
        ("compare.selectors.random.optin=1", "compare.selectors.random.optin: unknown key; known are none"),
        ("proxy.options.shap=proxy-tiny", "proxy.options.shap: unknown key; did you mean 'shape'?"),
        ("proxi.number=3", "proxi: unknown key; did you mean 'proxy'?"),
    ],
)
def test_options_in_a_recipe(tmp_path: Path, override: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    assert said in str(caught.value)


@pytest.mark.slow
def test_command_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, right = tmp_path / "out", 0
    for keys, beside in KEYS.items():
        wrong = _misspelt(keys[-1], beside)
        path = _recipe(tmp_path, keys, wrong)
        monkeypatch.setattr(sys, "argv", ["quadmix", "run", str(path), "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 78, keys
        assert [each.name for each in tmp_path.iterdir()] == ["recipe.yaml"], keys
        right += f"{_dotted(keys, wrong)}: unknown key; did you mean {keys[-1]!r}?" in capsys.readouterr().err
    with capsys.disabled():
        print(f"\nquadmix run: {len(KEYS)} misspelt, all with exit code 78 and no file, {right} with the right key")
    assert right >= LEAST_SHARE * len(KEYS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        *(("name",), ("corpus", "path"), ("proxy", "number"), ("executor", "memory_limit"), ("domain", "classifier")),
        *(("evaluate", "local", "x", "prompt"), ("scorers", "column", "scorer"), ("compare", "selectors")),
    ],
    ids=".".join,
)
def test_command_in_a_process_of_its_own(tmp_path: Path, keys: Keys) -> None:
    wrong = _misspelt(keys[-1], KEYS[keys])
    path = _recipe(tmp_path, keys, wrong)
    command = [sys.executable, "-m", "quadmix_plugin", "run", str(path), "--out", str(tmp_path / "out")]
    began, before = time.perf_counter(), _seconds_of_children()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall, work = time.perf_counter() - began, _seconds_of_children() - before
    print(f"{_dotted(keys, wrong)}: {wall:.2f} s until the exit code, {work:.2f} s of CPU time")
    assert (done.returncode, done.stdout) == (78, "")
    assert f"did you mean {keys[-1]!r}?" in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["recipe.yaml"]
