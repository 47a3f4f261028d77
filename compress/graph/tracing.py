"""From a model to its channel graph: capture, walk, and a trial removal that shows whether the walk was right."""

import copy
import difflib
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from compress.errors import InputError, first_line
from compress.graph import layers  # noqa: F401  (fills the operator table)
from compress.graph.bisection import culprits
from compress.graph.groups import ChannelGraph, groups_of
from compress.graph.rules import RULES
from compress.graph.walk import Walk
from compress.removal import Slot, keep_slices

logger = logging.getLogger(__name__)

_TRIAL_FRACTIONS = (0.2, 0.7)
"""Between these lies the part of a group's channels that the trial removes. It differs from group to group: equal parts
of all groups would leave a tensor that is cut at a fraction of its width cut at the right place."""


def trace(model: nn.Module, example_inputs: Tensor | Sequence[Any], *, ignore: Sequence[str] = ()) -> ChannelGraph:
    """Find the channel groups of `model`.

    The model itself is not run and not changed: a copy made of fake tensors is exported (`torch.export`), its ATen
    graph is walked (`compress.graph.walk`), and a part of the channels of every group is removed from a second such
    copy, which is exported and walked again. A group whose trial does not give the network that was expected, because
    the forward pass takes a size from an attribute or cuts a tensor at another place than before, is frozen and named.

    Args:
        example_inputs: the forward pass's positional arguments; a tensor is one argument. Values do not matter.
        ignore: names of modules whose output channels stay; a name covers everything inside the module.

    Raises:
        InputError: `torch.export` cannot capture the model, or `ignore` names no module.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    check_ignore(model, ignore)
    graph = _first_walk(model, inputs, ignore)
    graph = graph.without(unprunable(graph))
    while graph.groups:
        broken = _trial(model, inputs, graph)
        if not broken:
            break
        broken = _with_siblings(graph, broken)
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


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose parameters and buffers are fake tensors: shapes without storage."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.detach()), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = mode.from_tensor(buffer.detach())
    copied = copy.deepcopy(model, memo)
    copied.__dict__["_espalier_mode"] = mode
    return copied.eval()


def _fake(skeleton: nn.Module, inputs: tuple[Any, ...], copies: int = 1) -> tuple[FakeTensorMode, tuple[Any, ...]]:
    mode: FakeTensorMode = skeleton.__dict__["_espalier_mode"]

    def convert(tensor: Tensor) -> Tensor:
        fake = mode.from_tensor(tensor.detach())
        return torch.cat([fake] * copies) if copies > 1 and tensor.dim() else fake

    return mode, torch.utils._pytree.tree_map_only(Tensor, convert, inputs)


def _exported(skeleton: nn.Module, inputs: tuple[Any, ...], copies: int = 1) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(skeleton, _fake(skeleton, inputs, copies)[1])
    except Exception as error:  # it fails with anything that the model's forward can raise
        raise InputError(
            f"torch.export cannot capture the model: {first_line(error)}; check that the example input fits, or try "
            "graph='torch-pruning'."
        ) from error


def _walk(
    skeleton: nn.Module, inputs: tuple[Any, ...], ignore: Sequence[str], grouped: frozenset[str] = frozenset()
) -> ChannelGraph:
    """Export and walk; once more as the network trains, where evaluation leaves layers out (auxiliary heads)."""
    walk = Walk(RULES, grouped=set(grouped))
    with torch.no_grad():
        program = _exported(skeleton, inputs)
        walk.run(program)
        live = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
        used = {name for node, name in program.graph_signature.inputs_to_parameters.items() if node in live}
        if used < {name for name, _ in skeleton.named_parameters()}:
            # Two images, for normalisation in training mode refuses a single value per channel.
            skeleton.train()
            walk.run(_exported(skeleton, inputs, copies=2), counting=False)
            skeleton.eval()
    walk.ignore(lambda layer: covers(ignore, layer))
    return groups_of(walk)


def _first_walk(model: nn.Module, inputs: tuple[Any, ...], ignore: Sequence[str]) -> ChannelGraph:
    skeleton = _skeleton(model)
    graph = _walk(skeleton, inputs, ignore)
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    mode, fake = _fake(skeleton, inputs)
    with torch.no_grad(), mode, FlopCounterMode(display=False) as counter:
        skeleton(*fake)
    weighted = sum(count * shapes[name].numel() for name, count in graph.uses.items() if name in shapes)
    graph.other_macs = max(0.0, counter.get_total_flops() / 2 / batch_size(inputs) - weighted)
    return graph


def batch_size(inputs: tuple[Any, ...]) -> int:
    """Number of images in the example inputs: the first dimension of the first tensor that has one."""
    leaves = torch.utils._pytree.tree_leaves(inputs)
    return next((int(leaf.shape[0]) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)


def _trial(model: nn.Module, inputs: tuple[Any, ...], graph: ChannelGraph) -> dict[str, str]:
    """Remove a part of every group from a skeleton; group name -> why it must be frozen."""
    try:
        return _mismatch(model, inputs, graph)
    except InputError as error:
        reason = f"the forward pass does not follow its widths: {first_line(error.__cause__ or error)}"
    names = list(graph.groups)
    for training in (False, True):  # what fails in training only is an auxiliary head
        broken = culprits(names, partial(_fails, model, inputs, graph, training))
        if broken:
            return dict.fromkeys(broken, reason)
    return dict.fromkeys(names, reason)


def _with_siblings(graph: ChannelGraph, broken: dict[str, str]) -> dict[str, str]:
    """Also the groups with other channels of the same producers: where one is cut wrongly, so may the others be."""
    reasons = {producer.layer: reason for name, reason in broken.items() for producer in graph.groups[name].producers}
    found = dict(broken)
    for name, group in graph.groups.items():
        for producer in group.producers:
            if producer.layer in reasons:
                found.setdefault(name, reasons[producer.layer])
    return found


def _mismatch(model: nn.Module, inputs: tuple[Any, ...], graph: ChannelGraph) -> dict[str, str]:
    """Groups that a walk over the smaller network does not find again: name -> why they must be frozen."""
    skeleton, smaller = _shrunk(model, graph, list(graph.groups))
    found = _numbered(_walk(skeleton, inputs, (), graph.grouped))
    owner: dict[int, str] = {}
    tied: dict[int, set[int]] = {}  # channel of the new walk -> channels that were expected at its positions
    broken: set[str] = set()
    for slot, expected in _numbered(smaller, owner).items():
        actual = found.get(slot)
        if actual is None or len(actual) != len(expected):
            broken.update(owner[one] for one in expected.unique().tolist() if one in owner)
            continue
        for one, other in torch.stack([expected, actual]).unique(dim=1).T.tolist():
            if other >= 0:
                tied.setdefault(other, set()).add(one)
            elif one in owner:
                broken.add(owner[one])
    # Fewer ties than expected do no harm: an axis that shrank to 1 ties nothing.
    for ones in tied.values():
        if len(ones) > 1:
            broken.update(owner[one] for one in ones if one in owner)
    reason = "after a removal the forward pass cuts its tensors at other places"
    return {name: reason for name in graph.groups if name in broken}


def _numbered(graph: ChannelGraph, owner: dict[int, str] | None = None) -> dict[Slot, Tensor]:
    """(tensor, dim) -> a number for the channel at each position, -1 for frozen; `owner` receives number -> group."""
    numbers: dict[Slot, Tensor] = {}
    start = 0
    for name, group in graph.groups.items():
        for part in group.slices:
            slot = (part.tensor, part.dim)
            line = numbers.setdefault(slot, torch.full((graph.sizes[slot],), -1))
            line[part.positions] = start + part.channels
        if owner is not None:
            owner.update(dict.fromkeys(range(start, start + group.width), name))
        start += group.width
    return numbers


def _shrunk(model: nn.Module, graph: ChannelGraph, names: Sequence[str]) -> tuple[nn.Module, ChannelGraph]:
    """A skeleton of `model`, and its graph, without a random part of the channels of the named groups."""
    random = torch.Generator().manual_seed(0)
    low, high = _TRIAL_FRACTIONS
    removals = {}
    for name in names:
        width = graph.groups[name].width
        fraction = low + (high - low) * float(torch.rand((), generator=random))
        count = min(width - 1, max(1, round(width * fraction)))
        removals[name] = torch.randperm(width, generator=random)[:count].sort().values
    skeleton, smaller = _skeleton(model), graph.copy()
    keep = smaller.remove(removals)
    with skeleton.__dict__["_espalier_mode"]:
        keep_slices(skeleton, keep)
    return skeleton, smaller


def _fails(
    model: nn.Module, inputs: tuple[Any, ...], graph: ChannelGraph, training: bool, names: Sequence[str]
) -> bool:
    """Whether the forward pass breaks on a removal from the named groups."""
    skeleton, _ = _shrunk(model, graph, names)
    mode, fake = _fake(skeleton, inputs, copies=2 if training else 1)
    try:
        with torch.no_grad(), mode:
            skeleton.train(training)(*fake)
    except Exception:  # noqa: BLE001  a forward pass on wrong shapes fails in any way
        return True
    return False
