"""Deployable files and checkpoints timed against each other, whatever they came from."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import RenderableType
from rich.table import Table

from benchmarks.harness import numerals
from benchmarks.harness.environment import environment
from benchmarks.harness.measure import Measured, Variant, measure
from benchmarks.harness.statistics import Estimate, Speedup
from compress import checkpoint
from compress.errors import InputError, first_line
from compress.progress import progress_bar
from deploy.engine import SUFFIX as PLAN
from deploy.measuring import bound, pool_batches, rotating, shown_on
from deploy.runtimes import RUNTIMES, Runtime, check_device, open_runtime
from deploy.runtimes.tensorrt import TensorRtRuntime

FLOATS = ("float32", "float16", "bfloat16")

PROFILED_RUNS = 20
"""Inferences in which the layers of an engine are timed, one by one."""


def bench(
    artefacts: Sequence[Path],
    *,
    batch_size: int = 1,
    rounds: int = 10,
    seconds: float = 1.0,
    threads: int | None = None,
    device: str = "cpu",
    runtimes: Collection[str] = (),
    trusted_manifest: Path | None = None,
    layers: bool = False,
    trust: Collection[str] = (),
) -> dict[str, Any]:
    """Latency of each artefact and its speedup over the first, as JSON values.

    The inputs are drawn from a standard normal distribution, which is what normalised images look like to arithmetic.

    Args:
        artefacts: ONNX files, plans, and checkpoint directories, which run in PyTorch.
        device: of all of them.
        runtimes: names with options as `open_runtime` takes them, each for the artefacts that it executes.
        trusted_manifest: for plans, see `deploy.trust`.
        layers: whether the layers of plans are timed too, in runs of their own.
        trust: modules that a checkpoint's factory may import.

    Raises:
        InputError: an artefact cannot be run, or they take different inputs.
        HarnessError: one failed while it was timed.
    """
    chosen = _by_suffix(runtimes)
    suffixes = {_suffix(path) for path in artefacts}
    for suffix, text in chosen.items():
        if suffix not in suffixes:
            raise InputError(f"--runtime {text} executes none of the artefacts given: leave it out.")
    if trusted_manifest is not None and PLAN not in suffixes:
        raise InputError(f"--trust-manifest vouches for TensorRT engines, and no {PLAN} file is given: leave it out.")
    if layers and PLAN not in suffixes:
        raise InputError(f"--layers times the layers of TensorRT engines, and no {PLAN} file is given: leave it out.")

    def opened_as_asked(path: Path) -> Runtime:
        suffix = _suffix(path)
        artefact: Path | torch.nn.Module = path
        if suffix is None:
            check_device(device)
            artefact = checkpoint.load(path, trust=trust).to(device)
        return open_runtime(
            artefact,
            device=device,
            threads=threads,
            runtime=chosen.get(suffix),
            trusted_manifest=trusted_manifest if suffix == PLAN else None,
        )

    with ExitStack() as opened:
        sessions = {str(path): opened.enter_context(opened_as_asked(path)) for path in artefacts}
        if len(sessions) < len(artefacts):
            raise InputError("The same file is given twice: to time it against itself, give a copy of it.")
        image_shape = _common_shape({name: _image_shape(Path(name), it) for name, it in sessions.items()})
        generator = torch.Generator().manual_seed(0)
        count = batch_size * pool_batches(batch_size, image_shape)
        try:
            images = torch.randn(count, *image_shape, generator=generator)
        except RuntimeError as error:
            raise InputError(
                f"{count} images of {image_shape} do not fit into memory ({first_line(error)}): give a smaller --batch."
            ) from error
        with progress_bar(f"timing at batch {batch_size}", rounds) as bar:
            measurement = measure(
                [Variant(name, rotating(bound(it, images, batch_size)), batch_size) for name, it in sessions.items()],
                baseline=str(artefacts[0]),
                rounds=rounds,
                min_seconds_per_round=seconds,
                time_budget_s=max(60.0, 4 * seconds * rounds * len(sessions)),
                on_round=shown_on(bar),
            )
        described = {name: session.description() for name, session in sessions.items()}
        profiles = {
            name: _layer_times(session, images[:batch_size])
            for name, session in sessions.items()
            if layers and isinstance(session, TensorRtRuntime)
        }
    return {
        "batch_size": batch_size,
        "device": device,
        "inputs": "random, standard normal",
        "stopped_by": measurement.stopped_by,
        "variants": [
            _record(measured, described[name]) | {"layers_ms": profiles.get(name)}
            for name, measured in measurement.variants.items()
        ],
        "environment": environment(),
    }


def tables(found: dict[str, Any]) -> list[RenderableType]:
    """The outcome of `bench` for the terminal."""
    return [_latencies(found), *(_layers(item) for item in found["variants"] if item["layers_ms"] is not None)]


def _latencies(found: dict[str, Any]) -> Table:
    result = Table(
        title=f"{_runtimes(found)}, {found['device']}, batch {found['batch_size']}, random images",
        title_justify="left",
        caption="Median latency and paired speedup with 95 % intervals.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    result.add_column("artefact", overflow="fold")
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


def _layers(variant: dict[str, Any]) -> Table:
    result = Table(
        title=f"Layers of {variant['name']}, the slowest first",
        title_justify="left",
        caption=f"Median of {PROFILED_RUNS} runs of their own, layer by layer: their sum is not the latency.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    result.add_column("layer", overflow="fold")
    result.add_column("ms", justify="right")
    for name, milliseconds in sorted(variant["layers_ms"].items(), key=lambda item: -item[1]):
        result.add_row(name, f"{milliseconds:.4f}")
    return result


def _suffix(path: Path) -> str | None:
    """By which a runtime is chosen; None for a checkpoint directory, which is a module."""
    return None if path.is_dir() else path.suffix


def _by_suffix(texts: Collection[str]) -> dict[str | None, str]:
    """Each runtime that was asked for, under the suffix of the files that it executes."""
    chosen: dict[str | None, str] = {}
    for text in texts:
        name = text.partition(":")[0]
        if name not in RUNTIMES:
            raise InputError(f"There is no runtime {name!r}; choose one of {', '.join(RUNTIMES)}.")
        suffix = RUNTIMES[name].suffix
        if suffix in chosen:
            raise InputError(f"--runtime {chosen[suffix]} and --runtime {text} are for the same files: give one.")
        chosen[suffix] = text
    return chosen


def _layer_times(runtime: TensorRtRuntime, images: torch.Tensor) -> dict[str, float]:
    """Layer -> median milliseconds."""
    spec = runtime.inputs[0]
    times = runtime.profile({spec.name: images.numpy().astype(spec.dtype)}, runs=PROFILED_RUNS)
    return {layer: median(values) for layer, values in times.items()}


def _image_shape(path: Path, runtime: Runtime) -> list[int]:
    """(C, H, W) that an artefact takes."""
    if path.is_dir():
        return list(checkpoint.Architecture.read(path).image_shape)
    specs = runtime.inputs
    sizes = [size for size in specs[0].shape[1:] if isinstance(size, int)]
    if len(specs) != 1 or specs[0].dtype not in FLOATS or len(sizes) < len(specs[0].shape) - 1:
        given = "; ".join(map(str, specs))
        raise InputError(f"{path} takes {given}, but one floating-point input of fixed image size can be timed.")
    return sizes


def _common_shape(shapes: Mapping[str, list[int]]) -> list[int]:
    """(C, H, W) that all artefacts take."""
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
