"""One self-contained page from a results document: it opens offline, in any browser, from a mail attachment.

The page says what was measured and, where a section has no data, why. Its figures come from `plots`, its words from
`report.html`; this module decides what stands in it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from benchmarks.harness import numerals, plots
from benchmarks.harness.results import BatchMeasurement, Pruning, Results, VariantResult
from benchmarks.harness.statistics import SAMPLES_NEEDED, Speedup

QUANTITY_NAMES = {"macs": "MACs"}


@dataclass(frozen=True)
class Comparison:
    """A variant, the baseline it was timed against, and the measurements that carry a speedup."""

    variant: VariantResult
    baseline: VariantResult
    measurements: list[tuple[BatchMeasurement, Speedup]]


def report_html(results: Results) -> str:
    """The page as text. Every value is escaped; there is no script and no reference to anything outside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "compact": numerals.compact,
        "interval": numerals.interval,
        "percent": numerals.percent,
        "percent_interval": numerals.percent_interval,
        "ratio": numerals.ratio,
        "ratio_interval": numerals.ratio_interval,
        "significant": numerals.significant,
        "size": numerals.size,
        "value": numerals.value,
    }
    comparisons = compared(results)
    return environment.get_template("report.html").render(
        results=results,
        headline=headline(results, comparisons),
        tiles=_tiles(comparisons),
        series={variant.name: index for index, variant in enumerate(_distinct_names(results))},
        trade_offs=_trade_offs(results),
        ratio_figures=_ratio_figures(comparisons),
        widths=_widths(results.pruning),
        event_figures=_event_figures(results.pruning),
        environment=list(_flat(results.environment)),
        proofs=[(variant, list(_flat({"proof": variant.runtime.proof}))) for variant in results.variants],
        parities=[(variant, list(_flat(variant.parity))) for variant in results.variants if variant.parity],
        timed=[measurement for variant in results.variants for measurement in variant.measurements],
        quantity_names=QUANTITY_NAMES,
        p90_needs=SAMPLES_NEEDED[90.0],
    )


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
    """The measured facts in one sentence, of the first pruned variant that was timed at its smallest batch."""
    pruned = next((c for c in comparisons if c.variant.kind == "pruned"), None)
    if pruned is None:
        timed = any(variant.measurements for variant in results.variants)
        what = "timed, no pruned one against a baseline" if timed else "recorded, none timed"
        return f"{len(results.variants)} variants {what}."
    measurement, speedup = min(pruned.measurements, key=lambda pair: pair[0].batch_size)
    facts = [
        _change(pruned.baseline.macs / max(pruned.variant.macs, 1), "fewer MACs", "more MACs"),
        f"{_latency_change(speedup)} at batch {measurement.batch_size}",
    ]
    before, after = pruned.baseline.accuracy, pruned.variant.accuracy
    if before and after:
        facts.append(f"accuracy {before.top1_percent.value:.1f} → {after.top1_percent.value:.1f} %")
    for other in comparisons:
        if other.variant.kind == "pruned" and other.variant.artefact.precision != pruned.variant.artefact.precision:
            facts.append(_in_other_precision(other))
    # A line may break between the facts, not inside an interval or between a figure and its unit.
    return ", ".join(re.sub(r" (?=[\d%→])", "\N{NO-BREAK SPACE}", fact) for fact in facts) + "."


def _in_other_precision(comparison: Comparison) -> str:
    """What the pruned network gained over the same baseline in another precision, at the smallest batch."""
    _, speedup = min(comparison.measurements, key=lambda pair: pair[0].batch_size)
    accuracy = comparison.variant.accuracy
    at = f" at {accuracy.top1_percent.value:.1f} %" if accuracy else ""
    return f"in {comparison.variant.artefact.precision} {_latency_change(speedup)}{at}"


def _change(ratio: float, fewer: str, more: str) -> str:
    return f"{numerals.ratio(ratio)} {fewer}" if ratio >= 1 else f"{numerals.ratio(1 / ratio)} {more}"


