"""Rules for products of two activations: attention, and whatever else is written with matmul or einsum.

`out[b, m, n] = Σ_k first[b, m, k] · second[b, k, n]`. An axis that is summed over and carries channels alone (b without
any) loses the same channels in both factors, exactly: the terms of the sum vanish. Where b carries channels too, as
the heads of an attention layer do, whole heads go, each in both factors, or the same k of every head
(`Walk.attention`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from compress.graph.elementwise import add
from compress.graph.flows import Flow, Kernel, Weight, gating
from compress.graph.kernels import settled
from compress.graph.labels import NO_CHANNEL, compact, spread, varying
from compress.graph.layers import dense
from compress.graph.rules import aten, rule
from compress.graph.walk import Walk, place_of

_REASON = "a product of two activations"
_KEPT = "attention: a product of two activations, which is kept"


class Factor:
    """One factor, its labels turned to the axes of the whole product.

    Attributes:
        labels: one axis for each letter of the product, of size 1 where the factor has none or they do not differ.
        channels: letters of the axes along which it has channels that can go.
    """

    def __init__(self, flow: Flow, letters: str, every: str) -> None:
        self.flow, self.every = flow, every
        self.sizes = {letter: int(size) for letter, size in zip(letters, flow.shape, strict=True)}
        labels = compact(flow.labels).permute([letters.index(letter) for letter in every if letter in letters])
        for position, letter in enumerate(every):
            if letter not in letters:
                labels = labels.unsqueeze(position)
        self.labels = labels
        self.channels = {letter for letter, size in zip(every, labels.shape, strict=True) if size > 1}

    def along(self, letter: str) -> Tensor:
        """Labels along one axis, those at the first position of all others."""
        return self.labels.movedim(self.every.index(letter), 0).flatten(1)[:, 0]

    def tie(self, walk: Walk, letter: str, reason: str, *, same: bool = False) -> None:
        """What lies along the axis `letter` can only go all at once (`Partition.whole`)."""
        if len(self.channels) == 1:
            walk.freeze(self.labels, reason)
        else:
            (walk.join if same else walk.together)(self.labels, self.labels.narrow(self.every.index(letter), 0, 1))
        self.channels.discard(letter)


def product(
    walk: Walk,
    node: fx.Node,
    flows: Sequence[Flow],
    letters: Sequence[str],
    out: str,
    counts: Callable[[Sequence[Factor], str], bool] = lambda *_: True,
) -> Flow:
    """The product of two activations whose axes have these letters, as in `torch.einsum`.

    Args:
        counts: whether it has multiply-adds, given the factors and `out`.
    """
    every = "".join(dict.fromkeys("".join(letters)))
    first, second = factors = tuple(Factor(flow, names, every) for flow, names in zip(flows, letters, strict=True))
    if counts(factors, out):
        _count(walk, factors, every)
    for factor in factors:
        if not factor.channels:
            walk.freeze(factor.labels, _REASON)  # at most one channel, which meets all those of the other
        elif walk.attention == "keep":
            walk.freeze(factor.labels, _KEPT)
    if walk.attention == "widths":
        _tie_heads(walk, factors, out)
    summed = set(every) - set(out)
    if len(summed) == 1 and first.channels == second.channels == summed:
        walk.together(first.labels, second.labels)
        walk.read(place_of(node), gating([first.flow, second.flow]) or first.flow)
        return walk.unlabelled([_size(factors, letter) for letter in out])
    for factor in factors:
        for letter in sorted(factor.channels & summed):
            factor.tie(walk, letter, _REASON, same=True)
    for mine, other in ((first, second), (second, first)):
        for letter in sorted(mine.channels - other.channels):
            if other.sizes.get(letter, 1) > 1:
                mine.tie(walk, letter, _REASON)  # the other has a fixed size there
    if first.channels - second.channels and second.channels - first.channels:
        # Every element of the result belongs to a channel of each: neither can lose one inside a head.
        for mine, other in ((first, second), (second, first)):
            for letter in sorted(mine.channels - other.channels):
                mine.tie(walk, letter, _REASON)
    if first.channels & second.channels:
        walk.together(first.labels, second.labels)
    return _result(walk, factors, out)


def _size(factors: Sequence[Factor], letter: str) -> int:
    return max(factor.sizes.get(letter, 1) for factor in factors)


def _tie_heads(walk: Walk, factors: Sequence[Factor], out: str) -> None:
    """Leave the channels inside the heads to choose: those of all heads are tied to each other."""
    heads = set(factors[0].sizes) & set(factors[1].sizes) & set(out)
    for factor in factors:
        for letter in sorted(factor.channels & heads):
            factor.tie(walk, letter, "the heads of an attention layer, of which widths go")
            factor.labels = factor.labels.narrow(factor.every.index(letter), 0, 1)


def _result(walk: Walk, factors: Sequence[Factor], out: str) -> Flow:
    """The factor with more of the result's axes gives the labels, and either that vanishes the gate."""
    shape = [_size(factors, letter) for letter in out]
    first, second = factors
    flow = gating([first.flow, second.flow])
    other, carrier = sorted((second, first), key=lambda factor: (_width(factor, out), factor.flow is flow))
    if flow is other.flow:
        walk.join(carrier.labels, other.labels)  # the gates stand where the other's channels are made
    letters = list(carrier.sizes)
    labels = carrier.flow.labels
    for letter in [letter for letter in letters if letter not in out]:
        labels = labels.select(letters.index(letter), 0)
        letters.remove(letter)
    missing = [letter for letter in out if letter not in letters]
    labels = labels[(None,) * len(missing)].permute([[*missing, *letters].index(letter) for letter in out])
    labels = spread(labels, shape)
    return carrier.flow.joined([other.flow], labels).applied(keeps_zero=False) if flow is None else flow.moved(labels)


