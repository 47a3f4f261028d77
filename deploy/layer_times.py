"""How long each layer takes inside a runtime, and which nodes of the file it computes.

The layers are timed one by one, in inferences of their own: in ONNX Runtime by its profiler, in TensorRT by its
profiler, in PyTorch by hooks around the leaf modules. That costs some microseconds a layer, so their sum is near the
latency but is not it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from compress import checkpoint
from compress.errors import InputError
from deploy.layer_timers import LayerTime, ModuleClock, OnnxTimer, PyTorchTimer, TensorRtTimer, Timer
from deploy.pool import FLOATS
from deploy.runtimes import Runtime, check_device, open_runtime
from deploy.runtimes.onnx_runtime import OnnxRuntime

__all__ = ["LayerTime", "Timed", "layer_times", "layer_times_together"]

WARM_UP_RUNS = 3

TURN = 5
"""Inferences of one artefact, before it is the next one's turn."""

Batch = Mapping[str, np.ndarray] | Sequence[np.ndarray]


@dataclass(frozen=True)
class Timed:
    """What is to be timed, and how; the fields are the arguments of `layer_times`."""

    artefact: Path | nn.Module
    batch: Batch
    device: str = "cpu"
    threads: int | None = None
    runtime: str | None = None
    trusted_manifest: Path | None = None
    trust: Collection[str] = ()


def layer_times(
    artefact: Path | nn.Module,
    *,
    batch: Batch,
    device: str = "cpu",
    threads: int | None = None,
    runtime: str | None = None,
    runs: int = 20,
    trusted_manifest: Path | None = None,
    trust: Collection[str] = (),
) -> list[LayerTime]:
    """The layers of an artefact in the order of execution, each with its median time.

    Args:
        artefact: an ONNX file, a TensorRT engine, a checkpoint directory or a module.
        batch: arrays by input name, or in the order of the inputs.
        device, threads, runtime: as for `open_runtime`.
        trusted_manifest: for an engine, see `deploy.trust`.
        trust: modules that a checkpoint's factory may import.

    Raises:
        InputError: the artefact or the batch cannot be used, or the runtime cannot time layers.
        WorkError: the runtime failed.
    """
    asked = Timed(artefact, batch, device, threads, runtime, trusted_manifest, trust)
    return layer_times_together([asked], runs=runs)[0]


def layer_times_together(asked: Sequence[Timed], *, runs: int = 20) -> list[list[LayerTime]]:
    """`layer_times` of several artefacts that are to be compared: in turns, so that the machine is the same for all.

    A turn is `TURN` inferences, after one that is left out.
    """
    if runs < 1:
        raise InputError(f"{runs} timed runs of the layers were asked for; give at least 1.")
    with ExitStack() as opened:
        timers = [opened.enter_context(_timer(item)) for item in asked]
        for start in range(0, runs, TURN):
            for timer in timers:
                timer.run(warm_up=1 if start else WARM_UP_RUNS, count=min(TURN, runs - start))
        return [timer.layers() for timer in timers]


@contextmanager
def _timer(asked: Timed) -> Iterator[Timer]:
    artefact = asked.artefact
    if not isinstance(artefact, nn.Module):
        artefact = Path(artefact)
        if artefact.is_dir():
            check_device(asked.device)
            artefact = checkpoint.load(artefact, trust=asked.trust).to(asked.device)
    manifest = None if isinstance(artefact, nn.Module) else asked.trusted_manifest
    if isinstance(artefact, nn.Module) and "compile=true" in (asked.runtime or ""):
        raise InputError("A compiled module has no layers left to time; leave out compile=true.")
    with ExitStack() as opened:
        clock = None
        if isinstance(artefact, nn.Module):
            # On the model itself, as the runtime may run a copy of it; hooks are copied with their module.
            clock = ModuleClock(cuda=torch.device(asked.device).type == "cuda")
            opened.enter_context(clock.on(artefact))
        runtime = opened.enter_context(
            open_runtime(
                artefact,
                device=asked.device,
                threads=asked.threads,
                runtime=asked.runtime,
                trusted_manifest=manifest,
            )
        )
        batch = _named(runtime, asked.batch)
        if clock is not None:
            yield PyTorchTimer(runtime, clock, batch)
        elif isinstance(runtime, OnnxRuntime):
            assert isinstance(artefact, Path)
            folder = opened.enter_context(TemporaryDirectory(prefix="espalier-layers-"))
            yield OnnxTimer(runtime, artefact, asked.device, batch, folder)
        else:
            yield TensorRtTimer(runtime, batch)


def _named(runtime: Runtime, batch: Batch) -> dict[str, np.ndarray]:
    if isinstance(batch, Mapping):
        return dict(batch)
    if len(batch) != len(runtime.inputs):
        raise InputError(f"{len(batch)} inputs were given, but the network takes {len(runtime.inputs)}; give those.")
    return {
        spec.name: array.astype(spec.dtype) if {array.dtype.name, spec.dtype} <= FLOATS else array
        for spec, array in zip(runtime.inputs, batch, strict=True)
    }
