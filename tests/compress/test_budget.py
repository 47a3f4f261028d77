"""Budgets and cost models: numbers worked out by hand, and held against torch's own counter."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress import models
from compress.budget import Budget, cost_model
from compress.errors import InputError
from compress.graph import trace


def tiny() -> nn.Sequential:
    """3x3 convolution 2 -> 4 on 8x8 (padding 1), batch norm, 1x1 convolution 4 -> 6, pool, linear 6 -> 5."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


IMAGE = torch.ones(3, 2, 8, 8)  # three images: costs are those of one


def test_macs_by_hand() -> None:
    model = tiny()
    graph = trace(model, IMAGE)
    costs = cost_model("macs", model, graph)
    # 64 positions x (4·2·9) + 64 x (6·4) + 5·6
    assert costs.cost({"0": 4, "3": 6}) == 64 * 72 + 64 * 24 + 30
    assert costs.cost({"0": 2, "3": 5}) == 64 * 36 + 64 * 10 + 25
    assert costs.gain("0", {"0": 4, "3": 6}, 3) == 64 * 18 + 64 * 6
    assert costs.gain("3", {"0": 4, "3": 6}, 4) == 64 * 8 + 10


def test_parameters_by_hand() -> None:
    model = tiny()
    costs = cost_model("parameters", model, trace(model, IMAGE))
    assert costs.cost({"0": 4, "3": 6}) == sum(parameter.numel() for parameter in model.parameters())
    assert costs.cost({"0": 2, "3": 5}) == (36 + 2) + 2 * 2 + 10 + (25 + 5)


def test_channels_by_hand() -> None:
    model = tiny()
    costs = cost_model("channels", model, trace(model, IMAGE))
    assert costs.cost({"0": 4, "3": 6}) == 10
    assert costs.gain("0", {"0": 4, "3": 6}, 1) == 3


def test_flattened_features_count_every_position() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
    graph = trace(model, torch.ones(1, 1, 8, 8))
    costs = cost_model("parameters", model, graph)
    assert costs.gain("0", {"0": 4}, 3) == 9 + 1 + 36 * 3


@pytest.mark.parametrize("factory", ["espalier:resnet20", "torchvision:regnet_x_400mf", "torchvision:swin_t"])
def test_model_of_macs_is_what_torch_counts_after_a_removal(factory: str) -> None:
    torch.manual_seed(0)
    model = models.build(factory).eval()
    image = torch.zeros(1, 3, *([32, 32] if "resnet20" in factory else [64, 64]))
    graph = trace(model, image)
    macs, parameters = cost_model("macs", model, graph), cost_model("parameters", model, graph)

    def counted() -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image)
        return counter.get_total_flops() / 2

    assert macs.cost(graph.widths) == counted()
    removals = {
        name: torch.randperm(group.width)[: group.width // 3].sort().values for name, group in graph.groups.items()
    }
    graph.remove_from(model, removals)
    assert macs.cost(graph.widths) == counted()
    assert parameters.cost(graph.widths) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan")])
def test_budget_outside_its_range(value: float) -> None:
    with pytest.raises(InputError, match=r"budget\.macs is .*\(0, 1\]"):
        Budget(macs=value)


def test_budget_names_one_quantity() -> None:
    with pytest.raises(InputError, match="not 0"):
        Budget()
    with pytest.raises(InputError, match="not 2"):
        Budget(macs=0.5, parameters=0.5)
    assert (Budget(parameters=0.25).quantity, Budget(parameters=0.25).kept) == ("parameters", 0.25)
