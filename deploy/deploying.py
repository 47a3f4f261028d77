"""The stages between the trained networks and the clock: files in every precision, engines, proof of both."""

import logging
from dataclasses import asdict, replace
from typing import Any

from compress.data import load as load_data
from compress.errors import WorkError
from deploy import manifest
from deploy.artefacts import Samples, calibration_samples, export_checkpoint
from deploy.engine import build_engine
from deploy.engine_settings import BatchRange
from deploy.parity import check_parity, evaluate_runtime
from deploy.precision import Precision
from deploy.stages import TRUST_ALL, VARIANTS, Run, sample_images
from deploy.tolerance import TOLERANCES, Tolerance

logger = logging.getLogger(__name__)


def export(run: Run) -> dict[str, Any]:
    """Write both networks as ONNX files in every precision, and enter them in `artifacts/manifest.json`."""
    settings = run.recipe.export
    samples = _calibration(run) if set(settings.precision) != {"fp32"} else None
    entries: dict[str, Any] = {}
    for variant in VARIANTS:
        written = export_checkpoint(
            run.checkpoint(variant),
            run.directory.artifacts,
            name=variant,
            settings=settings,
            wanted={run.serving.target},
            samples=samples,
            trust=TRUST_ALL,
        )
        entries |= {entry.file: entry.model_dump(mode="json") for entry in written}
    return {"entries": entries, "serving": run.serving.model_dump(mode="json")}


def engines(run: Run) -> dict[str, Any]:
    """Build a TensorRT engine from each ONNX file, where this run uses TensorRT."""
    if run.serving.runtime != "tensorrt":
        return {"entries": {}, "reason": run.serving.reason}
    sizes = run.recipe.measure.batch_sizes
    batch = BatchRange(minimum=1, optimum=max(sizes), maximum=max(*sizes, *run.recipe.parity.batch_sizes))
    entries = {}
    for deployed in run.deployed:
        entry = build_engine(deployed.onnx, deployed.file, batch=batch, settings=run.recipe.engine.settings())
        entries[entry.file] = entry.model_dump(mode="json")
    return {"entries": entries, "reason": run.serving.reason}


def parity(run: Run) -> dict[str, Any]:
    """Hold each file against PyTorch on real images, and find the accuracy of the file itself.

    Raises:
        InputError: an artefact is not the one in the manifest.
        WorkError: a file does not compute what its network computes.
    """
    settings = run.recipe.parity
    manifest.verify(run.directory.artifacts)
    samples = sample_images(run.data, at_least=settings.samples, at_most=settings.samples)
    outcome: dict[str, Any] = {}
    for deployed in run.deployed:
        tolerance = _tolerance(run, deployed.precision)
        with run.open(deployed) as runtime:
            found = check_parity(run.load(deployed.variant), runtime, samples, batch_sizes=settings.batch_sizes)
            try:
                found.require(tolerance)
            except WorkError as error:
                raise WorkError(f"{deployed.file}: {error}") from error
            description = f"{deployed.file.name}: accuracy"
            accuracy = evaluate_runtime(runtime, run.data.test, task=run.task, description=description)
            outcome[deployed.label] = {
                "batches": [asdict(batch) for batch in found.batches],
                "max_relative_error": found.max_relative_error,
                "mean_relative_error": found.mean_relative_error,
                "rms_relative_error": found.rms_relative_error,
                "top1_agreement": found.top1_agreement,
                "largest_flip": found.largest_flip,
                "tolerance": asdict(found.applied(tolerance)),
                "accuracy": asdict(accuracy),
            }
        logger.info(
            "%s: largest relative error %.2g, top class agrees on %.2f %%, accuracy of the file %.2f %%",
            *(deployed.file.name, found.max_relative_error, found.top1_agreement, accuracy.top1),
        )
    return outcome


def _tolerance(run: Run, precision: Precision) -> Tolerance:
    """What a file of the precision keeps to; the recipe's own bound is that of fp32."""
    if precision != "fp32":
        return TOLERANCES[precision]
    if run.serving.runtime == "tensorrt" and run.recipe.engine.tf32:
        return TOLERANCES["fp16"]  # TF32 keeps as many bits of the significand
    return replace(TOLERANCES["fp32"], max_relative_error=run.recipe.parity.tolerance)


def _calibration(run: Run) -> Samples:
    """Training images without augmentation."""
    settings = run.recipe.data
    plain = load_data(
        settings.source,
        batch_size=settings.batch_size,
        image_size=settings.image_size,
        workers=settings.workers,
        augment=False,
        trust=TRUST_ALL,
    )
    return calibration_samples(plain, run.recipe.export.samples, task=run.task, seed=run.recipe.seed)
