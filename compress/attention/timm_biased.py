"""timm's attention with keys and values of different widths and a bias per offset: levit, efficientformer, tiny_vit.

Attributes alone make their forward passes follow. In inference the biases are cached between calls, which a removal
ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models import efficientformer, efficientformer_v2, levit, tiny_vit

from compress.attention.heads import left_over, same_heads
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


_V2 = {"k.conv.weight": ("key",), "v.conv.weight": ("value",)}

ROWS = {
    efficientformer.Attention: WidthsRow({"qkv.weight": ("key", "key", "value")}),
    efficientformer_v2.Attention2d: WidthsRow({"q.conv.weight": ("key",), **_V2}, "d", None, "dh"),
    efficientformer_v2.Attention2dDownsample: WidthsRow({"q.proj.conv.weight": ("key",), **_V2}, "d", None, "dh"),
    levit.Attention: WidthsRow({"qkv.linear.weight": ("key", "key", "value")}),
    levit.AttentionDownsample: WidthsRow({"q.ln.linear.weight": ("key",), "kv.linear.weight": ("key", "value")}),
    tiny_vit.Attention: WidthsRow({"qkv.weight": ("key", "key", "value")}, key_total=None, value_total="out_dim"),
}
