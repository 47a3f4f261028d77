"""The results as a table: tidy rows, and the CSV file that they make."""

import csv
import io
from typing import TYPE_CHECKING, Any

from benchmarks.harness.cells import LATENCIES, BatchMeasurement
from benchmarks.harness.server import ServerResult
from benchmarks.harness.statistics import Estimate, median
from benchmarks.harness.throughput import ThroughputResult

if TYPE_CHECKING:
    from benchmarks.harness.results import Results, VariantResult


PLAIN = (
    "baseline",
    "verdict",
    "stopped_by",
    "rounds",
    "processes",
    "reruns",
    "load_s",
    "first_ms",
    "after_gap_ms",
    "host_peak_bytes",
    "device_bytes",
    "enqueue_ms",
    "h2d_ms",
    "compute_ms",
    "d2h_ms",
    "limit_ms",
    "rate_per_s",
    "failing_per_s",
    "knee",
    "roofline_ms",
    "roofline_reached",
)
"""Columns without an interval."""


def rows(results: "Results") -> list[dict[str, Any]]:
    """One tidy row per variant x runtime x precision x batch x scenario, and x lanes in the scenario Throughput.

    Scenarios are those of the measurements, Server (one row: the highest rate within the limit) and Throughput (all
    lanes kept busy; not a name of MLPerf's). A variant that was not timed has one row. Where processes differ, a row
    has their median. Units stand in the names; those without one are ratios, counts or words.
    """
    table = []
    for variant in results.variants:
        found = [_closed_loop(variant, measurement) for measurement in variant.measurements]
        if variant.server is not None:
            found.append(_server(variant.server))
        if variant.throughput is not None:
            found += [_saturated(variant.throughput, index) for index in range(len(variant.throughput.points))]
        table += [_row(variant, cells) for cells in found or [{}]]
    return table


def csv_text(results: "Results") -> str:
    """`rows` as CSV with a header; an absent figure is an empty cell."""
    table = rows(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _row(variant: "VariantResult", cells: dict[str, Any]) -> dict[str, Any]:
    """What is known of the variant, then its cells of one scenario; those that the scenario lacks are None."""
    accuracy = variant.accuracy
    row: dict[str, Any] = {
        "variant": variant.name,
        "kind": variant.kind,
        "runtime": variant.runtime.name,
        "runtime_version": variant.runtime.version,
        "device": variant.runtime.device,
        "precision": variant.artefact.precision,
        "batch_size": None,
        "scenario": None,
        "lanes": None,
        "failure": variant.failure,
        "artefact": variant.artefact.path,
        "sha256": variant.artefact.sha256,
        "size_bytes": variant.artefact.size_bytes,
        "parameters": variant.parameters,
        "macs": variant.macs,
        "loss": accuracy.loss if accuracy else None,
        "metric": accuracy.metric if accuracy else None,
        "others_percent": _named(accuracy.others_percent) if accuracy else None,
    }
    row |= _cells("top1_percent", accuracy.top1_percent if accuracy else None)
    row |= _cells("top5_percent", accuracy.top5_percent if accuracy else None)
    for name in (*(f"latency_{name}" for name in LATENCIES), "throughput_per_s", "speedup", "again"):
        row |= _cells(name, None)
    row |= dict.fromkeys(PLAIN)
    return row | cells


def _named(figures: dict[str, float]) -> str | None:
    """mean IoU=41.2; cells without figures are empty."""
    return "; ".join(f"{name}={value}" for name, value in figures.items()) or None


def _closed_loop(variant: "VariantResult", measurement: BatchMeasurement) -> dict[str, Any]:
    speedup, phases, stages = measurement.speedup, measurement.phases, measurement.stages
    cells: dict[str, Any] = {"batch_size": measurement.batch_size, "scenario": measurement.scenario, "lanes": 1}
    for name in LATENCIES:
        cells |= _cells(f"latency_{name}", getattr(measurement.latency, name))
    cells |= _cells("throughput_per_s", measurement.throughput_per_s)
    cells |= _cells("speedup", speedup) | _cells("again", measurement.again)
    cells |= {
        "baseline": speedup.baseline if speedup else None,
        "verdict": speedup.verdict if speedup else None,
        "stopped_by": measurement.stopped_by,
        "rounds": len(measurement.samples_ms),
        "processes": len(set(measurement.processes)) or None,
        "reruns": measurement.reruns,
    }
    if phases is not None:
        cells |= {
            "load_s": median(phases.load_s),
            "first_ms": median(phases.first_ms),
            "after_gap_ms": median(phases.after_gap_ms) if phases.after_gap_ms else None,
            "host_peak_bytes": phases.host_peak_bytes,
            "device_bytes": phases.device_bytes,
        }
    if stages is not None:
        cells |= {name: getattr(stages, name) for name in ("enqueue_ms", "h2d_ms", "compute_ms", "d2h_ms")}
    roofline = next((found for found in variant.rooflines if found.batch_size == measurement.batch_size), None)
    if roofline is not None:
        cells |= {"roofline_ms": roofline.limit_ms, "roofline_reached": roofline.reached}
    return cells


def _server(server: ServerResult) -> dict[str, Any]:
    cells: dict[str, Any] = {
        "batch_size": server.batch_size,
        "scenario": server.scenario,
        "lanes": server.lanes,
        "stopped_by": server.stopped_by,
        "limit_ms": server.limit_ms,
        "rate_per_s": server.rate_per_s,
        "failing_per_s": server.failing_per_s,
    }
    best = next((point for point in server.points if point.valid and point.rate_per_s == server.rate_per_s), None)
    for name in LATENCIES if best else ():
        cells |= _cells(f"latency_{name}", getattr(best, name))
    return cells


def _saturated(throughput: ThroughputResult, index: int) -> dict[str, Any]:
    point = throughput.points[index]
    cells: dict[str, Any] = {
        "batch_size": point.batch_size,
        "scenario": "Throughput",
        "lanes": point.lanes,
        "stopped_by": throughput.stopped_by,
        "rounds": throughput.rounds,
        "knee": index == throughput.knee,
    }
    return cells | _cells("latency_median_ms", point.median_ms) | _cells("throughput_per_s", point.throughput_per_s)


def _cells(name: str, estimate: Estimate | None) -> dict[str, float | int | None]:
    fields = {"": "value", "_low": "low", "_high": "high", "_samples": "samples"}
    return {f"{name}{suffix}": getattr(estimate, field, None) for suffix, field in fields.items()}
