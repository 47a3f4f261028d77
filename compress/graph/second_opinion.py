"""Channel groups from Torch-Pruning's DependencyGraph: a second opinion, and a way for models that resist our capture.

Torch-Pruning follows autograd's graph and takes every operator that it does not know for an elementwise one. Its groups
are therefore put to a trial with numbers (`compress.graph.numeric_trial`), and a group that fails is frozen.
This module alone imports `torch_pruning`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch_pruning.dependency import Node

from compress.errors import InputError, first_line
from compress.graph.collection import groups_of
from compress.graph.groups import ChannelGraph
from compress.graph.numeric_trial import broken_groups
from compress.graph.options import check_names, named
from compress.graph.rules import RULES
from compress.graph.skeleton import batch_size
from compress.graph.tracing import unprunable
from compress.graph.walk import Walk
from compress.removal import Slot

OPTYPE = torch_pruning.ops.OPTYPE

_LAYERS = (OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV, OPTYPE.LINEAR)
_PER_CHANNEL = (OPTYPE.BN, OPTYPE.IN)
_KEEPS_NOTHING = ("sigmoid", "softplus", "exp", "log", "cos", "rsqrt", "reciprocal")
"""Parts of the names of autograd nodes whose output at 0 is not 0; `ExpandBackward` moves data and is none of them."""

_OUTSIDE = "Torch-Pruning's positions lie outside the tensor"


def trace(model: nn.Module, example_inputs: Tensor | Sequence[Any], *, ignore: Sequence[str] = ()) -> ChannelGraph:
    """Find the channel groups of `model` by Torch-Pruning; the arguments and the result are those of `graph.trace`.

    A copy of the model is run, in evaluation mode; the model itself is neither run nor changed. Normalisation over
    channels, attention, recurrent layers and embeddings are frozen.

    Raises:
        InputError: Torch-Pruning cannot trace the model, or `ignore` names no module.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    check_names(model, "ignore", ignore)
    graph = dependency_groups(model, inputs, ignore=ignore)
    graph = graph.without(unprunable(graph))
    while graph.groups:
        broken = broken_groups(model, inputs, graph)
        if not broken:
            break
        graph = graph.without(dict.fromkeys(broken, "without these channels the network computes something else"))
    return graph


def dependency_groups(model: nn.Module, inputs: tuple[Any, ...], *, ignore: Sequence[str] = ()) -> ChannelGraph:
    """What Torch-Pruning finds, in the form of a ChannelGraph and not yet put to the trial."""
    copied = copy.deepcopy(model).requires_grad_(True)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calls, multiply_adds = _run(copied, inputs)
            silent = any(name not in calls for name in _owners(copied))
            dependencies = torch_pruning.DependencyGraph().build_dependency(
                copied, inputs, forward_fn=_training if silent else None, output_transform=_marked, verbose=False
            )
            items = list(_items(dependencies))
    except Exception as error:
        raise InputError(
            f"Torch-Pruning cannot trace the model: {first_line(error)}; check that the example input fits."
        ) from error
    translation = _Translation(copied, calls)
    translation.add_slots(dependencies.module2node.values())
    for node, into, positions, roots, root in items:
        translation.add_item(node, into, positions, roots, root)
    translation.freeze_rest()
    translation.add_gates(dependencies.module2node.values())
    walk = translation.walk
    walk.ignore(named(ignore))
    graph = groups_of(walk)
    shapes = dict(copied.named_parameters())
    weighted = sum(count * shapes[name].numel() for name, count in walk.uses.items())
    graph.other_macs = max(0.0, multiply_adds - weighted)
    return graph


def _owners(model: nn.Module) -> list[str]:
    """The modules that have parameters of their own."""
    return [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]


def _training(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The forward pass as the network trains, which also runs what evaluation leaves out (auxiliary heads)."""
    # Two images, for normalisation in training mode refuses a single value per channel.
    twice = torch.utils._pytree.tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.dim() else x, inputs)
    return model.train()(*twice)


def _marked(outputs: Any) -> list[Tensor]:
    """The outputs behind an operation of their own, by which Torch-Pruning knows them as outputs."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf * 1 for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]


@dataclass(frozen=True)
class _Call:
    """Shapes at the last call of a layer."""

    read: torch.Size
    made: torch.Size


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[str, list[_Call]], float]:
    """Layer -> its calls, in the order of the forward pass; and all multiply-adds of one image."""
    calls: dict[str, list[_Call]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, read: tuple[Any, ...], made: Any) -> None:
            if read and isinstance(read[0], Tensor) and isinstance(made, Tensor):
                calls.setdefault(name, []).append(_Call(read[0].shape, made.shape))

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules()]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    for hook in hooks:
        hook.remove()
    return calls, counter.get_total_flops() / 2 / batch_size(inputs)


