"""Token files: megatron-core's own reader gives back every document, and nothing broken is accepted."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from quadmix_plugin import megatron
from quadmix_plugin.errors import InputError
from quadmix_plugin.megatron import MOST_PAIRS, TokenFile, check_tokens, require_few_pairs, write_documents


def write(folder, documents, vocabulary=1000, eod=None, name="a"):
    pair = folder / f"{name}.bin", folder / f"{name}.idx"
    write_documents(documents, *pair, vocabulary, eod)
    return folder / name


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), max_size=12))
def test_megatrons_reader_returns_every_document(tmp_path, documents):
    prefix = write(tmp_path, documents, eod=999)
    ours = TokenFile.open(prefix)
    assert [ours.document(i).tolist() for i in range(ours.n_documents)] == [[*d, 999] for d in documents]
    if documents:
        theirs = IndexedDataset(str(prefix))
        assert [np.array(theirs[i]).tolist() for i in range(len(theirs))] == [[*d, 999] for d in documents]
        assert theirs.document_indices.tolist() == list(range(len(documents) + 1))


def built(folder, documents, vocabulary):
    """The bytes of the pair that megatron-core's own builder makes of these documents."""
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=DType.optimal_dtype(vocabulary))
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(folder / "theirs.idx"))
    return tuple((folder / f"theirs{suffix}").read_bytes() for suffix in (".bin", ".idx"))


def ours(folder, documents, vocabulary, eod=None):
    prefix = write(folder, documents, vocabulary, eod, "ours")
    return tuple(prefix.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_bytes_are_those_of_megatrons_builder(tmp_path, data):
    vocabulary = data.draw(st.sampled_from([2, 256, 50_432, 65_499, 65_500, 65_536, 65_537, 200_000, 2**31 - 1]))
    ids = st.one_of(st.integers(0, vocabulary - 1), st.just(vocabulary - 1))
    documents = data.draw(st.lists(st.lists(ids, min_size=1, max_size=30), max_size=20))
    kind = data.draw(st.sampled_from([list, np.int64, np.int32, np.uint32, "mixed"]))
    batch = data.draw(st.sampled_from([1, 7, 1 << 20]))
    eod = data.draw(st.one_of(st.none(), ids))
    given = [
        document
        if kind is list or (kind == "mixed" and i % 2)
        else np.array(document, None if kind == "mixed" else kind)
        for i, document in enumerate(documents)
    ]
    before = megatron._BATCH
    try:
        megatron._BATCH = batch
        found = ours(tmp_path, given, vocabulary, eod)
    finally:
        megatron._BATCH = before
    assert found == built(tmp_path, [[*each, *([] if eod is None else [eod])] for each in documents], vocabulary)


@pytest.mark.parametrize("lengths", [[1], [5_000_000, 1, 1, 3_000_000], [700_000] * 4, [1] * 9_000])
@pytest.mark.parametrize("vocabulary", [60_000, 70_000])
def test_long_and_many_documents_are_written_as_megatron_does(tmp_path, lengths, vocabulary):
    rng = np.random.default_rng(len(lengths))
    documents = [rng.integers(0, vocabulary, n) for n in lengths]
    assert ours(tmp_path, documents, vocabulary) == built(tmp_path, documents, vocabulary)


def test_offsets_do_not_overflow_beyond_four_gigabytes(tmp_path):
    lengths = np.full(40, 50_000_000, dtype=np.int32)  # 8 GB of ids, of which the index alone is written
    megatron._write_index(tmp_path / "a.idx", lengths, np.dtype(np.int32))
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(int(lengths.sum(dtype=np.int64)) * 4)
    theirs = IndexedDataset(str(tmp_path / "a"))
    assert theirs.index.sequence_pointers.tolist() == [200_000_000 * i for i in range(40)]
    assert TokenFile.open(tmp_path / "a").offsets[-1] == 39 * 50_000_000


@pytest.mark.parametrize(("vocabulary", "kind"), [(65_499, np.uint16), (65_500, np.int32), (65_537, np.int32)])
def test_the_largest_id_survives_on_both_sides_of_the_type_switch(tmp_path, vocabulary, kind):
    ids = [0, vocabulary - 1, 3]
    prefix = write(tmp_path, [ids], vocabulary)
    file = TokenFile.open(prefix)
    assert file.dtype == kind
    theirs = IndexedDataset(str(prefix))  # held: its arrays die with it
    assert file.document(0).tolist() == ids == np.array(theirs[0]).tolist()


def test_arrays_outlive_the_reader(tmp_path):
    documents = [np.arange(i, i + 50) for i in range(200)]
    tokens = TokenFile.open(write(tmp_path, documents)).tokens
    gc.collect()
    assert np.array_equal(tokens, np.concatenate(documents))


def test_names_that_share_no_prefix_are_read(tmp_path):
    pair = tmp_path / ".a.bin.1.tmp", tmp_path / ".a.idx.2.tmp"
    write_documents([[1, 2], [3]], *pair, 10)
    assert TokenFile.open_pair(*pair).lengths.tolist() == [2, 1]


@pytest.mark.parametrize("kind", [list, np.array])
@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[1, 2], []], "document 1: 0 tokens; give each document 1 to"),
        ([[1], [2, 3], [4, 10, 5], [11]], "document 2: an id of 10; give ids from 0 to 9"),
        ([[1], [2, -1]], "document 1"),
        ([[1], [0.5]], "document [01]: .*; give (ids as )?whole numbers"),
    ],
)
@pytest.mark.parametrize("eod", [None, 3])
def test_a_document_that_is_empty_or_outside_the_vocabulary_is_refused(tmp_path, kind, documents, message, eod):
    with pytest.raises(InputError, match=message):
        write(tmp_path, [kind(document) for document in documents], 10, eod)


