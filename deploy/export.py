"""Write a model as a checked ONNX file with dynamic batch that carries what a server must know about it."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import nn

from compress.errors import InputError, WorkError, first_line
from compress.files import make_directory
from deploy import onnx_file
from deploy.manifest import tool_versions
from deploy.metadata import Metadata, encode
from deploy.runtimes.pytorch import INPUT_NAME, OUTPUT_NAME, evaluating

logger = logging.getLogger(__name__)

BATCH = "batch"
# The traces name files on the exporting machine, and both grow the file without use for who runs it.
_PRIVATE_NODE_KEYS = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    image_shape: Sequence[int],
    metadata: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    resize: int | None = None,
    checkpoint_digest: str = "",
) -> Path:
    """Export `model` in eval mode: input "images" float32 (batch, C, H, W), output "logits" (batch, classes).

    PyTorch's optimiser runs on the graph and folds every batch normalisation into the convolution before it.
    The file is checked with full shape inference before it takes its name: a kill leaves the old file or the
    new one.

    Args:
        image_shape: (C, H, W); fixed in the file, while the batch is dynamic.
        metadata: further entries of the file's metadata.
        mean, std: the normalisation of the images, per channel.
        resize: shorter side of an image before its centre is cut out, see `Metadata`.
        checkpoint_digest: SHA-256 of the checkpoint that the model came from.

    Returns:
        The path written.

    Raises:
        WorkError: the model cannot be exported, or not with a dynamic batch.
        InputError: the folder cannot be written, or the model returns something else than one tensor.
    """
    path = Path(path)
    channels, height, width = image_shape
    about = Metadata(
        version=tool_versions()["espalier"],
        torch_version=str(torch.__version__),
        image_shape=(channels, height, width),
        classes=tuple(classes),
        mean=tuple(mean),
        std=tuple(std),
        resize=resize,
        checkpoint_sha256=checkpoint_digest,
        other=dict(metadata or {}),
    )
    entries = encode(about)
    make_directory(path.parent)
    program = _export(model, about.image_shape)
    for node in program.model.graph.all_nodes():
        for key in _PRIVATE_NODE_KEYS:
            node.metadata_props.pop(key, None)
    program.model.metadata_props.update(entries)
    _write(program, path)
    return path


def _export(model: nn.Module, image_shape: tuple[int, ...]) -> torch.onnx.ONNXProgram:
    parameter = next(model.parameters(), torch.empty(0))
    # Two images: a batch of 1 may be taken for a constant by code that looks at the size.
    example = torch.zeros(2, *image_shape, device=parameter.device)
    name = type(model).__name__
    try:
        with evaluating(model), torch.no_grad(), _chatter_to_log():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                verbose=False,
                optimize=True,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},),
            )
    except torch.onnx.OnnxExporterError as error:
        raise WorkError(
            f"{name} cannot be exported to ONNX: {_cause(error)}; change the model's forward so that "
            "torch.export captures it."
        ) from error
    assert program is not None  # a TorchScript export would return None
    outputs = program.model.graph.outputs
    if len(outputs) != 1:
        raise InputError(
            f"{name} returns {len(outputs)} tensors, but one tensor of logits is exported; "
            "wrap it in a module that returns the logits alone."
        )
    return program


@contextmanager
def _chatter_to_log() -> Iterator[None]:
    """What the exporter prints, logs and warns about goes to our log at level DEBUG, once it is done."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if printed.getvalue():
            logger.debug("torch.onnx.export said:\n%s", printed.getvalue())


def _cause(error: BaseException) -> str:
    """The first line of the error at the root of the chain: PyTorch wraps it in pages of general advice."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return first_line(error)


def _write(program: torch.onnx.ONNXProgram, path: Path) -> None:
    size = sum(
        value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value is not None
    )
    external = size > onnx_file.MAX_INLINE_BYTES
    with onnx_file.writing(path) as scratch:
        program.save(scratch, external_data=external)
