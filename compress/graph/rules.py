"""The operator table: how labels pass through each ATen operator that needs no weights of its own.

Operators with weights stand in `compress.graph.layers`. An operator that is missing here freezes the channels that it
touches and is reported (`ChannelGraph.frozen`); `rule` adds one:

    @rule(torch.ops.mylib.mirror.default)
    def mirror(walk, node, x):
        return x.moved(x.labels.flip(-1))
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from compress.graph.walk import NO_CHANNEL, Flow, Rule, Walk, Weight, compact, spread, varying

aten = torch.ops.aten

RULES: dict[Any, Rule] = {}

R = TypeVar("R", bound=Rule)


def rule(*operators: Any) -> Callable[[R], R]:
    """Register a rule for these operators (`torch.ops.NAMESPACE.NAME.OVERLOAD`), replacing earlier ones."""

    def register(function: R) -> R:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def applied(node: fx.Node, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The node's own operator, on labels instead of data."""
    operator: Any = node.target
    return operator(labels, *args, **kwargs)


# --- one input, element by element ----------------------------------------------------------------------------------


@rule(
    *(aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default),
    *(aten.leaky_relu.default, aten.leaky_relu_.default, aten.elu.default, aten.elu_.default),
    *(aten.celu.default, aten.celu_.default, aten.selu.default, aten.selu_.default),
    *(aten.gelu.default, aten.gelu_.default, aten.silu.default, aten.silu_.default),
    *(aten.mish.default, aten.mish_.default, aten.hardswish.default, aten.hardswish_.default),
    *(aten.tanh.default, aten.tanh_.default, aten.erf.default, aten.abs.default, aten.neg.default),
    *(aten.sqrt.default, aten.square.default, aten.sin.default, aten.sign.default),
    *(
        aten.dropout.default,
        aten.dropout_.default,
        aten.feature_dropout.default,
        aten.feature_dropout_.default,
    ),
    *(
        aten.clone.default,
        aten.alias.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.detach_.default,
    ),
    *(
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten._to_copy.default,
        aten.lift_fresh_copy.default,
    ),
    *(aten.zeros_like.default, aten.type_as.default),
)
def zero_stays_zero(walk: Walk, node: fx.Node, x: Flow, *_: Any, **__: Any) -> Flow:
    x = walk.as_flow(x)
    return x.moved(x.labels)


@rule(
    *(aten.sigmoid.default, aten.sigmoid_.default, aten.hardsigmoid.default, aten.hardsigmoid_.default),
    *(aten.softplus.default, aten.exp.default, aten.log.default, aten.rsqrt.default, aten.reciprocal.default),
    *(aten.cos.default, aten.ones_like.default, aten.full_like.default),
)
def zero_becomes_other(walk: Walk, node: fx.Node, x: Flow, *_: Any, **__: Any) -> Flow:
    x = walk.as_flow(x)
    return Flow(x.labels, x.gates, vanishes=False)


@rule(
    *(aten.clamp.default, aten.clamp_.default, aten.hardtanh.default, aten.hardtanh_.default),
    *(aten.clamp_min.default, aten.clamp_min_.default),
)
def clamp(walk: Walk, node: fx.Node, x: Flow, low: Any = None, high: Any = None, **named: Any) -> Flow:
    low, high = named.get("min", low), named.get("max", high)
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        low, high = (
            named.get("min_val", -1 if low is None else low),
            named.get("max_val", 1 if high is None else high),
        )
    keeps_zero = (low is None or low <= 0) and (high is None or high >= 0)
    return Flow(x.labels, x.gates, x.vanishes and keeps_zero)


@rule(aten.pow.Tensor_Scalar)
def power(walk: Walk, node: fx.Node, x: Flow, exponent: float) -> Flow:
    x = walk.as_flow(x)
    return Flow(x.labels, x.gates, x.vanishes and exponent > 0)


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(walk: Walk, node: fx.Node, x: Flow, dim: int, *_: Any) -> Flow:
    if dim % x.labels.dim() in varying(x.labels):
        walk.freeze(x.labels, "softmax over channels: every channel changes the others")
    return Flow(x.labels, x.gates, vanishes=False)


