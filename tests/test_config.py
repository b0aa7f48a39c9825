"""Recipes: every fault is one line with place, value and remedy, found before any work."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from quadmix_plugin.config import Recipe, differing_keys, dump_recipe, load_recipe
from quadmix_plugin.errors import RecipeError

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "pipelines" / "recipes" / "quickstart.yaml"


def _faulty(tmp_path: Path, **changes: object) -> Path:
    """The quickstart recipe with absolute paths and some dotted keys set, or removed when the value is ``...``."""
    content = load_recipe(QUICKSTART).model_dump(mode="json")
    for key, value in changes.items():
        *parents, last = key.split("__")
        target = content
        for parent in parents:
            target = target[parent]
        if value is ...:
            del target[last]
        else:
            target[last] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_quickstart_recipe_loads_with_absolute_paths() -> None:
    recipe = load_recipe(QUICKSTART)
    assert Path(str(recipe.corpus.path)).is_file()
    assert Path(recipe.tokenizer.model).is_absolute()
    assert list(recipe.scorers) == ["fineweb-edu", "dclm-fasttext", "ask-llm"]


def test_dumped_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(QUICKSTART)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"proxy__nubmer": 4}, "proxy.nubmer: unknown key; did you mean 'number'?"),
        ({"select__omgea": 4}, "select.omgea: unknown key"),
        ({"copus": {}}, "copus: unknown key; did you mean 'corpus'?"),
        ({"proxy__number": "many"}, "proxy.number: input should be a valid integer; found 'many'"),
        ({"proxy__number": 3}, "proxy.number: input should be greater than or equal to 8; found 3"),
        ({"corpus__path": ...}, "corpus.path: missing; give a value"),
        ({"scorers": {}}, "scorers: dictionary should have at least 1 item"),
        ({"scorers__fineweb-edu__modle": "x"}, "scorers.fineweb-edu.modle: unknown key; did you mean 'model'?"),
        ({"domain__modell": "x"}, "domain.modell: unknown key; did you mean 'model'?"),
        ({"domain__classifier": "nvidia-domian"}, "did you mean 'nvidia-domain'?"),
        ({"search__regressor": "ligthgbm"}, "did you mean 'lightgbm'?"),
        ({"search__objective": {"arc_easy": 0.0}}, "search.objective: all weights are 0"),
        ({"space__lam_max": 0.5}, "space: lam_max 0.5 is below lam_min 1.0"),
        ({"name": "../x"}, "name: string should match pattern"),
        ({"executor__name": "spark"}, "executor.name: input should be 'inline', 'dask', 'ray_data' or 'xenna'"),
        (
            {"compare__selectors": {"x": {"selector": "top_k", "scorer_name": "edu"}}},
            "compare.selectors.x.scorer_name: 'edu' is not among",
        ),
        ({"compare__selectors": {"x": {"selector": "random", "times": 0}}}, "x.times: 0; give a factor on the budget"),
        ({"compare__selectors": {"quadmix": {}}}, "'quadmix' stands for the selection of θ* itself"),
        ({"name": ".."}, "name: string should match pattern"),
        ({"compare__selectors": {".x": {"selector": "random"}}}, "compare.selectors"),
        ({"evaluate__tasks": ["piqa", "piqa"]}, "evaluate: tasks: 'piqa' is given twice"),
        ({"evaluate__tasks": "piqa"}, "evaluate: tasks is 'piqa'; give a list of names"),
        (
            {"evaluate__tasks": {"piqa": -1}},
            "evaluate.tasks.piqa: input should be greater than or equal to 0; found -1",
        ),
        ({"evaluate__local": {"x": {"path": "a.jsonl", "promt": "q"}}}, "evaluate.local.x.promt: unknown key; did you"),
        ({"evaluate__local": {"x": {}}}, "evaluate.local.x.path: missing"),
        (
            {"evaluate__local": {"x": {"path": "a", "kind": "choice"}}},
            "evaluate.local.x.kind: input should be 'multiple",
        ),
        ({"pretrain__seeds": [1, 1]}, "pretrain.seeds: a seed is given twice"),
        ({"pretrain__seeds": [-1, 1]}, "pretrain.seeds.0: input should be greater than or equal to 0; found -1"),
        ({"seed": 1 << 64}, "seed: input should be less than"),
        ({"executor__memory_limit": "lots"}, "executor.memory_limit: string should match pattern"),
        ({"proxy__options": {"shap": "proxy-tiny"}}, "proxy.options.shap: unknown key; did you mean 'shape'?"),
    ],
)
def test_fault_names_key_value_and_remedy(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    path = _faulty(tmp_path, **changes)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 78


def test_unknown_scorer_suggests_the_nearest(tmp_path: Path) -> None:
    path = _faulty(tmp_path)
    text = path.read_text(encoding="utf-8").replace("fineweb-edu:", "fineweb-eud:")
    path.write_text(text.replace("scorer_name: fineweb-edu", "scorer_name: fineweb-eud"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"no plug-in 'fineweb-eud'.*did you mean 'fineweb-edu'"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "line 2: key 'name' is given twice"),
        ("name: [a\n", "line 2"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("!!python/object/apply:os.system ['touch CANARY']\n", "line 1"),
        ("- a\n", "holds list; a recipe is a mapping"),
        ("", "holds NoneType"),
    ],
)
def test_yaml_that_is_no_recipe_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("CANARY", str(tmp_path / "canary")), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert expected in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_missing_recipe_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file; `quadmix init DIR`"):
        load_recipe(tmp_path / "nothing.yaml")


def test_benchmarks_are_a_list_or_a_mapping_and_their_files_come_out_absolute() -> None:
    recipe = load_recipe(QUICKSTART, ["evaluate.tasks=[piqa, paper]", "evaluate.fewshot=2"])
    assert recipe.evaluate.tasks == {"piqa": 2, "paper": None}  # the suite has settings of its own
    local = "{a: {path: x.jsonl}, b: {path: [/y.parquet, z.jsonl]}}"
    found = load_recipe(QUICKSTART, ["evaluate.tasks={piqa: null}", f"evaluate.local={local}"]).evaluate
    base = QUICKSTART.absolute().parent
    assert {name: each.path for name, each in found.local.items()} == {
        "a": str(base / "x.jsonl"), "b": ["/y.parquet", str(base / "z.jsonl")],
    }  # fmt: skip
    assert (found.tasks, found.is_empty) == ({"piqa": None}, False)


def test_set_overrides_and_checks_like_the_file() -> None:
    recipe = load_recipe(QUICKSTART, ["proxy.number=64", "search.average=paper"])
    assert (recipe.proxy.number, recipe.search.average) == (64, "paper")
    with pytest.raises(RecipeError, match="did you mean 'number'"):
        load_recipe(QUICKSTART, ["proxy.numbr=64"])
    with pytest.raises(RecipeError, match="give key=value"):
        load_recipe(QUICKSTART, ["proxy.number"])


def test_differing_keys_are_dotted_with_both_values() -> None:
    old = load_recipe(QUICKSTART).model_dump(mode="json")
    new = load_recipe(QUICKSTART, ["proxy.number=64"]).model_dump(mode="json")
    assert differing_keys(old, new) == ["proxy.number: 48 → 64"]


def test_every_field_of_every_section_has_a_default_that_validates() -> None:
    required = {"name", "corpus", "tokenizer", "domain", "scorers", "validation"}
    assert {name for name, field in Recipe.model_fields.items() if field.is_required()} == required


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for section, field in Recipe.model_fields.items():
        kind = field.annotation
        nested = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        missing = [key for key in [section, *(f"{section}.{name}" for name in nested)] if f"`{key}`" not in page]
        assert missing == []


def test_documented_defaults_are_the_defaults() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| ([^|]+) \|", page, flags=re.MULTILINE)
    assert len(rows) > 30
    for section, key, written in rows:
        kind = Recipe.model_fields[section].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        field = kind.model_fields[key]
        if field.is_required():
            assert written == "–"
        elif key != "eod":
            assert yaml.safe_load(written) == field.get_default(call_default_factory=True), f"{section}.{key}"
