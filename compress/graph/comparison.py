"""Two walks of one network, before and after a removal, held against each other operator by operator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from compress.graph.labels import compact

GONE, NONE = -2, -1
"""In place of a channel's number: it was removed; there is none, or one that never goes."""


@dataclass(frozen=True)
class Step:
    """One operator, as the walk saw it.

    Attributes:
        module: in whose forward pass it stands.
        results: labels of each tensor that it returns, None where these are not activations.
        shapes: of the same tensors.
        operands: labels of the activations that it takes.
        numbers: that it is given, sizes apart.
    """

    operator: str
    module: str
    results: tuple[Tensor | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    operands: tuple[Tensor, ...]
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class Trail:
    """All operators of a walk.

    Attributes:
        classes: label -> class.
        members: class -> group and channel, as they were numbered when the graph was made; for those that may go.
    """

    steps: tuple[Step, ...] = ()
    classes: np.ndarray | None = None
    members: tuple[tuple[int, str, int], ...] = ()

    def numbered(self, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
        """Label -> the number of its channel; the last entry, that of `NO_CHANNEL`, is `NONE`.

        Args:
            numbers: group -> number of each of its channels.
        """
        assert self.classes is not None
        of_class = np.full(int(self.classes.max(initial=0)) + 1, NONE)
        for one, group, channel in self.members:
            if group in numbers:
                of_class[one] = numbers[group][channel]
        return np.append(of_class[self.classes], NONE)


@dataclass
class Differences:
    """What does not fit.

    Attributes:
        expected, actual: numbers of channels that stand at the same place of the two networks, for all places.
        broken: group, or None for all groups of the module -> (module, reason).
    """

    expected: list[np.ndarray]
    actual: list[np.ndarray]
    broken: list[tuple[int | None, str, str]]


def compare(
    before: Trail,
    after: Trail,
    expected: np.ndarray,
    actual: np.ndarray,
    owner: np.ndarray,
    comparable: Callable[[str], bool],
) -> Differences:
    """Hold every operator of `after` to the same one of `before`.

    Args:
        expected, actual: label -> number of its channel (`Trail.numbered`), after the removal, in each.
        owner: number of a channel -> index of its group.
        comparable: whether a module's forward pass is the same program before and after.
    """
    found = Differences([], [], [])
    others: dict[str, list[Step]] = defaultdict(list)
    for step in after.steps:
        others[step.module].append(step)
    mine: dict[str, list[Step]] = defaultdict(list)
    for step in before.steps:
        mine[step.module].append(step)
    for module, steps in mine.items():
        if not comparable(module):
            continue
        if [step.operator for step in steps] != [step.operator for step in others[module]]:
            found.broken.append((None, module, "the forward pass takes another course after a removal"))
            continue
        for step, other in zip(steps, others[module], strict=True):
            _compare_step(step, other, expected, actual, owner, found)
    return found


def _compare_step(
    step: Step, other: Step, expected: np.ndarray, actual: np.ndarray, owner: np.ndarray, found: Differences
) -> None:
    touched = [expected[compact(labels).numpy().ravel()] for labels in step.operands]
    if step.numbers != other.numbers:
        changes = zip(step.numbers, other.numbers, strict=False)
        old, new = next((pair for pair in changes if pair[0] != pair[1]), (0.0, 0.0))
        _blame(touched, step, owner, found, f"a number changes with its width: {old:.4g} becomes {new:.4g}")
    for labels, shape, there, new_shape in zip(step.results, step.shapes, other.results, other.shapes, strict=False):
        if labels is None or there is None:
            continue
        numbers = expected[compact(labels).numpy()]
        left = list(shape)
        for dim in range(numbers.ndim):
            if numbers.shape[dim] > 1:
                stays = (numbers != GONE).any(axis=tuple(axis for axis in range(numbers.ndim) if axis != dim))
                numbers = numbers.compress(stays, axis=dim)
                left[dim] = numbers.shape[dim]
        if tuple(left) != new_shape or bool((numbers == GONE).any()):
            reason = "after a removal the forward pass cuts its tensors at other places"
            _blame([numbers.ravel(), *touched], step, owner, found, reason)
            continue
        pairs = np.broadcast_arrays(numbers, actual[compact(there).numpy()])
        named = pairs[0] >= 0
        found.expected.append(pairs[0][named])
        found.actual.append(pairs[1][named])


def _blame(numbers: list[np.ndarray], step: Step, owner: np.ndarray, found: Differences, reason: str) -> None:
    every = np.concatenate(numbers) if numbers else np.empty(0, dtype=np.int64)
    groups = np.unique(owner[every[every >= 0]]).tolist()
    found.broken += [(group, step.module, reason) for group in groups] or [(None, step.module, reason)]
