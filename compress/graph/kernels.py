"""Rules for values computed from stored tensors with several axes: standardised weights, tables of position biases.

Such a value has a label for every axis of its stored tensor (`Kernel`). It ends as a layer's weight
(`compress.graph.layers`), or meets an activation, whose channels then lie along one of its axes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from compress.graph import elementwise, positions, shapes
from compress.graph.flows import Flow, Kernel, Weight
from compress.graph.labels import NO_CHANNEL, blank, compact, reshaped, spread, varying
from compress.graph.rules import RULES, applied, aten, kernel_rule
from compress.graph.walk import Rule, Walk


def _kernel(walk: Walk, value: Any) -> Any:
    """A stored tensor with several axes as a kernel; anything else as it is."""
    return walk.kernel(value) if isinstance(value, Weight) and len(value.axes) > 1 else value


def of_kernel(*operators: Any) -> Callable[[Rule], Rule]:
    """`kernel_rule` for operators on one tensor: where that is no kernel (but a shape's pattern is) as always."""

    def register(function: Rule) -> Rule:
        @kernel_rule(*operators)
        def dispatched(walk: Walk, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
            kernel = _kernel(walk, x)
            chosen = function if isinstance(kernel, Kernel) else RULES[node.target]
            return chosen(walk, node, kernel, *args, **kwargs)

        return function

    return register


# --- one kernel -----------------------------------------------------------------------------------------------------


@of_kernel(*elementwise.ZERO_STAYS_ZERO)
def elementwise_linear(walk: Walk, node: fx.Node, kernel: Kernel, *_: Any, **__: Any) -> Kernel:
    return kernel


@kernel_rule(*elementwise.ZERO_BECOMES_OTHER, aten.clamp.default, aten.clamp_min.default, aten.pow.Tensor_Scalar)
def elementwise_other(walk: Walk, node: fx.Node, *args: Any, **__: Any) -> Kernel:
    x = next(arg for arg in args if isinstance(arg, Kernel | Weight))
    return replace(_kernel(walk, x), linear=False, gates=frozenset())


@of_kernel(*shapes.MOVES)
def move(walk: Walk, node: fx.Node, kernel: Kernel, *args: Any, **kwargs: Any) -> Kernel:
    return _each(kernel, node, lambda labels: applied(node, labels, *args, **kwargs))


@of_kernel(*shapes.VIEWS)
def view(walk: Walk, node: fx.Node, kernel: Kernel, *_: Any, **__: Any) -> Kernel:
    return _each(kernel, node, lambda labels: reshaped(labels, node.meta["val"].shape))


@of_kernel(aten.expand_as.default)
def expand_as(walk: Walk, node: fx.Node, kernel: Kernel, *_: Any) -> Kernel:
    return _each(kernel, node, lambda labels: labels.expand(node.meta["val"].shape))


@of_kernel(aten.slice.Tensor, aten.narrow.default, aten.select.int)
def cut(walk: Walk, node: fx.Node, kernel: Kernel, dim: int = 0, *args: Any, **kwargs: Any) -> Kernel:
    if node.meta["val"].shape == kernel.shape:
        return kernel
    for labels in kernel.axes:
        if dim % len(kernel.shape) in varying(labels):
            walk.freeze(labels, f"{kernel.name} is cut at a fixed place")
    return _each(kernel, node, lambda labels: applied(node, labels, dim, *args, **kwargs))


@of_kernel(*shapes.SPLITS)
def split(walk: Walk, node: fx.Node, kernel: Kernel, *args: Any, **kwargs: Any) -> list[Kernel]:
    """Queries, keys and values stacked in one weight."""
    values = node.meta["val"]
    parts = [shapes.parts_of(walk, node, labels, *args, **kwargs) for labels in kernel.axes]
    return [
        kernel.moved(tuple(spread(part, part.shape) for part in parts_here), value.shape)
        for *parts_here, value in zip(*parts, values, strict=True)
    ]


@of_kernel(aten.index.Tensor)
def index(walk: Walk, node: fx.Node, kernel: Kernel, indices: Sequence[Any]) -> Any:
    for chosen in indices:
        if chosen is not None:
            walk.freeze(walk.as_flow(chosen).labels, "numbers of positions")
    for labels in kernel.axes:
        if any(dim in varying(labels) for dim, chosen in enumerate(indices) if chosen is not None):
            walk.freeze(labels, f"rows of {kernel.name} are picked by their numbers")
    return _each(kernel, node, lambda labels: shapes.indexed(node, labels))


@of_kernel(aten.upsample_bicubic2d.vec, aten.upsample_bilinear2d.vec, aten._upsample_bicubic2d_aa.vec)
def resize(walk: Walk, node: fx.Node, kernel: Kernel, *_: Any, **__: Any) -> Kernel:
    shape = node.meta["val"].shape

    def resized(labels: Tensor) -> Tensor:
        for dim in varying(labels):
            if labels.shape[dim] != shape[dim] or dim >= len(shape) - 2:
                walk.freeze(labels, f"{kernel.name} is resized")
                labels = labels.narrow(dim, 0, 1)
        return compact(labels).expand(shape)

    return _each(kernel, node, resized)


def _each(kernel: Kernel, node: fx.Node, function: Any) -> Kernel:
    """The same operation on the labels of every axis."""
    moved = [function(labels) for labels in kernel.axes]
    return kernel.moved(tuple(spread(labels, labels.shape) for labels in moved), node.meta["val"].shape)


# --- statistics -----------------------------------------------------------------------------------------------------


@of_kernel(
    *(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.amax.default),
    *(*positions.NORMS, *positions.DEVIATIONS),
)
def reduce(walk: Walk, node: fx.Node, kernel: Kernel, *args: Any, **kwargs: Any) -> Kernel:
    position = 1 if node.target in positions.NORMS else 0
    dims = kwargs.get("dim", args[position] if len(args) > position else None)
    rank = len(kernel.shape)
    over = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims or range(rank))}
    return _over(walk, node, kernel, over)


