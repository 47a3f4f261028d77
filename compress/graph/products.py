"""Rules for products of two activations: attention, and whatever else is written with matmul or einsum.

`out[b, m, n] = Σ_k first[b, m, k] · second[b, k, n]`. An axis that is summed over and carries channels alone (b without
any) loses the same channels in both factors, exactly: the terms of the sum vanish. Where b carries channels too, as
the heads of an attention layer do, whole heads go, each in both factors, or the same k of every head
(`Walk.attention`).
"""

from collections.abc import Callable, Sequence
from string import ascii_letters
from typing import Any

from torch import Tensor, fx

from compress.graph.elementwise import add
from compress.graph.flows import Flow, Kernel, Weight, gating
from compress.graph.kernels import settled
from compress.graph.labels import NO_CHANNEL, compact, spread, varying
from compress.graph.layers import dense
from compress.graph.positions import summed_over
from compress.graph.rules import aten, rule
from compress.graph.walk import Walk

_REASON = "a product of two activations"
_KEPT = "attention: a product of two activations, which is kept"


class _Factor:
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
    counts: Callable[[Sequence["_Factor"], str], bool] = lambda *_: True,
) -> Flow:
    """The product of two activations whose axes have these letters, as in `torch.einsum`.

    Args:
        counts: whether it has multiply-adds, given the factors and `out`.
    """
    every = "".join(dict.fromkeys("".join(letters)))
    first, second = factors = tuple(_Factor(flow, names, every) for flow, names in zip(flows, letters, strict=True))
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
        walk.read(node.name, gating([first.flow, second.flow]) or first.flow)
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


def _size(factors: Sequence[_Factor], letter: str) -> int:
    return max(factor.sizes.get(letter, 1) for factor in factors)


def _tie_heads(walk: Walk, factors: Sequence[_Factor], out: str) -> None:
    """Leave the channels inside the heads to choose: those of all heads are tied to each other."""
    heads = set(factors[0].sizes) & set(factors[1].sizes) & set(out)
    for factor in factors:
        for letter in sorted(factor.channels & heads):
            factor.tie(walk, letter, "the heads of an attention layer, of which widths go")
            factor.labels = factor.labels.narrow(factor.every.index(letter), 0, 1)


def _result(walk: Walk, factors: Sequence[_Factor], out: str) -> Flow:
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


def _width(factor: _Factor, out: str) -> int:
    labels = factor.flow.labels
    return sum(letter in out and dim in varying(labels) for dim, letter in enumerate(factor.sizes))


def _count(walk: Walk, factors: Sequence[_Factor], every: str) -> None:
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


def _flows(walk: Walk, *values: Any) -> list[Flow]:
    return [walk.as_flow(value) for value in values]


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(walk: Walk, node: fx.Node, x: Any, y: Any) -> Flow:
    shape = node.meta["val"].shape
    if _is_activation(x) and _is_matrix(y):
        return dense(walk, shape, x, y, inputs=0)
    if _is_matrix(x) and _is_activation(y) and len(y.shape) > 1:
        return dense(walk, shape, y, x, axis=-2)
    first, second = _flows(walk, x, y)
    if first.labels.dim() < 2 or second.labels.dim() < 2:
        walk.freeze(first.labels, _REASON)
        walk.freeze(second.labels, _REASON)
        return walk.frozen(shape, _REASON)
    return _batched(walk, node, first, second)


def _is_activation(value: Any) -> bool:
    return isinstance(value, Flow) and bool((compact(value.labels) != NO_CHANNEL).any())


def _is_matrix(value: Any) -> bool:
    """Whether a layer may have it as its weight."""
    return isinstance(value, Weight | Kernel) and len(value.shape) == 2


@rule(aten.addmm.default)
def add_matmul(walk: Walk, node: fx.Node, added: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Flow:
    if _is_activation(x) and _is_matrix(y) and isinstance(added, Weight) and len(added.shape) == 1:
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
    first, second = _flows(walk, x, y)
    result = _batched(walk, node, first, second)
    return add(walk, node, result, settled(walk, added, result))


@rule(aten.einsum.default)
def einsum(walk: Walk, node: fx.Node, equation: str, operands: Sequence[Any], **__: Any) -> Flow:
    shape = node.meta["val"].shape
    letters, out = _letters(equation, operands, len(shape))
    if all(len(set(names)) == len(names) for names in (*letters, out)):
        if len(operands) == 2:
            layer = _as_layer(walk, shape, operands, letters, out)
            return layer or product(walk, node, _flows(walk, *operands), letters, out, counts=_contracts)
        if len(operands) == 1:
            (x,), (names,) = _flows(walk, *operands), letters
            kept = [letter for letter in names if letter in out]
            if len(kept) < len(names):
                x = summed_over(walk, node.name, x, [names.index(letter) for letter in names if letter not in out])
            return x.moved(x.labels.permute([kept.index(letter) for letter in out]))
    reason = f"einsum {equation!r} of a form that has no rule"
    for flow in _flows(walk, *operands):
        walk.freeze(flow.labels, reason)
    return walk.frozen(shape, reason)


def _letters(equation: str, operands: Sequence[Any], rank: int) -> tuple[list[str], str]:
    """The letters of the operands' axes and of the result's, those that "..." stands for written out."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not arrow:
        once = (letter for letter in sorted(set(inputs) - {",", "."}) if inputs.count(letter) == 1)
        out = ("..." if "." in inputs else "") + "".join(once)
    free = [letter for letter in ascii_letters if letter not in equation]
    ranks = [len(operand.shape) for operand in operands]
    found = []
    for some, axes in zip([*names, out], [*ranks, rank], strict=True):
        hidden = axes - len(some.replace("...", ""))
        found.append(some.replace("...", "".join(reversed(free[:hidden]))))  # aligned at their right ends
    return found[:-1], found[-1]


def _as_layer(
    walk: Walk, shape: Sequence[int], operands: Sequence[Any], letters: Sequence[str], out: str
) -> Flow | None:
    """An activation times a matrix, with one axis in common, which the matrix' other axis replaces."""
    for x, weight, names, own in ((*operands, *letters), (*reversed(operands), *reversed(letters))):
        if _is_activation(x) and _is_matrix(weight):
            inputs = next((position for position in (0, 1) if own[position] in names), 0)
            read, made = own[inputs], own[1 - inputs]
            if read in names and made not in names and sorted(names.replace(read, made)) == sorted(out):
                before = names.replace(read, made)
                size_of = dict(zip(out, shape, strict=True))
                flow = dense(
                    walk, [size_of[letter] for letter in before], x, weight, inputs=inputs, axis=names.index(read)
                )
                return flow.moved(flow.labels.permute([before.index(letter) for letter in out]))
    return None


def _contracts(factors: Sequence[_Factor], out: str) -> bool:
    """Whether einsum makes a matrix product of it; otherwise it multiplies element by element."""
    first, second = factors
    both = (first.sizes.keys() & second.sizes.keys()) - set(out)
    return any(first.sizes[letter] > 1 and second.sizes[letter] > 1 for letter in both)


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
    query, key, value = _flows(walk, query, key, value)
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
