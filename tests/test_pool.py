"""The token pool: pieces hold the selected documents and nothing else, stratified, shuffled by seed alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadmix_plugin.errors import InputError
from quadmix_plugin.megatron import write_documents
from quadmix_plugin.proxy.pieces import cut_pieces, stratified_order
from quadmix_plugin.proxy.pool import TokenPool

N, CONTEXT = 120, 16


@pytest.fixture(scope="module")
def documents():
    """Document i of domain i % 3: every id says which document it is from and where it stands there."""
    rng = np.random.default_rng(3)
    return [i * 64 + np.arange(rng.integers(1, 60)) for i in range(N)]


@pytest.fixture(scope="module")
def pool(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    for part, (first, last) in enumerate([(0, 10), (10, 70), (70, N)]):
        write_documents(documents[first:last], folder / f"{part}.bin", folder / f"{part}.idx", N * 64)
    return TokenPool.open([folder / str(part) for part in range(3)])


DOMAINS = np.arange(N) % 3


def test_documents_keep_their_order_across_files(pool, documents):
    assert pool.n_documents == N
    assert all(np.array_equal(pool.document(i), documents[i]) for i in range(N))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_one_epoch_holds_each_copy_once_and_nothing_else(pool, documents, draw, seed):
    copies = np.random.default_rng(draw).integers(0, 3, N).astype(np.int32)
    selected = int((pool.lengths * copies).sum())
    pieces = cut_pieces(pool, copies, DOMAINS, CONTEXT, (selected - 1) // CONTEXT * CONTEXT, seed)
    seen = np.bincount(pieces[:][:, :-1].ravel(), minlength=N * 64)
    allowed = np.zeros(N * 64, dtype=int)
    for i in range(N):
        allowed[documents[i]] = copies[i]
    assert (seen <= allowed).all()
    assert selected - seen.sum() <= CONTEXT + 1
    assert (pieces.selected_tokens, pieces.unique_tokens) == (selected, int(pool.lengths[copies > 0].sum()))
    assert pieces.domain_tokens.tolist() == [int((pool.lengths * copies)[DOMAINS == m].sum()) for m in range(3)]
    inside = np.diff(pieces[:].astype(int), axis=1)  # within a document ids go up by one; a step is a new document
    assert (pieces[:][:, 1:][inside != 1] % 64 == 0).all()


def test_targets_run_on_into_the_next_piece(pool):
    pieces = cut_pieces(pool, None, None, CONTEXT, 400, 5)
    assert pieces[:].shape == (25, CONTEXT + 1)
    assert pieces.tokens_seen == 400


def test_a_small_selection_is_repeated_in_whole_epochs_each_in_another_order(pool):
    copies = np.zeros(N, dtype=np.int32)
    copies[:20] = 1
    per_epoch = (int(pool.lengths[:20].sum()) - 1) // CONTEXT
    pieces = cut_pieces(pool, copies, DOMAINS, CONTEXT, 3 * per_epoch * CONTEXT, 1)
    epochs = pieces[:].reshape(3, per_epoch, CONTEXT + 1)
    assert pieces.epochs == pytest.approx(3, rel=0.05)
    sets = [set(epoch[:, :-1].ravel()) for epoch in epochs]
    assert min(len(a & b) for a in sets for b in sets) >= len(sets[0]) - 2 * CONTEXT
    assert not np.array_equal(epochs[0], epochs[1])


def test_pieces_depend_on_the_seed_alone(pool):
    copies = np.ones(N, dtype=np.int32)
    one, two = (cut_pieces(pool, copies, DOMAINS, CONTEXT, 1000, 7) for _ in range(2))
    other = cut_pieces(pool, copies, DOMAINS, CONTEXT, 1000, 8)
    assert np.array_equal(one[:], two[:])
    assert not np.array_equal(one[:], other[:])


def test_fewer_tokens_are_the_beginning_of_more(pool):
    long, short = (cut_pieces(pool, None, DOMAINS, CONTEXT, n, 7) for n in (1600, 320))
    assert np.array_equal(long[:20], short[:])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(0, 2**32), st.data())
def test_every_beginning_has_the_domains_in_their_shares(counts, seed, data):
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    order = stratified_order(ids, seed)
    assert sorted(order) == list(range(ids.size))
    length = data.draw(st.integers(1, ids.size))
    share = np.array(counts) / ids.size
    found = np.bincount(ids[order[:length]], minlength=len(counts))
    assert (np.abs(found - length * share) <= 1 + len(counts) * share).all()


def test_pieces_are_shuffled_and_say_their_domain(pool):
    pieces = cut_pieces(pool, None, DOMAINS, CONTEXT, (int(pool.lengths.sum()) - 1) // CONTEXT * CONTEXT, 2)
    first_document = pieces[:][:, 0] // 64
    assert np.array_equal(pieces.domain_ids, DOMAINS[first_document])
    half = np.bincount(pieces.domain_ids[: len(pieces.domain_ids) // 2], minlength=3)
    assert (np.abs(half - np.bincount(pieces.domain_ids) / 2) <= 2).all()
    followers = pieces[:][1:, 0] == pieces[:][:-1, -1]
    assert followers.mean() < 0.1


def test_items_of_a_domain_are_shuffled():
    orders = {tuple(stratified_order(np.zeros(6, dtype=int), seed)) for seed in range(30)}
    assert len(orders) > 20


@pytest.mark.parametrize(
    ("copies", "reason"),
    [
        (np.zeros(N, dtype=np.int32), "selection has 0 tokens"),
        (np.r_[1, np.zeros(N - 1)].astype(np.int32), "fewer than a batch"),
        (np.full(N, -1, dtype=np.int32), "negative"),
        (np.ones(N - 1, dtype=np.int32), "one run"),
    ],
)
def test_selections_that_cannot_train_are_refused(pool, copies, reason):
    with pytest.raises(InputError, match=reason):
        cut_pieces(pool, copies, DOMAINS, CONTEXT, 100, 0, batch_size=4)


def test_a_pool_without_files_is_refused():
    with pytest.raises(InputError, match="no token files"):
        TokenPool.open([])
