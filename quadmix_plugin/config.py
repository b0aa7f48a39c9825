"""Recipes: one YAML file that says what a run does, checked whole before any work starts.

A recipe is data: ``yaml.safe_load`` with duplicate keys refused, no names of code to import, strict types. Paths
are relative to the recipe's folder. A fault is one line with the place, the value and the remedy.
"""

import difflib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from quadmix_plugin.credentials import refuse_credentials
from quadmix_plugin.dask_cluster import Scheduler, Tls
from quadmix_plugin.errors import RecipeError
from quadmix_plugin.sections import (
    Compare,
    Corpus,
    DomainSection,
    Evaluate,
    Executor,
    Export,
    Name,
    Normalise,
    Options,
    Pretrain,
    Proxy,
    Rank,
    Search,
    Section,
    Seed,
    Select,
    Space,
    Tokenizer,
    Validation,
)
from quadmix_plugin.strict_yaml import read_mapping, read_value


class Recipe(Section):
    """A whole run. See ``quadmix init`` for a commented one."""

    name: Name
    seed: Seed = 0
    corpus: Corpus
    tokenizer: Tokenizer
    domain: DomainSection
    scorers: dict[Name, Options] = Field(min_length=1)
    """Name → options of that scorer; ``scorer:`` among them when the name is not the plug-in's."""
    normalise: Normalise = Normalise()
    rank: Rank = Rank()
    space: Space = Space()
    validation: Validation
    proxy: Proxy = Proxy()
    search: Search = Search()
    select: Select = Select()
    export: Export = Export()
    pretrain: Pretrain = Pretrain()
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()
    executor: Executor = Executor()

    @model_validator(mode="after")
    def _search_fits(self) -> "Recipe":
        if unknown := [name for name in self.search.exclude_scorers if name not in self.scorers]:
            raise ValueError(f"search.exclude_scorers: {unknown[0]!r} is not among scorers ({', '.join(self.scorers)})")
        if len(set(self.search.exclude_scorers)) == len(self.scorers):
            raise ValueError("search.exclude_scorers: every scorer is excluded; leave at least one")
        if self.search.at_budget and self.select.target_tokens is None:
            raise ValueError("search.at_budget needs select.target_tokens, the budget that it searches at")
        return self

    @field_validator("search")
    @classmethod
    def _rounds_of_proxies(cls, value: Search, info: ValidationInfo) -> Search:
        proxy, rounds = info.data.get("proxy"), value.rounds
        if not rounds or proxy is None:
            return value
        if sum(rounds) != proxy.number:
            raise ValueError(
                f"rounds {rounds} are {sum(rounds)} proxies, proxy.number is {proxy.number}; set proxy.number: "
                f"{sum(rounds)}, or other rounds"
            )
        if proxy.fidelity == "successive_halving":
            raise ValueError(
                "rounds propose θ unlike the draws of Algorithm 1 that successive_halving takes its thresholds from; "
                "set proxy.fidelity: full, or leave rounds out"
            )
        if proxy.repeated > rounds[0]:
            raise ValueError(
                f"proxy.repeated is {proxy.repeated}, the first round has {rounds[0]} proxies; repeat fewer of them"
            )
        return value


_FILES = (
    *(("normalise", "frozen"), ("rank", "frozen"), ("select", "theta"), ("evaluate", "task_folder")),
    *(("executor", key) for key in ("scheduler_file", "tls_ca", "tls_cert", "tls_key")),
)
"""Keys that name a file or folder, apart from corpora, models and options of plug-ins."""

