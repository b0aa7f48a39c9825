"""Every sample is a stretch of named documents, a batch depends on its number alone, and bad files are refused before
anything is built from them."""

import dataclasses
import shutil
import subprocess

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pretrain_jobs import CONTEXT, EOD, VOCABULARY, write_data, write_tokens

from quadmix_plugin.errors import InputError, StorageError
from quadmix_plugin.megatron import TokenFile
from quadmix_plugin.pretraining.data import TrainingData, _Numbers
from quadmix_plugin.proxy.megatron_model import start_parallel_state, stop_parallel_state

CPU = torch.device("cpu")
BATCH, UPDATES = 8, 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(autouse=True)
def alone():
    start_parallel_state(CPU)
    yield
    stop_parallel_state()


@pytest.fixture
def job(data, tmp_path):
    return data.job(tmp_path / "run")


def open_data(job, updates=UPDATES, batch=BATCH):
    return TrainingData.open(job, CONTEXT, batch, updates)


def whole_batches(training, first, end):
    return list(training.batches(first, end, 0, 1, CPU))


def texts(prefixes):
    """doc_id → ids, of all documents of these files."""
    found = {}
    for prefix in prefixes:
        file, names = TokenFile.open(prefix), pq.read_table(f"{prefix}.documents.parquet")["doc_id"].to_pylist()
        found |= {name: file.document(i) for i, name in enumerate(names)}
    return found


def makers(stretch, documents, inside=False):
    """The documents that a stretch may be of: the first cut at its front, the last at its end, whole ones between."""
    found = set()
    for name, ids in documents.items():
        for at in [0] if inside else np.flatnonzero(ids == stretch[0]):
            if agree(ids[at:], stretch):
                rest = stretch[len(ids) - at :]
                after = makers(rest, documents, inside=True) if rest.size else set()
                found |= {name, *after} if after or not rest.size else set()
    return found


def agree(one, other):
    size = min(len(one), len(other))
    return np.array_equal(one[:size], other[:size])


@pytest.mark.parametrize("files", [1, 3])
def test_a_batch_is_made_of_the_documents_that_are_named_for_it(data, job, files):
    job = dataclasses.replace(job, prefixes=job.prefixes[:files], documents=job.documents[:files])
    training = open_data(job)
    known = texts(job.prefixes)
    for update in (0, 17, UPDATES - 1):
        (batch,) = whole_batches(training, update, update + 1)
        named = training.documents_of(update)
        assert len(set(named)) == len(named) >= BATCH - 1
        assert batch.shape == (BATCH, CONTEXT + 1)
        found = [makers(sample, {name: known[name] for name in named}) for sample in batch.numpy()]
        assert all(found)
        assert set().union(*found) == set(named)
    assert set(training.documents_of(3)) != set(training.documents_of(4))


def test_the_batch_of_an_update_depends_on_its_number_alone(job, tmp_path):
    training = open_data(job)
    batches = whole_batches(training, 0, UPDATES)
    assert len({batch.numpy().tobytes() for batch in batches}) == UPDATES
    assert all(map(torch.equal, whole_batches(training, 23, UPDATES), batches[23:]))
    elsewhere = open_data(dataclasses.replace(job, root=str(tmp_path / "again")))
    assert all(map(torch.equal, whole_batches(elsewhere, 0, UPDATES), batches))
    assert not whole_batches(training, UPDATES, UPDATES)
    other = open_data(dataclasses.replace(job, seed=4, root=str(tmp_path / "other")))
    assert not any(map(torch.equal, whole_batches(other, 0, UPDATES), batches))


def test_processes_share_a_batch(job):
    training = open_data(job)
    for update, batch in enumerate(whole_batches(training, 0, 5)):
        for processes in (2, 4):
            parts = [next(training.batches(update, update + 1, rank, processes, CPU)) for rank in range(processes)]
            assert torch.equal(torch.cat(parts), batch)


