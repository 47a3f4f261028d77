"""timm's attention between channels (xcit, edgenext, davit), and the linear kinds of coat and mobilevit v2."""

from typing import Any

import torch.nn.functional as F
from timm.models import coat, davit, edgenext, mobilevit, xcit
from torch import Tensor

from compress.attention.heads import Row, join_heads, split_heads
from compress.attention.timm_tokens import project
from compress.removal import Cuts

_QKV = {"qkv.weight": 3}


class PrunedXCA(xcit.XCA):
    """XCiT's cross-covariance attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return _cross_covariance(self, x)


class PrunedCrossCovarianceAttn(edgenext.CrossCovarianceAttn):
    """EdgeNeXt's cross-covariance attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return _cross_covariance(self, x)


def _cross_covariance(module: Any, x: Tensor) -> Tensor:
    q, k, v = split_heads(module.qkv(x), module.num_heads, 3)  # (B, H, N, D): tokens are the vectors' entries here
    scores = F.normalize(q, dim=-2).transpose(-2, -1) @ F.normalize(k, dim=-2) * module.temperature  # (B, H, D, D)
    y = v @ module.attn_drop(scores.softmax(-1)).transpose(-2, -1)
    return project(module, join_heads(y))


class PrunedChannelAttention(davit.ChannelAttention):
    """DaViT's channel attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = split_heads(self.qkv(x), self.num_heads, 3)
        weights = ((k * self.scale).transpose(-2, -1) @ v).softmax(-1)
        return project(self, join_heads(q @ weights.transpose(-2, -1)))


class PrunedChannelAttentionV2(davit.ChannelAttentionV2):
    """DaViT's later channel attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = split_heads(self.qkv(x), self.groups, 3)
        scale = (x.shape[1] if self.dynamic_scale else self.head_dim) ** -0.5
        weights = ((q * scale).transpose(-2, -1) @ k).softmax(-1)
        return project(self, join_heads(v @ weights.transpose(-2, -1)))


class PrunedFactorAttnConvRelPosEnc(coat.FactorAttnConvRelPosEnc):
    """CoaT's factorized attention with the sizes of its tensors."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, N, C), of a class token and a grid of `size`."""
        q, k, v = split_heads(self.qkv(x), self.num_heads, 3)
        positions: Any = self.crpe
        y = self.scale * (q @ (k.softmax(2).transpose(-2, -1) @ v)) + positions(q, v, size=size)
        return project(self, join_heads(y))


def _convolutions(module: coat.ConvRelPosEnc, _: Cuts) -> None:
    width = module.channel_splits[0] // module.head_splits[0]
    module.channel_splits = [conv.out_channels for conv in module.conv_list]
    module.head_splits = [channels // width for channels in module.channel_splits]


def _linear(module: mobilevit.LinearSelfAttention, _: Cuts) -> None:
    module.embed_dim = (len(module.qkv_proj.weight) - 1) // 2  # rows are one query, keys, values


ROWS = {
    coat.ConvRelPosEnc: _convolutions,
    coat.FactorAttnConvRelPosEnc: Row(_QKV, PrunedFactorAttnConvRelPosEnc),
    davit.ChannelAttention: Row(_QKV, PrunedChannelAttention),
    davit.ChannelAttentionV2: Row(_QKV, PrunedChannelAttentionV2, heads="groups"),
    edgenext.CrossCovarianceAttn: Row(_QKV, PrunedCrossCovarianceAttn),
    mobilevit.LinearSelfAttention: _linear,
    xcit.XCA: Row(_QKV, PrunedXCA),
}
