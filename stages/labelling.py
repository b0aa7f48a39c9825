"""What the label stages share: reading one column of a batch, adding one, and a plug-in that travels light.

It labels nothing itself; plug-ins do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from nemo_curator.stages.resources import Resources
from nemo_curator.tasks import DocumentBatch

from quadmix_plugin import registry
from quadmix_plugin.errors import InputError
from quadmix_plugin.models import choose_device, is_local


@dataclass
class PluginHandle:
    """A plug-in by name and options; made at once, so that mistakes show, and set up where it is used.

    Pickled or copied, it carries name and options only: models are loaded again on the other side.
    """

    group: str
    plugin_name: str
    options: dict[str, Any]
    device: str = "auto"
    plugin: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._create()
        wants_gpu = getattr(self.plugin, "uses_gpu", True)
        self.device = choose_device(self.device) if wants_gpu or self.device != "auto" else "cpu"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("plugin", "_ready")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._create()

    def _create(self) -> None:
        self.plugin = registry.create(self.group, self.plugin_name, self.options)
        self._ready = False

    @property
    def resources(self) -> Resources:
        """One core, and one GPU where the plug-in uses it."""
        on_gpu = self.device.startswith("cuda") and getattr(self.plugin, "uses_gpu", True)
        return Resources(cpus=1.0, gpus=1.0 if on_gpu else 0.0)

    @property
    def is_here(self) -> bool:
        """Whether the plug-in's model is on this machine, or it has none."""
        model = getattr(self.plugin, "model", None)
        return model is None or is_local(str(model))

    def facts(self) -> dict[str, Any]:
        """Name, origin and options of the plug-in, and what it says of itself (its ``facts``, where it has any)."""
        said = self.plugin.facts() if hasattr(self.plugin, "facts") else {}
        return {
            "plugin": self.plugin_name,
            **registry.origin(self.group, self.plugin_name),
            "higher_is_better": getattr(self.plugin, "higher_is_better", None),
            "options": {**self.options, **said},
        }

    def input_column(self, text_field: str) -> str:
        """The column that the plug-in reads: its own ``input_column``, or the text."""
        return getattr(self.plugin, "input_column", None) or text_field

    def download(self) -> None:
        """Lets the plug-in fetch what it needs, where it has such a step."""
        if hasattr(self.plugin, "download"):
            self.plugin.download()

    def check(self) -> None:
        """Lets the plug-in look at its model before the first document, where it can."""
        if hasattr(self.plugin, "check"):
            self.plugin.check()

    def ready(self) -> Any:
        """The plug-in, set up; loads its model the first time."""
        if not self._ready:
            self.plugin.setup(self.device)
            self._ready = True
        return self.plugin

    def unload(self) -> None:
        """Lets go of the model."""
        self._create()


def read_column(task: DocumentBatch, column: str) -> list[Any]:
    """The values of a column as Python objects, None for missing ones.

    Raises:
        InputError: no such column.
    """
    if column not in task.get_columns():
        raise InputError(f"{task.dataset_name}: no column {column!r}; found {', '.join(task.get_columns())}")
    if isinstance(task.data, pa.Table):
        return task.data[column].to_pylist()
    series = task.data[column]
    return [None if missing else value for value, missing in zip(series.tolist(), series.isna(), strict=True)]


def read_texts(task: DocumentBatch, column: str) -> list[str]:
    """A text column; a missing text counts as empty, so that one row does not end a batch.

    Raises:
        InputError: no such column, or a value that is not text.
    """
    values = read_column(task, column)
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{column}: row {i} is {type(value).__name__} {value!r}; this column must hold text")
    return [value or "" for value in values]


def with_column(task: DocumentBatch, name: str, values: Sequence[Any] | np.ndarray, kind: pa.DataType) -> DocumentBatch:
    """The batch with one more column, or that column replaced; Arrow stays Arrow, and pandas its kind of columns."""
    data: Any = task.data
    if isinstance(data, pa.Table):
        column = pa.array(values, type=kind)
        if name in data.column_names:
            data = data.set_column(data.column_names.index(name), name, column)
        else:
            data = data.append_column(name, column)
    else:
        arrow = any(isinstance(dtype, pd.ArrowDtype) for dtype in data.dtypes)
        dtype = pd.ArrowDtype(kind) if arrow else ("str" if pa.types.is_string(kind) else kind.to_pandas_dtype())
        data = data.assign(**{name: pd.Series(values, index=data.index, dtype=dtype)})
    return DocumentBatch(
        dataset_name=task.dataset_name, data=data, _metadata=task._metadata, _stage_perf=list(task._stage_perf)
    )
