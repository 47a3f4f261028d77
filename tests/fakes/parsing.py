"""What TensorRT's ONNX parser and its strong typing refuse, as far as the fake knows.

Refused: unreadable files, missing external data, opsets above 24, operators of other domains and those in
`UNSUPPORTED_OPERATORS`, types that TensorRT lacks, asymmetric or 8-bit unsigned quantisation, DequantizeLinear of
int32 (quantised biases), and operators whose inputs of one type parameter have different types.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto, numpy_helper

from tests.fakes.plan import DATA_TYPES

LATEST_OPSET = 24
# Operators that the parser of neither major imports (docs/operators.md of onnx-tensorrt lists what it does).
UNSUPPORTED_OPERATORS = frozenset(
    {
        "Bernoulli",
        "DynamicQuantizeLinear",
        "Det",
        "MaxUnpool",
        "Multinomial",
        "SequenceAt",
        "StringNormalizer",
        "Unique",
    }
)
QUANTISING = frozenset({"QuantizeLinear", "DequantizeLinear"})
QUANTISED_TYPES = frozenset({"INT8", "FP8", "INT4", "FP4"})


@dataclass(frozen=True)
class Problem:
    """One error of the parser; `code` is a member of ErrorCode, `node` -1 where no node is to blame."""

    code: str
    text: str
    node: int = -1
    node_name: str = ""
    operator: str = ""


@dataclass
class Parsed:
    """A model with its weights and inferred shapes, or what is wrong with it."""

    model: onnx.ModelProto | None = None
    problems: list[Problem] = field(default_factory=list)


def parse(path: Path) -> Parsed:
    """Read an ONNX file as the parser does; it never raises for a bad file."""
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        return Parsed(None, [Problem("MODEL_DESERIALIZE_FAILED", f"Failed to open file: {path}: {error}")])
    except DecodeError:
        return Parsed(None, [Problem("MODEL_DESERIALIZE_FAILED", "Failed to parse ONNX model from file.")])
    if not model.graph.node and not model.graph.output:
        return Parsed(None, [Problem("MODEL_DESERIALIZE_FAILED", "Failed to parse ONNX model from file.")])
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        return Parsed(None, [Problem("INVALID_GRAPH", f"Failed to open external data: {error}")])
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    problems = list(_opset_problems(model)) or list(_operator_problems(model))
    if problems:
        return Parsed(None, problems)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        # Mixed types stop strict inference too, which does not say at which node.
        problems = list(_type_problems(onnx.shape_inference.infer_shapes(model)))
        return Parsed(None, problems or [Problem("INVALID_GRAPH", str(error).strip().splitlines()[0])])
    problems = list(_type_problems(inferred))
    return Parsed(None if problems else inferred, problems)


def _opset_problems(model: onnx.ModelProto) -> Iterator[Problem]:
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > LATEST_OPSET:
            text = f"Unsupported ONNX opset {entry.version}: this parser supports opsets up to {LATEST_OPSET}"
            yield Problem("UNSUPPORTED_GRAPH", text)


def _operator_problems(model: onnx.ModelProto) -> Iterator[Problem]:
    for place, node in enumerate(model.graph.node):
        if node.domain not in ("", "ai.onnx") or node.op_type in UNSUPPORTED_OPERATORS:
            text = "Plugin not found, are the plugin name, version, and namespace correct?"
            yield _problem("UNSUPPORTED_NODE", text, place, node)


def _type_problems(model: onnx.ModelProto) -> Iterator[Problem]:
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), LATEST_OPSET)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        for item in node.attribute:
            if node.op_type == "Constant" and item.name == "value":
                constants[node.output[0]] = item.t
    types = {name: tensor.data_type for name, tensor in constants.items()}
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        types[value.name] = value.type.tensor_type.elem_type
    for value in [*model.graph.input, *model.graph.output]:
        if types[value.name] not in DATA_TYPES:
            kind = TensorProto.DataType.Name(types[value.name])
            yield Problem("UNSUPPORTED_NODE_DATATYPE", f"Network input or output {value.name} has type {kind}")
    for place, node in enumerate(model.graph.node):
        if node.op_type in QUANTISING:
            yield from _quantisation_problems(place, node, types, constants)
        yield from _mixed_types(place, node, types, opset)


def _quantisation_problems(
    place: int, node: NodeProto, types: dict[str, int], constants: dict[str, TensorProto]
) -> Iterator[Problem]:
    quantised = node.input[0] if node.op_type == "DequantizeLinear" else node.output[0]
    kind = DATA_TYPES.get(types.get(quantised, 0), "an unknown type")
    if kind not in QUANTISED_TYPES:
        text = f"{node.op_type} of {kind}: only INT8, FP8, INT4 and FP4 are supported"
        yield _problem("UNSUPPORTED_NODE_DATATYPE", text, place, node)
    elif len(node.input) > 2 and node.input[2]:
        zero_point = constants.get(node.input[2])
        if zero_point is None:
            yield _problem("UNSUPPORTED_NODE_INPUT", "The zero point must be an initializer", place, node)
        elif np.any(numpy_helper.to_array(zero_point).astype(np.float32)):
            text = "Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported."
            yield _problem("UNSUPPORTED_NODE", text, place, node)


def _mixed_types(place: int, node: NodeProto, types: dict[str, int], opset: int) -> Iterator[Problem]:
    """Where one type parameter of the operator (as T of Conv) stands for two types."""
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    seen: dict[str, int] = {}
    for index, name in enumerate(node.input):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        if not name or not types.get(name) or "(" in formal.type_str or not formal.is_homogeneous:
            continue
        first = seen.setdefault(formal.type_str, types[name])
        if first != types[name]:
            kinds = " and ".join(TensorProto.DataType.Name(kind) for kind in (first, types[name]))
            text = f"Strongly typed network: {node.op_type} has inputs of types {kinds}"
            yield _problem("UNSUPPORTED_NODE_DATATYPE", text, place, node)
            return


def _problem(code: str, text: str, place: int, node: NodeProto) -> Problem:
    return Problem(code, text, place, node.name, node.op_type)
