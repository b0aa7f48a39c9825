"""Training of proxies on one core: the built-in trainer against a plain loop and Megatron-Core, in one run.

    python benchmarks/proxies.py
    python benchmarks/proxies.py --only chunks      # how many tokens the output layer should take at once

The plain loop is the same decoder with all logits, ``cross_entropy``, ``clip_grad_norm_`` and AdamW as torch gives it;
Megatron-Core is its local layers with PyTorch's attention, the same AdamW and its own loss. All have one thread,
float32, the same initial weights and batches, and must end at the same loss. "Workers' malloc" is the environment
that ``DaskExecutor`` gives its processes; by default a process returns large arrays to the system after every use.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated

import numpy as np
import proxy_peers
import torch
import typer
from measuring import Cost, in_fresh_process, markdown, metered, progress, report

from quadmix_plugin.megatron import write_documents
from quadmix_plugin.proxy import feed, output_loss
from quadmix_plugin.proxy.model import Decoder
from quadmix_plugin.proxy.pieces import cut_pieces
from quadmix_plugin.proxy.pool import TokenPool
from quadmix_plugin.proxy.trainer import TorchTrainer

RATE = 4e-3
STACKED = 4
SAME = 1e-3  # nats that the losses after training may differ by
CPU = torch.device("cpu")
WORKER, DEFAULT = "workers' malloc", "default malloc"
PARTS = ("speed", "memory", "feed", "chunks")
DEFAULT_PARTS = PARTS[:3]
OURS, COMPILED = "TorchTrainer", "TorchTrainer, compile: on"


@dataclass(frozen=True)
class Case:
    """A model, its batch of pieces, and how many updates are timed after the first, in ``repeats`` rounds at most."""

    shape: str
    vocabulary: int
    batch: int
    context: int
    steps: int
    repeats: int = 99

    @property
    def trainer(self) -> TorchTrainer:
        """With products in float32, as all others have them."""
        options = {"context": self.context}
        return TorchTrainer(self.shape, options, batch_size=self.batch, dtype="float32", compile="off", device="cpu")

    def __str__(self) -> str:
        return f"{self.shape}, vocabulary {self.vocabulary:,}, {self.batch} × {self.context} tokens"


SPEED = (
    Case("proxy-tiny", 4096, batch=4, context=128, steps=20),
    Case("proxy-tiny", 50_432, batch=4, context=128, steps=4),
    Case("proxy-1m", 50_432, batch=2, context=512, steps=2, repeats=3),
)
MEMORY = (
    Case("proxy-tiny", 50_432, batch=32, context=128, steps=1),
    Case("proxy-1m", 50_432, batch=8, context=512, steps=1),
)
CHUNKS = ((4096, 64, 512), (50_432, 64, 512), (50_432, 256, 512))  # vocabulary, width, tokens
CHUNK_TOKENS = (0, 32, 64, 128, 256, 512)
ARMS = {  # name: the way to train, the environment, the cases, in how many rounds at most
    OURS: ("ours", WORKER, SPEED, 99),
    "plain loop": ("plain", DEFAULT, SPEED, 99),
    "plain loop, workers' malloc": ("plain", WORKER, SPEED, 99),
    "plain loop, workers' malloc, fused AdamW": ("fused", WORKER, SPEED[:1], 3),
    "Megatron-Core, workers' malloc": ("megatron", WORKER, SPEED, 99),
    COMPILED: ("compiled", WORKER, SPEED[:1], 3),
    f"TorchTrainer's loss, {STACKED} models stacked": ("stacked", WORKER, SPEED[:2], 3),
}


@dataclass
class Run:
    """One arm on one case: cost of the timed updates, wall seconds of the first, tokens and last loss."""

    cost: Cost
    first_s: float
    tokens: int
    loss: float

    @property
    def core_ns(self) -> float:
        """Core-nanoseconds per token."""
        return self.cost.core_s / self.tokens * 1e9


def tokens_of(case: Case, models: int = 1) -> torch.Tensor:
    """Batches [steps + 1, models, b, context + 1] whose ids follow Zipf's law."""
    share = 1 / np.arange(1, case.vocabulary + 1)
    size = (models, case.steps + 1, case.batch, case.context + 1)
    ids = np.random.default_rng(0).choice(case.vocabulary, size=size, p=share / share.sum())
    return torch.from_numpy(ids).transpose(0, 1)


