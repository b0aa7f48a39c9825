"""Reads YAML that people write: plain data, every key once, no aliases, of a sensible size.

What the keys mean is in ``config``.
"""

from pathlib import Path
from typing import Any

import yaml

from quadmix_plugin.errors import RecipeError

_MAX_BYTES = 1 << 20


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        RecipeError: no such file, too large, not UTF-8, not YAML, a key given twice, an alias, or no mapping.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(f"{path}: {path.stat().st_size} bytes; a recipe is at most {_MAX_BYTES}")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise RecipeError(f"{path}: no such file; `quadmix init DIR` writes a starter recipe") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path}: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: holds {type(content).__name__}; a recipe is a mapping of keys to values")
    return content


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "not valid YAML"
    return f"line {mark.line + 1}: {problem}" if mark else f"not valid YAML ({str(error).splitlines()[0]})"


class _UniqueKeyLoader(yaml.SafeLoader):
    """``SafeLoader`` that refuses a key given twice, and aliases, which can blow a small file up."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