def _latency_change(speedup: Speedup) -> str:
    if speedup.verdict == "unclear":
        return f"no clear change of latency, {numerals.ratio(speedup.value)} {numerals.ratio_interval(speedup)}"
    if speedup.verdict == "faster":
        return f"{numerals.ratio(speedup.value)} lower latency {numerals.ratio_interval(speedup)}"
    return f"{numerals.ratio(1 / speedup.value)} higher latency [{1 / speedup.high:.2f}, {1 / speedup.low:.2f}]"


def _tiles(comparisons: list[Comparison]) -> list[dict[str, str]]:
    """Before and after of the variant in the headline; `change` says what became of it."""
    pruned = next((c for c in comparisons if c.variant.kind == "pruned"), None)
    if pruned is None:
        return []
    before, after = pruned.baseline, pruned.variant
    tiles = [
        _tile("MACs", numerals.compact(before.macs), numerals.compact(after.macs), before.macs, after.macs),
        _tile(
            "Parameters",
            numerals.compact(before.parameters),
            numerals.compact(after.parameters),
            before.parameters,
            after.parameters,
        ),
        _tile(
            "File size",
            numerals.size(before.artefact.size_bytes),
            numerals.size(after.artefact.size_bytes),
            before.artefact.size_bytes,
            after.artefact.size_bytes,
        ),
    ]
    if before.accuracy and after.accuracy:
        old, new = before.accuracy.top1_percent, after.accuracy.top1_percent
        tiles.append(
            {
                "name": "Top-1 accuracy",
                "before": numerals.percent(old.value),
                "after": numerals.percent(new.value),
                "change": f"{new.value - old.value:+.1f} points on {new.samples:,} images".replace("-", "−"),
            }
        )
    measurement, speedup = min(pruned.measurements, key=lambda pair: pair[0].batch_size)
    dense = next((m for m in before.measurements if m.batch_size == measurement.batch_size), None)
    if dense:
        tiles.append(
            {
                "name": f"Latency, batch {measurement.batch_size}",
                "before": f"{numerals.value(dense.latency.median_ms)} ms",
                "after": f"{numerals.value(measurement.latency.median_ms)} ms",
                "change": f"{numerals.ratio(speedup.value)} {numerals.ratio_interval(speedup)} {speedup.verdict}",
            }
        )
    return tiles


def _tile(name: str, before: str, after: str, cost_before: int, cost_after: int) -> dict[str, str]:
    change = _change(cost_before / max(cost_after, 1), "less", "more")
    return {"name": name, "before": before, "after": after, "change": change}


def _distinct_names(results: Results) -> list[VariantResult]:
    return list({variant.name: variant for variant in results.variants}.values())


def _trade_offs(results: Results) -> list[dict[str, Any]]:
    """One accuracy-against-latency figure per runtime, device and batch size: no others compare."""
    order = {variant.name: index for index, variant in enumerate(_distinct_names(results))}
    panels: dict[tuple[str, str, int], list[plots.Point]] = {}
    for variant in results.variants:
        if variant.accuracy is None:
            continue
        for measurement in variant.measurements:
            point = plots.Point(
                order[variant.name],
                measurement.latency.median_ms,
                variant.accuracy.top1_percent,
            )
            key = (variant.runtime.name, variant.runtime.device, measurement.batch_size)
            panels.setdefault(key, []).append(point)
    return [
        _figure(
            f"Batch {batch}",
            f"{runtime}, {device}",
            plots.svg(
                plots.accuracy_against_latency(points),
                name=f"trade-off-{index}",
                description=f"Top-1 accuracy against median latency at batch {batch}",
            ),
        )
        for index, ((runtime, device, batch), points) in enumerate(panels.items())
    ]


