"""The export: one pair per shard from pool or text alike, whatever dies meanwhile; Megatron reads the blends."""

import itertools
import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list
from nemo_curator.tasks import DocumentBatch
from small_run import MODELS, corpus_texts, write_small_recipe
from tokenizers import Tokenizer

from quadmix_plugin import training_data
from quadmix_plugin.config import load_recipe
from quadmix_plugin.errors import InputError, QuadmixError
from quadmix_plugin.executors import DaskExecutor
from quadmix_plugin.megatron import TokenFile
from quadmix_plugin.pipelines import export as exporting
from quadmix_plugin.pipelines.context import Run, open_run
from quadmix_plugin.pipelines.done import step_is_done
from quadmix_plugin.pipelines.export import TokenFiles, export, export_selection, exported, validation_prefix
from quadmix_plugin.pipelines.label import label
from quadmix_plugin.pipelines.normalise import normalise
from quadmix_plugin.pipelines.plan import make_plan
from quadmix_plugin.pipelines.proxy_data import write_pool
from quadmix_plugin.schema import COPIES, DOC_ID, DOMAIN, TEXT, TOKENS
from quadmix_plugin.stages import ExportTokens
from quadmix_plugin.stages.gather_tokens import GatherTokens
from quadmix_plugin.store import RunDirectory

