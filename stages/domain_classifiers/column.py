"""A domain that the corpus already has: another tool's label, a source name, a folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quadmix_plugin.errors import InputError


@dataclass
class ColumnDomain:
    """Takes a column as the domain label, such as ``domain_pred`` of Curator's own classifier.

    Args:
        column: the column's name; its values are taken as text.

    Raises:
        InputError: a value that is missing or empty.
    """

    name: ClassVar[str] = "column"
    uses_gpu: ClassVar[bool] = False

    column: str

    @property
    def input_column(self) -> str:
        """The column that ``classify`` is given."""
        return self.column

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def classify(self, texts: Sequence[Any]) -> list[str]:
        """The values of the column as text."""
        for i, value in enumerate(texts):
            if value is None or value != value or not str(value).strip():  # noqa: PLR0124 - NaN is not itself
                raise InputError(f"{self.column}: row {i} is {value!r}; every document needs a domain")
        return [str(value) for value in texts]
