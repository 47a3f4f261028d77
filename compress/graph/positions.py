"""Rules for operators over positions: pooling, resizing, padding, reduction."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from compress.graph.elementwise import summed
from compress.graph.flows import Flow
from compress.graph.labels import blank, compact, varying
from compress.graph.rules import aten, rule
from compress.graph.walk import Walk, place_of


def resized(walk: Walk, x: Flow, shape: Sequence[int], reason: str) -> Tensor:
    """Labels after the axes without channels took new sizes; a channel axis that did so is frozen."""
    labels = compact(x.labels)
    for dim in range(labels.dim()):
        if labels.shape[dim] not in (1, shape[dim]):
            walk.whole(x.labels, dim, reason)
            labels = labels.narrow(dim, 0, 1)
    return labels.expand(tuple(shape))


@rule(
    *(aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec),
    *(aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default),
    *(aten.upsample_nearest1d.vec, aten.upsample_linear1d.vec, aten.upsample_trilinear3d.vec),
    *(aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact3d.vec),
    *(aten.upsample_nearest3d.vec, aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec),
)
def pool(walk: Walk, node: fx.Node, x: Any, *_: Any, **__: Any) -> Flow:
    x = walk.as_flow(x)
    return x.moved(resized(walk, x, node.meta["val"].shape, "pooling or resizing over channels"))


@rule(
    *(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default),
    *(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default),
)
def pool_with_indices(walk: Walk, node: fx.Node, x: Flow, *_: Any, **__: Any) -> tuple[Flow, Flow]:
    result = x.moved(resized(walk, x, node.meta["val"][0].shape, "pooling over channels"))
    return result, result.applied(keeps_zero=False)


@rule(aten.grid_sampler.default)
def sample(walk: Walk, node: fx.Node, x: Any, grid: Any, *_: Any) -> Flow:
    x = walk.as_flow(x)
    walk.freeze(walk.as_flow(grid).labels, "places at which another activation is sampled")
    return x.moved(resized(walk, x, node.meta["val"].shape, "sampling over channels"))


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(walk: Walk, node: fx.Node, x: Any, padding: Sequence[int], *args: Any, **kwargs: Any) -> Flow:
    x = walk.as_flow(x)
    labels = resized(walk, x, node.meta["val"].shape, "padding of the channel axis")
    value = kwargs.get("value", args[-1] if args else None)
    return replace(x, labels=labels, vanishes=x.vanishes and (isinstance(value, str) or not value))


@rule(aten.im2col.default)
def image_to_columns(walk: Walk, node: fx.Node, x: Flow, kernel: Sequence[int], *_: Any, **__: Any) -> Flow:
    channels = walk.along(x.labels, 1)  # (C,), each of which becomes one channel for each place of the window
    shape = node.meta["val"].shape
    labels = channels.repeat_interleave(shape[1] // len(channels))
    return x.moved(labels.view(1, -1, 1).expand(shape))


@rule(aten.col2im.default)
def columns_to_image(walk: Walk, node: fx.Node, x: Flow, *_: Any, **__: Any) -> Flow:
    shape = node.meta["val"].shape
    columns = walk.along(x.labels, 1)
    channels = walk.along(columns.view(shape[1], -1), 0)
    return x.moved(channels.view(1, -1, 1, 1).expand(shape))


@rule(aten.unfold.default)
def unfold(walk: Walk, node: fx.Node, x: Any, dim: int, size: int, step: int) -> Flow:
    x = walk.as_flow(x)
    shape = node.meta["val"].shape
    labels = x.labels
    if dim % labels.dim() in varying(labels):
        walk.whole(labels, dim % labels.dim(), "windows over the channel axis")
    labels = labels.narrow(dim, 0, 1)
    return x.moved(labels[..., None].expand(shape))


NORMS = (aten.linalg_vector_norm.default, aten.linalg_norm.default, aten.norm.ScalarOpt_dim)
DEVIATIONS = (aten.std.correction, aten.var.correction, aten.std.dim, aten.var.dim)
_LINEAR = (aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default)


def _is_exact(node: fx.Node, *args: Any, **kwargs: Any) -> bool:
    """Whether the reduction loses nothing when a channel of zeros goes: a sum, a norm of order 1 or more."""
    if node.target not in NORMS:
        return node.target is aten.sum.dim_IntList
    order = kwargs.get("ord", kwargs.get("p", args[0] if args else None))
    return order is None or isinstance(order, str) or order >= 1


def summed_over(walk: Walk, name: str, x: Flow, axes: Sequence[int]) -> Flow:
    """The sum over `axes`, which are gone."""
    return _reduced(walk, name, x, axes, "a sum over channels depends on their number", exact=True)


@rule(
    *(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default),
    *(aten.mean.default, aten.sum.default, *NORMS, *DEVIATIONS),
    *(aten.logsumexp.default, aten.prod.dim_int, aten.prod.default),
)
def reduce(walk: Walk, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Flow:
    x = walk.as_flow(x)
    position = 1 if node.target in NORMS else 0
    dims = kwargs.get("dim", args[position] if len(args) > position else None)
    axes = sorted(
        {dim % x.labels.dim() for dim in ([dims] if isinstance(dims, int) else dims or range(x.labels.dim()))}
    )
    x = x if node.target in _LINEAR else x.applied(keeps_zero=node.target not in (*DEVIATIONS, aten.logsumexp.default))
    reason = f"{node.target} over channels depends on their number"
    result = _reduced(walk, place_of(node), x, axes, reason, exact=_is_exact(node, *args, **kwargs))
    return result.moved(result.labels.reshape(node.meta["val"].shape))


def _reduced(walk: Walk, name: str, x: Flow, axes: Sequence[int], reason: str, *, exact: bool) -> Flow:
    """Reduced over `axes`, which are gone; `exact` as in `_is_exact`."""
    labels = x.labels
    over = [dim for dim in axes if dim in varying(labels)]
    if over:
        heads = len(varying(labels)) > len(over) and walk.attention == "heads"
        if not exact or not x.vanishes or x.left or heads:
            walk.mixes(x, over, name, reason)
        elif varying(labels) == over:
            walk.read(name, x)
        x = replace(x, vanishes=x.vanishes and heads)
        labels = labels if heads else blank(labels.shape)
    for dim in reversed(axes):
        labels = labels.select(dim, 0)
    return x.moved(labels)


@rule(aten.cosine_similarity.default)
def cosine_similarity(walk: Walk, node: fx.Node, x: Any, y: Any, dim: int = 1, *_: Any) -> Flow:
    both = summed(walk, walk.as_flow(x), walk.as_flow(y)).applied()
    reason = "the cosine of a single channel"
    return _reduced(walk, place_of(node), both, [dim % both.labels.dim()], reason, exact=True)


@rule(aten.topk.default, aten.sort.default)
def sort(walk: Walk, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> tuple[Flow, Flow]:
    x = walk.as_flow(x)
    position = 1 if node.target is aten.topk.default else 0
    dim = kwargs.get("dim", args[position] if len(args) > position else -1) % x.labels.dim()
    walk.whole(x.labels, dim, "channels are sorted")
    labels = x.labels.narrow(dim, 0, 1).expand(node.meta["val"][0].shape)
    result = x.moved(labels)
    return result, result.applied(keeps_zero=False)


@rule(aten.max.dim, aten.min.dim)
def extreme_along(walk: Walk, node: fx.Node, x: Any, dim: int, keepdim: bool = False) -> tuple[Flow, Flow]:
    x = walk.as_flow(x)
    walk.whole(x.labels, dim % x.labels.dim(), f"{node.target} over channels")
    labels = x.labels.narrow(dim, 0, 1).expand(
        [*x.shape[: dim % x.labels.dim()], 1, *x.shape[dim % x.labels.dim() + 1 :]]
    )
    result = x.moved(labels.reshape(node.meta["val"][0].shape))
    return result, result.applied(keeps_zero=False)


@rule(aten.cumsum.default, aten.cumprod.default)
def cumulate(walk: Walk, node: fx.Node, x: Any, dim: int, **_: Any) -> Flow:
    x = walk.as_flow(x)
    walk.whole(x.labels, dim % x.labels.dim(), "sums over preceding channels")
    return x
