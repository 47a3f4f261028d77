"""Which channels the table removes: a share of every group, drawn at random, with widths in multiples of 8."""

import torch
from torch import Tensor, nn

from compress.graph import ChannelGraph

ROUND_TO = 8


def random_removals(graph: ChannelGraph, share: float, seed: int) -> dict[str, Tensor]:
    """Of every group the channels that go: group -> (k,) int64, ascending. Groups that lose none are left out."""
    random = torch.Generator().manual_seed(seed)
    removals = {}
    for name, group in graph.groups.items():
        gone = group.width - kept_width(group.width, share, group.step(ROUND_TO))
        if gone:
            removals[name] = torch.randperm(group.width, generator=random)[:gone].sort().values
    return removals


def kept_width(width: int, share: float, step: int) -> int:
    """Channels left of `width` without `share` of them: the nearest multiple of `step`; any number >= 1 below it."""
    wanted = width * (1 - share)
    if width <= step:
        return max(1, round(wanted))
    return min(width, max(step, round(wanted / step) * step))


def output_channels(model: nn.Module) -> int:
    """Output channels of all convolutions, linear layers and attention projections together."""
    return sum(width for module in model.modules() for width in _widths(module))


def _widths(module: nn.Module) -> list[int]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return [module.out_channels]
    if isinstance(module, nn.Linear):
        return [module.out_features]
    if isinstance(module, nn.MultiheadAttention):  # its output projection is a linear layer of its own
        return [3 * module.embed_dim]
    return []
