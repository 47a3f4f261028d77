"""timm's attention of a class token (cait, crossvit, volo) and of their other blocks, and convit's."""

import torch
from timm.models import cait, convit, crossvit, volo
from torch import Tensor
from torch.nn import functional as F

from compress.attention.heads import Row, attend, join_heads, split_heads
from compress.attention.timm_tokens import project

_QKV = {"qkv.weight": 3}


class PrunedClassAttn(cait.ClassAttn):
    """CaiT's class attention (XCiT's too) with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, 1, C)."""
        q, k, v = (split_heads(each, self.num_heads)[0] for each in (self.q(x[:, :1]), self.k(x), self.v(x)))
        return project(self, join_heads(attend(self, q, k, v)))


class PrunedTalkingHeadAttn(cait.TalkingHeadAttn):
    """CaiT's talking heads with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = split_heads(self.qkv(x), self.num_heads, 3)
        scores = (q * self.scale) @ k.transpose(-2, -1)  # (B, H, N, N)
        weights = _between_heads(self.proj_l, scores).softmax(-1)
        return project(self, join_heads(self.attn_drop(_between_heads(self.proj_w, weights)) @ v))


def _between_heads(linear: torch.nn.Linear, x: Tensor) -> Tensor:
    return linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PrunedCrossAttention(crossvit.CrossAttention):
    """CrossViT's attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, 1, C)."""
        q, k, v = (split_heads(each, self.num_heads)[0] for each in (self.wq(x[:, :1]), self.wk(x), self.wv(x)))
        return project(self, join_heads(attend(self, q, k, v)))


class PrunedMHSA(convit.MHSA):
    """ConViT's plain attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return project(self, join_heads(attend(self, *split_heads(self.qkv(x), self.num_heads, 3))))


class PrunedGPSA(convit.GPSA):
    """ConViT's gated positional attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if self.rel_indices is None or self.rel_indices.shape[1] != x.shape[1]:
            self.rel_indices = self.get_rel_indices(x.shape[1])
        (v,) = split_heads(self.v(x), self.num_heads)
        return project(self, join_heads(self.get_attention(x) @ v))

    def get_attention(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, H, N, N), rows of sum one."""
        q, k = split_heads(self.qk(x), self.num_heads, 2)
        content = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        position = self.pos_proj(self.rel_indices).permute(0, 3, 1, 2).softmax(-1)
        gate = self.gating_param.sigmoid()[:, None, None]
        weights = (1.0 - gate) * content + gate * position
        return self.attn_drop(weights / weights.sum(-1, keepdim=True))


class PrunedVoloAttention(volo.Attention):
    """VOLO's attention over a grid with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, height, width, C) -> the same shape."""
        q, k, v = split_heads(self.qkv(x).flatten(1, 2), self.num_heads, 3)
        return project(self, join_heads(attend(self, q, k, v)).unflatten(1, x.shape[1:3]))


class PrunedOutlookAttention(volo.OutlookAttention):
    """VOLO's outlooker with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, height, width, C) -> the same shape; K: positions in a kernel, L: places of the kernel."""
        height, width = x.shape[1:3]
        area = self.kernel_size**2
        v = self.unfold(self.v(x).permute(0, 3, 1, 2))  # (B, H * D * K, L)
        v = v.unflatten(1, (self.num_heads, -1, area)).permute(0, 1, 4, 3, 2)  # (B, H, L, K, D)
        scores = self.attn(self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(1, 2)
        weights = (scores * self.scale).unflatten(-1, (self.num_heads, area, area)).softmax(-1).transpose(1, 2)
        y = (self.attn_drop(weights) @ v).permute(0, 1, 4, 3, 2).flatten(1, 3)
        y = F.fold(y, (height, width), self.kernel_size, padding=self.padding, stride=self.stride)
        return project(self, y.permute(0, 2, 3, 1))


ROWS = {
    cait.ClassAttn: Row({"q.weight": 1, "k.weight": 1, "v.weight": 1}, PrunedClassAttn),
    cait.TalkingHeadAttn: Row(_QKV, PrunedTalkingHeadAttn),
    convit.GPSA: Row({"qk.weight": 2, "v.weight": 1}, PrunedGPSA),
    convit.MHSA: Row(_QKV, PrunedMHSA),
    crossvit.CrossAttention: Row({"wq.weight": 1, "wk.weight": 1, "wv.weight": 1}, PrunedCrossAttention),
    volo.Attention: Row(_QKV, PrunedVoloAttention),
    volo.ClassAttention: Row({"q.weight": 1, "kv.weight": 2}, width="head_dim"),
    volo.OutlookAttention: Row({"v.weight": 1, "attn.weight": 1}, PrunedOutlookAttention),
}
