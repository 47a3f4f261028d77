"""One variant at one batch size, as the results document keeps it: every sample, and what was made of them."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.harness.conditions import ConditionsSummary, summary
from benchmarks.harness.measure import Measured, Measurement, Scenario
from benchmarks.harness.session import Nanoseconds
from benchmarks.harness.statistics import Estimate, Speedup, median
from benchmarks.harness.subject import Stages

LATENCIES = ("median_ms", "mean_ms", "p90_ms", "p95_ms", "p99_ms", "p999_ms")


class Record(BaseModel):
    """Base of all parts of the document: immutable, no unknown keys, no NaN or infinity (they are not JSON)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Latency(Record):
    """Time of one query from end to end. Percentiles are None where the samples are too few to carry them."""

    median_ms: Estimate
    mean_ms: Estimate
    p90_ms: Estimate | None
    p95_ms: Estimate | None
    p99_ms: Estimate | None
    p999_ms: Estimate | None


class StageTimes(Record):
    """Medians of queries taken apart on a device, besides the timed ones. None where its events are hidden."""

    enqueue_ms: float = Field(ge=0, description="Host time until all work was in the device's queue.")
    h2d_ms: float | None = Field(ge=0, description="Copying inputs to the device, by its own events.")
    compute_ms: float | None = Field(ge=0, description="Computing, by the device's own events.")
    d2h_ms: float | None = Field(ge=0, description="Copying outputs back, by the device's own events.")
    queries: int = Field(ge=1)

    @classmethod
    def of(cls, stages: Sequence[Stages]) -> "StageTimes | None":
        """None of no stages, as on a CPU."""
        if not stages:
            return None

        def middle(values: list[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return median(known) if known else None

        return cls(
            enqueue_ms=median([(stage.enqueued_ns - stage.issued_ns) / 1e6 for stage in stages]),
            h2d_ms=middle([stage.h2d_ms for stage in stages]),
            compute_ms=middle([stage.compute_ms for stage in stages]),
            d2h_ms=middle([stage.d2h_ms for stage in stages]),
            queries=len(stages),
        )


class Phases(Record):
    """A service's life apart from its hot queries: one value for each process that was started."""

    load_s: tuple[float, ...] = Field(description="Opening the artefact, its runtime's library included.")
    first_ms: tuple[float, ...] = Field(description="The first query.")
    after_gap_ms: tuple[float, ...] = Field(description="One query after a pause; empty where none was made.")
    gap_s: float = Field(ge=0, description="Length of the pause.")
    host_before_bytes: int = Field(ge=0, description="Memory of a process before it opened the artefact.")
    host_peak_bytes: int = Field(ge=0, description="Most memory of a process in RAM; the largest of all processes.")
    device_bytes: int | None = Field(ge=0, description="Memory of a process on the GPU, after its queries.")


class BatchMeasurement(Record):
    """One variant at one batch size under one scenario."""

    batch_size: int = Field(ge=1)
    scenario: Scenario = Field(description="MLPerf's names; not an MLPerf submission.")
    latency: Latency
    throughput_per_s: Estimate = Field(description="Images per second of wall time; samples counts images.")
    speedup: Speedup | None = Field(description="None for the baseline itself, and where the baseline failed.")
    again: Speedup | None = Field(description="The baseline against itself in the same rounds, A/A.")
    stopped_by: Literal["precision", "time"] = Field(
        description="'precision' if every ratio's interval was narrow enough, 'time' if the budget ended before."
    )
    reruns: int = Field(ge=0, description="Rounds that were run again because the machine throttled.")
    stages: StageTimes | None = Field(description="None on a CPU.")
    phases: Phases | None = Field(description="None where the variant was opened by whoever measured it.")
    conditions: ConditionsSummary | None
    processes: list[int] = Field(description="The process that each round ran in.")
    samples_ms: list[list[float]] = Field(description="Every latency measured: one list per round.")
    throttled_samples_ms: list[list[float]] = Field(description="Those of rounds that were run again; in no figure.")

    @classmethod
    def of(cls, measured: Measured, measurement: Measurement, *, gap_s: float = 0.0) -> "BatchMeasurement":
        """From what `measure` returns; `gap_s` is the plan's."""
        return cls(
            batch_size=measured.batch_size,
            scenario=measured.scenario,
            latency=Latency(**{name: getattr(measured, name) for name in LATENCIES}),
            throughput_per_s=measured.throughput_per_s,
            speedup=measured.speedup,
            again=measurement.again,
            stopped_by=measurement.stopped_by,
            reruns=measurement.reruns,
            stages=StageTimes.of(measured.stages),
            phases=_phases(measured, gap_s),
            conditions=summary(measured.conditions) if measured.conditions else None,
            processes=list(measured.processes),
            samples_ms=[_milliseconds(samples) for samples in measured.rounds_ns],
            throttled_samples_ms=[_milliseconds(samples) for samples in measured.throttled_ns],
        )


def _phases(measured: Measured, gap_s: float) -> Phases | None:
    if not measured.opened or not measured.memory or not measured.description:
        return None
    devices = [memory.device_bytes for memory in measured.memory if memory.device_bytes is not None]
    return Phases(
        load_s=tuple(opened.load_s for opened in measured.opened),
        first_ms=tuple(opened.first_ms for opened in measured.opened),
        after_gap_ms=measured.after_gap_ms,
        gap_s=gap_s,
        host_before_bytes=max(opened.before_bytes for opened in measured.opened),
        host_peak_bytes=max(memory.host_peak_bytes for memory in measured.memory),
        device_bytes=max(devices) if devices else None,
    )


def _milliseconds(samples: Nanoseconds) -> list[float]:
    rounded: list[float] = np.round(samples / 1e6, 6).tolist()
    return rounded
