"""Two tables for ``quadmix fit``, inputs and losses: read, checked and joined on a key, never by the place of a row.

Every fault is an ``InputError`` that names file, rows and columns. Any CSV or Parquet file will do; a run's
``proxies/thetas.parquet`` and ``proxies/losses.parquet`` are known by their columns.
"""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from quadmix_plugin.errors import InputError
from quadmix_plugin.proxy.parts import DRAW, LOSS_PREFIX, PROPOSAL

Array = NDArray[np.float64]

KEYS = ("index", "id", "proxy")
FEWEST_ROWS = 8
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Side:
    """One table: its numeric columns ``values`` [n, c], NaN where empty, and the key of each row as text.

    ``of_run``: it is an artifact of a run, in which failed proxies have no row of losses.
    """

    path: Path
    key: str
    keys: list[str]
    names: tuple[str, ...]
    values: Array
    of_run: bool

    def take(self, rows: Sequence[int] | NDArray[Any]) -> "Side":
        """These rows."""
        picked = [self.keys[int(row)] for row in rows]
        return Side(self.path, self.key, picked, self.names, self.values[np.asarray(rows, dtype=np.intp)], self.of_run)


@dataclass(frozen=True, eq=False)
class FitRows:
    """Rows with features ``x`` [n, f] and finite losses (target → [n]), in the order of their keys.

    ``failed``: keys of rows without any loss; ``unmatched``: keys of rows of features that have no row of losses.
    """

    key: str
    keys: list[str]
    names: tuple[str, ...]
    x: Array
    losses: dict[str, Array]
    failed: list[str]
    unmatched: list[str]


def read_pair(features: Path, losses: Path) -> tuple[Side, Side]:
    """Both tables, with the key that they share.

    Raises:
        InputError: a file that is absent or no table, no shared key, keys that are missing or occur twice, text among
            numbers, no numeric column, or a column that is in both tables.
    """
    tables = [_read(path) for path in (features, losses)]
    key = _shared_key(tables, (features, losses))
    sides = [
        _side(path, table, key, of_losses=i == 1)
        for i, (path, table) in enumerate(zip((features, losses), tables, strict=True))
    ]
    if both := [name for name in sides[0].names if name in sides[1].names]:
        raise InputError(
            f"{features} and {losses}: {_some(both)} in both tables, so a loss would be predicted from itself; leave "
            f"it out of one"
        )
    return sides[0], sides[1]


def choose_targets(names: Sequence[str], wanted: Sequence[str], path: Path) -> list[str]:
    """The loss columns that ``wanted`` names, each exactly or by a part that no other has; all without ``wanted``.

    Raises:
        InputError: a name that fits no column, with the nearest, or several, with all of them.
    """
    chosen = []
    for name in wanted:
        fitting = [name] if name in names else [column for column in names if name in column]
        if not fitting:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise InputError(f"{path}: no column of losses {name!r}; did you mean {near[0]!r}?")
        if len(fitting) > 1:
            raise InputError(f"{path}: --target {name!r} is a part of {', '.join(fitting)}; give more of the name")
        chosen += fitting
    return list(dict.fromkeys(chosen)) or list(names)


def join(features: Side, losses: Side, targets: Sequence[str], *, drop_unmatched: bool = False) -> FitRows:
    """Rows that have both, checked.

    A row of which no loss is there is a failed proxy. So is a θ of a run without a row of losses.

    Raises:
        InputError: rows without their counterpart, features that are not finite, some losses of a row missing, equal
            losses throughout, two rows of equal features, or fewer than 8 rows.
    """
    place = {key: row for row, key in enumerate(features.keys)}
    if lost := [key for key in losses.keys if key not in place]:
        raise InputError(
            f"{losses.path}: rows {features.key} {_some(lost)} have no features in {features.path}; add or remove them"
        )
    known = set(losses.keys)
    unmatched = [key for key in features.keys if key not in known]
    if unmatched and not (drop_unmatched or losses.of_run):
        raise InputError(
            f"{features.path}: rows {features.key} {_some(unmatched)} have no losses in {losses.path}; add them, or "
            f"leave them out with --drop-unmatched"
        )
    order = _ordered(losses.keys)
    losses = losses.take(order)
    features = features.take([place[key] for key in losses.keys])
    whole = np.asarray(np.isfinite(losses.values).any(axis=1))
    failed = [key for key, there in zip(losses.keys, whole, strict=True) if not there]
    features, losses = features.take(np.flatnonzero(whole)), losses.take(np.flatnonzero(whole))
    if losses.of_run:
        failed, unmatched = [*failed, *unmatched], []
    _require_finite(features, features.names, "features")
    _require_finite(losses, targets, "losses")
    columns = {target: losses.values[:, losses.names.index(target)] for target in targets}
    return FitRows(features.key, features.keys, features.names, features.values, columns, failed, unmatched)


