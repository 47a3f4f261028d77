"""Which layers of the PyTorch model the nodes of an ONNX graph come from, and which nodes a user's pattern means."""

import ast
import difflib
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase

import onnx

from compress.errors import InputError

_SCOPES = "pkg.torch.onnx.name_scopes"
"""PyTorch's exporter leaves a list here: the names of the modules around a node from the outside in, then its own."""

_WEIGHT = ".weight"


def layer_names(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Name of every node -> the names of its layer, the most precise one first; the node's own name is the last.

    A convolution into which a batch normalisation was folded goes by the names of both: the weight still carries
    the convolution's, the node the normalisation's. Modules around the layer are among its names too, so that
    `layer1.0` means the whole block.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    names = {}
    for node in model.graph.node:
        found = [name.removesuffix(_WEIGHT) for name in node.input if name in weights and name.endswith(_WEIGHT)]
        found += reversed(_modules(node))
        names[node.name] = tuple(dict.fromkeys([*found, node.name]))
    return names


def match_layers(model: onnx.ModelProto, patterns: Collection[str]) -> frozenset[str]:
    """Names of the nodes that the patterns mean.

    Args:
        patterns: names of PyTorch modules ("layer1.0.conv1", "layer1"), names of ONNX nodes, or patterns of such
            names as a shell has them ("layer1.*.conv?").

    Raises:
        InputError: a pattern matches nothing; names the closest ones.
    """
    names = layer_names(model)
    matched: set[str] = set()
    for pattern in patterns:
        nodes = {node for node, known in names.items() if any(fnmatchcase(name, pattern) for name in known)}
        if not nodes:
            raise InputError(f'No layer is called "{pattern}"; {_advice(pattern, names)}.')
        matched |= nodes
    return frozenset(matched)


def _modules(node: onnx.NodeProto) -> list[str]:
    """Names of the modules around a node from the outside in; none where another exporter wrote the file."""
    for item in node.metadata_props:
        if item.key == _SCOPES:
            try:
                return [str(name) for name in ast.literal_eval(item.value)[:-1] if name]
            except (ValueError, SyntaxError, TypeError):
                return []
    return []


def _advice(pattern: str, names: dict[str, tuple[str, ...]]) -> str:
    known = sorted({name for found in names.values() for name in found})
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"[:-1]
    return f"there are {', '.join(_first(known))}"


def _first(names: list[str], count: int = 5) -> Iterator[str]:
    yield from names[:count]
    if len(names) > count:
        yield f"and {len(names) - count} more"
