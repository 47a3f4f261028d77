"""Attention modules of every covered kind, tiny, with the layout of the tensors that hold their heads."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

HEADS, WIDTH, STREAM = 4, 2, 8


@dataclass(frozen=True)
class Case:
    """One module.

    Attributes:
        path: its class, by qualified name.
        arguments: of the class.
        slots: "TENSOR:DIM" -> axes of the positions: h heads, d columns of a head, a digit for so many parts.
        output: the slot with the columns of the output projection, among `slots`.
        stream: "TENSOR:DIM" of the stream's channels; empty where the test does not narrow it.
        shape: of the input, -1 where the stream's channels lie.
        more: further arguments of the forward pass.
        kept: columns kept per axis letter where widths are removed; None where their removal is not zeroing.
        sizes: of the axis letters.
        swapped: the class changes when heads go.
    """

    path: str
    arguments: Mapping[str, Any]
    slots: Mapping[str, str]
    output: str = "proj.weight:1"
    stream: Sequence[str] = ("qkv.weight:1", "proj.weight:0", "proj.bias:0")
    shape: Sequence[int] = (2, 4, -1)
    more: Sequence[Any] = ()
    kept: Mapping[str, Sequence[int]] | None = field(default_factory=lambda: {"d": (1,)})
    sizes: Mapping[str, int] = field(default_factory=lambda: {"h": HEADS, "d": WIDTH})
    swapped: bool = True

    def make(self, training: bool = True) -> nn.Module:
        """The module in double precision, every parameter drawn at random."""
        if self.path.startswith("timm"):
            pytest.importorskip("timm")
        home, name = self.path.rsplit(".", 1)
        torch.default_generator.manual_seed(0)
        module = getattr(importlib.import_module(home), name)(**self.arguments).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        module.train(training)  # of which timm's levit returns None
        return module

    def input(self, width: int = STREAM) -> Tensor:
        torch.default_generator.manual_seed(1)
        return torch.randn([width if size == -1 else size for size in self.shape], dtype=torch.float64)

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        inputs = (x, x, x) if isinstance(module, nn.MultiheadAttention) else (x,)
        torch.default_generator.manual_seed(2)  # one of them drops whatever it is told
        y = module(*inputs, *self.more)
        return y[0] if isinstance(y, tuple) else y

    def positions(self, **kept: Sequence[int]) -> dict[tuple[str, int], Tensor]:
        """What to keep so that of every axis named the given entries stay; slots without these axes are left out."""
        cuts = {}
        for slot, axes in self.slots.items():
            if not set(kept) & set(axes):
                continue
            tensor, dim = slot.rsplit(":", 1)
            sizes = [int(axis) if axis.isdigit() else self.sizes[axis] for axis in axes]
            grid = torch.arange(torch.Size(sizes).numel()).view(sizes)
            for axis, entries in kept.items():
                if axis in axes:
                    grid = grid.index_select(axes.index(axis), torch.tensor(entries))
            cuts[tensor, int(dim)] = grid.flatten()
        return cuts

    def zero(self, module: nn.Module, kept: Mapping[tuple[str, int], Tensor]) -> None:
        """Zero what `kept` leaves out, but for the output projection's columns: what feeds them is then zero."""
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for (name, dim), positions in kept.items():
            if f"{name}:{dim}" != self.output:
                gone = sorted(set(range(tensors[name].shape[dim])) - set(positions.tolist()))
                tensors[name].data.index_fill_(dim, torch.tensor(gone), 0.0)


def packed(**more: str) -> dict[str, str]:
    return {"qkv.weight:0": "3hd", "qkv.bias:0": "3hd", "proj.weight:1": "hd", **more}


def apart(*names: str, **parts: str) -> dict[str, str]:
    slots = {**dict.fromkeys(names, "hd"), **parts}
    return {f"{name}.{kind}:0": axes for name, axes in slots.items() for kind in ("weight", "bias")} | {
        "proj.weight:1": "hd"
    }


