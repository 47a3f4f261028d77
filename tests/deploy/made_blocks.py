"""A network of a few hundred weights with all that `espalier inspect --groups` has something to say about."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Four heads of two channels; their number is read from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Four tokens of an 8 x 8 image, attention, a hidden layer behind a sigmoid, and an operator without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.odd = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(3, 5, 1, bias=False)
        self.norm1, self.attn = nn.LayerNorm(8), Attention()
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).mT  # (N, 4, 8)
        x = x + self.attn(self.norm1(x))
        x = x + self.fc2(self.fc1(self.norm2(x)).sigmoid())
        extra = torch.linalg.matrix_exp(self.odd(images)).mean((1, 2, 3))
        return self.head(x.mean(1)) + extra[:, None]


def block() -> nn.Module:
    return Block()


class Detector(nn.Module):
    """Decides by the values of what its backbone finds."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images).flatten().nonzero()


def detector() -> nn.Module:
    return Detector()


def grouped() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1))


class OneHead(nn.Module):
    """Attention over the pixels without an axis for heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        q, k, v = self.qkv(images.flatten(2).mT).chunk(3, -1)
        return self.proj((q @ k.mT).softmax(-1) @ v)


def one_head() -> nn.Module:
    return OneHead()
