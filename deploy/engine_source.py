"""What a TensorRT engine is built from: an ONNX file whose types and shapes TensorRT executes."""

from dataclasses import dataclass
from pathlib import Path

import onnx

from compress.errors import InputError
from compress.files import sha256
from deploy import manifest
from deploy.engine_settings import BatchRange
from deploy.metadata import Metadata, decode
from deploy.onnx_file import onnx_specs, read_onnx
from deploy.precision import Precision
from deploy.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Source:
    """The ONNX file to build from."""

    path: Path
    digest: str
    precision: Precision
    metadata: Metadata | None
    """None where another tool wrote the file."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def read_source(path: Path) -> Source:
    """Read the ONNX file and make sure that TensorRT executes its types.

    Raises:
        InputError: it is unreadable, made for the CPU, or quantised to unsigned integers.
    """
    model = read_onnx(path)
    inputs, outputs = onnx_specs(model, path)
    metadata = decode(model.metadata_props, str(path))
    if metadata is not None and metadata.target == "cpu":
        raise InputError(
            f"{path} was made for the CPU: its activations are unsigned and asymmetric, which TensorRT does not "
            f"execute; write one for the GPU with espalier export CHECKPOINT --precision {metadata.precision} "
            "--target gpu."
        )
    found = _precision(model, path)
    return Source(path, sha256(path), metadata.precision if metadata else found, metadata, inputs, outputs)


def _precision(model: onnx.ModelProto, path: Path) -> Precision:
    """The precision of a file by its types: those of the quantised values, else those of the weights.

    Raises:
        InputError: a tensor is quantised to a type that TensorRT does not execute.
    """
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    constants = [node for node in model.graph.node if node.op_type == "Constant"]
    types |= {node.output[0]: item.t.data_type for node in constants for item in node.attribute if item.name == "value"}
    quantisers = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    # A quantised type is that of the zero point; without one it is uint8.
    quantised = {types.get(node.input[2]) if any(node.input[2:]) else _declared(node) for node in quantisers}
    kind = onnx.TensorProto
    if kind.UINT8 in quantised:
        raise InputError(
            f"{path} holds activations quantised to unsigned integers, which TensorRT does not execute; quantise "
            "them to signed integers with zero points of 0, as espalier export --precision int8 --target gpu does."
        )
    if kind.FLOAT8E4M3FN in quantised:
        return "fp8"
    if kind.INT8 in quantised:
        return "int8"
    if kind.BFLOAT16 in types.values():
        return "bf16"
    return "fp16" if kind.FLOAT16 in types.values() else "fp32"


def _declared(node: onnx.NodeProto) -> int | None:
    """The output type that a QuantizeLinear without zero point names; uint8 where it names none."""
    if node.op_type != "QuantizeLinear":
        return None  # a DequantizeLinear has the type of its input
    named = next((item.i for item in node.attribute if item.name == "output_dtype"), 0)
    return named or onnx.TensorProto.UINT8


def profile_of(spec: TensorSpec, batch: BatchRange, path: Path) -> manifest.Profile:
    """The shapes of one input of the file `path` over the range of batch sizes.

    Raises:
        InputError: a dimension besides the batch is dynamic, or the batch is fixed to a size that is not the range.
    """
    sizes = spec.shape[1:]
    fixed = tuple(size for size in sizes if isinstance(size, int))
    if not spec.shape or len(fixed) != len(sizes):
        raise InputError(
            f"{path}: input {spec} has a dynamic dimension besides the batch, and an engine is built for one image "
            "size; export it with a fixed image size."
        )
    if isinstance(spec.shape[0], int) and {batch.minimum, batch.maximum} != {spec.shape[0]}:
        raise InputError(
            f"{path}: input {spec} has a fixed batch, but an engine for {batch} was asked for; "
            f"export it with a dynamic batch, or give --batch {spec.shape[0]}:{spec.shape[0]}:{spec.shape[0]}."
        )
    return manifest.Profile(
        minimum=(batch.minimum, *fixed), optimum=(batch.optimum, *fixed), maximum=(batch.maximum, *fixed)
    )