@of_kernel(aten.var_mean.correction, aten.std_mean.correction)
def moments(walk: Walk, node: fx.Node, kernel: Kernel, dims: Any = None, **_: Any) -> tuple[Kernel, Kernel]:
    rank = len(kernel.shape)
    over = {dim % rank for dim in (dims or range(rank))}
    shape = node.meta["val"][0].shape
    reduced = _over(walk, node, kernel, over, shape)
    return reduced, reduced


def _over(walk: Walk, node: fx.Node, kernel: Kernel, over: set[int], shape: Any = None) -> Kernel:
    shape = node.meta["val"].shape if shape is None else shape
    axes = []
    for labels in kernel.axes:
        if over & set(varying(labels)):
            _standardise(walk, kernel, labels)
            labels = blank(labels.shape)
        for dim in over:
            labels = labels.narrow(dim, 0, 1)
        axes.append(spread(reshaped(labels, shape), shape))
    return replace(kernel, axes=tuple(axes), shape=shape, linear=False)


def _standardise(walk: Walk, kernel: Kernel, labels: Tensor) -> None:
    """Statistics of a weight over the channels that it reads: they change when a channel goes."""
    layer = kernel.name.rpartition(".")[0] or kernel.name
    if walk.embedding:
        walk.mix(labels, layer)
    else:
        walk.freeze(labels, "a computed weight is normalised over the channels that it reads")


@of_kernel(aten.batch_norm.default)
def standardise(walk: Walk, node: fx.Node, kernel: Kernel, weight: Any, bias: Any, *_: Any, **__: Any) -> Any:
    """A weight standardised by batch normalisation, (1, outputs, inputs x kernel area)."""
    gates = kernel.gates
    for labels in kernel.axes:
        if set(varying(labels)) - {1}:
            _standardise(walk, kernel, labels)
    for value in (weight, bias):
        value = walk.as_flow(value)
        if isinstance(value, Flow):
            gates |= value.gates
            for labels in kernel.axes:
                if varying(labels) == [1]:
                    walk.join(walk.along(labels, 1), value.labels)
    return replace(kernel, gates=gates, linear=False)


@of_kernel(aten._weight_norm.default, aten._weight_norm_interface.default)
def weight_norm(walk: Walk, node: fx.Node, kernel: Kernel, scale: Any, dim: int = 0) -> Any:
    """g · v / |v|, with one norm for each position along `dim` (Salimans and Kingma 2016, arXiv 1602.07868)."""
    scale = walk.as_flow(scale)
    gates = kernel.gates
    for labels in kernel.axes:
        if set(varying(labels)) - {dim}:
            _standardise(walk, kernel, labels)
        elif isinstance(scale, Flow):
            walk.join(labels, scale.labels)
            gates |= scale.gates
    result = replace(kernel, gates=gates, linear=False)
    return (result, walk.unlabelled(node.meta["val"][1].shape)) if isinstance(node.meta["val"], tuple) else result


# --- two values -----------------------------------------------------------------------------------------------------


