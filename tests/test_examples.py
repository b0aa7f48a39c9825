"""The examples run: QuaDMix stages between Curator's readers, filters and writers, from Python and from its YAML."""

import importlib.util
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nemo_curator.config.run import create_pipeline_from_yaml
from omegaconf import OmegaConf
from small_run import MODELS, ROOT

from quadmix_plugin.executors import InlineExecutor, make_executor

EXAMPLES = ROOT / "examples"


def _example():
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / "existing_curator_pipeline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _yaml_pipeline(corpus: Path, run: Path, out: Path):
    config = OmegaConf.load(EXAMPLES / "existing_curator_pipeline.yaml")
    values = {"corpus": str(corpus), "run": str(run), "out": str(out), "models": str(MODELS)}
    return create_pipeline_from_yaml(OmegaConf.merge(config, values), log_config=False)


def _rows(out: Path) -> list[tuple[str, int]]:
    table = pa.concat_tables(pq.read_table(path) for path in sorted(out.glob("*.parquet")))
    return sorted(zip(table["doc_id"].to_pylist(), table["copies"].to_pylist(), strict=True))


@pytest.fixture
def expected(finished: Path) -> list[tuple[str, int]]:
    """Each document of the finished run as often as it was selected there, those under 50 words left out."""
    corpus = pq.read_table(finished.parent / "corpus.parquet", columns=["doc_id", "text"]).to_pandas()
    long_enough = {d for d, text in zip(corpus["doc_id"], corpus["text"], strict=True) if len(text.split()) >= 50}
    parts = [pq.read_table(p, columns=["doc_id", "copies"]) for p in (finished / "selection").glob("corpus-*.parquet")]
    rows = pa.concat_tables(parts).to_pylist()
    return sorted((r["doc_id"], r["copies"]) for r in rows if r["doc_id"] in long_enough for _ in range(r["copies"]))


def test_stages_in_a_curator_pipeline_select_what_the_run_selected(
    finished: Path, tmp_path: Path, expected: list[tuple[str, int]]
) -> None:
    """The frozen maps give documents that come again, through somebody's own pipeline, the copies they had."""
    pipeline = _example().build([str(finished.parent / "corpus.parquet")], finished, tmp_path / "out", seed=3)
    pipeline.run(InlineExecutor())
    assert _rows(tmp_path / "out") == expected
    assert len(expected) > 50


def test_curator_yaml_is_the_same_pipeline(finished: Path, tmp_path: Path) -> None:
    corpus = finished.parent / "corpus.parquet"
    _yaml_pipeline(corpus, finished, tmp_path / "yaml").run(InlineExecutor())
    _example().build([str(corpus)], finished, tmp_path / "python").run(InlineExecutor())
    assert _rows(tmp_path / "yaml") == _rows(tmp_path / "python")


@pytest.mark.slow
def test_curators_own_executor_gives_the_same_documents(
    finished: Path, tmp_path: Path, expected: list[tuple[str, int]]
) -> None:

    pipeline = _example().build([str(finished.parent / "corpus.parquet")], finished, tmp_path / "out", seed=3)
    pipeline.run(make_executor("ray_data", {}))
    assert _rows(tmp_path / "out") == expected
