"""timm's attention with fewer keys or queries than tokens: pvt, twins, nextvit, mvit, sam 2's hiera."""

from collections.abc import Sequence
from typing import Any

from timm.models import hieradet_sam2, mvitv2, nextvit, pvt_v2, twins
from torch import Tensor

from compress.attention.heads import Row, attend, join_heads, split_heads
from compress.attention.timm_tokens import project


class PrunedPvtAttention(pvt_v2.Attention):
    """PVT v2's attention with the sizes of its tensors."""

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """(B, N, C) -> (B, N, C), of a grid of `feat_size`."""
        return _to_reduced(self, x, feat_size)


class PrunedGlobalSubSampleAttn(twins.GlobalSubSampleAttn):
    """Twins' attention to subsampled tokens with the sizes of its tensors."""

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(B, N, C) -> (B, N, C), of a grid of `size`."""
        return _to_reduced(self, x, size)


def _to_reduced(module: Any, x: Tensor, size: Sequence[int]) -> Tensor:
    (q,) = split_heads(module.q(x), module.num_heads)
    if module.sr is not None:
        grid = x.transpose(1, 2).unflatten(2, size)
        pool, act = getattr(module, "pool", None), getattr(module, "act", None)  # of pvt's linear attention
        x = module.norm(module.sr(grid if pool is None else pool(grid)).flatten(2).transpose(1, 2))
        x = x if act is None else act(x)
    k, v = split_heads(module.kv(x), module.num_heads, 2)
    return project(module, join_heads(attend(module, q, k, v)))


class PrunedEfficientAttention(nextvit.EfficientAttention):
    """NextViT's attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        (q,) = split_heads(self.q(x), self.num_heads)
        if self.sr is not None:
            x = self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)
        (k,), (v,) = split_heads(self.k(x), self.num_heads), split_heads(self.v(x), self.num_heads)
        return project(self, join_heads(attend(self, q, k, v)))


_Q_KV = {"q.weight": 1, "kv.weight": 2}

ROWS = {
    hieradet_sam2.MultiScaleAttention: Row({"qkv.weight": 3}),
    mvitv2.MultiScaleAttention: Row({"qkv.weight": 3}, width="head_dim", total="dim_out"),
    nextvit.EfficientAttention: Row(
        {"q.weight": 1, "k.weight": 1, "v.weight": 1}, PrunedEfficientAttention, width="head_dim"
    ),
    pvt_v2.Attention: Row(_Q_KV, PrunedPvtAttention, width="head_dim"),
    twins.GlobalSubSampleAttn: Row(_Q_KV, PrunedGlobalSubSampleAttn),
}
