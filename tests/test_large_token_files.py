"""A token file of more than 4.5 GB: megatron-core's reader gives back every document, those beyond 4 GiB too."""

import shutil

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from quadmix_plugin.megatron import TokenFile, write_documents

VOCABULARY, LONGEST, DOCUMENTS = 50_432, 40_000, 116_000
WANTED_BYTES = 4_500_000_000
NEEDED_DISK = 8_000_000_000


def document(i):
    """Document i by a rule, so that none needs to be kept: a line through the vocabulary with a slope of its own."""
    length, slope, start = np.random.default_rng([7, i]).integers(1, [LONGEST + 1, VOCABULARY, VOCABULARY])
    return ((np.arange(length, dtype=np.int64) * slope + start) % VOCABULARY).astype(np.uint16)


@pytest.mark.slow
def test_megatron_reads_ten_thousand_documents_of_a_file_beyond_four_gigabytes(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    if free < NEEDED_DISK:
        pytest.skip(f"{free / 1e9:.1f} GB free at {tmp_path}, this test writes {WANTED_BYTES / 1e9:.1f} GB")
    try:
        pair = tmp_path / "a.bin", tmp_path / "a.idx"
        written = write_documents(map(document, range(DOCUMENTS)), *pair, VOCABULARY)
        assert written.documents == DOCUMENTS
        assert pair[0].stat().st_size == 2 * written.tokens > WANTED_BYTES
        assert written.tokens > 2**31  # where counting tokens by 32 bits would end
        theirs, ours = IndexedDataset(str(tmp_path / "a")), TokenFile.open(tmp_path / "a")
        chosen = np.random.default_rng(1).choice(DOCUMENTS, 10_000, replace=False)
        chosen[:2] = 0, DOCUMENTS - 1
        assert (2 * ours.offsets[chosen] > 2**32).sum() > 200
        assert [int(i) for i in chosen if not np.array_equal(theirs[int(i)], document(i))] == []
        assert [int(i) for i in chosen[:500] if not np.array_equal(ours.document(i), document(i))] == []
        assert [np.array(theirs[i]).size for i in range(500)] == [document(i).size for i in range(500)]
    finally:
        for path in tmp_path.glob("a.*"):
            path.unlink()
