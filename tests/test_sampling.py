"""Eq. 3 and the draw: against plain loops, and the same for every partition, order, process and id type."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadmix_plugin.errors import InputError
from quadmix_plugin.parameters import Parameters, sample_parameters
from quadmix_plugin.ranking import RankMap, merge_quality, quality_rank
from quadmix_plugin.sampling import count_copies, draw_copies, hash64, sampling_value, uniform

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The generator of Steele, Lea and Flood (2014), one output."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def eq_3(rank: float, lam: float, omega: float, eta: float, epsilon: float) -> float:
    """Eq. 3 in the paper's words."""
    if rank > omega:
        return epsilon
    return (2 / (1 + math.exp(-lam * (omega - rank)))) ** eta + epsilon


def eq_1_to_3_and_draw(scores, domains, tokens, doc_ids, theta: Parameters) -> list[int]:
    """Every document's copies by plain loops, with nothing of the package but θ."""
    n = len(domains)
    merged = []
    for i in range(n):
        total = 0.0
        for scorer, score in enumerate(scores[i]):
            total += float(theta.alpha[domains[i], scorer]) * float(score)
        merged.append(total)
    copies = []
    for i in range(n):
        m = domains[i]
        mates = [j for j in range(n) if domains[j] == m]
        upto = sum(int(tokens[j]) for j in mates if merged[j] <= merged[i])
        rank = upto / sum(int(tokens[j]) for j in mates)
        value = eq_3(rank, *(float(getattr(theta, name)[m]) for name in ("lam", "omega", "eta", "epsilon")))
        u = (splitmix64(int(doc_ids[i])) >> 11) / 2**53
        copies.append(math.floor(value) + (1 if u < value - math.floor(value) else 0))
    return copies


@st.composite
def parameters(draw, n_scorers: int, n_domains: int) -> Parameters:
    """θ with its corners: λ 0 and 1000, ω 1, η 0, ε 0, a scorer without weight."""

    def column(corners: list[float], low: float, high: float) -> list[float]:
        number = st.sampled_from(corners) | st.floats(low, high)
        return draw(st.lists(number, min_size=n_domains, max_size=n_domains))

    raw = np.array(
        draw(
            st.lists(
                st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=n_scorers, max_size=n_scorers).filter(any),
                min_size=n_domains,
                max_size=n_domains,
            )
        )
    )
    return Parameters(
        raw / raw.sum(axis=1, keepdims=True),
        column([0, 1, 1000], 0, 1000),
        column([1, 0.1, 0.5], 1e-6, 1),
        column([0, 1], 0, 2),
        column([0, 0.001], 0, 0.9),
    )


@st.composite
def corpora(draw):
    n, n_scorers, n_domains = draw(st.integers(1, 30)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    grid = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=n_scorers, max_size=n_scorers)
    scores = np.array(draw(st.lists(grid, min_size=n, max_size=n)), dtype=draw(st.sampled_from("fd")))
    domains = np.array(draw(st.lists(st.integers(0, n_domains - 1), min_size=n, max_size=n)))
    tokens = np.array(draw(st.lists(st.integers(1, 5000), min_size=n, max_size=n)))
    doc_ids = np.array(draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n, unique=True)))
    return scores, domains, tokens, doc_ids, draw(parameters(n_scorers, n_domains))


@settings(max_examples=300, deadline=None)
@given(corpora())
def test_copies_are_those_of_the_plain_loop(corpus) -> None:
    copies = count_copies(*corpus)
    assert copies.dtype == np.int32
    assert copies.tolist() == eq_1_to_3_and_draw(*corpus)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_eq_3_is_the_papers(data) -> None:
    theta = data.draw(parameters(1, 3))
    number = st.floats(1e-300, 1) | st.sampled_from([0.1, 0.5, 1.0]) | st.sampled_from(theta.omega.tolist())
    ranks = np.array(data.draw(st.lists(number, min_size=1, max_size=20)))
    domains = np.array(data.draw(st.lists(st.integers(0, 2), min_size=ranks.size, max_size=ranks.size)))
    columns = [getattr(theta, name)[domains] for name in ("lam", "omega", "eta", "epsilon")]
    expected = [eq_3(*row) for row in np.column_stack([ranks, *columns]).tolist()]
    np.testing.assert_allclose(sampling_value(ranks, domains, theta), expected, rtol=1e-13, atol=0)


