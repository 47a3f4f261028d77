"""What a network has to do: multiply-adds and compulsory bytes of every node of an ONNX file, or layer of a module.

Bytes are a node's inputs, weights and outputs, each once, in the type in which they are stored: what is written only to
be quantised counts as quantised, and what is read through a DequantizeLinear as what that reads. So a convolution
between Q/DQ pairs works in int8 and moves one byte for each element, whether the runtime makes one node of them or not.
Nodes that only rename (Reshape, Flatten) move nothing.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import onnx
import torch
from torch import nn

from benchmarks.harness.counters import macs as count_macs
from benchmarks.harness.roofline import Work
from compress.errors import InputError, WorkError, first_line
from deploy.onnx_file import load_onnx, onnx_specs
from deploy.runtimes.pytorch import evaluating
from deploy.work_graph import PRODUCTS, UNKNOWN, VIEWS, Graph, Product


@dataclass(frozen=True)
class LayerWork:
    """The work of one node, or of several done as one."""

    name: str
    """Name of the node, of a module its path."""
    kind: str
    module: str
    """The PyTorch module that its weights belong to; empty where it has none or the file does not say."""
    macs: int
    """Multiply-adds of the whole batch, as `counters.macs` counts them."""
    bytes: int
    in_channels: int | None = None
    out_channels: int | None = None
    groups: int = 1
    dtype: str = "float32"
    """Type of its first factor as stored, or where it multiplies nothing of its first input; uint8 is called int8."""

    @property
    def work(self) -> Work:
        return Work(self.macs, self.bytes)


@dataclass(frozen=True)
class OnnxWork:
    """The work of a file at one batch size."""

    batch_size: int
    layers: tuple[LayerWork, ...]
    """One for each node, in the order of the file."""
    traffic_bytes: int
    """Weights, inputs and outputs of the network, each once."""
    uncounted: tuple[str, ...]
    """Operators whose multiply-adds are not known here; they count as none."""
    graph: Graph = field(repr=False)

    @property
    def macs(self) -> int:
        """Of the whole batch."""
        return sum(layer.macs for layer in self.layers)

    @cached_property
    def by_name(self) -> dict[str, LayerWork]:
        return {layer.name: layer for layer in self.layers}

    def of(self, nodes: Collection[str]) -> LayerWork:
        """The work of nodes that run as one kernel: what only they exchange moves no byte.

        It goes by the node with most multiply-adds, else by the first one.
        """
        chosen = [self.by_name[name] for name in nodes]
        main = max(chosen, key=lambda layer: layer.macs)
        return replace(main, macs=sum(layer.macs for layer in chosen), bytes=self.graph.bytes_of(nodes))

    @cached_property
    def fused(self) -> tuple[LayerWork, ...]:
        """The layers of the network with element-wise nodes taken into the one before them, as runtimes can do."""
        return tuple(self.of(group) for group in self.graph.groups())


def _without_shape(graph: Graph) -> list[str]:
    return [name for node in graph.nodes for name in node.outputs if name not in graph.shapes]


def _inferred_by_symbols(model: onnx.ModelProto) -> onnx.ModelProto:
    """Shapes by ONNX Runtime's inference, slower, which also follows values computed from shapes."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    try:
        return SymbolicShapeInference.infer_shapes(model, auto_merge=True)
    except Exception:  # noqa: BLE001  it fails with anything on operators that it does not know
        return model


