"""Finding the members of a set that make it fail."""

from collections.abc import Callable, Sequence

_FEW = 8
"""So many are tried one by one: where culprits lie together, as in a block, halving would ask twice as often."""

Fails = Callable[[Sequence[str]], bool]


def culprits(names: Sequence[str], fails: Fails) -> list[str]:
    """The names because of which `fails(names)` is true: each that fails alone, found by halving down to a few.

    Where a set fails and neither of its halves does, all of the set is named. Empty when `fails(names)` is false.
    """
    if not fails(names):
        return []
    if len(names) == 1:
        return list(names)
    if len(names) > _FEW:
        return _of_halves(names, lambda half: culprits(half, fails))
    return [name for name in names if fails([name])] or _together(names, fails)


def _together(names: Sequence[str], fails: Fails) -> list[str]:
    """The smallest parts, by halving, of a set that fails though none of it fails alone."""
    return _of_halves(names, lambda half: _together(half, fails) if len(half) > 1 and fails(half) else [])


def _of_halves(names: Sequence[str], found: Callable[[Sequence[str]], list[str]]) -> list[str]:
    half = len(names) // 2
    return found(names[:half]) + found(names[half:]) or list(names)
