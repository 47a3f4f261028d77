from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from onnx_nets import SHAPE, images, made, producers, quantised_inputs, residual, write

from deploy.precision.calibration import calibrate
from deploy.precision.quantisation import quantise


@pytest.mark.parametrize("projected", [False, True])
def test_residual_addition_has_exactly_one_quantised_input_the_shortcut(tmp_path: Path, projected: bool) -> None:
    model = made(residual(tmp_path / "net.onnx", projected=projected))
    assert quantised_inputs(model, "add") == [0]
    shortcut = next(node for node in model.graph.node if node.name == "add").input[0]
    assert producers(model)[shortcut].input[0].split("/")[0] == ("short" if projected else "x")
    for name in ("stem", "conv1", "conv2"):
        assert quantised_inputs(model, name) == [0, 1]
    # One pair for x, whoever reads it; none after what a convolution gives to the addition or to a Relu.
    pairs = Counter(node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear")
    assert pairs == Counter(["images", "x", "r1"] + ["short"] * projected)


def test_addition_stays_alone_where_its_convolution_is_in_floating_point(tmp_path: Path) -> None:
    source = residual(tmp_path / "net.onnx", projected=False)
    assert quantised_inputs(made(source, "int8", "gpu", "conv2"), "add") == []
    assert quantised_inputs(made(source, "int8", "gpu", "add"), "add") == []


def test_squeeze_excite_stays_in_floating_point_on_the_gpu(tmp_path: Path) -> None:
    weights = {"stem.weight": np.ones((4, 2, 1, 1)), "gate.weight": np.ones((4, 4, 1, 1))}
    nodes = [
        helper.make_node("Conv", ["images", "stem.weight"], ["x"], name="stem"),
        helper.make_node("GlobalAveragePool", ["x"], ["mean"], name="pool"),
        helper.make_node("Conv", ["mean", "gate.weight"], ["g"], name="gate"),
        helper.make_node("HardSigmoid", ["g"], ["h"], name="sigmoid"),
        helper.make_node("Mul", ["x", "h"], ["logits"], name="scale"),
    ]
    model = made(write(tmp_path / "net.onnx", nodes, weights, ["batch", 4, 4, 4]))
    assert [quantised_inputs(model, name) for name in ("stem", "gate", "scale")] == [[0, 1], [], []]


def test_fp8_leaves_out_convolutions_without_a_kernel(tmp_path: Path) -> None:
    shapes = {"few": (16, 2, 1, 1), "good": (16, 16, 3, 3), "large": (16, 16, 7, 7), "grouped": (32, 8, 3, 3)}
    nodes, last = [], "images"
    for name, shape in shapes.items():
        output = "logits" if name == "grouped" else name
        pad, group = shape[2] // 2, 2 if name == "grouped" else 1
        inputs = [last, f"{name}.weight"]
        nodes.append(helper.make_node("Conv", inputs, [output], name=name, pads=[pad] * 4, group=group))
        last = output
    weights = {f"{name}.weight": np.ones(shape) for name, shape in shapes.items()}
    source = write(tmp_path / "net.onnx", nodes, weights, ["batch", 32, 4, 4])
    ranges = calibrate(source, images(), target="gpu")
    done = quantise(source, tmp_path / "q.onnx", precision="fp8", target="gpu", ranges=ranges)
    assert done.layers == ("good",)
    assert len(quantise(source, tmp_path / "q.onnx", precision="int8", target="gpu", ranges=ranges).layers) == 4


def test_product_of_two_activations_stays_in_floating_point_on_the_gpu(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["images", "linear.weight"], ["x"], name="linear"),
        helper.make_node("MatMul", ["x", "images"], ["logits"], name="attention"),
    ]
    weights = {"linear.weight": np.ones((4, 4))}
    model = made(write(tmp_path / "net.onnx", nodes, weights, ["batch", *SHAPE]))
    assert [quantised_inputs(model, name) for name in ("linear", "attention")] == [[0, 1], []]
