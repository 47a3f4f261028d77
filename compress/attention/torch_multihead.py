"""nn.MultiheadAttention with fewer heads, narrower heads or a narrower stream than it was built with.

It must not reach torch's fused kernels for inference, which take H * D for the width of the stream.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.attention.heads import ADVICE, become, join_heads, left_over, same_heads, split_heads
from compress.errors import WorkError
from compress.removal import Cuts

_PACKED = {"in_proj_weight": 3}
_APART = {"q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """Computes what nn.MultiheadAttention computes, with the sizes of its tensors.

    Attributes:
        scale: of the scores, 1 / sqrt(D) of the dense module.
    """

    scale: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward; a mask of its own for every head has as many heads as are left."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch does
        batched = query.dim() == 3
        inputs = (
            [query, key, value]
            if batched
            else [each.unsqueeze(int(not self.batch_first)) for each in (query, key, value)]
        )
        if not self.batch_first:
            inputs = [each.transpose(0, 1) for each in inputs]
        q, k, v = self._projected(*inputs)  # (B, H, N, D) each
        bias = self._bias(q, key_padding_mask, attn_mask)
        rate = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = F.dropout((scores if bias is None else scores + bias).softmax(-1), rate)
            x = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate, scale=self.scale)
        x = self.out_proj(join_heads(x))
        if not batched:
            return x.squeeze(0), weights
        return x if self.batch_first else x.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = list(self.in_proj_weight.chunk(3))
        biases = (
            [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.split([len(weight) for weight in weights])
        )
        inputs = (query, key, value)
        return [
            split_heads(F.linear(each, weight, bias), self.num_heads)[0]
            for each, weight, bias in zip(inputs, weights, biases, strict=True)
        ]

    def _bias(self, q: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Both masks as one to add to the scores, broadcast to (B, H, L, S)."""
        bias = None
        if mask is not None:
            bias = _added(mask, q)
            bias = bias.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else bias
        if padding is not None:
            hidden = _added(padding if padding.dim() == 2 else padding.unsqueeze(0), q)[:, None, None]
            bias = hidden if bias is None else bias + hidden
        return bias


def _added(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)


def _multihead(module: nn.MultiheadAttention, cuts: Cuts) -> None:
    if module.bias_k is not None or module.add_zero_attn:
        raise WorkError(f"nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be pruned: {ADVICE}.")
    packed = module.in_proj_weight is not None
    left = [
        left_over(module, cuts, tensor, module.num_heads, parts)
        for tensor, parts in (_PACKED if packed else _APART).items()
    ]
    if not hasattr(module, "scale"):
        module.scale = module.head_dim**-0.5
    become(module, PrunedMultiheadAttention)
    module.num_heads = same_heads(module, [heads for heads, _ in left])
    query = module.in_proj_weight if packed else module.q_proj_weight
    module.head_dim = len(query) // (3 if packed else 1) // module.num_heads
    module.embed_dim = query.shape[1]
    module.kdim, module.vdim = (
        (module.embed_dim,) * 2 if packed else (module.k_proj_weight.shape[1], module.v_proj_weight.shape[1])
    )
    module._qkv_same_embed_dim = False  # nn.TransformerEncoderLayer's fused kernel takes H * D for the stream's width


def _encoder(module: nn.TransformerEncoder, _: Cuts) -> None:
    if any(isinstance(inner, PrunedMultiheadAttention) for inner in module.modules()):
        module.use_nested_tensor = False  # only the fused kernels read nested tensors


ROWS = {nn.MultiheadAttention: _multihead, nn.TransformerEncoder: _encoder}
