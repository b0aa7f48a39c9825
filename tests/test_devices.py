"""The same copies on every device: numpy or cupy by whole arrays, Triton's kernels, and the compiled CPU kernels.

Runs what the machine has. Where there is no numba, whole arrays of numpy are what the others are compared with; Triton
runs where there is a CUDA GPU, or on the CPU under ``TRITON_INTERPRET=1``.
"""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import quadmix_plugin
from quadmix_plugin import Parameters, hashing, sample_parameters
from quadmix_plugin.errors import InputError
from quadmix_plugin.kernels import arrays

NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not NUMBA, reason="compares with the compiled kernels; numba is not installed")


def _no_cupy() -> str:
    try:
        import cupy

        return "" if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except Exception as error:
        return f"cupy: {type(error).__name__}: {error}"


def _no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "" if interpreted or torch.cuda.is_available() else "no CUDA device, and TRITON_INTERPRET is not 1"


needs_cupy = pytest.mark.skipif(bool(_no_cupy()), reason=_no_cupy() or "-")
needs_triton = pytest.mark.skipif(bool(_no_triton()), reason=_no_triton() or "-")
ON_GPU = not _no_triton() and os.environ.get("TRITON_INTERPRET") != "1"


def corpus(n, n_domains=26, seed=0, grid=0):
    """Scores with ties at their ends, domains from large to small, the last but one with one document, the last none.

    ``grid``: so many different values of each score.
    """
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, n_domains - 1)
    domains = np.append(rng.choice(n_domains - 2, n - 1, p=share / share.sum()), n_domains - 2)
    common = rng.standard_normal(n)[:, None] + 0.2 * domains[:, None]
    scores = np.clip(0.8 * common + 0.6 * rng.standard_normal((n, 3)), -1.9, 1.6)
    scores = np.round(scores * grid) / grid if grid else scores
    tokens = np.maximum(rng.lognormal(6.3, 1.1, n), 1).astype(np.int64)
    doc_ids = rng.permutation(np.arange(n) * 977 - 5 * n)
    return scores.astype(np.float32), domains, tokens, doc_ids


def reference(table, theta, **options):
    """``count_copies`` of numpy arrays."""
    count = quadmix_plugin.count_copies if NUMBA else arrays.count_copies
    return count(*table, theta, **options)


@pytest.fixture(scope="module")
def million():
    return corpus(1_000_000)


@needs_numba
@pytest.mark.parametrize("ties", ["paper", "mid", "hash"])
@pytest.mark.parametrize("method", ["exact", "histogram"])
def test_whole_arrays_give_the_copies_of_the_compiled_kernels(million, method, ties) -> None:
    theta = sample_parameters(1, 3, 26, seed=3)[0]
    options = {"seed": 11, "method": method, "ties": ties}
    copies = arrays.count_copies(*million, theta, **options)
    assert copies.dtype == np.int32
    assert (copies != quadmix_plugin.count_copies(*million, theta, **options)).sum() == 0


@needs_numba
@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("ties", ["paper", "mid", "hash"])
def test_every_step_by_whole_arrays_is_that_of_the_compiled_kernels(ties, kind) -> None:
    scores, domains, tokens, doc_ids = corpus(50_000, grid=20)
    scores = scores.astype(kind)
    theta = sample_parameters(1, 3, 26, seed=4)[0]
    merged = arrays.merge_quality(scores, domains, theta)
    np.testing.assert_array_equal(merged, quadmix_plugin.merge_quality(scores, domains, theta))
    assert np.unique(merged).size < merged.size  # there are ties to tell apart
    rank = arrays.quality_rank(merged, domains, tokens, ties, doc_ids, 7)
    np.testing.assert_array_equal(rank, quadmix_plugin.quality_rank(merged, domains, tokens, ties, doc_ids, 7))
    value = arrays.sampling_value(rank, domains, theta)
    np.testing.assert_allclose(value, quadmix_plugin.sampling_value(rank, domains, theta), rtol=1e-14)
    for stream in (0, 5):
        copies = arrays.draw_copies(value * 2.5, doc_ids, 7, stream)
        np.testing.assert_array_equal(copies, quadmix_plugin.draw_copies(value * 2.5, doc_ids, 7, stream))


