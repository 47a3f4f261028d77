"""Rules for operators that work element by element, and for those that make constants."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from compress.graph.flows import Flow, gating
from compress.graph.labels import NO_CHANNEL, blank, compact, spread, varying
from compress.graph.rules import aten, rule
from compress.graph.walk import Walk

# --- one input ------------------------------------------------------------------------------------------------------

LINEAR = (
    *(aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default, aten.detach_.default),
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.lift_fresh_copy.default),
    *(aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.feature_dropout_.default),
    *(aten.neg.default, aten.type_as.default),
)
ZERO_STAYS_ZERO = (
    *LINEAR,
    *(aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default),
    *(aten.leaky_relu.default, aten.leaky_relu_.default, aten.elu.default, aten.elu_.default),
    *(aten.celu.default, aten.celu_.default, aten.selu.default, aten.selu_.default),
    *(aten.gelu.default, aten.gelu_.default, aten.silu.default, aten.silu_.default),
    *(aten.mish.default, aten.mish_.default, aten.hardswish.default, aten.hardswish_.default),
    *(aten.tanh.default, aten.tanh_.default, aten.erf.default, aten.abs.default, aten.sqrt.default),
    *(aten.square.default, aten.sin.default, aten.sign.default, aten.log1p.default, aten.nan_to_num.default),
    *(aten.zeros_like.default, aten.zero_.default, aten.empty_like.default),
)
ZERO_BECOMES_OTHER = (
    *(aten.sigmoid.default, aten.sigmoid_.default, aten.hardsigmoid.default, aten.hardsigmoid_.default),
    *(aten.softplus.default, aten.exp.default, aten.log.default, aten.rsqrt.default, aten.reciprocal.default),
    *(aten.cos.default, aten.ones_like.default, aten.full_like.default, aten.fill_.Scalar, aten.pow.Scalar),
    *(aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar, aten.lt.Scalar, aten.ge.Scalar, aten.le.Scalar),
    *(aten.bitwise_not.default, aten.logical_not.default, aten.log_sigmoid.default),
)


@rule(*ZERO_STAYS_ZERO)
def zero_stays_zero(walk: Walk, node: fx.Node, x: Flow, *_: Any, **__: Any) -> Flow:
    x = walk.as_flow(x)
    return x if node.target in LINEAR else x.applied()


@rule(*ZERO_BECOMES_OTHER)
def zero_becomes_other(walk: Walk, node: fx.Node, x: Any, *args: Any, **__: Any) -> Flow:
    x = walk.as_flow(args[0] if node.target is aten.pow.Scalar else x)
    return x.applied(keeps_zero=False)


@rule(
    *(aten.clamp.default, aten.clamp_.default, aten.hardtanh.default, aten.hardtanh_.default),
    *(aten.clamp_min.default, aten.clamp_min_.default),
)
def clamp(walk: Walk, node: fx.Node, x: Any, low: Any = None, high: Any = None, **named: Any) -> Flow:
    x = walk.as_flow(x)
    low, high = named.get("min", low), named.get("max", high)
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        low, high = (
            named.get("min_val", -1 if low is None else low),
            named.get("max_val", 1 if high is None else high),
        )
    keeps_zero = (low is None or low <= 0) and (high is None or high >= 0)
    return x.applied(keeps_zero=keeps_zero)


@rule(aten.pow.Tensor_Scalar)
def power(walk: Walk, node: fx.Node, x: Any, exponent: float) -> Flow:
    x = walk.as_flow(x)
    return x.applied(keeps_zero=exponent > 0)


@rule(aten.masked_fill.Scalar, aten.masked_fill_.Scalar)
def masked_fill(walk: Walk, node: fx.Node, x: Any, mask: Any, value: float) -> Flow:
    x, mask = walk.as_flow(x), walk.as_flow(mask)
    return replace(x, labels=combine(walk, x, mask), vanishes=x.vanishes and value == 0)


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(walk: Walk, node: fx.Node, x: Any, dim: int, *_: Any) -> Flow:
    x = walk.as_flow(x)
    walk.whole(x.labels, dim % x.labels.dim(), "softmax over channels: every channel changes the others")
    return x.applied(keeps_zero=False)


# --- two inputs and more --------------------------------------------------------------------------------------------


def combine(walk: Walk, x: Flow, y: Flow, *, same: bool = True) -> Tensor:
    """Labels of an elementwise combination with broadcasting, those of `x` where both have some.

    Args:
        same: whether what meets is one channel; otherwise it is only tied.
    """
    shape = torch.broadcast_shapes(x.shape, y.shape)
    aligned = [_aligned(flow.labels, len(shape)) for flow in (x, y)]
    for here, there in ((0, 1), (1, 0)):
        wide = varying(aligned[there])
        if is_lone(aligned[here], aligned[there]):
            walk.freeze(aligned[here], "one channel combined with many by broadcasting")
            aligned[here] = blank(aligned[here].shape)
        elif any(aligned[here].shape[dim] > 1 for dim in wide) and bool((compact(aligned[here]) == NO_CHANNEL).any()):
            walk.freeze(aligned[there], "combined with a constant of fixed width")
    narrow = [compact(labels) for labels in aligned]
    first, second = torch.broadcast_tensors(*narrow)
    # Where one of the two has one channel for many of the other's (a value for every head), these go together.
    rows = narrow[0].shape != narrow[1].shape
    (walk.join if same and not rows else walk.together)(first, second)
    return spread(torch.where(first == NO_CHANNEL, second, first), shape)


def _aligned(labels: Tensor, rank: int) -> Tensor:
    return labels[(None,) * (rank - labels.dim())]


def is_lone(labels: Tensor, others: Tensor) -> bool:
    """Whether one value meets every channel of `others`: it must stay, and does not tie them to each other."""
    rank = max(labels.dim(), others.dim())
    here, there = _aligned(labels, rank), _aligned(others, rank)
    wide = varying(there)
    return any(here.shape[dim] == 1 for dim in wide) and not set(varying(here)) & set(wide)


def paired(x: Flow, y: Flow) -> tuple[Flow, Flow]:
    """Both as they count where they are combined: one channel that meets many of the other's does not go with them."""
    first = Flow(x.labels) if is_lone(x.labels, y.labels) else x
    second = Flow(y.labels) if is_lone(y.labels, x.labels) else y
    return first, second