def _items(
    dependencies: torch_pruning.DependencyGraph,
) -> Iterable[tuple[Node, bool, list[int], list[int], nn.Module]]:
    """(node, whether its input side is meant, positions, the root's channel of each position, root), of all groups."""
    for group in dependencies.get_all_groups():
        root, handler = group[0].dep.target.module, group[0].dep.handler
        for item in group.items:
            yield item.dep.target, _reads(dependencies, item), item.idxs, item.root_idxs, root
        # Of a layer that meets the root at two places the whole group knows one; its channels by themselves know both.
        first = dependencies.get_pruning_group(root, handler, idxs=[0])
        if any(item.dep.target.module is root and len(item.idxs) > 1 for item in first.items):
            for channel in group[0].idxs:
                for item in dependencies.get_pruning_group(root, handler, idxs=[channel]).items:
                    yield item.dep.target, _reads(dependencies, item), item.idxs, [channel] * len(item.idxs), root


def _reads(dependencies: torch_pruning.DependencyGraph, item: Any) -> bool:
    """Whether the input side of an item's node is meant."""
    own = dependencies.get_pruner_of_module(item.dep.target.module)
    return bool(item.dep.handler == own.prune_in_channels and item.dep.handler != own.prune_out_channels)


class _Translation:
    """Fills a `Walk` from Torch-Pruning's nodes and groups."""

    def __init__(self, model: nn.Module, calls: Mapping[str, list[_Call]]) -> None:
        self.walk = Walk(RULES)
        self._calls = calls
        self._parameters = {name for name, _ in model.named_parameters()}
        self._names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._names |= {id(parameter): name for name, parameter in model.named_parameters()}
        self._tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        self._reached: dict[Slot, Tensor] = {}

    def add_slots(self, nodes: Iterable[Node]) -> None:
        """Give fresh labels to every tensor dimension that has channels, in the order of the forward pass."""
        for node in self._ordered(nodes):
            name = self._names[id(node.module)]
            for into in (True, False):
                for slot in self._slots(node, into=into):
                    if slot not in self.walk.bindings:
                        self.walk.bindings[slot] = self.walk.new(self._tensors[slot[0]].shape[slot[1]])
                        self._reached[slot] = torch.zeros(len(self.walk.bindings[slot]), dtype=torch.bool)
            if node.type in _LAYERS:
                self._add_layer(name, node)
            elif node.type == OPTYPE.PARAMETER:
                self._add_gate(name, [(name, node.pruning_dim % node.module.dim())])

    def _ordered(self, nodes: Iterable[Node]) -> list[Node]:
        """The nodes that are modules or parameters of the model, in the order of the forward pass."""
        # What the forward pass did not call (an auxiliary head) comes last, as it was defined.
        order = {name: number for number, name in enumerate(dict.fromkeys([*self._calls, *self._names.values()]))}
        mine = [node for node in nodes if id(node.module) in self._names]
        return sorted(mine, key=lambda node: order[self._names[id(node.module)]])

    def _add_layer(self, name: str, node: Node) -> None:
        made, read = self._slots(node, into=False), self._slots(node, into=True)
        self.walk.producers[made[0]] = name
        if read and node.type != OPTYPE.DEPTHWISE_CONV:
            self.walk.consumers[read[0]] = name
        self._add_gate(name, made)
        for call in self._calls.get(name, ()):
            shape = call.read if getattr(node.module, "transposed", False) else call.made
            places = prod(shape[:-1]) if node.type == OPTYPE.LINEAR else prod(shape) // shape[1]
            self.walk.uses[made[0][0]] += places / max(1, shape[0])

    def _add_gate(self, name: str, slots: Sequence[Slot]) -> None:
        self.walk.gates[name] = [slot for slot in slots if slot[0] in self._parameters]

    def _slots(self, node: Node, *, into: bool) -> list[Slot]:
        """The tensor dimensions along which a node's input (`into`) or output channels lie; the weight's first."""
        module, kind, name = node.module, node.type, self._names[id(node.module)]
        if kind == OPTYPE.PARAMETER:
            return [(name, node.pruning_dim % module.dim())]
        stem = f"{name}." if name else ""
        outputs: list[tuple[str, int]] = []
        if kind in _LAYERS:
            dim = 1 if getattr(module, "transposed", False) and kind == OPTYPE.CONV else 0
            if into and kind != OPTYPE.DEPTHWISE_CONV:
                return [(f"{stem}weight", 1 - dim)]
            outputs = [("weight", dim), ("bias", 0)]
        elif kind in _PER_CHANNEL:
            outputs = [("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0)]
        elif kind == OPTYPE.PRELU and module.num_parameters > 1:
            outputs = [("weight", 0)]
        return [(stem + tensor, dim) for tensor, dim in outputs if getattr(module, tensor, None) is not None]

    def add_item(self, node: Node, into: bool, positions: list[int], roots: list[int], root: nn.Module) -> None:
        """Join the positions along a node's tensors with the channels of the group's root."""
        source = f"{self._names[id(root)]}.weight"
        lead = self.walk.bindings[source, 1 if getattr(root, "transposed", False) else 0]
        if max(roots, default=0) >= len(lead):
            self.walk.freeze(lead, _OUTSIDE)
            return
        channels = lead[torch.tensor(roots)]
        if reason := _reason(node):
            self.walk.freeze(channels, reason)
        if id(node.module) not in self._names:
            return
        places, groups = torch.tensor(positions), getattr(node.module, "groups", 1)
        grouped = groups > 1 and node.type == OPTYPE.CONV
        for slot in self._slots(node, into=into):
            labels = self.walk.bindings[slot]
            along = places
            if bool((places >= len(labels) * (groups if grouped and into else 1)).any()):
                self.walk.freeze(channels, _OUTSIDE)
                continue
            if grouped:
                # Every group of a grouped convolution loses the same positions, so that the groups stay of one size.
                along = places % (len(labels) if into else len(labels) // groups)
                if not into:
                    self.walk.join(labels[places], labels[along])
            self._reached[slot][along if into else places] = True
            self.walk.join(labels[along], channels)

    def freeze_rest(self) -> None:
        """Freeze the positions that no group of Torch-Pruning's reaches, such as the first layer's input channels."""
        for slot, reached in self._reached.items():
            self.walk.freeze(self.walk.bindings[slot][~reached], "input of the model, or out of Torch-Pruning's sight")

    def add_gates(self, nodes: Iterable[Node]) -> None:
        """Record which gates stand before each consumer and which normalisation follows each producer."""
        ordered = self._ordered(nodes)
        for node in ordered:
            if node.type in _PER_CHANNEL:
                affine = [slot for slot in self._slots(node, into=False) if slot[0].endswith(("weight", "bias"))]
                self._add_gate(self._names[id(node.module)], affine)
        flows = _Flows(self._names, self.walk.gates)
        for node in ordered:
            name, gates = self._names[id(node.module)], flows.before(node).gates
            if node.type in _PER_CHANNEL and self.walk.gates[name]:
                for producer in sorted(gates):
                    if name not in self.walk.norms[producer]:
                        self.walk.norms[producer].append(name)
            elif node.type in _LAYERS and node.type != OPTYPE.DEPTHWISE_CONV:
                for gate in gates:
                    for slot in self.walk.gates[gate]:
                        self.walk.arrive(frozenset([gate]), self.walk.bindings[slot])


@dataclass(frozen=True)
class _Flow:
    """As `walk.Flow`, without labels: the gates of an activation, and whether it is 0 when they are."""

    gates: frozenset[str] = frozenset()
    vanishes: bool = False


@dataclass
class _Flows:
    """Follows gates through the graph of nodes."""

    names: Mapping[int, str]
    gates: Mapping[str, Sequence[Slot]]
    known: dict[Node, _Flow] = field(default_factory=dict)

    def before(self, node: Node) -> _Flow:
        """What a node reads."""
        return _combined(node, [self.after(source) for source in node.inputs])

    def after(self, node: Node) -> _Flow:
        """What a node makes."""
        pending = [node]  # by hand, for a network may be deeper than Python's stack
        opened: set[Node] = set()
        while pending:
            top = pending[-1]
            if top in self.known:
                pending.pop()
            elif top in opened:
                self.known[top] = self._own(top, [self.known.get(source, _Flow()) for source in top.inputs])
            else:
                opened.add(top)
                if not self._starts(top):
                    pending += [source for source in top.inputs if source not in opened and source not in self.known]
        return self.known[node]

    def _starts(self, node: Node) -> bool:
        name = self.names.get(id(node.module))
        return name is not None and (node.type in _LAYERS or bool(self.gates.get(name)))

    def _own(self, node: Node, sources: Sequence[_Flow]) -> _Flow:
        if self._starts(node):
            return _Flow(frozenset([self.names[id(node.module)]]), vanishes=True)
        flow = _combined(node, sources)
        operator = str(getattr(node.module, "_grad_fn", "")).lower()
        if node.type in _PER_CHANNEL or any(part in operator for part in _KEEPS_NOTHING):
            return _Flow(flow.gates, vanishes=False)
        return flow


def _combined(node: Node, sources: Sequence[_Flow]) -> _Flow:
    operator = str(getattr(node.module, "_grad_fn", "")).lower()
    if operator.startswith("mul"):  # a product vanishes with either factor; gating both would square the gate
        for flow in sources:
            if flow.vanishes:
                return flow
    gates = frozenset[str]().union(*(flow.gates for flow in sources))
    return _Flow(gates, bool(sources) and all(flow.vanishes for flow in sources))


def _reason(node: Node) -> str | None:
    """Why channels that reach this node must stay, if they must."""
    module, kind = node.module, node.type
    if kind == OPTYPE.OUTPUT:
        return "output of the model"
    if kind in (OPTYPE.LN, OPTYPE.GN):
        return f"{type(module).__name__} over channels: removing a channel changes the statistics of the others"
    if kind == OPTYPE.MHA:
        return "attention: a product of two activations"
    if kind in (OPTYPE.LSTM, OPTYPE.EMBED):
        return f"{type(module).__name__} layers are not pruned"
    if kind in (OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV) and module.groups > 1:
        if module.transposed:
            return "transposed convolution in groups"
        if kind == OPTYPE.DEPTHWISE_CONV and module.weight.shape[1] != 1:
            return "grouped convolution with one output channel per group"
    return None
