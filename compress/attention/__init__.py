"""Attention modules that follow a removal: of whole heads, of columns of every head, of the stream's channels.

One channel of an attention layer's group is one head: its rows of the q, k and v projections (stacked in one tensor or
apart), its row or column of every tensor with one entry per head (biases by position, temperatures), its columns of the
output projection. `compress.removal.keep_slices` cuts them. What a forward pass takes from attributes (`num_heads`) is
set here, and a module whose forward pass takes the width of all heads for the stream's (H * D == C) changes its class
in place: its tensors keep their names. The scale of the scores stays that of the dense network, so that removing equals
zeroing. A module that was not cut is not touched.

torch's, torchvision's and timm's modules are listed below by qualified name; their library is imported when one of them
is cut. A module of your own is added in the same way; the class that it takes must lie at the top level of a module, so
that a pruned network can be pickled:

    from compress.attention import attend, become, join_heads, left_over, split_heads
    from compress.removal import shape_update

    class PrunedMyAttention(MyAttention):
        def forward(self, x):                                              # (B, N, C)
            q, k, v = split_heads(self.qkv(x), self.num_heads, parts=3)    # (B, H, N, D) each
            return self.proj(join_heads(attend(self, q, k, v)))            # takes self.scale

    @shape_update(MyAttention)
    def follow(module, cuts):
        heads, _ = left_over(module, cuts, "qkv.weight", module.num_heads, parts=3)
        module.num_heads = len(heads)
        become(module, PrunedMyAttention)
"""

from importlib import import_module
from typing import Any

from compress.attention.heads import attend as attend
from compress.attention.heads import become as become
from compress.attention.heads import follow
from compress.attention.heads import join_heads as join_heads
from compress.attention.heads import left_over as left_over
from compress.attention.heads import split_heads as split_heads
from compress.removal import Cuts, shape_update

COVERED = {
    "compress.attention.torch_multihead": (
        "torch.nn.modules.activation.MultiheadAttention",
        "torch.nn.modules.transformer.TransformerEncoder",
    ),
    "compress.attention.torchvision_windows": (
        "torchvision.models.maxvit.RelativePositionalMultiHeadAttention",
        "torchvision.models.swin_transformer.ShiftedWindowAttention",
        "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
    ),
    "compress.attention.timm_tokens": (
        "timm.layers.attention.Attention",
        "timm.layers.attention.AttentionRope",
        "timm.layers.attention_pool.AttentionPoolLatent",
        "timm.layers.attention_pool2d.AttentionPool2d",
        "timm.layers.attention_pool2d.RotAttentionPool2d",
        "timm.models.beit.Attention",
        "timm.models.eva.EvaAttention",
        "timm.models.fastvit.Attention",
        "timm.models.metaformer.Attention",
        "timm.models.tnt.Attention",
        "timm.models.vision_transformer_relpos.RelPosAttention",
        "timm.models.vision_transformer_sam.Attention",
        "timm.models.visformer.Attention",
    ),
    "compress.attention.timm_classes": (
        "timm.models.cait.ClassAttn",
        "timm.models.cait.TalkingHeadAttn",
        "timm.models.convit.GPSA",
        "timm.models.convit.MHSA",
        "timm.models.crossvit.CrossAttention",
        "timm.models.volo.Attention",
        "timm.models.volo.ClassAttention",
        "timm.models.volo.OutlookAttention",
    ),
    "compress.attention.timm_windows": (
        "timm.layers.pos_embed_rel.RelPosBias",
        "timm.layers.pos_embed_rel.RelPosBiasTf",
        "timm.layers.pos_embed_rel.RelPosMlp",
        "timm.models.davit.WindowAttention",
        "timm.models.gcvit.WindowAttentionGlobal",
        "timm.models.hiera.MaskUnitAttention",
        "timm.models.maxxvit.Attention2d",
        "timm.models.maxxvit.AttentionCl",
        "timm.models.nest.Attention",
        "timm.models.swin_transformer.WindowAttention",
        "timm.models.swin_transformer_v2.WindowAttention",
        "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
        "timm.models.twins.LocallyGroupedAttn",
    ),
    "compress.attention.timm_reduced": (
        "timm.models.hieradet_sam2.MultiScaleAttention",
        "timm.models.mvitv2.MultiScaleAttention",
        "timm.models.nextvit.EfficientAttention",
        "timm.models.pvt_v2.Attention",
        "timm.models.twins.GlobalSubSampleAttn",
    ),
    "compress.attention.timm_biased": (
        "timm.models.efficientformer.Attention",
        "timm.models.efficientformer_v2.Attention2d",
        "timm.models.efficientformer_v2.Attention2dDownsample",
        "timm.models.efficientvit_msra.CascadedGroupAttention",
        "timm.models.levit.Attention",
        "timm.models.levit.AttentionDownsample",
        "timm.models.tiny_vit.Attention",
    ),
    "compress.attention.timm_channels": (
        "timm.models.coat.ConvRelPosEnc",
        "timm.models.coat.FactorAttnConvRelPosEnc",
        "timm.models.davit.ChannelAttention",
        "timm.models.davit.ChannelAttentionV2",
        "timm.models.edgenext.CrossCovarianceAttn",
        "timm.models.mobilevit.LinearSelfAttention",
        "timm.models.xcit.XCA",
    ),
}
"""Where the rows lie -> the classes, by qualified name, that they are for."""


def _register(home: str, names: tuple[str, ...]) -> None:
    @shape_update(*names)
    def from_its_home(module: Any, cuts: Cuts) -> None:
        follow(import_module(home).ROWS, module, cuts)


for _home, _names in COVERED.items():
    _register(_home, _names)
