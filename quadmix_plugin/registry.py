"""Plug-ins: names that a recipe can use, found through entry points and loaded only when used.

A plug-in is a dataclass whose fields are its options. Built-ins register through the same groups as anybody's
package, so the core has no list of them.
"""

import difflib
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import TypeAdapter, ValidationError

from quadmix_plugin.errors import RecipeError

GROUPS = {
    name: f"quadmix_plugin.{name}" for name in ("scorers", "domain_classifiers", "selectors", "regressors", "trainers")
}


def names(group: str) -> list[str]:
    """The names installed in a group, sorted."""
    return sorted(_installed(group))


def load(group: str, name: str, place: str = "") -> Any:
    """The class registered as ``name``; ``place`` is where the recipe names it.

    Raises:
        RecipeError: unknown name (with the nearest), a name that two distributions register (with both), or a
            plug-in that cannot be imported (with its reason).
    """
    prefix = f"{place}: " if place else ""
    found = _installed(group)
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; installed are {', '.join(sorted(found))}"
        raise RecipeError(f"{prefix}no plug-in {name!r} in {GROUPS[group]}{hint}")
    points = found[name]
    if len(points) > 1:
        who = " and ".join(sorted(f"{_distribution(p)} ({p.value})" for p in points))
        raise RecipeError(f"{prefix}the name {name!r} in {GROUPS[group]} is registered by {who}; uninstall one of them")
    try:
        return points[0].load()
    except Exception as error:  # whatever a stranger's module raises on import
        raise RecipeError(
            f"{prefix}plug-in {name!r} of {_distribution(points[0])} cannot be loaded: "
            f"{type(error).__name__}: {error}; reinstall that package or leave the name out"
        ) from error


def create(group: str, name: str, options: Mapping[str, Any] | None = None, place: str = "") -> Any:
    """An instance of a plug-in with these options.

    Raises:
        RecipeError: as ``load``; an unknown option (with the nearest) or a value of the wrong type.
    """
    cls = load(group, name, place)
    prefix = f"{place}." if place else ""
    try:
        return TypeAdapter(cls).validate_python(dict(options or {}))
    except ValidationError as error:
        raise RecipeError(f"{prefix}{explain(error, list(TypeAdapter(cls).json_schema()['properties']))}") from error


def explain(error: ValidationError, known: list[str]) -> str:
    """The first fault of a validation error as one line: where, what, the value, the remedy."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
        return f"{where}: unknown key; " + (
            f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known)) or 'none'}"
        )
    if first["type"] in ("missing", "missing_argument"):
        return f"{where}: missing; give a value"
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"


def describe() -> list[dict[str, str]]:
    """Every installed plug-in: group, name, distribution, version, and whether it loads."""
    rows = []
    for group in GROUPS:
        for name, points in sorted(_installed(group).items()):
            try:
                load(group, name)
                status = "ok"
            except RecipeError as error:
                status = str(error)
            for point in points:
                version = point.dist.version if point.dist else ""
                row = {"group": group, "name": name, "distribution": _distribution(point), "version": version}
                rows.append({**row, "status": status})
    return rows


def _installed(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = defaultdict(list)
    for point in entry_points(group=GROUPS[group]):
        # An editable install beside its own build metadata lists the same entry point twice.
        if all((p.value, _distribution(p)) != (point.value, _distribution(point)) for p in found[point.name]):
            found[point.name].append(point)
    return dict(found)


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown distribution"
