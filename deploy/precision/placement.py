"""Where Q/DQ pairs go for kernels that want symmetric types: TensorRT, and ONNX Runtime on CUDA.

The rules follow "Q/DQ Layer-Placement Recommendations" of NVIDIA's TensorRT documentation: quantise the input of every
weighted operation and its weight, leave its output and its bias alone, and quantise the shortcut of a residual
addition, and only the shortcut: the addition is fused into the convolution that makes its other input, which a Q/DQ
pair in between would prevent.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

FP8_MAX_KERNEL = 32
"""Elements of a filter up to which TensorRT has FP8 convolutions (limitations in its release notes since 10.3)."""

FP8_MIN_CHANNELS = 16
"""Channels on either side below which TensorRT may find no FP8 convolution (NVIDIA/TensorRT issue 3987): RGB images."""

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Placement:
    """What is to be quantised.

    weights: name of a weighted node -> axis of the output channels of its weight, which is its second input.
    inputs: name of a node -> index of the one activation among its inputs that is quantised; that of every weighted
        node, and the shortcut of every residual addition.
    """

    weights: Mapping[str, int]
    inputs: Mapping[str, int]


def place(model: onnx.ModelProto, exclude: Collection[str], *, fp8: bool) -> Placement:
    """Decide on every node of `model`.

    Left in floating point besides the nodes named in `exclude`:
    - convolutions of 1 × 1 maps (squeeze-excite): they cost next to nothing, and the whole map hangs on their gates;
    - products of two activations (attention);
    - for FP8, convolutions that TensorRT has no FP8 kernel for: grouped, large filters, few channels.
    """
    shapes = activation_shapes(model)
    weights = {
        node.name: axis
        for node in weighted_nodes(model.graph)
        if node.name not in exclude
        and (axis := _channel_axis(node, shapes)) is not None
        and not _is_one_pixel(node, shapes)
        and (not fp8 or _has_fp8_kernel(node, shapes))
    }
    shortcuts = _shortcuts(model.graph, weights, shapes)
    inputs = dict.fromkeys(weights, 0) | {name: index for name, index in shortcuts.items() if name not in exclude}
    return Placement(weights, inputs)


def weighted_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes that multiply an activation, their first input, with a constant weight, their second."""
    constants = {tensor.name for tensor in graph.initializer}
    return [
        node
        for node in graph.node
        if node.op_type in WEIGHTED and node.input[1] in constants and node.input[0] not in constants
    ]


def activation_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Shapes of activations, and of initialisers too, by name; a dynamic size is its name, "" where it has none."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        sizes = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(item.dim_value if item.HasField("dim_value") else item.dim_param for item in sizes)
    return shapes


def _channel_axis(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int | None:
    """Axis of the output channels of the node's weight; None where there is no scale for each of them."""
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":  # (in, out / groups, ...): an index of axis 1 is one channel of every group
            return 1 if _attribute(node, "group", 1) == 1 else None
        case "Gemm":
            return 0 if _attribute(node, "transB", 0) else 1
        case "MatMul":
            return 1 if len(shapes[node.input[1]]) == 2 else None
    raise AssertionError(node.op_type)


def _is_one_pixel(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> bool:
    sizes = shapes.get(node.input[0], ())[2:]
    return node.op_type == "Conv" and bool(sizes) and all(size == 1 for size in sizes)


def _has_fp8_kernel(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> bool:
    if node.op_type not in ("Conv", "ConvTranspose"):
        return True
    channels, kernel = shapes[node.input[1]][:2], shapes[node.input[1]][2:]
    return (
        _attribute(node, "group", 1) == 1
        and all(isinstance(size, int) and size >= FP8_MIN_CHANNELS for size in channels)
        and math.prod(size for size in kernel if isinstance(size, int)) <= FP8_MAX_KERNEL
    )


def _shortcuts(graph: onnx.GraphProto, weights: Collection[str], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Name of each addition that is fused into a quantised convolution -> index of its other input, the shortcut.

    Where both inputs come from convolutions, as in a block that changes the number of channels, the shortcut is the
    one with fewer nodes on the way from the network's input.
    """
    producers = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input) + Counter(value.name for value in graph.output)
    depths: dict[str, int] = {}
    for node in graph.node:  # in topological order, as the checker demands
        depth = 1 + max((depths.get(name, 0) for name in node.input), default=0)
        depths |= dict.fromkeys(node.output, depth)
    shortcuts = {}
    for node in graph.node:
        if node.op_type != "Add" or shapes.get(node.input[0]) != shapes.get(node.input[1]):
            continue
        fused = [
            index
            for index, name in enumerate(node.input)
            if uses[name] == 1 and name in producers and _is_quantised_convolution(producers[name], weights)
        ]
        if fused:
            main = max(fused, key=[depths[name] for name in node.input].__getitem__)
            shortcuts[node.name] = 1 - main
    return shortcuts


def _is_quantised_convolution(node: onnx.NodeProto, weights: Collection[str]) -> bool:
    return node.op_type == "Conv" and node.name in weights


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((item.i for item in node.attribute if item.name == name), default)
