"""The small networks of the papers that torchvision does not have: CIFAR ResNets and LeNet3."""

from torch import Tensor, nn
from torch.nn import functional

from compress.errors import InputError


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, arXiv 1512.03385, figure 2).

    Where the shape changes, the shortcut is a 1 x 1 convolution with batch normalisation (the paper's option
    B). The paper's CIFAR networks use option A, which pads the identity with zero channels; the padded
    channels have no weights and tie the position of every channel of one stage to that of the next, so that
    no residual stream could be pruned by itself. Option B costs 2,752 parameters more (1 % of ResNet-20).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers for small images (He et al. 2016, section 4.2).

    A 3 x 3 convolution with 16 filters, three stages of n blocks with 16, 32 and 64 filters at full, half and
    quarter resolution, global average pooling, one linear layer. Images of any size from 4 x 4 up, as the
    pooling is global.
    """

    def __init__(self, blocks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = self._stage(16, 16, blocks, stride=1)
        self.stage2 = self._stage(16, 32, blocks, stride=2)
        self.stage3 = self._stage(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al. 2015, arXiv 1502.01852, section 2.2
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))  # (N, 16, H, W)
        x = self.stage3(self.stage2(self.stage1(x)))  # (N, 64, H/4, W/4)
        return self.fc(self.pool(x).flatten(1))


class LeNet3(nn.Module):
    """Two 5 x 5 convolutions (16 and 32 filters), each with ReLU and 2 x 2 max pooling, then 120, 84,
    classes.

    The small network of Molchanov et al., CVPR 2019 (arXiv 1906.10771), section 4.1.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2  # a 5 x 5 convolution without padding costs 4 pixels
        if side < 1:
            raise InputError(f"lenet3 cannot take images of {image_size} pixels: image_size must be at least 16.")
        self.conv1 = nn.Conv2d(in_channels, 16, 5)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.fc3(functional.relu(self.fc2(x)))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """CIFAR ResNet with 3 blocks a stage: 272,474 parameters for 10 classes."""
    return CifarResNet(3, num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """CIFAR ResNet with 5 blocks a stage: 466,906 parameters for 10 classes."""
    return CifarResNet(5, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """CIFAR ResNet with 9 blocks a stage: 855,770 parameters for 10 classes."""
    return CifarResNet(9, num_classes, in_channels)


def lenet3(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    """LeNet3: 121,182 parameters for 10 classes of colour images at 32 x 32."""
    return LeNet3(num_classes, in_channels, image_size)
