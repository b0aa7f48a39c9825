"""The quickstart corpus, many times over, through label, normalise, select and export within a limit of memory.

A part of benchmarks/scaling.py. Every copy has ids and a last line of its own; scores are two columns of the corpus
and, if asked, a fastText model. The run is an ordinary ``quadmix run`` in a process of its own; all its processes are
watched, and ended when together they hold more than the limit.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from quadmix_plugin.parameters import ParameterSpace, sample_parameters

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
COLUMN_SCORERS = ("words", "chance")
FASTTEXT = "dclm-fasttext"
STEPS = ("label", "normalise", "select", "export")


def write_corpus(folder: Path, documents: int) -> int:
    """Whole copies of the corpus, a file each, until there are so many documents; returns how many there are."""
    folder.mkdir(parents=True)
    table = pq.read_table(QUICKSTART / "corpus.parquet", columns=["doc_id", "text", "true_domain"])
    words = pc.count_substring(table["text"], " ").cast(pa.float32())
    copies = -(-documents // table.num_rows)
    for copy in range(copies):
        columns = {
            "doc_id": pc.binary_join_element_wise(table["doc_id"].cast(pa.string()), str(copy), "-"),
            "text": pc.binary_join_element_wise(table["text"], f"Copy {copy}.", "\n\n"),
            "domain": table["true_domain"],
            "words": words,
            "chance": np.random.default_rng(copy).random(table.num_rows, dtype=np.float32),
        }
        pq.write_table(pa.table(columns), folder / f"copy-{copy:05d}.parquet", compression="zstd")
    return copies * table.num_rows


def write_recipe(folder: Path, fasttext: bool, estimate: bool, memory_limit: str) -> Path:
    """A recipe over ``folder``/corpus with parameters that are given, so that nothing is trained."""
    scorers: dict[str, dict[str, str]] = {name: {"scorer": "column", "column": name} for name in COLUMN_SCORERS}
    if fasttext:
        scorers[FASTTEXT] = {"model": str(QUICKSTART / "models" / FASTTEXT)}
    domains = tuple(
        sorted(pq.read_table(QUICKSTART / "corpus.parquet", columns=["true_domain"])[0].unique().to_pylist())
    )
    space = ParameterSpace(omega_max=0.1)
    names = tuple(scorers)
    theta = sample_parameters(1, len(names), len(domains), seed=0, space=space, domains=domains, scorers=names)[0]
    theta.save(folder / "theta.json")
    recipe = {
        "name": "soak",
        "corpus": {"path": "corpus", "id": "doc_id", "documents_per_shard": 2_000},
        "tokenizer": {"model": str(QUICKSTART / "models" / "tokenizer"), "estimate": estimate},
        "domain": {"classifier": "column", "column": "domain"},
        "scorers": scorers,
        "validation": {"path": str(QUICKSTART / "validation.jsonl")},
        "select": {"theta": "theta.json"},
        "executor": {"name": "dask", "workers": 2, "memory_limit": memory_limit, "device": "cpu"},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


@dataclass
class Watched:
    """What the processes of a run held: bytes at the peaks of their sums, and of each kind of process."""

    limit: int
    peak_pss: int = 0
    peak_uss: int = 0
    peak_rss: int = 0
    of_kind: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    over: bool = False

    def look(self, root: psutil.Process) -> None:
        """Adds up the processes below ``root`` as they are now."""
        pss = uss = rss = 0
        for process in [root, *root.children(recursive=True)]:
            try:
                memory, kind = process.memory_full_info(), _kind(process, root)
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
                continue
            pss, uss, rss = pss + memory.pss, uss + memory.uss, rss + memory.rss
            self.of_kind[kind] = max(self.of_kind.get(kind, 0), memory.pss)
        self.peak_pss, self.peak_uss = max(self.peak_pss, pss), max(self.peak_uss, uss)
        self.peak_rss = max(self.peak_rss, rss)
        self.samples += 1
        self.over = self.over or pss > self.limit


def _kind(process: psutil.Process, root: psutil.Process) -> str:
    if process.pid == root.pid:
        return "driver and scheduler"
    words = " ".join(process.cmdline())
    return "fasttext" if "fasttext_child" in words else "resource tracker" if "resource_tracker" in words else "worker"


def watch(command: Sequence[str], limit: int, log: Path, interval_s: float = 0.5) -> tuple[int, Watched]:
    """Runs a command to its end or to the limit of memory; its exit code and what was seen."""
    watched = Watched(limit)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603
        root = psutil.Process(process.pid)
        try:
            while process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    watched.look(root)
                if watched.over:
                    _end(root)
                time.sleep(interval_s)
        finally:
            _end(root)
    return process.wait(), watched


def _end(root: psutil.Process) -> None:
    if not root.is_running():
        return
    for process in [*root.children(recursive=True), root]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def soak(
    folder: Path, documents: int, limit_gib: float, fasttext: bool, estimate: bool, memory_limit: str
) -> dict[str, Any]:
    """Makes the corpus if it is not there, runs the steps under the limit, and says what they took."""
    corpus, out = folder / "corpus", folder / "run"
    if not corpus.exists():
        write_corpus(corpus, documents)
    n = sum(pq.read_metadata(path).num_rows for path in corpus.glob("*.parquet"))
    recipe = write_recipe(folder, fasttext, estimate, memory_limit)
    command = [
        sys.executable,
        "-m",
        "quadmix_plugin",
        "run",
        str(recipe),
        "--out",
        str(out),
        "--until",
        "export",
        "--json",
    ]
    started, core = time.monotonic(), _core_s_of_children()
    code, watched = watch(command, int(limit_gib * 2**30), folder / "log.txt")
    wall, core = time.monotonic() - started, _core_s_of_children() - core
    made: dict[str, Any] = {
        "documents": n,
        "scorers": [*COLUMN_SCORERS, *([FASTTEXT] if fasttext else [])],
        "tokens": "estimated" if estimate else "counted",
        "completed": code == 0,
        "over_the_limit": watched.over,
        "limit_gib": limit_gib,
        "wall_s": round(wall, 1),
        "core_s": round(core, 1),
        "peak_mib": {
            "pss": watched.peak_pss >> 20, "uss": watched.peak_uss >> 20, "rss": watched.peak_rss >> 20,
            "largest_of_kind_pss": {kind: size >> 20 for kind, size in sorted(watched.of_kind.items())},
        },
        "samples": watched.samples,
        "corpus_mib": _size(corpus) >> 20,
    }  # fmt: skip
    if code:
        return {**made, "exit_code": code, "log": (folder / "log.txt").read_text(encoding="utf-8")[-2000:]}
    steps = json.loads((out / "provenance.json").read_text(encoding="utf-8"))["steps"]
    made["steps"] = {
        name: {
            "seconds": steps[name]["seconds"],
            "documents_per_s": round(n / steps[name]["seconds"]),
            "mib_on_disk": sum(_size(out / place) for place in _PLACES[name]) >> 20,
        }
        for name in STEPS
    }
    return made


_PLACES = {"label": ["labels"], "normalise": ["normalise"], "select": ["selection"], "export": ["tokens"]}


def _core_s_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
