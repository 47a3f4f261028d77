"""Figures of what a variant does under load, and of its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from benchmarks.harness import numerals
from benchmarks.harness.plots import (
    DASHES,
    SMALL,
    Palette,
    canvas,
    label_axes,
    legend,
    legend_px,
    marker,
    shortened,
    styled,
)
from benchmarks.harness.server import ServerResult
from benchmarks.harness.throughput import ThroughputPoint, ThroughputResult

DOTS = (0, (1, 1.6))


@dataclass(frozen=True)
class LayerPair:
    """One layer of the baseline and of a variant; None where one of the two has no layer of this name."""

    name: str
    baseline_ms: float | None
    variant_ms: float | None
    variant_limit_ms: float | None
    note: str
    """Such as "62 %, memory"."""


def latency_against_load(palette: Palette, servers: Sequence[tuple[str, int, ServerResult]]) -> Figure:
    """99th percentile and median over the offered load, the limit, and the highest rate that keeps it.

    Args:
        servers: (name, series, result) of each variant; a load whose queries were too few for a percentile has no mark.
    """
    names = [f"{shortened(name, 30)}: {_highest(server)}" for name, _, server in servers]
    with styled(palette):
        figure, axes = canvas(300 + legend_px([*names, "99th percentile", "median"]))
        axes.set_yscale("log")
        late = False
        for (_, series, server), label in zip(servers, names, strict=True):
            found = [(point.rate_per_s, point.p99_ms.value, point) for point in server.points if point.p99_ms]
            found.sort(key=lambda item: item[:2])
            judged = [item for item in found if item[2].valid]
            colour, sign = palette.colour(series), marker(series)
            rates, tails = [rate for rate, *_ in judged], [tail for _, tail, _ in judged]
            axes.plot(rates, tails, color=colour, linewidth=1.8, marker=sign, markersize=5, label=label)
            middles = [point.median_ms.value for *_, point in judged]
            axes.plot(rates, middles, color=colour, linewidth=1.4, linestyle=DOTS)
            for rate, tail, point in found:
                if not point.valid:
                    late = True
                    axes.plot(rate, tail, sign, color=colour, markerfacecolor=palette.paper, markersize=7, zorder=3)
                elif rate == server.rate_per_s:
                    axes.plot(rate, tail, sign, color=colour, markerfacecolor="none", markersize=12, zorder=4)
            if server.rate_per_s is not None:
                axes.axvline(server.rate_per_s, color=colour, linewidth=1, linestyle=DASHES)
        for limit_ms in sorted({server.limit_ms for _, _, server in servers}):
            axes.axhline(limit_ms, color=palette.alarm, linewidth=1.4)
            axes.annotate(
                f"limit {limit_ms:g} ms",
                (0, limit_ms),
                (4, 4),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                color=palette.alarm,
                fontsize=SMALL,
            )
        axes.set_xlim(left=0)
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        label_axes(axes, "offered load, queries a second", "latency, ms (logarithmic)")
        axes.plot([], [], color=palette.muted, linewidth=1.8, label="99th percentile")
        axes.plot([], [], color=palette.muted, linewidth=1.4, linestyle=DOTS, label="median")
        if late:
            axes.plot([], [], "o", color=palette.muted, markerfacecolor=palette.paper, label="harness late, not judged")
        legend(figure, axes)
        return figure


def throughput_against_batch(palette: Palette, result: ThroughputResult, series: int, highest_per_s: float) -> Figure:
    """Samples a second over the batch size, one line for each number of lanes, and the knee.

    Args:
        series: The variant's colour; numbers of lanes differ by line and marker.
        highest_per_s: Of all variants, so that their figures have one scale.
    """
    lanes = sorted({point.lanes for point in result.points})
    with styled(palette):
        figure, axes = canvas(268 + legend_px([_lanes(count) for count in lanes]))
        axes.set_xscale("log", base=2)
        for place, count in enumerate(lanes):
            points = sorted(
                (point for point in result.points if point.lanes == count), key=lambda point: point.batch_size
            )
            values = [point.throughput_per_s for point in points]
            colour = palette.colour(series) if place else palette.ink
            sign, line = marker(place), ("-", "--", ":", "-.")[place % 4]
            below = [value.value - value.low for value in values]
            above = [value.high - value.value for value in values]
            batches, rates = [point.batch_size for point in points], [value.value for value in values]
            axes.errorbar(batches, rates, [below, above], fmt="none", color=colour, elinewidth=1.4, capsize=3)
            axes.plot(batches, rates, line, color=colour, marker=sign, markersize=6, linewidth=1.8, label=_lanes(count))
        sizes = sorted({point.batch_size for point in result.points})
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
        axes.set_ylim(0, 1.3 * highest_per_s)
        if result.knee is not None:
            _mark_knee(axes, palette, result.points[result.knee], sizes)
        label_axes(axes, "batch size (logarithmic)", "samples a second")
        legend(figure, axes)
        return figure


def layer_times(palette: Palette, layers: Sequence[LayerPair], baseline: str, variant: str, series: int) -> Figure:
    """Time of each layer, baseline above variant; a line in the variant's bar is the least that the machine allows."""
    paired = any(layer.baseline_ms is not None for layer in layers)
    with styled(palette):
        figure, axes = canvas(96 + (42 if paired else 32) * len(layers))
        height = 0.22 if paired else 0.3
        longest = max(time for layer in layers for time in (layer.baseline_ms or 0, layer.variant_ms or 0))
        for place, layer in enumerate(layers):
            below = place + (0.12 + height if paired else 0.16)
            if layer.baseline_ms is not None:
                axes.barh(place + 0.1, layer.baseline_ms, height, color=palette.colour(0))
            if layer.variant_ms is not None:
                axes.barh(below, layer.variant_ms, height, color=palette.colour(series))
            if layer.variant_limit_ms is not None:
                edges = [below - height / 2, below + height / 2]
                axes.plot([layer.variant_limit_ms] * 2, edges, color=palette.ink, linewidth=2.2, solid_capstyle="butt")
            above: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "bottom"}
            axes.annotate(shortened(layer.name, 40), (0, place - 0.03), (0, 0), fontsize=SMALL, **above)
            axes.annotate(
                layer.note, (1, place - 0.03), (0, 0), ha="right", fontsize=SMALL, color=palette.muted, **above
            )
        axes.set_xlim(0, 1.04 * longest or 1)
        axes.set_ylim(len(layers) - 0.2, -0.55)
        label_axes(axes, "time of the layer, ms", "")
        axes.set_yticks([])
        axes.grid(visible=False, axis="y")
        handles: list[Patch | Line2D] = [Patch(color=palette.colour(series), label=shortened(variant, 40))]
        if paired:
            handles.insert(0, Patch(color=palette.colour(0), label=shortened(baseline, 40)))
        if any(layer.variant_limit_ms is not None for layer in layers):
            handles.append(Line2D([], [], color=palette.ink, linewidth=2.2, label="least time on this machine"))
        figure.legend(handles=handles, loc="outside lower left", ncols=1 if len(variant) > 14 else len(handles))
        return figure