N, PER_SHARD = 200, 40
EMPTY, LONELY = 2, 4  # shards: with nothing selected, and with one document alone
REASONS = ("merged_quality", "quality_rank", "sampling_value")
THINNED = "proxy.pool=thinned"  # then there is no pool with every document


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose labels are columns of the corpus, so that no model is loaded."""
    folder = tmp_path_factory.mktemp("export")
    path = write_small_recipe(folder, corpus={"path": "mine.parquet", "documents_per_shard": PER_SHARD})
    texts = corpus_texts(N)
    corpus = {
        "doc_id": [f"d{i}" for i in range(N)], "text": texts, "domain": ["ab"[i % 2] for i in range(N)],
        "s": [float(i % 17) for i in range(N)],
    }  # fmt: skip
    pq.write_table(pa.table(corpus), folder / "mine.parquet")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content |= {
        "domain": {"classifier": "column", "column": "domain"},
        "scorers": {"s": {"scorer": "column", "column": "s"}},
        "rank": {"merge_small_domains": 0},
        "compare": {"selectors": {}},
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def labelled(recipe: Path) -> Path:
    """A run directory with labels, the score table and the pool; tests only read it."""
    out = recipe.parent / "labelled"
    with open_run(load_recipe(recipe), out) as run:
        label(run)
        normalise(run)
        write_pool(run, run.step("proxies"))
    return out


@pytest.fixture
def out(labelled: Path, tmp_path: Path) -> Path:
    """A copy of that directory which a test may change."""
    return shutil.copytree(labelled, tmp_path / "out")


def _copies() -> np.ndarray:
    copies = np.random.default_rng(7).integers(0, 4, N).astype(np.int32)
    copies[EMPTY * PER_SHARD : (EMPTY + 1) * PER_SHARD] = 0
    copies[LONELY * PER_SHARD :] = 0
    copies[LONELY * PER_SHARD + 3] = 3
    return copies


def _select(run: Run, copies: np.ndarray | None = None) -> None:
    """Finishes the step ``select`` with these copies, one shard after the other."""
    step, copies = run.step("select"), _copies() if copies is None else copies
    for i, shard in enumerate(run.label_shards):
        rows = run.require("normalise").read_table(f"normalise/{shard}.parquet", [DOC_ID, DOMAIN, TOKENS])
        rows = rows.append_column(COPIES, pa.array(copies[i * PER_SHARD : (i + 1) * PER_SHARD], pa.int32()))
        for k, name in enumerate(REASONS):
            rows = rows.append_column(name, pa.array(np.arange(rows.num_rows) / 7 + k))
        kept = rows.filter(pa.array(rows[COPIES].to_numpy() > 0))
        step.write_table(f"selection/{shard}.parquet", kept, rows_in=rows.num_rows, rows_kept=kept.num_rows, dropped={})
    step.finish()


def _export(recipe: Path, out: Path, *overrides: str, **options: Any) -> TokenFiles:
    with open_run(load_recipe(recipe, list(overrides)), out, **options) as run:
        if not run.step("select").is_done:
            _select(run)
        export(run)
        return exported(run, run.require("export"))


def _forget_pool(out: Path, *overrides: str) -> None:
    """Removes the pool where the recipe is overridden so that it has none with every document."""
    if overrides:
        shutil.rmtree(out / "proxies")
        shutil.rmtree(out / "manifest" / "proxies")


def _made(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "tokens").iterdir())}


def _stamps(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "tokens").iterdir()}


@pytest.fixture(scope="module")
def wanted(recipe: Path, labelled: Path) -> dict[str, bytes]:
    """The bytes of the token files as one process gathers them out of the pool."""
    out = shutil.copytree(labelled, recipe.parent / "wanted")
    _export(recipe, out)
    return _made(out)


def _documents() -> dict[str, list[int]]:
    tokenizer = Tokenizer.from_file(str(MODELS / "tokenizer" / "tokenizer.json"))
    eod = tokenizer.token_to_id("<|endoftext|>")
    encodings = tokenizer.encode_batch(corpus_texts(N), add_special_tokens=False)
    return {f"d{i}": [*each.ids, eod] for i, each in enumerate(encodings)}


def test_every_shard_has_a_pair_of_its_own_selection(recipe: Path, out: Path) -> None:
    files = _export(recipe, out)
    names = [Path(prefix).name.rsplit("-", 1)[1] for prefix in files.prefixes]
    assert names == ["00000", "00001", "00003", "00004"]
    documents, copies = _documents(), _copies()
    found = []
    for prefix, table in zip(files.prefixes, files.documents, strict=True):
        pair, rows = TokenFile.open(prefix), pq.read_table(table).to_pylist()
        shard = int(prefix[-5:])
        assert {int(row["doc_id"][1:]) // PER_SHARD for row in rows} == {shard}
        assert [pair.document(i).tolist() for i in range(pair.n_documents)] == [documents[r["doc_id"]] for r in rows]
        assert [row["tokens"] for row in rows] == pair.lengths.tolist()
        same = sum(a["doc_id"] == b["doc_id"] for a, b in itertools.pairwise(rows))
        assert same == (2 if shard == LONELY else 0)
        found += [(row["doc_id"], row["copy"]) for row in rows]
    assert sorted(found) == sorted((f"d{i}", copy) for i in range(N) for copy in range(copies[i]))
    lengths = np.array([len(documents[f"d{i}"]) for i in range(N)])
    assert files.rows == copies.sum()
    assert (files.tokens, files.unique_tokens) == ((lengths * copies).sum(), lengths[copies > 0].sum())
    empty = next(path for path in (out / "tokens").iterdir() if path.name.endswith(f"0000{EMPTY}.json"))
    assert json.loads(empty.read_text()) == {"rows": 0, "tokens": 0, "unique_rows": 0, "unique_tokens": 0}
    assert RunDirectory(out).verify()[1] == []


def test_text_gives_the_bytes_that_the_pool_gives(recipe: Path, out: Path, wanted: dict[str, bytes]) -> None:
    _forget_pool(out, THINNED)
    _export(recipe, out, THINNED)
    assert _made(out) == wanted
    assert not (out / "export").exists()


@pytest.mark.parametrize("overrides", [(), (THINNED,)])
def test_workers_give_the_same_bytes(
    recipe: Path, out: Path, wanted: dict[str, bytes], dask_executor: DaskExecutor, overrides: tuple[str, ...]
) -> None:
    _forget_pool(out, *overrides)
    _export(recipe, out, *overrides, make_executor=lambda: dask_executor)
    assert _made(out) == wanted


def _die_in_the_middle(documents: Any, bin_path: Path, *_: Any, **__: Any) -> None:
    bin_path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def _dies(marker: str, task: DocumentBatch) -> bool:
    """Whether this is the shard whose worker shall die: always, or the first time that it comes by."""
    if not task._metadata["shard"].endswith("00003"):
        return False
    if marker == "always":
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@dataclass
class DyingGather(GatherTokens):
    marker: str = ""

    def process(self, task: DocumentBatch) -> DocumentBatch:
        if _dies(self.marker, task):
            training_data.write_documents = _die_in_the_middle
        return super().process(task)


@dataclass
class DyingExport(ExportTokens):
    marker: str = ""

    def process(self, task: DocumentBatch) -> DocumentBatch:
        if _dies(self.marker, task):
            training_data.write_documents = _die_in_the_middle
        return super().process(task)


DYING = [
    ("GatherTokens", DyingGather, ()),
    pytest.param("ExportTokens", DyingExport, (THINNED,), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "stage", "overrides"), DYING)
def test_a_killed_worker_costs_nothing_but_time(
    recipe: Path, out: Path, wanted: dict, tmp_path: Path, dask_executor: DaskExecutor,
    monkeypatch: pytest.MonkeyPatch, name: str, stage: Any, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    _forget_pool(out, *overrides)
    marker = tmp_path / "died"
    monkeypatch.setattr(exporting, name, lambda **options: stage(**options, marker=str(marker)))
    _export(recipe, out, *overrides, make_executor=lambda: dask_executor)
    assert marker.exists()
    with open_run(load_recipe(recipe, list(overrides)), out):
        pass  # sweeps what the killed process left
    assert _made(out) == wanted


@pytest.mark.slow
def test_an_export_whose_workers_die_goes_on_where_it_was(
    recipe: Path, out: Path, wanted: dict, dask_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def executor() -> DaskExecutor:
        return DaskExecutor(client=dask_client, lost_worker_retries=0)

    with monkeypatch.context() as dying:
        dying.setattr(exporting, "GatherTokens", lambda **options: DyingGather(**options, marker="always"))
        with pytest.raises(QuadmixError, match=r"stage 'gather_tokens', shard .*-00003: the worker process was lost"):
            _export(recipe, out, make_executor=executor)
    with open_run(load_recipe(recipe), out) as run:
        assert not run.step("export").is_done
    before = _stamps(out)
    assert not [name for name in before if "00003" in name]  # neither half nor whole
    _export(recipe, out, make_executor=executor)
    assert _made(out) == wanted
    assert {name: stamp for name, stamp in _stamps(out).items() if name in before} == before


@pytest.mark.parametrize("lost", ["-00001.idx", "-00003.documents.parquet", "-00002.json", "blend.json", "blend.txt"])
def test_what_is_lost_is_written_again_and_nothing_else(
    recipe: Path, out: Path, wanted: dict[str, bytes], lost: str
) -> None:
    _export(recipe, out)
    before = _stamps(out)
    (path,) = (out / "tokens").glob(f"*{lost}")
    path.unlink()
    _export(recipe, out)
    assert _made(out) == wanted
    shard = lost[:6]
    changed = {name for name, stamp in _stamps(out).items() if before.get(name) != stamp}
    assert changed == ({path.name} if shard[0] != "-" else {name for name in before if shard in name})


class _Ids:
    """As much of a tokenizer as Megatron's data sets ask for."""

    vocab_size, eod, pad, unique_identifiers = 4096, 0, 1, {"class": "ids"}


