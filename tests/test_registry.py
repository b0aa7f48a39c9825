"""Plug-ins: real distributions are found, and every way in which one can be wrong is told in one line."""

import importlib
import shutil
import sys
import textwrap
from importlib.metadata import distribution
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError
from small_run import write_small_recipe

from quadmix_plugin import registry
from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import RecipeError
from quadmix_plugin.executors import InlineExecutor
from quadmix_plugin.pipelines.context import Run
from quadmix_plugin.store import RunDirectory

SCORER = """
from dataclasses import dataclass, field
from typing import Any, ClassVar
import numpy as np

@dataclass
class Length:
    name: ClassVar[str] = "length"
    higher_is_better: ClassVar[bool] = True
    unit: str = "characters"
    divisor: float = 1.0
    limits: tuple[int, ...] = ()
    loaded: Any = field(init=False, default=None)

    def setup(self, device: str) -> None:
        self.loaded = device

    def score(self, texts):
        return np.array([len(text) / self.divisor for text in texts], dtype=np.float32)
"""


class Site:
    """A folder on ``sys.path`` into which distributions are put, as an installer would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, module: str, source: str, entries: str, version: str = "1.2.3") -> None:
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        (info / "entry_points.txt").write_text(textwrap.dedent(entries), encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]
    importlib.invalidate_caches()


def length_scorer(site: Site, name: str = "length-scorer", module: str = "length_scorer") -> None:
    site.add(name, module, SCORER, f"[quadmix_plugin.scorers]\nlength = {module}:Length\n")


def test_a_strangers_scorer_is_found_made_and_used(site: Site) -> None:
    length_scorer(site)
    assert "length" in registry.names("scorers")
    scorer = registry.create("scorers", "length", {"divisor": 2, "limits": [1, 2]}, "scorers.length")
    assert type(scorer) is registry.load("scorers", "length")
    assert (scorer.unit, scorer.divisor, scorer.limits, scorer.loaded) == ("characters", 2.0, (1, 2), None)
    scorer.setup("cpu")
    assert scorer.score(["abcd"]).tolist() == [2.0]
    rows = [row for row in registry.describe() if row["name"] == "length"]
    wanted = {"group": "scorers", "name": "length", "distribution": "length-scorer", "version": "1.2.3", "status": "ok"}
    assert rows == [wanted]


def test_an_unknown_name_suggests_the_nearest(site: Site) -> None:
    length_scorer(site)
    with pytest.raises(
        RecipeError, match=r"^scorers\.a: no plug-in 'lenght' in quadmix_plugin\.scorers; did you mean 'length'\?$"
    ):
        registry.load("scorers", "lenght", "scorers.a")
    with pytest.raises(RecipeError, match="did you mean 'fineweb-edu'"):
        registry.load("scorers", "fineweb_edu")
    with pytest.raises(RecipeError, match=r"no plug-in 'qqqqqq' .*; installed are .*fineweb-edu.*length"):
        registry.load("scorers", "qqqqqq")


def test_a_duplicate_name_shows_both_distributions(site: Site) -> None:
    length_scorer(site)
    length_scorer(site, "other-length", "other_length")
    says = (
        r"recipe: the name 'length' in quadmix_plugin\.scorers is registered by "
        r"length-scorer \(length_scorer:Length\) and other-length \(other_length:Length\); uninstall one of them"
    )
    with pytest.raises(RecipeError, match=says):
        registry.load("scorers", "length", "recipe")
    rows = [row for row in registry.describe() if row["name"] == "length"]
    assert [row["distribution"] for row in rows] == ["length-scorer", "other-length"]
    assert all("registered by" in row["status"] for row in rows)


def test_a_name_may_be_used_in_two_groups(site: Site) -> None:
    entries = (
        "[quadmix_plugin.scorers]\nlength = both:Length\n[quadmix_plugin.domain_classifiers]\nlength = both:Length\n"
    )
    site.add("both", "both", SCORER + "\n    classify = score\n", entries)
    assert registry.load("scorers", "length") is registry.load("domain_classifiers", "length")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_library_here", "ModuleNotFoundError: No module named 'no_such_library_here'"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("def broken(:", "SyntaxError: .*invalid syntax|SyntaxError: "),
        ("x = 1", "AttributeError: module 'faulty' has no attribute 'Length'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_plug_in_that_does_not_import_shows_its_reason(site: Site, source: str, reason: str) -> None:
    site.add("faulty-scorer", "faulty", source, "[quadmix_plugin.scorers]\nfaulty = faulty:Length\n")
    says = f"place: plug-in 'faulty' of faulty-scorer cannot be loaded: ({reason}).*; mend or reinstall that package"
    with pytest.raises(RecipeError, match=says):
        registry.load("scorers", "faulty", "place")
    (row,) = [row for row in registry.describe() if row["name"] == "faulty"]
    assert "cannot be loaded" in row["status"]


def test_one_broken_plug_in_does_not_stop_another(site: Site) -> None:
    site.add("faulty-scorer", "faulty", "import nothing_here", "[quadmix_plugin.scorers]\nfaulty = faulty:Length\n")
    length_scorer(site)
    assert registry.create("scorers", "length").divisor == 1.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"divisr": 2}, r"^recipe\.yaml: scorers\.length\.divisr: unknown key; did you mean 'divisor'\?$"),
        ({"colour": 2}, r"scorers\.length\.colour: unknown key; known are divisor, limits, unit$"),
        ({"loaded": 2}, r"scorers\.length\.loaded: unknown key"),
        ({"name": "x"}, r"scorers\.length\.name: unknown key"),
        ({"divisor": "two"}, r"scorers\.length\.divisor: input should be a valid number.*, not 'two'$"),
        ({"limits": [1, "b"]}, r"scorers\.length\.limits\.1: input should be a valid integer.*, not 'b'$"),
        ({"unit": None}, r"scorers\.length\.unit: input should be a valid string, not None$"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_remedy(site: Site, options: dict, says: str) -> None:
    length_scorer(site)
    with pytest.raises(RecipeError, match=says):
        registry.create("scorers", "length", options, "recipe.yaml: scorers.length")


CHECKED = """
from dataclasses import dataclass

