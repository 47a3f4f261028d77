"""From a walk to channel groups: classes of labels collected by what they are tied to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from compress.graph.groups import ChannelGraph, Constant, Frozen, Group, Producer, Product, Size, Slices
from compress.graph.walk import Constants, Walk
from compress.removal import Slot


def groups_of(walk: Walk) -> ChannelGraph:
    """Collect the classes of joined labels into groups and frozen layers."""
    classes = walk.classes()
    slots = list(walk.bindings)
    lengths = [len(walk.bindings[slot]) for slot in slots]
    if not slots:
        return ChannelGraph({}, [], {}, {}, operators_without_rule=dict(walk.unknown))
    slot_of = np.repeat(np.arange(len(slots)), lengths)  # (all positions,)
    position = np.concatenate([np.arange(length) for length in lengths])
    channel = classes[torch.cat([walk.bindings[slot] for slot in slots]).numpy()]
    frozen = walk.frozen_classes(classes)
    marks = _Marks(walk.residue_classes(classes), walk.mixed_classes(classes), *walk.arrived())

    names: dict[str, int] = defaultdict(int)
    groups: dict[str, Group] = {}
    removable = ~np.isin(channel, np.fromiter(frozen, dtype=np.int64, count=len(frozen)))
    group_of: dict[int, str] = {}
    for members in _alike(slot_of[removable], position[removable], channel[removable]):
        group = _group(walk, slots, *members, marks)
        names[group.name] += 1
        if names[group.name] > 1:
            group = replace(group, name=f"{group.name}#{names[group.name]}")
        groups[group.name] = group
        group_of.update(dict.fromkeys(np.unique(members[2]).tolist(), group.name))
    sizes = dict(zip(slots, lengths, strict=True))
    return ChannelGraph(
        groups,
        _frozen_layers(walk, classes, frozen),
        sizes,
        dict(walk.uses),
        tuple(
            Product(coefficient, tuple(_size(classes[axis.numpy()], group_of, groups) for axis in axes))
            for coefficient, axes in walk.products
        ),
        tuple(_constant(one, classes, group_of) for one in walk.constants),
        operators_without_rule=dict(walk.unknown),
        grouped=frozenset(walk.grouped),
    )


@dataclass(frozen=True)
class _Marks:
    """Class -> the layer because of which removing differs from zeroing; label -> channel; gate -> channels read."""

    residue: Mapping[int, str]
    mixed: Mapping[int, str]
    channels: np.ndarray
    arrived: Mapping[str, np.ndarray]


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


def _constant(constants: Constants, classes: np.ndarray, group_of: Mapping[int, str]) -> Constant:
    touched = np.unique(classes[constants.labels.numpy()]).tolist()
    return Constant(
        constants.operator, constants.values, frozenset(group_of[one] for one in touched if one in group_of)
    )


def _alike(
    slot_of: np.ndarray, position: np.ndarray, channel: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Split positions by the set of (slot, count) to which their channel is tied; in order of first appearance."""
    if len(channel) == 0:
        return []
    _, dense = np.unique(channel, return_inverse=True)
    pairs, counts = np.unique(np.stack([dense, slot_of]), axis=1, return_counts=True)
    # A channel's signature is the sum of one random 64-bit number for each (slot, count) of its own.
    kinds, kind = np.unique(np.stack([pairs[1], counts]), axis=1, return_inverse=True)
    numbers = np.random.default_rng(0).integers(1, 2**63, size=(kinds.shape[1],), dtype=np.uint64)
    signature = np.zeros(int(dense.max()) + 1, dtype=np.uint64)
    np.add.at(signature, pairs[0], numbers[kind.ravel()])
    _, first, group = np.unique(signature[dense], return_index=True, return_inverse=True)
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], np.arange(len(first) + 1))
    members = [order[bounds[index] : bounds[index + 1]] for index in np.argsort(first).tolist()]
    return [(slot_of[rows], position[rows], channel[rows]) for rows in members]


def _group(
    walk: Walk,
    slots: list[Slot],
    slot_of: np.ndarray,
    position: np.ndarray,
    channel: np.ndarray,
    marks: _Marks,
) -> Group:
    mine = [slots[index] for index in dict.fromkeys(slot_of.tolist())]
    made = [slot for slot in mine if slot in walk.producers]
    lead = slots.index(made[0] if made else mine[0])
    # Channels are numbered in the order in which they stand in the first producer.
    at_lead = slot_of == lead
    _, first, number = np.unique(channel, return_index=True, return_inverse=True)
    leading = np.full(len(first), np.iinfo(np.int64).max)
    np.minimum.at(leading, number[at_lead], position[at_lead])
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(leading, kind="stable")] = np.arange(len(first))
    slices = []
    for index in dict.fromkeys(slot_of.tolist()):
        here = slot_of == index
        slices.append(
            Slices(
                slots[index][0], slots[index][1], torch.from_numpy(position[here]), torch.from_numpy(rank[number[here]])
            )
        )
    layers = {walk.producers[slot]: None for slot in made}
    classes = np.unique(channel).tolist()
    return Group(
        name=walk.producers[made[0]] if made else mine[0][0],
        width=len(first),
        kept=torch.arange(len(first)),
        slices=tuple(slices),
        producers=tuple(Producer(layer, tuple(walk.norms.get(layer, ()))) for layer in layers),
        consumers=tuple(dict.fromkeys(walk.consumers[slot] for slot in mine if slot in walk.consumers)),
        filters=tuple(made),
        readers=tuple(slot for slot in mine if slot in walk.consumers),
        gates=_gates(walk, slices, marks),
        copies=tuple(len(part.positions) // len(first) for part in slices if (part.tensor, part.dim) in made),
        residue=next((marks.residue[one] for one in classes if one in marks.residue), None),
        mixed=next((marks.mixed[one] for one in classes if one in marks.mixed), None),
    )


def _gates(walk: Walk, slices: list[Slices], marks: _Marks) -> tuple[Slices, ...]:
    """Of the slices those that gate what consumers read: of a head's queries, keys and values the values."""
    parts = {(part.tensor, part.dim): part for part in slices}
    found: dict[Slot, Slices] = {}
    for gate, read_channels in marks.arrived.items():
        for slot in walk.gates.get(gate, ()):
            if slot not in parts:
                continue
            part = parts[slot]
            own = marks.channels[walk.bindings[slot].numpy()[part.positions.numpy()]]
            here = torch.from_numpy(np.isin(own, read_channels))
            if bool(here.any()):
                read = replace(part, positions=part.positions[here], channels=part.channels[here])
                found[slot] = read
    order = {slot: number for number, slot in enumerate(parts)}
    return tuple(found[slot] for slot in sorted(found, key=order.__getitem__))


def _frozen_layers(walk: Walk, classes: np.ndarray, frozen: Mapping[int, str]) -> list[Frozen]:
    by_reason: dict[str, dict[str, None]] = defaultdict(dict)
    for slot, layer in walk.producers.items():
        for one in np.unique(classes[walk.bindings[slot].numpy()]).tolist():
            if one in frozen:
                by_reason[frozen[one]][layer] = None
    return [Frozen(tuple(layers), reason) for reason, layers in by_reason.items()]
