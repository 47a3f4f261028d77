"""Symmetric Q/DQ pairs, int8 or fp8, written into an ONNX graph.

    q = round(clip(x / scale)), x' = q · scale, scale = max|x| / limit

with the limit 127 for int8 and 448, the largest number of E4M3, for fp8; the zero point is 0. So does TensorRT compute,
see "Quantization Schemes" in its documentation: one scale for an activation, one for each output channel of a weight.
"""

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from deploy.precision import Precision
from deploy.precision.calibration import Ranges
from deploy.precision.placement import Placement

LIMITS: dict[Precision, float] = {"int8": 127.0, "fp8": 448.0}
_TYPES: dict[Precision, type] = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}


def symmetric_scale(largest: np.ndarray | float, precision: Precision) -> np.ndarray:
    """float32 scales for the largest absolute values given; 1 where nothing was ever other than 0."""
    scale = np.asarray(largest, np.float32) / np.float32(LIMITS[precision])
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)


def quantise_weight(weight: np.ndarray, axis: int, precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """The weight in the precision's own type, and its scales, one for each index of `axis`."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    scale = symmetric_scale(np.abs(weight).max(axis=others), precision)
    scaled = np.clip(weight / np.expand_dims(scale, others), -LIMITS[precision], LIMITS[precision])
    return (np.rint(scaled) if precision == "int8" else scaled).astype(_TYPES[precision]), scale


def insert_pairs(graph: onnx.GraphProto, placement: Placement, ranges: Ranges, precision: Precision) -> None:
    """Write the pairs of `placement` into the graph.

    An activation has one pair however many nodes read it. A weight is stored quantised, with the second half only.
    """
    writer = _Writer(graph, precision)
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if (index := placement.inputs.get(node.name)) is not None:
            name = node.input[index]
            node.input[index] = writer.activation(name, max(map(abs, ranges[name])))
        if (axis := placement.weights.get(node.name)) is not None:
            node.input[1] = writer.weight(node.input[1], axis)
        graph.node.append(node)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


class _Writer:
    """Adds Q/DQ nodes at the end of the graph, so that they stand before the node that is added next."""

    def __init__(self, graph: onnx.GraphProto, precision: Precision) -> None:
        self._graph = graph
        self._precision = precision
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._done: dict[str, str] = {}

    def activation(self, name: str, largest: float) -> str:
        """Name of what the activation is after its pair."""
        if name not in self._done:
            parameters = self._parameters(name, symmetric_scale(largest, self._precision))
            quantised = f"{name}/quantised"
            self._add("QuantizeLinear", [name, *parameters], quantised)
            self._done[name] = self._add("DequantizeLinear", [quantised, *parameters], f"{name}/dequantised")
        return self._done[name]

    def weight(self, name: str, axis: int) -> str:
        """Name of what the weight is after dequantisation, with scales along `axis`."""
        prefix = f"{name}/axis{axis}"
        if prefix not in self._done:
            quantised, scale = quantise_weight(numpy_helper.to_array(self._weights[name]), axis, self._precision)
            parameters = self._parameters(prefix, scale)
            stored = self._store(f"{prefix}/quantised", quantised)
            inputs = [stored, *parameters]
            self._done[prefix] = self._add("DequantizeLinear", inputs, f"{prefix}/dequantised", axis=axis)
        return self._done[prefix]

    def _parameters(self, prefix: str, scale: np.ndarray) -> tuple[str, str]:
        """Scale and zero point; the latter is 0 and there for its type, which QuantizeLinear writes."""
        zero: np.ndarray = np.zeros(scale.shape, _TYPES[self._precision])
        return self._store(f"{prefix}/scale", scale), self._store(f"{prefix}/zero_point", zero)

    def _store(self, name: str, array: np.ndarray) -> str:
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _add(self, operator: str, inputs: list[str], output: str, axis: int | None = None) -> str:
        self._graph.node.append(helper.make_node(operator, inputs, [output], name=f"{output}/{operator}", axis=axis))
        return output