def normalised(weight: str, norm: str, axes: str) -> dict[str, str]:
    tensors = (weight, *(f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")))
    return {f"{tensor}:0": axes for tensor in tensors}


def stream(*names: str) -> tuple[str, ...]:
    return (*(f"{name}.weight:1" for name in names), "proj.weight:0", "proj.bias:0")


DIM = {"dim": STREAM, "num_heads": HEADS, "qkv_bias": True}
SEPARATE = {"qkv.weight:0": "3hd", "q_bias:0": "hd", "k_bias:0": "hd", "v_bias:0": "hd", "proj.weight:1": "hd"}
LEVIT = {"h": 4, "k": 2, "v": 4, "w": 8}
LEVIT_KEPT = {"k": (1,), "v": (0, 2, 3), "w": (1, 3, 4, 6, 7)}
GRID = ((2, 2),)

CASES = {
    "torch": Case(
        "torch.nn.MultiheadAttention",
        {"embed_dim": STREAM, "num_heads": HEADS, "batch_first": True},
        {"in_proj_weight:0": "3hd", "in_proj_bias:0": "3hd", "out_proj.weight:1": "hd"},
        "out_proj.weight:1",
        ("in_proj_weight:1", "out_proj.weight:0", "out_proj.bias:0"),
    ),
    "torchvision swin": Case(
        "torchvision.models.swin_transformer.ShiftedWindowAttention",
        {"dim": STREAM, "window_size": [2, 3], "shift_size": [1, 1], "num_heads": HEADS},
        packed(**{"relative_position_bias_table:1": "h"}),
        shape=(2, 5, 7, -1),
    ),
    "torchvision swin v2": Case(
        "torchvision.models.swin_transformer.ShiftedWindowAttentionV2",
        {"dim": STREAM, "window_size": [2, 3], "shift_size": [1, 1], "num_heads": HEADS},
        packed(**{"logit_scale:0": "h", "cpb_mlp.2.weight:0": "h"}),
        shape=(2, 2, 7, -1),
    ),
    "torchvision maxvit": Case(
        "torchvision.models.maxvit.RelativePositionalMultiHeadAttention",
        {"feat_dim": STREAM, "head_dim": WIDTH, "max_seq_len": 4},
        {
            "to_qkv.weight:0": "3hd",
            "to_qkv.bias:0": "3hd",
            "merge.weight:1": "hd",
            "relative_position_bias_table:1": "h",
        },
        "merge.weight:1",
        ("to_qkv.weight:1", "merge.weight:0", "merge.bias:0"),
        (2, 3, 4, -1),
    ),
    "vit": Case("timm.layers.attention.Attention", DIM, packed(), swapped=False),
    "rope": Case("timm.layers.attention.AttentionRope", DIM, packed(), swapped=False),
    "rope, projections apart": Case(
        "timm.layers.attention.AttentionRope",
        {**DIM, "qkv_fused": False},
        apart("q_proj", "k_proj", "v_proj"),
        stream=stream("q_proj", "k_proj", "v_proj"),
        swapped=False,
    ),
    "latent": Case(
        "timm.layers.attention_pool.AttentionPoolLatent",
        {"in_features": STREAM, "num_heads": HEADS},
        apart("q", kv="2hd"),
        stream=(),
    ),
    "clip pool": Case(
        "timm.layers.attention_pool2d.AttentionPool2d",
        {"in_features": STREAM, "feat_size": 2, "num_heads": HEADS},
        packed(),
        shape=(2, -1, 2, 2),
        stream=(),
        swapped=False,
    ),
    "beit": Case(
        "timm.models.beit.Attention",
        {**DIM, "window_size": (2, 2)},
        {**SEPARATE, "relative_position_bias_table:1": "h"},
        shape=(2, 5, -1),
    ),
    "eva": Case("timm.models.eva.EvaAttention", {**DIM, "scale_norm": False}, SEPARATE),
    "fastvit": Case(
        "timm.models.fastvit.Attention",
        {"dim": STREAM, "head_dim": WIDTH, "qkv_bias": True},
        packed(),
        shape=(2, -1, 2, 3),
    ),
    "metaformer": Case(
        "timm.models.metaformer.Attention",
        {"dim": STREAM, "head_dim": WIDTH, "qkv_bias": True, "proj_bias": True},
        packed(),
    ),
    "tnt": Case(
        "timm.models.tnt.Attention",
        {**DIM, "hidden_dim": STREAM},
        apart("v", qk="2hd"),
        stream=stream("qk", "v"),
        swapped=False,
    ),
    "visformer": Case(
        "timm.models.visformer.Attention",
        {"dim": STREAM, "num_heads": HEADS},
        {"qkv.weight:0": "3hd", "proj.weight:1": "hd"},
        stream=("qkv.weight:1", "proj.weight:0"),
        shape=(2, -1, 2, 3),
        swapped=False,
    ),
    "relpos": Case("timm.models.vision_transformer_relpos.RelPosAttention", DIM, packed()),
    "sam": Case("timm.models.vision_transformer_sam.Attention", DIM, packed(), shape=(2, 2, 3, -1), swapped=False),
    "cait, class": Case("timm.models.cait.ClassAttn", DIM, apart("q", "k", "v"), stream=stream("q", "k", "v")),
    "cait, talking heads": Case(
        "timm.models.cait.TalkingHeadAttn",
        DIM,
        packed(
            **{f"{name}.{slot}": "h" for name in ("proj_l", "proj_w") for slot in ("weight:0", "weight:1", "bias:0")}
        ),
    ),
    "convit, gated": Case(
        "timm.models.convit.GPSA",
        DIM,
        apart("v", qk="2hd") | {"pos_proj.weight:0": "h", "pos_proj.bias:0": "h", "gating_param:0": "h"},
        stream=stream("qk", "v"),
    ),
    "convit": Case("timm.models.convit.MHSA", DIM, packed()),
    "crossvit": Case(
        "timm.models.crossvit.CrossAttention",
        DIM,
        apart("wq", "wk", "wv"),
        stream=stream("wq", "wk", "wv"),
    ),
    "volo": Case("timm.models.volo.Attention", DIM, packed(), shape=(2, 2, 3, -1)),
    "volo, class": Case(
        "timm.models.volo.ClassAttention", DIM, apart("q", kv="2hd"), stream=stream("q", "kv"), swapped=False
    ),
    "volo, outlook": Case(
        "timm.models.volo.OutlookAttention",
        {**DIM, "kernel_size": 3, "padding": 1, "stride": 1},
        apart("v") | {"attn.weight:0": "hk", "attn.bias:0": "hk"},
        stream=stream("v", "attn"),
        shape=(2, 3, 3, -1),
        kept={"d": (1,)},
        sizes={"h": HEADS, "d": WIDTH, "k": 81},
    ),
    "davit": Case("timm.models.davit.WindowAttention", {**DIM, "window_size": (2, 2)}, packed()),
    "gcvit": Case(
        "timm.models.gcvit.WindowAttentionGlobal",
        {**DIM, "window_size": (2, 2), "use_global": False},
        packed(**{"rel_pos.relative_position_bias_table:1": "h"}),
    ),
    "hiera": Case(
        "timm.models.hiera.MaskUnitAttention",
        {"dim": STREAM, "dim_out": STREAM, "heads": HEADS, "q_stride": 2, "window_size": 2, "use_mask_unit_attn": True},
        packed(),
        swapped=False,
    ),
    "maxxvit": Case(
        "timm.models.maxxvit.AttentionCl",
        {"dim": STREAM, "dim_head": WIDTH, "head_first": False},
        packed(),
        shape=(2, 2, 2, -1),
        swapped=False,
    ),
    "maxxvit, heads first": Case(
        "timm.models.maxxvit.Attention2d",
        {"dim": STREAM, "dim_head": WIDTH},
        {"qkv.weight:0": "h3d", "qkv.bias:0": "h3d", "proj.weight:1": "hd"},
        shape=(2, -1, 2, 2),
        swapped=False,
    ),
    "nest": Case("timm.models.nest.Attention", DIM, packed() | {"proj.weight:1": "dh"}, shape=(2, 3, 4, -1)),
    "swin": Case(
        "timm.models.swin_transformer.WindowAttention",
        {**DIM, "window_size": 2},
        packed(**{"relative_position_bias_table:1": "h"}),
        more=(torch.tensor([[0.0, -1.0, 0.0, 0.0]] * 4).expand(2, 4, 4),),
        swapped=False,
    ),
    "swin v2": Case(
        "timm.models.swin_transformer_v2.WindowAttention",
        {**DIM, "window_size": (2, 2)},
        {**SEPARATE, "logit_scale:0": "h", "cpb_mlp.2.weight:0": "h"},
        more=(torch.tensor([[0.0, -1.0, 0.0, 0.0]] * 4).expand(2, 4, 4),),
    ),
    "swin v2 cr": Case(
        "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
        {"dim": STREAM, "num_heads": HEADS, "window_size": (2, 2)},
        packed(**{"logit_scale:0": "h", "meta_mlp.fc2.weight:0": "h", "meta_mlp.fc2.bias:0": "h"}),
    ),
    "twins, windows": Case(
        "timm.models.twins.LocallyGroupedAttn",
        {"dim": STREAM, "num_heads": HEADS, "ws": 2},
        packed(),
        shape=(2, 15, -1),
        more=((3, 5),),
    ),
    "twins, subsampled": Case(
        "timm.models.twins.GlobalSubSampleAttn",
        {"dim": STREAM, "num_heads": HEADS, "sr_ratio": 2},
        apart("q", kv="2hd"),
        stream=(),
        more=GRID,
    ),
    "pvt": Case("timm.models.pvt_v2.Attention", DIM, apart("q", kv="2hd"), stream=stream("q", "kv"), more=GRID),
    "pvt, linear": Case(
        "timm.models.pvt_v2.Attention", {**DIM, "linear_attn": True}, apart("q", kv="2hd"), stream=(), more=GRID
    ),
    "nextvit": Case(
        "timm.models.nextvit.EfficientAttention",
        {"dim": STREAM, "head_dim": WIDTH, "sr_ratio": 2},
        apart("q", "k", "v"),
        stream=(),
    ),
    "mvit": Case(
        "timm.models.mvitv2.MultiScaleAttention",
        {"dim": STREAM, "dim_out": STREAM, "feat_size": (2, 2), "num_heads": HEADS, "has_cls_token": False},
        packed(**{"rel_pos_h:1": "d", "rel_pos_w:1": "d"}),
        more=((2, 2),),
        swapped=False,
    ),
    "sam 2": Case(
        "timm.models.hieradet_sam2.MultiScaleAttention",
        {"dim": STREAM, "dim_out": STREAM, "num_heads": HEADS},
        packed(),
        shape=(2, 2, 2, -1),
        swapped=False,
    ),
    "levit": Case(
        "timm.models.levit.Attention",
        {"dim": STREAM, "key_dim": 2, "num_heads": 4, "attn_ratio": 2, "resolution": 2},
        {
            **normalised("qkv.linear.weight", "qkv.bn", "hw"),
            "attention_biases:0": "h",
            "proj.ln.linear.weight:1": "hv",
        },
        "proj.ln.linear.weight:1",
        stream=(),
        kept=LEVIT_KEPT,
        sizes=LEVIT,
        swapped=False,
    ),
    "levit, downsampling": Case(
        "timm.models.levit.AttentionDownsample",
        {"in_dim": STREAM, "out_dim": STREAM, "key_dim": 2, "num_heads": 4, "attn_ratio": 2, "resolution": 2},
        {
            **normalised("kv.linear.weight", "kv.bn", "hw"),
            **normalised("q.ln.linear.weight", "q.ln.bn", "hk"),
            "attention_biases:0": "h",
            "proj.ln.linear.weight:1": "hv",
        },
        "proj.ln.linear.weight:1",
        stream=(),
        kept={"k": (1,), "v": (0, 2, 3), "w": (1, 2, 4, 5)},
        sizes={"h": 4, "k": 2, "v": 4, "w": 6},
        swapped=False,
    ),
    "efficientformer": Case(
        "timm.models.efficientformer.Attention",
        {"dim": STREAM, "key_dim": 2, "num_heads": 4, "attn_ratio": 2, "resolution": 2},
        {"qkv.weight:0": "hw", "qkv.bias:0": "hw", "attention_biases:0": "h", "proj.weight:1": "hv"},
        kept=LEVIT_KEPT,
        sizes=LEVIT,
        swapped=False,
    ),
    "efficientformer v2": Case(
        "timm.models.efficientformer_v2.Attention2d",
        {"dim": STREAM, "key_dim": 2, "num_heads": 4, "attn_ratio": 2, "resolution": 2},
        {
            **normalised("q.conv.weight", "q.bn", "hk"),
            **normalised("k.conv.weight", "k.bn", "hk"),
            **normalised("v.conv.weight", "v.bn", "hv"),
            **normalised("v_local.conv.weight", "v_local.bn", "hv"),
            "q.conv.bias:0": "hk",
            "k.conv.bias:0": "hk",
            "v.conv.bias:0": "hv",
            "v_local.conv.bias:0": "hv",
            **{f"talking_head{i}.{slot}": "h" for i in (1, 2) for slot in ("weight:0", "weight:1", "bias:0")},
            "attention_biases:0": "h",
            "proj.conv.weight:1": "hv",
        },
        "proj.conv.weight:1",
        stream=(),
        shape=(2, -1, 2, 2),
        kept={"k": (1,), "v": (0, 2, 3)},
        sizes=LEVIT,
        swapped=False,
    ),
    "tiny vit": Case(
        "timm.models.tiny_vit.Attention",
        {"dim": STREAM, "key_dim": 2, "num_heads": 4, "attn_ratio": 2, "resolution": (2, 2)},
        {"qkv.weight:0": "hw", "qkv.bias:0": "hw", "attention_biases:0": "h", "proj.weight:1": "hv"},
        stream=(),
        kept=LEVIT_KEPT,
        sizes=LEVIT,
        swapped=False,
    ),
    "xcit": Case("timm.models.xcit.XCA", DIM, packed(**{"temperature:0": "h"}), kept=None),
    "edgenext": Case("timm.models.edgenext.CrossCovarianceAttn", DIM, packed(**{"temperature:0": "h"}), kept=None),
    "davit, channels": Case("timm.models.davit.ChannelAttention", DIM, packed(), kept=None),
    "davit, channels v2": Case("timm.models.davit.ChannelAttentionV2", DIM, packed(), kept=None),
}
