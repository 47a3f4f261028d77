"""What the report says in words: the headline, the tiles, failures, and why a section is not there."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.harness import numerals
from benchmarks.harness.cells import BatchMeasurement
from benchmarks.harness.report_names import (
    accuracy_name,
    baseline_name,
    counted,
    display_names,
    further_metrics,
    listed,
    metric_of,
    reason_of,
    sentence,
)
from benchmarks.harness.results import Results, VariantResult
from benchmarks.harness.statistics import Speedup

NAMED = 3
"""Variants that the headline of a comparison names; the others are counted."""


@dataclass(frozen=True)
class Comparison:
    """A variant, the baseline it was timed against, and the measurements that carry a speedup."""

    variant: VariantResult
    baseline: VariantResult
    measurements: list[tuple[BatchMeasurement, Speedup]]

    @property
    def smallest(self) -> tuple[BatchMeasurement, Speedup]:
        """The measurement at the smallest batch."""
        return min(self.measurements, key=lambda pair: pair[0].batch_size)

    @property
    def macs_ratio(self) -> float | None:
        """How many times fewer MACs; None where they are not known."""
        return _ratio(macs_of(self.baseline), macs_of(self.variant))

    @property
    def parameters_ratio(self) -> float | None:
        """How many times fewer parameters; None where they are not known."""
        return _ratio(self.baseline.parameters, self.variant.parameters)


def macs_of(variant: VariantResult) -> int | None:
    """Multiply-adds of one sample: those of the document, else those that its limit was reckoned from."""
    if variant.macs is None and variant.rooflines and not variant.rooflines[0].uncounted:
        return variant.rooflines[0].macs // variant.rooflines[0].batch_size
    return variant.macs


def compared(results: Results) -> list[Comparison]:
    """Every variant that was timed against a baseline, in the document's order."""
    found = []
    for variant in results.variants:
        pairs = [(m, m.speedup) for m in variant.measurements if m.speedup is not None]
        baseline = results.baseline_of(variant, pairs[0][1]) if pairs else None
        if baseline is not None:
            found.append(Comparison(variant, baseline, pairs))
    return found


def headline(results: Results, comparisons: list[Comparison]) -> str:
    """The measured facts in one sentence or two.

    Of a run they are those of the first pruned variant at its smallest batch; of any other files, what each does
    against the first of them.
    """
    pruned = [comparison for comparison in comparisons if comparison.variant.kind == "pruned"]
    if pruned:
        text = _of_a_run(pruned[0], pruned)
    elif comparisons:
        text = _of_files(results, comparisons)
    else:
        text = _without_ratio(results)
    failed = [name for name, variant in _named(results) if variant.failure and not variant.measurements]
    if failed:
        text += f" {listed(failed)} failed."
    # A line may break between the facts, not inside an interval or between a figure and its unit.
    return re.sub(r" (?=[\d%→]|ms\b)", "\N{NO-BREAK SPACE}", text)


def latency_change(speedup: Speedup) -> str:
    """'1.56× lower latency [1.55, 1.58]', and no claim beyond the verdict."""
    interval = numerals.ratio_interval(speedup)
    match speedup.verdict:
        case "faster":
            return f"{numerals.ratio(speedup.value)} lower latency {interval}"
        case "slower":
            upside_down = f"[{1 / speedup.high:.2f}, {1 / speedup.low:.2f}]"
            return f"{numerals.ratio(1 / speedup.value)} higher latency {upside_down}"
        case "equivalent":
            return "the same latency within 1 %"
        case "unclear":
            return f"no clear change of latency, {numerals.ratio(speedup.value)} {interval}"


