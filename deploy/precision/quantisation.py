"""int8 and fp8 files: explicit quantisation, written into the ONNX graph as Q/DQ pairs for one kind of kernels.

cpu   unsigned asymmetric activations, placed by ONNX Runtime's own quantiser, see `cpu_quantiser`
gpu   symmetric activations, placed as TensorRT wants them, see `placement`

The weights are symmetric in both, with one scale for each output channel, and stored quantised; all else stays float32.

x86 processors without VNNI (before Cascade Lake and Zen 4) add pairs of products of an unsigned and a signed byte in 16
bits. That saturates where activations and weights are both near their limits, and costs accuracy there; the evaluation
of the artefact itself shows how much.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from compress.errors import InputError
from deploy.onnx_file import load_onnx, read_onnx, write_onnx
from deploy.precision import QUANTISED, TARGETS, Precision, Target
from deploy.precision.calibration import Ranges
from deploy.precision.cpu_quantiser import quantise_for_cpu, sequence_arithmetic
from deploy.precision.layers import layer_names, match_layers
from deploy.precision.placement import place, weighted_nodes
from deploy.precision.qdq import insert_pairs

MIN_OPSET: dict[Precision, int] = {"int8": 13, "fp8": 19}
"""The ONNX operator sets since which Q/DQ have scales per channel, and FP8."""


@dataclass(frozen=True)
class Quantised:
    """What became of the layers with weights; each goes by the first of its `layer_names`."""

    layers: tuple[str, ...]
    """Those that are quantised."""
    excluded: tuple[str, ...]
    """Those that stayed in floating point because they were excluded by name."""


def quantise(
    source: Path,
    destination: Path,
    *,
    precision: Precision,
    target: Target,
    ranges: Ranges,
    exclude: Collection[str] = (),
) -> Quantised:
    """Write the quantised form of an fp32 file; its metadata are those of the source.

    Args:
        precision: "int8" or "fp8".
        target: "cpu" or "gpu"; fp8 is for "gpu" only.
        ranges: of the source's activations, from `calibrate` for the same target.
        exclude: layers that stay in floating point, by name or pattern, see `match_layers`.

    Raises:
        InputError: there are no such files, a name matches no layer, the ranges are of another network, nothing is
            left to quantise, the file's operator set is too old, or the folder cannot be written.
        MissingExtraError: ONNX Runtime is not installed.
        WorkError: the result is not valid ONNX, or the disk is full.
    """
    if precision not in QUANTISED or target not in TARGETS[precision]:
        known = ", ".join(f"{name} for {item}" for name in sorted(QUANTISED) for item in TARGETS[name])
        raise InputError(f"No {precision} file is made for {target}; choose one of {known}.")
    graph = read_onnx(source)
    _require_opset(graph, precision, source)
    excluded = match_layers(graph, exclude)
    weighted = {node.name for node in weighted_nodes(graph.graph)}
    _require_ranges(graph, ranges, source)
    model = load_onnx(source)
    if target == "cpu":
        model = quantise_for_cpu(model, ranges, excluded | sequence_arithmetic(graph))
        del model.metadata_props[:]
        model.metadata_props.extend(graph.metadata_props)
    else:
        insert_pairs(model.graph, place(graph, excluded, fp8=precision == "fp8"), ranges, precision)
    names = layer_names(graph)
    dequantised = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    done = [node.name for node in model.graph.node if node.name in weighted and node.input[1] in dequantised]
    if not done:
        raise InputError(
            f"Nothing of {source.name} can be quantised to {precision} for {target}: every layer with weights is "
            "excluded or of a kind that stays in floating point; exclude fewer layers, or use fp16."
        )
    write_onnx(model, destination)
    return Quantised(_layers(done, names), _layers(sorted(weighted & excluded), names))


def _layers(nodes: Iterable[str], names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names[node][0] for node in nodes))


def _require_opset(graph: onnx.ModelProto, precision: Precision, source: Path) -> None:
    version = next((item.version for item in graph.opset_import if item.domain in ("", "ai.onnx")), 0)
    if version < MIN_OPSET[precision]:
        raise InputError(
            f"{source.name} uses ONNX operator set {version}, but {precision} needs {MIN_OPSET[precision]} or later; "
            "export the network again with espalier export."
        )


def _require_ranges(graph: onnx.ModelProto, ranges: Ranges, source: Path) -> None:
    missing = [node.input[0] for node in weighted_nodes(graph.graph) if node.input[0] not in ranges]
    if missing:
        raise InputError(
            f"There is no range for the activation {missing[0]} of {source.name}: the ranges were measured on another "
            "file; calibrate on this one."
        )
