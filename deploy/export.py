"""Write a model as a checked ONNX file with dynamic batch that carries what a server must know about it."""

import difflib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

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
    part: str | None = None,
) -> Path:
    """Export `model` in eval mode: input "images" float32 (batch, C, H, W), output "logits" (batch, classes).

    Of a network that returns a dictionary, "logits" is its tensor "out", and what computes the others is left away; one
    that classifies pixels gives (batch, classes, H, W).

    PyTorch's optimiser runs on the graph and folds every batch normalisation into the convolution before it.
    The file is checked with full shape inference before it takes its name: a kill leaves the old file or the
    new one.

    Args:
        image_shape: (C, H, W); fixed in the file, while the batch is dynamic.
        metadata: further entries of the file's metadata.
        mean, std: the normalisation of the images, per channel.
        resize: shorter side of an image before its centre is cut out, see `Metadata`.
        checkpoint_digest: SHA-256 of the checkpoint that the model came from.
        part: name of a submodule, such as the backbone of a detector, that takes `image_shape` and is exported alone.
            All tensors that it returns become outputs, called PART.KEY after their place in what it returns.

    Returns:
        The path written.

    Raises:
        WorkError: the model cannot be exported, or not with a dynamic batch.
        InputError: the folder cannot be written, there is no such part, or the model returns something else than one
            tensor of scores.
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
    program = _export(model if part is None else _part(model, part), about.image_shape)
    if part is None:
        _keep_prediction(program, type(model).__name__)
    else:
        for value, place in zip(program.model.graph.outputs, _places(program), strict=True):
            value.name = ".".join((part, *place))
    for node in program.model.graph.all_nodes():
        for key in _PRIVATE_NODE_KEYS:
            node.metadata_props.pop(key, None)
    _keep_padding_before_pools(program.model.graph)
    program.model.metadata_props.update(entries)
    _write(program, path)
    return path


def _export(model: nn.Module, image_shape: tuple[int, ...]) -> torch.onnx.ONNXProgram:
    parameter = next(model.parameters(), torch.empty(0))
    # Two images: a batch of 1 may be taken for a constant by code that looks at the size.
    example = torch.zeros(2, *image_shape, device=parameter.device)
    name = type(model).__name__
    try:
        with evaluating(model), torch.no_grad(), _attention_on_four_axes(), _chatter_to_log():
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
        if _detects(model, example):
            raise InputError(
                f"{name} cannot be exported to ONNX: it returns a list of what it detects, whose length depends on the "
                f"image, and torch {torch.__version__} captures no such network; export its backbone alone, with "
                "--part backbone."
            ) from error
        raise WorkError(
            f"{name} cannot be exported to ONNX: {_cause(error)}; change the model's forward so that "
            "torch.export captures it."
        ) from error
    assert program is not None  # a TorchScript export would return None
    return program


def _part(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        near = difflib.get_close_matches(name, [known for known, _ in model.named_modules() if known], n=1)
        hint = f": did you mean {near[0]!r}?" if near else "."
        raise InputError(f"{type(model).__name__} has no part {name!r}{hint}") from error


def _places(program: torch.onnx.ONNXProgram) -> list[tuple[str, ...]]:
    """Of each output where it stands in what the module returns, as keys and numbers from the outside in."""
    exported = program.exported_program
    assert exported is not None
    spec = exported.call_spec.out_spec
    assert spec is not None
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
    return [tuple(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in leaves]


def _keep_prediction(program: torch.onnx.ONNXProgram, name: str) -> None:
    """Leave the scores as the only output (`compress.tasks.prediction`), and drop what none but the others need."""
    graph = program.model.graph
    outputs = list(graph.outputs)
    if len(outputs) == 1:
        return
    chosen = [value for value, place in zip(outputs, _places(program), strict=True) if place == ("out",)]
    if not chosen:
        raise InputError(
            f"{name} returns {len(outputs)} tensors, but one tensor of logits is exported; "
            "wrap it in a module that returns the logits alone."
        )
    graph.outputs[:] = chosen
    RemoveUnusedNodesPass()(program.model)
    chosen[0].name = OUTPUT_NAME


def _keep_padding_before_pools(graph: ir.Graph) -> None:
    """Let zeros before a maximum be -0.0.

    ONNX Runtime (1.31, its Pad_Fusion) makes such zeros the pool's own padding, which counts as no value, so that
    the maximum at the border changes where everything in the window is negative. It does so for zeros of all bits 0.
    """
    for node in graph.all_nodes():
        constant = node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant"
        if not constant or not any(use.node.op_type == "MaxPool" for use in node.outputs[0].uses()):
            continue
        given = node.inputs[2] if len(node.inputs) > 2 else None
        if given is not None and given.const_value is not None and not given.const_value.numpy().any():
            zero = ir.tensor(-given.const_value.numpy(), name=f"{given.name}.{node.outputs[0].name}")
            value = ir.Value(name=zero.name, shape=given.shape, type=given.type, const_value=zero)
            graph.register_initializer(value)
            node.replace_input_with(2, value)
            if not given.uses():
                del graph.initializers[str(given.name)]


def _detects(model: nn.Module, images: torch.Tensor) -> bool:
    """Whether the model returns for each image a dictionary of its own, as torchvision's detectors do."""
    try:
        with evaluating(model), torch.no_grad():
            outputs = model(list(images))
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError):  # it takes no list
        return False
    return isinstance(outputs, list) and all(isinstance(found, Mapping) for found in outputs)


@contextmanager
def _attention_on_four_axes() -> Iterator[None]:
    """Give the exporter, which translates attention on (N, heads, L, E) alone, that shape where a model has another."""
    attention: Any = functional.scaled_dot_product_attention

    def reshaped(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if query.dim() == 4:
            return attention(query, key, value, attn_mask, *args, **kwargs)
        leading = query.shape[:-2]  # (N, L, E), or (N, windows, heads, L, E)
        shape = (-1, 1) if query.dim() == 3 else (-1, leading[-1])
        if attn_mask is not None and attn_mask.dim() > 2:
            attn_mask = attn_mask.expand(*leading, -1, -1).reshape(*shape, *attn_mask.shape[-2:])
        flat = [each.reshape(*shape, *each.shape[-2:]) for each in (query, key, value)]
        return attention(*flat, attn_mask, *args, **kwargs).reshape(*leading, query.shape[-2], value.shape[-1])

    functional.scaled_dot_product_attention = reshaped
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = attention


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
