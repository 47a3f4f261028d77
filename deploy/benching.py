"""Deployable files timed against each other, whatever they came from."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from benchmarks.harness import Measured, Variant, environment, measure, numerals
from benchmarks.harness.statistics import Estimate, Speedup
from compress.errors import InputError
from compress.progress import progress_bar
from deploy.engine import SUFFIX as PLAN
from deploy.measuring import bound, pool_batches, rotating, shown_on
from deploy.runtimes import TensorSpec, open_runtime

FLOATS = ("float32", "float16", "bfloat16")


def bench(
    artefacts: Sequence[Path],
    *,
    batch_size: int = 1,
    rounds: int = 10,
    seconds: float = 1.0,
    threads: int | None = None,
    device: str = "cpu",
    runtime: str | None = None,
    trusted_manifest: Path | None = None,
) -> dict[str, Any]:
    """Latency of each file and its speedup over the first, as JSON values.

    The inputs are drawn from a standard normal distribution, which is what normalised images look like to arithmetic.

    Args:
        device, runtime: as `open_runtime`, for all files.
        trusted_manifest: for plans, see `deploy.trust`.

    Raises:
        InputError: a file cannot be run, or the files take different inputs.
        HarnessError: a file failed while it was timed.
    """
    with ExitStack() as opened:
        sessions = {
            str(path): opened.enter_context(
                open_runtime(
                    path,
                    device=device,
                    threads=threads,
                    runtime=runtime,
                    trusted_manifest=trusted_manifest if path.suffix == PLAN else None,
                )
            )
            for path in artefacts
        }
        if len(sessions) < len(artefacts):
            raise InputError("The same file is given twice: to time it against itself, give a copy of it.")
        image_shape = _image_shape({name: session.inputs for name, session in sessions.items()})
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch_size * pool_batches(batch_size, image_shape), *image_shape, generator=generator)
        with progress_bar(f"timing at batch {batch_size}", rounds) as bar:
            measurement = measure(
                [Variant(name, rotating(bound(it, images, batch_size)), batch_size) for name, it in sessions.items()],
                baseline=str(artefacts[0]),
                rounds=rounds,
                min_seconds_per_round=seconds,
                time_budget_s=max(60.0, 4 * seconds * rounds * len(sessions)),
                on_round=shown_on(bar),
            )
        runtimes = {name: session.description() for name, session in sessions.items()}
    return {
        "batch_size": batch_size,
        "device": device,
        "inputs": "random, standard normal",
        "stopped_by": measurement.stopped_by,
        "variants": [_record(measured, runtimes[name]) for name, measured in measurement.variants.items()],
        "environment": environment(),
    }


def table(found: dict[str, Any]) -> Table:
    """The outcome of `bench` for the terminal."""
    result = Table(
        title=f"{_runtimes(found)}, {found['device']}, batch {found['batch_size']}, random images",
        title_justify="left",
        caption="Median latency and paired speedup with 95 % intervals.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    result.add_column("file", overflow="fold")
    for header in ("latency ms", "images/s", "speedup"):
        result.add_column(header, justify="right")
    for variant in found["variants"]:
        median, rate = (Estimate.model_validate(variant[key]) for key in ("median_ms", "throughput_per_s"))
        speedup = "baseline"
        if variant["speedup"]:
            ratio = Speedup.model_validate(variant["speedup"])
            speedup = f"{numerals.ratio(ratio.value)} {numerals.ratio_interval(ratio)} {ratio.verdict}"
        latency = f"{numerals.value(median)} {numerals.interval(median)}"
        result.add_row(variant["name"], latency, numerals.significant(rate.value, 4), speedup)
    return result


def _runtimes(found: dict[str, Any]) -> str:
    names = (f"{variant['runtime']['runtime']} {variant['runtime']['version']}" for variant in found["variants"])
    return " and ".join(dict.fromkeys(names))


def _image_shape(inputs: dict[str, tuple[TensorSpec, ...]]) -> list[int]:
    """(C, H, W) that all files take."""
    shapes: dict[str, list[int]] = {}
    for name, specs in inputs.items():
        sizes = [size for size in specs[0].shape[1:] if isinstance(size, int)]
        if len(specs) != 1 or specs[0].dtype not in FLOATS or len(sizes) < len(specs[0].shape) - 1:
            given = "; ".join(map(str, specs))
            raise InputError(f"{name} takes {given}, but one floating-point input of fixed image size can be timed.")
        shapes[name] = sizes
    first, *others = shapes
    for other in others:
        if shapes[other] != shapes[first]:
            raise InputError(
                f"{first} takes images of {shapes[first]} and {other} of {shapes[other]}: give files of one input size."
            )
    return shapes[first]


def _record(measured: Measured, runtime: dict[str, Any]) -> dict[str, Any]:
    def plain(estimate: Estimate | None) -> dict[str, Any] | None:
        return None if estimate is None else estimate.model_dump(mode="json")

    figures = ("median_ms", "mean_ms", "p90_ms", "p95_ms", "p99_ms", "throughput_per_s", "speedup")
    return {
        "name": measured.name,
        **{figure: plain(getattr(measured, figure)) for figure in figures},
        "samples_ms": [np.round(samples / 1e6, 6).tolist() for samples in measured.rounds_ns],
        "runtime": runtime,
    }
