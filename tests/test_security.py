"""A recipe is data and holds no secrets; secrets of the environment and hostile names get nowhere."""

import datetime as dt
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hostile_corpus import contents, write_corpus_recipe
from small_run import ROOT, write_small_recipe

from quadmix_plugin.cli import main
from quadmix_plugin.config import load_recipe
from quadmix_plugin.credentials import refuse_credentials
from quadmix_plugin.errors import RecipeError
from quadmix_plugin.pipelines.init import write_starter
from quadmix_plugin.pretraining.launch import LAUNCHER, launch
from quadmix_plugin.pretraining.megatron_lm import command
from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer
from quadmix_plugin.registry import create

QUICKSTART = (ROOT / "pipelines" / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_recipe(tmp_path_factory.mktemp("recipe"))


# --- recipes that are more than data

CODE = [
    "!!python/object/apply:os.mkdir ['CANARY']\n",
    "!!python/object/new:os.mkdir ['CANARY']\n",
    "name: !!python/object/apply:os.mkdir ['CANARY']\n",
    "name: !!python/object/apply:subprocess.run [[mkdir, 'CANARY']]\n",
    "name: !!python/name:os.mkdir\n",
    "name: !!python/module:os\n",
    "name: !<tag:yaml.org,2002:python/object/apply:os.mkdir> ['CANARY']\n",
    "%TAG !p! tag:yaml.org,2002:python/\n--- !p!object/apply:os.mkdir ['CANARY']\n",
    "? !!python/object/apply:os.mkdir ['CANARY']\n: 1\n",
    f"{QUICKSTART}\n_target_: os.mkdir\n_args_: ['CANARY']\n",
    QUICKSTART.replace("classifier: nvidia-domain", "classifier: nvidia-domain\n  _target_: os.mkdir\n  path: CANARY"),
    QUICKSTART.replace("classifier: nvidia-domain", "classifier: os.mkdir"),
    QUICKSTART.replace("classifier: nvidia-domain", "classifier: os:mkdir"),
    QUICKSTART.replace("proxy:\n", "proxy:\n  trainer: subprocess:run\n", 1),
    QUICKSTART.replace("\nproxy:\n", "\nproxy:\n  options: {_target_: os.mkdir, path: CANARY}\n", 1),
    QUICKSTART.replace("\nsearch:\n", "\nsearch:\n  options: {_target_: os.mkdir, path: CANARY}\n", 1),
]
BOMBS = [
    "a: &a [x, x]\nb: &b [*a, *a]\nname: [*b, *b]\n",
    "name: &a [*a]\n",
    "a: &a {b: 1}\nname:\n  <<: *a\n",
    f"name: {'[' * 5000}{']' * 5000}\n",
    f"name: {'{a: ' * 500}1{'}' * 500}\n",
    f"name: {'[' * 100}{']' * 100}\n",
    "name: x\n" + "# comment\n" * 200_000,
    "name: a\nname: b\n",
    f"name: {'9' * 5000}\n",
    f"name: [{'1,' * 100_000}1]\n",
]


@pytest.mark.parametrize("text", [*CODE, *BOMBS], ids=range(len(CODE) + len(BOMBS)))
def test_a_recipe_that_is_more_than_data_is_refused(text: str, tmp_path: Path, monkeypatch, capsys) -> None:
    path, canary = tmp_path / "recipe.yaml", tmp_path / "canary"
    path.write_text(text.replace("CANARY", str(canary)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["quadmix", "run", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().err
    assert ended.value.code == 78
    assert "recipe.yaml: " in shown
    assert len(shown) < 2000
    assert sorted(each.name for each in tmp_path.iterdir()) == ["recipe.yaml"]


def test_what_stands_behind_set_is_read_by_the_same_rules(recipe: Path) -> None:
    for value in ("!!python/object/apply:os.mkdir [x]", "&a [*a]", f"{'[' * 5000}{']' * 5000}"):
        with pytest.raises(RecipeError, match="not valid YAML"):
            load_recipe(recipe, [f"search.options={value}"])


# --- credentials in a recipe

SECRET = "s3cr3t/Value+0"  # noqa: S105 - none
ADDRESSES = [
    f"s3://AKIAEXAMPLE:{SECRET}@bucket/corpus",
    f"s3://:{SECRET}@bucket/corpus",
    f"simplecache::s3://AKIAEXAMPLE:{SECRET}@bucket/*.parquet",
    f"zip://a.parquet::https://user:{SECRET}@host/a.zip",
    f"https://user:{SECRET}@host/a.parquet",
    f"https://{SECRET.replace('/', '')}@raw.example.org/a.parquet",
    f"HTTPS://user:{SECRET}@host/a.parquet",
    f"sftp://user:{SECRET}@host:22/a.parquet",
    f"https://bucket.example.org/a.parquet?X-Amz-Signature={SECRET}",
    f"https://account.example.org/a.parquet?sv=1&sig={SECRET}",
    f"gs://bucket/a.parquet?access_token={SECRET}",
]
PLAIN = [
    "s3://bucket/a@b/*.parquet",
    "abfs://container@account.dfs.core.windows.net/a.parquet",
    "github://owner:repository@branch/a.parquet",
    "hf://datasets/owner/name@branch/a.parquet",
    "hdfs://user@host:8020/a.parquet",
    "sftp://user@host/a.parquet",
    "https://host:443/a.parquet?version=3&design=1",
    "tls://[::1]:8786",
    "tcp://127.0.0.1:8786",
    "/data/a:b@c/*.parquet",
    "zip://a.parquet::/data/a.zip",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("key", ["corpus.path", "validation.path", "executor.address", "scorers.ask-llm.model"])
def test_an_address_with_credentials_is_refused_and_not_repeated(key: str, address: str, recipe: Path) -> None:
    with pytest.raises(RecipeError, match=rf"recipe\.yaml: {key}: .*credentials in it; .*by the environment") as caught:
        load_recipe(recipe, [f'{key}="{address}"'])
    assert not any(part in str(caught.value) for part in (SECRET, "s3cr3t", "AKIAEXAMPLE"))


@pytest.mark.parametrize(
    "key", ["token", "api_key", "hf_token", "aws_secret_access_key", "password", "storage_options"]
)
def test_a_key_that_names_a_secret_is_refused(key: str, recipe: Path) -> None:
    value = f"{{key: {SECRET}}}" if key == "storage_options" else SECRET
    for section in ("corpus", "scorers.ask-llm", "proxy.options"):
        with pytest.raises(RecipeError, match=rf"{section}\.{key}.*: named as a secret; .*environment") as caught:
            load_recipe(recipe, [f"{section}.{key}={value}"])
        assert SECRET not in str(caught.value)


def test_addresses_without_credentials_are_taken(recipe: Path) -> None:
    for address in PLAIN:
        refuse_credentials({"corpus": {"path": [address]}}, "recipe.yaml")
    for key in ("tokens", "tokenizer", "tokens_per_batch", "yes_tokens", "eos_token", "tls_key", "key"):
        refuse_credentials({"proxy": {key: "x"}}, "recipe.yaml")
    assert load_recipe(recipe, [f"corpus.path=[{PLAIN[0]}]"]).corpus.path == [PLAIN[0]]


def test_a_starter_recipe_is_not_written_with_credentials(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"quadmix init: corpus: .*credentials"):
        write_starter(tmp_path / "new", ADDRESSES[0], None, None)
    assert not (tmp_path / "new").exists()


def test_an_object_store_is_not_named_with_credentials(recipe: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["quadmix", "run", str(recipe), "--out", ADDRESSES[0]])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().err
    assert ended.value.code == 78
    assert "quadmix: --out: a s3 URL with credentials in it" in " ".join(shown.split())
    assert "s3cr3t" not in shown


# --- secrets of the environment

CANARIES = {
    name: f"canary{i}{'x' * 20}{i}"
    for i, name in enumerate(
        ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "WANDB_API_KEY", "QUADMIX_TEST")
    )
}


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_anywhere(tmp_path: Path) -> None:
    """Not by a run that fails in a worker, nor by one that goes on and ends; nor in anything that it prints."""
    recipe = write_corpus_recipe(tmp_path, [f"{i}" for i in range(60)], ["d"], ["some words", "more words"])
    broken = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    broken["scorers"]["s"]["column"] = "text"  # no numbers
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken, sort_keys=False), encoding="utf-8")
    common = ["--executor", "dask", "--set", "executor.workers=1", "--verbose", "--out", str(tmp_path / "out")]
    quadmix = [sys.executable, "-m", "quadmix_plugin"]
    ends, printed = [], b""
    for arguments in (["run", "broken.yaml", "--until", "label"], ["run", recipe.name, "--until", "export"],
                      ["report", recipe.name], ["plan", recipe.name, "--no-trial"]):  # fmt: skip
        options = common if arguments[0] != "plan" else common[4:]
        out = str(tmp_path / "failed") if arguments[1] == "broken.yaml" else str(tmp_path / "out")
        line = [*quadmix, *arguments, *options[:-1], out]
        done = subprocess.run(line, check=False, cwd=tmp_path, env=os.environ | CANARIES, capture_output=True)
        ends.append(done.returncode)
        printed += done.stdout + done.stderr
    assert ends == [1, 0, 0, 0], printed.decode()[-3000:]
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert (tmp_path / "out" / "report.html") in written
    assert (tmp_path / "failed" / "recipe.yaml") in written
    for name, secret in CANARIES.items():
        assert secret.encode() not in printed, name
        assert [path for path, content in written.items() if secret.encode() in content] == [], name


# --- commands

HOSTILE = [
    "$(mkdir CANARY)",
    "`mkdir CANARY`",
    "; mkdir CANARY;",
    "| mkdir CANARY",
    "a\nmkdir CANARY",
    "' mkdir CANARY '",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_no_option_of_a_trainer_gets_into_a_shell_script_as_text(value: str) -> None:
    """Numbers and choices are checked; of what may be any text, nothing is written."""
    for name in ("save_every", "log_every", "eval_every", "batch_size", "learning_rate", "schedule", "betas", "dtype"):
        with pytest.raises(RecipeError):
            create("trainers", "megatron", {"shape": "tiny", name: value})
    trainer = create("trainers", "megatron", {"shape": "tiny", "device": value, "wandb": value})
    assert "mkdir" not in command(trainer, trainer.model_shape(128), 1000, 1)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_directory_that_is_a_command_is_a_folder_in_scripts(name: str, tmp_path: Path) -> None:
    run, tools = tmp_path / name.replace("/", ""), tmp_path / "tools"
    (run / "pretrain").mkdir(parents=True)
    tools.mkdir()
    trainer = MegatronTrainer(shape="tiny")
    path = run / "pretrain" / "megatron_lm.sh"
    path.write_text(command(trainer, trainer.model_shape(128), 1000, 1), encoding="utf-8")
    (tools / "torchrun").write_text("#!/bin/sh\npwd\n", encoding="utf-8")
    (tools / "torchrun").chmod(0o755)
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "MEGATRON_LM": name}
    before = contents(tmp_path)
    done = subprocess.run(
        ["bash", str(path)], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"{run}\n"
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", HOSTILE)
def test_a_job_of_any_name_is_one_argument_of_the_launcher(name: str, tmp_path: Path, monkeypatch) -> None:
    """The launcher is the user's own command; what is added to it is no shell's."""

    class Job:
        place, selector, seed = tmp_path, name, 1

        def write(self) -> Path:
            return self.place / name / "job.json"

    (tmp_path / "launcher").write_text(
        '#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n', encoding="utf-8"
    )
    (tmp_path / "launcher").chmod(0o755)
    monkeypatch.setenv(LAUNCHER, shlex.join([str(tmp_path / "launcher"), "own words"]))
    monkeypatch.chdir(tmp_path)
    launch(MegatronTrainer(shape="tiny", device="cpu"), Job())  # type: ignore[arg-type]
    words = (tmp_path / "output.log").read_text(encoding="utf-8").split("\0")
    assert words == ["own words", "-m", "quadmix_plugin.pretraining", str(tmp_path / name / "job.json"), ""]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["launcher", "output.log"]


def test_an_advisory_is_ignored_for_90_days_and_with_a_reason() -> None:
    ignored = runpy.run_path(str(ROOT / "scripts" / "audit.py"))["ignored"]
    day = dt.date(2026, 11, 27)
    assert ignored("# a comment\n\nCVE-1 2026-11-27 only on Windows\nCVE-2 2026-08-29 no such call\n", day) == [
        "CVE-1",
        "CVE-2",
    ]
    for line in (
        "CVE-1 2026-08-28 too old",
        "CVE-1 2026-11-28 of tomorrow",
        "CVE-1 2026-11-27",
        "CVE-1",
        "CVE-1 soon why",
    ):
        with pytest.raises(ValueError, match=r"line 1|Invalid isoformat"):
            ignored(line, day)


def test_a_recipe_names_no_launcher(recipe: Path) -> None:
    for key in ("pretrain.launcher", "pretrain.options.launcher", "executor.launcher"):
        with pytest.raises(RecipeError, match="unknown key"):
            load_recipe(recipe, [f"{key}=touch x"])
