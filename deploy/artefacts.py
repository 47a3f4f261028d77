"""From a checkpoint to ONNX files, one for each precision and target, that stand in a manifest."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.utils.data import DataLoader

from compress import checkpoint
from compress.data import Data
from compress.errors import InputError
from compress.files import make_directory
from compress.tasks import CLASSIFICATION, Task
from deploy import manifest
from deploy.export import export_onnx
from deploy.metadata import Quantisation, write_metadata
from deploy.onnx_file import SUFFIX, load_onnx, move_onnx, onnx_specs, read_metadata, read_onnx, write_onnx
from deploy.precision import HALF, QUANTISED, TARGETS, Precision, Target
from deploy.precision.calibration import calibrate
from deploy.precision.exclusion import least_exclusion
from deploy.precision.half import to_half
from deploy.precision.quantisation import quantise
from deploy.precision.settings import ExportSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """What quantisation needs of a data set."""

    source: str
    images: np.ndarray
    """Training images without augmentation, normalised, float32 (N, C, H, W)."""
    test: DataLoader
    """Labelled images on which a loss of accuracy is measured."""
    task: Task = CLASSIFICATION
    """How it is measured."""


def artefact_name(name: str, precision: Precision, target: Target) -> str:
    """NAME.fp16.onnx, NAME.int8.cpu.onnx: the target stands in the name where there are files for several."""
    parts = (name, precision) if target == "any" else (name, precision, target)
    return ".".join(parts) + SUFFIX


def targets(precision: Precision, wanted: Collection[Target]) -> tuple[Target, ...]:
    """Those of the wanted targets for which files of the precision are made."""
    return tuple(target for target in TARGETS[precision] if target == "any" or target in wanted)


def calibration_samples(loaded: Data, count: int, *, task: Task = CLASSIFICATION, seed: int = 0) -> Samples:
    """Draw `count` training images of data that were opened without augmentation, or as many as there are.

    Args:
        task: how a loss of accuracy is measured.

    Raises:
        InputError: the training split gives no batch, or something else than float images (N, C, H, W).
    """
    torch.manual_seed(seed)
    batches: list[np.ndarray] = []
    found = 0
    for images, _ in loaded.train:
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or not images.is_floating_point():
            given = (
                f"{images.dtype} {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
            )
            raise InputError(
                f"The calibration data {loaded.name} give {given}, but float images (N, C, H, W) are needed: normalise "
                "them in the loader."
            )
        batches.append(images.float().numpy())
        found += len(images)
        if found >= count:
            break
    if not batches:
        raise InputError(
            f"The calibration data {loaded.name} give no batch of training images: choose a smaller batch size or "
            "other data."
        )
    return Samples(loaded.name, np.concatenate(batches)[:count], loaded.test, task)


def export_checkpoint(
    directory: Path,
    folder: Path,
    *,
    name: str,
    settings: ExportSettings | None = None,
    wanted: Collection[Target] = ("cpu", "gpu"),
    samples: Samples | None = None,
    part: str | None = None,
    trust: Collection[str] = (),
) -> list[manifest.Entry]:
    """Write the network of the checkpoint `directory` in every precision asked for, and enter the files.

    Args:
        folder: where the files and `manifest.json` go.
        name: first part of the files' names.
        settings: None writes fp32 alone.
        wanted: targets of quantised files.
        samples: needed for int8 and fp8; with them fp16 and bf16 also keep layers in fp32 whose activations turn out
            too large.
        part: submodule that is exported alone, see `deploy.export.export_onnx`.
        trust: modules that may be imported to build the network, see `compress.checkpoint.load`.

    Returns:
        The entries, in the order of the precisions asked for.

    Raises:
        InputError: the checkpoint cannot be loaded, samples are missing or do not fit, a layer to exclude does not
            exist, or the folder cannot be written.
        MissingExtraError: fp16 and bf16 need the extra `quant`.
        WorkError: the network cannot be exported, or the accuracy asked for cannot be met.
    """
    settings = settings or ExportSettings()
    for precision in settings.precision:
        if not targets(precision, wanted):
            raise InputError(
                f"{precision} files are made for {', '.join(TARGETS[precision])} alone, and --target names "
                f"{', '.join(sorted(wanted))}: add {TARGETS[precision][0]} to it, or leave {precision} out."
            )
    quantised = QUANTISED & set(settings.precision)
    architecture = checkpoint.Architecture.read(directory)
    if quantised and samples is None:
        raise InputError(
            f"{', '.join(sorted(quantised))} takes the ranges of its activations from images: give --calibration DATA."
        )
    if samples is not None and samples.images.shape[1:] != architecture.image_shape:
        raise InputError(
            f"The calibration images of {samples.source} have shape {samples.images.shape[1:]}, but {directory} takes "
            f"{architecture.image_shape}: give data of that shape, from package.module:function if it is not square."
        )
    model = checkpoint.load(directory, trust=trust)
    make_directory(folder)
    entries = []
    # All is made aside and moved at the end, so that a failure leaves the folder's files and manifest as they were.
    with TemporaryDirectory(prefix=".export.", dir=folder) as place:
        scratch = Path(place)
        source = scratch / artefact_name(name, "fp32", "any")
        export_onnx(
            model,
            source,
            image_shape=architecture.image_shape,
            classes=architecture.classes,
            mean=architecture.mean,
            std=architecture.std,
            resize=architecture.resize,
            checkpoint_digest=architecture.sha256,
            part=part,
        )
        files = []
        for precision in settings.precision:
            for target in targets(precision, wanted):
                path = scratch / artefact_name(name, precision, target)
                if precision != "fp32":
                    _convert(source, path, precision, target, settings, samples, scratch / "converted.onnx")
                files.append(path)
        for path in files:
            move_onnx(path, folder / path.name)
            entries.append(_enter(folder / path.name))
    return entries


def _convert(
    source: Path,
    path: Path,
    precision: Precision,
    target: Target,
    settings: ExportSettings,
    samples: Samples | None,
    scratch: Path,
) -> None:
    """Write the fp32 file `source` in another precision; no file ever stands at `path` with the metadata of fp32."""
    quantisation = None
    if precision in HALF:
        kept = to_half(
            source,
            scratch,
            "fp16" if precision == "fp16" else "bf16",
            fp32_io=settings.fp32_io,
            samples=None if samples is None else samples.images,
            exclude=settings.exclude,
        )
        if kept:
            logger.info("%s: %d layers stay in fp32", path.name, len(kept))
    else:
        assert samples is not None  # asked for before
        quantisation = _quantise(source, scratch, precision, target, settings, samples)
        if quantisation.excluded:
            logger.info("%s: left out: %s", path.name, ", ".join(quantisation.excluded))
    model = load_onnx(scratch)
    about = read_metadata(source)
    changes = {"precision": precision, "target": target, "quantisation": quantisation}
    write_metadata(model, about.model_copy(update=changes))
    write_onnx(model, path)


def _quantise(
    source: Path, path: Path, precision: Precision, target: Target, settings: ExportSettings, samples: Samples
) -> Quantisation:
    """Calibrate, find the layers to leave out, quantise; what it came from is returned."""
    ranges = calibrate(source, samples.images, method=settings.calibration, target=target)
    exclude: Collection[str] = settings.exclude
    if settings.max_drop is not None:
        exclude = least_exclusion(
            source,
            precision=precision,
            target=target,
            ranges=ranges,
            loader=samples.test,
            task=samples.task,
            max_drop=settings.max_drop,
            exclude=settings.exclude,
        ).excluded
    done = quantise(source, path, precision=precision, target=target, ranges=ranges, exclude=exclude)
    return Quantisation(
        calibration=settings.calibration,
        data=samples.source,
        samples=len(samples.images),
        excluded=done.excluded,
    )


def _enter(path: Path) -> manifest.Entry:
    """Enter a written file in its folder's manifest, by what it says about itself."""
    about = read_metadata(path)
    inputs, outputs = onnx_specs(read_onnx(path), path)
    entry = manifest.add(
        path.parent,
        path.name,
        kind="onnx",
        precision=about.precision,
        target=about.target,
        inputs=inputs,
        outputs=outputs,
        checkpoint_digest=about.checkpoint_sha256,
        quantisation=about.quantisation,
    )
    logger.info("wrote %s, %.0f kB", path, entry.size_bytes / 1000)
    return entry
