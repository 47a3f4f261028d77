"""The operator table, second part: operators that bind channels to slices of parameters and buffers."""

from math import prod
from typing import Any

from torch import fx

from compress.graph.rules import aten, rule
from compress.graph.walk import Flow, Walk, Weight, varying


def layer_of(weight: Weight) -> str:
    """`layer1.0.conv1.weight` -> `layer1.0.conv1`; a parameter of the model itself keeps its name."""
    return weight.name.rpartition(".")[0] or weight.name


def computed(walk: Walk, node: fx.Node, reason: str, *values: Any) -> Flow:
    """A layer whose weight is itself computed: what goes in and what comes out stays as it is."""
    for value in values:
        flow = walk.as_flow(value)
        if isinstance(flow, Flow):
            walk.freeze(flow.labels, reason)
    return walk.frozen(node.meta["val"].shape, reason)


@rule(
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
)
def convolution(walk: Walk, node: fx.Node, x: Flow, weight: Any, bias: Any = None, *_: Any, **__: Any) -> Flow:
    if not isinstance(weight, Weight) or not isinstance(bias, Weight | None):
        return computed(walk, node, "convolution with a computed weight", x, weight, bias)
    if node.target is aten.convolution.default and node.args[6]:
        return computed(walk, node, "transposed convolution written as aten.convolution", x, weight, bias)
    layer, (outputs, inputs), shape = layer_of(weight), weight.shape[:2], node.meta["val"].shape
    walk.use(weight, shape[0] * prod(shape[2:]))
    channels = walk.along(x.labels, 1)  # (C_in,)
    groups = len(channels) // inputs
    weights = [(weight, 0), (bias, 0)]
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
        walk.join(rows, rows[:1])
        walk.consume(layer, weight, 1, x, rows[0])
        made = walk.new(outputs)
        walk.join(made.view(groups, -1), made.view(groups, -1)[:1])
    gates = walk.produce(layer, weights, made)
    return Flow(made.view(1, -1, *[1] * (len(shape) - 2)).expand(shape), gates, vanishes=True)


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
    return Flow(made.view(1, -1, *[1] * (len(shape) - 2)).expand(shape), gates, vanishes=True)


@rule(aten.linear.default)
def linear(walk: Walk, node: fx.Node, x: Flow, weight: Any, bias: Any = None) -> Flow:
    if not isinstance(weight, Weight) or not isinstance(bias, Weight | None) or not isinstance(x, Flow):
        return computed(walk, node, "linear layer with a computed weight", x, weight, bias)
    layer, shape = layer_of(weight), node.meta["val"].shape
    walk.use(weight, prod(shape[:-1]))
    last = x.labels.dim() - 1
    if any(axis != last for axis in varying(x.labels)):
        if last in varying(x.labels):
            return computed(walk, node, "linear layer over one of several channel axes", x)
        # It mixes positions, channel by channel; its own slices are positions, which are not pruned.
        return Flow(x.labels.narrow(last, 0, 1).expand(shape), x.gates, x.vanishes and bias is None)
    walk.consume(layer, weight, 1, x, walk.along(x.labels, -1))
    made = walk.new(shape[-1])
    gates = walk.produce(layer, [(weight, 0), (bias, 0)], made)
    return Flow(made.expand(shape), gates, vanishes=True)


@rule(aten.batch_norm.default)
def batch_norm(
    walk: Walk, node: fx.Node, x: Flow, weight: Any, bias: Any, mean: Any, variance: Any, *_: Any, **__: Any
) -> Flow:
    return _per_channel_norm(walk, node, x, weight, bias, mean, variance)


@rule(aten.instance_norm.default)
def instance_norm(
    walk: Walk, node: fx.Node, x: Flow, weight: Any, bias: Any, mean: Any, variance: Any, *_: Any, **__: Any
) -> Flow:
    return _per_channel_norm(walk, node, x, weight, bias, mean, variance)


def _per_channel_norm(walk: Walk, node: fx.Node, x: Any, *stored: Any) -> Flow:
    if not isinstance(x, Flow) or not all(isinstance(value, Weight | None) for value in stored):
        return computed(walk, node, "normalisation with computed parameters", x, *stored)
    channels = walk.along(x.labels, 1)
    for value in stored:
        walk.bind(value, 0, channels)
    weight, bias = stored[:2]
    if weight is None or not weight.trainable:
        return Flow(x.labels, x.gates, vanishes=False)  # subtracting the mean leaves something of a channel of zeros
    layer = layer_of(weight)
    walk.normalise(layer, x)
    walk.gates[layer] = [(value.name, 0) for value in (weight, bias) if value is not None and value.trainable]
    return Flow(x.labels, frozenset([layer]), vanishes=True)


@rule(aten.layer_norm.default)
def layer_norm(
    walk: Walk, node: fx.Node, x: Flow, size: list[int], weight: Any = None, bias: Any = None, *_: Any
) -> Flow:
    normalised = set(range(x.labels.dim() - len(size), x.labels.dim()))
    if normalised & set(varying(x.labels)):
        walk.freeze(x.labels, "layer_norm over channels: removing a channel changes the statistics of the others")
        if len(size) == 1:
            channels = walk.along(x.labels, -1)
            for value in (weight, bias):
                walk.bind(value, 0, channels)
    return Flow(x.labels, x.gates, vanishes=False)


@rule(aten.group_norm.default)
def group_norm(walk: Walk, node: fx.Node, x: Flow, groups: int, weight: Any = None, bias: Any = None, *_: Any) -> Flow:
    walk.freeze(x.labels, "group_norm over channels: removing a channel changes the statistics of the others")
    channels = walk.along(x.labels, 1)
    for value in (weight, bias):
        walk.bind(value, 0, channels)
    return Flow(x.labels, x.gates, vanishes=False)


@rule(aten.prelu.default)
def prelu(walk: Walk, node: fx.Node, x: Flow, weight: Any) -> Flow:
    if not isinstance(weight, Weight):
        return computed(walk, node, "prelu with a computed weight", x, weight)
    if weight.shape.numel() > 1:
        walk.bind(weight, 0, walk.along(x.labels, 1))
    return x.moved(x.labels)
