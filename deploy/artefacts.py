"""From a checkpoint to an ONNX file that stands in a manifest."""

import logging
from collections.abc import Collection
from pathlib import Path

from compress import checkpoint
from deploy import manifest
from deploy.export import export_onnx
from deploy.onnx_file import onnx_specs, read_onnx

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
        resize=architecture.resize,
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
