"""nn.MultiheadAttention with heads removed: every way of calling it, alone and inside torch's own layers."""

import copy

import pytest
import torch
from torch import Tensor, nn

import compress.attention  # noqa: F401
from compress.errors import WorkError
from compress.removal import keep_slices

HEADS, WIDTH, STREAM = 4, 2, 8
LEFT = torch.tensor([1, 2])  # heads
ROWS = torch.arange(STREAM).view(HEADS, WIDTH)[LEFT].flatten()
PACKED = torch.arange(3 * STREAM).view(3, HEADS, WIDTH)[:, LEFT].flatten()


def keep(prefix: str = "") -> dict[tuple[str, int], Tensor]:
    return {
        (prefix + "in_proj_weight", 0): PACKED,
        (prefix + "in_proj_bias", 0): PACKED,
        (prefix + "out_proj.weight", 1): ROWS,
    }


def pair(module: nn.Module, prefix: str = "") -> tuple[nn.Module, nn.Module]:
    """The module with the values of heads 0 and 3 zeroed, and the module without these heads."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    pruned = copy.deepcopy(module)
    for name in ("in_proj_weight", "in_proj_bias"):
        values = module.get_parameter(prefix + name).data[2 * STREAM :]
        values.view(HEADS, WIDTH, -1)[[0, 3]] = 0.0
    keep_slices(pruned, keep(prefix))
    return module, pruned


def tensors(batch: int, *lengths: int) -> list[Tensor]:
    return [torch.randn(batch, length, STREAM, dtype=torch.float64) for length in lengths]


def same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "per head"])
def test_calls(batch_first: bool, need_weights: bool, masks: str) -> None:
    zeroed, pruned = pair(nn.MultiheadAttention(STREAM, HEADS, batch_first=batch_first))
    query, key = tensors(3, 5, 4)
    attn_mask, padding = None, None
    if masks != "none":
        attn_mask = torch.ones(5, 4, dtype=torch.bool).triu(2)
        padding = torch.tensor([[False, False, False, True]] * 2 + [[False] * 4])
    if masks == "float":
        attn_mask, padding = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    per_head = torch.randn(3, HEADS, 5, 4, dtype=torch.float64) > 1.5
    per_head[..., 0] = False
    if masks == "per head":
        attn_mask = per_head.flatten(0, 1)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)

    def call(module: nn.Module, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return module(query, key, key, padding, need_weights=need_weights, attn_mask=mask, average_attn_weights=False)

    expected, weights = call(zeroed, attn_mask)
    y, left = call(pruned, per_head[:, LEFT].flatten(0, 1) if masks == "per head" else attn_mask)
    same(y, expected)
    assert (left is None) == (not need_weights)
    if left is not None:
        same(left, weights[:, LEFT])


def test_weights_are_averaged_over_the_heads_left() -> None:
    _, pruned = pair(nn.MultiheadAttention(STREAM, HEADS, batch_first=True))
    (x,) = tensors(3, 5)
    _, each = pruned(x, x, x, average_attn_weights=False)
    _, average = pruned(x, x, x)
    same(average, each.mean(1))


def test_one_image_without_a_batch() -> None:
    for batch_first in (True, False):
        zeroed, pruned = pair(nn.MultiheadAttention(STREAM, HEADS, batch_first=batch_first))
        x = tensors(1, 5)[0][0]
        padding = torch.tensor([False] * 4 + [True])
        expected, average = zeroed(x, x, x, padding)
        y, weights = pruned(x, x, x, padding)
        same(y, expected)
        assert weights.shape == average.shape == (5, 5)


def test_keys_and_values_of_other_widths() -> None:
    module = nn.MultiheadAttention(STREAM, HEADS, kdim=3, vdim=5, batch_first=True).double()
    pruned = copy.deepcopy(module)
    module.v_proj_weight.data.view(HEADS, WIDTH, -1)[[0, 3]] = 0.0
    module.in_proj_bias.data[2 * STREAM :].view(HEADS, WIDTH)[[0, 3]] = 0.0
    kept = {(f"{name}_proj_weight", 0): ROWS for name in "qkv"}
    keep_slices(pruned, kept | {("in_proj_bias", 0): PACKED, ("out_proj.weight", 1): ROWS})
    x, key, value = torch.randn(2, 4, STREAM), torch.randn(2, 3, 3), torch.randn(2, 3, 5)
    same(pruned(x.double(), key.double(), value.double())[0], module(x.double(), key.double(), value.double())[0])


def test_dropout_is_applied_in_training_only() -> None:
    _, pruned = pair(nn.MultiheadAttention(STREAM, HEADS, dropout=0.9, batch_first=True))
    (x,) = tensors(3, 5)
    for need_weights in (True, False):
        first, second = (pruned.train()(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(first, second)
    first, second = (pruned.eval()(x, x, x, need_weights=need_weights)[0] for need_weights in (True, False))
    same(first, second)


@pytest.mark.parametrize("kind", ["layer", "encoder"])
def test_inside_torchs_encoder_the_fused_kernel_is_left_alone(kind: str) -> None:
    layer = nn.TransformerEncoderLayer(STREAM, HEADS, 16, dropout=0.0, batch_first=True)
    prefix = "self_attn." if kind == "layer" else "layers.0.self_attn."
    zeroed, pruned = pair(layer if kind == "layer" else nn.TransformerEncoder(layer, 1), prefix)
    (x,) = tensors(2, 5)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for training in (True, False):
        zeroed.train(training)
        pruned.train(training)
        same(pruned(x), zeroed(x))
        with torch.no_grad():  # where torch would take its kernels for inference, and nested tensors for the padding
            expected = zeroed(x, src_key_padding_mask=padding)
            y = pruned(x, src_key_padding_mask=padding)
            same(y[~padding], expected[~padding])


def test_a_causal_hint_needs_its_mask() -> None:
    _, pruned = pair(nn.MultiheadAttention(STREAM, HEADS, batch_first=True))
    (x,) = tensors(2, 5)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        pruned(x, x, x, is_causal=True)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_keys_that_no_projection_makes_are_refused(option: str) -> None:
    module = nn.MultiheadAttention(STREAM, HEADS, **{option: True})
    with pytest.raises(WorkError, match="cannot be pruned"):
        keep_slices(module, keep())
