"""The oracle as a criterion, against channels that are removed for real."""

import copy

import pytest
import torch
from gates_by_hand import NETS, Sigmoid, minibatch, prepared
from random_nets import Spec
from random_nets import build as random_net
from random_nets import inputs as random_images
from torch import Tensor, nn
from torch.nn import functional as F

from compress.graph import ChannelGraph, trace
from compress.importance import Minibatch, build

SIGMOIDS = Spec(8, (("squeeze-excite", 4), ("sigmoid", 8), ("residual", 4), ("unit", 4)), "mean", seed=2)


def changes_by_removal(model: nn.Module, graph: ChannelGraph, one: Minibatch) -> dict[str, Tensor]:
    """Every channel alone removed for real from a copy."""
    found = {}
    with torch.no_grad():
        whole = one.loss(model(*one.inputs))
        for name, width in graph.widths.items():
            found[name] = torch.zeros(width, dtype=torch.double)
            for channel in range(width):
                pruned = copy.deepcopy(model)
                graph.copy().remove_from(pruned, {name: torch.tensor([channel])})
                found[name][channel] = one.loss(pruned(*one.inputs)) - whole
    return found


def sigmoids() -> tuple[nn.Module, ChannelGraph, list[Minibatch]]:
    model = random_net(SIGMOIDS)
    graph = trace(model, random_images())
    assert any(group.residue is not None for group in graph.groups.values())
    labels = torch.arange(4) % 5
    batches = [Minibatch((random_images(4, seed),), lambda output: F.cross_entropy(output, labels)) for seed in (1, 2)]
    return model, graph, batches


@pytest.mark.parametrize("net", [*NETS, Sigmoid, SIGMOIDS], ids=lambda net: getattr(net, "__name__", "Sigmoids"))
def test_oracle_is_the_change_of_loss_when_the_channel_is_removed_for_real(net: object) -> None:
    if isinstance(net, Spec):
        model, graph, batches = sigmoids()
    else:
        model, graph = prepared(net)
        batches = [minibatch(1), minibatch(2)]
    changes = [changes_by_removal(model, graph, one) for one in batches]
    reductions = {"squared": torch.square, "absolute": torch.abs, "signed": lambda values: values}
    for reduction, function in reductions.items():
        if reduction != "squared" and net is not Sigmoid:
            continue
        importance = build(f"oracle:reduction={reduction}", model, graph)
        for one in batches:
            importance.observe(one)
        expected = {name: sum(function(change[name]) for change in changes) / 2 for name in graph.groups}
        scores = importance.scores()
        for name in graph.groups:
            torch.testing.assert_close(scores[name], expected[name], rtol=1e-6, atol=1e-14)
        assert importance.signed == (reduction == "signed")