def require_learnable(rows: FitRows, folds: int, features: Path, losses: Path) -> None:
    """Refuses rows that nothing can be learned from, or that cannot be split into folds.

    Raises:
        InputError: fewer rows than ``folds`` or 8, equal losses throughout, or two rows of equal features.
    """
    n = len(rows.keys)
    if n < max(folds, FEWEST_ROWS):
        raise InputError(
            f"{features}: {n} rows with losses ({len(rows.failed)} failed, {len(rows.unmatched)} without a row of "
            f"losses); at least {max(folds, FEWEST_ROWS)} are needed"
        )
    if equal := [name for name, y in rows.losses.items() if np.ptp(y) == 0.0]:
        value = rows.losses[equal[0]][0]
        raise InputError(
            f"{losses}: all {n} rows have the same {_some(equal)} ({value:g}); there is nothing to learn, name other "
            f"columns with --target"
        )
    groups: dict[bytes, list[str]] = {}
    for key, row in zip(rows.keys, rows.x + 0.0, strict=True):  # -0.0 becomes 0.0
        groups.setdefault(row.tobytes(), []).append(key)
    if twice := [keys for keys in groups.values() if len(keys) > 1]:
        raise InputError(
            f"{features}: rows {rows.key} {_some(twice[0])} have the same features"
            + (f", and so have {len(twice) - 1} other groups" if len(twice) > 1 else "")
            + "; keep one row of each with the mean of their losses"
        )


def require_same_corpus(rows: FitRows, sides: tuple[Side, Side]) -> tuple[Side, Side]:
    """The test tables, their columns in the order of the training rows'.

    Raises:
        InputError: other features, or targets that the test losses lack.
    """
    features, losses = sides
    for side, expected, exact in ((features, rows.names, True), (losses, tuple(rows.losses), False)):
        lacking = [name for name in expected if name not in side.names]
        more = [name for name in side.names if name not in expected] if exact else []
        if lacking or more:
            parts = [f"lacks {_some(lacking)}"] if lacking else []
            parts += [f"has {_some(more)} besides"] if more else []
            raise InputError(
                f"{side.path}: a table of another corpus: it {' and '.join(parts)}; give the columns of the training "
                f"table"
            )
    places = [features.names.index(name) for name in rows.names]
    ordered = Side(features.path, features.key, features.keys, rows.names, features.values[:, places], features.of_run)
    return ordered, losses


def require_unseen(train: FitRows, test: FitRows, path: Path) -> None:
    """Refuses test rows whose features are those of a training row.

    Raises:
        InputError: there are some, which would make the metrics too good; or fewer than three test rows, or equal
            test losses.
    """
    seen = {row.tobytes() for row in train.x + 0.0}
    if again := [key for key, row in zip(test.keys, test.x + 0.0, strict=True) if row.tobytes() in seen]:
        raise InputError(f"{path}: rows {test.key} {_some(again)} have the features of training rows; remove them")
    flat = [name for name, y in test.losses.items() if y.size < 3 or np.ptp(y) == 0.0]  # nothing to rank
    if flat:
        raise InputError(f"{path}: {len(test.keys)} test rows, {_some(flat)} equal; give at least 3 different ones")


