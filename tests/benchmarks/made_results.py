"""Parts of a results document, made up but consistent: queues, sweeps, rooflines, phases, conditions."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from benchmarks.harness.cells import BatchMeasurement, Phases, StageTimes
from benchmarks.harness.condition_records import Conditions, ConditionsSummary, GpuSummary, Range
from benchmarks.harness.explanation import Explanation, Finding
from benchmarks.harness.measure import Variant, measure
from benchmarks.harness.peaks import Peak
from benchmarks.harness.roofline import RooflineResult, TimedLayer, Work
from benchmarks.harness.rounds import Plan
from benchmarks.harness.server import LoadPoint, ServerResult
from benchmarks.harness.statistics import Estimate
from benchmarks.harness.throughput import FailedPoint, ThroughputPoint, ThroughputResult, knee

WHEN = datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC)


class FakeMachine:
    """A clock that only fake steps advance; each takes `step_ns` times lognormal noise, times a drift per query."""

    def __init__(self, seed: int = 0) -> None:
        self.now_ns = 0
        self.rng = np.random.default_rng(seed)

    def clock(self) -> int:
        return self.now_ns

    def variant(self, name: str, step_ns: float, *, noise: float = 0.03, batch_size: int = 1) -> Variant:
        def step() -> None:
            self.now_ns += max(1, int(step_ns * np.exp(noise * self.rng.normal())))

        return Variant(name, step, batch_size)


class QuietWatch:
    """A watch that sees nothing, so that the real machine has no say in what is made up here."""

    def start(self) -> "QuietWatch":
        return self

    def stop(self, own_cpu_s: float | None = None) -> Conditions:
        unknown = dict.fromkeys(Conditions.model_fields)
        return Conditions(**unknown | {"seconds": 1.0, "gpus": ()})

    def close(self) -> None:
        pass


def measured(
    times_ns: dict[int, dict[str, float]], *, baseline: str, seed: int = 7, gpu: bool = False
) -> dict[str, list[BatchMeasurement]]:
    """Batch size -> variant -> nanoseconds of a query: measured together on a fake clock, with made-up surroundings."""
    machine = FakeMachine(seed)
    plan = Plan(rounds=10, seconds=0.05, half_width=1.0, time_budget_s=600)
    found: dict[str, list[BatchMeasurement]] = {}
    for size, of_size in times_ns.items():
        variants = [machine.variant(name, ns, batch_size=size) for name, ns in of_size.items()]
        measurement = measure(variants, baseline=baseline, plan=plan, watch=QuietWatch(), clock=machine.clock)
        for name, one in measurement.variants.items():
            bare = BatchMeasurement.of(one, measurement)
            middle = bare.latency.median_ms.value
            surroundings = {
                "phases": phases(middle, size, gpu=gpu),
                "conditions": conditions(gpu=gpu),
                "stages": stages(middle) if gpu else None,
                "processes": [round_ * 3 // len(bare.samples_ms) for round_ in range(len(bare.samples_ms))],
                "reruns": 1 if size == 1 else 0,
            }
            found.setdefault(name, []).append(bare.model_copy(update=surroundings))
    return found


def phases(median_ms: float, batch_size: int, *, gpu: bool = False) -> Phases:
    return Phases(
        load_s=(0.212, 0.198, 0.224),
        first_ms=(2.1 * median_ms + 1.2, 1.9 * median_ms + 1.1, 2.4 * median_ms + 1.4),
        after_gap_ms=(1.31 * median_ms, 1.25 * median_ms, 1.44 * median_ms),
        gap_s=0.5,
        host_before_bytes=61_000_000,
        host_peak_bytes=104_000_000 + 400_000 * batch_size,
        device_bytes=612_000_000 if gpu else None,
    )


def stages(median_ms: float) -> StageTimes:
    return StageTimes(
        enqueue_ms=0.12 * median_ms,
        h2d_ms=0.09 * median_ms,
        compute_ms=0.78 * median_ms,
        d2h_ms=0.02 * median_ms,
        queries=60,
    )


def conditions(*, gpu: bool = False) -> ConditionsSummary:
    def around(middle: float, share: float = 0.1) -> Range:
        return Range(minimum=middle * (1 - share), median=middle, maximum=middle * (1 + share))

    return ConditionsSummary(
        slots=11,
        throttled_slots=1,
        throttle_reasons={"cpu: quota": 1},
        seconds=12.1,
        cpu_busy_percent=around(51.2),
        cpu_others_percent=around(1.4, 0.6),
        steal_percent=Range(minimum=0, median=0, maximum=0.2),
        load_average_1=around(1.1),
        cpu_mhz=around(2445, 0.01),
        cpu_throttle_events=None,
        quota_periods_throttled=2,
        quota_throttled_s=0.02,
        gpus=(
            GpuSummary(
                index=0,
                uuid="GPU-4f1d0e6b",
                samples=118,
                sm_clock_mhz=Range(minimum=1755, median=1980, maximum=1980),
                memory_clock_mhz=Range(minimum=3201, median=3201, maximum=3201),
                power_w_max=412.3,
                temperature_c_max=54.0,
                memory_used_bytes_max=1_304_000_000,
                clock_reasons={"sw_power_cap": 2},
                other_compute_processes_max=0,
            ),
        )
        if gpu
        else (),
    )


def about(value: float, share: float = 0.02, samples: int = 900) -> Estimate:
    return Estimate(value=value, low=value * (1 - share), high=value * (1 + share), samples=samples)


def server(service_ms: float, *, limit_ms: float, lanes: int = 1) -> ServerResult:
    """As of a queue with constant service times; one probe was disturbed."""
    full = 1e3 * lanes / service_ms

    def tail(load: float) -> float:
        return service_ms * (1 + 2.3 * load / (1 - load)) if load < 0.98 else 60 * service_ms * load

    loads = [1.0, 0.5, 0.75, 0.87, 0.93, 0.96, 0.9]
    points = [_load_point(full * load, load, tail(load), service_ms, lanes) for load in loads]
    late = {"valid": False, "reason": "The harness was 0.9 ms late (p99), more than 5 % of 2 ms: the machine was busy."}
    points.insert(2, points[1].model_copy(update=late | {"p99_ms": about(2.2 * tail(0.5), 0.3)}))
    passing = [point.rate_per_s for point in points if point.valid and point.p99_ms.value <= limit_ms]
    failing = [point.rate_per_s for point in points if point.valid and point.p99_ms.value > limit_ms]
    return ServerResult(
        limit_ms=limit_ms,
        rate_per_s=max(passing, default=None),
        failing_per_s=min(failing, default=None),
        stopped_by="time",
        reason="Of the time budget of 20 s there were 0.4 s left, and the next probe needs 2.1 s.",
        batch_size=1,
        lanes=lanes,
        seed=0,
        points=points,
        elapsed_s=19.6,
    )


def _load_point(rate_per_s: float, load: float, tail_ms: float, service_ms: float, lanes: int) -> LoadPoint:
    return LoadPoint(
        rate_per_s=rate_per_s,
        completed_per_s=min(rate_per_s, 1e3 * lanes / service_ms),
        queries=2400,
        lanes=lanes,
        utilisation=min(1.0, load),
        median_ms=about(service_ms + 0.2 * (tail_ms - service_ms)),
        mean_ms=about(service_ms + 0.3 * (tail_ms - service_ms)),
        p90_ms=about(service_ms + 0.5 * (tail_ms - service_ms)),
        p95_ms=about(service_ms + 0.7 * (tail_ms - service_ms)),
        p99_ms=about(tail_ms, 0.08),
        p999_ms=None,
        effective_queries=1130.0,
        lateness_p99_ms=0.01,
        lateness_effect_ms=0.004,
        valid=True,
        reason=None,
        latencies_ms=[service_ms, tail_ms],
    )


def throughput(single_ms: float, *, sizes: Sequence[int] = (1, 4, 16, 32), lanes: Sequence[int] = (1, 2)) -> Any:
    """Batches that take a fixed part and one per sample; a second lane helps by a half. The largest had no memory."""
    points = []
    for size in sizes:
        for count in lanes:
            latency_ms = single_ms * (0.55 + 0.45 * size) * (1.35 if count > 1 else 1)
            rate = 1e3 * size * count / latency_ms
            points.append(
                ThroughputPoint(
                    batch_size=size,
                    lanes=count,
                    throughput_per_s=about(rate, 0.015),
                    median_ms=about(latency_ms, 0.01),
                    round_samples=[900, 910],
                    round_wall_ms=[1000.0, 1001.0],
                    round_median_ms=[latency_ms, latency_ms],
                )
            )
    return ThroughputResult(
        points=points,
        failed=[FailedPoint(batch_size=2 * sizes[-1], lanes=1, reason="out of memory")],
        knee=knee(points),
        reason=None,
        rounds=2,
        stopped_by="rounds",
        elapsed_s=16.0,
    )


PEAK = Peak(
    dtype="float32",
    device="cpu",
    threads=2,
    macs_per_s=71e9,
    bytes_per_s=19.4e9,
    how="torch.mm of 1024 x 1024; copy of 268 MB",
    measured_at=WHEN,
)


def roofline(batch_size: int, measured_ms: float, *, width: int, first: str = "conv1") -> RooflineResult:
    """22 convolutions in three stages, the time of each by its work, and one pooling at the end."""
    layers = []
    for index in range(22):
        stage = index // 8
        side, channels = 16 >> stage, width << stage
        macs = batch_size * side * side * channels * channels * 9
        moved = 4 * (2 * batch_size * side * side * channels + 9 * channels * channels)
        name = first if index == 0 else f"/layer{stage + 1}/layer{stage + 1}.{index % 8 // 2}/conv{index % 2 + 1}/Conv"
        layers.append((name, "Conv", Work(macs, moved)))
    layers.append(("/avgpool/GlobalAveragePool", "GlobalAveragePool", Work(0, 4 * batch_size * width * 64)))
    least = [max(work.macs / 71e9, work.bytes / 19.4e9) for _, _, work in layers]
    rough = [limit * (1.5 + 0.1 * (index % 5)) for index, limit in enumerate(least)]
    share = 0.93 * measured_ms / sum(rough)
    timed = [
        TimedLayer(name, kind, work, "float32", ms=share * ms)
        for (name, kind, work), ms in zip(layers, rough, strict=True)
    ]
    return RooflineResult.of(
        batch_size=batch_size,
        network=[TimedLayer(name, kind, work, "float32") for name, kind, work in layers],
        network_bytes=1_400_000,
        measured_ms=measured_ms,
        peaks={"float32": PEAK},
        timed=timed,
        uncounted=["1 Softmax"],
    )


def explanation(baseline: str, variant: str, *, baseline_ms: float, variant_ms: float) -> Explanation:
    """Half the arithmetic; most of what was lost to kernels, a little won."""
    expected_ms = 0.5 * baseline_ms
    lost_ms = variant_ms - expected_ms
    return Explanation(
        baseline=baseline,
        variant=variant,
        device="cpu",
        batch_size=1,
        baseline_ms=baseline_ms,
        variant_ms=variant_ms,
        expected_ms=expected_ms,
        macs_ratio=0.5,
        peak_ratio=1.0,
        variant_limit_ms=0.4 * variant_ms,
        findings=[
            Finding(
                cause="kernel",
                ms=1.2 * lost_ms,
                fact="14 layers took longer than their work says",
                why="Their kernels use the machine less well.",
                fix="Give the kernels more at once with a larger batch.",
                layers=["layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.1.conv1", "layer3.0.conv1"],
            ),
            Finding(cause="gain", ms=-0.2 * lost_ms, fact="2 layers were faster", why="Caches.", fix="", layers=[]),
        ],
        rows=[],
        only_baseline=[],
        only_variant=[],
    )
