"""The stage that needs a clock: both networks counted, all files timed against each other."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness.cells import BatchMeasurement
from benchmarks.harness.counters import macs, parameters
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import HarnessError
from benchmarks.harness.measure import Measurement, measure
from benchmarks.harness.rounds import Plan
from benchmarks.harness.subject import Candidate
from compress.progress import progress_bar
from deploy import manifest
from deploy.bench_settings import GAP_S
from deploy.limits import Limits, Measurable, find_limits
from deploy.pool import last_level_cache_bytes, pool_images, read_arrays, write_pool
from deploy.stages import VARIANTS, Run, sample_images
from deploy.subjects import open_artefact
from deploy.watching import shown_on, watched

logger = logging.getLogger(__name__)


def time_artifacts(run: Run) -> dict[str, Any]:
    """MACs, parameters and layer widths of both networks; latency of all files in interleaved rounds.

    Raises:
        InputError: an artefact is not the one in the manifest.
        HarnessError: a file could not be measured.
    """
    manifest.verify(run.directory.artifacts)
    settings = run.recipe.measure
    plan = Plan(
        rounds=settings.rounds,
        seconds=settings.seconds_per_round,
        queries=settings.queries_per_round,
        time_budget_s=settings.time_limit_s,
        processes=settings.processes,
        idle_gap_s=GAP_S,
    )
    measurements: dict[str, list[Any]] = {deployed.label: [] for deployed in run.deployed}
    rooflines: dict[str, list[Any]] = {deployed.label: [] for deployed in run.deployed}
    explanations: list[Any] = []
    runtimes: dict[str, Any] = {}
    with TemporaryDirectory(prefix="espalier-measure-") as folder, watched(run.serving.device) as watch:
        pool = Path(folder)
        _write_pool(run, pool)
        for batch_size in settings.batch_sizes:
            with progress_bar(f"timing at batch {batch_size}", None) as bar:
                measurement = measure(
                    _candidates(run, pool, batch_size),
                    baseline=run.deployed[0].label,
                    plan=plan,
                    seed=run.recipe.seed,
                    watch=watch,
                    on_round=shown_on(bar),
                )
            for reason in measurement.failures.values():
                raise HarnessError(reason)
            logger.info(
                "timed at batch %d: %d rounds in %.0f s, ended by %s",
                *(batch_size, len(measurement.order), measurement.elapsed_s, measurement.stopped_by),
            )
            found = _limits(run, pool, batch_size, measurement)
            for name, problem in found.problems.items():
                logger.info("%s: no limit at batch %d: %s", name, batch_size, problem)
            for name, roofline in found.rooflines.items():
                rooflines[name].append(roofline.model_dump(mode="json"))
            explanations += [explanation.model_dump(mode="json") for explanation in found.explanations]
            for name, measured in measurement.variants.items():
                cell = BatchMeasurement.of(measured, measurement, gap_s=GAP_S)
                measurements[name].append(cell.model_dump(mode="json"))
                runtimes[name] = measured.description
    return {
        "runtimes": runtimes,
        "counts": {variant: _count(run.load(variant), run.data.image_shape) for variant in VARIANTS},
        "measurements": measurements,
        "rooflines": rooflines,
        "explanations": explanations,
        "environment": environment(),
    }


def _candidates(run: Run, pool: Path, batch_size: int) -> list[Candidate]:
    arguments = {
        "pool": str(pool),
        "batch_size": batch_size,
        "device": run.serving.device,
        "threads": _threads(run),
    }
    return [
        Candidate(deployed.label, open_artefact, {"artefact": str(deployed.file), **arguments}, batch_size)
        for deployed in run.deployed
    ]


def _limits(run: Run, pool: Path, batch_size: int, measurement: Measurement) -> Limits:
    return find_limits(
        [Measurable(deployed.label, deployed.file) for deployed in run.deployed],
        [array[:batch_size] for array in read_arrays(pool)],
        measurement.variants,
        device=run.serving.device,
        threads=_threads(run),
        with_layers=run.recipe.measure.layers,
    )


def _threads(run: Run) -> int:
    return run.recipe.measure.threads or torch.get_num_threads()


def _write_pool(run: Run, pool: Path) -> None:
    """Test images, again from the beginning where there are too few: at other places in memory."""
    shape = run.data.image_shape
    cache = last_level_cache_bytes()
    count = max(pool_images(size, 4 * math.prod(shape), cache) for size in run.recipe.measure.batch_sizes)
    images = sample_images(run.data, at_least=1, at_most=count).numpy()
    write_pool(pool, [np.resize(images, (count, *shape))])


def _count(model: nn.Module, image_shape: Sequence[int]) -> dict[str, Any]:
    return {
        "parameters": parameters(model),
        "macs": macs(model, torch.zeros(1, *image_shape)),
        "widths": output_widths(model),
    }


def output_widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution and linear layer, in the order of the modules."""
    widths = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            widths[name] = module.out_channels
        elif isinstance(module, nn.Linear):
            widths[name] = module.out_features
    return widths