@settings(max_examples=300, deadline=None)
@given(parameters(1, 1), st.lists(st.floats(1e-12, 1), min_size=2, max_size=30))
def test_value_falls_with_rank_and_stays_in_its_bounds(theta: Parameters, ranks: list[float]) -> None:
    ordered = np.sort(np.array([*ranks, theta.omega[0], min(1.0, np.nextafter(theta.omega[0], 2))]))
    value = sampling_value(ordered, np.zeros(ordered.size, int), theta)
    eta, epsilon, omega = theta.eta[0], theta.epsilon[0], theta.omega[0]
    assert (np.diff(value) <= 1e-15 * value[:-1]).all()
    inside = value[ordered <= omega]
    assert (inside >= 1 + epsilon).all()
    assert (inside <= (2**eta + epsilon) * (1 + 1e-15)).all()
    assert (value[ordered > omega] == epsilon).all()
    # r̄ = ω itself is inside, with sigmoid(0) = 1/2.
    assert sampling_value([omega], [0], theta)[0] == 1 + epsilon


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("eta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("omega", "rank"), [(1.0, 1e-300), (1e-9, 1.0), (1.0, 1.0), (0.5, 0.5)])
def test_the_steepest_curves_raise_no_floating_point_warning(eta: float, omega: float, rank: float) -> None:
    theta = Parameters([[1.0]], [1000.0], [omega], [eta], [0.001])
    with np.errstate(all="raise", under="ignore"):
        value = sampling_value([rank], [0], theta)[0]
    middle = 1.0 if rank == omega else 2.0
    assert value == pytest.approx((middle**eta if rank <= omega else 0.0) + 0.001, rel=1e-12)


def test_selected_tokens_meet_their_expectation() -> None:
    rng = np.random.default_rng(6)
    n = 20_000
    domains, tokens, doc_ids = rng.integers(0, 4, n), rng.integers(1, 2000, n), np.arange(n)
    for seed, theta in enumerate(sample_parameters(10, 3, 4, seed=8)):
        rank = quality_rank(merge_quality(rng.random((n, 3)), domains, theta), domains, tokens)
        value = sampling_value(rank, domains, theta)
        fraction = value - np.floor(value)
        sigma = math.sqrt(float((tokens.astype(float) ** 2 * fraction * (1 - fraction)).sum()))
        got = float((tokens * draw_copies(value, doc_ids, seed)).sum())
        assert abs(got - float((tokens * value).sum())) < 4 * sigma


def test_u_is_uniform_and_independent_over_ids_and_seeds() -> None:
    draws = np.stack([uniform(np.arange(50_000), seed) for seed in range(6)])
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.stack([np.histogram(row, bins=100, range=(0, 1))[0] for row in draws])
    chi2 = ((counts - 500) ** 2 / 500).sum(axis=1)
    assert (np.abs(chi2 - 99) < 5 * math.sqrt(2 * 99)).all()
    correlation = np.corrcoef(np.vstack([draws, np.roll(draws[0], 1)]))
    assert np.abs(correlation - np.eye(7)).max() < 5 / math.sqrt(50_000)


def test_splitmix64_gives_the_published_outputs() -> None:
    # First outputs of the reference C program for state 1234567; output k is the first of state + k·golden.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = np.array([(1234567 + k * 0x9E3779B97F4A7C15) & MASK for k in range(5)], dtype=np.uint64)
    assert hash64(states, 0).tolist() == published
    assert hash64([0], 0)[0] == 0xE220A8397B1DCDAF
    assert hash64([1234567], 0)[0] == published[0]


def test_xxhash64_gives_the_published_outputs() -> None:
    published = {
        ("", 0): 0xEF46DB3751D8E999,
        ("a", 0): 0xD24EC4F1A98C6E5B,
        ("abc", 0): 0x44BC2CF5AD770999,
        ("xxhash", 0): 0x32DD38952C4BC720,
        ("xxhash", 20141025): 0xB559B98D844E0635,
        ("Nobody inspects the spammish repetition", 0): 0xFBCEA83C8A378BF1,
    }
    for (text, seed), digest in published.items():
        assert hash64([text], seed)[0] == digest, text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20), st.integers(-5, 2**70))
def test_integer_ids_hash_alike_in_every_container(ids: list[int], seed: int) -> None:
    expected = [splitmix64((i + seed * 0xD1342543DE82EF95) & MASK) for i in ids]
    array = np.array(ids, dtype=np.int64)
    containers = [ids, array, array.view(np.uint64), pa.array(ids, pa.int64()), pa.chunked_array([ids[:1], ids[1:]])]
    for container in containers:
        assert hash64(container, seed).tolist() == expected
    assert hash64(pa.array([0, *ids], pa.int64())[1:], seed).tolist() == expected


def test_narrow_integers_hash_like_wide_ones() -> None:
    for kind in (np.int8, np.int16, np.int32):
        assert hash64(np.array([-7, 5], kind)).tolist() == hash64([-7, 5]).tolist()
    assert hash64([5], np.int64(2**62))[0] == hash64([5], 2**62)[0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20), st.integers(0, 2**64 - 1))
def test_string_ids_hash_alike_in_every_container(ids: list[str], seed: int) -> None:
    import xxhash

    expected = [xxhash.xxh64(i.encode("utf-8"), seed=seed).intdigest() for i in ids]
    containers = [
        ids,
        tuple(ids),
        np.array(ids, dtype=object),
        pa.array(ids),
        pa.array(ids, pa.large_string()),
        pa.chunked_array([ids[:1], ids[1:]], pa.string()),
    ]
    for container in containers:
        assert hash64(container, seed).tolist() == expected


def test_one_long_string_id_does_not_blow_up_memory() -> None:
    ids = ["x" * 1_000_000, *(str(i) for i in range(100_000))]  # as a fixed-width array: 400 GB
    assert hash64(ids).size == 100_001


