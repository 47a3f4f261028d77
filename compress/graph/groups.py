"""Channel groups: what the walk found, put into the form that scoring, selection and removal work on.

A *channel* of a group is one class of joined labels; the channels of a *group* are those that are tied to the same
tensors in the same way, and any of which may be removed. All positions are in today's coordinates:
`ChannelGraph.remove` moves them along when channels go.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import gcd, lcm

import numpy as np
import torch
from torch import Tensor

from compress.graph.walk import Walk
from compress.removal import Slot


@dataclass(frozen=True)
class Slices:
    """The positions along one dimension of one parameter or buffer that go with the channels of a group.

    Attributes:
        tensor: qualified name of the parameter or buffer.
        dim: the dimension along which it is cut.
        positions: (k,) int64, positions along `dim`, ascending.
        channels: (k,) int64, the channel of the group to which each position belongs. A flattened feature map gives one
            channel many positions; a group that holds half of a concatenation has positions from its half only.
    """

    tensor: str
    dim: int
    positions: Tensor
    channels: Tensor

    def of(self, channels: Tensor) -> Tensor:
        """Positions of these channels, ascending."""
        return self.positions[torch.isin(self.channels, channels)]


@dataclass(frozen=True)
class Producer:
    """A layer whose output channels belong to a group, and the normalisation layers that follow it directly."""

    layer: str
    norms: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Channels that stand or fall as wholes, and all that is tied to them.

    Attributes:
        name: the first producer's layer, in the order of the forward pass.
        width: number of channels now.
        kept: (width,) int64, the channels that are left, by their number when the graph was traced.
        slices: every tensor slice that belongs to the channels.
        producers, consumers: the layers that make and that read the channels.
        filters: the producers' weights, each with the dimension of its output channels, in the order of the forward
            pass as everything here.
        readers: the consumers' weights, each with the dimension of its input channels.
        gates: (parameter, dim) whose product with a common factor gates the channel wherever it is read: the affine
            parameters of the last normalisation before each consumer, or, where none stands there, the filter and bias
            of the producer. With the gate at 0 the network computes what it computes with the channel removed.
        copies: for each producer, how many of its output channels one channel of the group is.
        residue: a layer that reads a value other than 0 from a gated channel (after a sigmoid, say), so that
            removing differs from zeroing; None when the two are equal.
    """

    name: str
    width: int
    kept: Tensor
    slices: tuple[Slices, ...]
    producers: tuple[Producer, ...]
    consumers: tuple[str, ...]
    filters: tuple[Slot, ...]
    readers: tuple[Slot, ...]
    gates: tuple[Slot, ...]
    copies: tuple[int, ...]
    residue: str | None = None

    def step(self, round_to: int) -> int:
        """Smallest number of channels whose multiples give every producer a width that is a multiple of `round_to`.

        A producer that holds a channel several times (the groups of a grouped convolution) needs fewer.
        """
        return lcm(*(round_to // gcd(round_to, copies) for copies in self.copies)) if self.copies else round_to

    def positions(self, channels: Tensor) -> dict[Slot, Tensor]:
        """Positions in every tensor that go with these channels, `channels` (k,) int64."""
        return {(part.tensor, part.dim): part.of(channels) for part in self.slices}


@dataclass(frozen=True)
class Frozen:
    """Layers whose channels must stay, and why."""

    layers: tuple[str, ...]
    reason: str


@dataclass
class ChannelGraph:
    """All channel groups of a model.

    Attributes:
        groups: removable groups by name, in the order of the forward pass.
        frozen: what is not removable, and why.
        sizes: size of every tensor dimension that the groups touch, now.
        uses: tensor -> multiply-adds that each of its elements takes part in, for one image.
        other_macs: multiply-adds of one image that no weight takes part in (products of activations).
        operators_without_rule: operator -> the nodes of the exported graph at which it stands.
        grouped: layers that are grouped convolutions; with one channel left in every group the shape no longer tells
            them from depthwise ones.
    """

    groups: dict[str, Group]
    frozen: list[Frozen]
    sizes: dict[Slot, int]
    uses: dict[str, float]
    other_macs: float = 0.0
    operators_without_rule: dict[str, list[str]] = field(default_factory=dict)
    grouped: frozenset[str] = frozenset()

    @property
    def widths(self) -> dict[str, int]:
        """Group name -> number of channels now."""
        return {name: group.width for name, group in self.groups.items()}

    def copy(self) -> ChannelGraph:
        """A graph from which channels can be removed while this one stays as it is."""
        return replace(self, groups=dict(self.groups), sizes=dict(self.sizes))

    def keep(self, removals: Mapping[str, Tensor]) -> dict[Slot, Tensor]:
        """What stays when `removals` (group name -> channels, int64) go: (tensor, dim) -> positions kept, ascending."""
        masks: dict[Slot, Tensor] = {}
        for name, channels in removals.items():
            if len(channels) == 0:
                continue
            for slot, positions in self.groups[name].positions(channels).items():
                masks.setdefault(slot, torch.ones(self.sizes[slot], dtype=torch.bool))[positions] = False
        return {slot: mask.nonzero().flatten() for slot, mask in masks.items()}

    def remove(self, removals: Mapping[str, Tensor]) -> dict[Slot, Tensor]:
        """Take channels out of the groups and move every position accordingly; returns `keep(removals)`."""
        keep = self.keep(removals)
        moved: dict[Slot, Tensor] = {}
        for slot, kept in keep.items():
            moved[slot] = torch.full((self.sizes[slot],), -1, dtype=torch.int64)
            moved[slot][kept] = torch.arange(len(kept))
            self.sizes[slot] = len(kept)
        for name, group in self.groups.items():
            gone = removals.get(name, torch.empty(0, dtype=torch.int64))
            if len(gone) or any((part.tensor, part.dim) in moved for part in group.slices):
                self.groups[name] = _shrunk(group, gone, moved)
        return keep

    def without(self, names: Mapping[str, str]) -> ChannelGraph:
        """The graph with the groups `names` (name -> reason) frozen."""
        frozen = list(self.frozen)
        for name, reason in names.items():
            frozen.append(Frozen(tuple(producer.layer for producer in self.groups[name].producers), reason))
        return replace(self, groups={n: g for n, g in self.groups.items() if n not in names}, frozen=frozen)


def _shrunk(group: Group, gone: Tensor, moved: Mapping[Slot, Tensor]) -> Group:
    stays = torch.ones(group.width, dtype=torch.bool)
    stays[gone] = False
    renumbered = stays.cumsum(0) - 1
    slices = []
    for part in group.slices:
        here = stays[part.channels]
        positions, channels = part.positions[here], renumbered[part.channels[here]]
        move = moved.get((part.tensor, part.dim))
        slices.append(replace(part, positions=positions if move is None else move[positions], channels=channels))
    return replace(group, width=int(stays.sum()), kept=group.kept[stays], slices=tuple(slices))


# --- from a walk to groups ------------------------------------------------------------------------------------------


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
    frozen = walk.marks(classes)
    residue = walk.marks(classes, residue=True)

    names: dict[str, int] = defaultdict(int)
    groups: dict[str, Group] = {}
    removable = ~np.isin(channel, np.fromiter(frozen, dtype=np.int64, count=len(frozen)))
    for members in _alike(slot_of[removable], position[removable], channel[removable]):
        group = _group(walk, slots, *members, residue)
        names[group.name] += 1
        if names[group.name] > 1:
            group = replace(group, name=f"{group.name}#{names[group.name]}")
        groups[group.name] = group
    sizes = dict(zip(slots, lengths, strict=True))
    return ChannelGraph(
        groups,
        _frozen_layers(walk, classes, frozen),
        sizes,
        dict(walk.uses),
        operators_without_rule=dict(walk.unknown),
        grouped=frozenset(walk.grouped),
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
    residue: Mapping[int, str],
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
    gates = {pair: None for gate in walk.gates if gate in walk.direct for pair in walk.gates[gate] if pair in set(mine)}
    return Group(
        name=walk.producers[made[0]] if made else mine[0][0],
        width=len(first),
        kept=torch.arange(len(first)),
        slices=tuple(slices),
        producers=tuple(Producer(layer, tuple(walk.norms.get(layer, ()))) for layer in layers),
        consumers=tuple(dict.fromkeys(walk.consumers[slot] for slot in mine if slot in walk.consumers)),
        filters=tuple(made),
        readers=tuple(slot for slot in mine if slot in walk.consumers),
        gates=tuple(gates),
        copies=tuple(len(part.positions) // len(first) for part in slices if (part.tensor, part.dim) in made),
        residue=next((residue[one] for one in np.unique(channel).tolist() if one in residue), None),
    )


def _frozen_layers(walk: Walk, classes: np.ndarray, frozen: Mapping[int, str]) -> list[Frozen]:
    by_reason: dict[str, dict[str, None]] = defaultdict(dict)
    for slot, layer in walk.producers.items():
        for one in np.unique(classes[walk.bindings[slot].numpy()]).tolist():
            if one in frozen:
                by_reason[frozen[one]][layer] = None
    return [Frozen(tuple(layers), reason) for reason, layers in by_reason.items()]
