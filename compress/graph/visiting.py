"""The visit of a graph's nodes: arguments turned into flows and weights, and the operator's rule called on them."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from compress.graph.capture import Capture
from compress.graph.comparison import Step
from compress.graph.flows import Flow, Kernel, Weight
from compress.graph.labels import NO_CHANNEL, compact
from compress.graph.rules import KERNEL_RULES, aten
from compress.graph.walk import Walk

_ARITHMETIC = {
    getattr(getattr(aten, name), overload)
    for name in ("add", "sub", "mul", "div", "pow", "rsub", "add_", "sub_", "mul_", "div_", "pow_", "clamp")
    for overload in getattr(aten, name).overloads()
} | {aten.scalar_tensor.default, aten.full_like.default, aten.fill_.Scalar, aten.clamp_min.default}
"""Operators whose integers are numbers to compute with, not sizes or axes."""


def visit(walk: Walk, program: Capture, *, counting: bool = True) -> None:
    """Visit every node of a captured forward pass once, in order; several of one model add up.

    Args:
        counting: whether this one's multiply-adds count.
    """
    walk.counting = counting
    inputs = [node.meta["val"] for node in program.graph.nodes if node.name in program.inputs]
    walk.batch = next((max(1, len(value)) for value in inputs if value.dim()), 1)
    values: dict[fx.Node, Any] = {}
    aliases: dict[int | None, list[fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        aliases[_storage(node)].append(node)
        if node.op == "placeholder":
            values[node] = _placeholder(walk, node, program)
        elif node.op == "output":
            for output in node.all_input_nodes:
                flow = walk.as_flow(values[output])
                if isinstance(flow, Flow):
                    walk.freeze(flow.labels, "output of the model")
        elif node.op == "call_function":
            values[node] = result = _call(walk, node, values)
            if isinstance(result, Flow) and _is_in_place(node):
                for other in aliases[_storage(node.args[0])] if _storage(node.args[0]) else ():
                    _see_change(other, result, values)


def _placeholder(walk: Walk, node: fx.Node, program: Capture) -> Any:
    value = node.meta["val"]
    name = program.parameters.get(node.name) or program.buffers.get(node.name)
    if name is not None:
        return Weight(name, value.shape, trainable=node.name in program.parameters)
    if node.name in program.inputs:
        return walk.frozen(value.shape, "input of the model")
    return walk.unlabelled(value.shape)


def _call(walk: Walk, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args: Any = fx.node.map_arg(node.args, values.get)
    kwargs: Any = fx.node.map_arg(node.kwargs, values.get)
    if node.target is operator.getitem:
        return args[0][args[1]] if args[0] is not None else None
    leaves = _leaves((args, kwargs))
    computed = any(isinstance(leaf, Kernel) or (isinstance(leaf, Weight) and len(leaf.axes) > 1) for leaf in leaves)
    rule = (KERNEL_RULES.get(node.target) if computed else None) or walk.rules.get(node.target)
    result = rule(walk, node, *args, **kwargs) if rule else _without_rule(walk, node, leaves)
    _note_step(walk, node, leaves, result)
    return result


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _note_step(walk: Walk, node: fx.Node, leaves: list[Any], result: Any) -> None:
    numbers = [leaf for leaf in leaves if isinstance(leaf, float)]
    if node.target in _ARITHMETIC:
        numbers += [float(leaf) for leaf in leaves if isinstance(leaf, int) and not isinstance(leaf, bool)]
    numbers += [value for leaf in node.all_input_nodes for value in _values_known(leaf)]
    values, parts = pytree.tree_leaves(node.meta["val"]), result if isinstance(result, (list, tuple)) else [result]
    walk.steps.append(
        Step(
            str(node.target),
            node.meta["module"],
            tuple(part.labels if isinstance(part, Flow) else None for part in parts),
            tuple(tuple(value.shape) for value in values if isinstance(value, Tensor)),
            tuple(leaf.labels for leaf in leaves if isinstance(leaf, Flow)),
            (*numbers, *walk.noted),
        )
    )
    walk.noted.clear()


def _values_known(node: fx.Node) -> list[float]:
    """The number in a constant tensor, as `torch.tensor(x.shape[1])` makes it."""
    value = node.meta.get("val") if node.op == "placeholder" else None
    known = getattr(value, "constant", None) if isinstance(value, FakeTensor) else value
    return [float(known)] if isinstance(known, Tensor) and known.numel() == 1 else []


def _see_change(node: fx.Node, changed: Flow, values: dict[fx.Node, Any]) -> None:
    """What an operator changes in place is seen through every tensor of the same storage: views, and their base."""
    flow = values[node]
    if isinstance(flow, Flow):
        values[node] = replace(
            flow,
            gates=flow.gates | changed.gates,
            vanishes=flow.vanishes and changed.vanishes,
            linear=flow.linear and changed.linear,
            left=flow.left + changed.left,
        )


def _storage(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _leaves(arguments: Any) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate(arguments, found.append)
    return found


def _without_rule(walk: Walk, node: fx.Node, leaves: list[Any]) -> Any:
    reason = f"operator {node.target} has no rule"
    touched = [walk.as_flow(leaf) if isinstance(leaf, (Flow, Weight, Kernel)) else leaf for leaf in leaves]
    flows = [flow for flow in touched if isinstance(flow, Flow)]
    if all(bool((compact(flow.labels) == NO_CHANNEL).all()) for flow in flows):
        make = walk.unlabelled  # constants in, constants out
    else:
        walk.unknown[str(node.target)].append(node.name)
        make = partial(walk.frozen, reason=reason)
        for flow in flows:
            walk.freeze(flow.labels, reason)
    return pytree.tree_map_only(Tensor, lambda value: make(value.shape), node.meta.get("val"))
