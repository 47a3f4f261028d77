"""timm's self-attention over all tokens: the vision transformers' and their relatives', and pooling by attention."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import (
    beit,
    eva,
    fastvit,
    metaformer,
    tnt,
    visformer,
    vision_transformer_relpos,
    vision_transformer_sam,
)
from torch import Tensor

from compress.attention.heads import ADVICE, Row, attend, join_heads, split_heads
from compress.errors import WorkError
from compress.removal import Cuts

_QKV = {"qkv.weight": 3}


def project(module: Any, x: Tensor) -> Tensor:
    """The output projection and its dropout, where there is one."""
    x = module.proj(x)
    return module.proj_drop(x) if hasattr(module, "proj_drop") else x


def stacked(module: Any, x: Tensor) -> Tensor:
    """q, k and v in one tensor, with the biases that beit, eva and swin v2 keep apart."""
    if getattr(module, "q_bias", None) is None:
        return module.qkv(x)
    return F.linear(x, module.qkv.weight, torch.cat((module.q_bias, module.k_bias, module.v_bias)))


class PrunedAttention(Attention):
    """timm's standard attention with heads narrower than its scale says."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = split_heads(self.qkv(x), self.num_heads, 3)
        y = attend(self, self.q_norm(q), self.k_norm(k), v, attn_mask, causal=is_causal)
        return project(self, _gated(self, self.norm(join_heads(y)), x))


class PrunedAttentionRope(AttentionRope):
    """Attention with rotary positions and heads narrower than its scale says."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return _rotated(self, x, rope, attn_mask, is_causal)


class PrunedEvaAttention(eva.EvaAttention):
    """EVA's attention with the sizes of its tensors."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return _rotated(self, x, rope, attn_mask, is_causal)


def _rotated(module: Any, x: Tensor, rope: Tensor | None, mask: Tensor | None, causal: bool) -> Tensor:
    if module.qkv is None:
        q, k, v = (split_heads(each(x), module.num_heads)[0] for each in (module.q_proj, module.k_proj, module.v_proj))
    else:
        q, k, v = split_heads(stacked(module, x), module.num_heads, 3)
    q, k = module.q_norm(q), module.k_norm(k)
    if rope is not None:
        first, half = module.num_prefix_tokens, getattr(module, "rotate_half", False)
        q, k = (
            torch.cat((each[:, :, :first], apply_rot_embed_cat(each[:, :, first:], rope, half=half)), 2).type_as(v)
            for each in (q, k)
        )
    y = attend(module, q, k, v, mask, causal=causal)
    return project(module, _gated(module, module.norm(join_heads(y)), x))


def _gated(module: Any, y: Tensor, x: Tensor) -> Tensor:
    gate = getattr(module, "gate", None)
    return y if gate is None else y * gate(x).sigmoid()


class PrunedBeitAttention(beit.Attention):
    """BEiT's attention with the sizes of its tensors."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        q, k, v = split_heads(stacked(self, x), self.num_heads, 3)
        return project(self, join_heads(attend(self, q, k, v, bias)))


class PrunedRelPosAttention(vision_transformer_relpos.RelPosAttention):
    """Attention with relative positions and the sizes of its tensors."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        rel_pos: Any = self.rel_pos
        bias = shared_rel_pos if rel_pos is None else rel_pos.get_bias()
        q, k, v = split_heads(self.qkv(x), self.num_heads, 3)
        return project(self, join_heads(attend(self, self.q_norm(q), self.k_norm(k), v, bias)))


class PrunedMetaformerAttention(metaformer.Attention):
    """CAFormer's attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return project(self, join_heads(attend(self, *split_heads(self.qkv(x), self.num_heads, 3))))


class PrunedFastvitAttention(fastvit.Attention):
    """FastViT's attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, C, height, width)."""
        tokens = x.flatten(2).transpose(1, 2)
        y = project(self, join_heads(attend(self, *split_heads(self.qkv(tokens), self.num_heads, 3))))
        return y.transpose(1, 2).unflatten(2, x.shape[2:])


class PrunedAttentionPoolLatent(AttentionPoolLatent):
    """Pooling by a latent query, with the sizes of its tensors."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, C)."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.to(x.dtype)
        (q,) = split_heads(self.q(self.latent.expand(x.shape[0], -1, -1)), self.num_heads)
        k, v = split_heads(self.kv(x), self.num_heads, 2)
        # Its attribute `attn_drop` does not exist: the scores are not dropped.
        x = project(self, join_heads(attend(self, self.q_norm(q), self.k_norm(k), v, attn_mask)))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return {"token": x[:, 0], "avg": x.mean(1)}.get(self.pool, x)


def _rope(module: AttentionRope, cuts: Cuts) -> None:
    if getattr(module, "num_kv_groups", 1) > 1:
        raise WorkError(f"Heads that share keys and values (grouped queries, num_kv_heads) cannot go alone: {ADVICE}.")
    projections = {**_QKV, "q_proj.weight": 1, "k_proj.weight": 1, "v_proj.weight": 1, "gate.weight": 1}
    Row(projections, PrunedAttentionRope, width="head_dim", total="attn_dim", suffices=True)(module, cuts)
    module.num_kv_heads, module.kv_dim = module.num_heads, module.attn_dim


def _latent(module: AttentionPoolLatent, cuts: Cuts) -> None:
    if ("latent", 2) in cuts and not hasattr(module.q, "weight"):
        raise WorkError(f"A latent query that is split into heads without a projection cannot be cut: {ADVICE}.")
    Row({"q.weight": 1, "kv.weight": 2}, PrunedAttentionPoolLatent, width="head_dim")(module, cuts)


_POOL = Row({**_QKV, "q.weight": 1, "k.weight": 1, "v.weight": 1}, width="head_dim")

ROWS = {
    Attention: Row({**_QKV, "gate.weight": 1}, PrunedAttention, width="head_dim", total="attn_dim", suffices=True),
    AttentionRope: _rope,
    AttentionPoolLatent: _latent,
    AttentionPool2d: _POOL,
    RotAttentionPool2d: _POOL,
    beit.Attention: Row(_QKV, PrunedBeitAttention),
    eva.EvaAttention: Row(
        {**_QKV, "q_proj.weight": 1, "k_proj.weight": 1, "v_proj.weight": 1, "gate.weight": 1},
        PrunedEvaAttention,
        width="head_dim",
    ),
    fastvit.Attention: Row(_QKV, PrunedFastvitAttention, width="head_dim"),
    metaformer.Attention: Row(_QKV, PrunedMetaformerAttention, width="head_dim", total="attention_dim"),
    tnt.Attention: Row({"qk.weight": 2, "v.weight": 1}, width="head_dim"),
    visformer.Attention: Row(_QKV, width="head_dim"),
    vision_transformer_relpos.RelPosAttention: Row(_QKV, PrunedRelPosAttention, width="head_dim"),
    vision_transformer_sam.Attention: Row(_QKV, width="head_dim"),
}