def tiles(results: Results, comparisons: list[Comparison]) -> list[dict[str, str]]:
    """The figures to be seen first: before and after of one variant, or the latency of each of several files."""
    pruned = next((c for c in comparisons if c.variant.kind == "pruned"), None)
    if pruned is None and len(comparisons) != 1:
        names = dict(zip(map(id, results.variants), display_names(results), strict=True))
        return [_latency_tile(comparison, names[id(comparison.variant)]) for comparison in comparisons]
    chosen = pruned or comparisons[0]
    before, after = chosen.baseline, chosen.variant
    found = []
    old_macs, new_macs = macs_of(before), macs_of(after)
    if old_macs is not None and new_macs is not None:
        found.append(_tile("MACs", numerals.compact, old_macs, new_macs))
    if before.parameters is not None and after.parameters is not None:
        found.append(_tile("Parameters", numerals.compact, before.parameters, after.parameters))
    found.append(_tile("File size", numerals.size, before.artefact.size_bytes, after.artefact.size_bytes))
    if before.accuracy and after.accuracy:
        old, new = before.accuracy.top1_percent, after.accuracy.top1_percent
        found.append(
            {
                "name": _capital(accuracy_name(metric_of(results))),
                "before": f"from {numerals.percent(old.value)}",
                "after": numerals.percent(new.value),
                "change": f"{new.value - old.value:+.1f} points on {new.samples:,} images".replace("-", "−"),
            }
        )
        for name in further_metrics(results):
            found += _further_tile(name, before, after)
    measurement, _ = chosen.smallest
    found.append(_latency_tile(chosen, f"Latency, batch {measurement.batch_size}"))
    if before.server and after.server and before.server.rate_per_s and after.server.rate_per_s:
        old_rate, new_rate = before.server.rate_per_s, after.server.rate_per_s
        found.append(
            {
                "name": f"Load, p99 ≤ {after.server.limit_ms:g} ms",
                "before": f"from {numerals.significant(old_rate)}/s",
                "after": f"{numerals.significant(new_rate)}/s",
                "change": times(new_rate / old_rate, "more", "less"),
            }
        )
    return found