CORNERS = {
    "window of all": Parameters([[0.5, 0.5, 0.0]] * 4, [1000.0] * 4, [1.0] * 4, [1.0] * 4, [0.0] * 4),
    "nothing by chance": Parameters([[1.0, 0.0, 0.0]] * 4, [0.0] * 4, [1e-9] * 4, [0.0] * 4, [0.0] * 4),
    "more than a copy by chance": Parameters([[0.2, 0.3, 0.5]] * 4, [30.0] * 4, [0.1] * 4, [2.0] * 4, [1.3] * 4),
    "much by chance": Parameters([[0.2, 0.3, 0.5]] * 4, [30.0] * 4, [0.1] * 4, [1.0] * 4, [0.2] * 4),
    "one value": Parameters([[0.0, 0.0, 1.0]] * 4, [30.0] * 4, [0.5] * 4, [1.0] * 4, [0.001] * 4),
}


def corner_table():
    scores, *rest = corpus(3000, 4, seed=5, grid=8)
    scores[:, 2] = 0.25
    return scores, *rest


@needs_numba
@pytest.mark.parametrize("ties", ["paper", "mid", "hash"])
@pytest.mark.parametrize("method", ["exact", "histogram"])
@pytest.mark.parametrize("corner", CORNERS)
def test_corners_of_the_parameters_are_those_of_the_compiled_kernels(corner, method, ties) -> None:
    options = {"method": method, "ties": ties, "thin": 0.8, "stream": 3, "bins": 64}
    copies = arrays.count_copies(*corner_table(), CORNERS[corner], **options)
    np.testing.assert_array_equal(copies, quadmix_plugin.count_copies(*corner_table(), CORNERS[corner], **options))


def test_no_documents_have_no_copies() -> None:
    scores, *rest = (column[:0] for column in corpus(10, 4))
    theta = CORNERS["window of all"]
    for method in ("exact", "histogram"):
        assert arrays.count_copies(scores, *rest, theta, method=method).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: np.full((9, 3), np.nan)}, "9 of 9 documents have a score that is not finite"),
        ({0: np.zeros((9, 2))}, r"normalised: shape \(9, 2\)"),
        ({1: np.full(9, 4)}, "domain_ids: 9 outside the range, first 4"),
        ({1: np.zeros(9)}, "domain_ids: type float64"),
        ({2: np.zeros(9, dtype=int)}, "9 documents have 0 tokens"),
        ({2: np.ones(8, dtype=int)}, r"tokens \(8,\)"),
        ({3: np.arange(8)}, r"doc_ids \(8,\)"),
    ],
)
def test_input_that_cannot_be_used_is_refused_as_on_a_cpu(change, message) -> None:
    columns = [np.zeros((9, 3)), np.zeros(9, dtype=int), np.ones(9, dtype=int), np.arange(9)]
    for at, column in change.items():
        columns[at] = column
    with pytest.raises(InputError, match=message):
        arrays.count_copies(*columns, CORNERS["window of all"])


def test_ranks_values_and_methods_outside_their_range_are_refused() -> None:
    theta = CORNERS["window of all"]
    with pytest.raises(InputError, match="rank: 2 outside"):
        arrays.sampling_value([0.0, 0.5, np.nan], [0, 0, 0], theta)
    with pytest.raises(InputError, match="value: 1 are negative"):
        arrays.draw_copies([-1.0, 0.5], [1, 2], 0)
    with pytest.raises(InputError, match="needs doc_ids"):
        arrays.quality_rank([0.5], [0], [1], "hash")
    with pytest.raises(InputError, match="bins=0"):
        arrays.count_copies(*corpus(9, 4), theta, bins=0)
    many = Parameters([[1.0, 0.0, 0.0]] * 4, [1000.0] * 4, [1.0] * 4, [40.0] * 4, [0.0] * 4)
    for method in ("exact", "histogram"):
        with pytest.raises(InputError, match="above int32"):
            arrays.count_copies(*corpus(9, 4), many, method=method)
    with pytest.raises(InputError, match="'subset' is not computed on a GPU"):
        arrays.count_copies(*corpus(9, 4), theta, method="subset")


_WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import numpy as np
sys.modules["cupy"] = np  # arrays that say they are on a GPU are then computed by numpy

