"""Random small networks for tests, built from a specification: a list of (kind of block, size)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from odd_blocks import ODD_BLOCKS
from torch import Tensor, nn
from torch.nn import functional

IMAGE = 8
"""Height and width of the input; the input has 3 channels."""


@dataclass(frozen=True)
class Spec:
    """What a network is built from.

    Attributes:
        stem: channels of the first layer, a multiple of 4.
        blocks: (kind, channels); kinds are the keys of `BLOCKS` and `ODD_BLOCKS`, channels a multiple of 4.
        head: one of `HEADS`.
        seed: of the weights.
    """

    stem: int
    blocks: tuple[tuple[str, int], ...]
    head: str
    seed: int


def conv_norm(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


def shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, -1, height, width)


class Residual(nn.Module):
    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.first, self.second = conv_norm(channels, middle), conv_norm(middle, channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.second(functional.relu(self.first(x))))


class Projection(nn.Module):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.body, self.shortcut = conv_norm(channels, outputs), nn.Conv2d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).relu() + self.shortcut(x)


class PreActivation(nn.Module):
    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, middle, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(middle), nn.Conv2d(middle, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


class Dense(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.norm(x).relu())], 1)


class Branches(nn.Module):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.left, self.right = (
            conv_norm(channels, outputs // 4, 1),
            nn.Conv2d(channels, outputs - outputs // 4, 3, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.left(x).relu(), functional.gelu(self.right(x))), dim=1)


class SplitShuffle(nn.Module):
    """As in ShuffleNet v2: half passes, half is worked on, the two are shuffled."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        half = channels // 2
        self.reduce, self.restore = conv_norm(half, middle, 1), conv_norm(middle, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return shuffled(torch.cat((left, self.restore(self.reduce(right).relu())), dim=1), 2)


class Sliced(nn.Module):
    """Two slices of equal width, worked on apart."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(channels // 2, outputs, 1), conv_norm(channels // 2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return self.left(x[:, :half]) + self.right(x[:, half:]).relu()


class Grouped(nn.Module):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.reduce, self.grouped = conv_norm(channels, outputs, 1), conv_norm(outputs, outputs, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.reduce(x).relu()).relu()


class GroupedShuffle(nn.Module):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.reduce, self.expand = conv_norm(channels, outputs, 1, groups=2), conv_norm(outputs, outputs, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(shuffled(self.reduce(x).relu(), 2))


class Depthwise(nn.Module):
    """As in MobileNet v2."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.expand, self.spatial = conv_norm(channels, middle, 1), conv_norm(middle, middle, groups=middle)
        self.project = conv_norm(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(functional.relu6(self.spatial(functional.relu6(self.expand(x)))))


class DepthMultiplier(nn.Module):
    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels)
        self.project = conv_norm(2 * channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.spatial(x).relu())


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, middle: int, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.squeeze, self.excite, self.gate = nn.Conv2d(channels, middle, 1), nn.Conv2d(middle, channels, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()))


class LayerScale(nn.Module):
    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(channels, middle), nn.PReLU(middle), nn.Conv2d(middle, channels, 1))
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.body(x)


class Unit(nn.Module):
    """A gated linear unit."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.body = conv_norm(channels, 2 * outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.body(x).split(self.body[1].weight.shape[0] // 2, dim=1)
        return value * gate.sigmoid()


def chain(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(conv_norm(channels, outputs), nn.ReLU(inplace=True))


def plain(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, outputs, 3, padding=1), nn.LeakyReLU(), nn.Dropout())


def sigmoid(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(conv_norm(channels, outputs, 1), nn.Sigmoid())


def transposed(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def pooled(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(chain(channels, outputs), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1))


BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    "chain": chain,
    "plain": plain,
    "sigmoid": sigmoid,
    "transposed": transposed,
    "pooled": pooled,
    "residual": Residual,
    "projection": Projection,
    "pre-activation": PreActivation,
    "dense": Dense,
    "branches": Branches,
    "split-shuffle": SplitShuffle,
    "sliced": Sliced,
    "grouped": Grouped,
    "grouped-shuffle": GroupedShuffle,
    "depthwise": Depthwise,
    "depth-multiplier": DepthMultiplier,
    "squeeze-excite": lambda channels, middle: SqueezeExcite(channels, middle, torch.sigmoid),
    "squeeze-excite-hard": lambda channels, middle: SqueezeExcite(channels, middle, functional.hardsigmoid),
    "layer-scale": LayerScale,
    "unit": Unit,
}
HEADS = ("mean", "pool", "flatten", "two-layers", "convolution")


def _head(kind: str, channels: int) -> nn.Module:
    half, pool = IMAGE // 2, nn.AvgPool2d(2)
    if kind == "mean":
        return nn.Sequential(GlobalMean(), nn.Linear(channels, 5))
    if kind == "pool":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))
    if kind == "flatten":
        return nn.Sequential(pool, nn.Flatten(), nn.Linear(channels * half * half, 5))
    if kind == "two-layers":
        first = nn.Linear(channels * half * half, 8)
        return nn.Sequential(pool, nn.Flatten(), first, nn.ReLU(), nn.Dropout(), nn.Linear(8, 5))
    return nn.Sequential(nn.Conv2d(channels, 5, 1), GlobalMean())


class GlobalMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean([2, 3])


def build(spec: Spec) -> nn.Module:
    """The network in evaluation mode, float64, weights and running statistics random."""
    torch.manual_seed(spec.seed)
    parts: list[nn.Module] = [chain(3, spec.stem)]
    x = torch.zeros(1, 3, IMAGE, IMAGE)
    width = spec.stem
    for kind, channels in spec.blocks:
        parts.append((BLOCKS | ODD_BLOCKS)[kind](width, channels))
        width = nn.Sequential(*parts).eval()(x).shape[1]
    parts.append(_head(spec.head, width))
    return randomised(nn.Sequential(*parts).double().eval())


def randomised(model: nn.Module) -> nn.Module:
    """The same model with normalisation layers and bare parameters that change what passes, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.1)
        elif isinstance(module, LayerScale):
            nn.init.uniform_(module.scale, 0.5, 1.5)
    return model


def inputs(batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, IMAGE, IMAGE, dtype=torch.float64, generator=generator)


def specs(kinds: tuple[str, ...] = tuple(BLOCKS), max_blocks: int = 5) -> st.SearchStrategy[Spec]:
    """Networks of up to `max_blocks` blocks behind a first layer."""
    sizes = st.sampled_from([4, 8, 12])
    return st.builds(
        Spec,
        stem=st.sampled_from([4, 8, 12]),
        blocks=st.lists(st.tuples(st.sampled_from(kinds), sizes), min_size=1, max_size=max_blocks).map(tuple),
        head=st.sampled_from(HEADS),
        seed=st.integers(0, 2**16),
    )