def test_validation_covers_every_sample_once(job, data):
    training = open_data(job)
    whole = torch.cat(list(training.validation_batches(7, 0, 1, CPU)))
    tokens = TokenFile.open(data.validation).n_tokens
    assert len(whole) == (tokens - 1) // CONTEXT
    parts = [torch.cat(list(training.validation_batches(7, rank, 3, CPU))) for rank in range(3)]
    assert sorted(map(bytes, whole.numpy())) == sorted(bytes(row) for part in parts for row in part.numpy())
    targets = np.concatenate([ids for ids in texts([data.validation]).values()])
    counts = np.bincount(whole[:, 1:].flatten(), minlength=VOCABULARY)
    assert (counts <= np.bincount(targets, minlength=VOCABULARY)).all()
    assert tokens - counts.sum() <= CONTEXT


def test_files_are_mixed_by_their_tokens_from_the_start(job):
    sizes = np.array([TokenFile.open(prefix).n_tokens for prefix in job.prefixes])
    blend = open_data(job).train
    chosen = np.array([int(blend.dataset_index[i]) for i in range(UPDATES * BATCH)])
    for some in (chosen, chosen[:160]):
        shares = np.bincount(some, minlength=3) / some.size
        assert np.abs(shares - sizes / sizes.sum()).max() < 0.01
    assert np.ptp(sizes / sizes.sum()) > 0.3


def test_an_epoch_sees_all_documents_and_a_second_one_in_another_order(job):
    job = dataclasses.replace(job, prefixes=job.prefixes[2:], documents=job.documents[2:])
    tokens = TokenFile.open(job.prefixes[0]).n_tokens
    per_epoch = (tokens - 1) // CONTEXT // BATCH
    training = open_data(job, updates=2 * per_epoch)
    first, second = (
        {name for update in range(start, start + per_epoch) for name in training.documents_of(update)}
        for start in (0, per_epoch)
    )
    assert len(first) >= len(texts(job.prefixes)) - BATCH
    assert len(second) >= len(texts(job.prefixes)) - BATCH
    batches = whole_batches(training, 0, 2 * per_epoch)
    assert len({batch.numpy().tobytes() for batch in batches}) == 2 * per_epoch


def test_entropy_is_that_of_single_ids(job):
    counts = np.bincount(np.concatenate(list(texts(job.prefixes).values())))
    share = counts[counts > 0] / counts.sum()
    assert open_data(job).entropy == pytest.approx(-(share * np.log(share)).sum(), abs=1e-9)


def test_indices_are_never_those_of_other_files(data, job, tmp_path):
    """A killed process may have left them cut off, and a selection may have been exported anew under the same names."""
    prefix, names = tmp_path / "t", ["a", "b"]
    job = dataclasses.replace(job, prefixes=(str(prefix),), documents=(f"{prefix}.documents.parquet",))
    known = list(texts(data.prefixes).values())
    write_tokens(prefix, [ids[:-1].tolist() for ids in known[:40]], [str(i) for i in range(40)])
    before = whole_batches(open_data(job), 0, 5)
    for path in (job.place / "indices").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-50])
    assert all(map(torch.equal, whole_batches(open_data(job), 0, 5), before))
    long = np.concatenate(known[40:]).tolist()
    write_tokens(prefix, [[id_ for id_ in long if id_ != EOD][:9000], known[0][:-1].tolist()], names)
    training = open_data(job, updates=17)
    assert {name for update in range(17) for name in training.documents_of(update)} == set(names)
    after = whole_batches(training, 0, 17)
    assert max(int(batch.max()) for batch in after) < VOCABULARY
    assert not torch.equal(after[0], before[0])


def test_a_validation_file_shorter_than_a_sample_gives_none(job, data, tmp_path):
    write_tokens(tmp_path / "short", [[5, 6, 7]], ["short"])
    assert open_data(dataclasses.replace(job, validation_tokens=str(tmp_path / "short"))).validation is None


def copied(job, data, folder):
    """The job on copies of its files, which may be damaged."""
    shutil.copytree(data.folder, folder)
    prefixes = tuple(str(folder / prefix.name) for prefix in data.prefixes)
    return dataclasses.replace(job, prefixes=prefixes, validation_tokens=str(folder / "validation"))


