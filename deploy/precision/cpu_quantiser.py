"""int8 for ONNX Runtime's CPU kernels, by ONNX Runtime's own quantiser: it knows which patterns its kernels fuse."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx

from compress.errors import MissingExtraError
from deploy.precision.calibration import Ranges
from deploy.precision.placement import activation_shapes

OPERATORS = (
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Conv",
    "Flatten",
    "Gather",
    "Gemm",
    "GlobalAveragePool",
    "LeakyRelu",
    "MatMul",
    "MaxPool",
    "Mul",
    "Pad",
    "Relu",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
"""Operators with an integer kernel on the CPU, or that move bytes and so need none.

ONNX Runtime quantises some more, among them LayerNormalization, for which the CPU has no integer kernel: it would
lose accuracy and win nothing.
"""


def quantise_for_cpu(model: onnx.ModelProto, ranges: Ranges, exclude: Collection[str]) -> onnx.ModelProto:
    """Quantise activations to uint8 and weights to int8 per output channel.

    The graph's outputs stay in floating point: with 256 levels of logits, classes would tie.

    Args:
        ranges: of every activation that is an input or output of a node of `OPERATORS`.
        exclude: names of nodes.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    try:
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", "Quantising for the CPU") from error
    bounds: dict[str, Any] = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    makers = {name: node.name for node in model.graph.node for name in node.output}
    quantiser = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,  # 7-bit weights, for CPUs without VNNI
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, bounds),
        nodes_to_quantize=[],
        nodes_to_exclude=sorted(exclude),
        op_types_to_quantize=list(OPERATORS),
        extra_options={},
    )
    quantiser.quantize_model()
    quantiser.model.topological_sort()
    quantised: onnx.ModelProto = quantiser.model.model
    _free_outputs(quantised.graph, makers)
    return quantised


def sequence_arithmetic(graph: onnx.ModelProto) -> frozenset[str]:
    """Names of the additions and multiplications of sequences, (N, tokens, channels), which stay in floating point.

    The residual stream of a transformer holds outliers, so one scale for all of it is too coarse: of a ViT-B/32 with
    random weights the largest error falls from 33 to 6 % of the largest logit (2.9 to 2.5 times the speed of fp32).
    """
    shapes = activation_shapes(graph)
    return frozenset(
        node.name
        for node in graph.graph.node
        if node.op_type in ("Add", "Mul") and len(shapes.get(node.output[0], ())) == 3
    )


def _free_outputs(graph: onnx.GraphProto, makers: Mapping[str, str]) -> None:
    """Take out the Q/DQ pair before each output of the graph, where nothing else reads from it.

    Args:
        makers: name of each tensor -> name of the node that made it before quantisation. Where it is another one now, a
            Relu or Clip between them has become the lower limit of the pair, which must stay.
    """
    producers = {name: node for node in graph.node for name in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    for output in graph.output:
        dequantise = producers[output.name]
        quantise = producers.get(dequantise.input[0])
        if quantise is None or (quantise.op_type, dequantise.op_type) != ("QuantizeLinear", "DequantizeLinear"):
            continue
        maker = producers.get(quantise.input[0])
        shared = uses[quantise.input[0]] > 1 or uses[dequantise.input[0]] > 1 or uses[output.name] > 0
        if maker is None or maker.name != makers[output.name] or shared:
            continue
        maker.output[list(maker.output).index(quantise.input[0])] = output.name
        graph.node.remove(quantise)
        graph.node.remove(dequantise)
