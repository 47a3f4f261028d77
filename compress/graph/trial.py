"""The trial of a channel graph: a removal from a skeleton, whose walk must find what was expected."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InputError, first_line
from compress.graph.bisection import culprits
from compress.graph.groups import ChannelGraph
from compress.graph.skeleton import Skeleton
from compress.removal import Slot, keep_slices

_FRACTIONS = (0.2, 0.7)
"""Between these lies the part of a group's channels that the trial removes. It differs from group to group: equal parts
of all groups would leave a tensor that is cut at a fraction of its width cut at the right place."""


@dataclass(frozen=True)
class Trial:
    """A graph to be put to the trial.

    Attributes:
        model: from which `graph` was traced.
        inputs: the forward pass's arguments.
        walked: (skeleton, no names, the graph's grouped layers) -> its channel graph.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    graph: ChannelGraph
    walked: Callable[[Skeleton, Sequence[str], frozenset[str]], ChannelGraph]

    def broken(self) -> dict[str, str]:
        """Remove a part of every group from a skeleton; group name -> why it must be frozen."""
        try:
            return self._with_siblings(self._mismatch())
        except InputError as error:
            reason = f"the forward pass does not follow its widths: {first_line(error.__cause__ or error)}"
        names = list(self.graph.groups)
        for training in (False, True):  # what fails in training only is an auxiliary head
            found = culprits(names, lambda some, training=training: self._fails(some, training=training))
            if found:
                return self._with_siblings(dict.fromkeys(found, reason))
        return dict.fromkeys(names, reason)

    def _with_siblings(self, broken: dict[str, str]) -> dict[str, str]:
        """Also the groups with other channels of the same producers: where one is cut wrongly, so may the others be."""
        groups = self.graph.groups
        reasons = {producer.layer: reason for name, reason in broken.items() for producer in groups[name].producers}
        found = dict(broken)
        for name, group in groups.items():
            for producer in group.producers:
                if producer.layer in reasons:
                    found.setdefault(name, reasons[producer.layer])
        return found

    def _mismatch(self) -> dict[str, str]:
        """Groups that a walk over the smaller network does not find again: name -> why they must be frozen."""
        skeleton, smaller = self._shrunk(list(self.graph.groups))
        again = self.walked(skeleton, (), self.graph.grouped)
        found = _numbered(again)
        owner: dict[int, str] = {}
        tied: dict[int, set[int]] = {}  # channel of the new walk -> channels that were expected at its positions
        broken: set[str] = set()
        for slot, expected in _numbered(smaller, owner).items():
            actual = found.get(slot)
            if actual is None or len(actual) != len(expected):
                broken.update(owner[one] for one in expected.unique().tolist() if one in owner)
                continue
            for one, other in torch.stack([expected, actual]).unique(dim=1).T.tolist():
                if other >= 0:
                    tied.setdefault(other, set()).add(one)
                elif one in owner:
                    broken.add(owner[one])
        # Fewer ties than expected do no harm: an axis that shrank to 1 ties nothing.
        for ones in tied.values():
            if len(ones) > 1:
                broken.update(owner[one] for one in ones if one in owner)
        reasons = dict.fromkeys(broken, "after a removal the forward pass cuts its tensors at other places")
        for before, after in zip(self.graph.constants, again.constants, strict=False):
            if before.operator == after.operator and before.values != after.values:
                reason = f"{before.operator} is given {_text(before.values)}, and after a removal {_text(after.values)}"
                reasons |= dict.fromkeys(before.groups, reason)
        return {name: reasons[name] for name in self.graph.groups if name in reasons}

    def _shrunk(self, names: Sequence[str]) -> tuple[Skeleton, ChannelGraph]:
        """A skeleton, and its graph, without a random part of the channels of the named groups."""
        random = torch.Generator().manual_seed(0)
        low, high = _FRACTIONS
        removals = {}
        for name in names:
            width = self.graph.groups[name].width
            fraction = low + (high - low) * float(torch.rand((), generator=random))
            count = min(width - 1, max(1, round(width * fraction)))
            removals[name] = torch.randperm(width, generator=random)[:count].sort().values
        skeleton, smaller = Skeleton.of(self.model, self.inputs), self.graph.copy()
        keep_slices(skeleton.model, smaller.remove(removals))
        return skeleton, smaller

    def _fails(self, names: Sequence[str], *, training: bool) -> bool:
        """Whether the forward pass breaks on a removal from the named groups."""
        skeleton, _ = self._shrunk(names)
        try:
            skeleton.run(training=training)
        except Exception:  # noqa: BLE001  a forward pass on wrong shapes fails in any way
            return True
        return False


def _numbered(graph: ChannelGraph, owner: dict[int, str] | None = None) -> dict[Slot, Tensor]:
    """(tensor, dim) -> a number for the channel at each position, -1 for frozen; `owner` receives number -> group."""
    numbers: dict[Slot, Tensor] = {}
    start = 0
    for name, group in graph.groups.items():
        for part in group.slices:
            slot = (part.tensor, part.dim)
            line = numbers.setdefault(slot, torch.full((graph.sizes[slot],), -1))
            line[part.positions] = start + part.channels
        if owner is not None:
            owner.update(dict.fromkeys(range(start, start + group.width), name))
        start += group.width
    return numbers


def _text(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
