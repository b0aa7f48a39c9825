"""Many things a portion at a time, so that what is made of them is never held as a whole."""

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item", bound=Sized)


def portions(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in order, each portion ended by the item with which their lengths reach ``size``; none is empty."""
    portion: list[Item] = []
    held = 0
    for item in items:
        portion.append(item)
        held += len(item)
        if held >= size:
            yield portion
            portion, held = [], 0
    if portion:
        yield portion
