"""ONNX files: reading without trusting them, checking, and writing so that a kill leaves the old or the new one."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from compress.errors import InputError, WorkError, first_line
from compress.files import failed_write, make_directory, replacing
from deploy.metadata import Metadata, decode, lacking
from deploy.tensor_spec import TensorSpec

MAX_INLINE_BYTES = 1536 * 1024**2
"""Weights above this size go to `NAME.onnx.data` beside the file: protobuf holds at most 2 GiB."""

SUFFIX = ".onnx"


def read_onnx(path: Path) -> onnx.ModelProto:
    """The graph and metadata of an ONNX file, without weights that lie outside of it.

    Raises:
        InputError: the file is missing, cut off, not ONNX at all, or names weights outside its own folder.
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
    for tensor in _tensors(model.graph):
        _require_inside(tensor, path)
    return model


def load_onnx(path: Path) -> onnx.ModelProto:
    """The whole of an ONNX file, external weights too.

    Raises:
        InputError: as `read_onnx`, or the external weights are missing or cut off.
    """
    model = read_onnx(path)
    try:
        onnx.load_external_data_for_model(model, str(Path(path).parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError(f"The weights of {path} cannot be read: {first_line(error)}; export it again.") from error
    return model


def read_metadata(path: Path) -> Metadata:
    """What we wrote about the model into the file.

    Raises:
        InputError: the file is unreadable, or Espalier's entries are missing or malformed.
    """
    about = decode(read_onnx(path).metadata_props, str(path))
    if about is None:
        raise InputError(lacking(str(path)))
    return about


def onnx_specs(model: onnx.ModelProto, path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the graph; initialisers, which old files list among the inputs, are left out.

    Raises:
        InputError: one of them is no tensor.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    return _specs(inputs, path), _specs(model.graph.output, path)


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a checked file; weights above `MAX_INLINE_BYTES` go beside it, and `model` is then left without them.

    Raises:
        InputError: the folder cannot be written.
        WorkError: the model is not valid ONNX with a dynamic batch, or the disk is full.
    """
    external = sum(tensor.ByteSize() for tensor in model.graph.initializer) > MAX_INLINE_BYTES
    with writing(path) as scratch:
        onnx.save_model(
            model,
            str(scratch),
            save_as_external_data=external,
            all_tensors_to_one_file=True,
            location=external_name(path),
        )


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a scratch path for the block to write; check what it wrote, then move it, the weights first.

    A reader never sees a graph beside weights of another export.

    Raises:
        InputError: the folder cannot be written.
        WorkError: what was written is not valid ONNX with a dynamic batch, or the disk is full.
    """
    make_directory(path.parent)
    try:
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            scratch = Path(folder) / path.name
            yield scratch
            check_onnx(scratch, path.name)
            move_onnx(scratch, path)
    except OSError as error:
        raise failed_write(path, error) from error


def move_onnx(source: Path, target: Path) -> None:
    """Put a file and its external weights in the place of others of the same name, the weights first."""
    weights, beside = source.with_name(external_name(source)), target.with_name(external_name(target))
    external = weights.exists()
    if external:
        target.unlink(missing_ok=True)
        _move(weights, beside)
    _move(source, target)
    if not external:
        beside.unlink(missing_ok=True)


def external_name(path: Path) -> str:
    """Name of the file beside `path` that holds weights too large for it."""
    return f"{path.name}.data"


def check_onnx(path: Path, name: str) -> None:
    """The file passes ONNX's checker with full shape inference, and its batch is dynamic from input to output.

    Raises:
        WorkError: it does not; `name` is what the file is called.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        inferred = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False), strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise WorkError(f"The exported {name} is not valid ONNX: {first_line(error)}.") from error
    for value in (*inferred.graph.input, *inferred.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if not dimensions or not dimensions[0].dim_param:
            sizes = ", ".join(item.dim_param or str(item.dim_value) for item in dimensions)
            raise WorkError(
                f"{name} cannot be exported with a dynamic batch: {value.name} came out as ({sizes}), "
                "because the model's forward fixes the batch size; let it take the size from its input "
                "(x.flatten(1), x.shape[0])."
            )


def _move(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        source.replace(temporary)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph, those in attributes and subgraphs too."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(subgraph)


def _require_inside(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuse weights that the file takes from elsewhere than its own folder: it could name any file of the machine."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    location = next((item.value for item in tensor.external_data if item.key == "location"), "")
    folder = path.parent.resolve()
    inside = bool(location) and not PurePosixPath(location).is_absolute() and ".." not in PurePosixPath(location).parts
    if not inside or not (folder / location).resolve().is_relative_to(folder):
        raise InputError(
            f'{path} takes the weights {tensor.name} from "{location}", outside its own folder: '
            "do not use the file unless you know its maker, and export it again."
        )


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
