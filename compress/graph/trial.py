"""The trial of a channel graph: a removal from a skeleton, whose walk must find what was expected."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.attributes import AttributeRule, set_values
from compress.errors import InputError, WorkError, first_line
from compress.graph.attributes import (
    LEAST_RUNS,
    MOST_RUNS,
    OPERATORS,
    WALKS,
    Kind,
    attributes_read,
    candidates,
    reached,
    search,
)
from compress.graph.bisection import culprits
from compress.graph.comparison import GONE, NONE, compare
from compress.graph.groups import ChannelGraph
from compress.graph.skeleton import Skeleton
from compress.removal import Slot, keep_slices

_FRACTIONS = (0.2, 0.7)
"""Between these lies the part of a group's channels that the trial removes. It differs from group to group: equal parts
of all groups would leave a tensor that is cut at a fraction of its width cut at the right place. Groups that share a
tensor's dimension take opposite ends, so that it does not differ by too little."""

_CUT = "after a removal the forward pass cuts its tensors at other places"

_THROUGH = 1e6
"""Score of attributes with which a forward pass comes through and cuts as before; more than it has operators."""

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
        rules = self._rules()
        if rules:
            broken, failure = self._attempt(rules)
            for seed in (1, 2):  # once more, for two sizes that changed alike may be taken for each other
                if failure is None:
                    again, failure = self._attempt(rules, seed=seed)
                    broken = again | broken
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

    def _attempt(self, rules: Rules, *, seed: int = 0) -> tuple[dict[str, str], str | None]:
        """Group name -> why it must be frozen, and how the forward pass fails, where it does."""
        try:
            skeleton, smaller = self._shrunk(list(self.graph.groups), rules, seed=seed)
        except Exception as error:  # noqa: BLE001  functions of `shape_update` are the user's too
            failure = f"its module does not follow a removal: {first_line(error)}"
            return dict.fromkeys(self.graph.groups, failure), failure
        try:
            return self._mismatch(skeleton, smaller), None
        except InputError as error:
            failure = f"the forward pass does not follow its widths: {skeleton.cause(error.__cause__ or error)}"
            return dict.fromkeys(self.graph.groups, failure), failure

    def _rules(self) -> Rules:
        """The attributes that must follow for the forward pass to come through, and to cut as before."""
        try:
            removals = [self._shrunk(list(self.graph.groups), (), seed=seed) for seed in (0, 1)]
        except Exception:  # noqa: BLE001  no attribute helps where the removal itself fails
            return ()
        reads, modes = attributes_read(Skeleton.of(self.model, self.inputs))
        # What a function of the module's own has changed already is not for us to change.
        reads = [one for one in reads if one.value(self.model) == one.value(removals[0][0].model)]
        kinds = candidates(self.model, reads, self.graph)
        walks = 0

        def fit(some: frozenset[Kind], skeleton: Skeleton, smaller: ChannelGraph) -> float:
            nonlocal walks
            rules = [rule for kind in some for rule in kinds[kind]]
            try:
                values = {rule.attribute: rule.value(smaller.sizes[rule.follows]) for rule in rules}
            except WorkError:
                return float("-inf")
            before = {one: one.value(skeleton.model) or 0 for one in values}
            set_values(skeleton.model, values)
            try:
                operators = reached(skeleton, modes)
                if operators < float("inf"):
                    return operators
                walks += 1
                return _THROUGH - (len(self._mismatch(skeleton, smaller)) if walks <= WALKS else len(self.graph.groups))
            except InputError:
                return float("-inf")
            finally:
                set_values(skeleton.model, before)

        def score(some: frozenset[Kind]) -> float:
            first = fit(some, *removals[0])
            return first if first < _THROUGH else first + fit(some, *removals[1])

        runs = max(LEAST_RUNS, min(MOST_RUNS, OPERATORS // len(self.graph.trail.steps)))
        needed = search(list(kinds), score, 2 * _THROUGH, runs) if kinds else set()
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
        names = list(smaller.groups)
        owner = np.repeat(np.arange(len(names)), list(smaller.widths.values()))  # (channels,) index of the group
        found = compare(
            self.graph.trail,
            again.trail,
            self.graph.trail.numbered(_numbers_left(smaller, self.graph.widths)),
            again.trail.numbered(_starting(again)),
            owner,
            partial(_same_program, self.model, skeleton.model),
        )
        slots = _numbered(again)
        for slot, expected in _numbered(smaller).items():
            actual = slots.get(slot)
            fits = actual is not None and len(actual) == len(expected)
            found.expected.append(expected)
            found.actual.append(actual if actual is not None and fits else np.full(len(expected), NONE))
        expected, actual = np.concatenate(found.expected) + 1, np.concatenate(found.actual) + 1  # 0 is none
        every = int(actual.max()) + 1
        expected, actual = np.divmod(np.unique(expected * every + actual), every)
        lost = (actual == 0) & (expected > 0)
        parted = (expected > 0) & (actual > 0)
        parted &= np.bincount(expected[parted], minlength=int(expected.max()) + 1)[expected] > 1
        tied = (expected > 0) & (actual > 0) & (np.bincount(actual)[actual] > 1)
        broken = np.zeros(len(names), dtype=bool)
        broken[owner[expected[lost | parted] - 1]] = True
        # The last channel of a group stays in any case, and what lay along an axis that shrank to 1 is no longer tied.
        broken &= np.array([group.width > 1 for group in smaller.groups.values()])
        broken[owner[expected[tied] - 1]] = True
        reasons = dict.fromkeys((names[index] for index in np.flatnonzero(broken)), _CUT)
        for group, module, reason in found.broken:
            for name in self._inside(module) if group is None else [names[group]]:
                reasons.setdefault(name, reason)
        return {name: reasons[name] for name in self.graph.groups if name in reasons}

    def _inside(self, module: str) -> list[str]:
        """Groups that cut a tensor inside a module."""
        return [
            name
            for name, group in self.graph.groups.items()
            if any(not module or part.tensor.startswith(f"{module}.") for part in group.slices)
        ]

    def _shrunk(self, names: Sequence[str], rules: Rules, *, seed: int = 0) -> tuple[Skeleton, ChannelGraph]:
        """A skeleton, and its graph, without a random part of the channels of the named groups."""
        random = torch.Generator().manual_seed(seed)
        low, high = _FRACTIONS
        shared: dict[Slot, float] = {}
        removals = {}
        for number, name in enumerate(names):
            group = self.graph.groups[name]
            width, slots = group.width, {(part.tensor, part.dim) for part in group.slices}
            fraction = low + (high - low) * float(torch.rand((), generator=random))
            earlier = [shared[slot] for slot in slots if slot in shared]
            if earlier:
                fraction = high if earlier[0] < (low + high) / 2 else low
            shared.update(dict.fromkeys(slots, fraction))
            if seed and number >> (seed - 1) & 1:  # so that sizes that are equal do not always change alike
                fraction = 0.0
            most = max(1, width - 2)  # of one channel left little can be seen
            count = 0 if fraction == 0 else min(most, max(1, round(width * fraction)))
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


def _starting(graph: ChannelGraph) -> dict[str, np.ndarray]:
    """Group -> the numbers of its channels, group after group."""
    starts = np.cumsum([0, *graph.widths.values()])
    return {name: np.arange(width) + start for (name, width), start in zip(graph.widths.items(), starts, strict=False)}


def _numbers_left(smaller: ChannelGraph, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Group -> for each of the channels that it had, `widths`, its number in `smaller`, or `GONE`."""
    found = {}
    for name, numbers in _starting(smaller).items():
        kept = smaller.groups[name].kept.numpy()
        found[name] = np.full(widths[name], GONE)
        found[name][kept] = numbers
    return found


def _same_program(model: nn.Module, pruned: nn.Module, name: str) -> bool:
    """Whether a module and all around it are of the same class after the removal; a table may have changed them."""
    parts = name.split(".") if name else []
    around = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    return all(type(model.get_submodule(one)) is type(pruned.get_submodule(one)) for one in around)


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
