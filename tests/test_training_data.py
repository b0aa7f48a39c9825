"""One shard of training data: copies apart, shuffled by id and seed alone, rows traceable, nothing half-written."""

import itertools
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from quadmix_plugin import training_data
from quadmix_plugin.errors import InputError
from quadmix_plugin.megatron import TokenFile
from quadmix_plugin.training_data import Documents, numbers_of_copies, shard_facts, shuffled_copies, write_shard

VOCABULARY = 5_000
PARTS = (".bin", ".idx", ".documents.parquet", ".json")


def documents_of(lengths):
    """Document i is of the id i alone, so every id says whose it is."""
    lengths = np.array(lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    return Documents(np.repeat(np.arange(lengths.size), lengths).astype(np.uint32), ends - lengths, lengths)


@pytest.fixture
def step(run_dir):
    return run_dir.step("export", "key")


def write(step, copies, lengths, prefix="tokens/train-a", seed=5):
    ids = pa.array([f"d{i}" for i in range(len(lengths))])
    return write_shard(step, prefix, ids, np.array(copies, dtype=np.int32), documents_of(lengths), VOCABULARY, seed)


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
    assert abs(np.corrcoef(order, np.arange(500))[0, 1]) < 0.25


@given(st.lists(st.integers(0, 5), max_size=40))
def test_copies_are_numbered_in_the_order_of_the_file(order):
    seen: Counter[int] = Counter()
    expected = []
    for document in order:
        expected.append(seen[document])
        seen[document] += 1
    assert numbers_of_copies(np.array(order, dtype=np.int64)).tolist() == expected


def test_the_table_beside_a_pair_says_whose_tokens_lie_where(step):
    copies, lengths = [3, 0, 1, 2, 1], [7, 5, 1, 4, 9]
    facts = write(step, copies, lengths)
    assert facts == {"rows": 7, "tokens": 39, "unique_rows": 4, "unique_tokens": 21}
    assert json.loads((step.root / "tokens/train-a.json").read_text()) == facts == shard_facts(step, "tokens/train-a")
    rows = pq.read_table(step.root / "tokens/train-a.documents.parquet").to_pylist()
    theirs = IndexedDataset(str(step.root / "tokens/train-a"))
    found = [np.array(theirs[i]).tolist() for i in range(len(theirs))]
    assert [[int(row["doc_id"][1:])] * row["tokens"] for row in rows] == found
    assert Counter((row["doc_id"], row["copy"]) for row in rows) == {
        (f"d{i}", copy): 1 for i, n in enumerate(copies) for copy in range(n)
    }
    assert all(a["doc_id"] != b["doc_id"] for a, b in itertools.pairwise(rows))
    assert [row["copy"] for row in rows if row["doc_id"] == "d0"] == [0, 1, 2]


def test_a_shard_with_nothing_selected_has_no_pair_and_is_done(step):
    assert shard_facts(step, "tokens/train-a") is None
    facts = write(step, [0, 0], [3, 4])
    assert (
        facts == {"rows": 0, "tokens": 0, "unique_rows": 0, "unique_tokens": 0} == shard_facts(step, "tokens/train-a")
    )
    assert [path.name for path in (step.root / "tokens").iterdir()] == ["train-a.json"]


@pytest.mark.parametrize("lost", PARTS)
def test_a_shard_that_lacks_a_part_is_not_done(step, lost):
    write(step, [1, 1], [3, 4])
    assert shard_facts(step, "tokens/train-a") is not None
    (step.root / f"tokens/train-a{lost}").unlink()
    assert shard_facts(step, "tokens/train-a") is None
    write(step, [1, 1], [3, 4])
    assert sorted(path.name for path in (step.root / "tokens").iterdir()) == sorted(f"train-a{part}" for part in PARTS)


def test_a_write_that_fails_leaves_nothing(step, monkeypatch):
    def interrupted(documents, bin_path, idx_path, *_, **__):
        bin_path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(training_data, "write_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(step, [1, 2], [3, 4])
    assert step.entries() == []
    assert [path for path in step.root.rglob("*") if path.is_file()] == []


def test_an_id_outside_the_vocabulary_names_the_document(step):
    documents = documents_of([2, 3, 2])
    documents.tokens[4] = VOCABULARY
    with pytest.raises(InputError, match=r"tokens/train-a: doc_id 'y': an id of 5000; give ids from 0 to 4999"):
        write_shard(
            step, "tokens/train-a", pa.array(["x", "y", "z"]), np.full(3, 2, np.int32), documents, VOCABULARY, 0
        )
    assert step.entries() == []


def test_a_document_of_ten_million_tokens_is_written_whole(step):
    lengths = [3, 10_000_000, 5]
    facts = write(step, [1, 2, 1], lengths)
    assert facts["tokens"] == 20_000_008
    file = TokenFile.open(step.root / "tokens/train-a")
    rows = pq.read_table(step.root / "tokens/train-a.documents.parquet").to_pylist()
    for i, row in enumerate(rows):
        document, whose = file.document(i), int(row["doc_id"][1:])
        assert document.size == lengths[whose] == row["tokens"]
        assert document.min() == document.max() == whose
