"""Training of proxies on one GPU: tokens/s, share of the measured bf16 peak, K proxies at once, the projected hours.

    python benchmarks/proxies_gpu.py --out proxies_gpu.jsonl          # NOT YET RUN ON A GPU: no figure of it exists
    python benchmarks/proxies_gpu.py --only train small --minutes 4   # nine minutes are too few for all
    python benchmarks/proxies_gpu.py --rehearse                       # all parts, tiny, on a CPU; figures mean nothing

Parts: ``peak`` (a large matrix product), ``train`` (one proxy-1m, 512 × 2048 tokens an update), ``small`` (one proxy,
small batches), ``loss`` (the output layer alone), ``stacked`` and ``processes`` (K proxies at once), ``feed`` (ids on
the device or sent to it), ``megatron``. FLOPs per token: 6 for every weight of a matrix that a token passes (the input
embedding is looked up, not multiplied) and 6 · layers · width · context of causal attention. Wall time. "first s" is
the first update, with compilation, or what torch's cache leaves of it where the same was compiled before; "loss" that
of the fourth update, which all ways share but for bfloat16. Needs torch, numpy and the project's own source;
liger-kernel, cut-cross-entropy and megatron-core where they are installed.
"""

import argparse
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._inductor import config as inductor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the project need not be installed on a borrowed machine

import proxy_peers
from proxy_measuring import RATE, WARM, Bench, Job

from quadmix_plugin.megatron import TokenFile
from quadmix_plugin.proxy import feed, output_loss
from quadmix_plugin.proxy.model import Decoder
from quadmix_plugin.proxy.pieces import cut_pieces
from quadmix_plugin.proxy.pool import TokenPool
from quadmix_plugin.proxy.trainer import _tokens_per_pass

SAME = 0.05  # nats: bfloat16 in other orders
WAIT = 200.0  # seconds for K processes to be ready, compilation included


@dataclass(frozen=True)
class Sizes:
    """What is measured: ``one`` proxy at a time, ``many`` at once."""

    one: tuple[Job, ...]
    many: tuple[Job, ...]
    at_once: tuple[int, ...]
    loss_tokens: int
    matrix: int
    pool_tokens: int
    seconds: float


ON_GPU = Sizes(
    one=(Job("proxy-1m", 2048, 512, 50_432), Job("proxy-1m", 2048, 512, 16_384)),
    many=(Job("proxy-1m", 2048, 16, 16_384), Job("proxy-tiny", 128, 64, 4096)),
    at_once=(1, 4, 16, 64),
    loss_tokens=1 << 16,
    matrix=8192,
    pool_tokens=1 << 26,
    seconds=3.0,
)
REHEARSAL = Sizes(
    one=(Job("proxy-tiny", 32, 8, 512),),
    many=(Job("proxy-tiny", 32, 8, 512),),
    at_once=(1, 2),
    loss_tokens=256,
    matrix=256,
    pool_tokens=1 << 15,
    seconds=0.1,
)


def measure_step(bench: Bench, name: str, job: Job, make: Callable[[], proxy_peers.Step], stack: int = 0) -> None:
    """Tokens/s of one way, its batches on the device; ``stack``: how many models take a step at once, if not one."""
    batches = job.batches(4, bench.device)
    if stack:
        batches = torch.stack([job.batches(4, bench.device, seed) for seed in range(stack)], dim=1)
    step, losses = make(), []

    def work(i: int) -> None:
        loss = step(batches[i % len(batches)], RATE)
        if i == WARM:
            losses.append(float(loss.reshape(-1)[0]))

    first, each = bench.timed(work)
    expected = bench.losses.setdefault(job, losses[0])
    said = f"{losses[0]:.3f}" + ("" if abs(losses[0] - expected) <= SAME else f", NOT {expected:.3f}")
    facts = {"ms": each * 1e3, "first_s": first, "loss": said, "GiB": bench.peak_gib}
    bench.speed(name, job, max(stack, 1) * job.tokens / each, **facts)


def peak(bench: Bench, sizes: Sizes) -> None:
    """FLOP/s of a square bf16 product of random data, against which shares are taken."""
    n = sizes.matrix
    left, right = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    _, seconds = bench.timed(lambda _: left @ right)
    bench.peak = 2.0 * n**3 / seconds
    bench.line(f"bf16 product of {n} × {n}", TFLOP_per_s=bench.peak / 1e12)


