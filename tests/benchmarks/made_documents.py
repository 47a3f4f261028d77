"""Results documents with the very samples that a test wants."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from benchmarks.harness.cells import BatchMeasurement, Latency
from benchmarks.harness.measure import scenario_of
from benchmarks.harness.results import Accuracy, Artefact, Results, Runtime, VariantResult
from benchmarks.harness.server import ServerResult
from benchmarks.harness.statistics import Estimate, Speedup, median_estimate
from benchmarks.harness.throughput import FailedPoint, ThroughputPoint, ThroughputResult

CALM = (0.98, 0.99, 1.0, 1.0, 1.0, 1.0, 1.01, 1.02)
"""Round medians around 1."""

ENVIRONMENT = {
    "cpu": {"model": "AMD EPYC 7763", "affinity": [0, 1], "governor": "performance"},
    "threads": {"torch_intra_op": 2},
    "gpus": [],
    "system": {"kernel": "6.1.0"},
    "python": "3.11.7",
    "libraries": {"torch": "2.15.0", "onnxruntime": "1.31.1"},
    "git": {"commit": "4f1d0e6bb3a55d0d54d3a2c4a9a3b1a9a3a7f3f1", "dirty": False},
}


def exact(value: float, samples: int = 8) -> Estimate:
    return Estimate(value=value, low=value, high=value, samples=samples)


def latency(
    medians_ms: Sequence[float],
    batch_size: int = 1,
    *,
    again: tuple[float, float, float] | None = (1.0, 0.998, 1.002),
    processes: Sequence[int] | None = None,
) -> BatchMeasurement:
    """One round for each median; `again` is the A/A ratio with its interval."""
    rounds = [[0.9 * ms, ms, 1.2 * ms] for ms in medians_ms]
    middle = median_estimate(rounds, seed=0, resamples=50)
    same = None
    if again is not None:
        value, low, high = again
        same = Speedup(value=value, low=low, high=high, samples=8, baseline="dense", verdict="equivalent")
    return BatchMeasurement(
        batch_size=batch_size,
        scenario=scenario_of(batch_size),
        latency=Latency(median_ms=middle, mean_ms=middle, p90_ms=None, p95_ms=None, p99_ms=None, p999_ms=None),
        throughput_per_s=exact(1e3 * batch_size / middle.value),
        speedup=None,
        again=same,
        stopped_by="precision",
        reruns=0,
        stages=None,
        phases=None,
        conditions=None,
        processes=list(processes or [0] * len(rounds)),
        samples_ms=rounds,
        throttled_samples_ms=[],
    )


def server(rate: float | None, failing: float | None, **others: Any) -> ServerResult:
    settings: dict[str, Any] = {"limit_ms": 10.0, "stopped_by": "bracket", "reason": None, "batch_size": 1, "lanes": 1}
    return ServerResult(
        rate_per_s=rate, failing_per_s=failing, **(settings | {"seed": 0, "points": [], "elapsed_s": 1.0} | others)
    )


def throughput(
    rates: Sequence[float], batch_size: int = 32, *, lanes: int = 2, failed: Sequence[int] = ()
) -> ThroughputResult:
    """At one point, one rate for each round of a second; `failed` are batch sizes on two lanes."""
    point = ThroughputPoint(
        batch_size=batch_size,
        lanes=lanes,
        throughput_per_s=exact(sum(rates) / len(rates)),
        median_ms=exact(1.0),
        round_samples=[round(rate) for rate in rates],
        round_wall_ms=[1000.0] * len(rates),
        round_median_ms=[1.0] * len(rates),
    )
    points = [FailedPoint(batch_size=size, lanes=2, reason="out of memory") for size in failed]
    return ThroughputResult(
        points=[point], failed=points, knee=0, reason=None, rounds=len(rates), stopped_by="rounds", elapsed_s=1.0
    )


def variant(
    name: str,
    *measurements: BatchMeasurement,
    sha: str = "0",
    top1: float | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    runtime: str = "ONNX Runtime",
    version: str = "1.31.1",
    **others: Any,
) -> VariantResult:
    accuracy = None
    if top1 is not None:
        accuracy = Accuracy.of(top1_percent=top1, top5_percent=None, loss=None, samples=1000)
    counts = {"parameters": 131_890, "macs": 20_284_416}
    return VariantResult(
        name=name,
        artefact=Artefact(
            path=f"artifacts/{name}.onnx", sha256=sha.ljust(64, "0"), size_bytes=540_000, precision=precision
        ),
        runtime=Runtime(name=runtime, version=version, device=device, proof=None),
        accuracy=accuracy,
        parity=None,
        measurements=list(measurements),
        **(counts | others),
    )


def document(*variants: VariantResult, environment: dict[str, Any] | None = None) -> Results:
    return Results(
        created=datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC),
        recipe={},
        seeds={"measuring": 0},
        environment=ENVIRONMENT if environment is None else environment,
        variants=list(variants),
        pruning=None,
        training={},
        provenance={"command": "espalier bench"},
    )


def times(factor: float, medians: Sequence[float] = CALM) -> list[float]:
    return [factor * ms for ms in medians]
