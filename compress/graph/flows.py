"""What the walk knows of the values in a graph: activations, stored tensors, and tensors computed from stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flow:
    """An activation, or a vector of parameters used as one.

    Attributes:
        labels: int64, of the activation's shape; axes along which labels are equal have stride 0.
        gates: names of the layers or bare parameters (keys of `Walk.gates`) on which a factor of 0 would make this
            activation's channel vanish.
        vanishes: whether the channel's values are all 0 when those gates are 0. A sigmoid, for one, ends that.
        linear: whether the channel's values are multiplied by whatever those gates are multiplied by.
        left: labels of channels that do not vanish although the others do (a part of a concatenation).
    """

    labels: Tensor
    gates: frozenset[str] = frozenset()
    vanishes: bool = False
    linear: bool = False
    left: tuple[Tensor, ...] = ()

    @property
    def shape(self) -> torch.Size:
        return self.labels.shape

    def moved(self, labels: Tensor) -> Flow:
        """The same channels at other places."""
        return replace(self, labels=labels)

    def applied(self, *, keeps_zero: bool = True) -> Flow:
        """Behind a function of every element by itself, which is not linear.

        Args:
            keeps_zero: whether it is 0 at 0.
        """
        return replace(self, vanishes=self.vanishes and keeps_zero, linear=False)

    def joined(self, others: Sequence[Flow], labels: Tensor) -> Flow:
        """A combination with `others` that vanishes where all of them do, and is linear where all are, as a sum is."""
        flows = (self, *others)
        return Flow(
            labels,
            frozenset().union(*(flow.gates for flow in flows)),
            all(flow.vanishes for flow in flows),
            all(flow.linear for flow in flows),
            sum((flow.left for flow in flows), ()),
        )


def gating(flows: Sequence[Flow]) -> Flow | None:
    """Of the factors of a product that vanish the one that gates it: rather all of it, and linearly."""
    return max((flow for flow in flows if flow.vanishes), key=lambda flow: (not flow.left, flow.linear), default=None)


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer used by the graph, not yet combined with an activation."""

    name: str
    shape: torch.Size
    trainable: bool

    @property
    def axes(self) -> list[int]:
        """The dimensions that are longer than 1."""
        return [dim for dim, size in enumerate(self.shape) if size > 1]


@dataclass(frozen=True)
class Kernel:
    """A value computed from a stored tensor with several axes: a standardised weight, a table of position biases.

    Each element lies at one position of every axis of the stored tensor, so it has one label for each.

    Attributes:
        name: of the stored tensor.
        dims: the stored tensor's dimensions that are longer than 1.
        axes: for each of `dims` labels of the value's shape.
        gates: as in `Flow`; vectors of parameters that the value was multiplied by.
        linear: whether a slice of the value is 0 when the same slice of the stored tensor is.
        trainable: whether the stored tensor is a parameter.
        elements: of the stored tensor.
    """

    name: str
    dims: tuple[int, ...]
    axes: tuple[Tensor, ...]
    shape: torch.Size
    gates: frozenset[str] = frozenset()
    linear: bool = True
    trainable: bool = True
    elements: int = 1

    def moved(self, axes: tuple[Tensor, ...], shape: torch.Size) -> Kernel:
        """The same positions at other places."""
        return replace(self, axes=axes, shape=shape)
