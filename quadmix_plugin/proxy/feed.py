"""Batches of ids on the device that trains.

On a GPU they are gathered from the pool, which lies there if it fits; otherwise the host gathers and sends them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from quadmix_plugin.proxy.pieces import Epoch, Pieces
from quadmix_plugin.proxy.pool import TokenPool

if TYPE_CHECKING:
    import torch

    from quadmix_plugin.proxy.training import PieceSource

_BLOCK = 1 << 22  # ids gathered at once on the host
_SHARE = 0.25  # of the free memory of a GPU that the pool may take
_RESIDENT: "WeakKeyDictionary[TokenPool, dict[torch.device, torch.Tensor]]" = WeakKeyDictionary()


def batches(pieces: "PieceSource", batch_size: int, device: "torch.device") -> Iterator["torch.Tensor"]:
    """The pieces in their order, ``batch_size`` at a time, as int64 [b, context + 1] on ``device``."""
    if isinstance(pieces, Pieces) and device.type == "cuda" and _fits(pieces.pool, device):
        return resident_batches(pieces, batch_size, device)
    return _sent_batches(pieces, batch_size, device)


def resident_batches(pieces: Pieces, batch_size: int, device: "torch.device") -> Iterator["torch.Tensor"]:
    """As ``batches``, gathered on the device; the pool goes there once for all the proxies of a process."""
    import torch

    ids = _resident(pieces.pool, device)
    offsets = torch.arange(pieces.context + 1, device=device)
    epoch: Epoch | None = None
    ends = shift = begins = offsets
    for start in range(0, len(pieces), batch_size):
        index = np.arange(start, min(start + batch_size, len(pieces)))
        parts = []
        for number in np.unique(index // pieces.per_epoch):
            if epoch is not (now := pieces.epoch(int(number))):
                epoch = now
                begin_in_stream = epoch.ends - pieces.pool.lengths[epoch.stream]
                ends = torch.from_numpy(epoch.ends).to(device)
                shift = torch.from_numpy(pieces.pool.starts[epoch.stream] - begin_in_stream).to(device)
                begins = torch.from_numpy(epoch.begins).to(device)
            here = index[index // pieces.per_epoch == number] % pieces.per_epoch
            positions = begins[int(here[0]) : int(here[-1]) + 1, None] + offsets
            parts.append(ids[positions + shift[torch.searchsorted(ends, positions, right=True)]])
        batch = torch.cat(parts).long()
        yield batch & 0xFFFF if ids.dtype == torch.int16 else batch


def _sent_batches(pieces: "PieceSource", batch_size: int, device: "torch.device") -> Iterator["torch.Tensor"]:
    import torch

    width = pieces[0:1].shape[1]
    block = max(_BLOCK // width // batch_size, 1) * batch_size
    for start in range(0, len(pieces), block):
        gathered = np.ascontiguousarray(pieces[start : start + block].astype(np.int32))
        there = torch.from_numpy(gathered).to(device)
        for first in range(0, len(gathered), batch_size):
            yield there[first : first + batch_size].long()


def _fits(pool: TokenPool, device: "torch.device") -> bool:
    import torch

    mine = torch.cuda.get_per_process_memory_fraction(device)  # less than all where proxies share the GPU
    free, whole = torch.cuda.mem_get_info(device)
    return device in _RESIDENT.get(pool, {}) or pool.n_bytes <= _SHARE * min(free, mine * whole)


def _resident(pool: TokenPool, device: "torch.device") -> "torch.Tensor":
    """All ids of the pool on the device: int16 holding unsigned ids, or int32, as the files do."""
    import torch

    held = _RESIDENT.setdefault(pool, {})
    if device not in held:
        signed = np.int16 if pool.dtype.itemsize == 2 else np.int32
        ids = torch.empty(
            int(pool.lengths.sum()), dtype=torch.int16 if signed is np.int16 else torch.int32, device=device
        )
        first = 0
        for file in pool.files:
            ids[first : first + file.tokens.size] = torch.from_numpy(np.array(file.tokens).view(signed)).to(device)
            first += file.tokens.size
        held[device] = ids
    return held[device]