class Scorer:
    higher_is_better = True
    def setup(self, device): ...
    def score(self, texts): ...

@dataclass
class Length(Scorer):
    model: str
    top: int = 3

    def __post_init__(self):
        if self.top < 1:
            raise ValueError("top is below 1; give at least 1")

@dataclass
class Bare(Scorer):
    pass

class Plain(Scorer):
    def __init__(self, top=3):
        self.top = top

class Thing:
    pass

@dataclass
class Odd(Scorer):
    thing: Thing

def function(top: int = 3):
    return top
"""


def test_options_are_checked_by_the_plug_in_itself_too(site: Site) -> None:
    site.add("checked", "checked", CHECKED, "[quadmix_plugin.scorers]\nchecked = checked:Length\n")
    with pytest.raises(RecipeError, match=r"^here\.model: missing; give a value$"):
        registry.create("scorers", "checked", {}, "here")
    with pytest.raises(RecipeError, match=r"^here\.options: top is below 1; give at least 1, not "):
        registry.create("scorers", "checked", {"model": "m", "top": 0}, "here")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Bare", {"q": 1}, "here.q: unknown key; known are none"),
        ("Plain", {"top": 1}, "here: plug-in 'plug' of checked is .*Plain.*, which is no dataclass"),
        ("function", {}, "here: plug-in 'plug' of checked is .*function.*, which is no dataclass"),
        ("Odd", {"thing": 1}, "here.plug: the fields of Odd cannot be read as options .*; annotate a field"),
    ],
)
def test_what_is_not_a_dataclass_of_options_is_refused(site: Site, name: str, options: dict, says: str) -> None:
    site.add("checked", "checked", CHECKED, f"[quadmix_plugin.scorers]\nplug = checked:{name}\n")
    with pytest.raises(RecipeError, match=says):
        registry.create("scorers", "plug", options, "here")


@pytest.mark.parametrize(
    ("without", "group", "lacking"),
    [
        ("higher_is_better: ClassVar", "scorers", "higher_is_better"),
        ("def score", "scorers", "score"),
        ("def setup", "domain_classifiers", "setup, classify"),
        ("", "trainers", "context, train"),
    ],
)
def test_a_plug_in_that_lacks_what_its_group_needs_is_refused_before_work(
    site: Site, without: str, group: str, lacking: str
) -> None:
    source = (
        SCORER.replace(without, "def other" if without.startswith("def") else "other: ClassVar") if without else SCORER
    )
    site.add("lacking", "lacking", source, f"[quadmix_plugin.{group}]\nplug = lacking:Length\n")
    says = f"here: plug-in 'plug' of lacking has no {lacking}, which {group} need"
    with pytest.raises(RecipeError, match=says):
        registry.create(group, "plug", {}, "here")
    (row,) = [row for row in registry.describe() if row["name"] == "plug"]
    assert f"has no {lacking}" in row["status"]


def test_what_a_plug_in_prints_on_import_stays_off_stdout(site: Site, capsys: pytest.CaptureFixture) -> None:
    site.add("loud", "loud", "print('buy now')\n" + SCORER, "[quadmix_plugin.scorers]\nloud = loud:Length\n")
    registry.load("scorers", "loud")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "buy now\n")


def test_the_origin_of_a_plug_in_is_its_distribution_and_version(site: Site) -> None:
    length_scorer(site)
    assert registry.origin("scorers", "length") == {"distribution": "length-scorer", "version": "1.2.3"}


def test_labels_of_another_version_of_a_strangers_scorer_are_not_taken_for_its_own(site: Site, tmp_path: Path) -> None:
    """Its version is part of the step's key; the project's own version is not."""
    keys = []
    for version in ("1.2.3", "1.2.4"):
        for info in tmp_path.glob("*.dist-info"):
            shutil.rmtree(info)
        importlib.invalidate_caches()
        entries = "[quadmix_plugin.scorers]\nlength = length_scorer:Length\n"
        site.add("length-scorer", "length_scorer", SCORER, entries, version)
        path = write_small_recipe(tmp_path / "run", scorers={"length": {}})
        run = Run(load_recipe(path), RunDirectory(tmp_path / "run" / "out"), InlineExecutor)
        keys.append(run.keys)
    assert keys[0]["label"] != keys[1]["label"]
    assert keys[1] == Run(run.recipe, run.directory, InlineExecutor).keys


def test_a_plug_in_without_options_needs_none(site: Site) -> None:
    site.add("checked", "checked", CHECKED, "[quadmix_plugin.scorers]\nplug = checked:Bare\n")
    assert type(registry.create("scorers", "plug")).__name__ == "Bare"


def test_only_the_named_plug_in_is_imported(site: Site) -> None:
    length_scorer(site)
    site.add("other", "never_imported", "raise SystemExit", "[quadmix_plugin.scorers]\nother = never_imported:X\n")
    registry.create("scorers", "length")
    assert "never_imported" not in sys.modules


def test_explain_is_one_line_for_every_kind_of_fault() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(dict[str, int]).validate_python({"a": "x\ny"})
    assert registry.explain(caught.value, []).startswith("a: input should be a valid integer")
    assert "\n" not in registry.explain(caught.value, [])


def built_ins() -> list[tuple[str, str]]:
    groups = {full: short for short, full in registry.GROUPS.items()}
    points = distribution("quadmix-plugin").entry_points
    return sorted({(groups[point.group], point.name) for point in points if point.group in groups})


@pytest.mark.parametrize(("group", "name"), built_ins())
def test_every_built_in_loads_through_its_entry_point(group: str, name: str) -> None:
    cls = registry.load(group, name)
    methods = {
        "scorers": ("setup", "score"),
        "domain_classifiers": ("setup", "classify"),
        "selectors": ("fit",),
        "regressors": ("fit", "predict", "to_text"),
        "trainers": (),
    }[group]
    assert all(callable(getattr(cls, method, None)) for method in methods)
    with pytest.raises(RecipeError, match="no_such_option: unknown key"):
        registry.create(group, name, {"no_such_option": 1}, "here")


def test_every_group_has_a_built_in() -> None:
    assert {group for group, _ in built_ins()} == set(registry.GROUPS)
    declared = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
    assert declared.count('[project.entry-points."quadmix_plugin.') == len(registry.GROUPS)
