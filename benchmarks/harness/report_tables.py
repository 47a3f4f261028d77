"""The report's tables: what stands in each cell, and its interval below it."""

from collections.abc import Callable

from benchmarks.harness import numerals
from benchmarks.harness.cells import BatchMeasurement
from benchmarks.harness.report_cells import Cell, Rows, Table, estimated, named_variants, ranged, variant_cells
from benchmarks.harness.report_method import measurements, tells_throttling
from benchmarks.harness.report_names import (
    accuracy_name,
    baseline_name,
    between,
    further_metrics,
    metric_of,
    samples_named,
)
from benchmarks.harness.report_sections import phases_rows, roofline_rows, server_rows, stages_rows, throughput_rows
from benchmarks.harness.report_words import compared, macs_of, times
from benchmarks.harness.results import Results
from benchmarks.harness.statistics import SAMPLES_NEEDED, Estimate


def tables(results: Results) -> dict[str, Table | None]:
    """Every table of the page by its name; None where there is nothing to show."""
    makers: dict[str, Callable[[Results], Rows]] = {
        "results": _results,
        "saved": _saved,
        "server": server_rows,
        "throughput": throughput_rows,
        "roofline": roofline_rows,
        "phases": phases_rows,
        "stages": stages_rows,
        "rounds": _rounds,
        "conditions": _conditions,
        "gpus": _gpus,
    }
    return {name: Table.of(list(make(results))) for name, make in makers.items()}


def _results(results: Results) -> Rows:
    baseline, rate = baseline_name(results), f"{samples_named(results)} / s"
    metric = accuracy_name(metric_of(results))
    for variant, name in named_variants(results):
        accuracy, macs = variant.accuracy.top1_percent if variant.accuracy else None, macs_of(variant)
        network: dict[str, Cell | None] = {
            "variant": name,
            "parameters": None if variant.parameters is None else Cell(numerals.compact(variant.parameters)),
            "MACs": None if macs is None else Cell(numerals.compact(macs)),
            "file": Cell(numerals.size(variant.artefact.size_bytes)),
            metric: None
            if accuracy is None
            else Cell(numerals.percent(accuracy.value), numerals.percent_interval(accuracy)),
        }
        for further in further_metrics(results):
            value = variant.accuracy.others_percent.get(further) if variant.accuracy else None
            network[further] = None if value is None else Cell(numerals.percent(value))
        for measurement in variant.measurements:
            yield network | _timed(measurement, rate, is_baseline=variant.name == baseline)
        if not variant.measurements:
            empty = dict.fromkeys(("batch", "latency, ms", "p90, ms", "p99, ms", rate, "speedup"))
            yield network | empty | {"latency, ms": Cell("failed" if variant.failure else "not timed")}


def _timed(measurement: BatchMeasurement, rate: str, *, is_baseline: bool) -> dict[str, Cell | None]:
    latency, speedup = measurement.latency, measurement.speedup
    per_second = measurement.throughput_per_s
    ratio = Cell("baseline" if is_baseline else "n/a", "" if is_baseline else "the baseline failed")
    if speedup is not None:
        text = f"{numerals.ratio(speedup.value)} {speedup.verdict}"
        ratio = Cell(text, numerals.ratio_interval(speedup), style=speedup.verdict)
    return {
        "batch": Cell(str(measurement.batch_size), measurement.scenario),
        "latency, ms": estimated(latency.median_ms),
        "p90, ms": _percentile(latency.p90_ms, 90.0, latency.median_ms.samples),
        "p99, ms": _percentile(latency.p99_ms, 99.0, latency.median_ms.samples),
        rate: Cell(numerals.significant(per_second.value, 4), numerals.interval(per_second)),
        "speedup": ratio,
    }


def _percentile(estimate: Estimate | None, percent: float, samples: int) -> Cell:
    needed = SAMPLES_NEEDED[percent]
    return estimated(estimate) if estimate else Cell("n/a", f"{samples:,} of {needed:,} samples")


