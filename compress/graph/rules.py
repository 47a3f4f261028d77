"""The operator tables: how labels pass through each ATen operator.

An operator that is missing here freezes the channels that it touches and is reported (`ChannelGraph.frozen`); `rule`
adds one:

    @rule(torch.ops.mylib.mirror.default)
    def mirror(walk, node, x):
        return x.moved(x.labels.flip(-1))

The rules stand in `elementwise`, `shapes`, `positions`, `norms`, `layers`, `products`, `contractions` and `kernels`,
which `operators` loads.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from compress.graph.walk import Rule

aten = torch.ops.aten

RULES: dict[Any, Rule] = {}
"""Operator -> rule."""

KERNEL_RULES: dict[Any, Rule] = {}
"""Operator -> rule where an argument is a stored tensor with several axes, or was computed from one."""

R = TypeVar("R", bound=Rule)


def rule(*operators: Any) -> Callable[[R], R]:
    """Register a rule for these operators (`torch.ops.NAMESPACE.NAME.OVERLOAD`), replacing earlier ones."""

    def register(function: R) -> R:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def kernel_rule(*operators: Any) -> Callable[[R], R]:
    """`rule` for calls in which a `Kernel`, or a stored tensor with several axes, is among the arguments."""

    def register(function: R) -> R:
        KERNEL_RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def applied(node: fx.Node, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The node's own operator, on labels instead of data."""
    operator: Any = node.target
    return operator(labels, *args, **kwargs)