def step_of(way: str, case: Case) -> proxy_peers.Step:
    """A fresh model of the case, from seed 0, in the way of an arm."""
    trainer = case.trainer
    shape = trainer.model_shape(case.vocabulary)
    if way in ("ours", "compiled"):
        trainer.compile = "on" if way == "compiled" else "off"
        return trainer.learner(shape, 0, CPU).step
    if way == "megatron":
        return proxy_peers.megatron_on_cpu(shape, 0, trainer)
    if way == "stacked":
        return proxy_peers.stacked_step(proxy_peers.StackedDecoders(shape, range(STACKED), CPU), trainer)
    return proxy_peers.decoder_step(Decoder(shape).initialise(0), trainer, fused=True if way == "fused" else None)


def train(way: str, cases: Sequence[Case]) -> list[Run]:
    """Each case in turn, by one thread."""
    torch.set_num_threads(1)
    runs = []
    for case in cases:
        models = STACKED if way == "stacked" else 1
        batches = tokens_of(case, models) if models > 1 else tokens_of(case)[:, 0]
        step, started = step_of(way, case), perf_counter()
        step(batches[0], RATE)
        first = perf_counter() - started
        loss = torch.zeros(1)
        with metered() as cost:
            for batch in batches[1:]:
                loss = step(batch, RATE)
        tokens = case.steps * models * case.batch * case.context
        runs.append(Run(cost, first, tokens, float(loss.reshape(-1)[0])))
    return runs


@contextmanager
def environment(name: str, scratch: Path) -> Iterator[None]:
    """What processes started inside inherit."""
    from quadmix_plugin.executors import _WORKER_ENV  # not at the top: every process that measures would import it

    before = dict(os.environ)
    for key in _WORKER_ENV:
        os.environ.pop(key, None)
    os.environ.update({"TORCHINDUCTOR_CACHE_DIR": str(scratch), **(_WORKER_ENV if name == WORKER else {})})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def speeds(repeats: int, scratch: Path) -> list[str]:
    """One table per case: every arm once a round, each round beginning with another."""
    found: dict[Case, dict[str, list[Run]]] = {case: {} for case in SPEED}
    names = list(ARMS)
    for i in range(repeats):
        progress(f"speed: round {i + 1} of {repeats}")
        for name in names[i % len(names) :] + names[: i % len(names)]:
            way, malloc, cases, rounds = ARMS[name]
            cases = [case for case in cases if i < min(rounds, case.repeats)]
            if not cases:
                continue
            with environment(malloc, scratch):
                for case, run in zip(cases, in_fresh_process(train, way, cases), strict=True):
                    found[case].setdefault(name, []).append(run)
    return [speed_table(case, {name: found[case][name] for name in names if name in found[case]}) for case in SPEED]


def speed_table(case: Case, found: dict[str, list[Run]]) -> str:
    """Tokens per core-second, and the medians of the ratios within a round.

    Raises:
        SystemExit: an arm ended at another loss, so that it trained something else.
    """
    ours = found[OURS]
    rows = []
    for name, runs in found.items():
        if not all(abs(run.loss - ours[0].loss) <= SAME for run in runs):
            raise SystemExit(f"{case}: {name} ends at {runs[0].loss:.5f}, {OURS} at {ours[0].loss:.5f}: void")
        each = [run.core_ns for run in runs]
        ratios = [run.core_ns / own.core_ns for run, own in zip(runs, ours, strict=False)]
        walls = [
            (run.cost.wall_s / run.tokens) / (own.cost.wall_s / own.tokens)
            for run, own in zip(runs, ours, strict=False)
        ]
        rows.append(
            [
                name,
                f"{1e9 / median(each):,.0f}",
                f"{1e9 / max(each):,.0f}–{1e9 / min(each):,.0f}",
                f"{median(run.tokens / run.cost.wall_s for run in runs):,.0f}",
                f"{median(ratios):.2f}",
                f"{min(ratios):.2f}–{max(ratios):.2f}",
                f"{median(walls):.2f}",
                f"{runs[0].loss:.5f}",
            ]
        )
    header = [f"{case}; {len(ours)} rounds", "tokens per core-s", "min–max", "tokens per s of wall time"]
    header += [f"{OURS} is × faster by core-s", "min–max", "by wall time", "last loss"]
    return markdown(header, rows) + _compilation(found)


