"""How fast could it be, and why is it not: work, layers and the machine's peaks brought together for what was timed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.explanation import Explanation, Layer
from benchmarks.harness.measure import Measured
from benchmarks.harness.peaks import DTYPES, Peak, measured_peak
from benchmarks.harness.processes import call
from benchmarks.harness.roofline import RooflineResult, TimedLayer, Work
from compress import checkpoint
from compress.errors import first_line
from deploy.engine import SUFFIX as PLAN
from deploy.explaining import Side, explain, layers
from deploy.layer_times import LayerTime, Timed, layer_times_together
from deploy.onnx_file import SUFFIX as ONNX
from deploy.work import LayerWork, OnnxWork, module_work, onnx_work

logger = logging.getLogger(__name__)

PROFILED_RUNS = 20
"""Inferences in which the layers are timed, one by one."""


@dataclass(frozen=True)
class Measurable:
    """Something that was timed, and where its work can be read."""

    name: str
    artefact: Path
    """What ran: an ONNX file, a plan or a checkpoint directory."""
    runtime: str | None = None
    trusted_manifest: Path | None = None
    trust: tuple[str, ...] = ()

    @property
    def source(self) -> Path:
        """Where the work is counted: of a plan, in the ONNX file beside it."""
        return self.artefact.with_suffix(ONNX) if self.artefact.suffix == PLAN else self.artefact


@dataclass
class Limits:
    """What was found at one batch size, by name; a problem stands in for what could not be found."""

    rooflines: dict[str, RooflineResult] = field(default_factory=dict)
    explanations: list[Explanation] = field(default_factory=list)
    macs: dict[str, int] = field(default_factory=dict)
    """Of one sample."""
    problems: dict[str, str] = field(default_factory=dict)


def find_limits(
    measured: Sequence[Measurable],
    batch: Sequence[np.ndarray],
    variants: Mapping[str, Measured],
    *,
    device: str,
    threads: int,
    with_layers: bool,
) -> Limits:
    """The roofline of everything whose work is known, and with the layers timed, what each lost against the first.

    Nothing here fails the measurement that came before it: what cannot be found stands in `problems`.

    Args:
        batch: one array for each input, the batch along the first axis.
        variants: name -> what was measured at this batch; what was not is left out.
        with_layers: whether the layers are timed, together in one process of their own.
    """
    found = Limits()
    medians_ms = {name: one.median_ms.value for name, one in variants.items()}
    verdicts = {name: one.speedup.verdict for name, one in variants.items() if one.speedup is not None}
    alive = [item for item in measured if item.name in medians_ms]
    works: dict[str, OnnxWork | list[LayerWork]] = {}
    for item in alive:
        try:
            works[item.name], found.macs[item.name] = _work(item, batch)
        except Exception as error:  # noqa: BLE001 - files of any tool come here, and the measurement must stand
            found.problems[item.name] = first_line(error)
    try:
        peaks = _peaks(works, device, threads)
    except Exception as error:  # noqa: BLE001 - the measurement must stand
        found.problems |= {name: f"no peak of this machine: {first_line(error)}" for name in works}
        return found
    times = _times(alive, batch, device, threads, found) if with_layers else {}
    sides: dict[str, Side] = {}
    for name, work in works.items():
        try:
            joined = layers(times[name], work, peaks) if name in times else []
            found.rooflines[name] = _roofline(work, joined, len(batch[0]), medians_ms[name], peaks)
            if joined:
                sides[name] = Side(name, joined, medians_ms[name])
        except Exception as error:  # noqa: BLE001 - the measurement must stand
            found.problems[name] = first_line(error)
    baseline = sides.get(alive[0].name) if alive else None
    for side in sides.values():
        if baseline is None or side is baseline:
            continue
        try:
            explanation = explain(baseline, side, device=device, batch_size=len(batch[0]))
            found.explanations.append(explanation.model_copy(update={"verdict": verdicts.get(side.name)}))
        except Exception as error:  # noqa: BLE001 - the measurement must stand
            found.problems[side.name] = first_line(error)
    return found


def _work(item: Measurable, batch: Sequence[np.ndarray]) -> tuple[OnnxWork | list[LayerWork], int]:
    """What it has to do for the batch, and the multiply-adds of one sample."""
    size = len(batch[0])
    if item.source.is_dir():
        model = checkpoint.load(item.source, trust=item.trust)
        found, macs = module_work(model, torch.from_numpy(np.asarray(batch[0], dtype=np.float32)))
        return found, macs // size
    if not item.source.is_file():
        raise HarnessInputError(f"{item.artefact} has no {item.source.name} beside it, so its work is not known.")
    work = onnx_work(item.source, size)
    return work, work.macs // size


def _peaks(works: Mapping[str, OnnxWork | list[LayerWork]], device: str, threads: int) -> dict[str, Peak]:
    """One for each type in which something computes; types that only move need none."""
    asked = {layer.dtype for work in works.values() for layer in _all(work)}
    return {
        dtype: measured_peak(dtype, device=device, threads=threads)
        for dtype in sorted((asked & set(DTYPES)) | ({"float32"} if asked else set()))
    }


def _times(
    alive: Sequence[Measurable], batch: Sequence[np.ndarray], device: str, threads: int, found: Limits
) -> dict[str, list[LayerTime]]:
    """The layers of all, timed in turns; where that fails, of each by itself."""
    asked = {
        item.name: Timed(
            item.artefact,
            list(batch),
            device=device,
            threads=threads,
            runtime=item.runtime,
            trusted_manifest=item.trusted_manifest,
            trust=item.trust,
        )
        for item in alive
        if item.name not in found.problems
    }
    try:
        return dict(zip(asked, _profile(list(asked.values())), strict=True)) if asked else {}
    except Exception as error:  # noqa: BLE001 - the measurement must stand
        logger.info("the layers cannot be timed together, so each is by itself: %s", first_line(error))
    times = {}
    for name, timed in asked.items():
        try:
            (times[name],) = _profile([timed])
        except Exception as error:  # noqa: BLE001 - the measurement must stand
            found.problems[name] = f"layers: {first_line(error)}"
    return times


def _profile(asked: list[Timed]) -> list[list[LayerTime]]:
    times: list[list[LayerTime]] = call(
        layer_times_together, {"asked": asked, "runs": PROFILED_RUNS}, what="Timing the layers"
    )
    return times


def _roofline(
    work: OnnxWork | list[LayerWork], timed: Sequence[Layer], size: int, median_ms: float, peaks: Mapping[str, Peak]
) -> RooflineResult:
    network = work.fused if isinstance(work, OnnxWork) else work
    moved = work.traffic_bytes if isinstance(work, OnnxWork) else sum(layer.bytes for layer in work)
    return RooflineResult.of(
        batch_size=size,
        network=[TimedLayer(layer.name, layer.kind, layer.work, layer.dtype) for layer in network],
        network_bytes=moved,
        measured_ms=median_ms,
        peaks=peaks,
        timed=[
            TimedLayer(layer.name, layer.kind, Work(layer.macs, layer.bytes), layer.dtype, layer.ms) for layer in timed
        ],
        uncounted=work.uncounted if isinstance(work, OnnxWork) else (),
    )


def _all(work: OnnxWork | list[LayerWork]) -> Sequence[LayerWork]:
    return work.layers if isinstance(work, OnnxWork) else work
