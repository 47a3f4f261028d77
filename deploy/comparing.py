"""Deployable files held against the checkpoint that they came from: errors, accuracy, and where they first part."""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich import box
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from compress import checkpoint, data
from compress.checkpoint import Architecture
from compress.errors import InputError, WorkError
from compress.tasks import task_named
from deploy.divergence import first_divergence
from deploy.engine import SUFFIX as PLAN
from deploy.export import export_onnx
from deploy.metadata import decode
from deploy.onnx_file import SUFFIX as ONNX
from deploy.onnx_file import read_onnx
from deploy.parity import check_parity, evaluate_runtime
from deploy.precision import Precision
from deploy.runtimes import open_runtime
from deploy.stages import sample_images
from deploy.tolerance import TOLERANCES
from deploy.trust import trusted_plan

DIVERGED: Final[dict[Precision, float]] = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.1, "int8": 0.2, "fp8": 0.2}
"""Root mean square error of an activation, as a share of its own, at which a layer counts as the first to diverge."""

FIGURES = ("max_relative_error", "mean_relative_error", "rms_relative_error", "top1_agreement", "largest_flip")


def compare(
    directory: Path,
    artefacts: Sequence[Path],
    source: str,
    *,
    samples: int = 64,
    batch_sizes: Sequence[int] = (1, 3, 8),
    device: str = "cpu",
    runtime: str | None = None,
    trusted_manifest: Path | None = None,
    first_layer: bool = False,
    trust: Collection[str] = (),
) -> dict[str, Any]:
    """Compare each file with the PyTorch network of a checkpoint on the test split of a data source, as JSON values.

    A file that was quantised for GPUs runs on the CPU, too, for its numbers.

    Args:
        source: of the data, see `compress.data.load`.
        samples: test images on which logits are compared; accuracies are of the whole split.
        batch_sizes: images per inference.
        device, runtime, trusted_manifest: as `open_runtime`.
        first_layer: for each ONNX file that breaks its tolerance, find the first layer that diverges.
        trust: modules that the checkpoint's factory and the data source may import.

    Returns:
        "files": for each file its figures, the tolerance of its precision, "problem" (None where it keeps to it), and
        "first_layer" where it was looked for.

    Raises:
        InputError: checkpoint, data or a file cannot be used, or they do not fit together.
        WorkError: a runtime failed.
    """
    architecture = Architecture.read(directory)
    loaded = data.load(source, batch_size=64, image_size=architecture.image_shape[-1], augment=False, trust=trust)
    if loaded.image_shape != architecture.image_shape:
        raise InputError(
            f"{source} has images of {loaded.image_shape} and {directory} takes {architecture.image_shape}: give data "
            "of that shape, from package.module:function if it is not square."
        )
    model = checkpoint.load(directory, trust=trust)
    task = task_named(loaded.task, trust=trust)
    images = sample_images(loaded, at_least=max(batch_sizes), at_most=samples)
    found = []
    for path in artefacts:
        precision = _precision(path, trusted_manifest)
        tolerance = TOLERANCES[precision]
        with open_runtime(
            path,
            device=device,
            runtime=runtime,
            trusted_manifest=trusted_manifest if path.suffix == PLAN else None,
            for_verification=True,
        ) as opened:
            parity = check_parity(model, opened, images, batch_sizes=batch_sizes)
            accuracy = evaluate_runtime(opened, loaded.test, task=task, description=f"{path.name}: accuracy")
            description = opened.description()
        problem = None
        try:
            parity.require(tolerance)
        except WorkError as error:
            problem = str(error)
        figures = {name: getattr(parity, name) for name in (*FIGURES, "sqnr_db")}
        layer = None
        if first_layer and problem is not None and path.suffix == ONNX:
            layer = _first_layer(model, path, images, DIVERGED[precision])
        found.append(
            {
                "file": str(path),
                "precision": precision,
                **{name: value if math.isfinite(value) else None for name, value in figures.items()},
                "tolerance": asdict(parity.applied(tolerance)),
                "accuracy": asdict(accuracy),
                "problem": problem,
                "first_layer": layer,
                "runtime": description,
            }
        )
    return {
        "checkpoint": str(directory),
        "checkpoint_sha256": architecture.sha256,
        "data": source,
        "samples": len(images),
        "batch_sizes": list(batch_sizes),
        "files": found,
    }


def tables(found: dict[str, Any]) -> list[RenderableType]:
    """The outcome of `compare` for the terminal."""
    table = Table(
        title=f"Against {found['checkpoint']} in PyTorch, {found['samples']} test images of {found['data']}",
        title_justify="left",
        caption="Errors of logits: the largest, as a share of the largest logit; signal over noise of all. Accuracy is "
        "the file's own, on the whole test split.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("file", overflow="fold")
    metric = next((item["accuracy"]["metric"] for item in found["files"]), "top-1")
    for header in ("largest error", "signal / noise", "same top class", metric, "within tolerance"):
        table.add_column(header, justify="right")
    sentences: list[RenderableType] = []
    for item in found["files"]:
        error, ratio = item["max_relative_error"], item["sqnr_db"]
        table.add_row(
            item["file"],
            "not finite" if error is None else f"{error:.2g}",
            "n/a" if ratio is None else f"{ratio:.1f} dB",
            f"{item['top1_agreement']:.2f} %",
            f"{item['accuracy']['top1']:.2f} %",
            "yes" if item["problem"] is None else "no",
        )
        if item["first_layer"] is not None:
            sentences.append(f"{item['file']}: {item['first_layer']}")
    return [table, *sentences]


def require(found: dict[str, Any]) -> None:
    """Raise what `compare` found wrong.

    Raises:
        WorkError: one line for each file that breaks the tolerance of its precision.
    """
    problems = [f"{item['file']}: {item['problem']}" for item in found["files"] if item["problem"] is not None]
    if problems:
        raise WorkError("\n".join(problems))


def _precision(path: Path, trusted_manifest: Path | None) -> Precision:
    """What the file says of itself; of another tool's file, whose numbers are not known to be narrower, fp32."""
    if path.suffix == PLAN:
        return trusted_plan(path, trusted_manifest=trusted_manifest)[1].precision
    about = decode(read_onnx(path).metadata_props, str(path))
    return about.precision if about is not None else "fp32"


def _first_layer(model: nn.Module, path: Path, images: Tensor, tolerance: float) -> str:
    with TemporaryDirectory() as folder:
        reference = export_onnx(model, Path(folder) / "reference.onnx", image_shape=images.shape[1:])
        found = first_divergence(reference, path, images.numpy(), tolerance=tolerance)
    return str(found) if found is not None else f"no layer is off by more than {tolerance:g} of its activations"
