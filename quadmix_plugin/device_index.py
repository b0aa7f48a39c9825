"""DeviceIndex: a score table on a GPU, laid out once, so that thousands of θ can be answered in little time each.

What ``ScoreIndex`` is on a CPU, by the kernels of ``kernels.gpu``. ``rows`` and ``copies`` are those of its method
``histogram``; only exp and pow may round otherwise on a GPU, so a document whose hash is within some 1e-15 of its
expected copies may have one more or less. Needs torch and triton, and no numba. Under ``TRITON_INTERPRET=1`` the
kernels run on a CPU, slowly, for tests.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import triton  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.hashing import TIES_STREAM, DocIds, hash64, integer_ids, splitmix64_step
from quadmix_plugin.kernels import arrays, gpu
from quadmix_plugin.parameters import Parameters
from quadmix_plugin.rank_map import Ties, check_ties
from quadmix_plugin.rank_states import BINS
from quadmix_plugin.selections import Selection

_BLOCK = 256  # documents of a block
_THETAS = 16  # that one program answers for its block
_AT_ONCE = 64  # θ whose bins are in memory together
_OUTPUTS = 1 << 28  # documents selected that fit into memory together, at most
_LUCK = 1 / 256  # the largest ε whose draws outside the window come from a list and not from a scan
_SAMPLE = 2048  # documents of a domain that the window's end is guessed from
_KEY_BITS = 62
_ROW_BITS = 40
_TIE_RULES = {"paper": 0, "mid": 1, "hash": 2}


class Blocks(NamedTuple):
    """Documents in blocks of one domain each, the last of a domain filled up with documents of no tokens.

    ``scores`` [b, N, BLOCK] and ``best`` [b, N], the lowest of each, float32; the others int64: ``domain`` [b],
    ``tokens``, ``hashes`` and ``rows`` [b · BLOCK].
    """

    scores: torch.Tensor
    best: torch.Tensor
    domain: torch.Tensor
    tokens: torch.Tensor
    hashes: torch.Tensor
    rows: torch.Tensor


class Sample(NamedTuple):
    """Some documents of a domain: ``scores`` [k, N], ``tokens`` [k]."""

    domain: int
    scores: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True, eq=False)
class DeviceIndex:
    """The documents of one score table on a GPU, ready for many θ. Make it with ``of``.

    ``low``, ``high`` [M, N]: range of the scores; ``total``, ``mean`` [M]: tokens of a domain, and per document;
    ``lucky``: the documents with hashes low enough to be drawn by a small ε.
    """

    n: int
    bins: int
    blocks: Blocks
    lucky: Blocks
    samples: list[Sample]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    total: NDArray[np.int64]
    mean: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        normalised: Any,
        domain_ids: Any,
        tokens: Any,
        doc_ids: DocIds,
        seed: int = 0,
        bins: int = BINS,
        n_domains: int | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Lays the table out; arguments as ``ScoreIndex.of``, arrays of numpy, cupy or torch.

        Takes some 4 N + 24 bytes per document on ``device``, three times as many while it is made.

        Raises:
            InputError: as ``ScoreIndex.of``; a device other than CUDA.
        """
        on = _device(device)
        if bins < 1:
            raise InputError(f"bins={bins}; give at least one")
        xp = arrays.array_namespace(normalised, domain_ids, tokens)
        scores = xp.asarray(normalised)
        if scores.dtype != np.float32:
            raise InputError(f"normalised: type {scores.dtype}; an index holds float32, so convert the scores first")
        ids, weights = arrays.require_domain_ids(xp, domain_ids, n_domains), arrays.require_tokens(xp, tokens)
        if scores.ndim != 2 or scores.shape[0] != ids.size or not scores.shape[1]:
            raise InputError(f"normalised: shape {scores.shape}; give a row for each of the {ids.size} documents")
        arrays.require_finite(xp, scores, "normalised")
        domains = n_domains or (int(ids.max()) + 1 if ids.size else 0)
        hashes = _hashes(doc_ids, seed, on)
        if not ids.shape == weights.shape == tuple(hashes.shape):
            raise InputError(f"domain_ids {ids.shape}, tokens {weights.shape} and doc_ids {tuple(hashes.shape)} differ")
        return cls._lay_out(_tensor(scores, on), _tensor(ids, on), _tensor(weights, on), hashes, domains, bins)

    @classmethod
    def _lay_out(
        cls,
        scores: torch.Tensor,
        ids: torch.Tensor,
        tokens: torch.Tensor,
        hashes: torch.Tensor,
        n_domains: int,
        bins: int,
    ) -> Self:
        documents = torch.bincount(ids, minlength=n_domains)
        total = torch.zeros_like(documents).scatter_add_(0, ids, tokens)
        low, high = (
            scores.new_full((n_domains, scores.shape[1]), fill).scatter_reduce_(
                0, ids[:, None].expand(scores.shape), scores, reduce
            )
            for fill, reduce in ((np.inf, "amin"), (-np.inf, "amax"))
        )
        order = torch.argsort(_keys(scores, ids, low, high), stable=True)
        lucky = order[((hashes[order] >> 11) & ((1 << 53) - 1)) < int(_LUCK * 2**53)]
        samples = []
        ends = torch.cumsum(documents, 0).tolist()
        for m, (end, size) in enumerate(zip(ends, documents.tolist(), strict=True)):
            if size >= 4 * _SAMPLE:
                rows = order[torch.linspace(end - size, end - 1, _SAMPLE, device=order.device).long()]
                samples.append(Sample(m, scores[rows], tokens[rows]))
        known = (documents > 0).cpu().numpy()[:, None]
        lowest, highest = (np.where(known, each.double().cpu().numpy(), 0.0) for each in (low, high))
        sums, counts = total.cpu().numpy(), documents.cpu().numpy()
        all_blocks, lucky_blocks = (_in_blocks(rows, scores, ids, tokens, hashes, n_domains) for rows in (order, lucky))
        mean = sums / np.maximum(counts, 1)
        return cls(ids.numel(), bins, all_blocks, lucky_blocks, samples, lowest, highest, sums, mean)

    def select_many(
        self,
        thetas: Sequence[Parameters],
        method: str = "histogram",
        ties: Ties = "paper",
        thin: float = 1.0,
        streams: Sequence[int] | None = None,
        to_host: bool = True,
    ) -> Iterator[Selection]:
        """The selections of many θ in order, some in memory at once; arguments as ``ScoreIndex.select_many``.

        ``to_host``: as arrays of numpy; else as tensors on the device, which saves the copy. The same index and θ give
        the same selections in the same order of rows.

        Raises:
            InputError: θ of another number of domains or scorers, a ``method`` other than ``histogram``, unknown
                ``ties``.
        """
        check_ties(ties)
        if method != "histogram":
            raise InputError(f"method={method!r}; a GPU computes 'histogram', so use it or a ScoreIndex")
        for theta in thetas:
            if (theta.n_domains, theta.n_scorers) != self.low.shape:
                raise InputError(
                    f"the parameters have {theta.n_domains} domains and {theta.n_scorers} scorers, the index "
                    f"{self.low.shape[0]} and {self.low.shape[1]}; use parameters of this corpus"
                )
            most = (theta.epsilon + (2.0 / (1.0 + np.exp(-theta.lam * theta.omega))) ** theta.eta) * thin
            if not most.max() < np.iinfo(np.int32).max:
                raise InputError(f"θ gives a document up to {most.max():.3g} copies; give smaller eta, epsilon or thin")
        numbers = [0] * len(thetas) if streams is None else streams
        size = max(1, min(_AT_ONCE, 10 * _OUTPUTS // max(self.n, 1)))
        jobs = list(zip(thetas, numbers, strict=True))
        for i in range(0, len(jobs), size):
            part = jobs[i : i + size]
            yield from _Job(self, [theta for theta, _ in part], [s for _, s in part], ties, thin).run(to_host)


class _Job:
    """Some θ over the documents: their tables and the passes."""

    def __init__(
        self, index: DeviceIndex, thetas: Sequence[Parameters], streams: Sequence[int], ties: str, thin: float
    ) -> None:
        self.index, self.streams, self.ties = index, streams, ties
        self.shape = (len(thetas), index.low.shape[0])
        alpha = np.stack([theta.alpha for theta in thetas])
        low, high = np.zeros((2, *self.shape))
        for n in range(alpha.shape[2]):
            low += alpha[:, :, n] * index.low[:, n]
            high += alpha[:, :, n] * index.high[:, n]
        with np.errstate(divide="ignore", over="ignore"):
            scale = index.bins / (high - low)
        table = np.zeros((*self.shape, gpu.COLUMNS.value))
        table[:, :, gpu.LOW.value], table[:, :, gpu.SCALE.value] = low, np.where(np.isfinite(scale), scale, 0.0)
        for column, name in ((gpu.LAM, "lam"), (gpu.OMEGA, "omega"), (gpu.ETA, "eta"), (gpu.EPSILON, "epsilon")):
            table[:, :, column.value] = [getattr(theta, name) for theta in thetas]
        table[:, :, gpu.THIN.value] = thin
        table[:, :, gpu.TOTAL.value], table[:, :, gpu.MEAN.value] = np.maximum(index.total, 1), index.mean
        outside = table[:, :, gpu.EPSILON.value] * thin
        table[:, :, gpu.STREAM.value] = (np.array(streams) != 0)[:, None]
        listed = (outside <= _LUCK) & (table[:, :, gpu.STREAM.value] == 0)
        device = index.blocks.scores.device
        self.alpha, self.table = torch.from_numpy(alpha).to(device), torch.from_numpy(table).to(device)
        self.listed = torch.from_numpy(listed).to(device)  # where the draws beyond the window come from the list
        self.bins = torch.zeros((*self.shape, index.bins, gpu.FIELDS.value), dtype=torch.int64, device=device)

    def run(self, to_host: bool) -> Iterator[Selection]:
        """The selections of these θ in order."""
        if self.index.n:
            self._fill_bins()
        keys, copies = self._draw()
        keys, order = torch.sort(keys)  # the order they were found in is another in every run
        first = torch.arange(self.shape[0] + 1, device=keys.device) * self.shape[1] << _ROW_BITS
        ends = torch.searchsorted(keys, first).tolist()
        rows: Any = keys & ((1 << _ROW_BITS) - 1)
        copies: Any = copies[order]
        if to_host:
            narrow = torch.int32 if self.index.n <= np.iinfo(np.int32).max else torch.int64
            rows, copies = rows.to(narrow).cpu().numpy(), copies.cpu().numpy()
        for start, end in pairwise(ends):
            yield Selection(rows[start:end], copies[start:end])

    def _fill_bins(self) -> None:
        first, limit = self.table[:, :, gpu.FIRST.value], self.table[:, :, gpu.LIMIT.value]
        omega, total = self.table[:, :, gpu.OMEGA.value], self.table[:, :, gpu.TOTAL.value]
        first[:], limit[:] = -torch.inf, self._guess()
        mass, before, lowest, highest, *_ = self.bins.unbind(3)
        while True:
            self._launch(gpu.add_tokens)
            done = (mass.sum(2) / total > omega) | limit.isinf()
            if done.all():
                break
            first[:] = torch.where(done, torch.inf, limit)
            limit[:] = torch.where(done, limit, self._all_if_many(2 * limit + 1))
        before[:] = torch.cumsum(mass, 2) - mass
        limit[:] = self._all_if_many((before / total[:, :, None] <= omega[:, :, None]).sum(2).double())
        self.table[:, :, gpu.UNTIL.value] = torch.where(self.listed, limit, torch.inf)
        lowest[:], highest[:] = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min
        self._launch(gpu.add_ends)
        self._launch(gpu.add_at_ends)

    def _guess(self) -> torch.Tensor:
        """A number of bins [T, M] that the window most likely does not pass; ∞ for all."""
        limit = torch.full(self.shape, torch.inf, dtype=torch.float64, device=self.table.device)
        low, scale, omega = (self.table[:, :, column.value] for column in (gpu.LOW, gpu.SCALE, gpu.OMEGA))
        for m, scores, tokens in self.index.samples:
            q, order = torch.sort(self.alpha[:, m] @ scores.double().T, dim=1)
            weight = tokens.double()
            through = torch.cumsum(weight[order], 1)
            # Twice the standard error of a random sample; one evenly spread over like scores is nearer.
            error = 2.0 * torch.sqrt(omega[:, m] * (1 - omega[:, m]) * (weight**2).sum())
            at = torch.searchsorted(through, (omega[:, m] * weight.sum() + error)[:, None])
            last = q.gather(1, at.clamp(max=weight.numel() - 1))[:, 0]
            place = torch.floor((last - low[:, m]) * scale[:, m]) + 1
            limit[:, m] = torch.where(at[:, 0] < weight.numel(), place.clamp(min=1), torch.inf)
        return self._all_if_many(limit)

    def _all_if_many(self, limit: torch.Tensor) -> torch.Tensor:
        return torch.where(limit >= self.index.bins, torch.inf, limit)

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """θ, domain and row in one integer, and copies, of all documents that have some."""
        device, share = self.table.device, self.table[:, :, gpu.OMEGA.value] + self.table[:, :, gpu.EPSILON.value]
        capacity = int(1.25 * float(share.mean()) * self.index.n * self.shape[0]) + 4096
        steps = _signed([splitmix64_step(stream) for stream in [*self.streams, TIES_STREAM]], device)
        while True:
            found = torch.zeros(1, dtype=torch.int64, device=device)
            keys = torch.empty(capacity, dtype=torch.int64, device=device)
            copies = torch.empty(capacity, dtype=torch.int32, device=device)
            outputs = (steps, found, keys, copies, capacity)
            rules = {"TIES": _TIE_RULES[self.ties], "STREAMS": any(self.streams), "ROW_BITS": _ROW_BITS}
            self._launch(gpu.draw_inside, *outputs, **rules)
            self._launch(gpu.draw_lucky, *outputs, blocks=self.index.lucky, ROW_BITS=_ROW_BITS)
            if (count := int(found)) <= capacity:
                return keys[:count], copies[:count]
            capacity = count

    def _launch(self, kernel: Any, *more: Any, blocks: Blocks | None = None, **constants: Any) -> None:
        documents = self.index.blocks if blocks is None else blocks
        if not documents.domain.numel():
            return
        grid = (documents.domain.numel(), triton.cdiv(self.shape[0], _THETAS))
        # Not contracted to fused multiply-add: q̄ must have the bits it has on a CPU.
        constants |= {"N": self.alpha.shape[2], "BINS": self.index.bins, "BLOCK": _BLOCK, "THETAS": _THETAS}
        with torch.cuda.device_of(self.table):
            kernel[grid](
                *documents, self.alpha, self.table, self.bins, *more, *self.shape, **constants, enable_fp_fusion=False
            )


def _device(device: str | torch.device | None) -> torch.device:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on = torch.device(device or ("cpu" if interpreted else "cuda"))
    if on.type != ("cpu" if interpreted else "cuda") or (on.type == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"device {str(on)!r}: Triton's kernels need a CUDA GPU; use a ScoreIndex where there is none")
    return on


def _tensor(array: Any, device: torch.device) -> torch.Tensor:
    if arrays.on_device(array):
        return torch.from_dlpack(array).to(device)
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


def _signed(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Integers in [0, 2^64) as int64 of the same bits."""
    return torch.from_numpy(np.array(values, dtype=np.uint64).view(np.int64)).to(device)


def _hashes(doc_ids: DocIds, seed: int, device: torch.device) -> torch.Tensor:
    """``hashing.hash64`` as int64 of the same bits; integer ids are hashed on the device."""
    integers = integer_ids(doc_ids)
    if integers is None:
        return _tensor(hash64(doc_ids, seed).view(np.int64), device)
    ids = _tensor(integers.view(np.int64), device).contiguous()
    hashes = torch.empty_like(ids)
    if ids.numel():
        step = _signed([arrays.splitmix64_step(seed)], device)
        kernel: Any = gpu.hash_ids
        with torch.cuda.device_of(ids):
            kernel[(triton.cdiv(ids.numel(), 1024),)](ids, step, hashes, ids.numel(), BLOCK=1024)
    return hashes


def _keys(scores: torch.Tensor, ids: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The domain, and below it the bits of the scores' places in its range by turns (Morton order)."""
    width = _KEY_BITS - max(1, low.shape[0] - 1).bit_length()
    bits = min(10, max(1, width // scores.shape[1]))
    used = min(scores.shape[1], width // bits)
    places = []
    for n in range(used):
        share = (scores[:, n] - low[ids, n]) / (high[ids, n] - low[ids, n]).clamp(min=torch.finfo(torch.float32).tiny)
        places.append((share * (1 << bits)).long().clamp(0, (1 << bits) - 1))
    keys = ids.clone()
    for shift in range(bits - 1, -1, -1):
        for place in places:
            keys = (keys << 1) | ((place >> shift) & 1)
    return keys


def _in_blocks(
    order: torch.Tensor,
    scores: torch.Tensor,
    ids: torch.Tensor,
    tokens: torch.Tensor,
    hashes: torch.Tensor,
    n_domains: int,
) -> Blocks:
    """Documents ``order`` [k], sorted by domain, in blocks."""
    documents = torch.bincount(ids[order], minlength=n_domains)
    n_blocks = (documents + _BLOCK - 1) // _BLOCK
    shift = (torch.cumsum(n_blocks, 0) - n_blocks) * _BLOCK - (torch.cumsum(documents, 0) - documents)
    place = torch.arange(order.numel(), device=order.device) + shift[ids[order]]
    size = int(n_blocks.sum()) * _BLOCK

    def laid_out(column: torch.Tensor, fill: float) -> torch.Tensor:
        out = column.new_full((size, *column.shape[1:]), fill)
        out[place] = column[order]
        return out

    columns = laid_out(scores, torch.inf).reshape(-1, _BLOCK, scores.shape[1]).transpose(1, 2).contiguous()
    rows = order.new_full((size,), -1)
    rows[place] = order
    domain = torch.repeat_interleave(torch.arange(n_domains, device=ids.device), n_blocks)
    best = columns.amin(2)
    columns[columns.isinf()] = 0.0  # no weight of 0 shall make a NaN of what fills up
    return Blocks(columns, best, domain, laid_out(tokens, 0), laid_out(hashes, -1), rows)
