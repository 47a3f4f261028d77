"""The graph of an ONNX file as its costs are counted: tensors by their stored size, nodes by what they multiply."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import onnx

from deploy.precision.layers import layer_names

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Size", "Constant", "Dropout"})
"""Operators that move nothing: they rename a tensor, or ask for its size."""

_WEIGHT = ".weight"
"""Ends the name of a module's weight; quantisers append to it."""

ELEMENTWISE = VIEWS | {
    "Abs", "Add", "BatchNormalization", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish",
    "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "QuantizeLinear", "Relu", "Selu", "Sigmoid",
    "Softplus", "Sqrt", "Sub", "Tanh", "Where",
}  # fmt: skip
"""Operators that a runtime can do in passing, while it writes the output of the node before."""

PARTIAL = frozenset({"Gather", "Slice"})
"""Operators that read no more of their input than they write."""

UNKNOWN = frozenset({
    "DeformConv", "Einsum", "GRU", "If", "LSTM", "Loop", "MultiHeadAttention", "RNN", "Scan",
})  # fmt: skip
"""Operators that multiply, or hold graphs that do, and whose multiply-adds are not counted here."""


@dataclass(frozen=True)
class Node:
    """One node; `inputs` are tensors as stored, so a DequantizeLinear before them is seen through."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: str
    attributes: Mapping[str, object]


@dataclass(frozen=True)
class Product:
    """What a node multiplies."""

    macs: int
    in_channels: int | None = None
    out_channels: int | None = None
    groups: int = 1


@dataclass(frozen=True)
class Graph:
    """Plain values, so that it can go to another process."""

    nodes: tuple[Node, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    constants: frozenset[str]
    """Tensors that no input of the network reaches."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sources: dict[str, str] = field(default_factory=dict)
    """Output of a DequantizeLinear -> what it reads."""
    by_name: dict[str, Node] = field(init=False, repr=False)
    readers: dict[str, tuple[str, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        readers: dict[str, list[str]] = {}
        for node in self.nodes:
            for name in node.inputs:
                readers.setdefault(name, []).append(node.name)
        object.__setattr__(self, "by_name", {node.name: node for node in self.nodes})
        object.__setattr__(self, "readers", {name: tuple(dict.fromkeys(found)) for name, found in readers.items()})

    @classmethod
    def of(cls, model: onnx.ModelProto, inputs: Collection[str], outputs: Collection[str]) -> "Graph":
        """From a model whose shapes were inferred; nodes without a name of their own go by their first output."""
        graph, layers = model.graph, layer_names(model)
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            if tensor.HasField("shape") and all(item.HasField("dim_value") for item in tensor.shape.dim):
                shapes[value.name] = tuple(item.dim_value for item in tensor.shape.dim)
                dtypes[value.name] = _dtype(tensor.elem_type)
        for weight in graph.initializer:
            shapes[weight.name], dtypes[weight.name] = tuple(weight.dims), _dtype(weight.data_type)
        constants = {weight.name for weight in graph.initializer}
        used = Counter(item.name for item in graph.node)
        sources: dict[str, str] = {}
        nodes = []
        for item in graph.node:  # in topological order, as ONNX demands
            given = [name for name in item.input if name]
            if set(given) <= constants:
                constants.update(item.output)
            stored = [sources.get(name, name) for name in given]
            if item.op_type == "DequantizeLinear":
                sources[item.output[0]] = stored[0]
            made = tuple(name for name in item.output if name and (name == item.output[0] or name in shapes))
            attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in item.attribute}
            name = item.name if item.name and used[item.name] == 1 else f"{item.op_type} {item.output[0]}"
            plain = {key: value for key, value in attributes.items() if isinstance(value, int | float | list)}
            nodes.append(
                Node(name, item.op_type, tuple(stored), made, _module(item, stored, layers.get(item.name, ())), plain)
            )
        return cls(tuple(nodes), shapes, dtypes, frozenset(constants), tuple(inputs), tuple(outputs), sources)

    def bytes_of(self, nodes: Collection[str]) -> int:
        """Bytes that these nodes read and write when they run as one."""
        chosen = [self.by_name[name] for name in nodes]
        inside = {node.name for node in chosen}
        made = {name for node in chosen for name in node.outputs}
        read: dict[str, int] = {}
        for node in chosen:
            if node.kind in VIEWS:
                continue
            for name in node.inputs:
                if name not in made:
                    size = self.stored_bytes(name)
                    read[name] = max(read.get(name, 0), self._at_most(node, size) if node.kind in PARTIAL else size)
        seen_through = set(self.sources)
        written = sum(
            self.stored_bytes(name)
            for node in chosen
            if node.kind not in VIEWS or made & set(node.inputs)
            for name in node.outputs
            if name not in self.constants
            and (name in self.outputs or (name not in seen_through and self._read_outside(name, inside)))
        )
        return sum(read.values()) + written

    def traffic_bytes(self) -> int:
        """Weights, inputs and outputs of the network, each once."""
        used = {name for node in self.nodes for name in node.inputs if name in self.constants}
        made = {name for node in self.nodes for name in node.outputs}
        return sum(self.stored_bytes(name) for name in (used - made) | {*self.inputs, *self.outputs})

    def stored_bytes(self, tensor: str) -> int:
        """Size of a tensor; of one that is only ever quantised, its size when quantised."""
        readers = [self.by_name[name] for name in self.readers.get(tensor, ())]
        dtype = self.dtypes.get(tensor, "float32")
        if readers and tensor not in self.outputs and all(node.kind == "QuantizeLinear" for node in readers):
            dtype = self.dtypes.get(readers[0].outputs[0], dtype)
        return math.ceil(math.prod(self.shapes.get(tensor, ())) * _bits(dtype) / 8)

    def dtype_of(self, node: Node) -> str:
        """Type of its first input as stored."""
        if not node.inputs:
            return "float32"
        dtype = self.dtypes.get(node.inputs[0], "float32")
        return compute_dtype(dtype)

    def groups(self) -> list[tuple[str, ...]]:
        """Nodes that can run as one: an element-wise node joins the last one that computes an input for it alone."""
        owner: dict[str, int] = {}
        makers: dict[str, str] = {}
        found: list[list[str]] = []
        for node in self.nodes:
            if node.kind == "DequantizeLinear" or (node.outputs and set(node.outputs) <= self.constants):
                continue  # seen through, or computed before the network runs
            before = [
                owner[makers[name]]
                for name in node.inputs
                if name in makers and len(self.readers[name]) == 1 and name not in self.outputs
            ]
            if node.kind in ELEMENTWISE and before:
                index = max(before)
                found[index].append(node.name)
            else:
                index = len(found)
                found.append([node.name])
            owner[node.name] = index
            makers |= dict.fromkeys(node.outputs, node.name)
        return [tuple(group) for group in found if any(self.by_name[name].kind not in VIEWS for name in group)]

    def _at_most(self, node: Node, size: int) -> int:
        return min(size, self.stored_bytes(node.outputs[0]))

    def _read_outside(self, tensor: str, inside: Collection[str]) -> bool:
        return any(name not in inside for name in self.readers.get(tensor, ()))


def _bits(dtype: str) -> int:
    """Of one element, by NumPy's name of its type."""
    number = re.search(r"\d+", dtype)
    return 8 if dtype == "bool" or number is None else int(number[0])


def compute_dtype(dtype: str) -> str:
    """The type whose peak counts: unsigned and signed bytes are multiplied alike, and so are the kinds of float8."""
    return "float8" if dtype.startswith("float8") else {"uint8": "int8"}.get(dtype, dtype)


def _dtype(code: int) -> str:
    return onnx.helper.tensor_dtype_to_np_dtype(code).name


def _module(node: onnx.NodeProto, stored: Collection[str], names: Collection[str]) -> str:
    """The module whose weight it reads; for a product without one the innermost module around it."""
    for tensor in stored:
        if _WEIGHT in tensor:
            return tensor.partition(_WEIGHT)[0]
    found = next(iter(names), "")
    return found if node.op_type in PRODUCTS and found != node.name else ""


def _convolution(node: Node, graph: Graph) -> Product:
    data, weight = (0, 3) if node.kind == "QLinearConv" else (0, 1)
    shape = graph.shapes[node.inputs[weight]]
    groups = int(node.attributes.get("group", 1))  # type: ignore[call-overload]
    out = graph.shapes[node.outputs[0]]
    return Product(out[0] * math.prod(out[2:]) * math.prod(shape), graph.shapes[node.inputs[data]][1], shape[0], groups)


def _transposed(node: Node, graph: Graph) -> Product:
    data, weight = (graph.shapes[name] for name in node.inputs[:2])
    groups = int(node.attributes.get("group", 1))  # type: ignore[call-overload]
    return Product(data[0] * math.prod(data[2:]) * math.prod(weight), data[1], weight[1] * groups, groups)


def _gemm(node: Node, graph: Graph) -> Product:
    left = graph.shapes[node.inputs[0]]
    depth = left[0] if node.attributes.get("transA") else left[1]
    out = graph.shapes[node.outputs[0]]
    return Product(math.prod(out) * depth, depth, out[-1])


def _matrices(node: Node, graph: Graph) -> Product:
    depth = graph.shapes[node.inputs[0]][-1]
    out = graph.shapes[node.outputs[0]]
    return Product(math.prod(out) * depth, depth, out[-1] if out else 1)


def _attention(node: Node, graph: Graph) -> Product:
    """Attention of ONNX operator set 23: queries by keys, then by values."""
    query, key, value = (graph.shapes[name] for name in node.inputs[:3])
    if len(query) == 4:  # (N, heads, tokens, channels of a head)
        pairs = query[0] * query[1] * query[2] * key[2]
        return Product(pairs * (query[3] + value[3]))
    pairs = query[0] * query[1] * key[1]  # (N, tokens, channels of all heads)
    heads = int(node.attributes.get("q_num_heads", 1)), int(node.attributes.get("kv_num_heads", 1))  # type: ignore[call-overload]
    return Product(pairs * (query[2] + value[2] * heads[0] // heads[1]))


PRODUCTS: dict[str, Callable[[Node, Graph], Product]] = {
    "Attention": _attention,
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "ConvTranspose": _transposed,
    "FusedConv": _convolution,
    "Gemm": _gemm,
    "MatMul": _matrices,
    "MatMulInteger": _matrices,
    "QLinearConv": _convolution,
    "QLinearMatMul": _matrices,
}
"""Operator -> what it multiplies."""