# --- two inputs, element by element ---------------------------------------------------------------------------------


def combine(walk: Walk, x: Flow, y: Flow) -> Tensor:
    """Labels of an elementwise combination with broadcasting; joins what meets."""
    shape = torch.broadcast_shapes(x.shape, y.shape)
    aligned = [flow.labels[(None,) * (len(shape) - flow.labels.dim())] for flow in (x, y)]
    for here, there in ((0, 1), (1, 0)):
        wide = [dim for dim in varying(aligned[there]) if shape[dim] > 1]
        if any(aligned[here].shape[dim] == 1 for dim in wide):
            # One value meets every channel: it must stay, and does not tie them to each other.
            walk.freeze(aligned[here], "one channel combined with many by broadcasting")
            aligned[here] = torch.full_like(compact(aligned[here]), NO_CHANNEL).expand(aligned[here].shape)
        elif any(aligned[here].shape[dim] > 1 for dim in wide) and bool((compact(aligned[here]) == NO_CHANNEL).any()):
            walk.freeze(aligned[there], "combined with a constant of fixed width")
    first, second = torch.broadcast_tensors(compact(aligned[0]), compact(aligned[1]))
    walk.join(first, second)
    return spread(torch.where(first == NO_CHANNEL, second, first), shape)


@rule(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.add.Scalar, aten.sub.Scalar)
def add(walk: Walk, node: fx.Node, x: Any, y: Any, *_: Any, **__: Any) -> Flow:
    x, y = walk.as_flow(x), walk.as_flow(y)
    if not isinstance(y, Flow):
        return Flow(x.labels, x.gates, x.vanishes and y == 0)
    if not isinstance(x, Flow):
        return Flow(y.labels, y.gates, y.vanishes and x == 0)
    return Flow(combine(walk, x, y), x.gates | y.gates, x.vanishes and y.vanishes)


@rule(aten.rsub.Scalar)
def subtract_from(walk: Walk, node: fx.Node, x: Flow, y: float, *_: Any) -> Flow:
    return Flow(x.labels, x.gates, x.vanishes and y == 0)


@rule(aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar)
def multiply(walk: Walk, node: fx.Node, x: Any, y: Any, *_: Any, **__: Any) -> Flow:
    x, y = walk.as_flow(x), walk.as_flow(y)
    if not isinstance(y, Flow):
        return x.moved(x.labels)
    if not isinstance(x, Flow):
        return y.moved(y.labels)
    labels = combine(walk, x, y)
    divides = node.target in (aten.div.Tensor, aten.div_.Tensor)
    # A product vanishes with either factor; gating both would square the gate.
    if x.vanishes:
        return Flow(labels, x.gates, vanishes=True)
    if y.vanishes and not divides:
        return Flow(labels, y.gates, vanishes=True)
    return Flow(labels, x.gates | y.gates, vanishes=False)


@rule(aten.maximum.default, aten.minimum.default)
def extremum(walk: Walk, node: fx.Node, x: Any, y: Any) -> Flow:
    x, y = walk.as_flow(x), walk.as_flow(y)
    return Flow(combine(walk, x, y), x.gates | y.gates, x.vanishes and y.vanishes)


# --- shapes ---------------------------------------------------------------------------------------------------------


@rule(
    *(aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int, aten.swapaxes.default),
    *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.expand.default, aten.flip.default, aten.numpy_T.default),
)
def move(walk: Walk, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Flow:
    x = walk.as_flow(x)
    labels = applied(node, x.labels, *args, **kwargs)
    return x.moved(spread(labels, labels.shape))


@rule(aten.expand_as.default)
def expand_as(walk: Walk, node: fx.Node, x: Any, other: Flow) -> Flow:
    x = walk.as_flow(x)
    return x.moved(x.labels.expand(other.shape))


@rule(
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default),
    *(aten.flatten.using_ints, aten.unflatten.int),
)
def reshape(walk: Walk, node: fx.Node, x: Any, *_: Any, **__: Any) -> Flow:
    x = walk.as_flow(x)
    labels = x.labels.reshape(node.meta["val"].shape)
    labels = spread(labels, labels.shape)
    axes = varying(labels)
    if len(axes) > max(1, len(varying(x.labels))):
        # A channel axis cut into a grid stays a grid only when whole columns of it go.
        for dim in axes[:-1]:
            walk.join(labels, labels.narrow(dim, 0, 1))
    return x.moved(labels)


