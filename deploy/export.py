"""Write a model as a checked ONNX file with dynamic batch that carries what a server must know about it."""

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from compress.errors import InputError, WorkError, first_line
from compress.files import make_directory, replacing
from deploy.manifest import tool_versions
from deploy.runtimes.pytorch import INPUT_NAME, OUTPUT_NAME, evaluating

logger = logging.getLogger(__name__)

PREFIX = "espalier."
"""Our keys in `metadata_props` begin so: espalier.version and one more for each field of `Metadata`."""

MAX_INLINE_BYTES = 1536 * 1024**2
"""Weights above this size go to `NAME.onnx.data` beside the file: protobuf holds at most 2 GiB."""

BATCH = "batch"
# The traces name files on the exporting machine, and both grow the file without use for who runs it.
_PRIVATE_NODE_KEYS = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")


class Metadata(BaseModel):
    """What an ONNX file of ours says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    """Espalier's version."""
    torch_version: str
    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    """Per channel, of images scaled to [0, 1]; empty if not known."""
    std: tuple[float, ...]
    checkpoint_sha256: str
    """Digest of the checkpoint that was exported; empty if it was none."""
    other: dict[str, str]
    """The caller's own entries."""


def export_onnx(
    model: nn.Module,
    path: Path,
    *,
    image_shape: Sequence[int],
    metadata: Mapping[str, str] | None = None,
    classes: Sequence[str] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
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
        checkpoint_sha256=checkpoint_digest,
        other=dict(metadata or {}),
    )
    entries = _encode(about)
    make_directory(path.parent)
    program = _export(model, about.image_shape)
    for node in program.model.graph.all_nodes():
        for key in _PRIVATE_NODE_KEYS:
            node.metadata_props.pop(key, None)
    program.model.metadata_props.update(entries)
    _write(program, path)
    return path


def read_onnx(path: Path) -> onnx.ModelProto:
    """The graph and metadata of an ONNX file, without weights that lie outside of it.

    Raises:
        InputError: the file is missing, cut off or not ONNX at all.
    """
    path = Path(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}; give an ONNX file.") from error
    except DecodeError as error:
        raise InputError(f"{path} is not a readable ONNX file: {error}; export it again.") from error
    # An empty or well-cut prefix of a file is valid protobuf: every field of it is optional.
    if not model.graph.output or not model.opset_import:
        raise InputError(f"{path} is not a readable ONNX file: it holds no graph; export it again.")
    return model


def read_metadata(path: Path) -> Metadata:
    """What `export_onnx` wrote about the model into the file.

    Raises:
        InputError: the file is unreadable, or Espalier's entries are missing or malformed.
    """
    entries = {item.key: item.value for item in read_onnx(path).metadata_props}
    fields: dict[str, Any] = {"other": {}}
    try:
        for key, value in entries.items():
            if key.startswith(PREFIX):
                fields[key.removeprefix(PREFIX)] = json.loads(value)
            else:
                fields["other"][key] = value
        return Metadata.model_validate(fields)
    except (ValidationError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} lacks Espalier's description of the model ({PREFIX}image_shape and others); "
            "it was written or changed by another tool: export it again with espalier export."
        ) from error


def _encode(about: Metadata) -> dict[str, str]:
    """Each field as JSON under its own key, the caller's entries as they are."""
    for key in about.other:
        if key.startswith(PREFIX):
            raise InputError(f'Metadata key "{key}" begins with "{PREFIX}", which is reserved; rename it.')
    own = about.model_dump(mode="json", exclude={"other"})
    return about.other | {PREFIX + key: json.dumps(value) for key, value in own.items()}


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
    """Write and check in a scratch folder beside the target, then move: the data file first.

    A reader never sees a graph beside weights of another export.
    """
    size = sum(
        value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value is not None
    )
    external = size > MAX_INLINE_BYTES
    data_path = path.with_name(f"{path.name}.data")
    try:
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            scratch = Path(folder) / path.name
            program.save(scratch, external_data=external)
            _check(scratch, path.name)
            if external:
                path.unlink(missing_ok=True)
                _move(scratch.with_name(data_path.name), data_path)
            _move(scratch, path)
            if not external:
                data_path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"Cannot write {path}: {error.strerror or error}; choose a directory you can write."
        ) from error


def _move(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        source.replace(temporary)


def _check(path: Path, name: str) -> None:
    """The file passes ONNX's checker, and its batch is dynamic from the input to the output."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        inferred = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False), strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise WorkError(f"The exported {name} is not valid ONNX: {_cause(error)}.") from error
    for value in (*inferred.graph.input, *inferred.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if not dimensions or not dimensions[0].dim_param:
            sizes = ", ".join(item.dim_param or str(item.dim_value) for item in dimensions)
            raise WorkError(
                f"{name} cannot be exported with a dynamic batch: {value.name} came out as ({sizes}), "
                "because the model's forward fixes the batch size; let it take the size from its input "
                "(x.flatten(1), x.shape[0])."
            )