def _saved(results: Results) -> Rows:
    cells = variant_cells(results)
    for comparison in compared(results):
        macs, parameters = comparison.macs_ratio, comparison.parameters_ratio
        for measurement, speedup in comparison.measurements:
            left = None if macs is None else 100 / macs
            yield {
                "variant": cells[id(comparison.variant)],
                "batch": Cell(str(measurement.batch_size)),
                "parameters": None if parameters is None else Cell(times(parameters, "fewer", "more")),
                "MACs": None if macs is None else Cell(times(macs, "fewer", "more")),
                "MACs left": None if left is None else Cell(numerals.percent(left)),
                "time they take": Cell(
                    numerals.percent(100 / speedup.value), f"[{100 / speedup.high:.1f}, {100 / speedup.low:.1f}]"
                ),
            }


def _rounds(results: Results) -> Rows:
    """What is measured together shares its rounds, so there is one row for each batch size."""
    by_size: dict[int, list[BatchMeasurement]] = {}
    for measurement in measurements(results):
        by_size.setdefault(measurement.batch_size, []).append(measurement)
    for size, found in sorted(by_size.items()):
        again = next((m.again for m in found if m.again is not None), None)
        yield {
            "batch": Cell(f"Batch {size}", found[0].scenario),
            "rounds": Cell(between([len(m.samples_ms) for m in found])),
            "processes of each variant": Cell(between([max(1, len(set(m.processes))) for m in found])),
            "queries of each variant": Cell(between([m.latency.median_ms.samples for m in found])),
            "rounds run again": Cell(between([m.reruns for m in found])),
            "baseline against itself": None
            if again is None
            else Cell(f"{again.value:.3f}×", f"[{again.low:.3f}, {again.high:.3f}]"),
            "stopped by": Cell(" or ".join(sorted({_STOPS[m.stopped_by] for m in found}))),
        }


_STOPS = {"precision": "precision", "time": "the time budget"}


def _conditions(results: Results) -> Rows:
    for variant, name in named_variants(results):
        for measurement in variant.measurements:
            seen = measurement.conditions
            if seen is None:
                continue
            reasons = ", ".join(f"{reason} ({slots})" for reason, slots in seen.throttle_reasons.items())
            yield {
                "variant": name,
                "batch": Cell(str(measurement.batch_size)),
                "CPU clock, MHz": ranged(seen.cpu_mhz),
                "cores in use, %": ranged(seen.cpu_busy_percent),
                "others, % of a core": ranged(seen.cpu_others_percent),
                "steal, %": ranged(seen.steal_percent),
                "load average": ranged(seen.load_average_1),
                "slots held back": Cell(f"{seen.throttled_slots} of {seen.slots}", reasons, style="words")
                if tells_throttling(seen)
                else None,
            }


def _gpus(results: Results) -> Rows:
    for variant, name in named_variants(results):
        for measurement in variant.measurements:
            for gpu in measurement.conditions.gpus if measurement.conditions else ():
                reasons = ", ".join(f"{reason} ({slots})" for reason, slots in (gpu.clock_reasons or {}).items())
                others = gpu.other_compute_processes_max
                yield {
                    "variant": name,
                    "batch": Cell(str(measurement.batch_size)),
                    "GPU": Cell(str(gpu.index)),
                    "clock, MHz": ranged(gpu.sm_clock_mhz),
                    "memory clock, MHz": ranged(gpu.memory_clock_mhz),
                    "power, W": None if gpu.power_w_max is None else Cell(f"{gpu.power_w_max:.0f}", "at most"),
                    "temperature, °C": None
                    if gpu.temperature_c_max is None
                    else Cell(f"{gpu.temperature_c_max:.0f}", "at most"),
                    "memory in use": None
                    if gpu.memory_used_bytes_max is None
                    else Cell(numerals.size(gpu.memory_used_bytes_max), "all processes"),
                    "others on it": None if others is None else Cell(str(others)),
                    "clock lowered by": Cell(reasons or "nothing", style="words"),
                }
