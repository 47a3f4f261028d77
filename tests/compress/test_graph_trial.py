"""What only the trial removal can show: forward passes that go on with the old sizes, places or numbers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.budget import cost_model
from compress.graph import ChannelGraph, trace

TOKENS = torch.zeros(1, 7, 6)


def reasons(graph: ChannelGraph) -> dict[str, str]:
    return {layer: frozen.reason for frozen in graph.frozen for layer in frozen.layers}


class Heads(nn.Module):
    """Attention that takes its number of heads, or their width, from an attribute."""

    def __init__(self, split: Callable[["Heads", Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.h, self.d, self.split = 4, width, split
        self.q, self.k, self.v = (nn.Linear(6, 4 * width) for _ in range(3))
        self.out = nn.Linear(4 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(self, layer(x)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out((q @ k.mT * 0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("width", [2, 8])
def test_a_number_of_heads_follows_though_fewer_channels_would_fit_as_many_thinner_heads(width: int) -> None:
    model = Heads(lambda net, x: x.unflatten(-1, (net.h, -1)), width)
    graph = trace(model, TOKENS)
    assert graph.widths == {"q": 4}
    assert [str(rule.attribute) for rule in graph.attributes] == ["h"]
    graph.remove_from(model, {"q": torch.tensor([1, 2])})
    assert model.h == 2


@pytest.mark.parametrize("width", [2, 3, 6])
def test_one_attribute_cannot_follow_two_groups(width: int) -> None:
    graph = trace(Heads(lambda net, x: x.unflatten(-1, (-1, net.d)), width), TOKENS, attention="widths")
    assert graph.widths == {}
    assert {"q", "k", "v"} <= reasons(graph).keys()


class Between(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, middle: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.a, self.middle, self.b = nn.Linear(6, width), middle, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self.a(x)))


def assigned(y: Tensor) -> Tensor:
    y[..., :3] = y[..., :3].relu()
    return y


@pytest.mark.parametrize(
    "middle",
    [
        lambda y: torch.cat([y[..., :3].relu(), y[..., 3:]], -1),
        lambda y: torch.cat([y[..., :4].relu(), y[..., 4:]], -1),
        assigned,
        lambda y: functional.group_norm(y.transpose(1, 2), 4).transpose(1, 2),
    ],
    ids=["cut", "halved", "assigned", "groups"],
)
def test_a_cut_at_a_fixed_place_keeps_the_channels(middle: Callable[[Tensor], Tensor]) -> None:
    graph = trace(Between(middle), TOKENS)
    assert graph.widths == {}
    assert reasons(graph)["a"] == "after a removal the forward pass cuts its tensors at other places"


@pytest.mark.parametrize(
    "middle",
    [
        lambda y: y / math.sqrt(y.shape[-1]),
        lambda y: y / y.shape[-1],
        lambda y: y / torch.tensor(y.shape[-1]).sqrt(),
        lambda y: y.relu() ** (y.shape[-1] // 4),
    ],
    ids=["float", "int", "tensor", "power"],
)
def test_a_number_computed_from_the_width_keeps_the_channels(middle: Callable[[Tensor], Tensor]) -> None:
    graph = trace(Between(middle), TOKENS)
    assert graph.widths == {}
    assert reasons(graph)["a"].startswith("a number changes with its width: ")


def test_a_scale_behind_the_product_keeps_queries_and_keys() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            return self.out((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v)

    model = Single()
    graph = trace(model, TOKENS)
    assert "a number changes with its width" in reasons(graph)["q"]
    # What stays still counts.
    assert cost_model("macs", model, graph).cost(graph.widths) == 7 * (3 * 6 * 8 + 8 * 2) + 2 * 7 * 7 * 8


def test_a_branch_on_the_width_keeps_the_channels() -> None:
    graph = trace(Between(lambda y: y.relu() if y.shape[-1] == 8 else y.sigmoid()), TOKENS)
    assert graph.widths == {}
    assert reasons(graph)["a"] == "the forward pass takes another course after a removal"


def test_a_change_in_place_is_seen_through_an_earlier_view() -> None:
    def changed(y: Tensor) -> Tensor:
        view = y.flatten(0, 1)
        y.add_(1)
        return view

    graph = trace(Between(changed), TOKENS)
    assert graph.groups["a"].residue == "b"


def test_multiply_adds_are_of_the_first_inputs_images() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.b(mask @ self.a(x))

    model = Masked()
    graph = trace(model, (torch.zeros(2, 7, 6), torch.ones(7, 7)))
    macs = cost_model("macs", model, graph)
    assert macs.cost(graph.widths) == 7 * (6 * 8 + 8 * 2) + 7 * 7 * 8
    assert macs.gain("a", graph.widths, 4) == 7 * (6 * 4 + 4 * 2) + 7 * 7 * 4