@kernel_rule(
    *(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor),
    *(aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.maximum.default),
    *(aten.masked_fill.Scalar, aten.where.self, aten.addcmul.default),
)
def combine(walk: Walk, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    values = [_kernel(walk, arg) for arg in args]
    flows = [value for value in values if isinstance(value, Flow) and not _stored(walk, value)]
    if flows:
        rank = node.meta["val"].dim()
        wide = _wide(flows, rank)
        values = [settle(walk, value, wide, rank) if isinstance(value, Kernel) else value for value in values]
        return RULES[node.target](walk, node, *values, **kwargs)
    vectors = [walk.as_flow(value) for value in values if isinstance(value, Weight | Flow)]
    # Of a weight and its mask the weight makes the channels.
    result = max((value for value in values if isinstance(value, Kernel)), key=lambda value: value.trainable)
    shape = node.meta["val"].shape
    axes = [_aligned(labels, shape) for labels in result.axes]
    gates: frozenset[str] = frozenset()
    for other in (value for value in values if isinstance(value, Kernel)):
        for labels in other.axes:
            _join_alike(walk, axes, _aligned(labels, shape))
        gates |= other.gates
    for vector in vectors:
        _join_alike(walk, axes, _aligned(vector.labels, shape))
        gates |= vector.gates if vector.vanishes else frozenset()
    if node.target in (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar):
        return replace(result, axes=tuple(axes), shape=shape, gates=gates)
    if node.target in (aten.div.Tensor, aten.div.Scalar) and values[0] is result:
        return replace(result, axes=tuple(axes), shape=shape)
    return replace(result, axes=tuple(axes), shape=shape, gates=frozenset(), linear=False)


def _stored(walk: Walk, flow: Flow) -> bool:
    """Whether it is a constant, or computed from vectors of parameters alone."""
    if not bool((compact(flow.labels) != NO_CHANNEL).any()):
        return True
    return bool(flow.gates) and all(
        slot[0] == gate and slot not in walk.producers for gate in flow.gates for slot in walk.gates[gate]
    )


def _aligned(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels after broadcasting to `shape`."""
    labels = labels[(None,) * (len(shape) - labels.dim())]
    return spread(labels.expand(torch.broadcast_shapes(labels.shape, tuple(shape))), shape)


def _join_alike(walk: Walk, axes: list[Tensor], labels: Tensor) -> None:
    """Join with the axis that follows the same dimensions; one of its own is added."""
    if not bool((compact(labels) != NO_CHANNEL).any()):
        return
    for own in axes:
        if varying(own) == varying(labels):
            walk.join(own, labels)
            return
    axes.append(labels)


def _wide(flows: Sequence[Flow], rank: int) -> list[int]:
    """The axes, of `rank` after broadcasting, along which flows have channels."""
    return sorted({dim + rank - flow.labels.dim() for flow in flows for dim in varying(flow.labels)})


def settle(walk: Walk, kernel: Kernel, wide: Sequence[int], rank: int) -> Flow:
    """The kernel as an activation: its axis that lies where channels are is the channels', the others stay.

    Args:
        wide: the axes with channels of what it is combined with, of `rank` after broadcasting.
    """
    # Of heads and the channels inside them the axis that can go.
    chosen = list(wide[-1:] if walk.attention == "widths" else wide[:1])
    found = walk.unlabelled(kernel.shape)
    for position, labels in enumerate(kernel.axes):
        if [dim + rank - labels.dim() for dim in varying(labels)] != chosen:
            walk.freeze(labels, f"positions of {kernel.name}")
            continue
        gates: frozenset[str] = frozenset()
        if kernel.trainable and kernel.linear and position < len(kernel.dims):
            gates = walk.gated(kernel.name, [(kernel.name, kernel.dims[position])])
        found = Flow(labels, gates, vanishes=bool(gates), linear=bool(gates))
    return found


def settled(walk: Walk, value: Any, flow: Flow) -> Any:
    """A value that is added to `flow` as an activation."""
    kernel, rank = _kernel(walk, value), flow.labels.dim()
    return settle(walk, kernel, _wide([flow], rank), rank) if isinstance(kernel, Kernel) else walk.as_flow(value)


@kernel_rule(aten.cat.default, aten.stack.default)
def concatenate(walk: Walk, node: fx.Node, inputs: Sequence[Any], dim: int = 0) -> Flow:
    values = [_kernel(walk, value) for value in inputs]
    rank = len(inputs[0].shape)
    wide = _wide([value for value in values if isinstance(value, Flow)], rank)
    settled = [settle(walk, value, wide, rank) if isinstance(value, Kernel) else value for value in values]
    return shapes.concatenate(walk, node, settled, dim)
