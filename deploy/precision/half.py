"""fp16 and bf16 files: mixed precision written into the ONNX graph by NVIDIA's AutoCast.

What would leave the range in which fp16 is accurate stays in fp32 between casts: nodes with weights beyond fp16's
largest number, and nodes with an activation above `LARGEST` on real samples.
"""

import io
import logging
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from compress.errors import MissingExtraError, WorkError, first_line
from deploy.onnx_file import read_onnx, write_onnx
from deploy.precision.calibration import Ranges, calibrate
from deploy.precision.layers import layer_names, match_layers

logger = logging.getLogger(__name__)

_LOGGERS = ("modelopt.onnx", "modelopt.onnx.autocast")

LARGEST = 512.0
"""Absolute value of an activation up to which its node becomes half; beyond it fp16's spacing is 0.5 and more.

AutoCast's own threshold (`data_max`), for both types.
"""


def to_half(
    source: Path,
    destination: Path,
    precision: Literal["fp16", "bf16"],
    *,
    fp32_io: bool,
    samples: np.ndarray | None,
    exclude: Collection[str] = (),
) -> tuple[str, ...]:
    """Write the half-precision form of an fp32 file; its metadata are those of the source.

    bf16 raises the ONNX operator set to 22, the first in which convolutions take it.

    Args:
        fp32_io: whether inputs and outputs stay float32, with casts behind them.
        samples: images, float32 (N, C, H, W), on which activations are measured; without them only the weights tell
            what stays in fp32.
        exclude: layers that stay in fp32, by name or pattern, see `match_layers`.

    Returns:
        The nodes that stay in fp32, by the first of their `layer_names`.

    Raises:
        InputError: the file or the samples cannot be used, or a name matches no layer.
        MissingExtraError: the extra `quant` is not installed.
        WorkError: the conversion failed, or its result is not valid ONNX.
    """
    graph = read_onnx(source)
    ranges = {} if samples is None else calibrate(source, samples)
    apart = _out_of_range(graph.graph, ranges) | match_layers(graph, exclude)
    model = _convert(source, precision, apart, fp32_io=fp32_io)
    _copy_metadata(graph, model)
    names = layer_names(graph)
    kept = [names[name][0] for name in _computed_in_fp32(model.graph) if name in names]
    write_onnx(model, destination)
    return tuple(dict.fromkeys(kept))


def _out_of_range(graph: onnx.GraphProto, ranges: Ranges) -> frozenset[str]:
    """Names of the nodes that read or write an activation beyond `LARGEST`."""
    beyond = {name for name, bounds in ranges.items() if max(map(abs, bounds)) > LARGEST}
    return frozenset(node.name for node in graph.node if not beyond.isdisjoint((*node.input, *node.output)))


def _convert(source: Path, precision: str, apart: Collection[str], *, fp32_io: bool) -> onnx.ModelProto:
    """AutoCast's result; the nodes named in `apart` stay in fp32 besides those that it finds by their weights."""
    with _chatter_to_log():
        try:
            from modelopt.onnx.autocast import convert_to_mixed_precision
        except ImportError as error:
            raise MissingExtraError("nvidia-modelopt", "quant", "Writing fp16 and bf16") from error
    with _chatter_to_log():
        try:
            model: onnx.ModelProto = convert_to_mixed_precision(
                str(source),
                low_precision_type=precision,
                nodes_to_exclude=[f"{re.escape(name)}$" for name in sorted(apart)],
                # It would hold the activations of all samples at once; ours are measured batch by batch.
                data_max=np.inf,
                keep_io_types=fp32_io,
                providers=["cpu"],
            )
        except Exception as error:  # the library raises bare Exception for whatever it cannot convert
            raise WorkError(f"{source.name} cannot be converted to {precision}: {first_line(error)}.") from error
    return model


def _copy_metadata(source: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """AutoCast drops the metadata of the file and of its nodes, which name the layers."""
    del model.metadata_props[:]
    model.metadata_props.extend(source.metadata_props)
    nodes = {node.name: node for node in source.graph.node}
    for node in model.graph.node:
        if node.name in nodes:
            node.ClearField("metadata_props")
            node.metadata_props.extend(nodes[node.name].metadata_props)


def _computed_in_fp32(graph: onnx.GraphProto) -> list[str]:
    """Names of the nodes with an output in fp32, casts apart."""
    values = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return [
        node.name
        for node in graph.node
        if node.op_type != "Cast" and any(values.get(name) == onnx.TensorProto.FLOAT for name in node.output)
    ]


@contextmanager
def _chatter_to_log() -> Iterator[None]:
    """What the library prints, logs and warns about goes to our log at level DEBUG, once it is done.

    It hangs handlers on stdout to its loggers when it is imported, and logs some messages to the root.
    """
    collector = _Collector()
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = [collector]
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        for name in _LOGGERS:
            logging.getLogger(name).handlers = []
        for line in (*collector.lines, *printed.getvalue().splitlines()):
            logger.debug("autocast: %s", line)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
