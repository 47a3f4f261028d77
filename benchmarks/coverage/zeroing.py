"""The reference for every removal: the dense network in which the removed channels are zeroed."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.graph import ChannelGraph


def zeroed(model: nn.Module, graph: ChannelGraph, removals: Mapping[str, Tensor]) -> nn.Module:
    """A copy in which the gates of the channels are 0; where that leaves a residue, what the consumers read of them.

    Args:
        graph: of `model`, before the removal.
        removals: group -> channels, (k,) int64.
    """
    result = copy.deepcopy(model)
    parameters = dict(result.named_parameters())
    for name, channels in removals.items():
        group = graph.groups[name]
        parts = group.gates
        if group.residue is not None:
            parts = tuple(part for part in group.slices if (part.tensor, part.dim) in group.readers)
        for part in parts:
            parameters[part.tensor].data.index_fill_(part.dim, part.of(channels), 0)
    return result


def relative_error(actual: Any, expected: Any) -> float:
    """Largest |difference| / largest |expected|, of the output in which it is largest; infinite where not finite.

    Args:
        actual, expected: what the two networks return: a tensor, or any structure of tensors.

    Raises:
        ValueError: the outputs are not of one number and of the same shapes.
    """
    found, wanted = tensors(actual), tensors(expected)
    if [one.shape for one in found] != [one.shape for one in wanted]:
        raise ValueError(f"the outputs have shapes {_shapes(found)} instead of {_shapes(wanted)}")
    errors = []
    for one, other in zip(found, wanted, strict=True):
        error = float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
        errors.append(error if error == error else float("inf"))
    return max(errors, default=0.0)


def tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of what a network returns, in order, without gradients."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _shapes(found: list[Tensor]) -> str:
    return ", ".join(str(tuple(one.shape)) for one in found) or "none"
