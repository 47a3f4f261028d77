"""Rules for normalisation layers, and which of them mix channels."""

from typing import Any

from torch import fx

from compress.graph.flows import Flow, Weight
from compress.graph.labels import varying
from compress.graph.layers import computed, layer_of
from compress.graph.rules import aten, rule
from compress.graph.walk import Walk, place_of

_OTHERS = "over channels: removing a channel changes the statistics of the others"


@rule(aten.batch_norm.default)
def batch_norm(
    walk: Walk, node: fx.Node, x: Flow, weight: Any, bias: Any, mean: Any, variance: Any, *_: Any, **__: Any
) -> Flow:
    return _per_channel(walk, node, x, weight, bias, mean, variance)


@rule(aten.instance_norm.default)
def instance_norm(
    walk: Walk, node: fx.Node, x: Flow, weight: Any, bias: Any, mean: Any, variance: Any, *_: Any, **__: Any
) -> Flow:
    return _per_channel(walk, node, x, weight, bias, mean, variance)


def _per_channel(walk: Walk, node: fx.Node, x: Any, *stored: Any) -> Flow:
    if not isinstance(x, Flow) or not all(isinstance(value, Weight | None) for value in stored):
        return computed(walk, node, "normalisation with computed parameters", x, *stored)
    channels = walk.along(x.labels, 1)
    for value in stored:
        walk.bind(value, 0, channels)
    return _affine(walk, x, stored[0], stored[1])


def _affine(walk: Walk, x: Flow, weight: Weight | None, bias: Weight | None) -> Flow:
    """The normalised activation; its scale and shift are its gate."""
    if weight is None or not weight.trainable:
        return Flow(x.labels, x.gates, vanishes=False)  # subtracting the mean leaves something of a channel of zeros
    layer = layer_of(weight)
    walk.normalise(layer, x)
    gates = walk.gated(layer, [(value.name, 0) for value in (weight, bias) if value is not None and value.trainable])
    return Flow(x.labels, gates, vanishes=True, linear=True)


@rule(aten.layer_norm.default)
def layer_norm(
    walk: Walk, node: fx.Node, x: Any, size: list[int], weight: Any = None, bias: Any = None, *_: Any
) -> Flow:
    return _over_last(walk, node, walk.as_flow(x), len(size), weight, bias, "layer_norm")


@rule(aten.rms_norm.default)
def rms_norm(walk: Walk, node: fx.Node, x: Any, size: list[int], weight: Any = None, *_: Any) -> Flow:
    return _over_last(walk, node, walk.as_flow(x), len(size), weight, None, "rms_norm")


def _over_last(walk: Walk, node: fx.Node, x: Flow, count: int, weight: Any, bias: Any, operator: str) -> Flow:
    """A normalisation over the last `count` axes together."""
    if not isinstance(weight, Weight | None) or not isinstance(bias, Weight | None):
        return computed(walk, node, f"{operator} with computed parameters", x, weight, bias)
    dims = range(x.labels.dim() - count, x.labels.dim())
    over = [dim for dim in dims if dim in varying(x.labels)]
    layer = place_of(node) if weight is None else layer_of(weight)
    if varying(x.labels) != [x.labels.dim() - 1] or count > 1:
        # Every head, or every position, is normalised by itself, with parameters that they share.
        for dim in over:
            walk.whole(x.labels, dim, f"{operator} {_OTHERS}")
        return Flow(x.labels, x.gates, vanishes=False)
    walk.mixes(x, over, layer, f"{operator} {_OTHERS}")
    channels = walk.along(x.labels, -1)
    for value in (weight, bias):
        walk.bind(value, 0, channels)
    return _affine(walk, x, weight, bias)


@rule(aten.group_norm.default)
def group_norm(walk: Walk, node: fx.Node, x: Flow, groups: int, weight: Any = None, bias: Any = None, *_: Any) -> Flow:
    if not isinstance(weight, Weight | None) or not isinstance(bias, Weight | None):
        return computed(walk, node, "group_norm with computed parameters", x, weight, bias)
    channels = walk.along(x.labels, 1)
    layer = place_of(node) if weight is None else layer_of(weight)
    if groups == 1 and layer not in walk.grouped:
        walk.mixes(x, [1], layer, f"group_norm {_OTHERS}")
    else:
        walk.grouped.add(layer)
        rows = channels.view(groups, -1)  # channels that are normalised together go together
        walk.together(rows, rows[:, :1])
    for value in (weight, bias):
        walk.bind(value, 0, channels)
    return _affine(walk, x, weight, bias)


@rule(aten.prelu.default)
def prelu(walk: Walk, node: fx.Node, x: Flow, weight: Any) -> Flow:
    if not isinstance(weight, Weight):
        return computed(walk, node, "prelu with a computed weight", x, weight)
    if weight.shape.numel() > 1:
        walk.bind(weight, 0, walk.along(x.labels, 1))
    return x.applied()