def cut(path, by):
    path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize(
    ("damage", "place", "said"),
    [
        (lambda f: cut(f / "train-1.bin", 2), "train-1.bin", "truncated or from another run, so write them again"),
        (lambda f: cut(f / "train-2.idx", 9), "train-2.idx", "not a whole Megatron index.*write the token files again"),
        (lambda f: cut(f / "validation.bin", 1), "validation.bin", "truncated"),
        (lambda f: (f / "train-0.idx").unlink(), "train-0.idx", "no such file"),
        (
            lambda f: write_tokens(f / "train-1", [[1, 2, 3]], ["a"], vocabulary=65_500),
            "train-1.bin",
            "ids of int32, a vocabulary of 4,096 takes uint16; export again",
        ),
        (
            lambda f: write_tokens(f / "train-2", [[1, 2, 4096]], ["a"], vocabulary=65_499),
            "train-2.bin",
            "ids from 0 to 4096, the vocabulary has 4,096; export again",
        ),
        (
            lambda f: write_tokens(f / "validation", [[1, 2, 5000]], ["a"], vocabulary=65_499),
            "validation.bin",
            "ids from 0 to 5000, the vocabulary has 4,096",
        ),
    ],
)
def test_damaged_files_are_refused_by_name_before_anything_is_built(damage, place, said, job, data, tmp_path):
    job = copied(job, data, tmp_path / "copies")
    damage(tmp_path / "copies")
    with pytest.raises(InputError, match=f"copies/{place}: .*{said}"):
        open_data(job)
    assert not job.place.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prefixes": (), "documents": ()}, "quadmix: no token files; the selection is empty, so raise its budget"),
        ({"vocabulary": 70_000}, "train-0.bin: ids of uint16, a vocabulary of 70,000 takes int32; export again"),
        ({"vocabulary": 3000}, r"train-0.bin: ids from 0 to \d+, the vocabulary has 3,000; export again"),
        ({"eod": 7}, "train-0.bin: its first document ends with id 0, this tokenizer's end of a document is 7; export"),
    ],
)
def test_files_of_another_tokenizer_are_refused(changes, said, job):
    with pytest.raises(InputError, match=said):
        open_data(dataclasses.replace(job, **changes))
    assert not job.place.exists()


@pytest.mark.parametrize("ids", [[5] * 300, [5, 6] * 150], ids=["one id", "two ids"])
def test_constant_data_are_refused(ids, job, tmp_path):
    write_tokens(tmp_path / "t", [ids] * 50, list(map(str, range(50))))
    job = dataclasses.replace(job, prefixes=(str(tmp_path / "t"),))
    with pytest.raises(InputError, match=r"quadmix: training data: . distinct ids.*write the token files again"):
        open_data(job)
    assert not job.place.exists()


def test_ids_are_looked_at_in_every_part_of_a_large_file(job, tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, VOCABULARY, 4000) for _ in range(1000)]
    documents[700] = np.full(200_000, 4096)
    write_tokens(tmp_path / "t", documents, list(map(str, range(1000))), vocabulary=65_499)
    with pytest.raises(InputError, match=r"t\.bin: ids from 0 to 4096"):
        open_data(dataclasses.replace(job, prefixes=(str(tmp_path / "t"),)))


def test_a_full_disk_is_named(job, tmp_path):
    root = tmp_path / "full"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(root)]
    mounted = subprocess.run(mount, check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        with pytest.raises(StorageError, match="indices: the disk is full"):
            open_data(dataclasses.replace(job, root=str(root)))
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def test_the_numbers_of_a_long_training_are_made_as_they_are_needed():
    """500B tokens in batches of 1024 pieces are 244 million numbers."""
    numbers = _Numbers(5, 5 + 10**12, 8, 4, 1)
    assert len(numbers) == 10**12
    assert next(iter(numbers)) == [44, 45, 46, 47]
