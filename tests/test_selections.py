"""Selections of many θ on disk: each θ's own, whole or not there."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quadmix_plugin import count_copies, sample_parameters
from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import ParameterSpace
from quadmix_plugin.score_index import ScoreIndex
from quadmix_plugin.selections import read_selection, write_selections

N = 5000
RNG = np.random.default_rng(2)
SCORES, IDS = RNG.random((N, 3), dtype=np.float32), RNG.integers(0, 4, N)
TOKENS, DOC_IDS = RNG.integers(1, 900, N), pa.array([f"doc-{i}" for i in range(N)])
INDEX = ScoreIndex.of(SCORES, IDS, TOKENS, DOC_IDS, n_domains=4)
THETAS = sample_parameters(20, 3, 4, 1, space=ParameterSpace(omega_max=0.5))


@pytest.mark.parametrize("named", [False, True])
def test_each_theta_has_its_own_documents(tmp_path, named: bool) -> None:
    path = tmp_path / "selections.parquet"
    total = write_selections(path, INDEX, THETAS, DOC_IDS if named else None, threads=2)
    assert pq.ParquetFile(path).metadata.num_rows == total
    for t, theta in enumerate(THETAS):
        table = read_selection(path, t)
        copies = count_copies(SCORES, IDS, TOKENS, DOC_IDS, theta)
        key = [f"doc-{i}" for i in range(N)] if named else list(range(N))
        found = dict(zip(table[0].to_pylist(), table["copies"].to_pylist(), strict=True))
        assert found == {key[i]: c for i, c in enumerate(copies.tolist()) if c}


def test_an_interrupted_file_is_not_there(tmp_path) -> None:
    path = tmp_path / "selections.parquet"
    foreign = sample_parameters(1, 2, 4, 1)
    with pytest.raises(InputError, match="use parameters of this corpus"):
        write_selections(path, INDEX, [*THETAS, *foreign])
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_named(tmp_path) -> None:
    path = tmp_path / "selections.parquet"
    with pytest.raises(InputError, match="none given"):
        write_selections(path, INDEX, [])
    with pytest.raises(InputError, match="3 for 5000 documents"):
        write_selections(path, INDEX, THETAS, DOC_IDS[:3])
    with pytest.raises(InputError, match="no such file"):
        read_selection(path, 0)
    write_selections(path, INDEX, THETAS[:1])
    with pytest.raises(InputError, match="no θ 1; it holds 1"):
        read_selection(path, 1)
