"""A trial of channel groups with numbers, for a graph that cannot be walked a second time.

The network without a third of a group's channels must equal the network whose consumers read zeros there.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.graph.bisection import culprits
from compress.graph.groups import ChannelGraph
from compress.removal import Slot, keep_slices

_TRIAL_FRACTION = 1 / 3
_TRIAL_ERROR = 1e-4
"""Largest error of the trial, relative to the largest output, in float32; a wrong group gives 1e-2 and more."""


def broken_groups(model: nn.Module, inputs: tuple[Any, ...], graph: ChannelGraph) -> list[str]:
    """Names of the groups whose removal is not the same as zeros at their consumers; works on copies of the model."""
    randomised = _randomised(model)

    def fails(names: Sequence[str]) -> bool:
        try:
            return not _fits(randomised, inputs, graph, names)
        except Exception:  # noqa: BLE001  a forward pass on wrong shapes fails in any way
            return True

    return culprits(list(graph.groups), fails)


def _randomised(model: nn.Module) -> nn.Module:
    """A copy for the trial, in which no tensor is constant: a scale that starts at 0 would hide what it scales."""
    copied = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.data = torch.empty(parameter.shape).uniform_(0.5, 1.5, generator=generator).to(parameter)
    return copied


def _fits(model: nn.Module, inputs: tuple[Any, ...], graph: ChannelGraph, names: Sequence[str]) -> bool:
    random = torch.Generator().manual_seed(0)
    pruned, blind = copy.deepcopy(model), copy.deepcopy(model)
    removals = {}
    for name in names:
        group = graph.groups[name]
        count = min(group.width - 1, max(1, round(group.width * _TRIAL_FRACTION)))
        removals[name] = torch.randperm(group.width, generator=random)[:count]
        reads = {_reading(model, consumer) for consumer in group.consumers}
        for slot, positions in group.positions(removals[name]).items():
            if slot in reads:
                blind.get_parameter(slot[0]).data.index_fill_(slot[1], positions, 0)
    keep_slices(pruned, graph.keep(removals))
    with torch.no_grad():
        results = [torch.utils._pytree.tree_leaves(network(*inputs)) for network in (pruned, blind)]
    pairs = [(a, b) for a, b in zip(*results, strict=True) if isinstance(a, Tensor)]
    return all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _reading(model: nn.Module, layer: str) -> Slot:
    """The dimension along which a layer reads channels."""
    return f"{layer}.weight".removeprefix("."), 0 if getattr(model.get_submodule(layer), "transposed", False) else 1


def _close(actual: Tensor, expected: Tensor) -> bool:
    return float((actual - expected).abs().max()) <= _TRIAL_ERROR * float(expected.abs().max())
