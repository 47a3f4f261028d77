"""The trial of a channel graph: a removal from a skeleton, whose walk must find what was expected."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.attributes import AttributeRule, set_values
from compress.errors import InputError, WorkError, first_line
from compress.graph.attributes import RUNS, WALKS, Kind, attributes_read, candidates, reached, search
from compress.graph.bisection import culprits
from compress.graph.groups import ChannelGraph
from compress.graph.skeleton import Skeleton
from compress.removal import Slot, keep_slices

_FRACTIONS = (0.2, 0.7)
"""Between these lies the part of a group's channels that the trial removes. It differs from group to group: equal parts
of all groups would leave a tensor that is cut at a fraction of its width cut at the right place. Groups that share a
tensor's dimension take opposite ends, so that it does not differ by too little."""


Rules = tuple[AttributeRule, ...]


@dataclass(frozen=True)
class Trial:
    """A graph to be put to the trial.

    Attributes:
        model: from which `graph` was traced.
        inputs: the forward pass's arguments.
        walked: skeleton and `ChannelGraph.grouped` -> the skeleton's channel graph.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    graph: ChannelGraph
    walked: Callable[..., ChannelGraph]

    def outcome(self) -> tuple[dict[str, str], Rules]:
        """Remove a part of every group: group name -> why it must be frozen, and the attributes that must follow."""
        broken, failure = self._attempt(())
        if not broken:
            return {}, ()
        rules = self._rules(failure)
        if rules:
            broken, failure = self._attempt(rules)
        if failure is None:
            return self._with_siblings(broken), rules
        names = list(self.graph.groups)
        training = partial(Skeleton.run, training=True)  # what fails in training only is an auxiliary head
        for check in (Skeleton.run, training, partial(self.walked, grouped=self.graph.grouped)):
            found = culprits(names, partial(self._fails, rules, check))
            if found:
                broken = self._with_siblings(dict.fromkeys(found, failure))
                break
        return broken, rules

    def _attempt(self, rules: Rules) -> tuple[dict[str, str], str | None]:
        """Group name -> why it must be frozen, and how the forward pass fails, where it does."""
        try:
            skeleton, smaller = self._shrunk(list(self.graph.groups), rules)
        except Exception as error:  # noqa: BLE001  functions of `shape_update` are the user's too
            failure = f"its module does not follow a removal: {first_line(error)}"
            return dict.fromkeys(self.graph.groups, failure), failure
        try:
            return self._mismatch(skeleton, smaller), None
        except InputError as error:
            failure = f"the forward pass does not follow its widths: {skeleton.cause(error.__cause__ or error)}"
            return dict.fromkeys(self.graph.groups, failure), failure

    def _rules(self, failure: str | None) -> Rules:
        """The attributes that must follow for the forward pass to come through, or for it to cut as before."""
        try:
            skeleton, smaller = self._shrunk(list(self.graph.groups), ())
        except Exception:  # noqa: BLE001  no attribute helps where the removal itself fails
            return ()
        reads, modes = attributes_read(Skeleton.of(self.model, self.inputs))
        # What a function of the module's own has changed already is not for us to change.
        reads = [one for one in reads if one.value(self.model) == one.value(skeleton.model)]
        kinds = candidates(self.model, reads, self.graph)
        if not kinds:
            return ()

        def score(some: frozenset[Kind]) -> float:
            rules = [rule for kind in some for rule in kinds[kind]]
            try:
                values = {rule.attribute: rule.value(smaller.sizes[rule.follows]) for rule in rules}
            except WorkError:
                return float("-inf")
            before = {one: one.value(skeleton.model) or 0 for one in values}
            set_values(skeleton.model, values)
            try:
                return reached(skeleton, modes) if failure else -len(self._mismatch(skeleton, smaller))
            except InputError:
                return float("-inf")
            finally:
                set_values(skeleton.model, before)

        enough, limit = (float("inf"), RUNS) if failure else (0, WALKS)
        needed = search(list(kinds), score, enough, limit)
        return tuple(sorted((rule for kind in needed for rule in kinds[kind]), key=lambda rule: str(rule.attribute)))

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

    def _mismatch(self, skeleton: Skeleton, smaller: ChannelGraph) -> dict[str, str]:
        """Groups that a walk over the smaller network does not find again: name -> why they must be frozen."""
        again = self.walked(skeleton, grouped=self.graph.grouped)
        found = _numbered(again)
        names = list(smaller.groups)
        owner = np.repeat(np.arange(len(names)), list(smaller.widths.values()))  # (channels,) index of the group
        broken = np.zeros(len(names), dtype=bool)
        pairs = []
        for slot, expected in _numbered(smaller).items():
            actual = found.get(slot)
            if actual is None or len(actual) != len(expected):
                actual = np.full(len(expected), -1)
            pairs.append(np.stack([expected, actual]))
        expected, actual = np.concatenate(pairs, axis=1) + 1  # 0 is frozen
        every = actual.max() + 1
        expected, actual = np.divmod(np.unique(expected * every + actual), every)
        # The last channel of a group stays in any case, and an axis of size 1 is none.
        several = np.array([group.width > 1 for group in smaller.groups.values()])
        broken[owner[expected[(actual == 0) & (expected > 0)] - 1]] = True
        broken &= several
        # Fewer ties than expected do no harm: an axis that shrank to 1 ties nothing.
        tied = (actual > 0) & (expected > 0) & (np.bincount(actual)[actual] > 1)
        broken[owner[expected[tied] - 1]] = True
        cut = "after a removal the forward pass cuts its tensors at other places"
        reasons = {name: cut for name, is_broken in zip(names, broken, strict=True) if is_broken}
        before, after = _numbers(self.graph), _numbers(again)
        for name in before.keys() & after.keys():
            gone, come = before[name] - after[name], after[name] - before[name]
            if gone and come:
                reasons[name] = f"a number changes with its width: {min(gone):.4g} becomes {min(come):.4g}"
        return {name: reasons[name] for name in self.graph.groups if name in reasons}

    def _shrunk(self, names: Sequence[str], rules: Rules) -> tuple[Skeleton, ChannelGraph]:
        """A skeleton, and its graph, without a random part of the channels of the named groups."""
        random = torch.Generator().manual_seed(0)
        low, high = _FRACTIONS
        shared: dict[Slot, float] = {}
        removals = {}
        for name in names:
            group = self.graph.groups[name]
            width, slots = group.width, {(part.tensor, part.dim) for part in group.slices}
            fraction = low + (high - low) * float(torch.rand((), generator=random))
            earlier = [shared[slot] for slot in slots if slot in shared]
            if earlier:
                fraction = high if earlier[0] < (low + high) / 2 else low
            shared.update(dict.fromkeys(slots, fraction))
            count = max(1, min(width - 2, round(width * fraction)))  # of one channel left little can be seen
            removals[name] = torch.randperm(width, generator=random)[:count].sort().values
        skeleton, smaller = Skeleton.of(self.model, self.inputs), self.graph.copy()
        keep_slices(skeleton.model, smaller.remove(removals), attributes=rules)
        return skeleton, smaller

    def _fails(self, rules: Rules, check: Callable[[Skeleton], Any], names: Sequence[str]) -> bool:
        """Whether the removal from the named groups, or what is checked of what is left, breaks."""
        try:
            check(self._shrunk(names, rules)[0])
        except Exception:  # noqa: BLE001  a forward pass on wrong shapes fails in any way
            return True
        return False


def _numbered(graph: ChannelGraph) -> dict[Slot, np.ndarray]:
    """(tensor, dim) -> a number for the channel at each position, group after group, -1 for frozen."""
    numbers: dict[Slot, np.ndarray] = {}
    start = 0
    for group in graph.groups.values():
        for part in group.slices:
            slot = (part.tensor, part.dim)
            line = numbers.setdefault(slot, np.full(graph.sizes[slot], -1))
            line[part.positions.numpy()] = start + part.channels.numpy()
        start += group.width
    return numbers


def _numbers(graph: ChannelGraph) -> dict[str, Counter[float]]:
    """Group -> the numbers that its channels meet in the forward pass, without sizes, and zeros, which never change."""
    found: dict[str, Counter[float]] = {name: Counter() for name in graph.groups}
    for constant in graph.constants:
        for name in constant.groups & graph.groups.keys():
            found[name].update(value for value in constant.values if value)
    return found