class OnDevice(np.ndarray):
    __cuda_array_interface__ = {}

from quadmix_plugin import count_copies, draw_copies, merge_quality, quality_rank, sampling_value
from test_devices import CORNERS, corner_table
columns = [np.asarray(column).view(OnDevice) for column in corner_table()]
theta = CORNERS["much by chance"]
for method in ("exact", "histogram"):
    print(*count_copies(*columns, theta, seed=2, method=method, ties="hash").tolist())
rank = quality_rank(merge_quality(columns[0], columns[1], theta), *columns[1:3], "hash", columns[3], 2)
value = sampling_value(rank, columns[1], theta)
print(*draw_copies(np.asarray(value).view(OnDevice), columns[3], 2).tolist())
"""


def test_arrays_on_a_device_need_no_numba() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", _WITHOUT_NUMBA], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    lines = [list(map(int, line.split())) for line in run.stdout.splitlines()]
    for line, method in zip(lines, ("exact", "histogram", "exact"), strict=True):
        expected = reference(corner_table(), CORNERS["much by chance"], seed=2, method=method, ties="hash")
        assert line == expected.tolist()


@pytest.mark.parametrize("library", ["pandas", "cudf"])
def test_a_frame_gives_its_columns_and_takes_the_copies(library) -> None:
    frames = pytest.importorskip(library)
    scores, domains, tokens, doc_ids = corner_table()
    frame = frames.DataFrame({"a": scores[:, 0], "b": scores[:, 1], "c": scores[:, 2], "doc_id": doc_ids})
    normalised = arrays.from_cudf(frame, ["a", "b", "c"])
    assert normalised.dtype == np.float32
    xp = arrays.array_namespace(normalised)
    theta = CORNERS["much by chance"]
    copies = arrays.count_copies(normalised, xp.asarray(domains), xp.asarray(tokens), frame["doc_id"].values, theta)
    frame = arrays.to_cudf(frame, copies=copies)
    got = arrays.to_host(frame["copies"].values)
    np.testing.assert_array_equal(got, reference(corner_table(), theta))


def test_scores_may_be_of_any_number_type() -> None:
    _, domains, tokens, doc_ids = corner_table()
    scores = np.random.default_rng(0).integers(0, 9, (3000, 3))
    theta = CORNERS["much by chance"]
    expected = arrays.count_copies(scores.astype(np.float64), domains, tokens, doc_ids, theta)
    for kind in (np.float16, np.int64, np.uint8):
        copies = arrays.count_copies(scores.astype(kind), domains, tokens, doc_ids, theta)
        np.testing.assert_array_equal(copies, expected)


def test_a_frame_with_a_missing_score_is_refused() -> None:
    with pytest.raises(InputError, match="b: 1 of 2 documents have none"):
        arrays.from_cudf(pd.DataFrame({"a": [1.0, 2.0], "b": [1.0, None]}), ["a", "b"])


@needs_cupy
@pytest.mark.parametrize("ties", ["paper", "mid", "hash"])
@pytest.mark.parametrize("method", ["exact", "histogram"])
def test_arrays_of_cupy_give_the_copies_of_the_cpu(million, method, ties) -> None:
    import cupy

    theta = sample_parameters(1, 3, 26, seed=3)[0]
    options = {"seed": 11, "method": method, "ties": ties, "thin": 0.9, "stream": 2}
    copies = quadmix_plugin.count_copies(*map(cupy.asarray, million), theta, **options)
    assert isinstance(copies, cupy.ndarray)
    assert (copies.get() != reference(million, theta, **options)).sum() == 0


@needs_cupy
def test_steps_by_cupy_stay_on_the_device_and_agree_with_the_cpu() -> None:
    import cupy

    scores, domains, tokens, doc_ids = corpus(50_000, grid=20)
    theta = sample_parameters(1, 3, 26, seed=4)[0]
    ids = cupy.asarray(domains)
    merged = quadmix_plugin.merge_quality(cupy.asarray(scores), ids, theta)
    np.testing.assert_array_equal(merged.get(), arrays.merge_quality(scores, domains, theta))
    rank = quadmix_plugin.quality_rank(merged, ids, cupy.asarray(tokens), "hash", doc_ids, 7)
    np.testing.assert_array_equal(rank.get(), arrays.quality_rank(merged.get(), domains, tokens, "hash", doc_ids, 7))
    value = quadmix_plugin.sampling_value(rank, ids, theta)
    np.testing.assert_allclose(value.get(), arrays.sampling_value(rank.get(), domains, theta), rtol=1e-14)
    for names in (doc_ids, [f"document {i}" for i in doc_ids]):
        copies = quadmix_plugin.draw_copies(value, names, 7)
        assert isinstance(copies, cupy.ndarray)
        np.testing.assert_array_equal(copies.get(), arrays.draw_copies(value.get(), names, 7))
    zeros = cupy.asarray([0.0, -0.0, 0.0, -0.0])  # equal, though a radix sort would tell them apart
    ones = cupy.ones(4, dtype=np.int64)
    assert quadmix_plugin.quality_rank(zeros, ones, ones).tolist() == [1.0] * 4
    with pytest.raises(InputError, match="domain_ids: 1 outside the range, first 26"):
        quadmix_plugin.merge_quality(cupy.asarray(scores[:1]), cupy.asarray([26]), theta)


ROWS = 1_000_000 if ON_GPU else 13_000
THETAS = 40 if ON_GPU else 3


@pytest.fixture(scope="module")
def indexed():
    """A table, θ for it, and its index."""
    from quadmix_plugin.device_index import DeviceIndex

    table = corpus(ROWS, 26 if ON_GPU else 4)
    thetas = sample_parameters(THETAS, 3, 26 if ON_GPU else 4, seed=9)
    index = DeviceIndex.of(*table, seed=5, bins=4096 if ON_GPU else 256, n_domains=thetas[0].n_domains)
    return table, thetas, index


def assert_selects_as_the_cpu(index, table, thetas, **options) -> None:
    """Every selection of the index, against the copies of each document."""
    streams = options.pop("streams", None)
    got = list(index.select_many(thetas, streams=streams, **options))
    assert len(got) == len(thetas)
    for i, (theta, selection) in enumerate(zip(thetas, got, strict=True)):
        stream = streams[i] if streams else 0
        expected = reference(table, theta, seed=5, bins=index.bins, stream=stream, **options)
        assert (selection.by_row(index.n) != expected).sum() == 0
        assert selection.rows.size == (expected > 0).sum()  # each document once


@needs_triton
@pytest.mark.parametrize("ties", ["paper", "mid", "hash"])
def test_the_kernels_select_what_the_cpu_does(indexed, ties) -> None:
    table, thetas, index = indexed
    assert index.samples, "no domain is large enough for a guess of its window"
    assert_selects_as_the_cpu(index, table, thetas, ties=ties)


@needs_triton
def test_the_kernels_thin_and_draw_from_streams_as_the_cpu_does(indexed) -> None:
    table, thetas, index = indexed
    assert_selects_as_the_cpu(index, table, thetas, thin=0.3, streams=[7 * i for i in range(len(thetas))])


@needs_triton
def test_more_thetas_than_fit_at_once_give_the_same_selections(indexed, monkeypatch) -> None:
    from quadmix_plugin import device_index

    _, thetas, index = indexed
    whole = list(index.select_many(thetas))
    monkeypatch.setattr(device_index, "_AT_ONCE", 2)
    for one, other in zip(whole, index.select_many(thetas), strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.copies, other.copies)


@needs_triton
def test_a_wrong_guess_of_the_window_changes_nothing(indexed, monkeypatch) -> None:
    from quadmix_plugin import device_index

    table, thetas, index = indexed
    monkeypatch.setattr(device_index._Job, "_guess", lambda job: job.table[:, :, 0] * 0 + 1)
    assert_selects_as_the_cpu(index, table, thetas[:1])


@needs_triton
@pytest.mark.parametrize("corner", CORNERS)
def test_corners_of_the_parameters_on_a_device(corner) -> None:
    from quadmix_plugin.device_index import DeviceIndex

    table = corner_table()
    index = DeviceIndex.of(*table, seed=5, bins=64, n_domains=4)
    assert_selects_as_the_cpu(index, table, [CORNERS[corner]], ties="hash", thin=0.8)


@needs_triton
def test_a_window_with_most_documents_in_few_tokens_fits() -> None:
    from quadmix_plugin.device_index import DeviceIndex

    scores, domains, tokens, doc_ids = corpus(9_000, 4)
    tokens[:] = np.where(scores[:, 0] == scores[:, 0].max(), 1_000_000, 1)
    theta = Parameters([[1.0, 0.0, 0.0]] * 4, [5.0] * 4, [0.05] * 4, [1.0] * 4, [0.0] * 4)
    table = (scores, domains, tokens, doc_ids)
    assert_selects_as_the_cpu(DeviceIndex.of(*table, seed=5, bins=256, n_domains=4), table, [theta])


@needs_triton
def test_string_ids_and_tensors_on_the_device() -> None:
    from quadmix_plugin.device_index import DeviceIndex

    scores, domains, tokens, doc_ids = corpus(1000, 4)
    names = [f"document {i}" for i in doc_ids]
    thetas = sample_parameters(2, 3, 4, seed=1)
    index = DeviceIndex.of(scores, domains, tokens, names, seed=5, n_domains=4, bins=128)
    for theta, selection in zip(thetas, index.select_many(thetas, to_host=False), strict=True):
        assert selection.copies.device == index.blocks.scores.device
        expected = reference((scores, domains, tokens, names), theta, seed=5, bins=128)
        np.testing.assert_array_equal(selection.by_row(1000).cpu().numpy(), expected)


@needs_triton
@needs_cupy
def test_an_index_of_arrays_of_cupy_is_that_of_numpy(indexed) -> None:
    import cupy

    from quadmix_plugin.device_index import DeviceIndex

    table, thetas, index = indexed
    other = DeviceIndex.of(*map(cupy.asarray, table), seed=5, bins=index.bins, n_domains=thetas[0].n_domains)
    for a, b in zip(index.select_many(thetas[:3]), other.select_many(thetas[:3]), strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.copies, b.copies)


@needs_triton
def test_no_documents_make_an_empty_selection() -> None:
    from quadmix_plugin.device_index import DeviceIndex

    index = DeviceIndex.of(*(column[:0] for column in corpus(10, 4)), n_domains=4)
    (selection,) = index.select_many([CORNERS["much by chance"]])
    assert selection.rows.size == selection.copies.size == 0


@needs_triton
def test_an_index_refuses_what_it_cannot_hold(indexed) -> None:
    from quadmix_plugin.device_index import DeviceIndex

    (scores, domains, tokens, doc_ids), thetas, index = indexed
    with pytest.raises(InputError, match="type float64"):
        DeviceIndex.of(scores.astype(float), domains, tokens, doc_ids)
    with pytest.raises(InputError, match="doc_ids"):
        DeviceIndex.of(scores, domains, tokens, doc_ids[1:])
    with pytest.raises(InputError, match="'histogram'"):
        next(index.select_many(thetas, method="exact"))
    with pytest.raises(InputError, match="3 domains and 3 scorers"):
        next(index.select_many(sample_parameters(1, 3, 3, seed=0)))
    with pytest.raises(InputError, match="bins=0"):
        DeviceIndex.of(scores, domains, tokens, doc_ids, bins=0)
    n_domains = thetas[0].n_domains
    many = Parameters([[1.0, 0.0, 0.0]] * n_domains, *([number] * n_domains for number in (1000.0, 1.0, 40.0, 0.0)))
    with pytest.raises(InputError, match=r"up to 1.1e\+12 copies"):
        next(index.select_many([many]))
    with pytest.raises(InputError, match="CUDA"):
        DeviceIndex.of(scores, domains, tokens, doc_ids, device="cpu" if ON_GPU else "cuda")


@needs_triton
def test_ids_are_hashed_on_the_device_as_elsewhere() -> None:
    from quadmix_plugin import device_index

    ids = np.array([0, 1, -1, 2**63 - 1, -(2**63), 977], dtype=np.int64)
    on = device_index._device(None)
    for seed in (0, 3, 2**70):
        got = device_index._hashes(ids, seed, on).cpu().numpy().view(np.uint64)
        np.testing.assert_array_equal(
            got, hashing.mix64(ids.view(np.uint64) + np.uint64(hashing.splitmix64_step(seed)))
        )
