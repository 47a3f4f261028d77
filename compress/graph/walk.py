"""Integer labels run through a model's exported ATen graph: which channels depend on which, and through which slices.

Every activation is represented by an integer tensor of the activation's own shape whose elements name the channel
that they belong to. Operators that move data move the labels alike; operators that combine data join the labels of
the elements that they combine; operators with weights bind labels to positions along a dimension of a parameter. In the
end two positions belong to the same channel when a chain of joins connects them.

An axis along which labels are equal has stride 0 (`torch.Tensor.expand`), so an activation costs memory and time for
its channels, not for its pixels.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx

NO_CHANNEL = -1
"""Label of an element that belongs to no channel (a constant, a mask, an index)."""

Rule = Callable[..., Any]
"""What a row of the operator table holds: `rule(walk, node, *args, **kwargs)`, with the operator's arguments (each
activation a `Flow`, each stored tensor a `Weight`), returns what the operator returns, as `Flow`."""


@dataclass(frozen=True)
class Flow:
    """What the walk knows of one activation.

    Attributes:
        labels: int64, of the activation's shape; axes along which labels are equal have stride 0.
        gates: names of the layers or bare parameters (keys of `Walk.gates`) on which a factor of 0 would make this
            activation's channel vanish.
        vanishes: whether the channel's values are all 0 when those gates are 0. A sigmoid, for one, ends that.
    """

    labels: Tensor
    gates: frozenset[str] = frozenset()
    vanishes: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.labels.shape

    def moved(self, labels: Tensor) -> Flow:
        """The same channels at other places."""
        return Flow(labels, self.gates, self.vanishes)


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer used by the graph, not yet combined with an activation."""

    name: str
    shape: torch.Size
    trainable: bool