@rule(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def split(walk: Walk, node: fx.Node, x: Flow, *args: Any, **kwargs: Any) -> list[Flow]:
    parts = applied(node, x.labels, *args, **kwargs)
    position = 0 if node.target is aten.unbind.int else 1
    dim = kwargs.get("dim", args[position] if len(args) > position else 0) % x.labels.dim()
    if dim in varying(x.labels):
        if len({part.shape for part in parts}) == 1:
            for part in parts[1:]:  # parts cut at equal distances stay equal
                walk.join(parts[0], part)
        else:
            walk.freeze(x.labels, "cut into parts of unequal width, which nothing keeps at their places")
    return [x.moved(spread(part, part.shape)) for part in parts]


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
        if step == 1 and size % width == 0 and start % width == 0:
            for begin in range(width, size, width):  # x[:, :c], x[:, c:2c], ...: parts of equal width stay equal
                walk.join(x.labels.narrow(dim, 0, width), x.labels.narrow(dim, begin, width))
        elif step > 1 and width * step == size and start < step:
            for begin in range(step - 1):  # x[:, 0::2], x[:, 1::2]: neighbours stay neighbours
                every = [slice(None)] * dim
                walk.join(
                    x.labels[(*every, slice(begin, None, step))], x.labels[(*every, slice(begin + 1, None, step))]
                )
        else:
            walk.freeze(x.labels, "cut into parts of unequal width, which nothing keeps at their places")
    return x.moved(spread(labels, labels.shape))


@rule(aten.select.int)
def select(walk: Walk, node: fx.Node, x: Any, dim: int, index: int) -> Flow:
    x = walk.as_flow(x)
    if dim % x.labels.dim() in varying(x.labels):
        walk.freeze(x.labels, "one channel is picked by its number")
    labels = x.labels.select(dim, index)
    return x.moved(spread(labels, labels.shape))


@rule(aten.roll.default)
def roll(walk: Walk, node: fx.Node, x: Any, shifts: Any, dims: Any = ()) -> Flow:
    x = walk.as_flow(x)
    axes = [dims] if isinstance(dims, int) else list(dims)
    moving = varying(x.labels)
    if any(dim % x.labels.dim() in moving for dim in axes) or (not axes and moving):
        walk.freeze(x.labels, "channels are rolled by a fixed number")
        labels = x.labels.roll(shifts, dims)
        return x.moved(spread(labels, labels.shape))
    return x.moved(x.labels)


@rule(aten.cat.default, aten.stack.default, aten.concat.default)
def concatenate(walk: Walk, node: fx.Node, inputs: Sequence[Any], dim: int = 0) -> Flow:
    flows = [walk.as_flow(value) for value in inputs]
    shape = node.meta["val"].shape
    dim = dim % len(shape)
    if node.target is aten.stack.default:
        flows = [flow.moved(flow.labels.unsqueeze(dim)) for flow in flows]
    gates = frozenset().union(*(flow.gates for flow in flows))
    vanishes = all(flow.vanishes for flow in flows)
    across = any(axis != dim for flow in flows for axis in varying(flow.labels))
    if not across:
        parts = [compact(flow.labels) for flow in flows]
        parts = [
            part.expand(*part.shape[:dim], flow.shape[dim], *part.shape[dim + 1 :])
            for part, flow in zip(parts, flows, strict=True)
        ]
        return Flow(spread(torch.cat(parts, dim), shape), gates, vanishes)
    if any(dim in varying(flow.labels) for flow in flows):
        for flow in flows:
            walk.freeze(flow.labels, "concatenated along one channel axis while another varies")
    first = flows[0]
    for flow in flows[1:]:
        first = Flow(combine(walk, *(f.moved(f.labels.narrow(dim, 0, 1)) for f in (first, flow))))
    return Flow(spread(first.labels.narrow(dim, 0, 1), shape), gates, vanishes)


# --- positions: pooling, resizing, padding, reduction ---------------------------------------------------------------


def resized(walk: Walk, x: Flow, shape: Sequence[int], reason: str) -> Tensor:
    """Labels after the axes without channels took new sizes; a channel axis that did so is frozen."""
    labels = compact(x.labels)
    for dim in range(labels.dim()):
        if labels.shape[dim] not in (1, shape[dim]):
            walk.freeze(x.labels, reason)
            labels = labels.narrow(dim, 0, 1)
    return labels.expand(tuple(shape))


@rule(
    *(aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec),
    *(aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default),
)
def pool(walk: Walk, node: fx.Node, x: Flow, *_: Any, **__: Any) -> Flow:
    return x.moved(resized(walk, x, node.meta["val"].shape, "pooling or resizing over channels"))


@rule(aten.adaptive_max_pool2d.default, aten.max_pool2d_with_indices.default)
def pool_with_indices(walk: Walk, node: fx.Node, x: Flow, *_: Any, **__: Any) -> tuple[Flow, Flow]:
    values, indices = node.meta["val"]
    return x.moved(resized(walk, x, values.shape, "pooling over channels")), walk.unlabelled(indices.shape)


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(walk: Walk, node: fx.Node, x: Flow, padding: Sequence[int], *args: Any, **kwargs: Any) -> Flow:
    labels = resized(walk, x, node.meta["val"].shape, "padding of the channel axis")
    value = kwargs.get("value", args[-1] if args else None)
    return Flow(labels, x.gates, x.vanishes and (isinstance(value, str) or not value))


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.linalg_vector_norm.default)
def reduce(walk: Walk, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Flow:
    x = walk.as_flow(x)
    position = 1 if node.target is aten.linalg_vector_norm.default else 0
    dims = kwargs.get("dim", args[position] if len(args) > position else None)
    axes = {dim % x.labels.dim() for dim in ([dims] if isinstance(dims, int) else dims or range(x.labels.dim()))}
    labels = x.labels
    if axes & set(varying(labels)):
        if node.target is aten.sum.dim_IntList and x.vanishes:
            walk.direct |= x.gates  # a sum loses nothing when a channel of zeros goes
        else:
            walk.freeze(labels, f"{node.target} over channels depends on their number")
        labels = torch.full((1,) * labels.dim(), NO_CHANNEL).expand(labels.shape)
    for dim in axes:
        labels = labels.narrow(dim, 0, 1)
    return x.moved(labels.expand(labels.shape).reshape(node.meta["val"].shape))


# --- without channels -----------------------------------------------------------------------------------------------


@rule(
    *(
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        aten.empty.memory_format,
        aten.scalar_tensor.default,
    ),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default),
)
def constant(walk: Walk, node: fx.Node, *_: Any, **__: Any) -> Flow:
    return walk.unlabelled(node.meta["val"].shape)


@rule(aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default)
def assertion(walk: Walk, node: fx.Node, *_: Any, **__: Any) -> None:
    return None


@rule(
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.baddbmm.default,
    aten.scaled_dot_product_attention.default,
    aten.einsum.default,
)
def product_of_activations(walk: Walk, node: fx.Node, *args: Any, **kwargs: Any) -> Flow:
    reason = "attention: a product of two activations"
    operands: list[Any] = []
    fx.node.map_aggregate((args, kwargs), operands.append)
    for operand in operands:
        if isinstance(operand, (Flow, Weight)):
            walk.freeze(walk.as_flow(operand).labels, reason)
    return walk.frozen(node.meta["val"].shape, reason)
