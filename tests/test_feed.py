"""Batches of ids are those of the pieces, bit for bit, whoever gathers them and wherever an epoch ends."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quadmix_plugin.megatron import write_documents
from quadmix_plugin.proxy.feed import batches, resident_batches
from quadmix_plugin.proxy.pieces import cut_pieces
from quadmix_plugin.proxy.pool import TokenPool

CPU = torch.device("cpu")
N, CONTEXT = 60, 16
DOMAINS = np.arange(N) % 3


@pytest.fixture(scope="module", params=[65_000, 70_000], ids=["uint16", "int32"])
def pool(request, tmp_path_factory):
    """Documents of random ids, the largest among them, in four files of which one is empty."""
    folder, rng = tmp_path_factory.mktemp("pool"), np.random.default_rng(4)
    documents = [rng.integers(0, request.param, rng.integers(1, 50)) for _ in range(N)]
    documents[0][0], documents[-1][-1] = 0, request.param - 1
    for part, (first, last) in enumerate([(0, 7), (7, 40), (40, 40), (40, N)]):
        write_documents(documents[first:last], folder / f"{part}.bin", folder / f"{part}.idx", request.param)
    made = TokenPool.open([folder / str(part) for part in range(4)])
    assert made.dtype == (np.uint16 if request.param < 65_500 else np.int32)
    return made


def some_pieces(pool, seed, epochs):
    copies = np.random.default_rng(seed).integers(0, 3, N).astype(np.int32)
    one = cut_pieces(pool, copies, DOMAINS, CONTEXT, 1, seed)
    return cut_pieces(pool, copies, DOMAINS, CONTEXT, int(one.per_epoch * CONTEXT * epochs), seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.5, 1, 2.3, 4]), st.sampled_from([1, 3, 4, 7, 200]))
def test_batches_gathered_on_the_device_are_those_of_the_host(pool, seed, epochs, batch_size):
    pieces = some_pieces(pool, seed, epochs)
    whole = pieces[:]
    for made in (list(resident_batches(pieces, batch_size, CPU)), list(batches(pieces, batch_size, CPU))):
        assert {batch.dtype for batch in made} == {torch.int64}
        assert [batch.shape[0] for batch in made[:-1]] == [batch_size] * (len(made) - 1)
        assert np.array_equal(torch.cat(made).numpy(), whole.astype(np.int64))


def test_every_id_comes_through_and_a_batch_may_lie_in_two_epochs(pool):
    pieces = cut_pieces(pool, None, DOMAINS, CONTEXT, 3 * int(pool.lengths.sum()), 1)
    before, size = divmod(pieces.per_epoch, 7)
    assert size  # pieces of the first epoch in the batch that goes on with the second
    made = list(resident_batches(pieces, 7, CPU))
    crossing = np.concatenate(
        [pieces[pieces.per_epoch - size : pieces.per_epoch], pieces[pieces.per_epoch :][: 7 - size]]
    )
    assert np.array_equal(made[before].numpy(), crossing.astype(np.int64))
    ids = np.concatenate([np.asarray(file.tokens) for file in pool.files])
    assert ids.max() > 2**15  # beyond what int16 holds as it is
    assert {*torch.cat(made).unique().tolist()} == {*ids.tolist()}


def test_one_pool_serves_many_selections(pool):
    for seed in (1, 2, 1):
        pieces = some_pieces(pool, seed, 1.5)
        assert np.array_equal(torch.cat(list(resident_batches(pieces, 5, CPU))).numpy(), pieces[:].astype(np.int64))


def test_an_array_of_pieces_is_sent_as_it_is(pool):
    whole = some_pieces(pool, 3, 1)[:]
    assert np.array_equal(torch.cat(list(batches(whole, 5, CPU))).numpy(), whole.astype(np.int64))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_any_index_gives_those_rows_of_all_pieces(pool, seed, data):
    pieces = some_pieces(pool, seed, 2.5)
    whole, n = pieces[:], len(pieces)
    ends = st.integers(-n - 3, n + 3) | st.none()
    some = slice(data.draw(ends), data.draw(ends), data.draw(st.sampled_from([1, 2, 5])))
    assert np.array_equal(pieces[some], whole[some])
    rows = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=30)), dtype=np.int64)
    assert np.array_equal(pieces[rows], whole[rows])
    assert pieces[rows].dtype == whole.dtype == pool.dtype
