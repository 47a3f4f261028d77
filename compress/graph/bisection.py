"""Finding the members of a set that make it fail."""

from collections.abc import Callable, Sequence


def culprits(names: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> list[str]:
    """The names because of which `fails(names)` is true: each that fails alone, found by halving.

    Where a set fails and neither of its halves does, all of the set is named. Empty when `fails(names)` is false.
    """
    if not fails(names):
        return []
    if len(names) == 1:
        return list(names)
    half = len(names) // 2
    return culprits(names[:half], fails) + culprits(names[half:], fails) or list(names)
