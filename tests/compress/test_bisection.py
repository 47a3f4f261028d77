"""Finding culprits by halving."""

from hypothesis import given
from hypothesis import strategies as st

from compress.graph.bisection import culprits


@given(names=st.lists(st.text(max_size=3), min_size=1, max_size=30, unique=True), data=st.data())
def test_exactly_those_that_fail_alone(names: list[str], data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.sampled_from(names)))
    assert culprits(names, lambda some: bool(bad & set(some))) == [name for name in names if name in bad]


def test_a_pair_that_fails_only_together_is_named_with_its_set() -> None:
    assert culprits(["a", "b", "c", "d"], lambda some: {"a", "c"} <= set(some)) == ["a", "b", "c", "d"]
    assert culprits(["a", "b", "c", "d"], lambda some: {"a", "b"} <= set(some)) == ["a", "b"]


def test_neighbours_that_all_fail_are_asked_for_once_each() -> None:
    names = [str(number) for number in range(16)]
    asked: list[list[str]] = []
    bad = set(names[:8])
    assert culprits(names, lambda some: bool(asked.append(list(some)) or bad & set(some))) == names[:8]
    assert len(asked) == 1 + 2 + 8
