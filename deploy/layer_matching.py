"""Which nodes of an ONNX file each kernel of ONNX Runtime computes, told from the names that it gives its kernels.

What ONNX Runtime 1.31 names its kernels on the CPU:

    a node as in the file                       node_mean               the node
    a convolution in blocked layout (NCHWc)     relu_1_nchwc            the tensor that it made when it was converted,
                                                                        so the name of an activation fused into it
    QLinearConv, QGemm, QLinearAdd, ...         node_Conv_507_token_19  the node between the Q/DQ pairs
    one fused with an activation                fused node_Conv_3       the node
    a product with its addition                 x/MatMulAddFusion       the node
    parts of an operator that is a function     HardSigmoid_391         operator and index: it had no name
    conversions of layout and type              ReorderOutput_token_2, Transpose, Cast, InsertedPrecisionFreeCast_x

What was fused into a kernel is then found in the graph: a product without a kernel of its own belongs to the kernel
that its output leads to, and an element-wise node to the one that made its input.
"""

import re
from collections.abc import Iterator, Sequence

import onnx

from deploy.work_graph import ELEMENTWISE, PRODUCTS, Graph

CONVERSIONS = frozenset({"Cast", "DequantizeLinear", "QuantizeLinear"})

_MULTIPLIES = re.compile(r"Conv|Gemm|MatMul|Attention")

_ENDINGS = re.compile(r"(_nchwc|_token_\d+|/\w*Fusion\w*/?|_nhwc)$")

_BEGINNINGS = ("fused ", "InsertedPrecisionFreeCast_")


def origins(kernels: Sequence[tuple[str, str]], graph: Graph) -> list[tuple[str, ...]]:
    """For each kernel, given by name and operator in the order of execution, the nodes that it computes.

    Every product belongs to one kernel at most; a kernel without any node was put in by the runtime.
    """
    owner: dict[str, int] = {}
    makers = {tensor: node.name for node in graph.nodes for tensor in node.outputs}
    more: dict[int, list[str]] = {}
    for index, (name, kind) in enumerate(kernels):
        known = (base if base in graph.by_name else makers.get(base) for base in _bases(name))
        origin = next((found for found in known if found is not None), None)
        if origin is None:
            continue
        if origin not in owner:
            owner[origin] = index
        elif _MULTIPLIES.search(kind) and not _MULTIPLIES.search(kernels[owner[origin]][1]):
            more.setdefault(owner[origin], []).append(origin)
            owner[origin] = index
        else:  # such as a DequantizeLinear that was copied for each of its readers
            more.setdefault(index, []).append(origin)
    named = {*owner.values(), *more}
    _expanded(kernels, graph, owner, named, more)
    _renamed(kernels, graph, owner, named)
    _products(kernels, graph, owner, named)
    for node in graph.nodes:
        if node.name not in owner and node.kind in ELEMENTWISE:
            before = [owner[makers[name]] for name in node.inputs if name in makers and makers[name] in owner]
            if before:
                owner[node.name] = max(before)
    found: list[list[str]] = [list(more.get(index, ())) for index in range(len(kernels))]
    for node in graph.nodes:
        if node.name in owner and node.name not in found[owner[node.name]]:
            found[owner[node.name]].append(node.name)
    return [tuple(nodes) for nodes in found]


def _bases(name: str) -> Iterator[str]:
    """The kernel's name, then without what ONNX Runtime puts before and after it, one after the other."""
    yield name
    while True:
        shorter = _ENDINGS.sub("", name)
        for beginning in _BEGINNINGS:
            shorter = shorter.removeprefix(beginning)
        if shorter == name:
            return
        name = shorter
        yield name


def _expanded(
    kernels: Sequence[tuple[str, str]],
    graph: Graph,
    owner: dict[str, int],
    named: set[int],
    more: dict[int, list[str]],
) -> None:
    """Give nodes whose operator is a function (HardSwish, Gelu) the nameless kernels of the function's body."""
    makers = {tensor: node.name for node in graph.nodes for tensor in node.outputs}
    for node in graph.nodes:
        body = _body(node.kind) if node.name not in owner and node.kind not in PRODUCTS else []
        start = _before(node.name, graph, owner, makers) if body else None
        if start is None:
            continue
        parts = []
        for index in range(start + 1, len(kernels)):
            kind = kernels[index][1]
            if index not in named and kind in body:
                parts.append(index)
            if len(parts) == len(body) or (index in named and kind not in CONVERSIONS):
                break
        if sorted(kernels[index][1] for index in parts) == sorted(body):
            named.update(parts)
            owner[node.name] = parts[-1]
            for index in parts[:-1]:
                more.setdefault(index, []).append(node.name)


def _before(name: str, graph: Graph, owner: dict[str, int], makers: dict[str, str]) -> int | None:
    """The kernel that computes what the node reads, of several the last; None where none is known."""
    found = []
    for tensor in graph.by_name[name].inputs:
        while (maker := makers.get(tensor)) is not None:
            if maker in owner:
                found.append(owner[maker])
                break
            if graph.by_name[maker].kind not in ELEMENTWISE:
                # A product without a kernel of that name: it was fused with what follows it.
                break
            tensor = graph.by_name[maker].inputs[0]
    return max(found, default=None)


def _renamed(kernels: Sequence[tuple[str, str]], graph: Graph, owner: dict[str, int], named: set[int]) -> None:
    """Give nodes the nameless kernels whose operator is theirs with more fused into it: Gelu -> BiasGelu."""
    kinds = {node.kind for node in graph.nodes if node.name not in owner} - CONVERSIONS - set(PRODUCTS)
    for kind in sorted(kinds, key=len, reverse=True):  # LayerNormalization before Add
        nodes = [node.name for node in graph.nodes if node.kind == kind and node.name not in owner]
        parts = [i for i, kernel in enumerate(kernels) if i not in named and kind in kernel[1]]
        if len(nodes) == len(parts):
            owner |= dict(zip(nodes, parts, strict=True))
            named.update(parts)


def _body(kind: str) -> list[str]:
    """Operators of the body of a function that computes something; empty for other operators."""
    try:
        schema = onnx.defs.get_schema(kind)
    except onnx.defs.SchemaError:
        return []
    if not schema.has_function:  # type: ignore[attr-defined]
        return []
    return [node.op_type for node in schema.function_body.node if node.op_type != "Constant"]


def _products(kernels: Sequence[tuple[str, str]], graph: Graph, owner: dict[str, int], named: set[int]) -> None:
    """Give each product without a kernel the one that its output leads to; the rest those left over, in order."""
    left = []
    for node in graph.nodes:
        if node.kind not in PRODUCTS or node.name in owner:
            continue
        chain, tensor = [node.name], node.outputs[0]
        while len(readers := graph.readers.get(tensor, ())) == 1:
            reader = graph.by_name[readers[0]]
            if reader.name in owner:
                if _MULTIPLIES.search(kernels[owner[reader.name]][1]) and reader.kind not in PRODUCTS:
                    owner |= dict.fromkeys(chain, owner[reader.name])
                break
            if reader.kind not in ELEMENTWISE:
                break
            chain.append(reader.name)
            tensor = reader.outputs[0]
        if node.name not in owner:
            left.append(node.name)
    over = [i for i, (_, kind) in enumerate(kernels) if i not in named and _MULTIPLIES.search(kind)]
    if len(left) == len(over):
        owner |= dict(zip(left, over, strict=True))
