"""Exported shards read back in Megatron; a failed write leaves nothing; copies of a document are spread."""

import itertools
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from nemo_curator.tasks import DocumentBatch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from quadmix_plugin import models
from quadmix_plugin.errors import InputError
from quadmix_plugin.megatron import TokenFile
from quadmix_plugin.portions import portions
from quadmix_plugin.stages import ExportTokens, export_tokens
from quadmix_plugin.stages.export_tokens import pair_entry

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
    def interrupted(documents, bin_path, idx_path, vocabulary):
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


def test_documents_without_tokens_are_left_out(step):
    table = pa.table({"doc_id": ["a", "b"], "text": ["", "some words"]})
    out = ExportTokens(step, TOKENIZER, folder="other").process(batch(table, "s"))
    assert out.data.to_pylist()[0]["rows"] == len(read(step, "other/s")) == 1


def test_texts_are_tokenised_in_parts_and_come_out_the_same(step, corpus, monkeypatch):
    exported(step, corpus)
    monkeypatch.setattr(export_tokens, "_CHARACTERS", 5_000)
    assert len(list(portions(corpus["text"].to_pylist(), 5_000))) > 10
    exported(step, corpus, folder="parts")
    for i in range(3):
        assert read(step, f"parts/part-{i}") == read(step, f"proxies/pool/part-{i}")


def test_a_wrong_end_of_document_or_a_missing_shard_name_is_refused(step, corpus):
    with pytest.raises(InputError, match=r"<end>.*tokenizer\.eod"):
        ExportTokens(step, TOKENIZER, eod="<end>").process(batch(corpus, "s"))
    with pytest.raises(InputError, match="shard name"):
        ExportTokens(step, TOKENIZER).process(DocumentBatch(dataset_name="x", data=corpus))


def with_copies(corpus, copies):
    return corpus.append_column("copies", pa.array(copies, pa.int32()))


def test_documents_are_written_as_often_as_they_have_copies_and_apart(step, corpus):
    copies = (np.arange(90) % 4).astype(np.int32)
    exported(step, corpus)
    pool = [document for i in range(3) for document in read(step, f"proxies/pool/part-{i}")]
    counts = exported(step, with_copies(corpus, copies), folder="tokens", stem="train-", copies_field="copies")
    for i, task in enumerate(counts):
        found, mine = read(step, f"tokens/train-part-{i}"), slice(30 * i, 30 * i + 30)
        expected = [tuple(d) for d, n in zip(pool[mine], copies[mine], strict=True) for _ in range(n)]
        assert Counter(map(tuple, found)) == Counter(expected)
        assert all(a != b for a, b in itertools.pairwise(found))
        assert [*map(tuple, found)] != expected
        (said,) = task.data.to_pylist()
        assert said == {"shard": f"part-{i}", "rows": len(found), "tokens": sum(map(len, found))}
        rows = pq.read_table(step.root / f"tokens/train-part-{i}.documents.parquet").to_pylist()
        place = {doc_id: k for k, doc_id in enumerate(corpus["doc_id"].to_pylist())}
        assert [pool[place[row["doc_id"]]] for row in rows] == found


def test_the_order_of_copies_does_not_depend_on_the_order_of_the_rows(step, corpus):
    table = with_copies(corpus, np.arange(90) % 3)
    for folder, rows in (("one", table), ("two", table.take(np.random.default_rng(0).permutation(90)))):
        ExportTokens(step, TOKENIZER, folder=folder, copies_field="copies", seed=4).process(batch(rows, "s"))
    assert (step.root / "one/s.bin").read_bytes() == (step.root / "two/s.bin").read_bytes()


def test_copies_of_nothing_leave_a_record_and_no_pair(step, corpus):
    stage = ExportTokens(step, TOKENIZER, folder="tokens", copies_field="copies")
    for shard, table in (("none", with_copies(corpus, [0] * 90)), ("empty", with_copies(corpus, [1] * 90).slice(0, 0))):
        (said,) = stage.process(batch(table, shard)).data.to_pylist()
        assert said == {"shard": shard, "rows": 0, "tokens": 0}
    assert sorted(path.name for path in (step.root / "tokens").iterdir()) == ["empty.json", "none.json"]
    with pytest.raises(InputError, match=r"-1 copies.*0 or more"):
        stage.process(batch(with_copies(corpus, [-1] * 90), "s"))