def _compilation(found: dict[str, list[Run]]) -> str:
    if COMPILED not in found:
        return ""
    (cold, *warm), plain = found[COMPILED], median(run.first_s for run in found[OURS])
    again = f", {median(run.first_s for run in warm):.1f} s in later processes, from torch's cache" if warm else ""
    return (
        f"\n\nNot in the table: the first update, which compiles, takes {cold.first_s:.1f} s of wall time{again}; "
        f"without compilation {plain:.2f} s."
    )


def peak_of(way: str, case: Case) -> float:
    """Bytes in two updates above those held after imports and the model."""
    torch.set_num_threads(1)
    batches, step = tokens_of(case)[:, 0], step_of(way, case)
    with metered() as cost:
        for batch in batches:
            step(batch, RATE)
    return cost.peak


def memory_table(scratch: Path) -> str:
    """Peak of two updates; gradients and the state of AdamW, which all ways have, are in it and stated.

    By default malloc: that of the workers keeps what was freed before, so that less is seen to be added.
    """
    rows = []
    for case in MEMORY:
        progress(f"memory: {case}")
        with environment(DEFAULT, scratch):
            peaks = {
                name: in_fresh_process(peak_of, way, case) for name, way in ((OURS, "ours"), ("plain loop", "plain"))
            }
        weights, other = 3 * 4 * case.trainer.model_shape(case.vocabulary).parameters, peaks["plain loop"]
        for name, peak in peaks.items():
            shares = [f"{peak / other:.3f}", f"{(peak - weights) / (other - weights):.3f}"]
            rows.append([f"{case}: {name}", *(f"{size / 2**20:,.0f}" for size in (peak, weights)), *shares])
    header = ["peak in training", "MiB above what model and imports hold", "of which gradients and AdamW's state"]
    return markdown([*header, "of the plain loop's", "without gradients and AdamW's state"], rows)


