"""From a walk to channel groups: classes of labels collected by what they are tied to.

A network has up to a million positions of tensors, so they are sorted once for all and never once for each group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from compress.graph.comparison import Trail
from compress.graph.groups import ChannelGraph, Frozen, Group, Producer, Product, Size, Slices
from compress.graph.walk import Walk
from compress.removal import Slot


def groups_of(walk: Walk) -> ChannelGraph:
    """Collect the classes of joined labels into groups and frozen layers."""
    if not walk.bindings:
        return ChannelGraph({}, [], {}, {}, operators_without_rule=dict(walk.unknown))
    return _Collection(walk).graph()


class _Collection:
    """The positions of all tensors, in the order of their first use.

    Attributes:
        slots: (tensor, dim) of every dimension that has channels.
        slot_of, position, channel: (positions,) index into `slots`, position along it, and class of its label.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.classes = walk.classes()
        self.slots: list[Slot] = list(walk.bindings)
        self.lengths = [len(walk.bindings[slot]) for slot in self.slots]
        labels = torch.cat([walk.bindings[slot] for slot in self.slots]).numpy()
        self.slot_of = np.repeat(np.arange(len(self.slots)), self.lengths)
        self.position = np.concatenate([np.arange(length) for length in self.lengths])
        self.channel = self.classes[labels]
        self.frozen = walk.frozen_classes(self.classes)
        self._residue, self._mixed = walk.residue_classes(self.classes), walk.mixed_classes(self.classes)
        one_channel, self._read = walk.arrived()
        self._one_channel = one_channel[labels]  # (positions,) labels of one channel, whatever goes with it
        self._gates_at: dict[Slot, list[str]] = defaultdict(list)
        for gate in self._read:
            for slot in walk.gates.get(gate, ()):
                self._gates_at[slot].append(gate)
        self._is_read = np.zeros(walk.count, dtype=bool)
        self._rank = np.zeros(int(self.classes.max()) + 1, dtype=np.int64)

    def graph(self) -> ChannelGraph:
        walk, classes = self.walk, self.classes
        names: dict[str, int] = defaultdict(int)
        groups: dict[str, Group] = {}
        group_of: dict[int, str] = {}
        members: list[tuple[int, str, int]] = []
        for rows in self._alike():
            group, channels = self._group(rows)
            names[group.name] += 1
            if names[group.name] > 1:
                group = replace(group, name=f"{group.name}#{names[group.name]}")
            groups[group.name] = group
            group_of.update(dict.fromkeys(channels.tolist(), group.name))
            members += [(one, group.name, number) for number, one in enumerate(channels.tolist())]
        return ChannelGraph(
            groups,
            self._frozen_layers(),
            dict(zip(self.slots, self.lengths, strict=True)),
            dict(walk.uses),
            tuple(
                Product(coefficient, tuple(_size(classes[axis.numpy()], group_of, groups) for axis in axes))
                for coefficient, axes in walk.products
            ),
            Trail(tuple(walk.steps), classes, tuple(members)),
            operators_without_rule=dict(walk.unknown),
            grouped=frozenset(walk.grouped),
        )

    def _alike(self) -> list[np.ndarray]:
        """Rows of positions that may go, by the set of (slot, count) to which their channel is tied; in order."""
        stays = np.zeros(len(self._rank), dtype=bool)
        stays[list(self.frozen)] = True
        rows = np.flatnonzero(~stays[self.channel])
        if len(rows) == 0:
            return []
        used = np.zeros(len(self._rank), dtype=np.int64)
        used[self.channel[rows]] = 1
        dense = (np.cumsum(used) - 1)[self.channel[rows]]
        pairs, counts = np.unique(dense * len(self.slots) + self.slot_of[rows], return_counts=True)
        # A channel's signature is the sum of one random 64-bit number for each (slot, count) of its own.
        kinds, kind = np.unique(pairs % len(self.slots) * (counts.max() + 1) + counts, return_inverse=True)
        numbers = np.random.default_rng(0).integers(1, 2**63, size=len(kinds), dtype=np.uint64)
        signature = np.zeros(int(dense.max()) + 1, dtype=np.uint64)
        np.add.at(signature, pairs // len(self.slots), numbers[kind])
        _, group_of_channel = np.unique(signature, return_inverse=True)
        group = group_of_channel[dense]
        order = np.argsort(group, kind="stable")
        bounds = np.searchsorted(group[order], np.arange(int(group.max()) + 2))
        members = [rows[order[start:end]] for start, end in pairwise(bounds)]
        return sorted(members, key=lambda some: int(some[0]))

    def _group(self, rows: np.ndarray) -> tuple[Group, np.ndarray]:
        """The group that has these rows of positions, slot after slot; and the classes of its channels."""
        walk = self.walk
        starts = np.flatnonzero(np.diff(self.slot_of[rows], prepend=-1))
        parts = {self.slots[self.slot_of[part[0]]]: part for part in np.split(rows, starts[1:])}
        made = [slot for slot in parts if slot in walk.producers]
        # Channels are numbered in the order in which they stand in the first producer.
        leading = self.channel[parts[made[0] if made else next(iter(parts))]]
        _, first = np.unique(leading, return_index=True)
        channels = leading[np.sort(first)]
        self._rank[channels] = np.arange(len(channels))
        slices = tuple(self._slices(slot, part) for slot, part in parts.items())
        layers = {walk.producers[slot]: None for slot in made}
        group = Group(
            name=walk.producers[made[0]] if made else next(iter(parts))[0],
            width=len(channels),
            kept=torch.arange(len(channels)),
            slices=slices,
            producers=tuple(Producer(layer, tuple(walk.norms.get(layer, ()))) for layer in layers),
            consumers=tuple(dict.fromkeys(walk.consumers[slot] for slot in parts if slot in walk.consumers)),
            filters=tuple(made),
            readers=tuple(slot for slot in parts if slot in walk.consumers),
            gates=tuple(gate for slot, part in parts.items() if (gate := self._gate(slot, part)) is not None),
            copies=tuple(len(parts[slot]) // len(channels) for slot in made),
            residue=_first(self._residue, channels),
            mixed=_first(self._mixed, channels),
        )
        return group, channels

    def _slices(self, slot: Slot, rows: np.ndarray) -> Slices:
        positions, channels = self.position[rows], self._rank[self.channel[rows]]
        return Slices(slot[0], slot[1], torch.from_numpy(positions), torch.from_numpy(channels))

    def _gate(self, slot: Slot, rows: np.ndarray) -> Slices | None:
        """Of these rows those that gate what consumers read: of a head's queries, keys and values the values."""
        gating = np.zeros(len(rows), dtype=bool)
        for gate in self._gates_at.get(slot, ()):
            self._is_read[self._read[gate]] = True
            gating |= self._is_read[self._one_channel[rows]]
            self._is_read[self._read[gate]] = False
        return self._slices(slot, rows[gating]) if gating.any() else None

    def _frozen_layers(self) -> list[Frozen]:
        by_reason: dict[str, dict[str, None]] = defaultdict(dict)
        for slot, layer in self.walk.producers.items():
            for one in np.unique(self.classes[self.walk.bindings[slot].numpy()]).tolist():
                if one in self.frozen:
                    by_reason[self.frozen[one]][layer] = None
        return [Frozen(tuple(layers), reason) for reason, layers in by_reason.items()]


def _first(found: Mapping[int, str], channels: np.ndarray) -> str | None:
    return next((found[one] for one in channels.tolist() if one in found), None) if found else None


def _size(axis: np.ndarray, group_of: Mapping[int, str], groups: Mapping[str, Group]) -> Size:
    """Size of an axis whose positions are of these classes; rows of a head, all of one class, stay as long as it."""
    kinds, counts = np.unique(axis, return_counts=True)
    if len(kinds) == 1:
        return Size(len(axis))
    of_group: dict[str, list[int]] = defaultdict(list)
    for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True):
        if kind in group_of:
            of_group[group_of[kind]].append(count)
    parts = tuple(
        (name, copies[0])
        for name, copies in of_group.items()
        if len(set(copies)) == 1 and len(copies) == groups[name].width
    )
    return Size(len(axis) - sum(copies * groups[name].width for name, copies in parts), parts)
