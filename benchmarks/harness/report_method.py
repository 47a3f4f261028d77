"""How it was measured, in words: what the baseline differs from itself, who else used the machine, what ended it."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.harness import numerals
from benchmarks.harness.cells import BatchMeasurement
from benchmarks.harness.condition_records import ConditionsSummary, Range
from benchmarks.harness.peaks import Peak
from benchmarks.harness.ratios import spread_of
from benchmarks.harness.report_names import (
    between,
    counted,
    display_names,
    listed,
    sentence,
    spread_words,
    spreads,
)
from benchmarks.harness.results import Results
from benchmarks.harness.server import ServerResult
from benchmarks.harness.statistics import SAMPLES_NEEDED

MEANINGFUL = 1.5
"""A larger spread of the baseline against itself is the end of an interval that knows nothing."""


def measurements(results: Results) -> list[BatchMeasurement]:
    """Every measurement of the document."""
    return [measurement for variant in results.variants for measurement in variant.measurements]


def again_line(results: Results) -> str:
    """What no claim may be smaller than; empty where nothing was timed."""
    found = spreads(results)
    if not measurements(results):
        return ""
    if not found:
        return "The baseline was not timed against itself, so how small a difference could be noise is not known."
    if max(map(spread_of, found.values())) > MEANINGFUL:
        return "The rounds were too few, or too disturbed, to say how far the baseline differs from itself."
    return f"The baseline differs from itself by up to {spread_words(found)}; no smaller claim is made."


def rounds_line(results: Results) -> str:
    """'12 to 14 rounds in 3 processes of each variant, stopped by precision'; empty where nothing was timed."""
    timed = measurements(results)
    if not timed:
        return ""
    rounds = between([len(measurement.samples_ms) for measurement in timed])
    processes = max(len(set(measurement.processes)) for measurement in timed)
    reasons = {measurement.stopped_by for measurement in timed}
    words = {"precision": "the precision asked for", "time": "the time budget"}
    ends = listed([words[reason] for reason in sorted(reasons)])
    text = f"{rounds} interleaved rounds"
    if processes > 1:
        text += f" in {counted(processes, 'process')} of each variant"
    return f"{text}, ended by {ends}"


def overhead_line(results: Results) -> str:
    """What the harness itself takes of a latency; empty where that was not measured."""
    found = results.overhead
    if found is None:
        return ""
    return (
        f"With a model that does nothing, the harness took {numerals.significant(found.overhead_us, 2)} µs a query and "
        f"handed it over {numerals.significant(found.lateness_median_us, 2)} µs late (median; 99th percentile "
        f"{numerals.significant(found.lateness_p99_us, 2)} µs)."
    )


def conditions_line(results: Results) -> str:
    """Who else used the machine, and how often it was held back; empty where nobody watched."""
    seen = [measurement.conditions for measurement in measurements(results) if measurement.conditions]
    if not seen:
        return ""
    facts = []
    others, steal = _highest(c.cpu_others_percent for c in seen), _highest(c.steal_percent for c in seen)
    if others is not None:
        facts.append(f"other processes used up to {others:.0f} % of a core")
    if steal is not None:
        facts.append(f"the hypervisor took up to {steal:.1f} %" if steal >= 0.05 else "the hypervisor took nothing")
    held, slots = sum(c.throttled_slots for c in seen), sum(c.slots for c in seen)
    if held:
        facts.append(f"the hardware was held back in {held:,} of {slots:,} slots")
    elif any(tells_throttling(one) for one in seen):
        facts.append("nothing held the hardware back")
    else:
        facts.append("this machine does not tell whether it held the hardware back")
    text = f"While it was timed, {listed(facts)}."
    reruns = sum({m.batch_size: m.reruns for m in measurements(results)}.values())
    if reruns:
        text += f" {counted(reruns, 'round')} {'was' if reruns == 1 else 'were'} run again for it; "
        text += "the disturbed samples are kept in results.json and stand in no figure."
    return text


def tells_throttling(seen: ConditionsSummary) -> bool:
    """Whether anything could be read that counts how often the hardware was held back."""
    counted_on_cpu = seen.cpu_throttle_events is not None or seen.quota_periods_throttled is not None
    return counted_on_cpu or any(gpu.clock_reasons is not None for gpu in seen.gpus)


def notes(results: Results) -> dict[str, list[str]]:
    """Section -> what is to be known of a variant's figures in it, such as why a search ended early."""
    found: dict[str, list[str]] = {"server": [], "throughput": []}
    for name, variant in zip(display_names(results), results.variants, strict=True):
        if variant.server:
            found["server"] += [f"{name}: {note}" for note in _server_notes(variant.server)]
        if variant.throughput and variant.throughput.reason:
            found["throughput"].append(f"{name}: {sentence(variant.throughput.reason)}")
    return found


def _server_notes(server: ServerResult) -> Iterator[str]:
    if server.reason:
        yield sentence(server.reason)
    needed = SAMPLES_NEEDED[99.0]
    for point in server.points:
        if point.valid and point.rate_per_s == server.rate_per_s and point.effective_queries < needed:
            yield (
                f"Queries wait for those before them, so {point.queries:,} of them tell as much as "
                f"{point.effective_queries:,.0f} independent ones. Below {needed} the interval of p99 is too narrow; "
                "a longer probe makes it right."
            )


def peaks(results: Results) -> list[tuple[str, str]]:
    """(which, how much and how it was found) of what the machine reached at best."""
    found: dict[tuple[str, str, int], Peak] = {}
    for variant in results.variants:
        for roofline in variant.rooflines:
            found |= {(peak.dtype, peak.device, peak.threads): peak for peak in roofline.peaks}
    return [
        (
            f"{peak.dtype} on {peak.device}" + (f", {counted(peak.threads, 'thread')}" if peak.device == "cpu" else ""),
            f"{_per_second(peak.macs_per_s)}, {numerals.size(round(peak.bytes_per_s))}/s: {peak.how}",
        )
        for peak in found.values()
    ]


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted key, text) pairs; lists, and objects in lists, stand on one line each.

    What is not known is named together in the last pair.
    """
    pairs = list(_leaves(value, path))
    unknown = [key for key, text in pairs if text == _UNKNOWN]
    known = [pair for pair in pairs if pair[1] != _UNKNOWN]
    return [*known, (_UNKNOWN, ", ".join(unknown))] if unknown else known


_UNKNOWN = "not known"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and (value or not path):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path} · {_spaced(key)}" if path else _spaced(key))
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value, start=1):
            facts = [f"{key} {text}" for key, text in _leaves(inner, "") if text != _UNKNOWN]
            yield f"{path} {number}" if len(value) > 1 else path, ", ".join(facts)
    else:
        yield path.removesuffix(" bytes"), _plain_text(value, path)


def _plain_text(value: Any, path: str) -> str:
    if value is None:
        return _UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and path.endswith(" bytes"):
        return numerals.size(value)
    if isinstance(value, (list, dict)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _spaced(key: str) -> str:
    """OMP_NUM_THREADS stays as it is."""
    return key if key.isupper() else key.replace("_", " ")


def _per_second(macs: float | None) -> str:
    return "no multiply-adds" if macs is None else f"{numerals.compact(macs)}MAC/s"


def _highest(ranges: Iterable[Range | None]) -> float | None:
    return max((found.maximum for found in ranges if found), default=None)
