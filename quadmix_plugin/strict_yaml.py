"""Reads YAML that people write: plain data, every key once, no aliases, of a sensible size.

What the keys mean is in ``config``.
"""

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from quadmix_plugin.errors import RecipeError

_MAX_BYTES = 1 << 18
_MAX_VALUES = 10_000  # lists and mappings among them; PyYAML takes half a second for so many
_MAX_DEPTH = 64
_MAX_DIGITS = 64
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        RecipeError: no such file, one that cannot be read, too large, not UTF-8, no mapping, or what ``read_value``
            refuses.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)  # not by its size first: a pipe has none
        if len(raw) > _MAX_BYTES:
            raise RecipeError(f"{path}: more than {_MAX_BYTES} bytes; a recipe has fewer, so give globs")
        text = raw.decode("utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise RecipeError(f"{path}: no such file; `quadmix init DIR` writes a starter recipe") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give a file that you may read") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    try:
        content = read_value(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: holds {type(content).__name__}; a recipe is a mapping of keys to values")
    return content


def read_value(text: str) -> Any:
    """The value that a text stands for: null, bool, int, finite float, str, and lists and mappings of these.

    Raises:
        yaml.YAMLError: not YAML, a key given twice, an alias, a type beyond those, a number of more than 64 characters,
            more than 10,000 values, or more than 64 levels.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)  # noqa: S506 - a SafeLoader
    except (ValueError, OverflowError) as error:  # PyYAML's own, of an escape such as "\UFFFFFFFF"
        raise yaml.YAMLError(str(error)) from error


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "not valid YAML"
    return f"line {mark.line + 1}: {problem}" if mark else f"not valid YAML ({str(error).splitlines()[0]})"


class _PlainLoader(yaml.SafeLoader):
    """``SafeLoader`` for plain data only.

    It refuses a key given twice; aliases, which can blow a small file up; and what JSON and a file's name cannot hold.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._values = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise ConstructorError(None, None, "aliases (*name) are not allowed", mark)
        self._values += 1
        if self._values > _MAX_VALUES:
            raise ConstructorError(None, None, f"more than {_MAX_VALUES} values; give globs", mark)
        if self._depth == _MAX_DEPTH:
            raise ConstructorError(None, None, f"more than {_MAX_DEPTH} levels of lists and mappings", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        mark, kind = node.start_mark, str(node.tag).rpartition(":")[2]
        if node.tag not in _PLAIN:
            raise ConstructorError(None, None, f"a value of the type {kind!r}; put text in quotes", mark)
        if kind in ("int", "float") and len(node.value) > _MAX_DIGITS:
            raise ConstructorError(None, None, f"a number of {len(node.value)} characters; put text in quotes", mark)
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, LookupError, ArithmeticError) as error:
            said = f"{node.value!r} is not of the type {kind!r}; put text in quotes"
            raise ConstructorError(None, None, said, mark) from error
        if fault := _fault(value):
            raise ConstructorError(None, None, fault, mark)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                said = f"a {type(key).__name__} as a key; give a name"
                raise ConstructorError(None, None, said, key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _fault(value: Any) -> str:
    """Why a scalar cannot be written to a run's JSON, or be part of a file's name."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        return f"{value!r} has a NUL or half a surrogate pair; leave it out"
    return ""
