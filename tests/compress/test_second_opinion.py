"""Our groups against Torch-Pruning's, and its groups put to the trial."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from random_nets import BLOCKS, Spec, build, inputs, specs
from torch import Tensor, nn

from compress.errors import InputError
from compress.graph import ChannelGraph, Frozen, second_opinion, trace

MODELS = {
    "resnet18": 64,
    "resnet50": 64,
    "densenet121": 64,
    "mobilenet_v2": 64,
    "efficientnet_b0": 64,
    "vgg11_bn": 64,
    "regnet_x_400mf": 64,
    "inception_v3": 299,
}
SLOW = ("densenet121", "inception_v3")


def as_sets(graph: ChannelGraph) -> set[frozenset[tuple[str, int, frozenset[int]]]]:
    """Each group as the positions that it holds along each (tensor, dim)."""
    return {
        frozenset((part.tensor, part.dim, frozenset(part.positions.tolist())) for part in group.slices)
        for group in graph.groups.values()
    }


def channels(graph: ChannelGraph, name: str) -> set[frozenset[tuple[str, int, int]]]:
    """Each channel of a group as the positions that go with it."""
    members: dict[int, set[tuple[str, int, int]]] = {}
    for part in graph.groups[name].slices:
        for position, channel in zip(part.positions.tolist(), part.channels.tolist(), strict=True):
            members.setdefault(channel, set()).add((part.tensor, part.dim, position))
    return {frozenset(member) for member in members.values()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS]
)
def test_groups_equal_torch_prunings(name: str) -> None:
    """Group by group and channel by channel, with producers, consumers, gates and multiply-adds.

    Torch-Pruning's own form differs in two ways, which `second_opinion` evens out. For a grouped convolution
    (regnet_x_400mf) it gives every input channel its own position along dimension 1 of the weight, which is only as
    long as one group's, and leaves it to its pruner to take the same positions from every group; here positions are
    taken modulo the group's width, which ties the channels. And it looks at the network in evaluation mode, where
    the auxiliary head of inception_v3 does not exist; here it is shown the network in training mode.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {"init_weights": False} if name == "inception_v3" else {}
    model = torchvision.models.get_model(name, **options).eval()
    image = torch.randn(1, 3, MODELS[name], MODELS[name])
    ours, theirs = trace(model, image), second_opinion.dependency_groups(model, (image,))
    assert as_sets(ours) == as_sets(theirs)
    assert list(ours.groups) == list(theirs.groups)
    for group, other in zip(ours.groups.values(), theirs.groups.values(), strict=True):
        assert channels(ours, group.name) == channels(theirs, group.name)
        assert {(p.layer, frozenset(p.norms)) for p in group.producers} == {
            (p.layer, frozenset(p.norms)) for p in other.producers
        }
        assert set(group.consumers) == set(other.consumers)
        assert set(group.gate_slots) == set(other.gate_slots)
        assert group.residue is None
    assert {key: uses for key, uses in ours.uses.items() if uses} == {
        k: uses for k, uses in theirs.uses.items() if uses
    }
    assert ours.other_macs == theirs.other_macs == 0


# What Torch-Pruning follows wrongly (strides, shuffles, halves that meet again) the trial must find; the rest is kept.
@settings(deadline=None, max_examples=15, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spec=specs(tuple(BLOCKS), max_blocks=2))
def test_what_is_left_after_the_trial_can_be_removed(spec: Spec) -> None:
    model = build(spec)
    graph = second_opinion.trace(model, inputs(1))
    for name, width in list(graph.widths.items()):
        graph.remove_from(model, {name: torch.arange(0, width - 1, 2)})
    assert model(inputs()).shape == (2, 5)


@pytest.fixture
def branching() -> nn.Module:
    """A residual block whose forward pass depends on the data, which torch.export refuses."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.a, self.b, self.head = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x)).relu()
            if x.sum() >= 0:
                x = x + self.b(self.a(x).relu())
            return self.head(x.mean((2, 3)))

    return Branching()


def test_model_that_export_refuses(branching: nn.Module) -> None:
    image = torch.rand(1, 3, 4, 4)
    with pytest.raises(InputError, match="torch-pruning"):
        trace(branching, image)
    branching.train()
    before = {name: tensor.clone() for name, tensor in branching.state_dict().items()}
    graph = second_opinion.trace(branching, image)
    assert graph.widths == {"stem": 4, "a": 2}
    assert [producer.layer for producer in graph.groups["stem"].producers] == ["stem", "b"]
    assert graph.groups["stem"].producers[0].norms == ("norm",)
    assert graph.groups["stem"].consumers == ("a", "head")
    assert set(graph.groups["stem"].gate_slots) == {
        ("norm.weight", 0),
        ("norm.bias", 0),
        ("b.weight", 0),
        ("b.bias", 0),
    }
    assert graph.frozen == [Frozen(("head",), "output of the model")]
    assert graph.uses == {"stem.weight": 16, "a.weight": 16, "b.weight": 16, "head.weight": 1}
    assert branching.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in branching.state_dict().items())
    graph.remove_from(branching, {"stem": torch.tensor([1, 2]), "a": torch.tensor([0])})
    assert branching(image.expand(2, -1, -1, -1)).shape == (2, 5)


def test_positions_outside_a_tensor_freeze_its_group() -> None:
    """Of EfficientViT's linear attention Torch-Pruning loses count of the channels."""
    attention = pytest.importorskip("timm.models.efficientvit_mit").LiteMLA(16, 16, heads=2, dim=8)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), attention, nn.Conv2d(16, 2, 1)).eval()
    image = torch.rand(1, 3, 4, 4)
    graph = second_opinion.dependency_groups(model, (image,))
    assert as_sets(graph) == as_sets(trace(model, image))
    assert Frozen(("1.qkv.conv",), "Torch-Pruning's positions lie outside the tensor") in graph.frozen


def test_ignore(branching: nn.Module) -> None:
    graph = second_opinion.trace(branching, torch.rand(1, 3, 4, 4), ignore=["b"])
    assert list(graph.groups) == ["a"]
    assert Frozen(("stem", "b"), "named in ignore") in graph.frozen
    with pytest.raises(InputError, match="did you mean 'stem'"):
        second_opinion.trace(branching, torch.rand(1, 3, 4, 4), ignore=["stemm"])


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda: nn.GroupNorm(2, 4), "GroupNorm over channels"),
        (lambda: nn.LayerNorm([4, 4, 4]), "LayerNorm over channels"),
    ],
)
def test_normalisation_over_channels_freezes(middle: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), middle(), nn.Conv2d(4, 2, 1))
    graph = second_opinion.trace(model, torch.rand(1, 3, 4, 4))
    assert not graph.groups
    assert any(frozen.layers == ("0",) and frozen.reason.startswith(reason) for frozen in graph.frozen)


def test_operator_that_torch_pruning_takes_for_elementwise_fails_the_trial() -> None:
    class Cumulative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.z = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.z(self.b(self.a(x)).cumsum(1))

    graph = second_opinion.trace(Cumulative(), torch.rand(1, 3, 4, 4))
    assert list(graph.groups) == ["a"]
    assert Frozen(("b",), "without these channels the network computes something else") in graph.frozen


def test_input_that_does_not_fit(branching: nn.Module) -> None:
    with pytest.raises(InputError, match="Torch-Pruning cannot trace the model"):
        second_opinion.trace(branching, torch.rand(1, 1, 4, 4))