def _width(factor: Factor, out: str) -> int:
    labels = factor.flow.labels
    return sum(letter in out and dim in varying(labels) for dim, letter in enumerate(factor.sizes))


def _count(walk: Walk, factors: Sequence[Factor], every: str) -> None:
    """Note the product's multiply-adds: a constant times the sizes of the axes that have channels."""
    if not walk.counting:
        return
    coefficient, axes = 1.0 / walk.batch, []
    for letter in every:
        owner = next((factor for factor in factors if letter in factor.channels), None)
        if owner is None:
            coefficient *= _size(factors, letter)
        else:
            axes.append(owner.along(letter))
    walk.products.append((coefficient, axes))


def flows_of(walk: Walk, *values: Any) -> list[Flow]:
    """The values as activations."""
    return [walk.as_flow(value) for value in values]


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(walk: Walk, node: fx.Node, x: Any, y: Any) -> Flow:
    shape = node.meta["val"].shape
    if is_activation(x) and is_matrix(y):
        return dense(walk, shape, x, y, inputs=0)
    if is_matrix(x) and is_activation(y) and len(y.shape) > 1:
        return dense(walk, shape, y, x, axis=-2)
    first, second = flows_of(walk, x, y)
    if first.labels.dim() < 2 or second.labels.dim() < 2:
        walk.freeze(first.labels, _REASON)
        walk.freeze(second.labels, _REASON)
        return walk.frozen(shape, _REASON)
    return _batched(walk, node, first, second)


def is_activation(value: Any) -> bool:
    """Whether it is no parameter, and has channels."""
    return isinstance(value, Flow) and bool((compact(value.labels) != NO_CHANNEL).any())


def is_matrix(value: Any) -> bool:
    """Whether a layer may have it as its weight."""
    return isinstance(value, Weight | Kernel) and len(value.shape) == 2


@rule(aten.addmm.default)
def add_matmul(walk: Walk, node: fx.Node, added: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Flow:
    if is_activation(x) and is_matrix(y) and isinstance(added, Weight) and len(added.shape) == 1:
        return dense(walk, node.meta["val"].shape, x, y, added, inputs=0)
    result = matmul(walk, node, x, y)
    return add(walk, node, result, settled(walk, added, result))


def _batched(walk: Walk, node: fx.Node, first: Flow, second: Flow) -> Flow:
    """(..., m, k) times (..., k, n)."""
    shared = max(first.labels.dim(), second.labels.dim()) - 2
    batch = "abcdefgh"[:shared]
    letters = [batch[shared - (flow.labels.dim() - 2) :] + last for flow, last in ((first, "mk"), (second, "kn"))]
    return product(walk, node, (first, second), letters, batch + "mn")


@rule(aten.baddbmm.default)
def add_batched_matmul(walk: Walk, node: fx.Node, added: Any, x: Any, y: Any, **_: Any) -> Flow:
    first, second = flows_of(walk, x, y)
    result = _batched(walk, node, first, second)
    return add(walk, node, result, settled(walk, added, result))


@rule(aten.scaled_dot_product_attention.default)
def attention(
    walk: Walk,
    node: fx.Node,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Flow:
    query, key, value = flows_of(walk, query, key, value)
    if enable_gqa:  # several heads of queries share one of keys and values, and go together
        key, value = (_repeated(flow, query.shape[-3]) for flow in (key, value))
    leading = "abcdefgh"[: query.labels.dim() - 2]
    logits = product(walk, node, (query, key), (leading + "lk", leading + "sk"), leading + "ls")
    if isinstance(mask, Flow | Weight | Kernel):
        logits = add(walk, node, logits, settled(walk, mask, logits))
    weights = logits.applied(keeps_zero=False)
    walk.noted.append(query.shape[-1] ** -0.5 if scale is None else scale)
    return product(walk, node, (weights, value), (leading + "ls", leading + "sv"), leading + "lv")


def _repeated(flow: Flow, heads: int) -> Flow:
    labels = compact(flow.labels)
    if labels.shape[-3] > 1:
        labels = labels.repeat_interleave(heads // labels.shape[-3], -3)
    return flow.moved(labels.expand(*flow.shape[:-3], heads, *flow.shape[-2:]))