def bill(
    palette: Palette,
    steps: Sequence[tuple[str, float]],
    *,
    baseline_ms: float,
    expected_ms: float,
    measured_ms: float,
) -> Figure:
    """From the baseline's time to what was to be expected, then reason by reason to what was measured."""
    rows = [("baseline", 0.0, baseline_ms, palette.colour(0)), ("expected", 0.0, expected_ms, palette.muted)]
    reached = expected_ms
    for label, ms in steps:
        rows.append((label, reached, ms, palette.alarm if ms >= 0 else palette.colour(1)))
        reached += ms
    rows.append(("measured", 0.0, measured_ms, palette.ink))
    with styled(palette):
        figure, axes = canvas(64 + 34 * len(rows))
        for place, (label, start, ms, colour) in enumerate(rows):
            axes.barh(place + 0.2, ms, 0.36, left=start, color=colour)
            above: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": SMALL}
            axes.annotate(label, (0, place - 0.08), (0, 0), **above)
            sign = "" if start == 0 and label in ("baseline", "expected", "measured") else "+" if ms >= 0 else "−"
            text = f"{sign}{numerals.significant(abs(ms))} ms"
            axes.annotate(text, (1, place - 0.08), (0, 0), ha="right", color=palette.muted, **above)
        axes.set_xlim(0, 1.03 * max(max(start, start + ms) for _, start, ms, _ in rows))
        axes.set_ylim(len(rows) - 0.45, -0.6)
        label_axes(axes, "ms of one inference", "")
        axes.set_yticks([])
        return figure


def _mark_knee(axes: Axes, palette: Palette, knee: ThroughputPoint, sizes: Sequence[int]) -> None:
    height = knee.throughput_per_s.value
    axes.plot(knee.batch_size, height, "o", color=palette.ink, markerfacecolor="none", markersize=15, zorder=4)
    words = (
        f"knee: batch {knee.batch_size}, {_lanes(knee.lanes)}: {numerals.significant(height)}/s at "
        f"{numerals.value(knee.median_ms)} ms"
    )
    right = knee.batch_size**2 >= sizes[0] * sizes[-1]  # towards the middle, where there is room
    axes.annotate(
        words,
        (knee.batch_size, height),
        (0.98 if right else 0.02, 0.985),
        textcoords="axes fraction",
        ha="right" if right else "left",
        va="top",
        fontsize=SMALL,
        arrowprops={"arrowstyle": "-", "color": palette.muted, "shrinkB": 9, "linewidth": 1},
    )


def _highest(server: ServerResult) -> str:
    if server.rate_per_s is not None:
        return f"{numerals.significant(server.rate_per_s)}/s"
    return "no rate keeps the limit" if server.stopped_by == "limit" else "no rate found"


def _lanes(count: int) -> str:
    return "1 lane" if count == 1 else f"{count} lanes"
