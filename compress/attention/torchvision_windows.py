"""torchvision's attention in windows: swin v1 and v2, maxvit."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from compress.attention.heads import Row, attend, become, join_heads, left_over, split_heads
from compress.removal import Cuts


def _cut(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, height, width, C) -> (B, rows * columns windows, their area, C)."""
    return x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


class PrunedShiftedWindowAttention(ShiftedWindowAttention):
    """Window attention with the sizes of its tensors.

    Attributes:
        scale: of the scores, 1 / sqrt(D) of the dense module; 1 where they are cosines.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, height, width, C) -> the same shape."""
        height, width = x.shape[1:3]
        (rows, columns), shift = self.window_size, list(self.shift_size)
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        padded = x.shape[1:3]
        shift = [0 if size <= window else by for size, window, by in zip(padded, (rows, columns), shift, strict=True)]
        bias = self.get_relative_position_bias()  # (1, H, N, N)
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
            bias = bias + self._apart(padded, shift, x)[:, None]
        grid = (padded[0] // rows, padded[1] // columns)
        windows = _cut(x, *grid)  # (B, windows, N, C)
        q, k, v = self._heads(windows)
        rate = self.attention_dropout if self.training else 0.0
        x = F.dropout(((q * self.scale) @ k.transpose(-2, -1) + bias).softmax(-1), rate) @ v
        x = F.dropout(self.proj(join_heads(x)), self.dropout, self.training)
        x = x.unflatten(2, (rows, columns)).unflatten(1, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            x = x.roll((shift[0], shift[1]), (1, 2))
        return x[:, :height, :width].contiguous()

    def _apart(self, padded: torch.Size, shift: list[int], x: Tensor) -> Tensor:
        """-100 for two positions of a window that the shift brought together from opposite edges: (windows, N, N)."""
        labels = torch.zeros(tuple(padded), device=x.device, dtype=x.dtype)
        for axis, (size, window, by) in enumerate(zip(padded, self.window_size, shift, strict=True)):
            at = torch.arange(size, device=x.device)
            region = (at >= size - window).to(x.dtype) + (at >= size - by).to(x.dtype)
            labels = labels + (3 * region[:, None] if axis == 0 else region)
        rows, columns = self.window_size
        windows = _cut(labels[None, :, :, None], padded[0] // rows, padded[1] // columns)[0, :, :, 0]
        return (windows[:, None, :] != windows[:, :, None]).to(x.dtype) * -100.0

    def _heads(self, windows: Tensor) -> tuple[Tensor, ...]:
        return split_heads(self.qkv(windows), self.num_heads, 3)


class PrunedShiftedWindowAttentionV2(PrunedShiftedWindowAttention, ShiftedWindowAttentionV2):
    """Cosine window attention with the sizes of its tensors."""

    def _heads(self, windows: Tensor) -> tuple[Tensor, ...]:
        bias = self.qkv.bias
        if bias is not None:
            q_bias, k_bias, v_bias = bias.chunk(3)
            bias = torch.cat((q_bias, torch.zeros_like(k_bias), v_bias))  # keys have none
        q, k, v = split_heads(F.linear(windows, self.qkv.weight, bias), self.num_heads, 3)
        sharpness = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return F.normalize(q, dim=-1) * sharpness, F.normalize(k, dim=-1), v


class PrunedRelativePositionalMultiHeadAttention(RelativePositionalMultiHeadAttention):
    """maxvit's attention with the sizes of its tensors."""

    @property
    def scale(self) -> float:
        """Of the scores, 1 / sqrt(C) of the dense module."""
        return self.scale_factor

    def forward(self, x: Tensor) -> Tensor:
        """(B, windows, N, C) -> the same shape."""
        q, k, v = split_heads(self.to_qkv(x), self.n_heads, 3)
        bias = self.get_relative_positional_bias()  # (1, H, N, N)
        return self.merge(join_heads(attend(self, q, k, v, bias)))


def _swin(module: ShiftedWindowAttention, cuts: Cuts) -> None:
    cosine = isinstance(module, ShiftedWindowAttentionV2)
    heads, _ = left_over(module, cuts, "qkv.weight", module.num_heads, 3)
    if not hasattr(module, "scale"):
        rows = cuts.sizes.get(("qkv.weight", 0), len(module.qkv.weight))
        module.scale = 1.0 if cosine else (rows // (3 * module.num_heads)) ** -0.5
    module.num_heads = len(heads)
    become(module, PrunedShiftedWindowAttentionV2 if cosine else PrunedShiftedWindowAttention)


ROWS = {
    ShiftedWindowAttention: _swin,
    RelativePositionalMultiHeadAttention: Row(
        {"to_qkv.weight": 3}, PrunedRelativePositionalMultiHeadAttention, heads="n_heads", width="head_dim"
    ),
}
