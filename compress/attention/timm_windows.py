"""timm's attention in windows (swin v1, v2, cr, maxvit, coatnet, davit, gcvit, hiera, nest, twins), and its biases."""

import math
from typing import Any

import torch.nn.functional as F
from timm.layers.pos_embed_rel import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models import davit, gcvit, hiera, maxxvit, nest, swin_transformer, swin_transformer_v2, twins
from timm.models import swin_transformer_v2_cr as swin_transformer_cr
from torch import Tensor

from compress.attention.heads import ADVICE, Row, attend, join_heads, left_over, split_heads
from compress.attention.timm_tokens import project, stacked
from compress.errors import WorkError
from compress.removal import Cuts

_QKV = {"qkv.weight": 3}


class PrunedWindowAttentionV2(swin_transformer_v2.WindowAttention):
    """swin v2's cosine attention with the sizes of its tensors."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B * windows, N, C) -> the same shape."""
        q, k, v = split_heads(stacked(self, x), self.num_heads, 3)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)  # (positions, H)
        bias = 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()
        return project(self, _cosine(self, q, k, v, self.logit_scale, bias, mask))


class PrunedWindowMultiHeadAttention(swin_transformer_cr.WindowMultiHeadAttention):
    """swin v2 cr's cosine attention with the sizes of its tensors."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B * windows, N, C) -> the same shape."""
        q, k, v = split_heads(self.qkv(x), self.num_heads, 3)
        bias = self._relative_positional_encodings()
        return project(self, _cosine(self, q, k, v, self.logit_scale[:, None, None], bias, mask))


def _cosine(
    module: Any, q: Tensor, k: Tensor, v: Tensor, sharpness: Tensor, bias: Tensor, mask: Tensor | None
) -> Tensor:
    """Joined heads (B * windows, N, H * D), with a mask (windows, N, N) of its own for every window of an image."""
    q = F.normalize(q, dim=-1) * sharpness.clamp(max=math.log(100.0)).exp()
    scores = q @ F.normalize(k, dim=-1).transpose(-2, -1) + bias
    if mask is not None:
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    return join_heads(module.attn_drop(scores.softmax(-1)) @ v)


class PrunedDavitWindowAttention(davit.WindowAttention):
    """DaViT's window attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B * windows, N, C) -> the same shape."""
        return project(self, join_heads(attend(self, *split_heads(self.qkv(x), self.num_heads, 3))))


class PrunedWindowAttentionGlobal(gcvit.WindowAttentionGlobal):
    """GCViT's attention inside windows with the sizes of its tensors."""

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:  # noqa: ARG002  (of other blocks)
        """(B * windows, N, C) -> the same shape."""
        q, k, v = split_heads(self.qkv(x), self.num_heads, 3)
        return project(self, join_heads(attend(self, q, k, v, self.rel_pos.get_bias())))


class PrunedNestAttention(nest.Attention):
    """NesT's attention with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, blocks, N, C) -> the same shape."""
        y = attend(self, *split_heads(self.qkv(x), self.num_heads, 3))  # (B, blocks, H, N, D)
        return project(self, y.permute(0, 1, 3, 4, 2).flatten(-2))  # NesT joins the heads as (D, H)


class PrunedLocallyGroupedAttn(twins.LocallyGroupedAttn):
    """Twins' attention inside windows with the sizes of its tensors."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, N, C), of a grid of `size`."""
        height, width = size
        side = self.ws
        x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % side, 0, -height % side))
        x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # (B, rows, columns, side, side, C)
        q, k, v = split_heads(self.qkv(x).flatten(3, 4), self.num_heads, 3)
        y = join_heads(attend(self, q, k, v)).unflatten(3, (side, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return project(self, y[:, :height, :width].flatten(1, 2))


def _global(module: gcvit.WindowAttentionGlobal, cuts: Cuts) -> None:
    if module.use_global:
        raise WorkError(f"The heads of GCViT's global attention belong to the stem that makes its queries: {ADVICE}.")
    Row(_QKV, PrunedWindowAttentionGlobal, width="head_dim")(module, cuts)


def _maxxvit(module: Any, cuts: Cuts) -> None:
    if not module.head_first:
        Row(_QKV, width="dim_head")(module, cuts)
        return
    heads, columns = left_over(module, cuts, "qkv.weight", module.num_heads)  # rows are (head, q k v, column)
    parts = [sum(column // module.dim_head == part for column in columns) for part in range(3)]
    if len(set(parts)) > 1:
        raise WorkError(f"q, k and v of a {type(module).__name__} keep different widths: {ADVICE}.")
    if parts[0] < module.dim_head:
        module.fused_attn = False  # the plain product takes the scale from the module
    module.num_heads, module.dim_head = len(heads), parts[0]


def _bias_by_heads(module: Any, _: Cuts) -> None:
    module.bias_shape = (*module.bias_shape[:2], module.relative_position_bias_table.shape[1])


def _bias_by_heads_first(module: Any, _: Cuts) -> None:
    module.bias_shape = tuple(module.relative_position_bias_table.shape)
    module.num_heads = module.bias_shape[0]


def _bias_by_mlp(module: Any, _: Cuts) -> None:
    module.num_heads = len(module.mlp.fc2.weight)
    module.bias_shape = (*module.bias_shape[:2], module.num_heads)


ROWS = {
    RelPosBias: _bias_by_heads,
    RelPosBiasTf: _bias_by_heads_first,
    RelPosMlp: _bias_by_mlp,
    davit.WindowAttention: Row(_QKV, PrunedDavitWindowAttention),
    gcvit.WindowAttentionGlobal: _global,
    hiera.MaskUnitAttention: Row(_QKV, heads="heads", width="head_dim", total="dim_out"),
    maxxvit.Attention2d: _maxxvit,
    maxxvit.AttentionCl: _maxxvit,
    nest.Attention: Row(_QKV, PrunedNestAttention),
    swin_transformer.WindowAttention: Row(_QKV),
    swin_transformer_v2.WindowAttention: Row(_QKV, PrunedWindowAttentionV2),
    swin_transformer_cr.WindowMultiHeadAttention: Row(_QKV, PrunedWindowMultiHeadAttention),
    twins.LocallyGroupedAttn: Row(_QKV, PrunedLocallyGroupedAttn),
}
