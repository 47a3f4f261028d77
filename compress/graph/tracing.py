"""From a model to its channel graph: capture, walk, and a trial removal that shows whether the walk was right."""

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from compress.graph import operators  # noqa: F401  (fills the operator tables)
from compress.graph.collection import groups_of
from compress.graph.comparison import Trail
from compress.graph.groups import ChannelGraph
from compress.graph.options import Options
from compress.graph.rules import RULES
from compress.graph.skeleton import Skeleton
from compress.graph.trial import Trial
from compress.graph.visiting import visit
from compress.graph.walk import Attention, Walk

logger = logging.getLogger(__name__)


def trace(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    *,
    ignore: Sequence[str] = (),
    protect: Sequence[str] = (),
    tie: Sequence[tuple[str, str]] = (),
    attention: Attention = "heads",
    embedding: bool = False,
) -> ChannelGraph:
    """Find the channel groups of `model`.

    The model itself is not run and not changed: a copy made of fake tensors is captured as a graph of ATen operators,
    which is walked (`compress.graph.walk`), and a part of the channels of every group is removed from a second such
    copy, which is captured and walked again. A group whose trial does not give the network that was expected, because
    the forward pass takes a size from an attribute or cuts a tensor at another place than before, is frozen and named.

    Args:
        example_inputs: the forward pass's positional arguments; a tensor is one argument. Values do not matter.
        ignore: names of modules whose output channels stay; a name covers everything inside the module.
        protect: names of modules none of whose tensors is cut.
        tie: pairs of layers; output channel i of one can go only together with output channel i of the other.
        attention: what of an attention layer can go: whole heads, channels of all heads together ("widths": queries and
            keys as one group, values as another), or nothing.
        embedding: whether channels can go that a normalisation mixes with others, such as the stream of a transformer;
            the network then computes something else than with zeros there (`Group.mixed`).

    Raises:
        InputError: the model cannot be captured, or an option names what is not there or cannot be done.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    options = Options.checked(model, ignore=ignore, protect=protect, tie=tie, attention=attention, embedding=embedding)
    with _collection_paused():
        graph = _proven(model, inputs, options)
    for operator, nodes in graph.operators_without_rule.items():
        logger.warning("operator %s has no rule (%d uses): what it touches is not pruned", operator, len(nodes))
    return replace(graph, trail=Trail())


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Without the garbage collector, which would look through millions of small objects again and again (15 % of a
    DenseNet's trace) and find next to nothing: tensors here have no storage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _proven(model: nn.Module, inputs: tuple[Any, ...], options: Options) -> ChannelGraph:
    """The groups that stand their trial."""
    graph = _first_walk(Skeleton.of(model, inputs), options)
    graph = graph.without(unprunable(graph))
    while graph.groups:
        broken, attributes = Trial(model, inputs, graph, partial(walked, options=options)).outcome()
        if not broken:
            return replace(graph, attributes=attributes)
        for reason in dict.fromkeys(broken.values()):
            first, *more = [name for name in broken if broken[name] == reason]
            others = f" and {len(more)} more" if more else ""
            logger.warning("the channels of %s%s are not pruned: %s", first, others, reason)
        graph = graph.without(broken)
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


def walked(skeleton: Skeleton, options: Options, grouped: frozenset[str] = frozenset()) -> ChannelGraph:
    """Capture and walk; once more as the network trains, where evaluation leaves layers out (auxiliary heads).

    Args:
        grouped: layers known as grouped, whatever their shapes look like (`ChannelGraph.grouped`).

    Raises:
        InputError: the model cannot be captured, or layers cannot be tied.
    """
    walk = Walk(RULES, grouped=set(grouped), attention=options.attention, embedding=options.embedding)
    program = skeleton.captured()
    visit(walk, program)
    if program.live < {name for name, _ in skeleton.model.named_parameters()}:
        visit(walk, skeleton.captured(training=True), counting=False)
    options.applied(walk)
    return groups_of(walk)


def _first_walk(skeleton: Skeleton, options: Options) -> ChannelGraph:
    graph = walked(skeleton, options)
    sizes = {name: parameter.numel() for name, parameter in skeleton.model.named_parameters()}
    counted = sizes.keys() - skeleton.described  # what is said of custom layers comes on top
    weighted = sum(count * sizes[name] for name, count in graph.uses.items() if name in counted)
    weighted += sum(product.value(graph.widths) for product in graph.products)
    graph.other_macs = max(0.0, skeleton.multiply_adds() - weighted)
    return graph