def onnx_work(path: Path, batch_size: int) -> OnnxWork:
    """The work of an ONNX file on a batch of that size.

    Raises:
        InputError: the file cannot be read, or the batch is empty.
        WorkError: the shapes inside cannot be inferred.
    """
    if batch_size < 1:
        raise InputError(f"The work of a batch of {batch_size} was asked for: give at least 1.")
    model = load_onnx(path)
    inputs, _ = onnx_specs(model, path)
    names = {spec.name for spec in inputs}
    for value in model.graph.input:
        if value.name in names and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = batch_size
    for value in model.graph.output:  # they may hold the batch by its name
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    outputs = [value.name for value in model.graph.output]
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > LARGE:  # shapes do not follow from weights, and protobuf holds 2 GiB
            tensor.raw_data = b""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise WorkError(
            f"The shapes inside {path} cannot be inferred: {first_line(error)}; export it again."
        ) from error
    graph = Graph.of(inferred, sorted(names), outputs)
    unknown = _without_shape(graph)
    if unknown:
        graph = Graph.of(_inferred_by_symbols(model), sorted(names), outputs)
        unknown = _without_shape(graph)
    if unknown:
        raise WorkError(
            f"The shape of {unknown[0]} in {path.name} cannot be inferred at batch {batch_size}, so the work of "
            f"{len(unknown)} tensors is not known; export the network again with espalier export."
        )
    layers = tuple(_layer(node.name, graph) for node in graph.nodes)
    uncounted = Counter(node.kind for node in graph.nodes if node.kind in UNKNOWN)
    return OnnxWork(
        batch_size=batch_size,
        layers=layers,
        traffic_bytes=graph.traffic_bytes(),
        uncounted=tuple(f"{count} {kind}" for kind, count in uncounted.items()),
        graph=graph,
    )


LARGE = 64 * 1024
"""Bytes of an initialiser above which it is no shape, index or constant that shapes follow from."""


def _layer(name: str, graph: Graph) -> LayerWork:
    node = graph.by_name[name]
    product = PRODUCTS[node.kind](node, graph) if node.kind in PRODUCTS else Product(0)
    return LayerWork(
        name=name,
        kind=node.kind,
        module=node.module,
        macs=product.macs,
        bytes=graph.bytes_of([name]),
        in_channels=product.in_channels,
        out_channels=product.out_channels,
        groups=product.groups,
        dtype=graph.dtype_of(node),
    )


def module_work(model: nn.Module, images: torch.Tensor) -> tuple[list[LayerWork], int]:
    """The work of every leaf module on a batch, in the order of their first calls, and all multiply-adds of the batch.

    A module that is called several times does the work of all its calls. What a module computes outside of its leaves,
    such as an addition in `forward`, belongs to no layer; multiply-adds there, as of attention written out in
    `forward`, are in the total alone.

    Raises:
        WorkError: the model fails on these images.
    """
    found: dict[str, LayerWork] = {}

    def hook(name: str, module: nn.Module) -> "torch.utils.hooks.RemovableHandle":
        def note(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            work = _module_layer(name, module, inputs, output)
            old = found.get(name)
            found[name] = work if old is None else replace(old, macs=old.macs + work.macs, bytes=old.bytes + work.bytes)

        return module.register_forward_hook(note)

    handles = [hook(name, module) for name, module in model.named_modules() if not list(module.children())]
    try:
        with evaluating(model), torch.inference_mode():
            model(images)
    except RuntimeError as error:
        raise WorkError(f"PyTorch failed on a batch of shape {tuple(images.shape)}: {first_line(error)}.") from error
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values()), count_macs(model, images) * len(images)


def _module_layer(name: str, module: nn.Module, inputs: Iterable[object], output: object) -> LayerWork:
    given = [item for item in inputs if isinstance(item, torch.Tensor)]
    made = [output] if isinstance(output, torch.Tensor) else []
    moved = [*given, *made, *module.parameters(recurse=False)]
    layer = LayerWork(
        name=name,
        kind=type(module).__name__,
        module=name,
        macs=0,
        bytes=sum(tensor.nbytes for tensor in moved),
        dtype=str(given[0].dtype).removeprefix("torch.") if given else "float32",
    )
    if not given or not made:
        return layer
    if isinstance(module, nn.modules.conv._ConvTransposeNd | nn.modules.conv._ConvNd):
        reached = given[0] if module.transposed else made[0]
        return replace(
            layer,
            macs=reached.numel() // reached.shape[1] * module.weight.numel(),
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            groups=module.groups,
        )
    if isinstance(module, nn.Linear):
        return replace(
            layer,
            macs=made[0].numel() * module.in_features,
            in_channels=module.in_features,
            out_channels=module.out_features,
        )
    if type(module).__name__ in VIEWS:
        return replace(layer, bytes=0)
    return layer