@pytest.mark.parametrize("kind", ["integers", "strings"])
@pytest.mark.parametrize("parts", [1, 7])
def test_copies_do_not_depend_on_partitions_and_row_order(kind: str, parts: int) -> None:
    rng = np.random.default_rng(9)
    n = 3000
    scores, domains, tokens = rng.integers(0, 50, (n, 3)) / 50, rng.integers(0, 5, n), rng.integers(1, 900, n)
    doc_ids = rng.permutation(n)
    ids = pa.array(doc_ids if kind == "integers" else [f"doc-{i}" for i in doc_ids])
    theta = sample_parameters(1, 3, 5, seed=1)[0]
    whole = count_copies(scores, domains, tokens, ids, theta, seed=4)
    assert 0 < (whole > 0).sum() < n
    part = rng.integers(0, parts, n)
    pieces = [rng.permutation(np.flatnonzero(part == p)) for p in range(parts)]
    merged = [merge_quality(scores[rows], domains[rows], theta) for rows in pieces]
    maps = [RankMap.fit(q, domains[rows], tokens[rows]) for q, rows in zip(merged, pieces, strict=True)]
    ranks = RankMap.merge(maps[::-1])
    for q, rows in zip(merged, pieces, strict=True):
        value = sampling_value(ranks.rank(q, domains[rows]), domains[rows], theta)
        np.testing.assert_array_equal(draw_copies(value, ids.take(pa.array(rows)), 4), whole[rows])


PROCESS = """
import json
from quadmix_plugin import count_copies, sample_parameters
ids = [f"doc-{i}" for i in range(500)]
theta = sample_parameters(1, 2, 3, seed=5)[0]
scores = [[(i * 37 % 101) / 101, (i * 53 % 97) / 97] for i in range(500)]
copies = count_copies(scores, [i % 3 for i in range(500)], [i % 9 + 1 for i in range(500)], ids, theta, seed=2)
print(json.dumps(copies.tolist()))
"""


def test_another_process_with_another_hash_seed_draws_the_same() -> None:
    results = set()
    for hash_seed in ("0", "1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, check=True
        )
        results.add(run.stdout)
    assert len(results) == 1
    assert sum(json.loads(results.pop())) > 0


THETA = Parameters([[1.0], [1.0]], [1, 1], [0.1, 0.1], [1, 1], [0, 0])


@pytest.mark.parametrize(
    ("rank", "domains", "says"),
    [
        ([0.0, 0.5], [0, 1], r"rank: 1 outside \(0, 1\], first 0.0; give what quality_rank returns"),
        ([1.5], [0], r"rank: 1 outside \(0, 1\], first 1.5"),
        ([math.nan], [0], r"rank: 1 outside \(0, 1\], first nan"),
        ([0.5], [0, 1], r"rank \(1,\) and domain_ids \(2,\) must be one-dimensional and of one length"),
        ([0.5], [-1], "domain_ids: 1 outside the range, first -1; give positions from 0 to 1"),
        ([0.5], [2], "domain_ids: 1 outside the range, first 2; give positions from 0 to 1"),
    ],
)
def test_bad_ranks_are_refused_with_place_value_and_remedy(rank, domains, says: str) -> None:
    with pytest.raises(InputError, match=says):
        sampling_value(rank, domains, THETA)


@pytest.mark.parametrize(
    ("value", "ids", "says"),
    [
        ([-0.5], [1], "value: 1 are negative, not finite or above int32, first -0.5; give what sampling_value returns"),
        ([math.nan], [1], "first nan"),
        ([math.inf], [1], "first inf"),
        ([1.0, 2.0**40], [1, 2], "value: 1 .* above int32, first 1099511627776"),
        ([0.5], [1, 2], r"value \(1,\) and doc_ids \(2,\) must be of one length"),
        ([0.5, 0.5], ["a", 1], "doc_id 1: give all ids as integers or all as strings"),
        ([0.5, 0.5], [1, "a"], "doc_id 1: give all ids as integers or all as strings"),
        ([0.5], [1.5], "doc_id 1.5: give all ids"),
        ([0.5], [None], "doc_id None: give all ids"),
        ([0.5], ["\ud800"], r"doc_id '\\ud800': give all ids .* of valid Unicode"),
        ([0.5, 0.5], pa.array([1, None]), "doc_id: 1 missing; every document needs an id"),
    ],
)
def test_bad_draws_are_refused_with_place_value_and_remedy(value, ids, says: str) -> None:
    with pytest.raises(InputError, match=says):
        draw_copies(value, ids, 0)


def test_an_unknown_rank_method_is_refused() -> None:
    with pytest.raises(InputError, match="method='subset'"):
        count_copies([[1.0]], [0], [1], [1], THETA, method="subset")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("ids", [[], np.empty(0), pa.array([], pa.string()), pa.array([], pa.int64())])
def test_no_documents_give_no_copies(ids) -> None:
    assert count_copies(np.empty((0, 1)), [], [], ids, THETA).shape == (0,)
