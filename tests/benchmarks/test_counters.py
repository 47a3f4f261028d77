"""MACs and parameters of networks small enough to count by hand."""

import pytest
import torch
from torch import nn

from benchmarks.harness.counters import macs, parameters
from benchmarks.harness.errors import HarnessInputError


def small_net() -> nn.Module:
    # (N, 3, 8, 8) -> conv (4, 6, 6) -> depthwise (4, 4, 4) -> linear 10
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 10)
    )


def test_macs_by_hand_and_per_image():
    expected = 4 * 6 * 6 * 3 * 9 + 4 * 4 * 4 * 9 + 64 * 10
    assert macs(small_net(), torch.zeros(1, 3, 8, 8)) == expected
    assert macs(small_net(), (torch.zeros(5, 3, 8, 8),)) == expected


def test_parameters_by_hand_with_a_shared_layer_counted_once():
    net = small_net()
    expected = (4 * 27 + 4) + 8 + (4 * 9 + 4) + (640 + 10)
    assert parameters(net) == expected
    net.append(net[4])
    assert parameters(net) == expected


def test_counting_leaves_no_trace():
    net = small_net().train()
    net[1].eval()  # a frozen normalisation stays frozen
    running_mean = net[1].running_mean.clone()
    macs(net, torch.ones(2, 3, 8, 8))
    assert [module.training for module in net] == [True, False, True, True, True]
    assert torch.equal(net[1].running_mean, running_mean)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_modes_are_restored_when_the_forward_pass_fails():
    net = small_net().train()
    with pytest.raises(RuntimeError):
        macs(net, torch.zeros(1, 5, 8, 8))
    assert net.training


def test_no_image_is_the_users_mistake():
    with pytest.raises(HarnessInputError, match="per image"):
        macs(small_net(), torch.zeros(0, 3, 8, 8))
