"""Exported shards read back in Megatron; a failed write leaves nothing; copies of a document are spread."""

import itertools
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin import models
from quadmix_plugin.errors import InputError
from quadmix_plugin.stages import ExportTokens
from quadmix_plugin.stages.export_tokens import pair_entry, shuffled_copies, write_selection

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
TOKENIZER = str(QUICKSTART / "models" / "tokenizer")


@pytest.fixture(scope="module")
def corpus():
    return pq.read_table(QUICKSTART / "corpus.parquet", columns=["doc_id", "text"]).slice(0, 90)


@pytest.fixture
def step(run_dir):
    return run_dir.step("proxies", "key")


def batch(table, shard):
    return DocumentBatch(dataset_name=shard, data=table, _metadata={"shard": shard})


def exported(step, corpus, **options):
    stage = ExportTokens(step, TOKENIZER, **options)
    return [stage.process(batch(corpus.slice(30 * i, 30), f"part-{i}")) for i in range(3)]


def read(step, prefix):
    theirs = IndexedDataset(str(step.root / prefix))
    return [np.array(theirs[i]).tolist() for i in range(len(theirs))]


def test_megatron_reads_back_every_document_in_order(step, corpus):
    counts = [task.data.to_pylist()[0] for task in exported(step, corpus)]
    tokenizer = models.load_tokenizer(TOKENIZER)
    eod = tokenizer.token_to_id("<|endoftext|>")
    expected = [[*tokenizer.encode(text, add_special_tokens=False).ids, eod] for text in corpus["text"].to_pylist()]
    found = [ids for i in range(3) for ids in read(step, f"proxies/pool/part-{i}")]
    assert found == expected
    assert sum(row["tokens"] for row in counts) == sum(map(len, expected))
    assert [row["rows"] for row in counts] == [30, 30, 30]


def test_a_shard_that_is_there_is_not_written_again(step, corpus):
    exported(step, corpus)
    path = step.root / "proxies/pool/part-1.bin"
    before = path.stat().st_mtime_ns
    again = exported(step, corpus)
    assert path.stat().st_mtime_ns == before
    assert again[1].data.to_pylist()[0]["rows"] == 30
    (step.root / "proxies/pool/part-1.idx").unlink()
    assert pair_entry(step, "proxies/pool/part-1") is None
    exported(step, corpus)
    assert len(read(step, "proxies/pool/part-1")) == 30


def test_a_write_that_fails_leaves_nothing_visible(step, corpus, monkeypatch):
    from quadmix_plugin.stages import export_tokens

    def interrupted(documents, bin_path, idx_path, vocabulary, eod):
        bin_path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(export_tokens, "write_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exported(step, corpus)
    assert step.entries() == []
    assert [path for path in step.root.rglob("*") if path.is_file()] == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from quadmix_plugin.megatron import write_documents
from quadmix_plugin.store import Step

def documents():
    yield list(range(4000))
    os.kill(os.getpid(), signal.SIGKILL)

with Step(Path(sys.argv[1]), "proxies", "key").writing("proxies/pool/a.bin", "proxies/pool/a.idx") as pair:
    write_documents(documents(), *pair, 4096)
"""


def test_a_killed_write_leaves_only_what_a_sweep_removes(step, run_dir):
    done = subprocess.run([sys.executable, "-c", _KILLED, str(step.root)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert step.entries() == []
    assert not list(step.root.glob("proxies/pool/a.*"))
    run_dir.sweep()
    assert [path for path in step.root.rglob("*") if path.is_file()] == []


def test_a_selection_and_documents_without_tokens(step, corpus):
    ids = corpus["doc_id"].combine_chunks()
    exported(step, corpus, selection=ids.take(pa.array([0, 4, 31])))
    assert [len(read(step, f"proxies/pool/part-{i}")) for i in range(2)] == [2, 1]
    assert read(step, "proxies/pool/part-2") == [] if (step.root / "proxies/pool/part-2.bin").stat().st_size else True
    table = pa.table({"doc_id": ["a", "b"], "text": ["", "some words"]})
    out = ExportTokens(step, TOKENIZER, folder="other").process(batch(table, "s"))
    assert out.data.to_pylist()[0]["rows"] == 1


def test_a_wrong_end_of_document_or_a_missing_shard_name_is_refused(step, corpus):
    with pytest.raises(InputError, match=r"<end>.*tokenizer\.eod"):
        ExportTokens(step, TOKENIZER, eod="<end>").process(batch(corpus, "s"))
    with pytest.raises(InputError, match="shard name"):
        ExportTokens(step, TOKENIZER).process(DocumentBatch(dataset_name="x", data=corpus))


def test_a_selection_holds_each_document_as_often_as_it_has_copies(step, corpus):
    exported(step, corpus)
    parts = [step.root / f"proxies/pool/part-{i}" for i in range(3)]
    copies = (np.arange(90) % 4).astype(np.int32)
    ids = corpus["doc_id"].combine_chunks()
    facts = write_selection(parts, ids, copies, 5, step, "tokens/train", 4096)
    pool = [tuple(document) for i in range(3) for document in read(step, f"proxies/pool/part-{i}")]
    found = [tuple(document) for document in read(step, "tokens/train")]
    assert sorted(found) == sorted(document for document, n in zip(pool, copies, strict=True) for _ in range(n))
    assert facts["rows"] == copies.sum() == len(found)
    assert facts["tokens"] == sum(map(len, found))
    assert facts["unique_tokens"] == sum(len(d) for d, n in zip(pool, copies, strict=True) if n)
    assert all(a != b for a, b in itertools.pairwise(found))
    with pytest.raises(InputError, match="no document"):
        write_selection(parts, ids, np.zeros(90, dtype=np.int32), 5, step, "tokens/none", 4096)
    with pytest.raises(InputError, match="one run"):
        write_selection(parts[:2], ids, copies, 5, step, "tokens/short", 4096)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=14), st.integers(0, 2**32))
def test_copies_are_apart_wherever_that_is_possible(numbers, seed):
    copies = np.array(numbers, dtype=np.int32)
    order = shuffled_copies(np.arange(copies.size), copies, seed)
    assert np.bincount(order, minlength=copies.size).tolist() == numbers
    neighbours = int((order[1:] == order[:-1]).sum())
    most, total = max(numbers), sum(numbers)
    assert neighbours == max(0, most - 1 - (total - most)) if total else order.size == 0


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_the_order_is_a_shuffle_by_id_and_seed(seed):
    copies = np.ones(500, dtype=np.int32)
    ids = np.arange(500)
    order = shuffled_copies(ids, copies, seed)
    assert not np.array_equal(order, shuffled_copies(ids, copies, seed + 1))
    backwards = shuffled_copies(ids[::-1], copies, seed)
    assert np.array_equal(ids[order], ids[::-1][backwards])