_DEEPEST_KEY = 32  # parts before the last of a key of --set; options of plug-ins may nest


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe; ``overrides`` are ``key.key=value`` pairs of ``--set``. Paths come out absolute.

    Raises:
        RecipeError: no such file, not YAML, a key given twice, unknown (with the nearest) or missing, or a value of
            the wrong type; credentials; plug-in names and their options are checked as well.
    """
    path = Path(path)
    content = read_mapping(path)
    for override in overrides or []:
        _override(content, override)
    refuse_credentials(content, path)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_explain(error)}") from error
    recipe = _with_absolute_paths(recipe, path.absolute().parent)
    _check_plugins(recipe, path)
    scheduler_of(recipe.executor)
    return recipe


def scheduler_of(section: Executor) -> Scheduler | None:
    """The Dask scheduler that is there already, if the section names one.

    Raises:
        RecipeError: one off loopback without TLS, or a certificate that cannot be read.
    """
    tls = Tls(section.tls_ca, section.tls_cert, section.tls_key)
    if section.address is None and section.scheduler_file is None:
        if tls != Tls():
            raise RecipeError("executor.tls_ca: certificates are for an existing scheduler; give its address too")
        return None
    return Scheduler(section.address, section.scheduler_file, tls)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differing_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, each as ``key: old → new``."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differing_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} → {after!r}")
    return lines


def scorer_plugin(name: str, options: Options) -> tuple[str, Options]:
    """The plug-in behind an entry of ``scorers`` and its options."""
    rest = {key: value for key, value in options.items() if key != "scorer"}
    return str(options.get("scorer", name)), rest


def selector_plugin(name: str, options: Options) -> tuple[str, Options]:
    """The plug-in behind an entry of ``compare.selectors`` and its options, ``times`` apart."""
    rest = {key: value for key, value in options.items() if key not in ("selector", "times")}
    return str(options.get("selector", name)), rest


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: give key=value, such as proxy.number=64")
    target = content
    *parents, last = key.split(".")
    if len(parents) > _DEEPEST_KEY:
        raise RecipeError(f"--set {override[:80]}…: {len(parents) + 1} parts of a key; no key has so many")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise RecipeError(f"--set {override}: {parent!r} holds a value, not a section")
    try:
        target[last] = read_value(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML; quote it") from error


def _explain(error: ValidationError) -> str:
    faults = error.errors()
    # What is missing may be what an unknown key was meant to be.
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    loc = [str(part) for part in first["loc"]]
    where = ".".join(loc) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        return f"{where}: unknown key; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")
    if first["type"] == "missing":
        return f"{where}: missing; give a value"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}; found {first['input']!r}"


def _known_keys(loc: list[str]) -> list[str]:
    model: Any = Recipe
    for part in loc:
        if get_origin(model) is dict:  # of sections by name
            model = get_args(model)[1]
        elif isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
        else:
            return []
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return []
    return sorted(model.model_fields)


def _with_absolute_paths(recipe: Recipe, base: Path) -> Recipe:
    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(each) for each in value]
        return os.path.normpath(base / value) if isinstance(value, str) and "://" not in value else value

    def model(value: Any) -> Any:
        """A model is a folder where one of that name is there or it is written like a path; otherwise a hub id."""
        looks_like_path = str(value).startswith((".", "/")) or os.path.exists(base / str(value))  # of any length
        return absolute(value) if looks_like_path else value

    content = recipe.model_dump()
    for section in ("corpus", "validation"):
        content[section]["path"] = absolute(content[section]["path"])
    for section, key in _FILES:
        if content[section][key]:
            content[section][key] = absolute(content[section][key])
    for questions in content["evaluate"]["local"].values():
        questions["path"] = absolute(questions["path"])
    selectors = content["compare"]["selectors"].values()
    for options in selectors:
        options |= {key: absolute(options[key]) for key in ("theta", "mixture", "target") if options.get(key)}
    for options in (content["tokenizer"], content["domain"], *content["scorers"].values(), *selectors):
        if options.get("model"):
            options["model"] = model(options["model"])
    return Recipe.model_validate(content)


def _check_plugins(recipe: Recipe, path: Path) -> None:
    from quadmix_plugin import registry

    domain = recipe.domain
    _create("domain_classifiers", domain.classifier, domain.options, f"{path}: domain", ("classifier", "top_k"))
    for name, given in recipe.scorers.items():
        plugin, rest = scorer_plugin(name, given)
        _create("scorers", plugin, rest, f"{path}: scorers.{name}", ("scorer",))
    for name, given in recipe.compare.selectors.items():
        plugin, rest = selector_plugin(name, given)
        _create("selectors", plugin, rest, f"{path}: compare.selectors.{name}", ("selector", "times"))
        for key in ("scorer_name", "scorer_names", "exclude_scorers", "quality"):
            named = rest.get(key) or []
            if unknown := [
                each for each in ([named] if isinstance(named, str) else named) if each not in recipe.scorers
            ]:
                raise RecipeError(
                    f"{path}: compare.selectors.{name}.{key}: {unknown[0]!r} is not among scorers "
                    f"({', '.join(recipe.scorers)})"
                )
        if rest.get("exclude_scorers") and recipe.select.theta:
            raise RecipeError(
                f"{path}: compare.selectors.{name}.exclude_scorers: {rest['exclude_scorers']} searches anew, and "
                f"select.theta is given, so there are no proxies to search by; leave one of them out"
            )
    registry.create("regressors", recipe.search.regressor, recipe.search.options, f"{path}: search.options")
    for name in recipe.search.compared:
        registry.load("regressors", name, f"{path}: search.compared")
    registry.create("trainers", recipe.proxy.trainer, recipe.proxy.options, f"{path}: proxy.options")
    registry.create("trainers", recipe.pretrain.trainer, recipe.pretrain.options, f"{path}: pretrain.options")


def _create(group: str, plugin: str, options: Options, place: str, beside: tuple[str, ...]) -> None:
    """As ``registry.create``, where a recipe has the options of a plug-in in one mapping with keys of its own."""
    from quadmix_plugin import registry

    try:
        registry.create(group, plugin, options, place)
    except RecipeError as error:
        is_there = plugin in registry.names(group)
        known = [each.name for each in fields(registry.load(group, plugin, place))] if is_there else []
        for key in options:
            near = difflib.get_close_matches(key, [*known, *beside], n=1, cutoff=0.7)
            if key not in known and near and near[0] in beside:
                raise RecipeError(f"{place}.{key}: unknown key; did you mean {near[0]!r}?") from error
        raise