def read_prior(path: Path, names: Sequence[str]) -> Array:
    """The prior of mixtures, one number per column: a JSON list, or an object by column (or as its ``prior``).

    Raises:
        InputError: no such file, no JSON, or other columns.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the prior as JSON") from None
    except ValueError as error:
        raise InputError(f"{path}: no JSON ({error}); give a list of numbers or an object by column") from None
    if isinstance(content, dict) and isinstance(content.get("prior"), dict | list):
        content = content["prior"]
    if isinstance(content, dict):
        lacking, more = [n for n in names if n not in content], [n for n in content if n not in names]
        if lacking or more:
            raise InputError(
                f"{path}: the prior lacks {_some(lacking)} and has {_some(more)} besides; name each column"
            )
        content = [content[name] for name in names]
    if not isinstance(content, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in content):
        raise InputError(f"{path}: the prior is {str(content)[:80]}; give {len(names)} numbers")
    return np.array(content, dtype=np.float64)


def _read(path: Path) -> pa.Table:
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise InputError(f"{path}: neither .csv nor .parquet by its name; give a CSV or Parquet file")
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        if suffix == ".csv":
            return pyarrow.csv.read_csv(path)
        return pq.read_table(path, partitioning=None)  # pyright: ignore[reportArgumentType] # no columns from the path
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]}); check the file") from None


def _shared_key(tables: Sequence[pa.Table], paths: Sequence[Path]) -> str:
    shared = [name for name in tables[0].column_names if name in tables[1].column_names]
    for name in KEYS:
        if name in shared:
            return name
    if len(shared) == 1:
        return shared[0]
    found = (
        f"shared are {', '.join(shared)}"
        if shared
        else f"columns are {_some(tables[0].column_names)} and {_some(tables[1].column_names)}"
    )
    raise InputError(f"{paths[0]} and {paths[1]}: no column to join on ({found}); add a column 'index' or 'id' to both")


def _side(path: Path, table: pa.Table, key: str, of_losses: bool) -> Side:
    of_run = "kind" in table.column_names and (
        any(name.startswith(LOSS_PREFIX) for name in table.column_names) if of_losses else "theta" in table.column_names
    )
    if of_run:
        kinds = table["kind"].to_pylist()
        table = table.filter(pa.array([kind in (DRAW, PROPOSAL) for kind in kinds]))
    if len(set(table.column_names)) < table.num_columns:
        twice = [name for name, count in Counter(table.column_names).items() if count > 1]
        raise InputError(f"{path}: columns {_some(twice)} occur twice; rename them")
    keys = _keys(path, key, table[key].to_pylist())
    if of_run and not of_losses:
        thetas = table["theta"].to_pylist()
        if len({len(theta or ()) for theta in thetas}) != 1:
            raise InputError(f"{path}: θ of several lengths, or none; give the table of one run")
        vectors = np.array(thetas, dtype=np.float64)
        return Side(path, key, keys, tuple(f"theta[{i}]" for i in range(vectors.shape[1])), vectors, True)
    columns = {}
    for name in table.column_names:
        if name == key or (of_run and not name.startswith(LOSS_PREFIX)):
            continue
        values = _numbers(path, name, table[name], key, keys)
        if values is not None:
            columns[name] = values
    if not columns:
        raise InputError(f"{path}: no numeric column besides {key!r}; give {'losses' if of_losses else 'features'}")
    return Side(path, key, keys, tuple(columns), np.stack(list(columns.values()), axis=1), of_run)


def _keys(path: Path, key: str, values: list[Any]) -> list[str]:
    if empty := [str(row + 1) for row, value in enumerate(values) if value is None or str(value) in ("", "nan")]:
        raise InputError(f"{path}: rows {_some(empty)} (counted from 1) have no {key!r}; give each a key")
    keys = [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values]
    if twice := [name for name, count in Counter(keys).items() if count > 1]:
        raise InputError(f"{path}: {key} {_some(twice)} occur more than once; keep one row of each")
    return keys


def _numbers(path: Path, name: str, column: pa.ChunkedArray, key: str, keys: list[str]) -> Array | None:
    """A column as float64, NaN where empty; None where it holds no numbers but text."""
    kind = column.type
    if pa.types.is_null(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind):
        return np.array([np.nan if v is None else float(v) for v in column.to_pylist()])
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return column.cast(pa.float64(), safe=False).to_numpy().astype(np.float64)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return None
    texts = column.to_pylist()
    words = [row for row, text in enumerate(texts) if text is not None and not _is_number(text)]
    if len(words) == sum(text is not None for text in texts):
        return None
    if not words:
        raise InputError(f"{path}: column {name!r} holds numbers as text; store it as numbers")
    raise InputError(
        f"{path}: column {name!r} is not numeric in rows {key} {_some(keys[row] for row in words)} "
        f"({texts[words[0]]!r}); give numbers, or leave a failed proxy's losses empty"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _require_finite(side: Side, names: Sequence[str], what: str) -> None:
    places = [side.names.index(name) for name in names]
    bad = ~np.isfinite(side.values[:, places])
    if not bad.any():
        return
    rows = [side.keys[int(row)] for row in np.flatnonzero(bad.any(axis=1))]
    columns = [names[int(place)] for place in np.flatnonzero(bad.any(axis=0))]
    value = side.values[:, places][bad][0]
    shown = "empty" if np.isnan(value) else f"{value:g}"
    raise InputError(
        f"{side.path}: {what} of rows {side.key} {_some(rows)} are missing or not finite in {_some(columns)} "
        f"({shown}); complete these rows or remove them"
    )


def _ordered(keys: Sequence[str]) -> list[int]:
    """Places of the keys in their order, by number where all are integers."""
    try:
        values: Sequence[Any] = [int(key) for key in keys]
    except ValueError:
        values = keys
    return sorted(range(len(keys)), key=values.__getitem__)


def _some(names: Iterable[str]) -> str:
    """The first of these names, and how many more there are."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more if listed else "none"
