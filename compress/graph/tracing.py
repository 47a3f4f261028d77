"""From a model to its channel graph: capture, walk, and a trial removal that shows whether the walk was right."""

import difflib
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from compress.errors import InputError
from compress.graph import operators  # noqa: F401  (fills the operator tables)
from compress.graph.groups import ChannelGraph, groups_of
from compress.graph.rules import RULES
from compress.graph.skeleton import Skeleton
from compress.graph.trial import Trial
from compress.graph.visiting import visit
from compress.graph.walk import Walk

logger = logging.getLogger(__name__)


def trace(model: nn.Module, example_inputs: Tensor | Sequence[Any], *, ignore: Sequence[str] = ()) -> ChannelGraph:
    """Find the channel groups of `model`.

    The model itself is not run and not changed: a copy made of fake tensors is captured as a graph of ATen operators,
    which is walked (`compress.graph.walk`), and a part of the channels of every group is removed from a second such
    copy, which is captured and walked again. A group whose trial does not give the network that was expected, because
    the forward pass takes a size from an attribute or cuts a tensor at another place than before, is frozen and named.

    Args:
        example_inputs: the forward pass's positional arguments; a tensor is one argument. Values do not matter.
        ignore: names of modules whose output channels stay; a name covers everything inside the module.

    Raises:
        InputError: the model cannot be captured, or `ignore` names no module.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    check_ignore(model, ignore)
    graph = _first_walk(Skeleton.of(model, inputs), ignore)
    graph = graph.without(unprunable(graph))
    while graph.groups:
        broken = Trial(model, inputs, graph, walked).broken()
        if not broken:
            break
        for name, reason in broken.items():
            logger.warning("the channels of %s are not pruned: %s", name, reason)
        graph = graph.without(broken)
    for operator, nodes in graph.operators_without_rule.items():
        logger.warning("operator %s has no rule (%d uses): what it touches is not pruned", operator, len(nodes))
    return graph


def unprunable(graph: ChannelGraph) -> dict[str, str]:
    """Groups of which no channel can be removed or ranked: name -> why."""
    reasons = {}
    for name, group in graph.groups.items():
        if group.width == 1:
            reasons[name] = "all its channels are tied to one"
        elif not group.consumers and not group.gates:
            reasons[name] = "no layer reads it"
        elif not group.gates:
            reasons[name] = "no trainable parameter gates it"
    return reasons


def check_ignore(model: nn.Module, ignore: Sequence[str]) -> None:
    """Raise InputError for a name in `ignore` that is no module or parameter of the model."""
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for name in ignore:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise InputError(f"ignore names {name!r}, but the model has no module or parameter of that name{hint}")


def covers(ignore: Sequence[str], layer: str) -> bool:
    """Whether a layer is named by `ignore` or lies inside a module that is."""
    return any(layer == name or layer.startswith(f"{name}.") for name in ignore)


def walked(skeleton: Skeleton, ignore: Sequence[str] = (), grouped: frozenset[str] = frozenset()) -> ChannelGraph:
    """Capture and walk; once more as the network trains, where evaluation leaves layers out (auxiliary heads).

    Args:
        grouped: layers known as grouped convolutions, whatever their shapes look like.

    Raises:
        InputError: the model cannot be captured.
    """
    walk = Walk(RULES, grouped=set(grouped))
    program = skeleton.captured()
    visit(walk, program)
    if program.live < {name for name, _ in skeleton.model.named_parameters()}:
        visit(walk, skeleton.captured(training=True), counting=False)
    walk.ignore(lambda layer: covers(ignore, layer))
    return groups_of(walk)


def _first_walk(skeleton: Skeleton, ignore: Sequence[str]) -> ChannelGraph:
    graph = walked(skeleton, ignore)
    sizes = {name: parameter.numel() for name, parameter in skeleton.model.named_parameters()}
    weighted = sum(count * sizes[name] for name, count in graph.uses.items() if name in sizes)
    weighted += sum(product.value(graph.widths) for product in graph.products)
    graph.other_macs = max(0.0, skeleton.multiply_adds() - weighted)
    return graph
