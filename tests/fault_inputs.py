"""A corpus that is cut or has a flipped bit: what labelling makes of it, format by format.

Some formats cannot notice a flipped bit: JSON Lines without compression, and Parquet whose writer added no page
checksums. What is counted for those is how often it passes, and for the others that it never does.
"""

import gzip
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard
from faults import DOCUMENTS, Ended, command, contents, note, require, run_forked, scratch, warm_up, write_tiny_recipe

from quadmix_plugin.errors import QuadmixError


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(**options: Any) -> Callable[[list[dict[str, Any]], Path], None]:
    def write(rows: list[dict[str, Any]], path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=DOCUMENTS // 2, **options)

    return write


FORMATS: dict[str, tuple[str, Callable[[list[dict[str, Any]], Path], Any]]] = {
    "parquet": ("c.parquet", _parquet()),
    "parquet, zstd": ("c.parquet", _parquet(compression="zstd")),
    "parquet, page checksums": ("c.parquet", _parquet(write_page_checksum=True)),
    "parquet, uncompressed, page checksums": (
        "c.parquet",
        _parquet(compression="none", use_dictionary=False, write_page_checksum=True),
    ),
    "jsonl": ("c.jsonl", lambda rows, path: path.write_bytes(_lines(rows))),
    "jsonl.gz": ("c.jsonl.gz", lambda rows, path: path.write_bytes(gzip.compress(_lines(rows), mtime=0))),
    "jsonl.zst, checksum": (
        "c.jsonl.zst",
        lambda rows, path: path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(_lines(rows))),
    ),
}
"""Name → file name and how it is written."""

CHECKED = ("parquet, page checksums", "parquet, uncompressed, page checksums", "jsonl.gz", "jsonl.zst, checksum")
"""Formats with a checksum over every document."""


def damaged_corpora(number: int, seed: int, formats: tuple[str, ...] = tuple(FORMATS)) -> dict[str, Any]:
    """Cuts a file of every format, and flips one of its bits, ``number`` times each, and labels it."""
    warm_up()
    counts: dict[str, dict[str, int]] = {}
    faults: list[str] = []
    generator = random.Random(seed)  # noqa: S311
    with scratch() as folder:
        recipe = write_tiny_recipe(folder)
        rows = pq.read_table(folder / "corpus").to_pylist()
        for name in formats:
            path, wanted = _written(folder, recipe, rows, name)
            whole = path.read_bytes()
            for way in ("cut", "flip"):
                found = Counter[str]()
                for _ in range(number):
                    at = generator.randrange(1, len(whole))
                    changed = bytearray(whole[:at] if way == "cut" else whole)
                    if way == "flip":
                        changed[at] ^= 1 << generator.randrange(8)
                    path.write_bytes(changed)
                    ended = run_forked(_label, recipe, folder / "out")
                    outcome = _outcome(ended, path, folder / "out", wanted)
                    found[outcome] += 1
                    checked = name in CHECKED or (way == "cut" and name != "jsonl")
                    if outcome not in ("refused", "unnoticed, nothing differs") and (checked or outcome == "broken"):
                        faults.append(f"{name}: {way} at {at} of {len(whole)}: {outcome}: {ended.out[-700:]}")
                counts[f"{name}: {way}"] = dict(found)
                note({name: counts[f"{name}: {way}"]}, faults)
    return {"counts": counts, "faults": faults}


def _written(folder: Path, recipe: Path, rows: list[dict[str, Any]], name: str) -> tuple[Path, dict[str, str]]:
    """A corpus of this format in place of the recipe's, and the labels of it."""
    shutil.rmtree(folder / "corpus", ignore_errors=True)
    (folder / "corpus").mkdir()
    file, write = FORMATS[name]
    path = folder / "corpus" / file
    write(rows, path)
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content["corpus"]["path"] = str(path)
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    require(run_forked(_label, recipe, folder / "out"))
    return path, _labels(folder / "out")


def _labels(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(out).items() if name.startswith("labels/")}


def _label(recipe: Path, out: Path) -> None:
    """Labels into a new folder, errors and exit codes as the command line has them."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        command(recipe, out, ["label"])
    except QuadmixError as error:
        print(f"error: {error}")
        sys.exit(error.exit_code)


def _outcome(ended: Ended, path: Path, out: Path, wanted: dict[str, str]) -> str:
    if ended.code:
        said = ended.out.rpartition("error: ")[2]
        named = path.name in said or "ids occur more than once" in said  # two ids that a flipped bit made alike
        return "refused" if ended.code == 1 and "Traceback" not in ended.out and named else "broken"
    if (found := _labels(out)) == wanted:
        return "unnoticed, nothing differs"
    rows = sum(pq.read_metadata(out / name).num_rows for name in found)
    return "unnoticed, other labels" if rows == DOCUMENTS else "unnoticed, other number of rows"
