import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_nets import SHAPE, constants, convolution, images, made, producers, quantised_inputs, residual, write

import deploy.onnx_file
from compress.errors import InputError, MissingExtraError
from deploy.onnx_file import load_onnx, read_onnx, write_onnx
from deploy.precision import Precision, Target
from deploy.precision.calibration import Ranges, calibrate
from deploy.precision.quantisation import Quantised, quantise

KINDS: list[tuple[Precision, Target]] = [("int8", "cpu"), ("int8", "gpu"), ("fp8", "gpu")]


def run(path: Path, batch: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    # ONNX Runtime's optimiser takes Relu out before QuantizeLinear to fp8, and lets MaxPool take fp8.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(str(path), options).run(None, {"images": batch})[0]


def fused(path: Path, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime executes after all its optimisations."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options)
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def parameters(model: onnx.ModelProto, tensor: str) -> tuple[float, int]:
    """Scale and zero point of the pair after an activation."""
    node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == tensor)
    values = constants(model)
    return float(values[node.input[1]]), int(values[node.input[2]])


@pytest.mark.parametrize(
    ("precision", "target", "scale", "zero_point"),
    [
        ("int8", "cpu", 4 / 255, 64),  # uint8: -1 at 0, 3 at 255; 0 lies at 63.75
        ("int8", "gpu", 3 / 127, 0),
        ("fp8", "gpu", 3 / 448, 0),
    ],
)
def test_scale_of_an_activation(
    tmp_path: Path, precision: Precision, target: Target, scale: float, zero_point: int
) -> None:
    source = convolution(tmp_path / "net.onnx", np.ones((16, 2, 1, 1)))
    gemm = _linear(tmp_path / "linear.onnx") if precision == "fp8" else source
    ranges = {"images": (-1.0, 3.0), "flat": (-1.0, 3.0), "logits": (-2.0, 6.0)}
    quantise(gemm, tmp_path / "q.onnx", precision=precision, target=target, ranges=ranges)
    measured = parameters(load_onnx(tmp_path / "q.onnx"), "flat" if precision == "fp8" else "images")
    assert measured == (pytest.approx(scale, rel=1e-6), zero_point)


def _linear(path: Path, *, transposed: bool = True) -> Path:
    weight = np.random.default_rng(0).standard_normal((5, 32) if transposed else (32, 5))
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["logits"], name="fc", transB=int(transposed)),
    ]
    return write(path, nodes, {"fc.weight": weight, "fc.bias": np.arange(5)}, ["batch", 5])


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_linear_layer_has_a_scale_for_each_output(tmp_path: Path, precision: Precision, transposed: bool) -> None:
    source = _linear(tmp_path / "net.onnx", transposed=transposed)
    weight = constants(load_onnx(source))["fc.weight"]
    model = made(source, precision)
    node = next(node for node in model.graph.node if node.name == "fc")
    dequantise = producers(model)[node.input[1]]
    assert dequantise.attribute[0].i == (0 if transposed else 1)
    largest = np.abs(weight).max(axis=1 if transposed else 0)
    limit = {"int8": 127, "fp8": 448}[precision]
    np.testing.assert_allclose(constants(model)[dequantise.input[1]], largest / limit, rtol=1e-6)
    assert node.input[2] == "fc.bias"  # in fp32
    np.testing.assert_array_equal(constants(model)["fc.bias"], np.arange(5, dtype=np.float32))


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_int8_weights_have_a_scale_for_each_channel(tmp_path: Path, target: Target) -> None:
    weight = np.array([[1.27, -0.5], [0.2, -2.54], [0, 0.127]], np.float32).reshape(3, 2, 1, 1)
    model = made(convolution(tmp_path / "net.onnx", weight), "int8", target)
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    stored, scale, zero_point = (constants(model)[name] for name in producers(model)[node.input[1]].input)
    np.testing.assert_allclose(scale, [0.01, 0.02, 0.001], rtol=1e-5)
    assert stored.dtype == np.int8
    assert stored.reshape(3, 2).tolist() == [[127, -50], [10, -127], [0, 127]]
    assert not zero_point.any()


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_excluded_layer_stays_in_floating_point(tmp_path: Path, target: Target) -> None:
    source = residual(tmp_path / "net.onnx", projected=True)
    ranges = calibrate(source, images(), target=target)
    path = tmp_path / "q.onnx"
    done = quantise(source, path, precision="int8", target=target, ranges=ranges, exclude=["conv?"])
    assert done == Quantised(layers=("stem", "down"), excluded=("conv1", "conv2"))
    model = load_onnx(path)
    weights, before = constants(model), constants(load_onnx(source))
    for name in ("conv1", "conv2"):
        assert quantised_inputs(model, name) in ([], [0])  # on the CPU its input may come from a quantised layer
        np.testing.assert_array_equal(weights[f"{name}.weight"], before[f"{name}.weight"])
    assert "stem.weight" not in weights


def test_weight_of_two_layers_is_stored_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["images", "conv.weight"], ["x"], name="first"),
        helper.make_node("Conv", ["x", "conv.weight"], ["logits"], name="second"),
    ]
    model = made(write(tmp_path / "net.onnx", nodes, {"conv.weight": np.ones((2, 2, 1, 1))}, ["batch", *SHAPE]))
    assert Counter(tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4) == {
        TensorProto.INT8: 1
    }


