"""The artifact of one trained model, and many of them as tables of losses and learning curves."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from quadmix_plugin.errors import QuadmixError
from quadmix_plugin.proxy.training import TrainResult
from quadmix_plugin.proxy.validation import ValidationSet
from quadmix_plugin.store import Step

LOSS_PREFIX, BITS_PREFIX = "loss_", "bpb_"
PARTS = "proxies/parts/"
DRAW, PROPOSAL, REPEAT, BASELINE, MIXTURE = "draw", "proposal", "repeat", "baseline", "mixture"
"""Kinds of proxies: of a θ as drawn, of one that a fit proposed, of a drawn one once more under another seed, of a
selection without θ, and of random documents in given shares of the domains."""

_NATS_PER_BIT = float(np.log(2.0))


def part_path(proxy: int, parts: str = PARTS) -> str:
    """The artifact of one proxy."""
    return f"{parts}{int(proxy):06d}.json"


def measured(result: TrainResult, sets: Sequence[ValidationSet]) -> dict[str, Any]:
    """What a part says of its training: losses in nats per token and in bits per byte, and the learning curve."""
    bits = {
        each.task: result.losses[each.task] * each.n_targets / each.n_bytes / _NATS_PER_BIT
        for each in sets
        if each.n_bytes
    }
    return {
        "losses": result.losses,
        "bits_per_byte": bits,
        "tokens_seen": result.tokens_seen,
        "share": result.share,
        "unigram_entropy": result.unigram_entropy,
        "learnt": result.learnt,
        "curve": [asdict(point) for point in result.curve],
    }


def to_do(step: Step, path: str, session: str) -> bool:
    """Whether a part is missing, or failed in another session for a cause that need not lie in its θ."""
    if step.entry(path) is None:
        return True
    part = step.read_json(path)
    return "failure" in part and not part.get("final", False) and part.get("session") != session


def flat_row(part: dict[str, Any]) -> dict[str, Any]:
    """A part as one row of a table: its plain values, ``loss_<task>`` and ``bpb_<task>`` for each task."""
    plain = {key: value for key, value in part.items() if not isinstance(value, dict | list)}
    return {**plain, **_columns(LOSS_PREFIX, part.get("losses")), **_columns(BITS_PREFIX, part.get("bits_per_byte"))}


def merge_parts(
    step: Step,
    paths: Sequence[str],
    keys: Sequence[str],
    final: Callable[[dict[str, Any]], dict[str, Any]] = lambda part: part,
) -> tuple[pa.Table, pa.Table, dict[str, str]]:
    """Losses, learning curves, and failures (path → reason) of these parts; ``keys`` name a row in the curves.

    ``final`` may change a part before its losses become a row.

    Raises:
        QuadmixError: a part is missing, or none of them succeeded.
    """
    parts = {path: step.read_json(path) for path in paths}
    failures = {path: part["failure"] for path, part in parts.items() if "failure" in part}
    whole = [part for path, part in parts.items() if path not in failures]
    if not whole:
        reason = next(iter(failures.values()), "there are none")
        raise QuadmixError(
            f"{step.root}: none of {len(parts)} models could be trained; the first: {reason}; run the same command "
            f"again once the cause is removed"
        )
    losses = pa.Table.from_pylist([flat_row(final(part)) for part in whole])
    unknown = _columns(LOSS_PREFIX, dict.fromkeys(whole[0]["losses"]))
    curves = [
        {**{key: part[key] for key in keys}, **unknown, **flat_row(point)} for part in whole for point in part["curve"]
    ]
    return losses, pa.Table.from_pylist(curves), failures


def _columns(prefix: str, values: dict[str, Any] | None) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in (values or {}).items()}
