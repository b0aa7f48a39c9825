"""Changes one place of nested data: bytes changed at random seldom reach what lies behind a parser."""

import copy
import random
from typing import Any

HOSTILE = (
    *(None, True, False, 0, -1, 1, 2, 4096, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**40, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", " ", ".", "..", "/", "../x", "/etc/passwd", "a\0b", "a\nb", "\ud800", "\u202e"),
    *("x" * 129, "x" * 300, "a/" * 300 + "b", "[", "*", "?", "://", "tls://[::1", "http://a:b@c", "%2e", "🙂", "1e999"),
    *([], {}, [[]], [None], {"": 0}, {"a": {"a": {}}}, ["a", "a"], [0] * 300, {"\ud800": 1}),
)


def changed(content: Any, generator: random.Random) -> Any:
    """A copy with one value replaced, removed, doubled or wrapped, one key renamed, or two values swapped."""
    root = [copy.deepcopy(content)]
    places = list(_places(root))
    holder, key = generator.choice(places)
    value = holder[key]
    match generator.randrange(7 if isinstance(holder, dict) else 6):
        case 0:
            holder[key] = [value]
        case 1:
            holder[key] = {"a": value}
        case 2:
            other, at = generator.choice(places)
            holder[key] = copy.deepcopy(other[at])
        case 3 if holder is not root:
            del holder[key]
        case 6:
            text = str(key)
            at = generator.randrange(len(text) + 1)
            names = (text[:at] + text[at + 1 :], text[:at] + "x" + text[at:], "0", "é", "")
            holder[generator.choice(names)] = holder.pop(key)
        case _:
            holder[key] = generator.choice(HOSTILE)
    return root[0] if root else None


def _places(holder: Any) -> Any:
    """Every container with every key or index in it."""
    for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
        yield holder, key
        if isinstance(value, dict | list):
            yield from _places(value)