def summed(walk: Walk, x: Flow, y: Flow) -> Flow:
    """Where channels of both meet, they vanish together."""
    labels = combine(walk, x, y)
    first, second = paired(x, y)
    return first.joined([second], labels)


@rule(aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor, aten.add.Scalar, aten.sub.Scalar)
def add(walk: Walk, node: fx.Node, x: Any, y: Any, *_: Any, **__: Any) -> Flow:
    x, y = walk.as_flow(x), walk.as_flow(y)
    if not isinstance(y, Flow):
        return replace(x, vanishes=x.vanishes and y == 0)
    if not isinstance(x, Flow):
        return replace(y, vanishes=y.vanishes and x == 0)
    return summed(walk, x, y)


@rule(aten.copy_.default)
def copy(walk: Walk, node: fx.Node, x: Any, source: Any, *_: Any) -> Flow:
    x, source = walk.as_flow(x), walk.as_flow(source)
    if bool((compact(x.labels) == NO_CHANNEL).any()):
        walk.freeze(source.labels, "written into a tensor of fixed size")
    return summed(walk, x, source)


@rule(aten.rsub.Scalar)
def subtract_from(walk: Walk, node: fx.Node, x: Any, y: float, *_: Any) -> Flow:
    x = walk.as_flow(x)
    return replace(x, vanishes=x.vanishes and y == 0)


@rule(
    *(aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar),
    *(aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div.Tensor_mode),
)
def multiply(walk: Walk, node: fx.Node, x: Any, y: Any, *_: Any, **__: Any) -> Flow:
    x, y = walk.as_flow(x), walk.as_flow(y)
    if not isinstance(y, Flow):
        return x
    divides = node.target in (aten.div.Tensor, aten.div_.Tensor, aten.div.Tensor_mode)
    if not isinstance(x, Flow):
        return y.applied(keeps_zero=False) if divides else y
    first, second = paired(x, y)
    # A product vanishes with either factor; gating both would square the gate.
    chosen = gating((first,) if divides else (first, second))
    if chosen is None:
        return first.joined([second], combine(walk, x, y)).applied(keeps_zero=False)
    x, y = (x, y) if chosen is first else (y, x)
    return chosen.moved(combine(walk, x, y, same=False))


@rule(aten.addcmul.default)
def add_product(walk: Walk, node: fx.Node, x: Any, first: Any, second: Any, **_: Any) -> Flow:
    product = multiply(walk, node, first, second)
    return add(walk, node, x, product)


@rule(aten.maximum.default, aten.minimum.default)
def extremum(walk: Walk, node: fx.Node, x: Any, y: Any) -> Flow:
    x, y = walk.as_flow(x), walk.as_flow(y)
    return summed(walk, x, y).applied()


@rule(aten.pow.Tensor_Tensor)
def power_of_both(walk: Walk, node: fx.Node, x: Any, y: Any) -> Flow:
    return summed(walk, walk.as_flow(x), walk.as_flow(y)).applied(keeps_zero=False)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
def where(walk: Walk, node: fx.Node, condition: Any, x: Any, y: Any) -> Flow:
    chosen = add(walk, node, x, y)
    return chosen.moved(combine(walk, chosen, walk.as_flow(condition)))


# --- constants ------------------------------------------------------------------------------------------------------


@rule(
    *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format, aten.scalar_tensor.default),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default),
    *(aten.eye.default, aten.eye.m),
)
def constant(walk: Walk, node: fx.Node, *_: Any, **__: Any) -> Flow:
    return walk.unlabelled(node.meta["val"].shape)


@rule(aten._assert_tensor_metadata.default, aten._assert_async.msg, aten._assert_scalar.default)
def assertion(walk: Walk, node: fx.Node, *_: Any, **__: Any) -> None:
    return None
