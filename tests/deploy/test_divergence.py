from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from compress.errors import InputError
from deploy.divergence import Divergence, first_divergence
from deploy.export import export_onnx
from deploy.precision.calibration import calibrate
from deploy.precision.quantisation import quantise

IMAGES = np.random.default_rng(0).standard_normal((10, 3, 8, 8)).astype(np.float32)
LAYERS = ("stem", "block1.conv1", "block1.conv2", "block2.shortcut", "block2.conv1", "block2.conv2", "head")


class Block(nn.Module):
    """The shortcut runs before or after the convolutions, so that either branch comes first in the file."""

    def __init__(self, width: int, out: int, *, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out, 1) if shortcut else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(x)
        return (self.conv2(self.norm1(self.conv1(x)).relu()) + shortcut).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block1 = Block(6, 6, shortcut=False)
        self.block2 = Block(6, 8, shortcut=True)
        self.head = nn.Linear(8, 5, bias=False)
        for layer in self.modules():  # as drawn by default, biases drown what the images say
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.block1(self.stem(images).relu()))
        # The size of an activation is no activation.
        return self.head(x.mean((2, 3)).reshape(x.shape[0], 8))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(Net(), tmp_path_factory.mktemp("net") / "net.fp32.onnx", image_shape=(3, 8, 8))


def corrupt(source: Path, layer: str, path: Path) -> Path:
    """Change one weight of a layer, in int8 half of them."""
    model = onnx.load(source)
    named = [item for item in model.graph.initializer if item.name.startswith(f"{layer}.weight")]
    (weight,) = (item for item in named if len(item.dims) > 1)  # the others are scales and zero points
    values = numpy_helper.to_array(weight).copy()
    if values.dtype == np.int8:  # one byte says little against the noise of all
        values[: len(values) // 2] *= -1
    else:
        values.flat[3] += 3
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)
    return path


def converted(source: Path, path: Path, target: str) -> Path:
    ranges = calibrate(source, IMAGES, target=target)
    quantise(source, path, precision="int8", target=target, ranges=ranges)
    return path


def check(found: Divergence | None, layer: str, tolerance: float) -> None:
    assert found is not None
    assert found.first.module == layer
    assert found.first.error > tolerance
    assert all(probe.error <= tolerance for probe in found.inputs)
    assert set(found.inputs) | {found.first} <= set(found.probes)
    assert layer in str(found)


@pytest.mark.parametrize("layer", LAYERS)
def test_one_wrong_weight_is_found_in_either_branch(source: Path, tmp_path: Path, layer: str) -> None:
    suspect = corrupt(source, layer, tmp_path / "suspect.onnx")
    found = first_divergence(source, suspect, IMAGES, tolerance=1e-4)
    check(found, layer, 1e-4)
    assert all(probe.error < 1e-5 for probe in found.inputs)
    assert found.first.operator == ("Gemm" if layer == "head" else "Conv")
    assert any(node.name == found.first.node for node in onnx.load(source).graph.node)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_wrong_layer_of_a_quantised_file_is_found(source: Path, tmp_path: Path, layer: str, target: str) -> None:
    sound = converted(source, tmp_path / "sound.onnx", target)
    assert first_divergence(source, sound, IMAGES, tolerance=0.1) is None
    found = first_divergence(source, corrupt(sound, layer, tmp_path / "suspect.onnx"), IMAGES, tolerance=0.1)
    check(found, layer, 0.1)


def test_a_sound_file_does_not_diverge(source: Path) -> None:
    assert first_divergence(source, source, IMAGES, tolerance=1e-9) is None


