"""Channel groups: what the walk found, put into the form that scoring, selection and removal work on.

A *channel* of a group is one class of joined labels; the channels of a *group* are those that are tied to the same
tensors in the same way, and any of which may be removed. All positions are in today's coordinates:
`ChannelGraph.remove` moves them along when channels go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import gcd, lcm, prod

import torch
from torch import Tensor, nn

from compress.attributes import AttributeRule
from compress.graph.comparison import Trail
from compress.removal import Slot, keep_slices


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
        gates: slices whose product with a common factor gates the channel wherever it is read: of the affine
            parameters of the last normalisation before each consumer, or, where none stands there, of the filter and
            bias of the producer; of an attention head, of its values. With the gate at 0 the network computes what it
            computes with the channel removed.
        copies: for each producer, how many of its output channels one channel of the group is.
        residue: a layer that reads a value other than 0 from a gated channel (after a sigmoid, say), so that
            removing differs from zeroing.
        mixed: a layer that mixes the channels with each other (a normalisation over them), so that removing differs
            from zeroing. Where this and `residue` are None the two are equal.
    """

    name: str
    width: int
    kept: Tensor
    slices: tuple[Slices, ...]
    producers: tuple[Producer, ...]
    consumers: tuple[str, ...]
    filters: tuple[Slot, ...]
    readers: tuple[Slot, ...]
    gates: tuple[Slices, ...]
    copies: tuple[int, ...]
    residue: str | None = None
    mixed: str | None = None

    @property
    def gate_slots(self) -> tuple[Slot, ...]:
        """(parameter, dim) of the gates."""
        return tuple((part.tensor, part.dim) for part in self.gates)

    @property
    def exact(self) -> bool:
        """Whether the network without a channel computes what it computes with the channel's gate at 0."""
        return self.residue is None and self.mixed is None

    def step(self, round_to: int) -> int:
        """Smallest number of channels whose multiples give every producer a width that is a multiple of `round_to`.

        A producer that holds a channel several times (the groups of a grouped convolution) needs fewer.
        """
        return lcm(*(round_to // gcd(round_to, copies) for copies in self.copies)) if self.copies else round_to

    def narrowest(self, round_to: int, min_channels: int) -> int:
        """Smallest allowed number of channels: a multiple of `step` with at least `min_channels` in every producer."""
        step = self.step(round_to)
        least = -(-min_channels // min(self.copies, default=1))
        return max(step, -(-least // step) * step)

    def positions(self, channels: Tensor) -> dict[Slot, Tensor]:
        """Positions in every tensor that go with these channels, `channels` (k,) int64."""
        return {(part.tensor, part.dim): part.of(channels) for part in self.slices}


@dataclass(frozen=True)
class Frozen:
    """Layers whose channels must stay, and why."""

    layers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Size:
    """Size of an axis as the groups' widths say it: fixed + the sum of copies x width."""

    fixed: int
    parts: tuple[tuple[str, int], ...] = ()

    def value(self, widths: Mapping[str, int]) -> int:
        """The size at these widths of the groups."""
        return self.fixed + sum(copies * widths[group] for group, copies in self.parts)

    def without(self, widths: Mapping[str, int]) -> Size:
        """The same with groups that stay at these widths."""
        stays = sum(copies * widths[group] for group, copies in self.parts if group in widths)
        return Size(self.fixed + stays, tuple(part for part in self.parts if part[0] not in widths))


@dataclass(frozen=True)
class Product:
    """A cost that is a coefficient times the product of the sizes of axes."""

    coefficient: float
    sizes: tuple[Size, ...]

    @property
    def groups(self) -> frozenset[str]:
        """The groups on whose widths it depends."""
        return frozenset(group for size in self.sizes for group, _ in size.parts)

    def without(self, widths: Mapping[str, int]) -> Product:
        """The same with groups that stay at these widths."""
        return replace(self, sizes=tuple(size.without(widths) for size in self.sizes))

    def value(self, widths: Mapping[str, int]) -> float:
        """The cost at these widths of the groups."""
        return self.coefficient * prod(size.value(widths) for size in self.sizes)


@dataclass
class ChannelGraph:
    """All channel groups of a model.

    Attributes:
        groups: removable groups by name, in the order of the forward pass.
        frozen: what is not removable, and why.
        sizes: size of every tensor dimension that the groups touch, now.
        uses: tensor -> multiply-adds that each of its elements takes part in, for one image.
        products: multiply-adds of one image in products of activations, as the groups' widths decide them.
        trail: the operators, with the channels at every place; empty once the graph stood its trial.
        other_macs: multiply-adds of one image that are neither in `uses` nor in `products`.
        operators_without_rule: operator -> the nodes of the recorded graph at which it stands.
        attributes: what the forward pass reads from attributes and must follow a removal.
        grouped: layers that are grouped convolutions or group normalisations; with one channel left in every group, or
            one group left, the shape no longer tells them from depthwise ones, or from layer normalisations.
    """

    groups: dict[str, Group]
    frozen: list[Frozen]
    sizes: dict[Slot, int]
    uses: dict[str, float]
    products: tuple[Product, ...] = ()
    trail: Trail = field(default_factory=Trail, repr=False)
    other_macs: float = 0.0
    operators_without_rule: dict[str, list[str]] = field(default_factory=dict)
    grouped: frozenset[str] = frozenset()
    attributes: tuple[AttributeRule, ...] = ()

    @property
    def widths(self) -> dict[str, int]:
        """Group name -> number of channels now."""
        return {name: group.width for name, group in self.groups.items()}

    @property
    def removable(self) -> int:
        """Output channels of layers that stand in a group."""
        return sum(
            len(part.positions)
            for group in self.groups.values()
            for part in group.slices
            if (part.tensor, part.dim) in group.filters
        )

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

    def remove_from(
        self, model: nn.Module, removals: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Take channels out of `model`, for real and in place, and out of this graph of it.

        Args:
            removals: group -> channels, int64.
            optimizer: its state is cut alike.

        Raises:
            WorkError: a module, or the optimizer's state, cannot follow (`compress.removal.keep_slices`).
        """
        keep_slices(model, self.keep(removals), optimizer, self.attributes)
        self.remove(removals)

    def without(self, names: Mapping[str, str]) -> ChannelGraph:
        """The graph with the groups `names` (name -> reason) frozen."""
        frozen = list(self.frozen)
        for name, reason in names.items():
            group = self.groups[name]
            frozen.append(Frozen(tuple(producer.layer for producer in group.producers) or (group.name,), reason))
        stay = {name: self.groups[name].width for name in names}
        return replace(
            self,
            groups={name: group for name, group in self.groups.items() if name not in names},
            frozen=frozen,
            products=tuple(product.without(stay) for product in self.products),
        )


def _shrunk(group: Group, gone: Tensor, moved: Mapping[Slot, Tensor]) -> Group:
    stays = torch.ones(group.width, dtype=torch.bool)
    stays[gone] = False
    renumbered = stays.cumsum(0) - 1

    def left(part: Slices) -> Slices:
        here = stays[part.channels]
        positions, channels = part.positions[here], renumbered[part.channels[here]]
        move = moved.get((part.tensor, part.dim))
        return replace(part, positions=positions if move is None else move[positions], channels=channels)

    return replace(
        group,
        width=int(stays.sum()),
        kept=group.kept[stays],
        slices=tuple(left(part) for part in group.slices),
        gates=tuple(left(part) for part in group.gates),
    )