def chunk_costs(vocabulary: int, width: int, n: int, repeats: int) -> dict[int, list[float]]:
    """Core-seconds of loss and gradients of the output layer by tokens per chunk; 0: its three products alone."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    states, weight = torch.randn(n, width, requires_grad=True), torch.randn(vocabulary, width) / width**0.5
    weight.requires_grad_()
    targets = torch.randint(0, vocabulary, (n,))
    found: dict[int, list[float]] = {size: [] for size in CHUNK_TOKENS if size <= n}
    output_loss._FEWEST_ROWS = 1
    for i in range(repeats + 1):
        for size, costs in found.items():
            output_loss._CHUNK_ELEMENTS = {"cpu": size * vocabulary}
            states.grad = weight.grad = None
            with metered() as cost:
                if size:
                    output_loss.output_loss(states, weight, targets).backward()
                else:
                    _products(states.detach(), weight.detach())
            if i:
                costs.append(cost.core_s)
    return found


def _products(states: torch.Tensor, weight: torch.Tensor) -> None:
    logits = states @ weight.t()
    torch.mm(logits, weight)
    torch.mm(logits.t(), states)


def chunk_table(repeats: int, scratch: Path) -> str:
    """Core-milliseconds of the output layer by tokens per chunk, beside what the library takes of its own accord."""
    columns = {}
    for vocabulary, width, n in CHUNKS:
        progress(f"chunks: vocabulary {vocabulary}, width {width}")
        with environment(WORKER, scratch):
            columns[vocabulary, width, n] = in_fresh_process(chunk_costs, vocabulary, width, n, repeats)
    rows = []
    for size in CHUNK_TOKENS:
        line = [f"{size}" if size else "the three matrix products alone, all tokens"]
        for (vocabulary, _, _), found in columns.items():
            own = max(output_loss._CHUNK_ELEMENTS["cpu"] // vocabulary, output_loss._FEWEST_ROWS)
            line.append(
                f"{median(found[size]) * 1e3:.1f}{' (its own)' if size == own else ''}" if size in found else ""
            )
        rows.append(line)
    header = [f"vocabulary {v:,}, width {width}, {n} tokens: core-ms" for v, width, n in columns]
    return markdown(["output layer and loss, with gradients: tokens per chunk", *header], rows)


def feed_costs(context: int, folder: Path, repeats: int) -> list[tuple[Cost, Cost, int]]:
    """Cutting a selection into pieces with its first epoch, and all its batches; tokens."""
    pool = TokenPool.open([folder / "pool"])
    rng = np.random.default_rng(1)
    copies = rng.choice(3, size=pool.n_documents, p=(0.3, 0.5, 0.2)).astype(np.int32)
    domains = rng.integers(0, 26, pool.n_documents)
    n_tokens = int((pool.lengths * copies).sum()) - 2 * context
    found = []
    for seed in range(repeats + 1):
        with metered() as cutting:
            pieces = cut_pieces(pool, copies, domains, context, n_tokens, seed)
            pieces.epoch(0)
        with metered() as reading:
            for _ in feed.batches(pieces, 4, CPU):
                pass
        found.append((cutting, reading, pieces.tokens_seen))
    return found[1:]


def feed_table(repeats: int, scratch: Path) -> str:
    """Tokens per core-second of what comes before the model."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(6.3, 1.1, 5_000), 1).astype(int)
    ids = (rng.integers(0, 50_432, length) for length in lengths)
    written = write_documents(ids, scratch / "pool.bin", scratch / "pool.idx", 50_432)
    rows = []
    for context in (128, 2048):
        progress(f"feed: context {context}")
        with environment(WORKER, scratch):
            found = in_fresh_process(feed_costs, context, scratch, repeats)
        cutting, reading = Cost.median([each[0] for each in found]), Cost.median([each[1] for each in found])
        tokens = found[0][2]
        rates = [tokens / cost.core_s / 1e6 for cost in (cutting, reading)]
        rates.append(tokens / (cutting.core_s + reading.core_s) / 1e6)
        rows.append([f"context {context}", *(f"{rate:,.1f}" for rate in rates)])
    header = [f"pieces from a pool of {written.documents:,} documents, {written.tokens / 1e6:.1f}M tokens"]
    header += ["cutting and shuffling: M tokens per core-s", "gathering batches of 4", "both"]
    return markdown(header, rows)


def main(
    repeats: Annotated[int, typer.Option(help="rounds; medians are reported")] = 5,
    only: Annotated[list[str], typer.Option(help=f"parts to run, of {', '.join(PARTS)}")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="also write the report to this file")] = None,
) -> None:
    """Measures and prints Markdown tables."""
    if unknown := set(only) - set(PARTS):
        raise typer.BadParameter(f"--only {min(unknown)}: no such part; give {', '.join(PARTS)}")
    sections = []
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        parts: dict[str, Callable[[], list[str]]] = {
            "speed": lambda: speeds(repeats, scratch / "inductor"),
            "memory": lambda: [memory_table(scratch)],
            "chunks": lambda: [chunk_table(repeats, scratch)],
            "feed": lambda: [feed_table(repeats, scratch)],
        }
        for name in only or DEFAULT_PARTS:
            started = perf_counter()
            sections += parts[name]()
            progress(f"{name}: {perf_counter() - started:.0f} s\n\n" + "\n\n".join(sections))
    report("Training proxies", sections, out)


if __name__ == "__main__":
    typer.run(main)