def _ratio_figures(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    figures = []
    for index, comparison in enumerate(comparisons):
        before, after = comparison.baseline, comparison.variant
        bars = [
            plots.Bar("MACs", before.macs / max(after.macs, 1), None, measured=False),
            plots.Bar("parameters", before.parameters / max(after.parameters, 1), None, measured=False),
        ]
        for measurement, speedup in comparison.measurements:
            bars.append(plots.Bar(f"latency, batch {measurement.batch_size}", speedup.value, speedup, measured=True))
        drawing = plots.svg(
            plots.ratios(bars),
            name=f"ratios-{index}",
            description=f"How many times less MACs, parameters and latency {escape(after.name)} takes",
        )
        where = f"{after.runtime.name}, {after.runtime.device}, {after.artefact.precision}"
        figure = _figure(f"{after.name} against {before.name}", where, drawing)
        figures.append(figure | {"notes": _notes(comparison)})
    return figures


def _notes(comparison: Comparison) -> list[dict[str, str]]:
    """In percent of the dense network: the MACs that are left, and the time that they take."""
    macs_percent = 100 * comparison.variant.macs / max(comparison.baseline.macs, 1)
    return [
        {
            "batch": f"Batch {measurement.batch_size}",
            "macs": numerals.percent(macs_percent),
            "time": numerals.percent(100 / speedup.value),
            "interval": f"[{100 / speedup.high:.1f}, {100 / speedup.low:.1f}]",
        }
        for measurement, speedup in comparison.measurements
    ]


def _widths(pruning: Pruning | None) -> list[dict[str, Any]]:
    if pruning is None or not pruning.layers:
        return []
    widest = max(layer.width_before for layer in pruning.layers)
    return [
        {
            "name": layer.name,
            "before": layer.width_before,
            "after": layer.width_after,
            "before_percent": round(100 * layer.width_before / widest, 2),
            "after_percent": round(100 * layer.width_after / widest, 2),
        }
        for layer in pruning.layers
    ]


def _event_figures(pruning: Pruning | None) -> list[dict[str, Any]]:
    if pruning is None or not pruning.events:
        return []
    budget = pruning.budget
    quantity = QUANTITY_NAMES.get(budget.quantity, budget.quantity)
    losses = [(event.minibatch, event.loss) for event in pruning.events if event.loss is not None]
    figures = []
    if losses:
        minibatches, values = zip(*losses, strict=True)
        drawing = plots.svg(
            plots.over_events(minibatches, values, label="training loss"),
            name="event-loss",
            description="Training loss at every pruning event",
        )
        figures.append(_figure("Loss", "mean training loss since the event before", drawing))
    drawing = plots.svg(
        plots.over_events(
            [0] + [event.minibatch for event in pruning.events],
            [100.0] + [100 * event.cost / budget.dense_cost for event in pruning.events],
            label=f"{quantity} kept, %",
            goal_percent=100 * budget.requested_fraction,
        ),
        name="event-cost",
        description=f"{quantity} kept after every pruning event, in percent of the dense network",
    )
    figures.append(_figure("Cost", f"{quantity} kept, in percent of the dense network", drawing))
    return figures


def _figure(title: str, subtitle: str, drawing: str) -> dict[str, Any]:
    # matplotlib escapes the text it draws, and the drawing comes from nowhere else.
    return {"title": title, "subtitle": subtitle, "svg": Markup(drawing)}


def _flat(value: Any, path: str = "") -> "list[tuple[str, str]]":
    """Nested JSON as (dotted key, text) pairs; lists of plain values stand on one line."""
    if isinstance(value, dict):
        pairs = [_flat(inner, f"{path} · {key}" if path else str(key)) for key, inner in value.items()]
        return [pair for inner in pairs for pair in inner]
    if isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        pairs = [_flat(inner, f"{path} {index}") for index, inner in enumerate(value)]
        return [pair for inner in pairs for pair in inner]
    if isinstance(value, list):
        return [(path, ", ".join(map(str, value)) or "none")]
    if value is None:
        return [(path, "not known")]
    if isinstance(value, bool):
        return [(path, "yes" if value else "no")]
    return [(path, str(value))]
