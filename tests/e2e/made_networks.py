"""Networks of a few kilobytes, as a user's own, for what the digits' do not show, and images with boxes."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class SegmentationNet(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 16, 2), block(16, 32, 1))
        self.head = nn.Sequential(block(32, 32, 1), nn.Conv2d(32, num_classes, 1))
        self.aux = nn.Conv2d(32, num_classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        size = images.shape[-2:]
        scores = {"aux": self.aux(features), "out": self.head(features)}
        return {name: interpolate(found, size=size, mode="bilinear") for name, found in scores.items()}


def net(num_classes: int = 2) -> nn.Module:
    return SegmentationNet(num_classes)


def transformer(num_classes: int = 2) -> nn.Module:
    """torchvision's vision transformer with two layers of four heads, for images of 32 pixels."""
    from torchvision.models import VisionTransformer

    network = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=num_classes
    )
    nn.init.normal_(network.heads.head.weight, std=0.1)  # torchvision begins with zeros, which give no gradients
    return network


def detector(num_classes: int = 3) -> nn.Module:
    """torchvision's FCOS on a backbone of three convolutions."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    backbone = nn.Sequential(block(3, 16, 2), block(16, 32, 2), block(32, 32, 2))
    backbone.out_channels = 32
    anchors = AnchorGenerator(sizes=((16,),), aspect_ratios=((1.0,),))
    sizes = {"min_size": 64, "max_size": 64, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    return FCOS(backbone, num_classes, anchor_generator=anchors, **sizes)


def boxes(count: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images (3, 64, 64) of one bright square each, with its box and label."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        left, top = torch.randint(4, 30, (2,), generator=generator).tolist()
        image = 0.2 * torch.rand(3, 64, 64, generator=generator)
        image[:, top : top + 24, left : left + 24] += 0.7
        box = torch.tensor([[left, top, left + 24, top + 24]], dtype=torch.float32)
        found.append((image, {"boxes": box, "labels": torch.ones(1, dtype=torch.int64)}))
    return found
