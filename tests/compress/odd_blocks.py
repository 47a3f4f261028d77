"""Blocks of random networks beyond plain convolutions: attention in many spellings, norms in groups, shared layers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD = 2
"""Channels of one attention head."""


def tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def image(x: Tensor, like: Tensor) -> Tensor:
    """(N, H * W, C) -> (N, C, H, W)."""
    return x.transpose(1, 2).reshape(len(x), -1, *like.shape[2:])


class Attention(nn.Module):
    """Packed projection, as timm's; the number of heads follows the weight."""

    def __init__(self, channels: int, middle: int, fused: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(channels, 3 * middle), nn.Linear(middle, channels)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        y = tokens(x)
        heads = self.qkv.weight.shape[0] // (3 * HEAD)
        q, k, v = self.qkv(y).reshape(*y.shape[:2], 3, heads, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        else:
            y = (q * 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + image(self.proj(y.transpose(1, 2).flatten(2)), x)


class Biased(nn.Module):
    """Projections apart, einsum, a table of position biases and a temperature for every head."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.q, self.kv, self.proj = (
            nn.Linear(channels, middle),
            nn.Linear(channels, 2 * middle),
            nn.Conv2d(middle, channels, 1),
        )
        self.table = nn.Parameter(torch.randn(7, middle // HEAD))
        self.temperature = nn.Parameter(torch.rand(middle // HEAD, 1, 1))
        self.register_buffer("index", torch.arange(64 * 64).view(64, 64) % 7)

    def forward(self, x: Tensor) -> Tensor:
        y = tokens(x)
        q = self.q(y).unflatten(-1, (-1, HEAD))  # (N, L, H, D)
        k, v = (part.unflatten(-1, (-1, HEAD)) for part in self.kv(y).chunk(2, dim=-1))
        bias = self.table[self.index.flatten()].view(64, 64, -1).permute(2, 0, 1)
        scores = torch.einsum("blhd,bshd->bhls", functional.normalize(q, dim=-1), functional.normalize(k, dim=-1))
        weights = (scores * self.temperature.exp() + bias).softmax(-1)
        return x + self.proj(image(torch.einsum("bhls,bshd->blhd", weights, v).flatten(2), x))


class CrossCovariance(nn.Module):
    """Attention among the channels of each head, as in XCiT; heads are talked through by a 1 x 1 layer."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(channels, 3 * middle, 1), nn.Conv2d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv.weight.shape[0] // (3 * HEAD)
        q, k, v = self.qkv(x).reshape(len(x), 3, heads, HEAD, -1).unbind(1)  # (N, H, D, L)
        y = (functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(y.flatten(1, 2).unflatten(2, x.shape[2:]))


class Talking(nn.Module):
    """Talking heads: a linear layer from heads to heads before the softmax (Shazeer et al. 2020, arXiv 2003.02436)."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(channels, 3 * middle), nn.Linear(middle, channels)
        self.talk = nn.Linear(middle // HEAD, middle // HEAD)

    def forward(self, x: Tensor) -> Tensor:
        y = tokens(x)
        q, k, v = self.qkv(y).reshape(*y.shape[:2], 3, -1, HEAD).permute(2, 0, 3, 1, 4)
        scores = self.talk((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + image(self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), x)


class Rotated(nn.Module):
    """Queries and keys rotated by halves, as position embeddings do."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(channels, middle) for _ in range(3))
        self.proj = nn.Linear(middle, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = tokens(x)
        q, k, v = (layer(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        angle = torch.linspace(0, 3, y.shape[1], dtype=x.dtype)[:, None]
        q, k = (part * angle.cos() + torch.cat((-part[..., 1:], part[..., :1]), -1) * angle.sin() for part in (q, k))
        return x + image(self.proj((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2)), x)


class OneHead(nn.Module):
    """A non-local block (Wang et al. 2018, arXiv 1711.07971): queries and keys of any width."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, middle, 1) for _ in range(3))
        self.out = nn.Conv2d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.theta(x).flatten(2).mT @ self.phi(x).flatten(2) / 3).softmax(-1)  # (N, L, L)
        return x + self.out((weights @ self.g(x).flatten(2).mT).mT.reshape(len(x), -1, *x.shape[2:]))


class MultiHead(nn.Module):
    """PyTorch's own attention."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(channels, channels // HEAD, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(channels, middle), nn.GELU(), nn.Linear(middle, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = tokens(x)
        y = y + self.inner(y, y, y, need_weights=False)[0]
        return image(y + self.mlp(y), x)


class GroupNormed(nn.Module):
    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, middle, 3, padding=1),
            nn.GroupNorm(middle // 2, middle),
            nn.SiLU(),
            nn.Conv2d(middle, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Repeated(nn.Module):
    """One layer used three times."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.inside, self.layer = nn.Conv2d(channels, middle, 1), nn.Conv2d(middle, middle, 3, padding=1)
        self.outside = nn.Conv2d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.inside(x).relu()).relu()
        y = y + self.layer(y)
        return x + self.outside(self.layer(y).relu())


class Reused(nn.Module):
    """One tensor read by a concatenation, a product and a sum."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, middle, 1), nn.Conv2d(2 * middle, middle, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(torch.cat((y, y.relu()), 1))
        return torch.cat((z * y, z + y), 1)


class Mixer(nn.Module):
    """A linear layer over positions, then one over channels."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.positions = nn.Linear(64, 64)
        self.mlp = nn.Sequential(nn.Linear(channels, middle), nn.GELU(), nn.Linear(middle, channels))
        self.offset = nn.Parameter(torch.randn(1, 64, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = tokens(x) + self.offset
        y = y + self.positions(y.mT).mT
        return image(y + self.mlp(y), x)


class Shuffled(nn.Module):
    """Pixels to channels and back."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4 * channels, middle, 1), nn.Conv2d(middle, 4 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.pixel_shuffle(self.up(self.down(functional.pixel_unshuffle(x, 2)).relu()), 2)


class Normed(nn.Module):
    """A weight-normalised layer that makes channels, and one behind a LayerNorm that keeps its input's."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.first, self.second = nn.Linear(channels, middle), nn.Linear(middle, channels)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(channels, middle, 1))
        self.last = nn.Conv2d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = image(self.second(self.first(self.norm(tokens(x))).relu()), x)
        return self.last(self.weighted(x).relu())


ODD_BLOCKS: dict[str, Callable[[int, int], nn.Module]] = {
    "attention": Attention,
    "attention-fused": lambda channels, middle: Attention(channels, middle, fused=True),
    "attention-biased": Biased,
    "attention-channels": CrossCovariance,
    "attention-talking": Talking,
    "attention-rotated": Rotated,
    "attention-one-head": OneHead,
    "attention-torch": MultiHead,
    "group-norm": GroupNormed,
    "repeated": Repeated,
    "reused": Reused,
    "mixer": Mixer,
    "pixel-shuffle": Shuffled,
    "normed": Normed,
}
