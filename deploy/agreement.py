"""How the scores of a criterion agree with the oracle: over all channel groups, over residual streams, by group."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.harness.correlation import Agreement, agreement
from compress.graph import ChannelGraph
from compress.graph.groups import Group

ALL, RESIDUAL = "all", "residual"
"""Names of the two sets of groups: every one, and those that several producers add up to."""


def residual(graph: ChannelGraph) -> list[str]:
    """Names of the groups whose channels several layers add up to: residual streams."""
    return [name for name, group in graph.groups.items() if is_residual(group)]


def is_residual(group: Group) -> bool:
    """Whether gates stand on several layers of the group, so that a rule must combine them."""
    return len({tensor.rpartition(".")[0] for tensor, _ in group.gate_slots}) > 1


def compare(
    values: Mapping[str, Tensor], truth: Mapping[str, Tensor], streams: Sequence[str], *, seed: int = 0
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Correlate over all groups, over residual ones where there are any, and over every group by itself.

    Args:
        values, truth: group -> scores of its channels.
        streams: names of the residual groups.

    Returns:
        "all", "residual" or a group -> coefficient -> value, low and high.
    """
    sets = {ALL: list(truth), RESIDUAL: list(streams), **{name: [name] for name in truth}}
    found = {}
    for title, names in sets.items():
        if names:
            mine, other = (torch.cat([part[name] for name in names]).numpy() for part in (values, truth))
            found[title] = _coefficients(agreement(mine, other, seed=seed))
    return found


def _coefficients(found: Agreement) -> dict[str, dict[str, float | None]]:
    return {name: getattr(found, name).model_dump() for name in ("pearson", "spearman", "kendall")}
