"""The example of a scorer in a package of its own: pip install alone makes it usable, and nothing else is imported."""

import ast
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_run import ROOT, write_small_recipe

from quadmix_plugin import registry
from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import InputError, RecipeError
from quadmix_plugin.labelled_corpus import select_in_memory
from quadmix_plugin.schema import ScoreTable

PACKAGE = ROOT / "examples" / "custom_scorer"
PAGE = ROOT / "docs" / "plugins.md"
OPTIONS = {"min_words": 300}
PRONOUNS = {"words": ["I", "you", "we"]}

CANARY = """
from dataclasses import dataclass
from pathlib import Path
Path({touched!r}).touch()

@dataclass
class Canary:
    higher_is_better = True
    def setup(self, device): ...
    def score(self, texts): ...
"""

# Python with quadmix_plugin out of reach, as on a machine that does not have it.
PYTEST_ALONE = """
import sys
sys.modules["quadmix_plugin"] = None
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def _python(*arguments: str, path: tuple[Path, ...] = (), cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd, env=environment)


def _quadmix(*arguments: str, path: tuple[Path, ...], cwd: Path) -> tuple[int, Any]:
    """Exit code and content of one command with ``--json``; ``path``: what is installed beside the environment."""
    done = _python("-m", "quadmix_plugin.cli", *arguments, "--json", path=path, cwd=cwd)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def _register(folder: Path, distribution: str, source: str, entries: str) -> Path:
    """A folder with a distribution of one module and these entry points, as an installer would leave it."""
    module = distribution.replace("-", "_")
    info = folder / f"{module}-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 2.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(entries, encoding="utf-8")
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the example; from a copy, since a build leaves files beside its source."""
    folder = tmp_path_factory.mktemp("site")
    copy = tmp_path_factory.mktemp("source") / "custom_scorer"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist"))
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    done = _python("-m", "pip", "install", *offline, "--target", str(folder), str(copy), cwd=copy)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def on_path(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example installed in this process, and nothing of it left behind."""
    monkeypatch.syspath_prepend(site)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "quadmix_heuristics"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def scorers(site: Path) -> ModuleType:
    """The installed module, without its entry point."""
    spec = importlib.util.spec_from_file_location("installed_stop_words", site / "quadmix_heuristics/stop_words.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that uses the example twice, over about a hundred documents that need no model."""
    folder = tmp_path_factory.mktemp("recipe")
    path = write_small_recipe(folder)
    corpus = pq.read_table(folder / "corpus.parquet")
    pq.write_table(corpus.take(list(range(0, corpus.num_rows, 10))), folder / "corpus.parquet")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["corpus"]["documents_per_shard"] = 60
    content["domain"] = {"classifier": "column", "column": "true_domain"}
    content["scorers"] = {"stop-words": OPTIONS, "pronouns": {"scorer": "stop-words", **PRONOUNS}}
    content["compare"] = {"selectors": {"prose": {"selector": "top_k", "scorer_name": "stop-words"}}}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a scorer that nobody names, and the file that its import would make."""
    folder = tmp_path_factory.mktemp("canary")
    source = CANARY.format(touched=str(folder / "sang"))
    entries = "[quadmix_plugin.scorers]\ncanary = canary_scorer:Canary\n"
    return _register(folder, "canary-scorer", source, entries), folder / "sang"


@pytest.fixture(scope="module")
def labelled(site: Path, recipe: Path, canary: tuple[Path, Path]) -> tuple[pa.Table, bool]:
    """The labels that ``quadmix label`` wrote with the example and the canary installed, and whether that one sang."""
    folder, sang = canary
    sang.unlink(missing_ok=True)
    out = recipe.parent / "labelled"
    code, said = _quadmix("label", str(recipe), "--out", str(out), path=(site, folder), cwd=recipe.parent)
    assert code == 0, said
    return pa.concat_tables(pq.read_table(path) for path in sorted((out / "labels").glob("*.parquet"))), sang.exists()


def test_label_writes_the_scorers_own_values(labelled: tuple[pa.Table, bool], recipe: Path, scorers: Any) -> None:
    rows = {row["doc_id"]: row for row in labelled[0].to_pylist()}
    corpus = pq.read_table(recipe.parent / "corpus.parquet").to_pylist()
    assert rows.keys() == {document["doc_id"] for document in corpus}
    texts = [document["text"] for document in corpus]
    found = [rows[document["doc_id"]] for document in corpus]
    own = scorers.StopWords(**OPTIONS).score(texts).tolist()
    assert [row["score_stop-words"] for row in found] == own
    assert own != scorers.StopWords().score(texts).tolist()
    assert [row["score_pronouns"] for row in found] == scorers.StopWords(**PRONOUNS).score(texts).tolist()
    assert [row["domain"] for row in found] == [document["true_domain"] for document in corpus]


def test_an_installed_plug_in_that_the_recipe_does_not_name_is_not_imported(labelled: tuple[pa.Table, bool]) -> None:
    assert labelled[0].num_rows > 100
    assert not labelled[1]


def test_what_is_installed_is_listed_and_for_that_imported(
    labelled: object, site: Path, canary: tuple[Path, Path]
) -> None:
    """So the canary above would have been heard."""
    folder, sang = canary
    code, said = _quadmix("plugins", path=(site, folder), cwd=folder)
    rows = {row["name"]: row for row in said["plugins"] if row.pop("distribution") != "quadmix-plugin"}
    assert rows == {
        "canary": {"group": "scorers", "name": "canary", "version": "2.0", "status": "ok"},
        "stop-words": {"group": "scorers", "name": "stop-words", "version": "0.1.0", "status": "ok"},
    }
    assert (code, sang.exists()) == (0, True)


def _refused(recipe: Path, folder: Path, path: tuple[Path, ...]) -> str:
    """What ``quadmix label`` says when it refuses the recipe, without its path; and it has made nothing."""
    out = folder / "out"
    code, said = _quadmix("label", str(recipe), "--out", str(out), path=path, cwd=folder)
    assert (code, said["exit_code"], out.exists()) == (78, 78, False)
    return said["error"].removeprefix(f"{recipe}: ")


def test_without_the_package_the_recipe_is_refused(recipe: Path, tmp_path: Path) -> None:
    missing = "scorers.stop-words: no plug-in 'stop-words' in quadmix_plugin.scorers; installed are ask-llm, column, "
    assert _refused(recipe, tmp_path, path=()).startswith(missing)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("scorers={stopwords: {}}", r"scorers\.stopwords: no plug-in 'stopwords' in .*; did you mean 'stop-words'\?$"),
        ("scorers.stop-words.min_word=5", r"scorers\.stop-words\.min_word: unknown key; did you mean 'min_words'\?$"),
        (
            "scorers.stop-words.min_words=many",
            r"scorers\.stop-words\.min_words: input should be a valid integer.*, not 'many'$",
        ),
        (
            "scorers.stop-words.min_words=0",
            r"scorers\.stop-words\.options: 8 words, min_words 0; give at least one of each",
        ),
        (
            "scorers.stop-words.words=[]",
            r"scorers\.stop-words\.options: 0 words, min_words 300; give at least one of each",
        ),
    ],
)
def test_a_wrong_name_or_option_is_refused(on_path: None, recipe: Path, change: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load_recipe(recipe, [change])


def test_two_packages_with_one_name_are_both_named(site: Path, recipe: Path, tmp_path: Path) -> None:
    entries = "[quadmix_plugin.scorers]\nstop-words = other_heuristics:Canary\n"
    other = _register(tmp_path / "site", "other-heuristics", "raise RuntimeError('imported')", entries)
    assert _refused(recipe, tmp_path, path=(site, other)) == (
        "scorers.stop-words: the name 'stop-words' in quadmix_plugin.scorers is registered by "
        "other-heuristics (other_heuristics:Canary) and quadmix-heuristics (quadmix_heuristics.stop_words:StopWords); "
        "uninstall one of them"
    )


def test_the_packages_own_tests_pass_without_quadmix(site: Path, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    done = _python("-c", PYTEST_ALONE, "tests", path=(site,), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_package_installs_its_module_and_nothing_else(site: Path) -> None:
    files = {p.relative_to(site).as_posix() for p in site.rglob("*.py")}
    assert files == {"quadmix_heuristics/__init__.py", "quadmix_heuristics/stop_words.py"}


def _code_lines(source: str, name: str) -> int:
    """Lines of a class, with its decorators, that are neither docstring, comment nor blank."""
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    assert found.end_lineno is not None
    start = min([found.lineno, *(each.lineno for each in found.decorator_list)])
    kept = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            kept |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(found):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            kept -= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return len([line for line in kept if start <= line <= found.end_lineno])


def test_a_scorer_takes_twenty_lines() -> None:
    counted = (
        'import os\n@deco\nclass A:\n    """Text\n\n    of it."""\n    # why\n\n    x = (1,\n         2)  # both\n'
    )
    assert _code_lines(counted + "\nclass B: ...\n", "A") == 4
    source = (PACKAGE / "quadmix_heuristics" / "stop_words.py").read_text(encoding="utf-8")
    lines = _code_lines(source, "StopWords")
    assert 10 <= lines <= 20
    for page in (PACKAGE / "README.md", PAGE):
        assert f"{lines} lines of code" in page.read_text(encoding="utf-8")


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """docs/plugins.md, its Python installed as a package of plug-ins."""
    text = PAGE.read_text(encoding="utf-8")
    entries = (
        "[quadmix_plugin.domain_classifiers]\nhost = page_plugins:HostDomain\n"
        "[quadmix_plugin.selectors]\nlongest = page_plugins:Longest\n"
        "[quadmix_plugin.regressors]\nridge = page_plugins:Ridge\n"
    )
    source = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    monkeypatch.syspath_prepend(_register(tmp_path, "page-plugins", source, entries))
    yield text
    sys.modules.pop("page_plugins", None)


def test_the_page_names_every_group(page: str) -> None:
    assert [group for group in registry.GROUPS.values() if f"| `{group}` |" not in page] == []


def test_the_pages_classifier_and_selector_do_what_they_say(page: str) -> None:
    host = registry.create("domain_classifiers", "host", {"column": "url"})
    assert host.classify(["https://Example.org/a", "", None]) == ["example.org", "none", "none"]
    scores, tokens = np.zeros((5, 1), np.float32), np.array([5, 40, 10, 40, 30])
    table = ScoreTable(pa.array(range(5)), np.zeros(5, np.int64), tokens, scores, ("a",), ("b",))
    assert select_in_memory(registry.create("selectors", "longest"), table, scores, 85, 0).tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(InputError, match="the documents that may be taken have 0"):
        select_in_memory(registry.create("selectors", "longest", {"shortest": 41}), table, scores, 85, 0)


def test_the_pages_regressor_learns_a_line(page: str) -> None:
    x = np.random.default_rng(0).normal(size=(60, 3))
    y = 2.0 + x @ [1.0, -0.5, 0.0]
    model = registry.create("regressors", "ridge", {"strength": 1e-9})
    model.fit(x[:40], y[:40])
    np.testing.assert_allclose(model.predict(x[40:]), y[40:], atol=1e-6)
    assert len(json.loads(model.to_text())) == 4
