"""Token files: megatron-core's own reader gives back every document, and nothing broken is accepted."""

import gc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from quadmix_plugin.errors import InputError
from quadmix_plugin.megatron import TokenFile, check_tokens, write_documents


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


@pytest.mark.parametrize("documents", [[[1, 2], []], [[1], [10]], [[-1]]])
def test_a_document_that_is_empty_or_outside_the_vocabulary_is_refused(tmp_path, documents):
    with pytest.raises(InputError, match="document"):
        write(tmp_path, documents, vocabulary=10)


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
