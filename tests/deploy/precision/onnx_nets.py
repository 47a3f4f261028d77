"""Networks of a few nodes as ONNX files, with weights whose quantised values are known beforehand."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy.onnx_file import load_onnx
from deploy.precision import Precision, Target
from deploy.precision.calibration import calibrate
from deploy.precision.quantisation import quantise

SHAPE = (2, 4, 4)
"""(C, H, W) of the images that every network here takes."""


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, np.ndarray],
    output: Sequence[int | str],
    opset: int = 20,
) -> Path:
    """A file with input "images" (batch, *SHAPE) and the output "logits" of the shape given."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(model, {"maker": "test"})
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def convolution(path: Path, weight: np.ndarray, **attributes: int) -> Path:
    """One 1 × 1 convolution "conv" without bias."""
    node = helper.make_node("Conv", ["images", "conv.weight"], ["logits"], name="conv", **attributes)
    return write(path, [node], {"conv.weight": weight}, ["batch", len(weight), *SHAPE[1:]])


def residual(path: Path, *, projected: bool) -> Path:
    """relu(conv2(relu(conv1(x))) + shortcut(x)) with 4 channels, x = relu(stem(images)); the shortcut is x or a
    convolution of it."""
    rng = np.random.default_rng(0)
    weights = {"stem.weight": rng.standard_normal((4, 2, 1, 1))}
    weights |= {f"{name}.weight": rng.standard_normal((4, 4, 1, 1)) for name in ("conv1", "conv2")}
    nodes = [
        helper.make_node("Conv", ["images", "stem.weight"], ["stem"], name="stem"),
        helper.make_node("Relu", ["stem"], ["x"], name="relu0"),
        helper.make_node("Conv", ["x", "conv1.weight"], ["c1"], name="conv1"),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "conv2.weight"], ["c2"], name="conv2"),
    ]
    if projected:
        weights["down.weight"] = rng.standard_normal((4, 4, 1, 1))
        nodes.append(helper.make_node("Conv", ["x", "down.weight"], ["short"], name="down"))
    # The shortcut comes first, as in `identity + out`: the order of the inputs must not matter.
    nodes.append(helper.make_node("Add", ["short" if projected else "x", "c2"], ["sum"], name="add"))
    nodes.append(helper.make_node("Relu", ["sum"], ["logits"], name="relu2"))
    return write(path, nodes, weights, ["batch", 4, 4, 4])


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def quantised_inputs(model: onnx.ModelProto, name: str) -> list[int]:
    """Indices of the inputs of node `name` that come out of a DequantizeLinear."""
    made = producers(model)
    node = next(node for node in model.graph.node if node.name == name)
    return [index for index, item in enumerate(node.input) if item in made and made[item].op_type == "DequantizeLinear"]


def images(count: int = 8) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, *SHAPE)).astype(np.float32)


def made(source: Path, precision: Precision = "int8", target: Target = "gpu", *exclude: str) -> onnx.ModelProto:
    """The network of `source` quantised beside it as quantised.onnx."""
    path = source.with_name("quantised.onnx")
    ranges = calibrate(source, images(), target=target)
    quantise(source, path, precision=precision, target=target, ranges=ranges, exclude=exclude)
    return load_onnx(path)