@pytest.mark.parametrize("batch", [1, 2, 1 << 20])
@pytest.mark.parametrize("wrong", [[10], [-1], [], [0.5]])
def test_a_document_is_called_what_the_caller_calls_it(tmp_path, monkeypatch, batch, wrong):
    monkeypatch.setattr(megatron, "_BATCH", batch)
    pair, names = (tmp_path / "a.bin", tmp_path / "a.idx"), ["x", "y", "z"]
    with pytest.raises(InputError, match=r"^z: "):
        write_documents([[1], [2, 3], wrong], *pair, 10, named=names.__getitem__)


class TwoSamples:
    """As much of a data set as a blend asks for."""

    index_split, unique_identifiers = Split.train, {}

    def __len__(self):
        return 2


def test_more_pairs_than_a_blend_can_have_are_refused_and_no_fewer():
    def blend(pairs):
        config = SimpleNamespace(defer_npy_index_mmap=False, path_to_cache=None)
        return BlendedDataset([TwoSamples()] * pairs, [1.0] * pairs, pairs, config)

    require_few_pairs(MOST_PAIRS, "tokens")
    assert np.unique(blend(MOST_PAIRS).dataset_index).tolist() == list(range(MOST_PAIRS))
    with pytest.raises(InputError, match=r"tokens: 32,767 shards.*raise corpus\.documents_per_shard"):
        require_few_pairs(MOST_PAIRS + 1, "tokens")
    with pytest.raises(AssertionError):
        blend(MOST_PAIRS + 1)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, suffix, keep):
    path = write(tmp_path, [[1, 2, 3]] * 50).with_suffix(suffix)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(InputError, match=r"a\.(bin|idx).*write"):
        TokenFile.open(tmp_path / "a")


def test_a_missing_half_is_an_error(tmp_path):
    write(tmp_path, [[1, 2]]).with_suffix(".idx").unlink()
    with pytest.raises(InputError, match="no such file"):
        TokenFile.open(tmp_path / "a")


def test_constant_empty_and_foreign_data_is_refused():
    rng = np.random.default_rng(0)
    assert check_tokens(rng.integers(0, 64, 10_000), 64, "x").entropy == pytest.approx(np.log(64), abs=0.01)
    for tokens, reason in [
        (np.full(1000, 7), "distinct"),
        (np.array([], dtype=np.uint16), "no tokens"),
        (rng.integers(0, 65, 10_000), "vocabulary"),
        (np.r_[np.zeros(100_000, dtype=int), np.arange(64)], "distinct"),
    ]:
        with pytest.raises(InputError, match=reason):
            check_tokens(tokens, 64, "x")
