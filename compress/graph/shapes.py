"""Rules for operators that move data: views, cuts, concatenation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from compress.graph.elementwise import combine
from compress.graph.flows import Flow
from compress.graph.labels import NO_CHANNEL, along_only, compact, reshaped, spread, varying
from compress.graph.rules import applied, aten, rule
from compress.graph.walk import Walk

MOVES = (
    *(aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int, aten.swapaxes.default),
    *(aten.mT.default, aten.adjoint.default, aten.swapdims.default, aten.moveaxis.int, aten.movedim.intlist),
    *(aten.broadcast_to.default, aten.flip.default),
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.expand.default, aten.numpy_T.default, aten.repeat.default),
    *(aten.repeat_interleave.self_int, aten.diagonal.default),
)
VIEWS = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.reshape_as.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default, aten.ravel.default),
)
CUTS = (aten.slice.Tensor, aten.narrow.default, aten.select.int)
SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)


@rule(*MOVES)
def move(walk: Walk, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Flow:
    x = walk.as_flow(x)
    labels = applied(node, x.labels, *args, **kwargs)
    if node.target in (aten.repeat.default, aten.repeat_interleave.self_int):
        for dim in varying(x.labels):
            here = dim + labels.dim() - x.labels.dim()
            if labels.shape[here] != x.labels.shape[dim]:
                walk.whole(x.labels, dim, "repeated along the channel axis")
    return x.moved(spread(labels, labels.shape))


@rule(aten.expand_as.default)
def expand_as(walk: Walk, node: fx.Node, x: Any, other: Any) -> Flow:
    x, other = walk.as_flow(x), walk.as_flow(other)
    # It is as wide as the other, whatever that loses.
    return x.moved(combine(walk, x, other, same=False))


@rule(*VIEWS)
def reshape(walk: Walk, node: fx.Node, x: Any, *_: Any, **__: Any) -> Flow:
    x = walk.as_flow(x)
    labels = reshaped(x.labels, node.meta["val"].shape)
    labels = spread(labels, labels.shape)
    if len(varying(labels)) > max(1, len(varying(x.labels))):
        walk.grid(labels)
    return x.moved(labels)


@rule(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
def pixel_shuffle(walk: Walk, node: fx.Node, x: Flow, factor: int) -> Flow:
    # Each pixel takes its value from another channel, all of which lie in one channel of the larger image, or back.
    labels = x.labels
    shape, reason = node.meta["val"].shape, "pixels and channels exchanged while channels lie along another axis"
    if any(dim != labels.dim() - 3 for dim in varying(labels)):
        walk.freeze(labels, reason)
        return walk.frozen(shape, reason)
    channels = walk.along(labels, labels.dim() - 3)
    if node.target is aten.pixel_shuffle.default:
        made = walk.along(channels.view(-1, factor * factor), 0)
    else:
        made = channels.repeat_interleave(factor * factor)
    return x.moved(spread(made.view(*[1] * (len(shape) - 3), -1, 1, 1), shape))


@rule(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def channel_shuffle(walk: Walk, node: fx.Node, x: Any, groups: int) -> Flow:
    x = walk.as_flow(x)
    rows = walk.along(x.labels, 1).view(groups, -1)
    walk.grid(rows)
    return x.moved(along_only(rows.t().flatten(), 1, x.shape))


@rule(aten.glu.default)
def gated_linear_unit(walk: Walk, node: fx.Node, x: Any, dim: int = -1) -> Flow:
    """One half times the sigmoid of the other: what vanishes with the first half does."""
    x = walk.as_flow(x)
    first, second = x.labels.chunk(2, dim)
    walk.together(first, second)
    return x.moved(spread(first, first.shape))


@rule(*SPLITS)
def split(walk: Walk, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> list[Flow]:
    x = walk.as_flow(x)
    return [x.moved(spread(part, part.shape)) for part in parts_of(walk, node, x.labels, *args, **kwargs)]


def parts_of(walk: Walk, node: fx.Node, labels: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    """`labels` cut as the node does it; parts that are equal, which `forward` cuts at equal distances, stay equal."""
    parts = applied(node, labels, *args, **kwargs)
    position = 0 if node.target is aten.unbind.int else 1
    dim = kwargs.get("dim", args[position] if len(args) > position else 0) % labels.dim()
    if dim in varying(labels):
        if len({part.shape for part in parts}) == 1:
            for part in parts[1:]:
                walk.together(parts[0], part)
        else:
            _unequal(walk, labels, dim)
    return parts


def _unequal(walk: Walk, labels: Tensor, dim: int) -> None:
    """Parts of unequal width: every part can lose channels if the forward pass then cuts there (the trial tells)."""
    if len(varying(labels)) > 1:
        walk.whole(labels, dim, "cut inside every head")


@rule(aten.slice.Tensor, aten.narrow.default)
def cut(walk: Walk, node: fx.Node, x: Any, dim: int = 0, *args: Any, **kwargs: Any) -> Flow:
    x = walk.as_flow(x)
    labels = applied(node, x.labels, dim, *args, **kwargs)
    dim = dim % x.labels.dim()
    size, width = x.shape[dim], labels.shape[dim]
    if dim in varying(x.labels) and width < size:
        start = int(kwargs.get("start", args[0] if args else 0) or 0) % size
        strided = node.target is aten.slice.Tensor
        step = int(kwargs.get("step", args[2] if strided and len(args) > 2 else 1))
        if step == 1 and width and size % width == 0 and start % width == 0:
            for begin in range(width, size, width):  # x[:, :c], x[:, c:2c], ...: parts of equal width stay equal
                walk.together(x.labels.narrow(dim, 0, width), x.labels.narrow(dim, begin, width))
        elif step > 1 and width * step == size and start < step:
            for begin in range(step - 1):  # x[:, 0::2], x[:, 1::2]: neighbours stay neighbours
                every = [slice(None)] * dim
                walk.together(
                    x.labels[(*every, slice(begin, None, step))], x.labels[(*every, slice(begin + 1, None, step))]
                )
        else:
            _unequal(walk, x.labels, dim)
    return x.moved(spread(labels, labels.shape))


@rule(aten.select.int)
def select(walk: Walk, node: fx.Node, x: Any, dim: int, index: int) -> Flow:
    x = walk.as_flow(x)
    walk.whole(x.labels, dim % x.labels.dim(), "one channel is picked by its number")
    labels = x.labels.select(dim, index)
    return x.moved(spread(labels, labels.shape))


@rule(aten.index.Tensor)
def index(walk: Walk, node: fx.Node, x: Any, indices: Sequence[Any]) -> Flow:
    x = walk.as_flow(x)
    labels = indexed(node, x.labels)
    for dim, chosen in enumerate(indices):
        if chosen is not None:
            walk.freeze(walk.as_flow(chosen).labels, "numbers of positions")
            walk.whole(x.labels, dim, "channels are picked by their numbers")
    return x.moved(spread(labels, labels.shape))


def indexed(node: fx.Node, labels: Tensor) -> Tensor:
    """`labels` indexed as the node does it, always at position 0 of the indexed axes."""
    arguments: Any = node.args[1]
    places = [None if place is None else torch.zeros(place.meta["val"].shape, dtype=torch.int64) for place in arguments]
    return torch.ops.aten.index.Tensor(labels, places)


@rule(aten.roll.default)
def roll(walk: Walk, node: fx.Node, x: Any, shifts: Any, dims: Any = ()) -> Flow:
    x = walk.as_flow(x)
    axes = [dims] if isinstance(dims, int) else list(dims)
    moving = varying(x.labels)
    rolled = [dim % x.labels.dim() for dim in axes] if axes else moving
    if not set(rolled) & set(moving):
        return x.moved(x.labels)
    for dim in rolled:
        walk.whole(x.labels, dim, "channels are rolled by a fixed number")
    labels = x.labels.roll(shifts, dims)
    return x.moved(spread(labels, labels.shape))


@rule(aten.cat.default, aten.stack.default, aten.concat.default)
def concatenate(walk: Walk, node: fx.Node, inputs: Sequence[Any], dim: int = 0) -> Flow:
    flows = [walk.as_flow(value) for value in inputs]
    shape = node.meta["val"].shape
    dim = dim % len(shape)
    flows = [
        flow for flow in flows if flow.labels.dim() > 1 or flow.shape[0] or len(shape) == 1
    ]  # cat skips empty ones
    if node.target is aten.stack.default:
        flows = [flow.moved(flow.labels.unsqueeze(dim)) for flow in flows]
    joined = _concatenated(flows)
    across = any(axis != dim for flow in flows for axis in varying(flow.labels))
    if not across:
        return joined.moved(spread(torch.cat(_parts(flows, dim), dim), shape))
    if any(dim in varying(flow.labels) for flow in flows):
        return joined.moved(_grids(walk, flows, dim))
    first = flows[0].moved(flows[0].labels.narrow(dim, 0, 1))
    for flow in flows[1:]:
        first = Flow(combine(walk, first, flow.moved(flow.labels.narrow(dim, 0, 1))))
    return joined.moved(spread(first.labels, shape))


def _concatenated(flows: Sequence[Flow]) -> Flow:
    """Of several parts those that vanish do, whatever the others leave."""
    left = tuple(labels for flow in flows for labels in (flow.left if flow.vanishes else (flow.labels,)))
    whole = flows[0].joined(flows[1:], flows[0].labels)
    return replace(whole, vanishes=any(flow.vanishes for flow in flows), left=left)


def _parts(flows: Sequence[Flow], dim: int) -> list[Tensor]:
    """Labels that are as wide along `dim` as the flow, and as narrow as can be along all other axes."""
    parts = [compact(flow.labels) for flow in flows]
    return [
        part.expand(*part.shape[:dim], flow.shape[dim], *part.shape[dim + 1 :])
        for part, flow in zip(parts, flows, strict=True)
    ]


def _grids(walk: Walk, flows: Sequence[Flow], dim: int) -> Tensor:
    """Concatenated along one channel axis while channels vary along another too (the halves of every head)."""
    labels = torch.cat([flow.labels for flow in flows], dim)
    if bool((labels == NO_CHANNEL).any()):
        for flow in flows:
            walk.freeze(flow.labels, "concatenated with a constant of fixed width")
    walk.grid(labels)
    return spread(labels, labels.shape)
