import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from torch import nn

from benchmarks.harness.counters import macs
from compress.errors import InputError, WorkError
from deploy.export import export_onnx
from deploy.work import OnnxWork, module_work, onnx_work

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'


def parsed(text: str) -> onnx.ModelProto:
    """The model; what it declares without a value becomes a weight of zeros."""
    model = onnx.parser.parse_model(HEAD + text)
    for value in model.graph.value_info:
        tensor = value.type.tensor_type
        zeros = np.zeros([item.dim_value for item in tensor.shape.dim])
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        model.graph.initializer.append(onnx.numpy_helper.from_array(zeros.astype(dtype), value.name))
    del model.graph.value_info[:]
    return model


def written(path: Path, text: str) -> Path:
    onnx.save(parsed(text), path)
    return path


def counted(tmp_path: Path, text: str, batch: int = 2) -> OnnxWork:
    return onnx_work(written(tmp_path / "net.onnx", text), batch)


@pytest.fixture
def without_fast_path() -> Iterator[None]:
    """PyTorch's fused attention of evaluation mode is one operator, whose multiply-adds its counter does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def vision_transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )


@pytest.mark.usefixtures("without_fast_path")
@pytest.mark.parametrize(
    ("make", "size"),
    [(torchvision.models.resnet18, 32), (torchvision.models.mobilenet_v3_small, 32), (vision_transformer, 32)],
)
def test_multiply_adds_are_those_of_the_network(make: type[nn.Module], size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make()
    path = export_onnx(model, tmp_path / "net.onnx", image_shape=(3, size, size))
    expected = macs(model, torch.zeros(1, 3, size, size))
    work = onnx_work(path, 3)
    assert work.macs == 3 * expected
    assert sum(layer.macs for layer in work.fused) == work.macs
    assert work.uncounted == ()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights * 0.95 < work.traffic_bytes < weights * 1.05 + 3 * 4 * (3 * size * size + 1000)
    assert module_work(model, torch.zeros(3, 3, size, size))[1] == 3 * expected


def test_a_convolution_by_hand(tmp_path: Path) -> None:
    work = counted(
        tmp_path,
        """net (float[batch, 4, 8, 8] x) => (float[batch, 6, 4, 4] y) <float[6, 2, 3, 3] w, float[6] b>
        { y = Conv<group = 2, strides = [2, 2], pads = [1, 1, 1, 1]>(x, w, b) }""",
    )
    (layer,) = work.layers
    assert layer.macs == 2 * 6 * 4 * 4 * 2 * 9  # images, outputs, inputs of a group, taps
    assert layer.bytes == 4 * (2 * 4 * 8 * 8 + 6 * 2 * 9 + 6 + 2 * 6 * 4 * 4)
    assert (layer.in_channels, layer.out_channels, layer.groups, layer.dtype) == (4, 6, 2, "float32")
    assert work.traffic_bytes == layer.bytes


@pytest.mark.parametrize(
    ("text", "expected", "channels"),
    [
        (  # every input element meets every tap of its group's outputs
            """net (float[batch, 4, 5, 5] x) => (float[batch, 6, 11, 11] y) <float[4, 3, 3, 3] w>
            { y = ConvTranspose<group = 2, strides = [2, 2]>(x, w) }""",
            2 * 4 * 25 * 3 * 9,
            (4, 6),
        ),
        (
            "net (float[batch, 7] x) => (float[batch, 5] y) <float[5, 7] w> { y = Gemm<transB = 1>(x, w) }",
            2 * 35,
            (7, 5),
        ),
        (
            """net (float[batch, 3, 4, 8] x) => (float[batch, 3, 4, 4] y)
            { t = Transpose<perm = [0, 1, 3, 2]>(x)  y = MatMul(x, t) }""",
            2 * 3 * 4 * 4 * 8,
            (8, 4),
        ),
        (
            """net (uint8[batch, 7] x) => (int32[batch, 5] y) <int8[7, 5] w> { y = MatMulInteger(x, w) }""",
            2 * 35,
            (7, 5),
        ),
        (
            """net (uint8[batch, 4, 3, 3] x) => (int32[batch, 2, 3, 3] y) <int8[2, 4, 1, 1] w>
            { y = ConvInteger(x, w) }""",
            2 * 2 * 9 * 4,
            (4, 2),
        ),
    ],
)
def test_other_products_by_hand(text: str, expected: int, channels: tuple[int, int], tmp_path: Path) -> None:
    work = counted(tmp_path, text)
    assert work.macs == expected
    (product,) = [layer for layer in work.layers if layer.macs]
    assert (product.in_channels, product.out_channels) == channels


QUANTISED = """net (float[batch, 4, 8, 8] x) => (float[batch, 6, 8, 8] y)
<float scale = {0.1}, uint8 zero = {128}, float[6] scales, int8[6] zeros, int8[6, 4, 1, 1] weight>
{
    xq = QuantizeLinear(x, scale, zero)
    xd = DequantizeLinear(xq, scale, zero)
    w = DequantizeLinear<axis = 0>(weight, scales, zeros)
    c = Conv(xd, w)
    r = Relu(c)
    q = QuantizeLinear(r, scale, zero)
    y = DequantizeLinear(q, scale, zero)
}"""


def test_a_convolution_between_pairs_moves_bytes(tmp_path: Path) -> None:
    model = parsed(QUANTISED)
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("weight", "conv.weight_quantized")
    for node in model.graph.node:
        node.input[:] = [name.replace("weight", "conv.weight_quantized") for name in node.input]
        node.name = node.output[0]
    onnx.save(model, tmp_path / "net.onnx")
    work = onnx_work(tmp_path / "net.onnx", 2)
    layer = work.of(["c", "r", "q"])
    assert layer.macs == 2 * 6 * 64 * 4
    assert layer.bytes == 2 * 4 * 64 + 6 * 4 + 2 * 6 * 64 + 5  # and scale and zero point of the output
    assert (layer.name, layer.module, layer.dtype) == ("c", "conv", "int8")
    assert [layer.name for layer in work.fused] == ["xq", "c"]


def test_element_wise_nodes_join_the_node_before(tmp_path: Path) -> None:
    work = counted(
        tmp_path,
        """net (float[batch, 4, 8, 8] x) => (float[batch, 4] y) <float[4, 4, 1, 1] v, float[4, 4, 1, 1] w>
        {
            a = Conv(x, v)
            b = Conv(a, w)
            sum = Add(b, a)
            relu = Relu(sum)
            pooled = GlobalAveragePool(relu)
            y = Flatten(pooled)
        }""",
        batch=1,
    )
    assert [(layer.kind, layer.bytes) for layer in work.fused] == [
        ("Conv", 4 * (256 + 16 + 256)),
        ("Conv", 4 * (256 + 16 + 256)),  # its other input, a, is read once
        ("GlobalAveragePool", 4 * (256 + 4)),
    ]


def test_names_that_are_missing_or_doubled_do_not_collide(tmp_path: Path) -> None:
    path = written(tmp_path / "net.onnx", "net (float[batch, 4] x) => (float[batch, 4] y) { a = Relu(x)  y = Tanh(a) }")
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = "n0"
    onnx.save(model, path)
    assert [layer.name for layer in onnx_work(path, 1).layers] == ["Relu a", "Tanh y"]


def test_what_is_not_counted_is_named(tmp_path: Path) -> None:
    work = counted(
        tmp_path,
        'net (float[batch, 4] x, float[4, 4] w) => (float[batch, 4] y) { y = Einsum<equation = "ij,jk->ik">(x, w) }',
        batch=4,
    )
    assert (work.macs, work.uncounted) == (0, ("1 Einsum",))


def test_shapes_that_cannot_be_known_are_refused(tmp_path: Path) -> None:
    text = "net (float[batch, 4] x) => (int64[2, n] y) { y = NonZero(x) }"
    with pytest.raises(WorkError, match=r"shape of y in net\.onnx cannot be inferred"):
        counted(tmp_path, text)
    with pytest.raises(InputError, match="at least 1"):
        counted(tmp_path, text, batch=0)


def test_the_work_goes_to_another_process(tmp_path: Path) -> None:
    work = counted(tmp_path, "net (float[batch, 4] x) => (float[batch, 4] y) <float[4, 4] w> { y = MatMul(x, w) }")
    assert pickle.loads(pickle.dumps(work)) == work  # noqa: S301  our own


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.flat = nn.Flatten()
        self.head = nn.Linear(2 * 16 * 16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.flat(self.up(self.conv(self.conv(x)))))


def test_modules_by_hand() -> None:
    model = Twice().train()
    layers, total = module_work(model, torch.zeros(2, 4, 8, 8))
    found = {layer.name: layer for layer in layers}
    assert found["conv"].macs == 2 * 2 * 4 * 64 * 2 * 9  # called twice
    assert found["up"].macs == 2 * 4 * 64 * 2 * 4
    assert found["head"].macs == 2 * 512 * 3
    assert found["flat"].bytes == 0
    assert found["head"].bytes == 4 * (2 * 512 + 512 * 3 + 3 + 2 * 3)
    assert total == sum(layer.macs for layer in layers)
    assert model.training
    with pytest.raises(WorkError, match="batch of shape"):
        module_work(model, torch.zeros(2, 4, 9, 9))