def train(bench: Bench, sizes: Sizes) -> None:
    """One proxy at a time."""
    _one_at_a_time(bench, sizes.one)


def small(bench: Bench, sizes: Sizes) -> None:
    """Small batches, where launches may cost more than the work."""
    _one_at_a_time(bench, sizes.many)


def _one_at_a_time(bench: Bench, jobs: tuple[Job, ...]) -> None:
    ways = {job: _ways(bench, job) for job in jobs}
    for name in ways[jobs[0]]:
        for job in jobs:
            bench.attempt(f"{job}: {name}", partial(measure_step, bench, name, job, ways[job][name]))


def _ways(bench: Bench, job: Job) -> dict[str, Callable[[], proxy_peers.Step]]:
    """The trainer as it is, the plain loop, and the trainer with one thing exchanged."""
    shape, device = job.model, bench.device
    per_pass = max(_tokens_per_pass(shape, device) // job.context, 1)
    with_all_logits = max((1 << 31) // (job.vocabulary * job.context), 1)
    low = partial(output_loss.output_loss, low=torch.bfloat16)

    def plain(compiled: bool) -> proxy_peers.Step:
        model = Decoder(shape).initialise(0).to(device)
        hidden = torch.compile(model.hidden, dynamic=False) if compiled else None
        return proxy_peers.decoder_step(model, job.trainer(), hidden=hidden, pieces=with_all_logits)

    def exchanged(
        make: Callable[[], proxy_peers.Loss] = lambda: low,
        mode: str | None = None,
        pieces: int = per_pass,
        graph: bool = False,
    ) -> proxy_peers.Step:
        loss, model = make(), Decoder(shape).initialise(0).to(device)
        hidden = torch.compile(model.hidden, dynamic=False, mode=mode)
        if graph:
            return proxy_peers.graphed_step(model, job.trainer(), loss, hidden, pieces)
        return proxy_peers.decoder_step(model, job.trainer(), loss, hidden, pieces, fused=True)

    return {
        "TorchTrainer": lambda: job.trainer(compile="on").learner(shape, 0, device).step,
        "TorchTrainer, compile: off": lambda: job.trainer(compile="off").learner(shape, 0, device).step,
        "plain loop": lambda: plain(False),
        "plain loop, torch.compile": lambda: plain(True),
        "TorchTrainer, compile mode reduce-overhead": lambda: exchanged(mode="reduce-overhead"),
        "TorchTrainer, an update as one CUDA graph": lambda: exchanged(graph=True),
        "TorchTrainer, passes of an eighth of the batch": lambda: exchanged(pieces=-(-job.batch // 8)),
        "TorchTrainer, liger-kernel": lambda: exchanged(proxy_peers.liger_loss),
        "TorchTrainer, cut-cross-entropy": lambda: exchanged(proxy_peers.cut_loss),
    }


def losses(bench: Bench, sizes: Sizes) -> None:
    """The output layer and its loss alone, forward and backward, from float32 states, by library and by chunk."""
    low = partial(output_loss.output_loss, low=torch.bfloat16)
    ways: dict[str, Callable[[], proxy_peers.Loss]] = {
        "output_loss": lambda: low,
        "all logits": lambda: proxy_peers.full_logits,
        "all logits, torch.compile": lambda: torch.compile(proxy_peers.full_logits, dynamic=False),
        "liger-kernel": proxy_peers.liger_loss,
        "cut-cross-entropy": proxy_peers.cut_loss,
        **{f"output_loss, chunks of 2^{p} logits": partial(_chunked, low, 1 << p, bench) for p in (24, 26, 30)},
    }
    for name, make in ways.items():
        for job in sizes.one:
            what = f"{sizes.loss_tokens:,} tokens, V {job.vocabulary:,}: {name}"
            bench.attempt(what, partial(_measure_loss, bench, what, job, sizes.loss_tokens, make))


def _chunked(loss: proxy_peers.Loss, elements: int, bench: Bench) -> proxy_peers.Loss:
    def with_other_chunks(*inputs: Tensor) -> Tensor:
        before = output_loss._CHUNK_ELEMENTS
        output_loss._CHUNK_ELEMENTS = {bench.device.type: elements}
        try:
            return loss(*inputs)
        finally:
            output_loss._CHUNK_ELEMENTS = before

    return with_other_chunks


def _measure_loss(bench: Bench, name: str, job: Job, n: int, make: Callable[[], proxy_peers.Loss]) -> None:
    loss, values = make(), []
    torch.manual_seed(0)
    states = torch.randn(n, job.model.width, device=bench.device, requires_grad=True)
    weight = (torch.randn(job.vocabulary, job.model.width, device=bench.device) / 16).requires_grad_()
    targets = job.batches(1, bench.device).flatten()[:n]

    def work(_: int) -> None:
        value = loss(states, weight, targets)
        torch.autograd.grad(value, (states, weight))
        values[:] = [value.detach()]

    first, seconds = bench.timed(work)
    share = 6.0 * n * weight.numel() / seconds / bench.peak
    facts = {"first_s": first, "loss": f"{float(values[0]):.3f}", "GiB": bench.peak_gib}
    bench.line(name, ms=seconds * 1e3, of_bf16_peak=share, **facts)


def stacked(bench: Bench, sizes: Sizes) -> None:
    """K models in one, by batched products; the output layer one model after the other."""

    def make(job: Job, k: int) -> proxy_peers.Step:
        models = proxy_peers.StackedDecoders(job.model, range(k), bench.device)
        low = torch.bfloat16 if bench.is_gpu else None
        return proxy_peers.stacked_step(models, job.trainer(), torch.compile(models.hidden, dynamic=False), low)

    for k in sizes.at_once:
        for job in sizes.many:
            name = f"{k} stacked"
            bench.attempt(f"{job}: {name}", partial(measure_step, bench, name, job, partial(make, job, k), k))


def processes(bench: Bench, sizes: Sizes) -> None:
    """K processes of one trainer each; they take turns on the GPU unless its multi-process service runs."""
    service = "with" if "CUDA_MPS_PIPE_DIRECTORY" in os.environ else "without"
    for k in sizes.at_once:
        for job in sizes.many:
            name = f"{k} processes, {service} MPS"
            bench.attempt(f"{job}: {name}", partial(_at_once, bench, name, job, k, sizes.seconds))


def _at_once(bench: Bench, name: str, job: Job, k: int, seconds: float) -> None:
    """Raises ``RuntimeError`` with the first error of any of them."""
    spawn = torch.multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(k), spawn.Queue()
    arguments = (job, str(bench.device), seconds, barrier, results)
    children = [spawn.Process(target=_child, args=(i, *arguments), daemon=True) for i in range(k)]
    wait, started = min(WAIT, bench.seconds_left), time.perf_counter()
    try:
        for child in children:
            child.start()
        found = [results.get(timeout=max(wait - time.perf_counter() + started, 1)) for _ in children]
        for child in children:
            child.join(10)
    except queue.Empty as error:
        raise RuntimeError(f"no answer within {wait:.0f} s") from error
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
    if errors := sorted((each for each in found if isinstance(each, str)), key=lambda each: "Barrier" in each):
        raise RuntimeError(f"{len(errors)} of {k}: {errors[0]}")
    rates, memory = [rate for rate, _ in found], max(held for _, held in found)
    bench.speed(name, job, sum(rates), slowest_of_fastest=min(rates) / max(rates), GiB_each=memory)


def _child(i: int, job: Job, device_name: str, seconds: float, barrier: Any, results: Any) -> None:
    """Trains for ``seconds`` from when all are ready; puts (tokens/s, peak GiB), or what went wrong."""
    try:
        torch.set_num_threads(1)
        inductor.compile_threads = 1
        device = torch.device(device_name)
        step, batches = job.trainer(compile="on").learner(job.model, i, device).step, job.batches(4, device, i)
        for batch in batches[:WARM]:
            step(batch, RATE).item()
        barrier.wait(WAIT)
        started, n = time.perf_counter(), 0
        while time.perf_counter() < started + seconds:
            losses = [step(batch, RATE) for batch in batches]
            losses[-1].item()
            n += len(losses)
        rate = n * job.tokens / (time.perf_counter() - started)
        results.put((rate, torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else float("nan")))
        barrier.wait(WAIT)  # none gives back its share of the device before all have measured
    except Exception as error:
        results.put(f"{type(error).__name__}: {str(error)[:120]}")
        barrier.abort()


def feeding(bench: Bench, sizes: Sizes) -> None:
    """Batches gathered on the device or sent to it: alone, and with the trainer."""
    job = sizes.one[0]
    with TemporaryDirectory() as folder:
        pool = _pool(Path(folder) / "pool.bin", sizes.pool_tokens, job.vocabulary)
        domains = np.random.default_rng(1).integers(0, 26, pool.n_documents)
        n_tokens = int(pool.lengths.sum()) - 2 * job.context
        pieces = cut_pieces(pool, None, domains, job.context, n_tokens, 0, job.batch)
        for training in (False, True):
            for where, batches in (("gathered on the device", feed.resident_batches), ("sent", feed._sent_batches)):
                name = f"{'TorchTrainer' if training else 'no training'}, ids {where}"
                made = partial(batches, pieces, job.batch, bench.device)
                bench.attempt(f"{job}: {name}", partial(_fed, bench, name, job, made, training))


def _fed(bench: Bench, name: str, job: Job, made: Callable[[], Iterator[Tensor]], training: bool) -> None:
    step = job.trainer(compile="on").learner(job.model, 0, bench.device).step if training else None
    batches = made()

    def take(n: int) -> int:
        tokens = 0
        for batch in islice(batches, n):
            tokens += batch.shape[0] * job.context
            if step:
                step(batch, RATE)
        bench.synchronise()
        return tokens

    take(WARM)
    started = time.perf_counter()
    tokens = take(24)
    rate = tokens / (time.perf_counter() - started)
    if training:
        bench.speed(name, job, rate)
    else:
        bench.line(f"{job}: {name}", tokens_per_s=rate)


def _pool(path: Path, tokens: int, vocabulary: int) -> TokenPool:
    """Documents of random ids, lognormal lengths; laid out by hand, since megatron-core may be missing."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(6.3, 1.1, tokens // 996), 1).astype(np.int64)
    rng.integers(0, vocabulary, int(lengths.sum()), dtype=np.uint16).tofile(path)
    file = TokenFile(path, lengths, np.cumsum(lengths) - lengths, np.dtype(np.uint16))
    return TokenPool((file,), lengths)


def megatron(bench: Bench, sizes: Sizes) -> None:
    """Megatron-Core's own means; in a rehearsal its model alone."""

    def make(job: Job) -> proxy_peers.Step:
        from quadmix_plugin.proxy.megatron_model import quiet_import

        with quiet_import():
            import megatron.core  # noqa: F401
        if not bench.is_gpu:
            return proxy_peers.megatron_on_cpu(job.model, 0, job.trainer())
        from quadmix_plugin.proxy.megatron_trainer import MegatronTrainer

        options = MegatronTrainer(job.shape, {"context": job.context}, learning_rate=RATE, batch_size=job.batch)
        return options.learner(job.model, 0, bench.device).step

    for job in (*sizes.one, *sizes.many):
        name = "MegatronTrainer"
        bench.attempt(f"{job}: {name}", partial(measure_step, bench, name, job, partial(make, job)))


PARTS: dict[str, Callable[[Bench, Sizes], None]] = {
    "peak": peak,
    "train": train,
    "small": small,
    "loss": losses,
    "stacked": stacked,
    "processes": processes,
    "feed": feeding,
    "megatron": megatron,
}


def main() -> None:
    """Runs the parts and prints their lines as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS, help="beside peak, which always runs")
    parser.add_argument("--minutes", type=float, default=1.2, help="of each part, after which it begins no other way")
    parser.add_argument("--out", type=Path, help="also append one JSON object per line to this file")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, to see that the script works")
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use; give --rehearse to try the script on its CPU")
    device, sizes = torch.device("cpu" if given.rehearse else "cuda:0"), REHEARSAL if given.rehearse else ON_GPU
    where = "a CPU: A REHEARSAL, NO FIGURE MEANS ANYTHING" if given.rehearse else torch.cuda.get_device_name(device)
    bench = Bench(device, sizes.seconds, given.minutes if not given.rehearse else 60, given.out)
    if given.rehearse:
        torch.set_num_threads(1)
    bench.line("machine", device=where, cores=os.cpu_count(), torch=torch.__version__)
    with TemporaryDirectory() as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)  # the processes share what one of them compiles
        for name, work in PARTS.items():
            if name == "peak" or name in given.only:
                bench.part(name, partial(work, bench, sizes))


if __name__ == "__main__":
    main()
