"""The papers' small networks: parameters counted by hand, shapes, initial weights."""

import pytest
import torch
from torch import nn

from compress import models
from compress.errors import InputError


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_resnet20_has_the_parameters_counted_by_hand() -> None:
    stem = 3 * 16 * 9 + 2 * 16
    stage1 = 6 * 16 * 16 * 9 + 6 * 2 * 16
    stage2 = 16 * 32 * 9 + 5 * 32 * 32 * 9 + 6 * 2 * 32 + (16 * 32 + 2 * 32)
    stage3 = 32 * 64 * 9 + 5 * 64 * 64 * 9 + 6 * 2 * 64 + (32 * 64 + 2 * 64)
    classifier = 64 * 10 + 10
    assert stem + stage1 + stage2 + stage3 + classifier == 272_474
    assert parameters(models.build("espalier:resnet20")) == 272_474


@pytest.mark.parametrize(("name", "blocks"), [("resnet32", 5), ("resnet56", 9)])
def test_deeper_resnets_add_whole_blocks(name: str, blocks: int) -> None:
    block = sum(2 * width * width * 9 + 4 * width for width in (16, 32, 64))
    model = models.build(f"espalier:{name}")
    assert parameters(model) == 272_474 + (blocks - 3) * block
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(module.kernel_size == (3, 3) for module in convolutions) == 6 * blocks + 1  # plus fc: 6n + 2 layers


def test_lenet3_has_the_parameters_counted_by_hand() -> None:
    convolutions = (3 * 16 * 25 + 16) + (16 * 32 * 25 + 32)
    linear = (32 * 5 * 5 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10)
    assert convolutions + linear == 121_182
    assert parameters(models.build("espalier:lenet3")) == 121_182


@pytest.mark.parametrize(
    ("factory", "shape"),
    [("resnet20", (1, 32, 32)), ("resnet20", (3, 9, 13)), ("lenet3", (1, 28, 28)), ("lenet3", (3, 16, 16))],
)
def test_own_networks_take_other_channels_sizes_and_classes(factory: str, shape: tuple[int, int, int]) -> None:
    size = {"image_size": shape[1]} if factory == "lenet3" else {}
    model = models.build(f"espalier:{factory}", num_classes=7, in_channels=shape[0], **size)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)


def test_lenet3_refuses_images_that_vanish() -> None:
    with pytest.raises(InputError, match="at least 16"):
        models.lenet3(image_size=15)


def test_convolutions_start_with_he_variance() -> None:
    torch.manual_seed(0)
    weight = models.resnet20().get_submodule("stage3.2.conv2").weight
    assert weight.var().item() == pytest.approx(2 / (64 * 9), rel=0.05)
