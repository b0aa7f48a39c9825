"""Small fastText models for tests, trained by fastText itself in another process."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_PROGRAM = """
import json, sys, fasttext
for path, text, options, quantise in json.load(sys.stdin):
    model = fasttext.train_supervised(text, thread=1, verbose=0, **options)
    if quantise is not None:
        model.quantize(text, **quantise)
    model.save_model(path)
"""


def train(folder: Path, models: Mapping[str, tuple[str, dict[str, Any], dict[str, Any] | None]]) -> dict[str, Path]:
    """Trains each of ``name: (text, options, options of quantising or None)``; the files."""
    jobs = []
    for name, (text, options, quantise) in models.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        jobs.append((str(folder / f"{name}.bin"), str(folder / f"{name}.txt"), options, quantise))
    # fastText leaves weights of small models as the memory is; with this the C library hands out zeros.
    environment = {**os.environ, "MALLOC_PERTURB_": "255"}
    subprocess.run([sys.executable, "-c", _PROGRAM], input=json.dumps(jobs), text=True, env=environment, check=True)
    return {name: folder / f"{name}.bin" for name in models}


def labelled_lines(labels: int, lines: int, words: int = 300) -> str:
    """Training text: each label has ten words of its own among ``words``."""
    rng = np.random.default_rng(0)
    text = []
    for label in rng.integers(labels, size=lines):
        own = (7 * label + rng.integers(10, size=12)) % words
        text.append(f"__label__{label} {' '.join(f'w{i}' for i in own)}\n")
    return "".join(text)
