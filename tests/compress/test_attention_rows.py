"""The table of attention modules: whom it refuses, what lies beside the heads, a user's own row, exports."""

import copy
import importlib

import pytest
import torch
from attention_cases import CASES, HEADS, STREAM, WIDTH
from torch import Tensor, nn

import compress.attention
from compress.attention import attend, become, join_heads, left_over, split_heads
from compress.errors import WorkError
from compress.removal import keep_slices, shape_update

LEFT = torch.tensor([1, 2])
ROWS = torch.arange(STREAM).view(HEADS, WIDTH)[LEFT].flatten()
PACKED = torch.arange(3 * STREAM).view(3, HEADS, WIDTH)[:, LEFT].flatten()


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.double().eval()


def same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


def test_every_class_of_the_table_exists() -> None:
    pytest.importorskip("timm")
    for home, names in compress.attention.COVERED.items():
        rows = importlib.import_module(home).ROWS
        for name in names:
            module, _, cls = name.rpartition(".")
            assert set(getattr(importlib.import_module(module), cls).__mro__) & set(rows), name


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 2, 3, 8, 10, 11, 16, 18, 19], "same columns of whole heads"),  # one column of head 0, two of head 1
        ([0, 1, 8, 9, 16], "same columns of whole heads"),  # q and k of width 2, v of width 1
        ([0, 1, 10, 11, 16, 17], "same columns of whole heads"),  # k of another head
    ],
)
def test_rows_that_are_no_heads_are_refused(rows: list[int], message: str) -> None:
    module = nn.MultiheadAttention(STREAM, HEADS)
    with pytest.raises(WorkError, match=message):
        keep_slices(module, {("in_proj_weight", 0): torch.tensor(rows)})


def test_a_module_whose_projections_were_replaced_is_refused() -> None:
    attention = pytest.importorskip("timm.layers.attention")
    module = attention.Attention(STREAM, HEADS)
    module.qkv = nn.Sequential(module.qkv)
    with pytest.raises(WorkError, match=r"has none of qkv\.weight"):
        keep_slices(module, {("qkv.0.weight", 0): PACKED})
    module = attention.Attention(STREAM, HEADS)
    module.num_heads = 5
    with pytest.raises(WorkError, match="has 24 rows, not 15 blocks"):
        keep_slices(module, {("qkv.weight", 0): PACKED})


def test_projections_that_keep_different_heads_are_refused() -> None:
    module = nn.MultiheadAttention(STREAM, HEADS, kdim=3)
    with pytest.raises(WorkError, match="different heads"):
        keep_slices(module, {("q_proj_weight", 0): ROWS})


def test_a_derived_class_is_refused_for_its_forward_pass_may_be_another() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    with pytest.raises(WorkError, match=r"Mine derives from torch\.nn"):
        keep_slices(Mine(STREAM, HEADS), {("in_proj_weight", 0): PACKED})


class MyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, WIDTH**-0.5
        self.qkv, self.proj = nn.Linear(STREAM, 3 * STREAM, bias=False), nn.Linear(STREAM, STREAM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class PrunedMyAttention(MyAttention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.num_heads, parts=3)
        return self.proj(join_heads(attend(self, q, k, v)))


@pytest.mark.parametrize("by", [MyAttention, f"{MyAttention.__module__}.MyAttention"], ids=["type", "name"])
def test_a_row_of_the_users_own(by: type | str) -> None:
    @shape_update(by)
    def follow(module, cuts) -> None:
        heads, columns = left_over(module, cuts, "qkv.weight", module.num_heads, parts=3)
        assert (heads, columns) == ([1, 2], list(range(3 * WIDTH)))
        module.num_heads = len(heads)
        become(module, PrunedMyAttention)

    module = randomized(MyAttention())
    pruned = copy.deepcopy(module)
    module.qkv.weight.data[2 * STREAM :].view(HEADS, WIDTH, -1)[[0, 3]] = 0.0
    keep_slices(pruned, {("qkv.weight", 0): PACKED, ("proj.weight", 1): ROWS})
    x = torch.randn(2, 3, STREAM).double()
    same(pruned(x), module(x))


@pytest.mark.parametrize("name", ["RelPosBias", "RelPosMlp", "RelPosBiasTf"])
def test_biases_by_position(name: str) -> None:
    layers = pytest.importorskip("timm.layers.pos_embed_rel")
    module = randomized(getattr(layers, name)(window_size=(2, 2), num_heads=HEADS))
    expected = module.get_bias().reshape(HEADS, 4, 4)[LEFT]
    slots = {
        "RelPosBias": [("relative_position_bias_table", 1)],
        "RelPosMlp": [("mlp.fc2.weight", 0), ("mlp.fc2.bias", 0)],
        "RelPosBiasTf": [("relative_position_bias_table", 0)],
    }
    keep_slices(module, dict.fromkeys(slots[name], LEFT))
    same(module.get_bias().reshape(2, 4, 4), expected)


@pytest.mark.parametrize("path", ["timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention"])
@pytest.mark.parametrize("fused", [True, False])
def test_rotary_positions_norms_and_gates(path: str, fused: bool) -> None:
    pytest.importorskip("timm")
    home, name = path.rsplit(".", 1)
    arguments = {"qkv_fused": fused, "qk_norm": True, "scale_norm": False, "norm_layer": nn.LayerNorm, "gated": True}
    module = randomized(getattr(importlib.import_module(home), name)(STREAM, HEADS, **arguments))
    pruned = copy.deepcopy(module)
    kept = {("gate.weight", 0): ROWS, ("gate.bias", 0): ROWS, ("proj.weight", 1): ROWS}
    if fused:
        kept |= {
            (n, 0): PACKED if n.startswith("qkv") else ROWS for n in dict(module.named_parameters()) if n[0] == "q"
        }
        kept = {slot: rows for slot, rows in kept.items() if "norm" not in slot[0]}
        kept |= {(n, 0): ROWS for n in ("k_bias", "v_bias") if hasattr(module, n)}
        module.qkv.weight.data[2 * STREAM :].view(HEADS, WIDTH, -1)[[0, 3]] = 0.0
        v_bias = module.qkv.bias[2 * STREAM :] if module.qkv.bias is not None else module.v_bias
    else:
        kept |= {(n, 0): ROWS for n in dict(module.named_parameters()) if n[1:6] == "_proj"}
        module.v_proj.weight.data.view(HEADS, WIDTH, -1)[[0, 3]] = 0.0
        v_bias = module.v_proj.bias
    v_bias.data.view(HEADS, WIDTH)[[0, 3]] = 0.0
    keep_slices(pruned, kept)
    x, rope = torch.randn(2, 5, STREAM).double(), torch.randn(4, 2 * WIDTH).double()
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    same(pruned(x, rope=rope), module(x, rope=rope))
    same(pruned(x, rope=rope, attn_mask=mask), module(x, rope=rope, attn_mask=mask))
    same(pruned(x, rope=rope, is_causal=True), module(x, rope=rope, is_causal=True))


def test_what_cannot_go_alone_is_refused() -> None:
    pytest.importorskip("timm")
    from timm.layers.attention import AttentionRope
    from timm.layers.attention_pool import AttentionPoolLatent
    from timm.models.gcvit import WindowAttentionGlobal

    with pytest.raises(WorkError, match="grouped queries"):
        keep_slices(AttentionRope(STREAM, HEADS, qkv_fused=False, num_kv_heads=2), {("q_proj.weight", 0): ROWS})
    with pytest.raises(WorkError, match="global attention"):
        keep_slices(WindowAttentionGlobal(STREAM, HEADS, (2, 2)), {("qkv.weight", 0): torch.arange(8)})
    with pytest.raises(WorkError, match="latent query"):
        keep_slices(AttentionPoolLatent(STREAM, num_heads=HEADS, q_proj=False), {("latent", 2): ROWS})


def test_mobilevit_v2_has_channels_and_no_heads() -> None:
    mobilevit = pytest.importorskip("timm.models.mobilevit")
    module = randomized(mobilevit.LinearSelfAttention(4))
    pruned = copy.deepcopy(module)
    rows = torch.tensor([0, 1, 3, 5, 7])  # the query, keys 0 and 2, values 0 and 2
    module.qkv_proj.weight.data[[6, 8]] = 0.0
    module.qkv_proj.bias.data[[6, 8]] = 0.0
    keep_slices(
        pruned, {("qkv_proj.weight", 0): rows, ("qkv_proj.bias", 0): rows, ("out_proj.weight", 1): torch.tensor([0, 2])}
    )
    x = torch.randn(2, 4, 3, 5).double()
    same(pruned(x), module(x))


def test_coat_shares_its_position_encoding() -> None:
    coat = pytest.importorskip("timm.models.coat")
    shared = coat.ConvRelPosEnc(WIDTH, HEADS, {1: 2, 3: 2})
    module = nn.Module()
    module.crpe = shared
    module.blocks = nn.ModuleList(coat.FactorAttnConvRelPosEnc(STREAM, HEADS, shared_crpe=shared) for _ in range(2))
    module = randomized(module)
    pruned = copy.deepcopy(module)
    kept = {}
    for i, block in enumerate(module.blocks):
        block.qkv.weight.data.view(3, HEADS, -1)[:, [0, 3]] = 0.0
        kept |= {(f"blocks.{i}.qkv.weight", 0): PACKED, (f"blocks.{i}.proj.weight", 1): ROWS}
    for i, rows in enumerate((torch.tensor([2, 3]), torch.tensor([0, 1]))):  # the second head, the third head
        kept |= {(f"crpe.conv_list.{i}.{name}", 0): rows for name in ("weight", "bias")}
    keep_slices(pruned, kept)
    x = torch.randn(2, 5, STREAM).double()
    for block, dense in zip(pruned.blocks, module.blocks, strict=True):
        same(block(x, (2, 2)), dense(x, (2, 2)))


@pytest.mark.parametrize("name", ["torch", "torchvision swin", "vit", "swin v2"])
def test_pruned_modules_export_for_any_batch(name: str) -> None:
    case = CASES[name]
    module = case.make(training=False)
    keep_slices(module, case.positions(h=(0, 2, 3)) | case.positions(h=(0, 2, 3), d=(1,)))
    x = torch.cat((case.input(), case.input()))  # two images of two windows: exporters take sizes of one for constants
    inputs = (x,) * 3 if name == "torch" else (x,)
    program = torch.export.export(
        module,
        (*inputs, *case.more),
        dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}] * len(inputs) + [None] * len(case.more),
    )
    inputs = tuple(torch.cat((each, each.flip(0))) for each in inputs)
    y, expected = program.module()(*inputs, *case.more), module(*inputs, *case.more)
    same(y[0] if isinstance(y, tuple) else y, expected[0] if isinstance(expected, tuple) else expected)