def _further_tile(name: str, before: VariantResult, after: VariantResult) -> list[dict[str, str]]:
    """A figure beside the accuracy, where both have it."""
    old, new = (it.accuracy.others_percent.get(name) if it.accuracy else None for it in (before, after))
    if old is None or new is None:
        return []
    return [
        {
            "name": _capital(name),
            "before": f"from {numerals.percent(old)}",
            "after": numerals.percent(new),
            "change": f"{new - old:+.1f} points".replace("-", "−"),
        }
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def failures(results: Results) -> list[dict[str, str]]:
    """Each variant that failed, with its reason, and what stands nevertheless."""
    return [
        {
            "name": name,
            "reason": sentence(reason_of(variant.failure)),
            "left": f"its figures at batch {listed([str(m.batch_size) for m in variant.measurements])} stand"
            if variant.measurements
            else "it has no figures",
        }
        for name, variant in _named(results)
        if variant.failure
    ]


def left_out(results: Results, drawn: Sequence[str]) -> list[tuple[str, str]]:
    """(section, why it is not on the page) for all that is not in `drawn`."""
    timed = any(variant.measurements for variant in results.variants)
    ratios = any(m.speedup for variant in results.variants for m in variant.measurements)
    untimed = "no variant was timed"
    single = "one variant was timed and no other; name a second file to compare it with"
    apart = "no variant was timed against a baseline in the same rounds, and ratios across runs mean little"
    if timed and len(results.variants) > 1 and not ratios and any(variant.failure for variant in results.variants):
        apart = f"{baseline_name(results)} or all others failed, and a ratio needs both"
    alone = single if len(results.variants) == 1 else apart
    own = {
        "accuracy": "the accuracy of the timed files was not measured; espalier compare does, with --data"
        if timed
        else untimed,
        "speedups": alone if timed else untimed,
        "macs": ("the multiply-adds of the files are not known" if ratios else alone)
        if timed
        else "no variant was timed, so there is no latency to set beside the MACs",
        "server": "no limit on the latency was set; espalier bench does it with --scenario Server --limit 20",
        "throughput": "no numbers of lanes were given; espalier bench does it with --streams 1,2,4",
        "roofline": "the limits of this machine were not measured; espalier bench does it with --explain",
        "layers": "the layers were not timed one by one; espalier bench does it with --explain",
        "phases": "the variants were opened by the process that timed them; espalier bench opens each in a fresh one"
        if timed
        else untimed,
        "pruning": "the pruning record names neither layers nor events" if results.pruning else "nothing was pruned",
    }
    recorded: dict[str, str] = {str(section): reason for section, reason in results.not_measured.items()}
    return [
        (title, sentence(recorded.get(section, own[section])))
        for section, title in TITLES.items()
        if section not in drawn
    ]


TITLES = {
    "speedups": "Speedup",
    "macs": "Work saved, and time saved",
    "accuracy": "Accuracy against latency",
    "server": "Latency against offered load",
    "throughput": "Throughput over batch sizes and lanes",
    "roofline": "Share of what the machine can do",
    "layers": "Layer by layer",
    "phases": "From start to hot",
    "pruning": "What was pruned",
}
"""Sections that may be missing, in the page's order."""


def _of_a_run(first: Comparison, pruned: list[Comparison]) -> str:
    measurement, speedup = first.smallest
    ratio = first.macs_ratio
    facts = [] if ratio is None else [times(ratio, "fewer MACs", "more MACs").replace("the same", "the same MACs")]
    facts.append(f"{latency_change(speedup)} at batch {measurement.batch_size}")
    before, after = first.baseline.accuracy, first.variant.accuracy
    if before and after:
        facts.append(f"accuracy {before.top1_percent.value:.1f} → {after.top1_percent.value:.1f} %")
    for other in pruned:
        if other.variant.artefact.precision != first.variant.artefact.precision:
            _, other_speedup = other.smallest
            accuracy = other.variant.accuracy
            at = f" at {accuracy.top1_percent.value:.1f} %" if accuracy else ""
            facts.append(f"in {other.variant.artefact.precision} {latency_change(other_speedup)}{at}")
    text = ", ".join(facts) + "."
    return text[:1].upper() + text[1:]


def _of_files(results: Results, comparisons: list[Comparison]) -> str:
    names = dict(zip(map(id, results.variants), display_names(results), strict=True))
    baseline = names[id(comparisons[0].baseline)]
    if len(comparisons) == 1:
        changes = [f"{latency_change(speedup)} at batch {m.batch_size}" for m, speedup in comparisons[0].measurements]
        return f"{names[id(comparisons[0].variant)]} against {baseline}: {', '.join(changes[:2])}."
    size = comparisons[0].smallest[0].batch_size
    changes = [f"{names[id(c.variant)]} {latency_change(c.smallest[1])}" for c in comparisons[:NAMED]]
    if len(comparisons) > NAMED:
        changes.append(f"{counted(len(comparisons) - NAMED, 'other')} below")
    return f"Against {baseline} at batch {size}: {'; '.join(changes)}."


def _without_ratio(results: Results) -> str:
    timed = [(name, variant.measurements[0]) for name, variant in _named(results) if variant.measurements]
    if len(timed) == 1:
        name, measurement = timed[0]
        middle = measurement.latency.median_ms
        return f"{name}: {numerals.value(middle)} ms {numerals.interval(middle)} at batch {measurement.batch_size}."
    what = "timed, none against a baseline" if timed else "recorded, none timed"
    return f"{counted(len(results.variants), 'variant')} {what}."


def _named(results: Results) -> list[tuple[str, VariantResult]]:
    return list(zip(display_names(results), results.variants, strict=True))


def _ratio(before: int | None, after: int | None) -> float | None:
    """None where one is not known, or has none at all to be a share of."""
    return before / after if before and after else None


def times(ratio: float, fewer: str, more: str) -> str:
    """'2.01× fewer', '1.20× more' or 'the same'."""
    if numerals.ratio(ratio) == numerals.ratio(1.0):
        return "the same"
    return f"{numerals.ratio(ratio)} {fewer}" if ratio >= 1 else f"{numerals.ratio(1 / ratio)} {more}"


def _tile(name: str, written: Callable[[int], str], before: int, after: int) -> dict[str, str]:
    change = times(before / after, "less", "more") if before and after else ""
    return {"name": name, "before": f"from {written(before)}", "after": written(after), "change": change}


def _latency_tile(comparison: Comparison, name: str) -> dict[str, str]:
    measurement, speedup = comparison.smallest
    size = measurement.batch_size
    old = next((m.latency.median_ms for m in comparison.baseline.measurements if m.batch_size == size), None)
    return {
        "name": name,
        "before": f"from {numerals.value(old)} ms" if old else "",
        "after": f"{numerals.value(measurement.latency.median_ms)} ms",
        "change": f"{numerals.ratio(speedup.value)} {numerals.ratio_interval(speedup)} {speedup.verdict}",
    }
