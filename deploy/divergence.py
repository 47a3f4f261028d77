"""Where in a network a file of another precision leaves the fp32 one: the first layer whose error is too large.

The reference is the fp32 ONNX file and not the checkpoint: `deploy.parity` holds that file to PyTorch's logits, and its
tensors have names, which the files of the other precisions keep.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from compress.errors import InputError
from compress.progress import progress_bar
from deploy.onnx_file import MAX_INLINE_BYTES, external_name, load_onnx, onnx_specs
from deploy.precision.layers import layer_names
from deploy.precision.placement import weighted_nodes
from deploy.runtimes import open_runtime

BATCH = 8
"""Images per inference: an activation of ResNet-50 holds up to 3 MB an image."""

# What follows from the size of an activation alone is no activation.
_SIZES = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class Probe:
    """The error of one activation: reference a against suspect b, over all images.

    tensor: its name in both files.
    node, operator: the node of the reference that computes it; where the suspect made one of several nodes, as of a
        convolution and its ReLU, the last one with weights.
    module: the PyTorch module that the node comes from; empty where the file does not say.
    error: √(Σ(a − b)² / Σa²); infinite where b is not finite. The signal lies −20 log10(error) dB above the noise.
    """

    tensor: str
    node: str
    operator: str
    module: str
    error: float


@dataclass(frozen=True)
class Divergence:
    """The layer at which the suspect leaves the reference.

    first: its error exceeds the tolerance.
    inputs: the nearest activations that it is computed from and that both files have; their errors do not.
    probes: all activations that were compared, in the order of the network: the curve of the error.
    """

    first: Probe
    inputs: tuple[Probe, ...]
    probes: tuple[Probe, ...]

    def __str__(self) -> str:
        before = max((probe.error for probe in self.inputs), default=0.0)
        return (
            f"{self.first.module or 'the network'} ({self.first.operator} {self.first.node}) is the first to diverge: "
            f"relative error {self.first.error:.2g}, against {before:.2g} at its inputs"
        )


def first_divergence(reference: Path, suspect: Path, images: np.ndarray, *, tolerance: float) -> Divergence | None:
    """Find by bisection the layer at which `suspect` leaves `reference`; None if the network's outputs agree.

    Both files are cut off at one activation at a time and run on the CPU by ONNX Runtime, so that the layers before it
    run in the kernels that they are deployed with; had every activation to be given out at once, none could be fused.
    Where the suspect quantises an activation for all that read it, what they read is compared.

    The bisection goes over the activations that the diverging one is computed from, in the order of the network, and
    starts again from an input of what it found where that diverges, too, in another branch. So the layer found exceeds
    the tolerance while none of its inputs does. There is no other such layer before it unless errors shrink along the
    network, as they may behind a ReLU or a normalisation. It takes about log₂ L runs of either file of L layers.

    Args:
        reference: the fp32 file.
        suspect: a file of the same network, in any precision that ONNX Runtime executes on the CPU.
        images: samples as the reference takes them, (N, C, H, W).
        tolerance: bound on `Probe.error`.

    Raises:
        InputError: a file cannot be read or executed, the files are not of one network, or the images do not fit.
        WorkError: ONNX Runtime failed.
    """
    if not tolerance > 0:
        raise InputError(f"The tolerance of the divergence is {tolerance}; give a positive number.")
    if len(images) == 0:
        raise InputError("There are no images to compare the activations on; give at least one.")
    original, other = _Network(reference), _Network(suspect)
    common = _common(original, other)
    errors: dict[str, float] = {}
    with progress_bar("divergence", None) as bar:

        def exceeds(tensor: str) -> bool:
            if tensor not in errors:
                errors[tensor] = _error(original, other, tensor, images)
                bar.advance(f"{tensor}: {errors[tensor]:.2g}")
            return not errors[tensor] <= tolerance

        found = next(filter(exceeds, original.outputs), None)
        if found is None:
            return None
        while True:
            before = original.ancestors(found)
            found = _bisect([*(name for name in common if name in before), found], exceeds)
            inputs = original.nearest(found, common)
            diverging = next(filter(exceeds, inputs), None)
            if diverging is None:
                break
            found = diverging
    probes = {name: original.probe(name, common, errors[name]) for name in common if name in errors}
    return Divergence(probes[found], tuple(probes[name] for name in inputs), tuple(probes.values()))


def _bisect(tensors: Sequence[str], exceeds: Callable[[str], bool]) -> str:
    """One that exceeds while the one before it does not; the last one is known to, the images before the first not."""
    sound, diverging = -1, len(tensors) - 1
    while diverging - sound > 1:
        middle = (sound + diverging) // 2
        if exceeds(tensors[middle]):
            diverging = middle
        else:
            sound = middle
    return tensors[diverging]


class _Network:
    """The graph of an ONNX file, its tensors by name."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            InputError: the file cannot be read, or has not one input.
        """
        self.path = path
        self._model = load_onnx(path)
        inputs, outputs = onnx_specs(self._model, path)
        if len(inputs) != 1:
            raise InputError(f"{path} has {len(inputs)} inputs, but a classifier has one: give another file.")
        self.input = inputs[0]
        self.outputs = [spec.name for spec in outputs]
        self._layers = layer_names(self._model)
        self._weighted = {node.name for node in weighted_nodes(self._model.graph)}
        self._makers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        self.activations: list[str] = []
        """All that is computed from the values of the input, in the order of the network."""
        dependent = {self.input.name}
        for node in self._model.graph.node:  # in topological order, as ONNX demands
            self._makers |= dict.fromkeys(node.output, node)
            reads = set(_reads(node))
            for name in reads:
                self._readers.setdefault(name, []).append(node)
            if node.op_type not in _SIZES and reads & dependent:
                dependent.update(node.output)
                self.activations += [name for name in node.output if name]

    def nearest(self, tensor: str, wanted: Collection[str]) -> list[str]:
        """Those of the wanted tensors that `tensor` is computed from with none of them in between."""
        return [name for name in self._back(tensor, wanted) if name in wanted]

    def _back(self, tensor: str, wanted: Collection[str]) -> list[str]:
        """Tensors on the way back from `tensor` to the wanted ones, these included, the nearest first."""
        found = list(dict.fromkeys(_reads(self._makers[tensor])))
        for name in found:  # grows meanwhile
            if name not in wanted and name in self._makers:
                found += [other for other in dict.fromkeys(_reads(self._makers[name])) if other not in found]
        return found

    def ancestors(self, tensor: str) -> set[str]:
        """Every tensor that `tensor` is computed from, constants among them."""
        found: set[str] = set()
        queue = [tensor]
        while queue:
            name = queue.pop()
            if name in self._makers:
                queue += (more := set(_reads(self._makers[name])) - found)
                found |= more
        return found

    def read(self, tensor: str) -> str:
        """What the layers behind `tensor` compute with: the tensor, or if it is quantised for all of them, that.

        ONNX Runtime's quantiser leaves ReLUs out where quantisation cuts negative values off by itself: there the
        tensor under the ReLU's name has negative values, and only what comes out of quantisation is comparable.
        """
        readers = self._readers.get(tensor, [])
        if tensor in self.outputs or not readers or any(node.op_type != "QuantizeLinear" for node in readers):
            return tensor
        back = [node for node in self._readers.get(readers[0].output[0], []) if node.op_type == "DequantizeLinear"]
        return back[0].output[0] if back else tensor

    def probe(self, tensor: str, common: Collection[str], error: float) -> Probe:
        """What is reported of one of the `common` tensors, which both networks have."""
        node = self._makers[tensor]
        if node.name not in self._weighted:
            between = [name for name in self._back(tensor, common) if name not in common and name in self._makers]
            makers = (self._makers[name] for name in between)
            node = next((maker for maker in makers if maker.name in self._weighted), node)
        names = self._layers.get(node.name, (node.name,))
        module = "" if names[0] == node.name else names[0]
        return Probe(tensor, node.name, node.op_type, module, error)

    def cut(self, tensor: str, path: Path) -> None:
        """Write the part of the network that computes `tensor`, with that, as it is read, as its only output."""
        source = self.read(tensor)
        needed = self.ancestors(source) | {source}
        model, graph = onnx.ModelProto(), self._model.graph
        model.ir_version = self._model.ir_version
        model.opset_import.extend(self._model.opset_import)
        model.functions.extend(self._model.functions)
        model.metadata_props.extend(self._model.metadata_props)  # the runtime must know what the file was made for
        model.graph.name = graph.name
        model.graph.input.extend(value for value in graph.input if value.name == self.input.name)
        model.graph.initializer.extend(item for item in graph.initializer if item.name in needed)
        model.graph.node.extend(node for node in graph.node if needed & set(node.output))
        # In its own type, which the runtime infers: a cast to float32 would spare fp16 values their last rounding.
        model.graph.output.append(onnx.ValueInfoProto(name=source))
        external = sum(item.ByteSize() for item in model.graph.initializer) > MAX_INLINE_BYTES
        onnx.save_model(model, str(path), save_as_external_data=external, location=external_name(path))


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Tensors that a node reads, in the branches of an If or a Loop too."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)


def _common(reference: _Network, suspect: _Network) -> list[str]:
    """Activations that both files have, in the order of the reference.

    Raises:
        InputError: the outputs are not among them.
    """
    theirs = set(suspect.activations)
    common = [name for name in reference.activations if name in theirs]
    if not set(reference.outputs) <= set(common) or not reference.outputs == suspect.outputs:
        raise InputError(
            f"{reference.path} computes {', '.join(reference.outputs)} and {suspect.path} "
            f"{', '.join(suspect.outputs)}: they are not of one network; give two files of one export."
        )
    return common


def _error(reference: _Network, suspect: _Network, tensor: str, images: np.ndarray) -> float:
    """`Probe.error` of one activation.

    Raises:
        InputError: its shapes differ, or a file cannot be executed.
        WorkError: ONNX Runtime failed.
    """
    noise = signal = 0.0
    for a, b in zip(_values(reference, tensor, images), _values(suspect, tensor, images), strict=True):
        if a.shape != b.shape:
            raise InputError(
                f"{tensor} has shape {a.shape} in {reference.path} and {b.shape} in {suspect.path}: they are not of "
                "one network; give two files of one export."
            )
        a, b = a.astype(np.float64), b.astype(np.float64)
        noise += np.square(a - b).sum() if np.isfinite(b).all() else np.inf
        signal += np.square(a).sum()
    if signal == 0:
        return 0.0 if noise == 0 else np.inf
    return float(np.sqrt(noise / signal))


def _values(network: _Network, tensor: str, images: np.ndarray) -> Iterator[np.ndarray]:
    """The activation for each batch of images."""
    with TemporaryDirectory(prefix="espalier-divergence-") as folder:
        path = Path(folder) / network.path.name
        network.cut(tensor, path)
        with open_runtime(path, for_verification=True) as runtime:
            for start in range(0, len(images), BATCH):
                batch = images[start : start + BATCH].astype(network.input.dtype, copy=False)
                (values,) = runtime.run({network.input.name: batch}).values()
                yield values
