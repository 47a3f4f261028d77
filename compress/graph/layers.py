"""Rules for layers that bind channels to slices of their weights: convolutions and linear layers."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor, fx

from compress.graph.flows import Flow, Kernel, Weight
from compress.graph.labels import along_only, blank, first_along, varying
from compress.graph.rules import aten, rule
from compress.graph.walk import Walk


def layer_of(weight: Weight | Kernel) -> str:
    """`layer1.0.conv1.weight` -> `layer1.0.conv1`; a parameter of the model itself keeps its name."""
    return weight.name.rpartition(".")[0] or weight.name


def computed(walk: Walk, node: fx.Node, reason: str, *values: Any) -> Flow:
    """A layer whose weight is itself computed: what goes in and what comes out stays as it is."""
    for value in values:
        flow = walk.as_flow(value)
        if isinstance(flow, Flow):
            walk.freeze(flow.labels, reason)
    return walk.frozen(node.meta["val"].shape, reason)


def _usable(weight: Any, bias: Any) -> bool:
    """Whether a layer's parameters are stored, or computed from stored ones in a way that keeps their axes."""
    if isinstance(weight, Kernel) and len(weight.shape) < 2:
        return False
    return isinstance(weight, Weight | Kernel) and isinstance(bias, Weight | Flow | None)


@rule(
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
)
def convolution(walk: Walk, node: fx.Node, x: Any, weight: Any, bias: Any = None, *_: Any, **__: Any) -> Flow:
    x = walk.as_flow(x)
    if not _usable(weight, bias):
        return computed(walk, node, "convolution with a computed weight", x, weight, bias)
    if node.target is aten.convolution.default and node.args[6]:
        return computed(walk, node, "transposed convolution written as aten.convolution", x, weight, bias)
    if x.labels.dim() != len(weight.shape):
        return computed(walk, node, "convolution of an image without a batch axis", x, weight, bias)
    if isinstance(weight, Kernel):
        for labels in weight.axes:
            if varying(labels) not in ([0], [1]):
                walk.freeze(labels, "places of a filter")
    layer, (outputs, inputs), shape = layer_of(weight), weight.shape[:2], node.meta["val"].shape
    walk.use(weight, shape[0] * prod(shape[2:]))
    channels = walk.along(x.labels, 1)  # (C_in,)
    groups = len(channels) // inputs
    if groups == 1:
        walk.consume(layer, weight, 1, x, channels)
        made = walk.new(outputs)
    elif inputs == 1 and layer not in walk.grouped:
        # Depthwise: output channels stand and fall with their input channel.
        made = channels.repeat_interleave(outputs // groups)
    else:
        # Grouped: every group loses the same positions, so that the groups stay of one size.
        walk.grouped.add(layer)
        rows = channels.view(groups, inputs)
        walk.together(rows, rows[:1])
        walk.consume(layer, weight, 1, x, rows[0])
        made = walk.new(outputs)
        walk.together(made.view(groups, -1), made.view(groups, -1)[:1])
    gates = walk.produce(layer, [(weight, 0), (bias, 0)], made)
    return _made(made.view(1, -1, *[1] * (len(shape) - 2)).expand(shape), gates, weight)


def _made(labels: Tensor, gates: frozenset[str], weight: Weight | Kernel) -> Flow:
    """What a layer makes, which a factor on its gates multiplies, unless its weight is computed and has none."""
    scaled = isinstance(weight, Weight) or weight.linear or bool(weight.gates)
    return Flow(labels, gates, vanishes=scaled, linear=scaled)


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(
    walk: Walk, node: fx.Node, x: Flow, weight: Any, bias: Any = None, *_: Any, **__: Any
) -> Flow:
    if not isinstance(weight, Weight) or not isinstance(bias, Weight | None):
        return computed(walk, node, "transposed convolution with a computed weight", x, weight, bias)
    shape = node.meta["val"].shape
    if shape[1] != weight.shape[1]:
        return computed(walk, node, "transposed convolution in groups", x, weight, bias)
    layer = layer_of(weight)
    walk.use(weight, prod(x.shape[2:]) * x.shape[0])
    walk.consume(layer, weight, 0, x, walk.along(x.labels, 1))
    made = walk.new(shape[1])
    gates = walk.produce(layer, [(weight, 1), (bias, 0)], made)
    return _made(made.view(1, -1, *[1] * (len(shape) - 2)).expand(shape), gates, weight)


@rule(aten.linear.default)
def linear(walk: Walk, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Flow:
    x = walk.as_flow(x)
    if not _usable(weight, bias):
        return computed(walk, node, "linear layer with a computed weight", x, weight, bias)
    return dense(walk, node.meta["val"].shape, x, weight, bias)


@rule(aten.embedding.default)
def embedding(walk: Walk, node: fx.Node, weight: Any, indices: Any, *_: Any, **__: Any) -> Flow:
    """A table of vectors, picked by their numbers."""
    if not isinstance(weight, Weight | Kernel) or len(weight.shape) < 2:
        return computed(walk, node, "embedding in a computed table", weight, indices)
    walk.freeze(walk.as_flow(indices).labels, "numbers of positions")
    made, shape = walk.new(weight.shape[1]), node.meta["val"].shape
    gates = walk.produce(layer_of(weight), [(weight, 1)], made)
    return _made(along_only(made, len(shape) - 1, shape), gates, weight)


def dense(
    walk: Walk,
    shape: Sequence[int],
    x: Flow,
    weight: Weight | Kernel,
    bias: Weight | Flow | None = None,
    *,
    inputs: int = 1,
    axis: int = -1,
) -> Flow:
    """A product of `x` with a matrix, which replaces the channels along `axis`.

    Args:
        shape: of the result.
        weight: of two axes.
        inputs: that of the two along which it reads channels; the other makes them.
    """
    layer, axis = layer_of(weight), axis % x.labels.dim()
    if axis not in varying(x.labels) and walk.stays(x.labels):
        x = replace(x, labels=blank(x.labels.shape))  # of a stream that stays, as where an MLP mixes its tokens
    others = [dim for dim in varying(x.labels) if dim != axis]
    positions = prod(shape) / shape[axis]
    if not others:
        walk.use(weight, positions)
    else:
        walk.multiply_along(positions * weight.shape.numel(), x.labels, others)
        # It mixes positions, or the channels of each head by themselves; its own slices stay.
        reason = "linear layer over one of several channel axes"
        walk.whole(x.labels, axis, reason, same=True)
        if isinstance(weight, Kernel):
            walk.stuck(weight, "a computed weight that mixes positions")
        else:
            made = walk.new(shape[axis])
            walk.produce(layer, [(weight, 1 - inputs), (bias, 0)], made)
            walk.freeze(made, reason)
        mixed = first_along(x.labels, axis).narrow(axis, 0, 1).expand(tuple(shape))
        return replace(x, labels=mixed, vanishes=x.vanishes and bias is None)
    walk.consume(layer, weight, inputs, x, walk.along(x.labels, axis))
    made = walk.new(shape[axis])
    gates = walk.produce(layer, [(weight, 1 - inputs), (bias, 0)], made)
    return _made(along_only(made, axis, shape), gates, weight)