def test_a_cascade_of_heads_keeps_its_heads_and_loses_keys_of_each() -> None:
    models = pytest.importorskip("timm.models.efficientvit_msra")
    dense = models.CascadedGroupAttention(8, 2, num_heads=2, attn_ratio=2, resolution=3, kernels=(3, 3))
    randomized(dense)  # of which the module's own train returns None
    images = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    expected = copy.deepcopy(dense)
    with torch.no_grad():
        expected.qkvs[1].conv.weight[[0, 2]] = 0  # channel 0 of its queries and of its keys
        expected.qkvs[1].bn.bias[[0, 2]] = 0
        expected.dws[1].bn.bias[0] = 0
        expected.qkvs[1].bn.running_mean[[0, 2]] = expected.dws[1].bn.running_mean[0] = 0
    rows, one = torch.tensor([1, 3, 4, 5, 6, 7]), torch.tensor([1])
    cuts = {("qkvs.1.conv.weight", 0): rows, ("dws.1.conv.weight", 0): one}
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        cuts |= {(f"qkvs.1.bn.{tensor}", 0): rows, (f"dws.1.bn.{tensor}", 0): one}
    keep_slices(dense, cuts)
    same(dense(images), expected(images))
    assert (dense.dws[1].conv.groups, dense.qkvs[1].conv.out_channels) == (1, 6)