@pytest.mark.parametrize(("precision", "target"), KINDS)
def test_batch_is_dynamic_metadata_are_kept_and_logits_are_near(
    tmp_path: Path, precision: Precision, target: Target
) -> None:
    source = _linear(tmp_path / "net.onnx")
    model = made(source, precision, target)
    assert {item.key: item.value for item in model.metadata_props} == {"maker": "test"}
    for batch in (1, 3):
        expected = run(source, images(batch))
        actual = run(tmp_path / "quantised.onnx", images(batch))
        assert actual.shape == (batch, 5)
        assert np.abs(actual - expected).max() < 0.1 * np.abs(expected).max()


def test_relu_that_became_the_limit_of_the_last_pair_still_cuts(tmp_path: Path) -> None:
    source = residual(tmp_path / "net.onnx", projected=True)
    made(source, "int8", "cpu")
    expected, actual = run(source, images()), run(tmp_path / "quantised.onnx", images())
    assert actual.min() == 0
    assert np.abs(actual - expected).max() < 0.05 * expected.max()


def test_whole_block_runs_in_integer_kernels_on_the_cpu_and_gives_floats(tmp_path: Path) -> None:
    source = residual(tmp_path / "net.onnx", projected=True)
    made(source, "int8", "cpu")
    operators = fused(tmp_path / "quantised.onnx", tmp_path)
    assert operators["QLinearConv"] == 4
    assert operators["QLinearAdd"] == 1
    assert operators["Conv"] == operators["Add"] == operators["Relu"] == 0
    source = _linear(tmp_path / "linear.onnx")
    made(source, "int8", "cpu")
    operators = fused(tmp_path / "quantised.onnx", tmp_path)
    assert operators["QGemm"] == 1
    assert operators["DequantizeLinear"] == 0  # the product itself gives floats, so logits have more than 256 levels


@pytest.mark.parametrize(("precision", "target"), KINDS)
def test_large_weights_lie_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, target: Target
) -> None:
    small = _linear(tmp_path / "small.onnx")
    expected = run(small, images())
    monkeypatch.setattr(deploy.onnx_file, "MAX_INLINE_BYTES", 100)
    monkeypatch.setattr(onnx, "save_model", _save_all(onnx.save_model))
    source, path = tmp_path / "net.onnx", tmp_path / "q.onnx"
    write_onnx(load_onnx(small), source)
    assert (tmp_path / "net.onnx.data").stat().st_size >= 5 * 32 * 4
    quantise(source, path, precision=precision, target=target, ranges=calibrate(source, images(), target=target))
    assert (tmp_path / "q.onnx.data").stat().st_size >= 5 * 32
    assert np.abs(run(path, images()) - expected).max() < 0.1 * np.abs(expected).max()


def _save_all(save: Callable[..., None]) -> Callable[..., None]:
    """Put small tensors outside the file too, which ONNX leaves inside by default."""
    return lambda *arguments, **options: save(*arguments, **options | {"size_threshold": 0})


def ranges_of(source: Path) -> Ranges:
    return calibrate(source, images(), target="gpu")


@pytest.mark.parametrize(("precision", "target"), [("fp8", "cpu"), ("int8", "any"), ("fp16", "any")])
def test_pairing_that_is_not_made_is_refused(tmp_path: Path, precision: Precision, target: Target) -> None:
    source = _linear(tmp_path / "net.onnx")
    with pytest.raises(InputError, match=f"No {precision} file is made for {target}; choose one of fp8 for gpu, int8"):
        quantise(source, tmp_path / "q.onnx", precision=precision, target=target, ranges=ranges_of(source))


def test_ranges_of_another_network_are_refused(tmp_path: Path) -> None:
    source = _linear(tmp_path / "net.onnx")
    with pytest.raises(InputError, match="no range for the activation flat"):
        quantise(source, tmp_path / "q.onnx", precision="int8", target="gpu", ranges={"images": (0, 1)})


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_excluding_everything_is_refused_and_nothing_is_written(tmp_path: Path, target: Target) -> None:
    source = _linear(tmp_path / "net.onnx")
    with pytest.raises(InputError, match=r"Nothing of .* can be quantised"):
        made(source, "int8", target, "*")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    with pytest.raises(InputError, match='No layer is called "fd"; did you mean fc'):
        made(source, "int8", target, "fd")


@pytest.mark.parametrize(("precision", "opset", "needed"), [("int8", 12, 13), ("fp8", 18, 19)])
def test_old_operator_set_is_refused(tmp_path: Path, precision: Precision, opset: int, needed: int) -> None:
    node = helper.make_node("Conv", ["images", "conv.weight"], ["logits"], name="conv")
    weight = {"conv.weight": np.ones((2, 2, 1, 1))}
    source = write(tmp_path / "net.onnx", [node], weight, ["batch", *SHAPE], opset=opset)
    with pytest.raises(InputError, match=f"operator set {opset}, but {precision} needs {needed} or later"):
        quantise(source, tmp_path / "q.onnx", precision=precision, target="gpu", ranges={"images": (0, 1)})


def test_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="not a readable ONNX file"):
        quantise(tmp_path / "net.onnx", tmp_path / "q.onnx", precision="int8", target="gpu", ranges={})


def test_source_is_left_as_it_was(tmp_path: Path) -> None:
    source = residual(tmp_path / "net.onnx", projected=True)
    before = source.read_bytes()
    first = made(source, "int8", "cpu").SerializeToString(deterministic=True)
    assert made(source, "int8", "cpu").SerializeToString(deterministic=True) == first
    assert source.read_bytes() == before
    assert read_onnx(source).graph.node[0].input[1] == "stem.weight"


def test_missing_onnxruntime_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _linear(tmp_path / "net.onnx")
    ranges = ranges_of(source)
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(MissingExtraError, match=r"espalier\[cpu\]"):
        quantise(source, tmp_path / "q.onnx", precision="int8", target="cpu", ranges=ranges)
