"""The stage that needs a clock: both networks counted, both artefacts timed against each other."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.counters import macs, parameters
from benchmarks.harness.environment import environment
from benchmarks.harness.measure import Variant as Timed
from benchmarks.harness.measure import measure
from benchmarks.harness.results import BatchMeasurement
from compress.progress import Bar, progress_bar
from deploy import manifest
from deploy.runtimes import Runtime, Step
from deploy.stages import VARIANTS, Run, sample_images

logger = logging.getLogger(__name__)

POOL_BATCHES = 32
"""At most so many different batches are timed in turn, so that a query rarely finds its input in a cache."""

POOL_BYTES = 256 * 1024**2
"""Memory for these batches; one batch is always held."""


def time_artifacts(run: Run) -> dict[str, Any]:
    """MACs, parameters and layer widths of both networks; latency of all files in interleaved rounds.

    Raises:
        InputError: an artefact is not the one in the manifest, or the test split is smaller than a batch.
        HarnessError: the measurement failed.
    """
    settings = run.recipe.measure
    manifest.verify(run.directory.artifacts)
    measurements: dict[str, list[Any]] = {deployed.label: [] for deployed in run.deployed}
    with ExitStack() as opened:
        sessions = {deployed.label: opened.enter_context(run.open(deployed)) for deployed in run.deployed}
        for batch_size in settings.batch_sizes:
            most = batch_size * pool_batches(batch_size, run.data.image_shape)
            images = sample_images(run.data, at_least=batch_size, at_most=most)
            timed = [Timed(name, rotating(bound(it, images, batch_size)), batch_size) for name, it in sessions.items()]
            with progress_bar(f"timing at batch {batch_size}", settings.rounds) as bar:
                measurement = measure(
                    timed,
                    baseline=run.deployed[0].label,
                    rounds=settings.rounds,
                    min_seconds_per_round=settings.seconds_per_round,
                    min_queries_per_round=settings.queries_per_round,
                    time_budget_s=settings.time_limit_s,
                    seed=run.recipe.seed,
                    on_round=shown_on(bar),
                )
            logger.info("timed at batch %d in %.0f s", batch_size, measurement.elapsed_s)
            for name, measured in measurement.variants.items():
                measurements[name].append(BatchMeasurement.of(measured, measurement).model_dump(mode="json"))
        runtimes = {name: session.description() for name, session in sessions.items()}
    return {
        "runtimes": runtimes,
        "counts": {variant: _count(run.load(variant), run.data.image_shape) for variant in VARIANTS},
        "measurements": measurements,
        "environment": environment(),
    }


def bound(runtime: Runtime, images: Tensor, batch_size: int) -> list[Step]:
    """One step for each batch that the images fill; a rest is left out."""
    spec = runtime.inputs[0]
    batches = (batch.numpy().astype(spec.dtype) for batch in images.split(batch_size) if len(batch) == batch_size)
    return [runtime.bind({spec.name: batch}) for batch in batches]


def rotating(steps: Sequence[Step]) -> Callable[[], None]:
    """One query after the other, each on the next batch."""
    following = cycle(steps).__next__

    def step() -> None:
        following()()

    return step


def shown_on(bar: Bar) -> Callable[[int, int], None]:
    def on_round(done: int, planned: int) -> None:
        bar.advance(f"round {done} of {planned}")

    return on_round


def pool_batches(batch_size: int, image_shape: Sequence[int]) -> int:
    batch_bytes = 4 * batch_size * math.prod(image_shape)
    return max(1, min(POOL_BATCHES, POOL_BYTES // batch_bytes))


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