def _megatron(blends: list, sizes: list[int | None]) -> list:
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=64, blend_per_split=blends, tokenizer=_Ids(), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def test_megatron_builds_its_data_sets_from_the_blends(
    recipe: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = _export(recipe, out)
    moved = out.rename(tmp_path / "moved")  # prefixes are relative to the run directory
    monkeypatch.chdir(moved)
    per_split = json.loads(Path("tokens/blend.json").read_text())
    train, valid, test = (get_blend_from_list(per_split[split]) for split in ("train", "valid", "test"))
    assert test is None
    assert train == get_blend_from_list(Path("tokens/blend.txt").read_text().split())
    prefixes, weights = train
    assert [f"{out}/{prefix}" for prefix in prefixes] == list(files.prefixes)
    assert weights == [float(TokenFile.open(prefix).n_tokens) for prefix in prefixes]
    assert sum(weights) == files.tokens
    samples = 300
    train_set, valid_set, test_set = _megatron([train, valid, test], [samples, 20, None])
    assert len(train_set) >= samples
    assert test_set is None
    per_pair = np.bincount(train_set.dataset_index, minlength=len(prefixes)) / len(train_set)
    assert np.abs(per_pair - np.array(weights) / files.tokens).max() < 0.01
    trained = {int(i) for k in range(samples) for i in train_set[k]["tokens"][:3]}
    assert len(trained) > 50
    assert len(valid_set[0]["tokens"]) == 64


def test_validation_is_what_nothing_was_searched_on_whole(recipe: Path, out: Path) -> None:
    _export(recipe, out)
    with open_run(load_recipe(recipe), out) as run:
        rows = exporting.tokenised_rows(run, 1 << 20)
        prefix = validation_prefix(run)
    assert prefix == str(out / "tokens" / "validation")
    file = TokenFile.open(prefix)
    kept = [row for row in rows.to_pylist() if row["part"] == "report"]
    assert 0 < len(kept) < rows.num_rows
    eod = kept[0]["ids"][0]
    assert [file.document(i).tolist() for i in range(file.n_documents)] == [[*row["ids"][1:], eod] for row in kept]
    assert not any(row["truncated"] for row in kept)
    assert max(len(row["ids"]) for row in kept) > 129  # longer than the context of the models that are trained


def test_validation_rows_that_are_all_searched_on_are_refused(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def searched(run: Run, context: int) -> pa.Table:
        return pa.table({"part": ["search"] * 3, "ids": [[1, 2]] * 3})

    monkeypatch.setattr(exporting, "tokenised_rows", searched)
    with pytest.raises(InputError, match=r"validation: 3 rows, none of them in the part 'report'.*more rows"):
        _export(recipe, out)
    assert not (out / "tokens").exists()


@pytest.mark.parametrize("overrides", [(), (THINNED,)])
def test_text_may_be_asked_for_later_and_touches_nothing_else(
    recipe: Path, out: Path, overrides: tuple[str, ...]
) -> None:
    _forget_pool(out, *overrides)
    _export(recipe, out, *overrides)
    before = _stamps(out)
    plain, asked = load_recipe(recipe, list(overrides)), load_recipe(recipe, [*overrides, "export.text=true"])
    with open_run(asked, out) as run:
        assert run.step("export").is_done
        assert not step_is_done(run, "export")
        (row,) = (each for each in make_plan(asked, out, trial=False)["steps"] if each["step"] == "export")
        assert row == {"step": "export", "state": "done without the text", "work": row["work"]}
        keys = run.keys
        export(run)
        assert step_is_done(run, "export")
    assert _stamps(out) == before
    parts = pa.concat_tables(pq.read_table(path) for path in sorted((out / "selected").iterdir()))
    selection = pa.concat_tables(pq.read_table(path) for path in sorted((out / "selection").iterdir()))
    columns = [DOC_ID, COPIES, DOMAIN, TOKENS, *REASONS]
    assert parts.column_names == [DOC_ID, TEXT, COPIES, DOMAIN, TOKENS, *REASONS]
    assert parts.select(columns).to_pylist() == selection.select(columns).to_pylist()
    texts = {f"d{i}": text for i, text in enumerate(corpus_texts(N))}
    assert parts[TEXT].to_pylist() == [texts[i] for i in parts[DOC_ID].to_pylist()]
    with open_run(plain, out) as run:  # and is not taken away
        assert step_is_done(run, "export")
        assert run.keys == keys
    assert RunDirectory(out).verify()[1] == []


def test_an_export_of_another_form_is_made_anew(recipe: Path, out: Path) -> None:
    with open_run(load_recipe(recipe), out) as run:
        _select(run)
        run.step("export").finish(selection={"rows": 1, "tokens": 2, "unique_tokens": 2})
        assert not step_is_done(run, "export")
        export(run)
        assert step_is_done(run, "export")


def test_another_selection_goes_to_a_folder_of_its_own(recipe: Path, out: Path) -> None:
    with open_run(load_recipe(recipe), out) as run:
        _select(run, np.eye(1, N, 3, dtype=np.int32)[0])
        export(run)
        step = run.step("compare")
        files = export_selection(run, step, "compare/x/tokens", run.step("select"), "selection")
        assert files == exported(run, step, "compare/x/tokens")
        assert [len(files.prefixes), files.rows] == [1, 1]
        assert files.prefixes[0].startswith(f"{out}/compare/x/tokens/train-")
        blend = step.read_json("compare/x/tokens/blend.json")
        assert blend["train"] == [str(files.tokens), files.prefixes[0].removeprefix(f"{out}/")]
        assert blend["valid"] == ["tokens/validation"]
        with pytest.raises(QuadmixError, match="not there"):
            exported(run, step, "compare/y/tokens")


def test_an_empty_selection_is_refused_before_any_work(recipe: Path, out: Path) -> None:
    with open_run(load_recipe(recipe), out) as run:
        _select(run, np.zeros(N, dtype=np.int32))
        with pytest.raises(InputError, match=r"tokens: no document is selected; raise the budget"):
            export_selection(run, run.step("export"), "tokens", run.step("select"), "selection")
    assert not (out / "tokens").exists()


def test_too_many_shards_for_a_blend_are_refused_before_any_work(
    recipe: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quadmix_plugin import megatron

    monkeypatch.setattr(megatron, "MOST_PAIRS", 4)
    _export(recipe, out)  # five shards, of which one is empty
    monkeypatch.setattr(megatron, "MOST_PAIRS", 3)
    with open_run(load_recipe(recipe), out) as run:
        message = r"compare/x: 4 shards, and Megatron blends at most 3 token files; raise corpus\.documents_per_shard"
        with pytest.raises(InputError, match=message):
            export_selection(run, run.step("compare"), "compare/x", run.step("select"), "selection")
    assert not (out / "compare").exists()
    with open_run(load_recipe(recipe), tmp_path / "new") as run:
        with pytest.raises(InputError, match=r"5 shards.*documents_per_shard"):
            label(run)
        assert run.step("label").entries() == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("left", [0.0, 0.7])
def test_a_truncated_pool_is_named_and_nothing_is_left(recipe: Path, out: Path, suffix: str, left: float) -> None:
    (path,) = (out / "proxies" / "pool").glob(f"*-00003{suffix}")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    with pytest.raises(InputError, match=r"proxies/pool/.*-00003\.(bin|idx): .*write (them|the token files) again"):
        _export(recipe, out)
    assert not list((out / "tokens").glob("*00003*"))


def _pool(run: Run, documents: dict[int, list[list[int]]]) -> None:
    """Replaces the pool's pairs of some shards."""
    from quadmix_plugin.megatron import write_documents

    for i, ids in documents.items():
        prefix = f"proxies/pool/{run.label_shards[i]}"
        with run.step("proxies").writing(f"{prefix}.bin", f"{prefix}.idx", rows=0, tokens=0) as pair:
            write_documents(ids, *pair, 60_000)


def _shard(i: int) -> list[list[int]]:
    return [ids for name, ids in _documents().items() if int(name[1:]) // PER_SHARD == i]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[:-1], r"proxies/pool/.*-00001\.bin: 39 documents, the labels have 40; .*another --out"),
        (
            lambda ids: [[7, *each] for each in ids],
            r"00001\.bin: doc_id 'd\d+' has (\d+) tokens, \d+ are in its labels .*tokenizer\.model .*models/tokenizer",
        ),
        (lambda ids: [[4096, *each[1:]] for each in ids], r"doc_id 'd\d+': an id of 4096; give ids from 0 to 4095"),
    ],
)
def test_a_pool_of_another_tokenizer_or_corpus_is_refused(recipe: Path, out: Path, change: Any, message: str) -> None:
    with open_run(load_recipe(recipe), out) as run:
        _pool(run, {1: change(_shard(1))})
    with pytest.raises(InputError, match=message):
        _export(recipe, out)
    assert not list((out / "tokens").glob("*00001*"))


def test_a_pool_of_another_recipe_is_refused(recipe: Path, out: Path) -> None:
    for entry in (out / "manifest" / "proxies").glob("*-00000.idx.json"):
        entry.unlink()
    with pytest.raises(InputError, match=r"-00000\.bin: not of this recipe.*run `quadmix proxies` first"):
        _export(recipe, out)


def test_estimated_counts_need_not_be_those_of_the_tokenizer(recipe: Path, tmp_path: Path) -> None:
    for overrides in (("tokenizer.estimate=true",), ("tokenizer.estimate=true", THINNED)):
        out = tmp_path / str(len(overrides))
        with open_run(load_recipe(recipe, list(overrides)), out) as run:
            label(run)
            normalise(run)
            if len(overrides) == 1:
                write_pool(run, run.step("proxies"))
            counted = {i: len(ids) - 1 for i, ids in _documents().items()}
            assert dict(zip(run.table.doc_ids.to_pylist(), run.table.tokens.tolist(), strict=True)) != counted
        _export(recipe, out, *overrides)
    one, two = _made(tmp_path / "1"), _made(tmp_path / "2")
    assert one == two


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), r"tokens/train-.*-00000: 35 selected documents are not in the labels.*select again"),
        ((THINNED,), r"-00000: 35 documents .* are not in the corpus.*another --out"),
    ],
)
def test_a_selection_of_other_documents_is_refused(
    recipe: Path, out: Path, overrides: tuple[str, ...], message: str
) -> None:
    _forget_pool(out, *overrides)
    with open_run(load_recipe(recipe, list(overrides)), out) as run:
        step, path = run.step("select"), f"selection/{run.label_shards[0]}.parquet"
        _select(run)
        rows = step.read_table(path)
        ids = pa.array([f"x{i}" for i in range(35)])
        step.write_table(path, rows.slice(0, 35).set_column(0, DOC_ID, ids), rows_kept=35)
        with pytest.raises(InputError, match=message):
            export(run)
    assert not list((out / "tokens").glob("*00000*"))
