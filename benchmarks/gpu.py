"""Many θ and one θ on a GPU, against the CPU of the same machine. NOT YET RUN ON A GPU: no figure of it exists.

    python benchmarks/gpu.py --rows 10_000_000 --thetas 256

``DeviceIndex`` (Triton's kernels) and ``ScoreIndex`` (compiled, all cores) answer many θ; ``count_copies`` one, by cupy
and by numpy. All must give the same copies: the last column counts the documents that differ. What the machine lacks is
left out and named. Needs no package but the project's own source, torch, triton and, for one θ, cupy. Unlike the other
benchmarks it measures wall time. On a machine without a GPU it runs under ``TRITON_INTERPRET=1``, for a few rows only.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the project need not be installed on a borrowed machine

from quadmix_plugin import Parameters, sample_parameters
from quadmix_plugin.kernels import arrays

N_DOMAINS, N_SCORERS = 26, 3
SEED = 0
CPU_THETAS = 16  # that a CPU answers: its cost per θ does not change

Table = tuple[Any, ...]
Line = tuple[str, int, float, str]


def generate(rows: int) -> Table:
    """26 domains by Zipf's law, three correlated scores with ties at both ends, lognormal tokens (mean 996)."""
    rng = np.random.default_rng(SEED)
    share = np.cumsum(1.0 / np.arange(1, N_DOMAINS + 1))
    domains = np.searchsorted(share / share[-1], rng.random(rows), side="right")
    common = 0.3 * rng.standard_normal(N_DOMAINS, dtype=np.float32)[domains]
    common += rng.standard_normal(rows, dtype=np.float32)
    scores = 0.8 * common[:, None] + 0.6 * rng.standard_normal((rows, N_SCORERS), dtype=np.float32)
    tokens = np.maximum(rng.lognormal(6.3, 1.1, rows), 1).astype(np.int64)
    return np.clip(scores, -1.9, 1.6), domains, tokens, np.arange(rows) * 7919


def seconds(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median wall time of ``work``, after one run that compiles, and its last result."""
    result, times = work(), []
    for _ in range(repeats):
        _synchronise()
        start = time.perf_counter()
        result = work()
        _synchronise()
        times.append(time.perf_counter() - start)
    return median(times), result


def device_index(table: Any, thetas: list[Parameters], repeats: int, profile: bool) -> Iterator[Line]:
    """The index and all θ on the GPU, without and with the copy of the selections to the host."""
    import torch

    from quadmix_plugin.device_index import DeviceIndex

    made, index = seconds(lambda: DeviceIndex.of(*table, seed=SEED, n_domains=N_DOMAINS), repeats)
    yield "DeviceIndex: laid out from arrays of numpy", 0, made, ""
    few = thetas[: min(4, len(thetas))]
    different = 0
    for theta, selection in zip(few, index.select_many(few), strict=True):
        expected = arrays.count_copies(*table, theta=theta, seed=SEED)
        different += int((selection.by_row(index.n) != expected).sum())
    for to_host, where in ((False, "selections stay on the device"), (True, "selections copied to the host")):
        taken, found = seconds(lambda: _documents(index.select_many(thetas, to_host=to_host)), repeats)  # noqa: B023
        note = f"{different} of {len(few)} θ; {found / len(thetas):,.0f} selected per θ"
        yield f"DeviceIndex: {where}", len(thetas), taken, note
    if profile:
        with torch.profiler.profile() as profiler:
            _documents(index.select_many(thetas, to_host=False))
        by_time = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=by_time, row_limit=15), file=sys.stderr)


def score_index(table: Any, thetas: list[Parameters], repeats: int) -> Iterator[Line]:
    """The index on this machine's CPU, all cores."""
    from quadmix_plugin.score_index import ScoreIndex

    made, index = seconds(lambda: ScoreIndex.of(*table, seed=SEED, n_domains=N_DOMAINS), repeats)
    yield "ScoreIndex: laid out", 0, made, ""
    few, threads = thetas[:CPU_THETAS], os.cpu_count() or 1
    taken, _ = seconds(lambda: _documents(index.select_many(few, threads=threads)), repeats)
    yield f"ScoreIndex, {threads} threads", len(few), taken, ""


def one_theta(table: Any, theta: Parameters, repeats: int) -> Iterator[Line]:
    """``count_copies`` by whole arrays, of cupy where it is and of numpy."""
    try:
        import cupy  # pyright: ignore[reportMissingImports]

        on_device: Any = tuple(map(cupy.asarray, table)) if cupy.cuda.runtime.getDeviceCount() else None
    except Exception as error:
        _left_out("cupy", error)
        on_device = None
    for method in ("histogram", "exact"):
        options = {"theta": theta, "seed": SEED, "method": method}
        taken, expected = seconds(partial(arrays.count_copies, *table, **options), 1)
        yield f"count_copies by numpy, {method}", 1, taken, ""
        if on_device:
            taken, copies = seconds(partial(arrays.count_copies, *on_device, **options), repeats)
            yield f"count_copies by cupy, {method}", 1, taken, str(int((copies.get() != expected).sum()))


def main() -> None:
    """Measures what this machine has and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=10_000_000, help="documents of the table")
    parser.add_argument("--thetas", type=int, default=256, help="how many θ of Algorithm 1")
    parser.add_argument("--repeats", type=int, default=3, help="runs of everything; the median is reported")
    parser.add_argument("--profile", action="store_true", help="also print the time of each kernel to standard error")
    given = parser.parse_args()
    table, thetas = generate(given.rows), sample_parameters(given.thetas, N_SCORERS, N_DOMAINS, SEED)
    print(f"{given.rows:,} documents, {N_DOMAINS} domains, {N_SCORERS} scores; {_machine()}.")
    print(f"Wall time, median of {given.repeats} runs after one that compiles.\n")
    print("| engine | θ | seconds | docs·θ/s | documents that differ from numpy |\n|---|---:|---:|---:|---:|")
    for name, lines in (
        ("DeviceIndex", device_index(table, thetas, given.repeats, given.profile)),
        ("ScoreIndex", score_index(table, thetas, given.repeats)),
        ("count_copies", one_theta(table, thetas[0], given.repeats)),
    ):
        try:
            for engine, n, taken, note in lines:
                rate = f"{given.rows * n / taken:.3g}" if n else ""
                print(f"| {engine} | {n or ''} | {taken:.4g} | {rate} | {note} |", flush=True)
        except Exception as error:  # the other engines' figures are still of use
            _left_out(name, error)


def _documents(selections: Any) -> int:
    """Selected documents of all θ, each selection dropped at once."""
    return sum(int(selection.copies.shape[0]) for selection in selections)


def _synchronise() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        cupy.cuda.Device().synchronize()


def _machine() -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: NO FIGURE BELOW IS OF ONE"
    return f"{gpu}, {os.cpu_count()} CPU cores, torch {torch.__version__}, numpy {np.__version__}"


def _left_out(name: str, error: Exception) -> None:
    print(f"{name}: not measured: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