def test_a_tokenizer_that_did_not_count_the_tokens_is_refused(step, corpus):
    table = with_copies(corpus, [2] * 90)
    counts = [len(each.ids) for each in models.load_tokenizer(TOKENIZER).encode_batch(corpus["text"].to_pylist())]
    counted = table.append_column("tokens", pa.array(counts, pa.int64()))
    stage = ExportTokens(step, TOKENIZER, folder="tokens", copies_field="copies", counted_field="tokens")
    stage.process(batch(counted, "right"))
    counts[7] += 1
    wrong = table.append_column("tokens", pa.array(counts, pa.int64()))
    doc_id = table["doc_id"][7].as_py()
    said = f"tokens/wrong: doc_id {doc_id!r} has {counts[7] - 1} tokens, {counts[7]} are in its labels"
    with pytest.raises(InputError, match=rf"{re.escape(said)}.*tokenizer\.model"):
        stage.process(batch(wrong, "wrong"))
    assert not list(step.root.glob("tokens/wrong*"))


@pytest.mark.parametrize("copies_field", [None, "copies"])
@pytest.mark.parametrize(
    ("vocabulary", "kind"), [(65_499, np.uint16), (65_500, np.int32), (65_536, np.int32), (65_537, np.int32)]
)
def test_every_id_survives_on_both_sides_of_the_type_switch(step, tmp_path, vocabulary, kind, copies_field):
    words = {f"w{i}": i for i in range(vocabulary - 1)} | {"<|endoftext|>": vocabulary - 1}
    tokenizer = Tokenizer(WordLevel(words))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    documents = [[0, 1, vocabulary - 2], [vocabulary - 2], [32_767, 32_768, 65_497]]
    texts = [" ".join(f"w{i}" for i in ids) for ids in documents]
    table = pa.table({"doc_id": ["a", "b", "c"], "text": texts, "copies": pa.array([1, 1, 1], pa.int32())})
    ExportTokens(step, str(tmp_path / "tokenizer"), copies_field=copies_field, folder="x").process(batch(table, "s"))
    assert sorted(read(step, "x/s")) == sorted([*ids, vocabulary - 1] for ids in documents)
    assert TokenFile.open(step.root / "x/s").dtype == kind


_TEN_MILLION = """
import resource, sys
import pyarrow as pa
import pyarrow.parquet as pq
from pathlib import Path
from nemo_curator.tasks import DocumentBatch
from quadmix_plugin.stages import ExportTokens
from quadmix_plugin.store import Step

if __name__ == "__main__":
    root, tokenizer, corpus = sys.argv[1:]
    text = " ".join(pq.read_table(corpus, columns=["text"])["text"].to_pylist())
    text = (text * (34_000_000 // len(text) + 1))[:34_000_000]
    table = pa.table({"doc_id": ["a", "b", "c"], "text": ["some words", text, "others"], "copies": [1, 2, 1]})
    stage = ExportTokens(Step(Path(root), "export", "key"), tokenizer, folder="tokens", copies_field="copies")
    stage.process(DocumentBatch(dataset_name="s", data=table, _metadata={"shard": "s"}))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_document_of_ten_million_tokens_is_tokenised_and_written(step):
    """In a process of its own, so that the memory is its alone: some 400 bytes a token, and it is once in memory."""
    command = [sys.executable, "-c", _TEN_MILLION, str(step.root), TOKENIZER, str(QUICKSTART / "corpus.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = pq.read_table(step.root / "tokens/s.documents.parquet").to_pylist()
    file = TokenFile.open(step.root / "tokens/s")
    assert [row["doc_id"] for row in rows].count("b") == 2
    assert [row["tokens"] for row in rows] == file.lengths.tolist()
    long = [i for i, row in enumerate(rows) if row["doc_id"] == "b"]
    assert min(file.lengths[long]) > 10_000_000
    assert np.array_equal(*(file.document(i) for i in long))
    text = models.load_tokenizer(TOKENIZER).decode(file.document(long[0])[-400:-1].tolist())
    whole = " ".join(pq.read_table(QUICKSTART / "corpus.parquet", columns=["text"])["text"].to_pylist())
    assert (whole * (34_000_000 // len(whole) + 1))[:34_000_000].endswith(text)
    assert int(done.stdout) * 1024 < 6 * 2**30
