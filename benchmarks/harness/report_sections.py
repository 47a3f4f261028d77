"""The report's tables of single sections: load, throughput, limits, and a service's life."""

from benchmarks.harness import numerals
from benchmarks.harness.cells import Phases
from benchmarks.harness.report_cells import Cell, Rows, estimated, named_variants, plain, several
from benchmarks.harness.report_names import sentence
from benchmarks.harness.results import Results


def server_rows(results: Results) -> Rows:
    """Highest rate of each variant, and how the search for it ended."""
    for variant, name in named_variants(results):
        server = variant.server
        if server is None:
            continue
        best = next((point for point in server.points if point.rate_per_s == server.rate_per_s), None)
        failing = server.failing_per_s
        yield {
            "variant": name,
            "p99 limit, ms": Cell(f"{server.limit_ms:g}", f"batch {server.batch_size}, lanes: {server.lanes}"),
            "highest rate / s": Cell(
                numerals.significant(server.rate_per_s)
                if server.rate_per_s is not None
                else _NO_RATE[server.stopped_by],
                "" if failing is None else f"{numerals.significant(failing)} misses the limit",
            ),
            "p99 there, ms": estimated(best.p99_ms) if best and best.p99_ms else None,
            "lanes busy": Cell(numerals.percent(100 * best.utilisation)) if best else None,
            "queries": Cell(f"{best.queries:,}", f"{round(best.effective_queries):,} independent") if best else None,
            "search ended": Cell(_ENDS[server.stopped_by], style="words"),
        }


_NO_RATE = {"limit": "none"} | dict.fromkeys(("bracket", "time", "harness"), "not found")
_ENDS = {
    "bracket": "the two rates are close",
    "limit": "no load keeps the limit",
    "time": "time budget over",
    "harness": "harness late",
}


def throughput_rows(results: Results) -> Rows:
    """Highest throughput of each variant, and the knee."""
    for variant, name in named_variants(results):
        found = variant.throughput
        if found is None or not found.points:
            continue
        highest = max(found.points, key=lambda point: point.throughput_per_s.value)
        knee = None if found.knee is None else found.points[found.knee]
        yield {
            "variant": name,
            "highest / s": Cell(
                numerals.significant(highest.throughput_per_s.value),
                f"batch {highest.batch_size}, lanes: {highest.lanes}",
            ),
            "its latency, ms": estimated(highest.median_ms),
            "knee / s": Cell(
                numerals.significant(knee.throughput_per_s.value), f"batch {knee.batch_size}, lanes: {knee.lanes}"
            )
            if knee
            else None,
            "latency at the knee, ms": estimated(knee.median_ms) if knee else None,
            "points that failed": Cell(str(len(found.failed)), sentence(found.failed[0].reason), style="words")
            if found.failed
            else None,
        }


def roofline_rows(results: Results) -> Rows:
    """How near each variant came to the machine's limit, by batch size."""
    for variant, name in named_variants(results):
        for roofline in variant.rooflines:
            compute = roofline.compute_bound_share
            bound, share = ("compute", compute) if compute >= 0.5 else ("memory", 1 - compute)
            yield {
                "variant": name,
                "batch": Cell(str(roofline.batch_size)),
                "limit, ms": Cell(numerals.significant(roofline.limit_ms)),
                "limit in caches, ms": Cell(numerals.significant(roofline.floor_ms)),
                "measured, ms": Cell(numerals.significant(roofline.measured_ms)),
                "share reached": Cell(f"{100 * roofline.reached:.0f} %"),
                "bound by": Cell(bound, f"{100 * share:.0f} % of the limit"),
                "not counted": Cell(", ".join(roofline.uncounted), style="words") if roofline.uncounted else None,
            }


def phases_rows(results: Results) -> Rows:
    """Load, first inference, hot, after a pause, and memory."""
    for variant, name in named_variants(results):
        for measurement in variant.measurements:
            phases = measurement.phases
            if phases is None:
                continue
            yield {
                "variant": name,
                "batch": Cell(str(measurement.batch_size)),
                "load, s": several(phases.load_s),
                "first inference, ms": several(phases.first_ms),
                "hot, ms": estimated(measurement.latency.median_ms),
                **_after_gap(phases),
                "peak memory, host": Cell(
                    numerals.size(phases.host_peak_bytes), f"{numerals.size(phases.host_before_bytes)} before"
                ),
                "memory, device": None if phases.device_bytes is None else Cell(numerals.size(phases.device_bytes)),
            }


def _after_gap(phases: Phases) -> dict[str, Cell | None]:
    if not phases.after_gap_ms:
        return {"after a pause, ms": None}
    cell = several(phases.after_gap_ms)
    return {"after a pause, ms": Cell(cell.text, f"of {phases.gap_s:g} s")}


def stages_rows(results: Results) -> Rows:
    """One query taken apart by the device's events."""
    for variant, name in named_variants(results):
        for measurement in variant.measurements:
            stages = measurement.stages
            if stages is None:
                continue
            yield {
                "variant": name,
                "batch": Cell(str(measurement.batch_size)),
                "host to host, ms": estimated(measurement.latency.median_ms),
                "into the queue, ms": plain(stages.enqueue_ms),
                "to the device, ms": plain(stages.h2d_ms),
                "computing, ms": plain(stages.compute_ms),
                "back, ms": plain(stages.d2h_ms),
                "queries": Cell(str(stages.queries)),
            }
