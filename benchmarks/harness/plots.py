"""The report's figures, drawn by matplotlib and returned as SVG to stand inside a page.

Colours are written as CSS variables, so that one drawing serves the light and the dark page; text stays text, in the
page's own font. Every figure is drawn for about 440 px and so stays readable on a phone.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.harness import numerals
from benchmarks.harness.statistics import Estimate

# Stand-ins for the page's CSS variables: matplotlib wants real colours, `svg` exchanges them.
INK, MUTED, GRID, PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
SERIES = ("#100001", "#100002", "#100003", "#100004", "#100005", "#100006")
MARKERS = "oDs^vP"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES)
}
_STYLE: Any = {  # the type that matplotlib asks for is a literal of its 300 keys
    "svg.fonttype": "none",
    "svg.hashsalt": "espalier",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_WIDTH_PX = 440


@dataclass(frozen=True)
class Point:
    """One variant in the accuracy-against-latency plot; `series` selects its colour and marker."""

    series: int
    latency_ms: Estimate
    top1_percent: Estimate


@dataclass(frozen=True)
class Bar:
    """One ratio to the dense network; `measured` tells what a clock gave from what was counted."""

    label: str
    ratio: float
    interval: Estimate | None
    measured: bool


def accuracy_against_latency(points: Sequence[Point]) -> Figure:
    """Top-1 accuracy over median latency, each with its 95 % interval."""
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(290)
        for point in points:
            axes.errorbar(
                point.latency_ms.value,
                point.top1_percent.value,
                xerr=_whiskers(point.latency_ms),
                yerr=_whiskers(point.top1_percent),
                fmt=MARKERS[point.series % len(MARKERS)],
                color=_colour(point.series),
                markersize=8,
                elinewidth=1.6,
                capsize=3,
            )
        axes.set_xlim(left=0, right=1.12 * max(point.latency_ms.high for point in points))
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.12 * (high - low), min(high + 0.12 * (high - low), 100.4))
        _labels(axes, "median latency per query, ms", "top-1 accuracy, %")
        return figure


def ratios(bars: Sequence[Bar]) -> Figure:
    """Horizontal bars: how many times less of each quantity, counted beside measured."""
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(64 + 34 * len(bars))
        places = range(len(bars))
        tops = [max(bar.ratio, bar.interval.high if bar.interval else 0) for bar in bars]
        for place, bar, top in zip(places, bars, tops, strict=True):
            axes.barh(place, bar.ratio, height=0.56, color=_colour(1) if bar.measured else _colour(0))
            if bar.interval:
                axes.errorbar(bar.ratio, place, xerr=_whiskers(bar.interval), color=INK, elinewidth=1.4, capsize=3)
            text = numerals.ratio(bar.ratio)
            if bar.interval:
                text += f" {numerals.ratio_interval(bar.interval)}"
            axes.annotate(text, (top, place), (7, 0), textcoords="offset points", va="center", fontsize=10.5)
        axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(places, [bar.label for bar in bars])
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.75 * max(*tops, 1.0))
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        _labels(axes, "times less than dense", "")
        return figure


def over_events(
    minibatches: Sequence[int], values: Sequence[float], *, label: str, goal_percent: float | None = None
) -> Figure:
    """A quantity at every pruning event, and what was asked for as a dashed line."""
    with mpl.rc_context(_STYLE):
        figure, axes = _canvas(230)
        marker = "o" if len(values) <= 40 else ""
        axes.plot(minibatches, values, color=_colour(1), linewidth=1.8, marker=marker, markersize=4)
        axes.set_ylim(bottom=0, top=1.12 * max(*values, goal_percent or 0, 1e-9))
        if goal_percent is not None:
            axes.axhline(goal_percent, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(
                f"requested {numerals.significant(goal_percent)} %",
                (0, goal_percent),
                (4, -5),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="top",
                color=MUTED,
                fontsize=10,
            )
        _labels(axes, "minibatch", label)
        return figure


def svg(figure: Figure, *, name: str, description: str) -> str:
    """The figure as an inline SVG element: themed, described for screen readers, its ids prefixed with `name`."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with mpl.rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata=nothing)
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[\d.]+pt"| version="1.1"', "", drawing)
    drawing = re.sub(r'\bid="', f'id="{name}-', drawing)
    drawing = re.sub(r'(url\(|href=")#', rf"\1#{name}-", drawing)
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, f"var({variable})")
    return drawing.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def _canvas(height_px: float) -> tuple[Figure, Axes]:
    # At matplotlib's 72 units per inch of SVG, one unit is one pixel at the figure's natural size.
    figure = Figure(figsize=(_WIDTH_PX / 72, height_px / 72), dpi=72, layout="constrained")
    return figure, figure.add_subplot()


def _labels(axes: Axes, below: str, beside: str) -> None:
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(length=0)
    if beside:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))


def _whiskers(estimate: Estimate) -> list[list[float]]:
    return [[estimate.value - estimate.low], [estimate.high - estimate.value]]


def _colour(series: int) -> str:
    return SERIES[series % len(SERIES)]
