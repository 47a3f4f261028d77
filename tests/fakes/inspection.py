"""The engine inspector."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from tests.fakes.classes import Borrowed, Model
from tests.fakes.interfaces import ErrorReporter
from tests.fakes.plan import Layer, Tensor

if TYPE_CHECKING:
    from tests.fakes.running import CudaEngine

# member of DataType -> the inspector's word for it, where it is not the member's own name
WORDS = {"FLOAT": "Float", "HALF": "Half", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32", "INT64": "Int64"}
UNKNOWN = "N/A due to dynamic shapes"


class EngineInspector(ErrorReporter):
    """Layers as JSON; the keys are those of NVIDIA's page on migrating IEngineInspector from 10.x to 11.x."""

    public = "EngineInspector"
    settable: ClassVar[Mapping[str, str]] = {**ErrorReporter.settable, "execution_context": "IExecutionContext"}
    engine = Borrowed("the engine of an inspector")
    execution_context = Borrowed("the execution context of an inspector")

    def __init__(self, engine: "CudaEngine") -> None:
        super().__init__(engine.api, engine)
        self.engine = engine.api.expose(engine)
        self._built = engine
        self._known = {tensor.name: tensor for tensor in engine.plan.tensors} | engine.tensors

    def get_engine_information(self, format: Any) -> str:
        layers = [self._layer(layer) for layer in self._built.plan.layers]
        if self._built.plan.verbosity == "NONE":
            layers = []
        if format.name != "JSON":
            return "Layers:\n" + "\n".join(str(layer) for layer in layers)
        if self.api.major == 10:
            return json.dumps({"Layers": layers, "Bindings": list(self._built.tensors)})
        tensors = [self._tensor(tensor) for tensor in self._built.tensors.values()]
        return json.dumps({"ProfilingVerbosity": self._built.plan.verbosity, "Layers": layers, "I/O Tensors": tensors})

    def get_layer_information(self, layer_index: int, format: Any) -> str:
        layer = self._layer(self._built.plan.layers[layer_index])
        return json.dumps(layer) if format.name == "JSON" else str(layer)

    def _layer(self, layer: Layer) -> Any:
        if self._built.plan.verbosity != "DETAILED":
            return layer.name
        return {
            "Name": layer.name,
            "LayerType": layer.operator,
            "Inputs": [self._operand(name) for name in layer.inputs],
            "Outputs": [self._operand(name) for name in layer.outputs],
            "TacticName": f"fake_{layer.operator.lower()}",
            "StreamId": 0,
            "Metadata": f"[ONNX Layer: {layer.name}]",
        }

    def _operand(self, name: str) -> dict[str, Any]:
        """Types and sizes are known for static shapes, and for all with an execution context of known shapes."""
        tensor = self._known.get(name)
        if tensor is None:
            return {"Name": name}
        sizes = self._sizes(tensor)
        word = UNKNOWN if -1 in sizes else _word(tensor)
        if self.api.major == 10:
            return {"Name": name, "Dimensions": sizes, "Format/Datatype": word}
        return {"Name": name, "Dimensions": sizes, "Format": "Row major linear", "DataType": word}

    def _sizes(self, tensor: Tensor) -> list[int]:
        if self.execution_context is None:
            return list(tensor.shape)
        context = self.api.model(self.execution_context)
        sizes = {
            name: size
            for entry in self._built.plan.inputs
            for name, size in zip(entry.dimensions, context.get_tensor_shape(entry.name), strict=True)
            if name
        }
        return [
            sizes.get(name, size) if size == -1 else size
            for name, size in zip(tensor.dimensions, tensor.shape, strict=True)
        ]

    def _tensor(self, tensor: Tensor) -> dict[str, Any]:
        given = self._built.is_input(tensor.name)
        profiles = [
            {"MinShape": least, "OptShape": best, "MaxShape": most, "Format": "Row major linear (kLINEAR)"}
            for least, best, most in (
                self._built.profile_shapes(tensor.name, index) for index in range(len(self._built.plan.profiles))
            )
        ]
        return {
            "Name": tensor.name,
            "IOMode": "Input" if given else "Output",
            "DataType": _word(tensor),
            "Dimensions": list(tensor.shape),
            "Location": "Device",
            "IsShapeInferenceIO": False,
            "ProfileInfo": profiles if given else [],
        }


def _word(tensor: Tensor) -> str:
    return WORDS.get(tensor.data_type, tensor.data_type)


MODELS: tuple[type[Model], ...] = (EngineInspector,)
