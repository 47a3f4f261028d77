"""timm's attention with keys and values of different widths and a bias per offset.

Attributes alone make the forward passes of levit, efficientformer and tiny_vit follow; efficientvit has heads that read
each other, with widths of their own. In inference the biases are cached between calls, which a removal ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import efficientformer, efficientformer_v2, efficientvit_msra, levit, tiny_vit
from torch import Tensor

from compress.attention.heads import become, left_over, same_heads
from compress.removal import Cuts


@dataclass(frozen=True)
class WidthsRow:
    """How such a module follows: its rows are ordered (head, q k v, column).

    Attributes:
        projections: weight -> what a head's rows hold one after another: "key" (queries have that width too), "value".
        value, key_total, value_total: attributes that hold the width of a value, H times that of a key, of a value.
    """

    projections: Mapping[str, tuple[str, ...]]
    value: str = "val_dim"
    key_total: str | None = "key_attn_dim"
    value_total: str = "val_attn_dim"

    def __call__(self, module: Any, cuts: Cuts) -> None:
        """Make `module` follow `cuts`."""
        held = {name for name, _ in module.named_parameters()}
        dense = {"key": module.key_dim, "value": getattr(module, self.value)}
        left: list[list[int]] = []
        widths: dict[str, int] = {}
        for tensor, kinds in self.projections.items():
            if tensor not in held:
                continue
            heads, columns = left_over(module, cuts, tensor, module.num_heads)
            left.append(heads)
            start = 0
            for kind in kinds:
                widths[kind] = sum(start <= column < start + dense[kind] for column in columns)
                start += dense[kind]
        kept = same_heads(module, left)
        if widths["key"] < dense["key"] and getattr(module, "fused_attn", False):
            module.fused_attn = False  # the plain product takes the scale from the module
        module.num_heads, module.key_dim = kept, widths["key"]
        setattr(module, self.value, widths["value"])
        setattr(module, self.value_total, kept * widths["value"])
        if self.key_total is not None:
            setattr(module, self.key_total, kept * widths["key"])
        module.attention_bias_cache = {}


class PrunedCascadedGroupAttention(efficientvit_msra.CascadedGroupAttention):
    """EfficientViT's cascade of heads with the sizes of its tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, C, height, width)."""
        biases = self.get_attention_biases(x.device)  # (H, N, N)
        heads: Any = zip(x.chunk(len(self.qkvs), 1), self.qkvs, self.dws, biases, strict=True)
        y: list[Tensor] = []
        for part, project, filters, bias in heads:
            rows = project(y[-1] + part if y else part)
            width = filters.conv.out_channels
            q, k, v = rows.split([width, width, rows.shape[1] - 2 * width], 1)
            scores = (filters(q).flatten(2) * self.scale).transpose(-2, -1) @ k.flatten(2) + bias
            y.append((v.flatten(2) @ scores.softmax(-1).transpose(-2, -1)).unflatten(2, x.shape[2:]))
        return self.proj(torch.cat(y, 1))


def _cascade(module: efficientvit_msra.CascadedGroupAttention, _: Cuts) -> None:
    become(module, PrunedCascadedGroupAttention)


_V2 = {"k.conv.weight": ("key",), "v.conv.weight": ("value",)}

ROWS = {
    efficientformer.Attention: WidthsRow({"qkv.weight": ("key", "key", "value")}),
    efficientformer_v2.Attention2d: WidthsRow({"q.conv.weight": ("key",), **_V2}, "d", None, "dh"),
    efficientformer_v2.Attention2dDownsample: WidthsRow({"q.proj.conv.weight": ("key",), **_V2}, "d", None, "dh"),
    efficientvit_msra.CascadedGroupAttention: _cascade,
    levit.Attention: WidthsRow({"qkv.linear.weight": ("key", "key", "value")}),
    levit.AttentionDownsample: WidthsRow({"q.ln.linear.weight": ("key",), "kv.linear.weight": ("key", "value")}),
    tiny_vit.Attention: WidthsRow({"qkv.weight": ("key", "key", "value")}, key_total=None, value_total="out_dim"),
}