def test_halved_precision(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("modelopt.onnx.autocast", reason="needs the extra quant")
    from deploy.precision.half import to_half

    suspect = tmp_path / "net.fp16.onnx"
    to_half(source, suspect, "fp16", fp32_io=False, samples=IMAGES, exclude=())
    assert first_divergence(source, suspect, IMAGES, tolerance=0.01) is None
    assert first_divergence(source, suspect, IMAGES, tolerance=1e-5) is not None


def test_errors_by_hand(tmp_path: Path) -> None:
    """y = relu(a x), z = b y: the first factor is off by 1 %, the second by 10 %."""

    def write(path: Path, a: float, b: float) -> Path:
        factors = [numpy_helper.from_array(np.array([v], np.float32), name) for name, v in (("a", a), ("b", b))]
        nodes = [
            onnx.helper.make_node("Mul", ["x", "a"], ["ax"], name="first"),
            onnx.helper.make_node("Relu", ["ax"], ["y"], name="cut"),
            onnx.helper.make_node("Mul", ["y", "b"], ["z"], name="second"),
        ]
        x, z = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xz")
        graph = onnx.helper.make_graph(nodes, "hand", [x], [z], factors)
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
        return path

    exact = write(tmp_path / "exact.onnx", 2, 3)
    wrong = write(tmp_path / "wrong.onnx", 2.02, 3.3)
    images = np.arange(48, dtype=np.float32).reshape(12, 4)  # two inferences: 8 and 4
    found = first_divergence(exact, wrong, images, tolerance=0.05)
    assert found is not None
    assert (found.first.node, found.first.operator, found.first.tensor, found.first.module) == (
        "second",
        "Mul",
        "z",
        "",
    )
    assert found.first.error == pytest.approx(1.01 * 1.1 - 1, rel=1e-4)
    assert [(probe.node, probe.error) for probe in found.inputs] == [("cut", pytest.approx(0.01, rel=1e-4))]
    found = first_divergence(exact, wrong, images, tolerance=0.005)
    assert found is not None
    assert (found.first.node, found.inputs) == ("first", ())
    assert [probe.node for probe in found.probes] == ["first", "second"]
    assert "the network (Mul first) is the first to diverge: relative error 0.01, against 0 at its inputs" in str(found)
    assert first_divergence(exact, wrong, images, tolerance=0.2) is None
    infinite = write(tmp_path / "infinite.onnx", 2, np.inf)
    found = first_divergence(exact, infinite, images, tolerance=10.0)
    assert found is not None
    assert (found.first.node, found.first.error) == ("second", np.inf)


def test_values_that_fp16_rounds_to_zero(tmp_path: Path) -> None:
    """ONNX Runtime computes fp16 in fp32 on the CPU, and what is given out must have been rounded all the same."""

    def write(path: Path, dtype: type) -> Path:
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        x, z = (onnx.helper.make_tensor_value_info(name, kind, ["batch", 4]) for name in "xz")
        node = onnx.helper.make_node("Mul", ["x", "a"], ["z"], name="shrink")
        graph = onnx.helper.make_graph(
            [node], "tiny", [x], [z], [numpy_helper.from_array(np.array([1e-4], dtype), "a")]
        )
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
        return path

    images = np.full((2, 4), 1e-4, np.float32)  # the smallest number of fp16 is 6e-8
    found = first_divergence(
        write(tmp_path / "fp32.onnx", np.float32), write(tmp_path / "fp16.onnx", np.float16), images, tolerance=0.5
    )
    assert found is not None
    assert found.first.error == 1


def test_bad_input(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tolerance"):
        first_divergence(source, source, IMAGES, tolerance=0.0)
    with pytest.raises(InputError, match="no images"):
        first_divergence(source, source, IMAGES[:0], tolerance=0.1)
    with pytest.raises(InputError, match="takes images"):
        first_divergence(source, source, IMAGES[:, :, :4], tolerance=0.1)
    with pytest.raises(InputError, match=r"missing\.onnx"):
        first_divergence(source, tmp_path / "missing.onnx", IMAGES, tolerance=0.1)
    torch.manual_seed(0)
    wider = Net()
    wider.head = nn.Linear(8, 6, bias=False)
    other = export_onnx(wider, tmp_path / "other.onnx", image_shape=(3, 8, 8))
    with pytest.raises(InputError, match="not of one network"):
        first_divergence(source, other, IMAGES, tolerance=0.1)
    renamed = onnx.load(source)
    renamed.graph.output[0].name = renamed.graph.node[-1].output[0] = "scores"
    onnx.save(renamed, tmp_path / "renamed.onnx")
    with pytest.raises(InputError, match=r"logits .* scores: they are not of one network"):
        first_divergence(source, tmp_path / "renamed.onnx", IMAGES, tolerance=0.1)
