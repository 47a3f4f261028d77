"""Rules for products whose axes are named or listed: einsum and tensordot."""

from collections.abc import Sequence
from string import ascii_letters
from typing import Any

from torch import fx

from compress.graph.flows import Flow
from compress.graph.layers import dense
from compress.graph.positions import summed_over
from compress.graph.products import Factor, flows_of, is_activation, is_matrix, product
from compress.graph.rules import aten, rule
from compress.graph.walk import Walk, place_of


@rule(aten.einsum.default)
def einsum(walk: Walk, node: fx.Node, equation: str, operands: Sequence[Any], **__: Any) -> Flow:
    shape = node.meta["val"].shape
    letters, out = _letters(equation, operands, len(shape))
    if all(len(set(names)) == len(names) for names in (*letters, out)):
        if len(operands) == 2:
            layer = _as_layer(walk, shape, operands, letters, out)
            return layer or product(walk, node, flows_of(walk, *operands), letters, out, counts=_contracts)
        if len(operands) == 1:
            (x,), (names,) = flows_of(walk, *operands), letters
            kept = [letter for letter in names if letter in out]
            if len(kept) < len(names):
                x = summed_over(walk, place_of(node), x, [names.index(letter) for letter in names if letter not in out])
            return x.moved(x.labels.permute([kept.index(letter) for letter in out]))
    reason = f"einsum {equation!r} of a form that has no rule"
    for flow in flows_of(walk, *operands):
        walk.freeze(flow.labels, reason)
    return walk.frozen(shape, reason)


@rule(aten.tensordot.default)
def tensordot(walk: Walk, node: fx.Node, x: Any, y: Any, read: Sequence[int], read_too: Sequence[int]) -> Flow:
    first, second = ascii_letters[: len(x.shape)], list(ascii_letters[len(x.shape) :][: len(y.shape)])
    pairs = [(first[here], there % len(y.shape)) for here, there in zip(read, read_too, strict=True)]
    for letter, there in pairs:
        second[there] = letter
    letters = [first, "".join(second)]
    out = "".join(letter for letter in first + letters[1] if letter not in dict(pairs))
    layer = _as_layer(walk, node.meta["val"].shape, (x, y), letters, out)
    return layer or product(walk, node, flows_of(walk, x, y), letters, out)


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
        if is_activation(x) and is_matrix(weight):
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


def _contracts(factors: Sequence[Factor], out: str) -> bool:
    """Whether einsum makes a matrix product of it; otherwise it multiplies element by element."""
    first, second = factors
    both = (first.sizes.keys() & second.sizes.keys()) - set(out)
    return any(first.sizes[letter] > 1 and second.sizes[letter] > 1 for letter in both)
