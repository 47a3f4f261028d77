"""From a checkpoint to an ONNX file that stands in a manifest."""

import logging
from collections.abc import Collection, Iterable
from pathlib import Path

import onnx

from compress import checkpoint
from compress.errors import InputError
from deploy import manifest
from deploy.export import export_onnx, read_onnx
from deploy.runtimes import TensorSpec

logger = logging.getLogger(__name__)

PRECISION = "fp32"


def export_checkpoint(directory: Path, path: Path, *, trust: Collection[str] = ()) -> manifest.Entry:
    """Write the network of the checkpoint `directory` as the ONNX file `path` and enter it in its folder's manifest.

    Args:
        trust: modules that may be imported to build the network, see `compress.checkpoint.load`.

    Raises:
        InputError: the checkpoint cannot be loaded, or the file cannot be written.
        WorkError: the network cannot be exported.
    """
    architecture = checkpoint.Architecture.read(directory)
    export_onnx(
        checkpoint.load(directory, trust=trust),
        path,
        image_shape=architecture.image_shape,
        classes=architecture.classes,
        mean=architecture.mean,
        std=architecture.std,
        checkpoint_digest=architecture.sha256,
    )
    inputs, outputs = onnx_specs(read_onnx(path), path)
    entry = manifest.add(
        path.parent,
        path.name,
        kind="onnx",
        precision=PRECISION,
        inputs=inputs,
        outputs=outputs,
        checkpoint_digest=architecture.sha256,
    )
    logger.info("wrote %s, %.0f kB", path, entry.size_bytes / 1000)
    return entry


def onnx_specs(model: onnx.ModelProto, path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the graph; initialisers, which old files list among the inputs, are left out.

    Raises:
        InputError: one of them is no tensor.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    return _specs(inputs, path), _specs(model.graph.output, path)


def _specs(values: Iterable[onnx.ValueInfoProto], path: Path) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        if not value.type.HasField("tensor_type"):
            raise InputError(f"{path}: {value.name} is no tensor, so the file is no classifier: give another one.")
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        sizes = (
            size.dim_param or None if not size.HasField("dim_value") else size.dim_value for size in tensor.shape.dim
        )
        specs.append(TensorSpec(value.name, dtype, tuple(sizes)))
    return tuple(specs)
