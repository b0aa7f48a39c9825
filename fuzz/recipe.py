"""Fuzzes the recipe loader: a YAML file, and ``--set KEY=VALUE`` after it, each behind a line that opens so."""

import functools
import os
import random
import socket
from pathlib import Path

from driver import fuzz, instrumented
from structure import changed

with instrumented("quadmix_plugin", "yaml"):
    import yaml
    from pydantic import BaseModel

    from quadmix_plugin import registry
    from quadmix_plugin.config import Recipe, dump_recipe, load_recipe
    from quadmix_plugin.strict_yaml import read_value

ROOT = Path(__file__).parent.parent
SET = b"\n--set "
LONGEST = 8192

MINIMAL = b"""\
name: a
corpus: {path: a.jsonl}
tokenizer: {model: t}
domain: {classifier: column, column: d}
scorers: {column: {column: s, higher_is_better: true}}
validation: {path: v.jsonl}
"""


def target(data: bytes, folder: Path) -> None:
    """Loads a recipe, and what it is written out as, which must be the same one."""
    text, *overrides = data.split(SET)
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    recipe = load_recipe(path, [os.fsdecode(each) for each in overrides])
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    if load_recipe(path) != recipe:
        raise ValueError("the recipe as written out is another one")


def seeds() -> dict[str, bytes]:
    """The recipes of the repository, a small one, and that with each section written out."""
    paths = [*sorted((ROOT / "pipelines" / "recipes").glob("*.yaml")), ROOT / "benchmarks" / "comparison.yaml"]
    found = {path.name: path.read_bytes() for path in paths}
    found["minimal.yaml"] = MINIMAL
    for name, field in Recipe.model_fields.items():
        if not field.is_required():
            found[f"set-{name}"] = MINIMAL + SET.removeprefix(b"\n") + f"{name}={{}}".encode()
            found[f"{name}.yaml"] = MINIMAL + f"{name}: {field.get_default()!r}".encode()
    found["set.yaml"] = MINIMAL + SET + b"proxy.number=64" + SET + b"evaluate.tasks=[piqa, paper]"
    return found


def words() -> list[bytes]:
    """Every key of the sections, the names of plug-ins, and what YAML has a meaning for."""
    keys = {name for model in _models(Recipe) for name in model.model_fields}
    plugins = {name for group in registry.GROUPS for name in registry.names(group)}
    signs = [
        SET,
        b"- ",
        b": ",
        b"{",
        b"}",
        b"[",
        b"]",
        b"&a ",
        b"*a",
        b"<<: ",
        b"? ",
        b"| ",
        b">-\n",
        b"---\n",
        b"...\n",
    ]
    tags = [b"!!" + kind for kind in b"int float bool null str binary timestamp omap pairs set seq map".split()]
    values = [
        b".nan",
        b"-.inf",
        b"0x",
        b"1:59",
        b"1e999",
        b"2024-13-45",
        b"null",
        b"true",
        b"~",
        b"://",
        b"\\uD800",
        b"\\0",
    ]
    return [*(each.encode() for each in sorted(keys | plugins)), *signs, *tags, *values]


def mutation(data: bytes, generator: random.Random) -> bytes | None:
    """One place of the recipe changed."""
    text, *overrides = data.split(SET)
    try:
        made = yaml.safe_dump(changed(read_value(text.decode()), generator), sort_keys=False)
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return SET.join([made.encode(), *overrides])


def _no_network(host: str, *_: object) -> None:
    """What the system's own answers off every network."""
    host.encode("idna")
    raise socket.gaierror(socket.EAI_AGAIN, "no network while fuzzing")


def _models(model: type[BaseModel]) -> list[type[BaseModel]]:
    kinds = [field.annotation for field in model.model_fields.values()]
    nested = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [model, *(each for kind in nested for each in _models(kind))]


if __name__ == "__main__":
    registry._installed = functools.cache(registry._installed)  # what is installed stays so, and finding it is slow
    registry.describe()  # imports every plug-in, which would else count against the first input that names it
    socket.getaddrinfo = _no_network  # type: ignore[assignment]
    fuzz(target, seeds(), words(), LONGEST, mutation)
