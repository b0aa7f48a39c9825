"""Plug-ins: names that a recipe can use, found through entry points and loaded only when used.

A plug-in is a dataclass whose fields are its options. Built-ins register through the same groups as anybody's
package, so the core has no list of them.
"""

import contextlib
import difflib
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError

from quadmix_plugin.errors import InputError, RecipeError

GROUPS = {
    name: f"quadmix_plugin.{name}" for name in ("scorers", "domain_classifiers", "selectors", "regressors", "trainers")
}

_MEMBERS = {
    "scorers": ("higher_is_better", "setup", "score"),
    "domain_classifiers": ("setup", "classify"),
    "selectors": ("fit",),
    "regressors": ("fit", "predict", "to_text"),
    "trainers": ("context", "train"),
}
"""What a class of each group must have; docs/plugins.md says what each does."""


def names(group: str) -> list[str]:
    """The names installed in a group, sorted."""
    return sorted(_installed(group))


def load(group: str, name: str, place: str = "") -> Any:
    """The class registered as ``name``; ``place`` is where the recipe names it.

    Raises:
        RecipeError: unknown name (with the nearest), a name that two distributions register (with both), or a
            plug-in that cannot be imported (with its reason) or lacks what its group needs.
    """
    prefix = f"{place}: " if place else ""
    found = _installed(group)
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; installed are {', '.join(sorted(found)) or 'none'}"
        raise RecipeError(f"{prefix}no plug-in {name!r} in {GROUPS[group]}{hint}")
    points = found[name]
    if len(points) > 1:
        who = " and ".join(sorted(f"{_distribution(p)} ({p.value})" for p in points))
        raise RecipeError(f"{prefix}the name {name!r} in {GROUPS[group]} is registered by {who}; uninstall one of them")
    who = f"plug-in {name!r} of {_distribution(points[0])}"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a module prints must not get between the results
            cls = points[0].load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises on import
        raise RecipeError(
            f"{prefix}{who} cannot be loaded: {type(error).__name__}: {error}; mend or reinstall that package, or "
            f"leave the name out"
        ) from error
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise RecipeError(f"{prefix}{who} is {cls!r}, which is no dataclass; ask its author to make it one")
    known = {option.name for option in fields(cls)}
    if lacking := [member for member in _MEMBERS[group] if not hasattr(cls, member) and member not in known]:
        raise RecipeError(f"{prefix}{who} has no {', '.join(lacking)}, which {group} need; ask its author to add it")
    return cls


def create(group: str, name: str, options: Mapping[str, Any] | None = None, place: str = "") -> Any:
    """An instance of a plug-in with these options.

    Raises:
        RecipeError: as ``load``; an unknown option (with the nearest), a value of the wrong type, or a plug-in whose
            options are not of plain types.
    """
    cls = load(group, name, place)
    prefix = f"{place}." if place else ""
    given = dict(options or {})
    known = [option.name for option in fields(cls) if option.init]
    for key in given:  # pydantic ignores what a standard dataclass does not have
        if key not in known:
            raise RecipeError(f"{prefix}{_unknown_key(key, known)}")
    try:
        return TypeAdapter(cls).validate_python(given)
    except ValidationError as error:
        raise RecipeError(f"{prefix}{explain(error, known)}") from error
    except InputError as error:  # from the plug-in's own check of its options
        raise RecipeError(f"{place}: {error}" if place else str(error)) from error
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        reason = error.message.splitlines()[0].split(". ")[0]
        raise RecipeError(
            f"{prefix}{name}: the fields of {cls.__qualname__} cannot be read as options ({reason}); annotate "
            f"a field that is not an option as Any"
        ) from error


def origin(group: str, name: str) -> dict[str, str]:
    """Distribution and version that a name comes from; empty strings where it comes from none."""
    point = _installed(group)[name][0]
    return {"distribution": _distribution(point), "version": point.dist.version if point.dist else ""}


def explain(error: ValidationError, known: list[str]) -> str:
    """The first fault of a validation error as one line: where, what, the value, the remedy."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "options"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return _unknown_key(where, known)
    if first["type"] in ("missing", "missing_argument"):
        return f"{where}: missing; give a value"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}, not {first['input']!r}"


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
            for point in sorted(points, key=_distribution):
                version = point.dist.version if point.dist else ""
                row = {"group": group, "name": name, "distribution": _distribution(point), "version": version}
                rows.append({**row, "status": status})
    return rows


def _unknown_key(where: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(where).rpartition(".")[2], known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known)) or 'none'}"
    return f"{where}: unknown key; {remedy}"


def _installed(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = defaultdict(list)
    for point in entry_points(group=GROUPS[group]):
        # An editable install beside its own build metadata lists the same entry point twice.
        if all((p.value, _distribution(p)) != (point.value, _distribution(point)) for p in found[point.name]):
            found[point.name].append(point)
    return dict(found)


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown distribution"
