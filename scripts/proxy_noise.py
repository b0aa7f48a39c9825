"""Prints what a run's proxies say of themselves as Markdown: noise, rank agreement, cost.

python scripts/proxy_noise.py RUN_DIR
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from quadmix_plugin.proxy.parts import REPEAT


def main() -> None:
    """Reads ``proxies/`` of a run directory."""
    parser = argparse.ArgumentParser(description="Noise report of a run's proxies, as Markdown.")
    parser.add_argument("run", type=Path)
    folder = parser.parse_args().run / "proxies"
    noise, fidelity = (json.loads((folder / f"{name}.json").read_text()) for name in ("noise", "fidelity"))
    losses = pq.read_table(folder / "losses.parquet").to_pandas()
    drawn = losses[losses["kind"] == "draw"]
    print(_overview(losses, drawn), "\n")
    _print_table(
        ("task", "mean loss", "bits per byte", "sd across θ", "sd over seeds (95 %)", "signal to noise", "reliability"),
        [_noise_row(task, drawn, noise[task]) for task in noise],
    )
    shares = sorted({share for by_share in fidelity["agreement"].values() for share in by_share}, key=float)
    _print_table(
        ("task", *(f"{float(share):.0%} of the tokens" for share in shares)),
        [(task, *(_number(by.get(share), ".2f") for share in shares)) for task, by in fidelity["agreement"].items()],
    )
    tasks = list(noise)
    agreement = drawn[[f"loss_{task}" for task in tasks]].corr(method="spearman").to_numpy()
    _print_table(
        ("rank correlation across θ", *tasks),
        [(task, *(f"{value:.2f}" for value in row)) for task, row in zip(tasks, agreement, strict=True)],
    )


def _overview(losses: Any, drawn: Any) -> str:
    thetas, repeats = len(drawn), int((losses["kind"] == REPEAT).sum())
    rate = losses["tokens_seen"] / losses["seconds"]
    return (
        f"{thetas} θ and {repeats} repeats, {int(drawn['tokens_seen'].median()):,} tokens each; "
        f"{losses['seconds'].median():.1f} s each (median, evaluation included; {rate.median():,.0f} tokens/s); "
        f"epochs {drawn['epochs'].min():.2f} to {drawn['epochs'].max():.2f}, median {drawn['epochs'].median():.2f}."
    )


def _noise_row(task: str, drawn: Any, found: dict[str, Any]) -> tuple[str, ...]:
    interval = f"{found['noise_sd']:.4f} ({found['noise_sd_low']:.4f}–{found['noise_sd_high']:.4f})"
    return (
        task,
        f"{drawn[f'loss_{task}'].mean():.3f}",
        f"{drawn[f'bpb_{task}'].mean():.3f}",
        f"{found['theta_sd']:.4f}",
        interval,
        _number(found["signal_to_noise"], ".2f"),
        f"{found['reliability']:.2f}",
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or np.isnan(value) else format(value, form)


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    print("|", " | ".join(header), "|")
    print("|" + "---|" * len(header))
    for row in rows:
        print("|", " | ".join(row), "|")
    print()


if __name__ == "__main__":
    main()