def compact(labels: Tensor) -> Tensor:
    """Narrow every axis of stride 0 to size 1: (N, C, H, W) whose labels follow C only -> (1, C, 1, 1)."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def spread(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Expand to `shape` after making stride 0 every axis along which the labels turn out to be equal."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1 and labels.stride(dim) != 0:
            first = labels.narrow(dim, 0, 1)
            if bool((labels == first).all()):
                labels = first
    return labels.expand(tuple(shape))


def varying(labels: Tensor) -> list[int]:
    """The axes along which labels differ."""
    return [dim for dim in range(labels.dim()) if labels.shape[dim] > 1 and labels.stride(dim) != 0]


@dataclass
class Walk:
    """The state of one walk; rules (see `compress.graph.rules`) call its methods.

    Attributes:
        bindings: (tensor, dim) -> the labels of its positions, in order of first use.
        producers: (tensor, dim) of weights whose slices along `dim` make new channels, with their layer's name.
        consumers: (tensor, dim) of weights that read channels along `dim`, with their layer's name.
        norms: layer of a producer -> the normalisation layers that follow it directly.
        gates: name of a gate -> the (parameter, dim) pairs whose product with a factor gates the channel.
        direct: names of the gates that stand directly before a consumer.
        uses: weight -> multiply-adds that each of its elements takes part in, for one image.
        unknown: operator without a rule -> the nodes at which it stands.
        grouped: layers that are grouped convolutions, not depthwise ones.
        count: number of labels given out.
    """

    rules: Mapping[Any, Rule]
    bindings: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    producers: dict[tuple[str, int], str] = field(default_factory=dict)
    consumers: dict[tuple[str, int], str] = field(default_factory=dict)
    norms: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    gates: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    direct: set[str] = field(default_factory=set)
    uses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    unknown: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    grouped: set[str] = field(default_factory=set)
    count: int = 0
    _edges: list[Tensor] = field(default_factory=list)
    _frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    _residue: list[tuple[Tensor, str]] = field(default_factory=list)
    _batch: int = 1
    _counting: bool = True

    # --- what rules use -----------------------------------------------------------------------------------------

    def new(self, count: int) -> Tensor:
        """`count` fresh labels, shape (count,)."""
        labels = torch.arange(self.count, self.count + count)
        self.count += count
        return labels

    def unlabelled(self, shape: Sequence[int]) -> Flow:
        """An activation without channels."""
        return Flow(torch.full((1,) * len(shape), NO_CHANNEL).expand(tuple(shape)))

    def frozen(self, shape: Sequence[int], reason: str) -> Flow:
        """An activation all of whose elements belong to one channel that is never removed."""
        label = self.new(1)
        self._frozen.append((label, reason))
        return Flow(label.view((1,) * len(shape)).expand(tuple(shape)))

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Never remove the channels that these labels name; `reason` is reported to the user."""
        labels = compact(labels).flatten()
        labels = labels[labels != NO_CHANNEL].unique()
        if len(labels):
            self._frozen.append((labels, reason))

    def join(self, first: Tensor, second: Tensor) -> None:
        """Elements at the same place belong to the same channel; shapes must broadcast."""
        first, second = torch.broadcast_tensors(compact(first), compact(second))
        pairs = torch.stack([first.flatten(), second.flatten()])
        pairs = pairs[:, (pairs[0] != pairs[1]) & (pairs != NO_CHANNEL).all(dim=0)]
        if pairs.shape[1]:
            self._edges.append(pairs)

    def along(self, labels: Tensor, dim: int) -> Tensor:
        """Labels along `dim`, shape (size of dim,); elements that differ across the other axes are joined."""
        columns = compact(labels).movedim(dim, 0).flatten(1) if labels.dim() > 1 else compact(labels)[:, None]
        first = columns[:, 0]
        if columns.shape[1] > 1:
            self.join(columns, first[:, None])
        return first.expand(labels.shape[dim]) if len(first) == 1 else first

    def bind(self, weight: Weight | None, dim: int, labels: Tensor) -> None:
        """Position i along `dim` of `weight` belongs to the channel of `labels[i]`, whoever else uses the weight."""
        if weight is None:
            return
        if bool((labels == NO_CHANNEL).any()):
            missing = int((labels == NO_CHANNEL).sum())
            labels = labels.clone()
            labels[labels == NO_CHANNEL] = self.new(missing)
            self.freeze(labels, f"{weight.name} reads values that belong to no channel")
        earlier = self.bindings.setdefault((weight.name, dim), labels)
        self.join(earlier, labels)

    def produce(self, layer: str, weights: Iterable[tuple[Weight | None, int]], labels: Tensor) -> frozenset[str]:
        """`layer` makes the channels `labels` from slices of `weights`; returns the layer as a gate."""
        pairs = [(weight, dim) for weight, dim in weights if weight is not None]
        for position, (weight, dim) in enumerate(pairs):
            self.bind(weight, dim, labels)
            if position == 0:
                self.producers[weight.name, dim] = layer
        self.gates[layer] = [(weight.name, dim) for weight, dim in pairs if weight.trainable]
        return frozenset([layer])

    def consume(self, layer: str, weight: Weight | None, dim: int, flow: Flow, labels: Tensor) -> None:
        """`layer` reads the channels `labels` of `flow` through slices of `weight`, the end of their group."""
        self.bind(weight, dim, labels)
        if weight is not None:
            self.consumers[weight.name, dim] = layer
        self.direct |= flow.gates
        if not flow.vanishes:
            self._residue.append((compact(labels), layer))

    def normalise(self, layer: str, flow: Flow) -> None:
        """`layer` normalises every channel of `flow` by itself."""
        for producer in sorted(flow.gates):
            if layer not in self.norms[producer]:
                self.norms[producer].append(layer)

    def as_flow(self, value: Any) -> Any:
        """A weight used bare as an activation that owns its channels; anything else as it is.

        A weight with one axis longer than 1 is a vector of channel values. Of one with more axes nothing says which
        is the channels', so it is frozen.
        """
        if not isinstance(value, Weight):
            return value
        axes = [dim for dim, size in enumerate(value.shape) if size > 1]
        if len(axes) > 1:
            flow = self.frozen(value.shape, f"{value.name} is used outside a layer and has more than one axis")
            for dim in axes:
                self.bind(value, dim, flow.labels.flatten()[:1].expand(value.shape[dim]))
            return flow
        if not axes:
            return self.unlabelled(value.shape)
        (axis,) = axes
        labels = self.bindings.get((value.name, axis))
        if labels is None:
            labels = self.new(value.shape[axis])
            self.bind(value, axis, labels)
        shape = [1] * len(value.shape)
        shape[axis] = -1
        gates: frozenset[str] = frozenset()
        if value.trainable:
            self.gates[value.name] = [(value.name, axis)]
            gates = frozenset([value.name])
        return Flow(spread(labels.view(shape), value.shape), gates, vanishes=value.trainable)

    def use(self, weight: Weight, positions: float) -> None:
        """Each element of `weight` is multiplied at `positions` places of the whole batch."""
        if self._counting:
            self.uses[weight.name] += positions / self._batch

    # --- the walk itself ----------------------------------------------------------------------------------------

    def run(self, program: torch.export.ExportedProgram, *, counting: bool = True) -> None:
        """Visit every node of the exported program once, in order; several programs of one model add up.

        Args:
            counting: whether this program's multiply-adds count.
        """
        self._counting = counting
        signature = program.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        values: dict[fx.Node, Any] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = self._placeholder(node, stored, signature)
            elif node.op == "output":
                for output in node.all_input_nodes:
                    flow = self.as_flow(values[output])
                    if isinstance(flow, Flow):
                        self.freeze(flow.labels, "output of the model")
            elif node.op == "call_function":
                values[node] = self._call(node, values)

    def ignore(self, named: Callable[[str], bool]) -> None:
        """Freeze the output channels of every layer whose name fits."""
        for (tensor, dim), layer in self.producers.items():
            if named(layer):
                self.freeze(self.bindings[tensor, dim], "named in ignore")

    def _placeholder(self, node: fx.Node, stored: dict[str, str], signature: Any) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return value
        if node.name in stored:
            trainable = node.name in signature.inputs_to_parameters
            return Weight(stored[node.name], value.shape, trainable)
        if node.name in signature.user_inputs:
            if value.dim():
                self._batch = max(1, int(value.shape[0]))
            return self.frozen(value.shape, "input of the model")
        return self.unlabelled(value.shape)

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args: Any = fx.node.map_arg(node.args, values.get)
        kwargs: Any = fx.node.map_arg(node.kwargs, values.get)
        if node.target is operator.getitem:
            return args[0][args[1]] if args[0] is not None else None
        rule = self.rules.get(node.target)
        result = rule(self, node, *args, **kwargs) if rule else self._without_rule(node, args, kwargs)
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and node.args:
            target = node.args[0]
            if isinstance(target, fx.Node) and isinstance(result, Flow):
                values[target] = result  # an in-place operator changes what later readers of its input see
        return result

    def _without_rule(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        reason = f"operator {node.target} has no rule"
        touched: list[Any] = []
        fx.node.map_aggregate((args, kwargs), touched.append)
        flows = [flow for flow in map(self.as_flow, touched) if isinstance(flow, Flow)]
        if all(bool((compact(flow.labels) == NO_CHANNEL).all()) for flow in flows):
            make = self.unlabelled  # constants in, constants out
        else:
            self.unknown[str(node.target)].append(node.name)
            make = partial(self.frozen, reason=reason)
            for flow in flows:
                self.freeze(flow.labels, reason)
        return torch.utils._pytree.tree_map_only(Tensor, lambda value: make(value.shape), node.meta.get("val"))

    # --- the result ---------------------------------------------------------------------------------------------

    def classes(self) -> np.ndarray:
        """(count,) int array: labels with equal entries name the same channel (union-find over all joins)."""
        if not self._edges:
            return np.arange(self.count)
        edges = torch.cat(self._edges, dim=1).numpy()
        graph = coo_array((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), (self.count, self.count))
        return connected_components(graph, directed=False)[1]

    def marks(self, classes: np.ndarray, *, residue: bool = False) -> dict[int, str]:
        """Class -> why it is frozen (or, with `residue`, which layer reads a value that zeroing leaves behind)."""
        found: dict[int, str] = {}
        for labels, reason in self._residue if residue else self._frozen:
            flat = labels.flatten().numpy()
            for one in np.unique(classes[flat[flat != NO_CHANNEL]]):
                found.setdefault(int(one), reason)
        return found
