"""The layers of a TensorRT engine: what the inspector says of them and how long each takes.

TensorRT fuses and reorders, so these are not the nodes of the ONNX file. The inspector's JSON changed with TensorRT 11
(docs.nvidia.com/deeplearning/tensorrt, "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x"): a tensor's
"Format/Datatype" became "Format" and "DataType". Both come out alike here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compress.errors import WorkError

if TYPE_CHECKING:
    import tensorrt

_DTYPES = (
    (r"bf16|bfloat16", "bfloat16"),
    (r"fp16|half|float16", "float16"),
    (r"fp8|float8", "float8"),
    (r"fp4|float4", "float4"),
    (r"uint8", "uint8"),
    (r"int8", "int8"),
    (r"int4", "int4"),
    (r"int32", "int32"),
    (r"int64", "int64"),
    (r"bool", "bool"),
    (r"fp32|float", "float32"),
)
"""What the inspector may write for a type -> our name of it; the first that matches counts."""


@dataclass(frozen=True)
class LayerTensor:
    """One input or output of a layer."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """NumPy's name of the type; empty where the inspector gives none."""
    format: str
    """Memory layout in TensorRT's words."""


@dataclass(frozen=True)
class Layer:
    """One layer as it is executed; of an engine without detailed verbosity only the name is known."""

    name: str
    kind: str = ""
    inputs: tuple[LayerTensor, ...] = ()
    outputs: tuple[LayerTensor, ...] = ()
    tactic: str = ""
    """Name of the kernel, or its number where it has none."""
    origin: str = ""
    """ONNX nodes that it came from, in TensorRT's words."""


def read_layers(text: str) -> tuple[Layer, ...]:
    """The layers in the inspector's JSON, of TensorRT 10 or 11.

    Raises:
        WorkError: it is not the JSON that we know.
    """
    try:
        return tuple(_layer(item) for item in json.loads(text)["Layers"])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise WorkError(
            f"The JSON of TensorRT's engine inspector has no form that is known here ({type(error).__name__}: {error});"
            " use a version of TensorRT that espalier doctor approves."
        ) from error


def _layer(item: str | Mapping[str, Any]) -> Layer:
    if isinstance(item, str):
        return Layer(item)
    return Layer(
        name=item["Name"],
        kind=item.get("LayerType", ""),
        inputs=tuple(_tensor(tensor) for tensor in item.get("Inputs", ())),
        outputs=tuple(_tensor(tensor) for tensor in item.get("Outputs", ())),
        tactic=str(item.get("TacticName") or item.get("TacticValue") or ""),
        origin=item.get("Metadata", ""),
    )


def _tensor(item: Mapping[str, Any]) -> LayerTensor:
    both = item.get("Format/Datatype", "")
    layout = item.get("Format", both)
    return LayerTensor(
        name=item.get("Name", ""),
        shape=tuple(item.get("Dimensions", ())),
        dtype=_dtype(item.get("DataType", item.get("Datatype", both))),
        format=layout,
    )


def _dtype(text: str) -> str:
    return next((name for pattern, name in _DTYPES if re.search(pattern, text, re.IGNORECASE)), "")


class LayerTimes:
    """Milliseconds by layer of one inference after another, as TensorRT's profiler reports them."""

    def __init__(self) -> None:
        self._current: dict[str, float] = {}

    def report(self, layer: str, milliseconds: float) -> None:
        """Note the time of a layer; the times of a layer that ran several times, as in a loop, add up."""
        self._current[layer] = self._current.get(layer, 0.0) + milliseconds

    def take(self) -> dict[str, float]:
        """The times since the last call, in the order of execution."""
        taken, self._current = self._current, {}
        return taken


def make_profiler(trt: ModuleType, times: LayerTimes) -> "tensorrt.IProfiler":
    """Hands the time of each layer on to `times`; keep it alive as long as the context that it is set on."""

    class Profiler(trt.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times.report(layer_name, ms)

    return Profiler()
