"""Figures of latency: against accuracy, against the baseline, against the multiply-adds saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

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
    whiskers,
)
from benchmarks.harness.report_names import spread_percent
from benchmarks.harness.statistics import Estimate, Speedup


@dataclass(frozen=True)
class TradeOff:
    """One variant at one batch size; `series` selects its colour and marker."""

    name: str
    series: int
    latency_ms: Estimate
    top1_percent: Estimate


@dataclass(frozen=True)
class Ratio:
    """One variant at one batch size against the baseline. `macs_ratio`: how many times fewer MACs, if known."""

    name: str
    series: int
    batch_size: int
    speedup: Speedup
    macs_ratio: float | None


def accuracy_against_latency(palette: Palette, points: Sequence[TradeOff], name: str) -> Figure:
    """Accuracy, called `name`, over median latency, each with its 95 % interval."""
    with styled(palette):
        figure, axes = canvas(270 + legend_px([point.name for point in points]))
        for point in points:
            axes.errorbar(
                point.latency_ms.value,
                point.top1_percent.value,
                xerr=whiskers(point.latency_ms),
                yerr=whiskers(point.top1_percent),
                fmt=marker(point.series),
                color=palette.colour(point.series),
                markersize=8,
                elinewidth=1.6,
                capsize=3,
            )
            _name(axes, palette, point.series, point.name)
        axes.set_xlim(left=0, right=1.12 * max(point.latency_ms.high for point in points))
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.12 * (high - low), min(high + 0.12 * (high - low), 100.4))
        label_axes(axes, "median latency per query, ms", f"{name}, %")
        legend(figure, axes)
        return figure


def speedups(palette: Palette, ratios: Sequence[Ratio], spread: float | None) -> Figure:
    """Each ratio with its interval beside 1, what the clock cannot tell from 1, and the MACs ratio where known.

    Args:
        spread: Ratio of the baseline to itself up to which nothing is claimed.
    """
    counted = any(ratio.macs_ratio is not None for ratio in ratios)
    band = "" if spread is None else f"baseline against itself, up to {spread_percent(spread)}"
    names = ["baseline", *([band] if band else []), *(["fewer MACs, counted"] if counted else [])]
    with styled(palette):
        figure, axes = canvas(58 + 46 * len(ratios) + legend_px(names))
        for place, ratio in enumerate(ratios):
            if spread is not None:
                own = [place - 0.2, place + 0.3]
                axes.fill_betweenx(own, 1 / spread, spread, color=palette.muted, alpha=0.25, linewidth=0)
            axes.plot([1, 1], [place - 0.2, place + 0.3], color=palette.muted, linewidth=1.2, linestyle=(0, (3, 2)))
            axes.errorbar(
                ratio.speedup.value,
                place + 0.05,
                xerr=whiskers(ratio.speedup),
                fmt=marker(ratio.series),
                color=palette.colour(ratio.series),
                markersize=8,
                elinewidth=2,
                capsize=4,
                zorder=3,
            )
            if ratio.macs_ratio is not None:
                axes.plot(ratio.macs_ratio, place + 0.05, "d", color=palette.ink, markerfacecolor="none", markersize=8)
            above: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": SMALL}
            axes.annotate(shortened(ratio.name, 36), (0, place - 0.26), (0, 0), ha="left", **above)
            text = f"{numerals.ratio(ratio.speedup.value)} {numerals.ratio_interval(ratio.speedup)}"
            axes.annotate(text, (1, place - 0.26), (0, 0), ha="right", **above)
        ends = [end for ratio in ratios for end in (ratio.speedup.low, ratio.speedup.high, ratio.macs_ratio or 1.0)]
        low, high = min(*ends, 1 / (spread or 1)), max(*ends, spread or 1)
        margin = 0.06 * max(high - low, 0.1)
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(len(ratios) - 0.55, -0.62)
        label_axes(axes, "times as fast as the baseline (right is better)", "")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 4):g}×"))
        axes.plot([], [], color=palette.muted, linewidth=1.2, linestyle=(0, (3, 2)), label="baseline")
        if band:
            axes.fill_between([], [], [], color=palette.muted, alpha=0.25, linewidth=0, label=band)
        if counted:
            axes.plot([], [], "d", color=palette.ink, markerfacecolor="none", markersize=8, label="fewer MACs, counted")
        legend(figure, axes)
        return figure


def macs_against_latency(palette: Palette, ratios: Sequence[Ratio]) -> Figure:
    """How much faster over how many MACs less; on the diagonal every multiply-add saved became time saved."""
    known = [(ratio, ratio.macs_ratio) for ratio in ratios if ratio.macs_ratio is not None]
    names = list(dict.fromkeys(ratio.name for ratio, _ in known))
    with styled(palette):
        figure, axes = canvas(330 + legend_px([*names, "baseline"]))
        top = 1.18 * max(1.0, *(value for ratio, macs in known for value in (macs, ratio.speedup.high)))
        axes.fill_between([0, top], [0, top], color=palette.muted, alpha=0.09, linewidth=0)
        axes.plot([0, top], [0, top], color=palette.muted, linewidth=1.2, linestyle=DASHES)
        axes.plot(1, 1, "o", color=palette.colour(0), markerfacecolor="none", markersize=8, label="baseline")
        for ratio, macs in known:
            axes.errorbar(
                macs,
                ratio.speedup.value,
                yerr=whiskers(ratio.speedup),
                fmt=marker(ratio.series),
                color=palette.colour(ratio.series),
                markersize=8,
                elinewidth=1.6,
                capsize=3,
            )
        for series, name in {ratio.series: ratio.name for ratio, _ in known}.items():
            _name(axes, palette, series, name)
        places = _apart([ratio.speedup.value for ratio, _ in known], [macs for _, macs in known], least=0.055 * top)
        for (ratio, macs), place in zip(known, places, strict=True):
            axes.annotate(
                f"batch {ratio.batch_size}",
                (macs, place),
                (9, 0),
                textcoords="offset points",
                va="center",
                fontsize=SMALL,
                color=palette.muted,
            )
        inside: Any = {"xycoords": "axes fraction", "fontsize": SMALL, "color": palette.muted}
        axes.annotate("below: MACs that bought no speed", (0.98, 0.03), ha="right", va="bottom", **inside)
        axes.annotate("above: faster than the MACs alone explain", (0.02, 0.98), ha="left", va="top", **inside)
        axes.set(xlim=(0, top), ylim=(0, top))
        label_axes(axes, "times fewer MACs", "times as fast")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 4):g}×"))
        legend(figure, axes)
        return figure


def _name(axes: Axes, palette: Palette, series: int, name: str) -> None:
    """An entry of the legend without the whiskers, which would hide the mark."""
    axes.plot([], [], marker(series), color=palette.colour(series), markersize=8, label=shortened(name, 44))


def _apart(heights: Sequence[float], places: Sequence[float], *, least: float) -> list[float]:
    """Heights of labels, moved up where two at about the same place would cover each other."""
    moved = list(heights)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    for position, index in enumerate(order):
        for other in order[:position]:
            near = abs(places[index] - places[other]) < 4 * least
            if near and moved[index] - moved[other] < least:
                moved[index] = moved[other] + least
    return moved


def over_events(
    palette: Palette,
    minibatches: Sequence[int],
    values: Sequence[float],
    *,
    label: str,
    goal_percent: float | None = None,
) -> Figure:
    """A quantity at every pruning event, and what was asked for as a dashed line."""
    with styled(palette):
        figure, axes = canvas(230)
        sign = "o" if len(values) <= 40 else ""
        axes.plot(minibatches, values, color=palette.colour(1), linewidth=1.8, marker=sign, markersize=4)
        axes.set_ylim(bottom=0, top=1.12 * max(*values, goal_percent or 0, 1e-9))
        if goal_percent is not None:
            axes.axhline(goal_percent, color=palette.muted, linewidth=1.2, linestyle=DASHES)
            axes.annotate(
                f"requested {numerals.significant(goal_percent)} %",
                (0, goal_percent),
                (4, -5),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="top",
                color=palette.muted,
                fontsize=SMALL,
            )
        label_axes(axes, "minibatch", label)
        return figure


def channel_widths(palette: Palette, layers: Sequence[tuple[str, int, int]]) -> Figure:
    """Output channels of every layer, before and after; (name, before, after), in the network's order."""
    with styled(palette):
        figure, axes = canvas(90 + 15 * len(layers))
        places = range(len(layers))
        axes.barh(places, [before for _, before, _ in layers], height=0.66, color=palette.grid)
        axes.barh(places, [after for _, _, after in layers], height=0.66, color=palette.colour(1))
        for place, (_, before, after) in zip(places, layers, strict=True):
            axes.annotate(
                f"{before} → {after}", (before, place), (5, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(places, [shortened(name, 30) for name, _, _ in layers], fontsize=8)
        axes.tick_params(axis="y", labelcolor=palette.ink, length=0)
        axes.set_ylim(len(layers) - 0.3, -0.7)
        axes.set_xlim(0, 1.22 * max(before for _, before, _ in layers))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("output channels")
        axes.tick_params(axis="x", length=0)
        figure.legend(
            handles=[
                Line2D([], [], color=palette.colour(1), linewidth=6, label="kept"),
                Line2D([], [], color=palette.grid, linewidth=6, label="removed"),
            ],
            loc="outside lower left",
            ncols=2,
        )
        return figure
