"""The embedded ONNX model, executed by ONNX Runtime on one CPU thread.

ONNX Runtime's CPU kernels lack bfloat16, so a model that uses it is computed in float32 throughout: its results are
more exact than a GPU's.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from tests.fakes.plan import Plan, Shape

TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype"})


class Session:
    """Runs a plan's model; the ONNX Runtime session is made once, when first needed."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._session: Any = None
        self._shapes: dict[tuple[tuple[str, Shape], ...], dict[str, Shape]] = {}

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by input name in, arrays by output name out; bfloat16 goes in, float32 comes out for it."""
        given = {
            name: array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array
            for name, array in feeds.items()
        }
        names = [tensor.name for tensor in self._plan.header.outputs]
        return dict(zip(names, self._open().run(names, given), strict=True))

    def output_shapes(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        """The shapes of the outputs for these shapes of the inputs."""
        key = tuple(sorted(inputs.items()))
        if key not in self._shapes:
            self._shapes[key] = self._named_shapes(inputs) or self._shapes_of_zeros(inputs)
        return self._shapes[key]

    def _named_shapes(self, inputs: Mapping[str, Shape]) -> dict[str, Shape] | None:
        """By the names of the dimensions, where the outputs have none but those of the inputs."""
        sizes = {
            name: size
            for tensor in self._plan.header.inputs
            for name, size in zip(tensor.dimensions, inputs[tensor.name], strict=True)
            if name
        }
        shapes = {}
        for tensor in self._plan.header.outputs:
            if any(
                size == -1 and name not in sizes for name, size in zip(tensor.dimensions, tensor.shape, strict=True)
            ):
                return None
            shapes[tensor.name] = tuple(
                sizes[name] if size == -1 else size for name, size in zip(tensor.dimensions, tensor.shape, strict=True)
            )
        return shapes

    def _shapes_of_zeros(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        import onnxruntime

        kinds = {entry.name: entry.type for entry in self._open().get_inputs()}
        zeros = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, _ORT_TYPES[kinds[name]])).numpy()
            for name, shape in inputs.items()
        }
        return {name: array.shape for name, array in self.run(zeros).items()}

    def _open(self) -> Any:
        if self._session is None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            # Beyond the basic optimisations ONNX Runtime 1.31 computes networks with Q/DQ pairs of float8 wrongly.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            model = onnx.load_from_string(self._plan.model)
            if any(kind == TensorProto.BFLOAT16 for kind in _element_types(model)):
                _widen(model)
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        return self._session


_ORT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def _values(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    yield from [*model.graph.input, *model.graph.output, *model.graph.value_info]


def _element_types(model: onnx.ModelProto) -> Iterator[int]:
    for value in _values(model):
        yield value.type.tensor_type.elem_type
    for tensor in model.graph.initializer:
        yield tensor.data_type


def _widen(model: onnx.ModelProto) -> None:
    """Make float32 of every bfloat16, in place."""
    for value in _values(model):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in model.graph.initializer:
        _widen_tensor(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            elif attribute.name in TYPE_ATTRIBUTES and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.BFLOAT16:
        wide = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
