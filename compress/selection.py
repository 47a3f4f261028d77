"""Which channels go: global ranking of blocks of channels until the cost meets its target."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.budget import CostModel
from compress.graph import ChannelGraph

_EPSILON = 1e-9
"""Relative slack when a cost is compared with its target, for sums of floats."""


@dataclass(frozen=True)
class Selection:
    """Channels to remove, and what the network costs afterwards.

    Attributes:
        removals: group -> channels, (k,) int64, ascending; groups that lose nothing are left out.
        cost: of the network afterwards, in the cost model's unit.
        target: the cost that was asked for.
        exhausted: nothing more could be removed (every group at its smallest width) though the target is not met.
    """

    removals: dict[str, Tensor]
    cost: float
    target: float
    exhausted: bool


@dataclass(frozen=True)
class _Block:
    """The channels that take a group from one allowed width to the next smaller one."""

    group: str
    score: float
    channels: tuple[int, ...]


def select(
    scores: Mapping[str, Tensor],
    graph: ChannelGraph,
    model: CostModel,
    target: float,
    *,
    round_to: int,
    min_channels: int,
) -> Selection:
    """Remove the least important blocks of channels, over all groups together, until the cost is at most `target`.

    A block holds the channels between two allowed widths of a group: multiples of its step (`Group.step`), not below
    `Group.narrowest`; a width that is no multiple to begin with may stay as it is. A block's score is the mean of its
    channels' scores. The last block may save more than was missing: then blocks that were taken before and are not
    needed come back, the most important first.

    Args:
        scores: group -> importance of each of its channels, (width,) float64.
        target: in the cost model's unit.
    """
    widths = graph.widths
    blocks = {
        name: _blocks(name, scores[name], group.step(round_to), group.narrowest(round_to, min_channels))
        for name, group in graph.groups.items()
    }
    heap = [(queue[0].score, name) for name, queue in blocks.items() if queue]
    heapq.heapify(heap)
    cost = model.cost(widths)
    taken: list[_Block] = []
    while heap and cost > target * (1 + _EPSILON):
        _, name = heapq.heappop(heap)
        block = blocks[name].pop(0)
        cost -= model.gain(name, widths, widths[name] - len(block.channels))
        widths[name] -= len(block.channels)
        taken.append(block)
        if blocks[name]:
            heapq.heappush(heap, (blocks[name][0].score, name))
    met = cost <= target * (1 + _EPSILON)
    if met:
        taken, cost = _give_back(taken, widths, cost, model, target)
    removals: dict[str, list[int]] = {}
    for block in taken:
        removals.setdefault(block.group, []).extend(block.channels)
    return Selection(
        {name: torch.tensor(sorted(channels), dtype=torch.int64) for name, channels in removals.items()},
        cost,
        target,
        exhausted=not met,
    )


def _blocks(name: str, scores: Tensor, step: int, smallest: int) -> list[_Block]:
    """Blocks of one group in the order in which they may go, the least important channels first."""
    order, values = torch.argsort(scores, stable=True).tolist(), scores.tolist()
    blocks: list[_Block] = []
    start = 0
    while len(order) - start > smallest:
        width = len(order) - start
        end = start + (width % step or step)
        channels = order[start:end]
        score = sum(values[channel] for channel in channels) / len(channels)
        # A block can go only after those before it, whose mean is smaller or, for a short first block, may not be.
        blocks.append(_Block(name, max(score, blocks[-1].score if blocks else score), tuple(channels)))
        start = end
    return blocks


def _give_back(
    taken: list[_Block], widths: dict[str, int], cost: float, model: CostModel, target: float
) -> tuple[list[_Block], float]:
    """Undo what the target does not need: of each group the block taken last, the most important first."""
    kept = list(taken)
    for block in sorted(taken, key=lambda block: -block.score):
        last = next(other for other in reversed(kept) if other.group == block.group)
        if last is not block:
            continue
        wider = widths[block.group] + len(block.channels)
        back = -model.gain(block.group, widths, wider)
        if cost + back <= target * (1 + _EPSILON):
            kept.remove(block)
            widths[block.group] = wider
            cost += back
    return kept, cost
