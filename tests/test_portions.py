"""Portions hold every item once, in order, and end where their lengths reach the size."""

from hypothesis import given
from hypothesis import strategies as st

from quadmix_plugin.portions import portions


@given(st.lists(st.text(max_size=9)), st.integers(1, 20))
def test_every_item_comes_once_and_a_portion_ends_where_it_is_full(items: list[str], size: int) -> None:
    found = list(portions(items, size))
    assert [item for portion in found for item in portion] == items
    assert all(found)
    lengths = [[len(item) for item in portion] for portion in found]
    assert all(sum(each[:-1]) < size for each in lengths)
    assert all(sum(each) >= size for each in lengths[:-1])


def test_no_more_is_taken_than_the_portion_needs() -> None:
    taken = []
    source = (taken.append(item) or item for item in ("ab", "cd", "ef"))
    assert next(portions(source, 4)) == ["ab", "cd"]
    assert taken == ["ab", "cd"]
