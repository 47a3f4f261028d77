"""Which figures a document gives: the same for the page and for files."""

from collections.abc import Sequence
from functools import partial

from benchmarks.harness import plots_latency, plots_load
from benchmarks.harness.plots import Drawing
from benchmarks.harness.ratios import spread_of
from benchmarks.harness.report_explanations import explanation_drawings
from benchmarks.harness.report_layers import layer_drawings
from benchmarks.harness.report_names import (
    QUANTITY_NAMES,
    accuracy_name,
    metric_of,
    names_of,
    series_of,
    slug,
    slugs_of,
    spreads,
)
from benchmarks.harness.report_words import compared
from benchmarks.harness.results import Pruning, Results


def drawings(results: Results) -> dict[str, list[Drawing]]:
    """Section -> its figures; a section without data has none."""
    return {
        "speedups": _speedups(results),
        "macs": _macs(results),
        "accuracy": _trade_offs(results),
        "server": _servers(results),
        "throughput": _throughputs(results),
        "explanations": explanation_drawings(results),
        "layers": layer_drawings(results),
        "widths": _widths(results.pruning),
        "events": _events(results.pruning),
    }


def _speedups(results: Results) -> list[Drawing]:
    found = []
    same = spreads(results)
    ratios = _ratios(results)
    for size in sorted({ratio.batch_size for ratio in ratios}):
        own = [ratio for ratio in ratios if ratio.batch_size == size]
        spread = spread_of(same[size]) if size in same else None
        found.append(
            Drawing(
                name=f"speedup_batch{size}",
                section="Speedup",
                title=f"Batch {size}",
                subtitle=_where(results),
                description=f"Speedup of each variant over the baseline at batch {size}, with 95 % intervals",
                draw=partial(plots_latency.speedups, ratios=own, spread=spread),
            )
        )
    return found


def _macs(results: Results) -> list[Drawing]:
    ratios = [ratio for ratio in _ratios(results) if ratio.macs_ratio is not None]
    if not ratios:
        return []
    return [
        Drawing(
            name="macs_latency",
            section="Work saved, and time saved",
            title="MACs against latency",
            subtitle="on the diagonal, all of the work saved became time saved",
            description="How many times as fast each variant is over how many times fewer MACs it has",
            draw=partial(plots_latency.macs_against_latency, ratios=ratios),
        )
    ]


def _ratios(results: Results) -> list[plots_latency.Ratio]:
    names, series = names_of(results), series_of(results)
    return [
        plots_latency.Ratio(
            names[id(comparison.variant)],
            series[id(comparison.variant)],
            measurement.batch_size,
            speedup,
            comparison.macs_ratio,
        )
        for comparison in compared(results)
        for measurement, speedup in comparison.measurements
    ]


def _trade_offs(results: Results) -> list[Drawing]:
    """One for each device and batch size: no others compare."""
    names, series = names_of(results), series_of(results)
    metric = accuracy_name(metric_of(results))
    panels: dict[tuple[str, int], list[plots_latency.TradeOff]] = {}
    for variant in results.variants:
        if variant.accuracy is None:
            continue
        for measurement in variant.measurements:
            point = plots_latency.TradeOff(
                names[id(variant)], series[id(variant)], measurement.latency.median_ms, variant.accuracy.top1_percent
            )
            panels.setdefault((variant.runtime.device, measurement.batch_size), []).append(point)
    several = len({device for device, _ in panels}) > 1
    return [
        Drawing(
            name=f"accuracy_latency_batch{size}" + (f"_{slug(device)}" if several else ""),
            section="Accuracy against latency",
            title=f"Batch {size}",
            subtitle=device if several else _where(results),
            description=f"{metric[:1].upper()}{metric[1:]} against median latency at batch {size}",
            draw=partial(plots_latency.accuracy_against_latency, points=points, name=metric),
        )
        for (device, size), points in panels.items()
    ]


def _servers(results: Results) -> list[Drawing]:
    names, series = names_of(results), series_of(results)
    found = [
        (names[id(variant)], series[id(variant)], variant.server)
        for variant in results.variants
        if variant.server and any(point.p99_ms for point in variant.server.points)
    ]
    if not found:
        return []
    lanes = sorted({server.lanes for *_, server in found})
    sizes = sorted({server.batch_size for *_, server in found})
    return [
        Drawing(
            name="latency_load",
            section="Latency against offered load",
            title="99th percentile and median",
            subtitle=f"Server, queries of batch {_either(sizes)}, lanes: {_either(lanes)}; rings: highest rate",
            description="99th percentile and median of latency over the queries offered a second, with the limit",
            draw=partial(plots_load.latency_against_load, servers=found),
        )
    ]


def _throughputs(results: Results) -> list[Drawing]:
    names, series, slugs = names_of(results), series_of(results), slugs_of(results)
    found = [(variant, variant.throughput) for variant in results.variants if variant.throughput]
    found = [(variant, result) for variant, result in found if result.points]
    highest = max(
        (point.throughput_per_s.high for _, result in found for point in result.points),
        default=0.0,
    )
    return [
        Drawing(
            name=f"throughput_{slugs[id(variant)]}",
            section="Throughput",
            title=names[id(variant)],
            subtitle="ring: 95 % of the highest throughput at the lowest latency",
            description=f"Samples a second of {names[id(variant)]} over the batch size, by the number of lanes",
            draw=partial(
                plots_load.throughput_against_batch,
                result=result,
                series=series[id(variant)],
                highest_per_s=highest,
            ),
        )
        for variant, result in found
    ]


def _widths(pruning: Pruning | None) -> list[Drawing]:
    if pruning is None or not pruning.layers:
        return []
    layers = [(layer.name, layer.width_before, layer.width_after) for layer in pruning.layers]
    return [
        Drawing(
            name="channel_widths",
            section="Channel widths",
            title="Channel widths",
            subtitle="output channels of every layer",
            description="Output channels of every layer, dense and after pruning",
            draw=partial(plots_latency.channel_widths, layers=layers),
        )
    ]


def _events(pruning: Pruning | None) -> list[Drawing]:
    if pruning is None or not pruning.events:
        return []
    budget = pruning.budget
    quantity = QUANTITY_NAMES.get(budget.quantity, budget.quantity)
    losses = [(event.minibatch, event.loss) for event in pruning.events if event.loss is not None]
    found = []
    if losses:
        minibatches, values = zip(*losses, strict=True)
        found.append(
            Drawing(
                name="event_loss",
                section="Pruning events",
                title="Loss",
                subtitle="mean training loss since the event before",
                description="Training loss at every pruning event",
                draw=partial(plots_latency.over_events, minibatches=minibatches, values=values, label="training loss"),
            )
        )
    found.append(
        Drawing(
            name="event_cost",
            section="Pruning events",
            title="Cost",
            subtitle=f"{quantity} kept, in percent of the dense network",
            description=f"{quantity} kept after every pruning event, in percent of the dense network",
            draw=partial(
                plots_latency.over_events,
                minibatches=[0] + [event.minibatch for event in pruning.events],
                values=[100.0] + [100 * event.cost / budget.dense_cost for event in pruning.events],
                label=f"{quantity} kept, %",
                goal_percent=100 * budget.requested_fraction,
            ),
        )
    )
    return found


def _where(results: Results) -> str:
    """Runtime and device, where all variants share them."""
    runtimes = {variant.runtime.name for variant in results.variants if variant.measurements}
    devices = {variant.runtime.device for variant in results.variants if variant.measurements}
    return ", ".join(next(iter(found)) for found in (runtimes, devices) if len(found) == 1)


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
