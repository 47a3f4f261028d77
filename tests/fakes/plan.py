"""The fake's file formats: engine plans and timing caches.

A plan is a header in JSON (what TensorRT keeps of the build) and the ONNX model with its weights. The same network
and settings give the same bytes.
"""

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import onnx
from onnx import TensorProto

MAGIC = b"ftrtFAKE"
CACHE_MAGIC = b"fakecache"
FRAME = struct.Struct("<QI")  # length of the header in bytes, CRC-32 of all that follows the frame

# ONNX element type -> name of the member of tensorrt.DataType
DATA_TYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT4: "INT4",
    TensorProto.FLOAT4E2M1: "FP4",
}

Shape = tuple[int, ...]


class UnreadableError(Exception):
    """Bytes that are no plan or timing cache."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the network: name, member of DataType, sizes (-1 where dynamic) and the names of its dimensions."""

    name: str
    data_type: str
    shape: Shape
    dimensions: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """One node of the ONNX graph and the tensors it reads, weights left out; the fake fuses nothing."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Header:
    """What a plan says of itself.

    `profiles` gives (minimum, optimum, maximum) by input name, `tensors` what passes from layer to layer.
    """

    version: str
    gpu: str
    compute_capability: tuple[int, int]
    hardware_compatibility: str
    version_compatible: bool
    lean_runtime: bool
    refittable: bool
    tf32: bool
    verbosity: str
    optimization_level: int
    workspace_bytes: int | None
    name: str
    profiles: tuple[dict[str, tuple[Shape, Shape, Shape]], ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Plan:
    """A built engine: its header and the model as bytes of an ONNX file."""

    header: Header
    model: bytes

    def encode(self) -> bytes:
        """The plan as a file's bytes."""
        return encode(MAGIC, asdict(self.header), self.model)

    @staticmethod
    def decode(data: bytes) -> "Plan":
        """Raises UnreadableError: `data` is no plan, or an incomplete or changed one."""
        header, model = decode(MAGIC, data)
        return Plan(
            Header(
                **(
                    header
                    | {
                        "compute_capability": tuple(header["compute_capability"]),
                        "profiles": tuple(
                            {name: tuple(map(tuple, shapes)) for name, shapes in profile.items()}
                            for profile in header["profiles"]
                        ),
                        "inputs": tuple(_tensor(entry) for entry in header["inputs"]),
                        "outputs": tuple(_tensor(entry) for entry in header["outputs"]),
                        "tensors": tuple(_tensor(entry) for entry in header["tensors"]),
                        "layers": tuple(_layer(entry) for entry in header["layers"]),
                    }
                )
            ),
            model,
        )


def encode(magic: bytes, header: dict[str, Any], content: bytes = b"") -> bytes:
    """Magic, frame, header, content."""
    text = json.dumps(header, sort_keys=True).encode()
    return magic + FRAME.pack(len(text), zlib.crc32(text + content)) + text + content


def decode(magic: bytes, data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and content; raises UnreadableError."""
    start = len(magic) + FRAME.size
    if not data.startswith(magic) or len(data) < start:
        raise UnreadableError("Magic tag does not match")
    length, checksum = FRAME.unpack_from(data, len(magic))
    if zlib.crc32(data[start:]) != checksum:
        raise UnreadableError("Serialized content is corrupt")
    return json.loads(data[start : start + length]), data[start + length :]


def is_typed(value: onnx.ValueInfoProto) -> bool:
    """Whether TensorRT has this type of tensor."""
    return value.type.tensor_type.elem_type in DATA_TYPES


def tensor_of(value: onnx.ValueInfoProto) -> Tensor:
    """A tensor of a graph; KeyError if TensorRT has no such type."""
    kind = value.type.tensor_type
    sizes = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in kind.shape.dim)
    return Tensor(value.name, DATA_TYPES[kind.elem_type], sizes, tuple(size.dim_param for size in kind.shape.dim))


def _tensor(entry: dict[str, Any]) -> Tensor:
    return Tensor(entry["name"], entry["data_type"], tuple(entry["shape"]), tuple(entry["dimensions"]))


def _layer(entry: dict[str, Any]) -> Layer:
    return Layer(entry["name"], entry["operator"], tuple(entry["inputs"]), tuple(entry["outputs"]))
