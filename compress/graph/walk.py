"""Integer labels run through a model's recorded operators: which channels depend on which, and through which slices.

Every activation is represented by an integer tensor of the activation's own shape whose elements name the channel
that they belong to. Operators that move data move the labels alike; operators that combine data join the labels of
the elements that they combine; operators with weights bind labels to positions along a dimension of a parameter. In the
end two positions belong to the same channel when a chain of joins connects them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from torch import Tensor, fx

from compress.errors import InputError
from compress.graph.comparison import Step
from compress.graph.flows import Flow, Kernel, Weight
from compress.graph.labels import NO_CHANNEL, along_only, blank, compact, varying
from compress.graph.partition import Partition

Attention = Literal["heads", "widths", "keep"]
"""What of an attention layer can go: whole heads, the same channels of every head, or nothing."""

Rule = Callable[..., Any]
"""What a row of the operator table holds: `rule(walk, node, *args, **kwargs)`, with the operator's arguments (each
activation a `Flow`, each stored tensor a `Weight`), returns what the operator returns, as `Flow`."""


@dataclass
class Walk(Partition):
    """The state of one walk; rules (see `compress.graph.rules`) call its methods.

    Attributes:
        attention: what of an attention layer can go.
        embedding: whether channels that a normalisation mixes with others can go.
        grouped: layers that are grouped convolutions, not depthwise ones, or group normalisations of several groups.
        bindings: (tensor, dim) -> the labels of its positions, in order of first use.
        producers: (tensor, dim) of weights whose slices along `dim` make new channels, with their layer's name.
        consumers: (tensor, dim) of weights that read channels along `dim`, with their layer's name.
        norms: layer of a producer -> the normalisation layers that follow it directly.
        gates: name of a gate -> the (parameter, dim) pairs whose product with a factor gates the channel.
        uses: weight -> multiply-adds that each of its elements takes part in, for one image.
        products: multiply-adds of a product of activations for one image and one position of each of its axes with
            channels, and the labels along these axes.
        steps: every operator, in the order of the graph.
        noted: numbers that the operator visited now works with, besides those that it is given.
        unknown: operator without a rule -> the nodes at which it stands.
    """

    rules: Mapping[Any, Rule] = field(default_factory=dict)
    attention: Attention = "heads"
    embedding: bool = False
    grouped: set[str] = field(default_factory=set)
    bindings: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    producers: dict[tuple[str, int], str] = field(default_factory=dict)
    consumers: dict[tuple[str, int], str] = field(default_factory=dict)
    norms: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    gates: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    uses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    products: list[tuple[float, list[Tensor]]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    noted: list[float] = field(default_factory=list)
    unknown: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    batch: int = 1
    counting: bool = True

    # --- activations --------------------------------------------------------------------------------------------

    def unlabelled(self, shape: Sequence[int]) -> Flow:
        """An activation without channels."""
        return Flow(blank(shape))

    def frozen(self, shape: Sequence[int], reason: str) -> Flow:
        """An activation all of whose elements belong to one channel that is never removed."""
        label = self.new(1)
        self.freeze(label, reason)
        return Flow(label.view((1,) * len(shape)).expand(tuple(shape)))

    def along(self, labels: Tensor, dim: int) -> Tensor:
        """Labels along `dim`, shape (size of dim,); elements that differ across the other axes are joined."""
        columns = compact(labels).movedim(dim, 0).flatten(1) if labels.dim() > 1 else compact(labels)[:, None]
        first = columns[:, 0]
        if columns.shape[1] > 1:
            self.join(columns, first[:, None])
        return first.expand(labels.shape[dim]) if len(first) == 1 else first

    def as_flow(self, value: Any) -> Any:
        """A vector of parameters used bare as an activation that owns its channels; anything else as it is.

        Of a stored tensor with several axes nothing says which is the channels': it is frozen. Rules that know better
        take it as a `Kernel`.
        """
        if isinstance(value, Kernel):
            return self.stuck(value, "combined with a parameter of several axes")
        if not isinstance(value, Weight):
            return value
        if len(value.axes) > 1:
            return self.as_flow(self.kernel(value))
        if not value.axes:
            return self.unlabelled(value.shape)
        (axis,) = value.axes
        labels = self._own(value, axis)
        gates = self.gated(value.name, [(value.name, axis)] if value.trainable else [])
        return Flow(along_only(labels, axis, value.shape), gates, vanishes=bool(gates), linear=bool(gates))

    def kernel(self, weight: Weight) -> Kernel:
        """A stored tensor with several axes, about to be computed with."""
        axes = tuple(along_only(self._own(weight, dim), dim, weight.shape) for dim in weight.axes)
        return Kernel(
            weight.name,
            tuple(weight.axes),
            axes,
            weight.shape,
            trainable=weight.trainable,
            elements=weight.shape.numel(),
        )

    def stuck(self, kernel: Kernel, reason: str) -> Flow:
        """Freeze all axes of `kernel`."""
        for labels in kernel.axes:
            self.freeze(labels, reason)
        return self.frozen(kernel.shape, reason) if kernel.trainable else self.unlabelled(kernel.shape)

    def _own(self, weight: Weight, dim: int) -> Tensor:
        labels = self.bindings.get((weight.name, dim))
        if labels is None:
            labels = self.new(weight.shape[dim])
            self.bind(weight, dim, labels)
        return labels

    # --- weights ------------------------------------------------------------------------------------------------

    def bind(self, weight: Weight | None, dim: int, labels: Tensor) -> None:
        """Position i along `dim` of `weight` belongs to the channel of `labels[i]`, whoever else uses the weight."""
        if weight is None:
            return
        labels = self._owned(labels, f"{weight.name} reads values that belong to no channel")
        earlier = self.bindings.setdefault((weight.name, dim), labels)
        self.join(earlier, labels)

    def attach(self, value: Weight | Kernel | Flow | None, dim: int, labels: Tensor) -> None:
        """`bind` for a weight that may be computed: position i along `dim` of `value` belongs to `labels[i]`."""
        if isinstance(value, Kernel):
            labels = self._owned(labels, f"{value.name} reads values that belong to no channel")
            own = [axis for axis in value.axes if dim in varying(axis)]
            for axis in own:
                self.join(self.along(axis, dim), labels)
            if not own and value.shape[dim] > 1:
                self.freeze(labels, f"computed from {value.name}, which does not follow its channels")
        elif isinstance(value, Flow):
            own_labels = self.along(value.labels, dim)
            if bool((own_labels == NO_CHANNEL).any()) and value.shape[dim] > 1:
                self.freeze(labels, "combined with a constant of fixed width")
            self.join(own_labels, labels)
        else:
            self.bind(value, dim, labels)

    def _owned(self, labels: Tensor, reason: str) -> Tensor:
        """Labels in which positions that belong to no channel got frozen channels of their own."""
        bare = labels == NO_CHANNEL
        if not bool(bare.any()):
            return labels
        labels = labels.clone()
        fresh = self.new(int(bare.sum()))
        labels[bare] = fresh
        self.freeze(fresh, reason)
        return labels

    def produce(
        self, layer: str, weights: Iterable[tuple[Weight | Kernel | Flow | None, int]], labels: Tensor
    ) -> frozenset[str]:
        """`layer` makes the channels `labels` from slices of `weights`; returns what gates them."""
        pairs: list[tuple[str, int]] = []
        gates: frozenset[str] = frozenset()
        for position, (weight, dim) in enumerate(weights):
            if weight is None:
                continue
            self.attach(weight, dim, labels)
            if isinstance(weight, Flow):
                gates |= weight.gates  # a bias that is computed
                continue
            slot = slot_of(weight, dim)
            if position == 0 and slot is not None:
                self.producers[slot] = layer
            if isinstance(weight, Kernel) and not weight.linear:
                gates |= weight.gates
            elif slot is not None and weight.trainable:
                pairs.append(slot)
        return gates | self.gated(layer, pairs)

    def gated(self, name: str, slots: Iterable[tuple[str, int]]) -> frozenset[str]:
        """`name` gates with these slots too, after those that it has from other places of the same parameter."""
        new = list(slots)
        if not new:
            return frozenset()
        known = self.gates.setdefault(name, [])
        known += [slot for slot in new if slot not in known]
        return frozenset([name])

    def consume(self, layer: str, weight: Weight | Kernel | None, dim: int, flow: Flow, labels: Tensor) -> None:
        """`layer` reads the channels `labels` of `flow` through slices of `weight`, the end of their group."""
        self.attach(weight, dim, labels)
        slot = None if weight is None else slot_of(weight, dim)
        if slot is not None:
            self.consumers[slot] = layer
        self.read(layer, flow)

    def read(self, layer: str, flow: Flow) -> None:
        """`layer` is where channels of `flow` end: without one it computes what it does with zeros there."""
        self.arrive(flow.gates, flow.labels)
        for labels in flow.left if flow.vanishes else (flow.labels,):
            self.leave(labels, layer)

    def normalise(self, layer: str, flow: Flow) -> None:
        """`layer` normalises every channel of `flow` by itself."""
        for producer in sorted(flow.gates):
            if layer not in self.norms[producer]:
                self.norms[producer].append(layer)

    def mixes(self, flow: Flow, dims: Iterable[int], layer: str, reason: str) -> None:
        """Statistics over `dims` of `flow`, which therefore change with the channels that lie there."""
        for dim in dims:
            if varying(flow.labels) == [dim] and self.embedding:
                self.mix(flow.labels, layer)
            else:
                self.whole(flow.labels, dim, reason, same=True)

    def use(self, weight: Weight | Kernel, positions: float) -> None:
        """Each element of `weight` is multiplied at `positions` places of the whole batch."""
        if self.counting:
            share = weight.shape.numel() / weight.elements if isinstance(weight, Kernel) else 1
            self.uses[weight.name] += positions * share / self.batch

    def multiply_along(self, count: float, labels: Tensor, dims: Sequence[int]) -> None:
        """`count` multiply-adds of the whole batch, as many at every position along these dimensions."""
        if self.counting:
            share = count / (prod(labels.shape[dim] for dim in dims) * self.batch)
            self.products.append((share, [compact(labels).movedim(dim, 0).flatten(1)[:, 0] for dim in dims]))

    # --- what users ask for ---------------------------------------------------------------------------------------

    def ignore(self, named: Callable[[str], bool]) -> None:
        """Freeze the output channels of every layer whose name fits."""
        for (tensor, dim), layer in self.producers.items():
            if named(layer):
                self.freeze(self.bindings[tensor, dim], "named in ignore")

    def protect(self, named: Callable[[str], bool]) -> None:
        """Freeze every channel that has a slice in a tensor whose name, or whose module's name, fits."""
        for (tensor, _), labels in self.bindings.items():
            if named(tensor):
                self.freeze(labels, "named in protect")

    def tie(self, first: str, second: str) -> None:
        """Output channel i of one layer can go only together with output channel i of the other.

        Raises:
            InputError: a layer makes no channels, or the two make different numbers of them.
        """
        made = []
        for name in (first, second):
            slots = [slot for slot, layer in self.producers.items() if layer == name]
            if not slots:
                raise InputError(f"tie names {name!r}, which is no layer that makes channels.")
            made.append(self.bindings[slots[0]])
        if len(made[0]) != len(made[1]):
            raise InputError(
                f"tie names {first!r} and {second!r}, which make {len(made[0])} and {len(made[1])} channels: only "
                "layers of equal width can be tied."
            )
        self.together(*made)


def place_of(node: fx.Node) -> str:
    """The module in whose forward pass an operator is called; the operator's own name in that of the model itself."""
    return node.meta["module"] or node.name


def slot_of(weight: Weight | Kernel, dim: int) -> tuple[str, int] | None:
    """The stored tensor's dimension that lies along `dim` of a weight."""
    if isinstance(weight, Weight):
        return weight.name, dim
    for own, labels in zip(weight.dims, weight.axes, strict=True):
        if varying(labels) == [dim]:
            return weight.name, own
    return None
