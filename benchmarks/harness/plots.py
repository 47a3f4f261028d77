"""How the report's figures look, and how one becomes part of a page or a file.

A figure is drawn once for each palette. On the page colours are CSS variables, so that one drawing serves the light and
the dark page; in a file they are those of the light page. Every figure is drawn for about 440 px, and so stays readable
on a phone.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchmarks.harness import numerals
from benchmarks.harness.statistics import Estimate

WIDTH_PX = 440
MARKERS = "oDs^vPX"
SMALL = 10
DASHES = (0, (4, 3))
FILE_DPI = 200


@dataclass(frozen=True)
class Palette:
    """The colours of a figure; `series` belongs to the variants, the first of them to the baseline."""

    ink: str
    muted: str
    grid: str
    paper: str
    alarm: str
    series: tuple[str, ...]

    def colour(self, series: int) -> str:
        return self.series[series % len(self.series)]

    def variables(self) -> dict[str, str]:
        """The page's CSS variable of each colour."""
        named = {f"--{name}": getattr(self, name) for name in ("ink", "muted", "grid", "paper", "alarm")}
        return named | {f"--series-{index}": colour for index, colour in enumerate(self.series)}


# Told apart by people with any of the common colour deficiencies (after Okabe and Ito 2008, "Color universal design"),
# grey for the baseline; markers tell the series apart as well.
WHITE = Palette(
    ink="#1b211d",
    muted="#5f6b63",
    grid="#dfe4df",
    paper="#ffffff",
    alarm="#b3261e",
    series=("#717c75", "#007f5c", "#0072b2", "#d55e00", "#b0508f", "#a87700", "#3796cc"),
)
DARK = Palette(
    ink="#e8ece9",
    muted="#9aa69e",
    grid="#323a35",
    paper="#1a1f1c",
    alarm="#f2857d",
    series=("#96a29a", "#3fc498", "#5eb0f2", "#f08b4f", "#e08fc6", "#dcb23a", "#9ad4fa"),
)

# matplotlib wants real colours: `svg` exchanges these for the page's CSS variables.
PAGE = Palette(
    ink="#010203",
    muted="#040506",
    grid="#070809",
    paper="#0a0b0c",
    alarm="#0d0e0f",
    series=tuple(f"#1000{index:02x}" for index in range(1, len(WHITE.series) + 1)),
)


@dataclass(frozen=True)
class Drawing:
    """One figure of the report, not drawn yet."""

    name: str
    """Unique on the page and stable: `accuracy_latency_batch1`. Files are called by it."""
    section: str
    """What it shows, such as "Speedup"; the page has it as a heading above."""
    title: str
    """What tells it from others of the section, such as "Batch 1"."""
    subtitle: str
    description: str
    """For those who cannot see it."""
    draw: Callable[[Palette], Figure]

    def svg(self) -> str:
        """As an element of the page: themed, described for screen readers, its ids prefixed with the name."""
        text = _svg_text(self.draw(PAGE), PAGE)
        drawing = text[text.index("<svg") :]
        drawing = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[\d.]+pt"| version="1.1"', "", drawing)
        drawing = re.sub(r'\bid="', f'id="{self.name}-', drawing)
        drawing = re.sub(r'(url\(|href=")#', rf"\1#{self.name}-", drawing)
        for variable, colour in PAGE.variables().items():
            drawing = drawing.replace(colour, f"var({variable})")
        return drawing.replace("<svg", f'<svg role="img" aria-label="{escape(self.description)}"', 1)

    def write(self, directory: Path) -> list[Path]:
        """As `NAME.svg` and `NAME.png` on white, with its title."""
        vector, raster = directory / f"{self.name}.svg", directory / f"{self.name}.png"
        figure = self.draw(WHITE)
        figure.set_facecolor(WHITE.paper)
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
        title = self.title if self.title == self.section else f"{self.section}: {self.title}"
        with styled(WHITE):
            figure.suptitle(shortened(title, 58), fontsize=12, color=WHITE.ink, x=0.02, ha="left")
        vector.write_text(_svg_text(figure, WHITE), encoding="utf-8")
        with styled(WHITE):
            figure.savefig(raster, dpi=FILE_DPI, metadata={"Software": None})
        return [vector, raster]


def styled(palette: Palette) -> Any:
    """The report's look, for as long as the context lasts; matplotlib reads it while artists are made."""
    style: Any = {  # the type that matplotlib asks for is a literal of its 300 keys
        "svg.fonttype": "none",
        "svg.hashsalt": "espalier",
        "text.parse_math": False,
        "font.size": 11,
        "text.color": palette.ink,
        "axes.labelcolor": palette.muted,
        "xtick.color": palette.grid,
        "ytick.color": palette.grid,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "axes.edgecolor": palette.grid,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.grid,
        "grid.linewidth": 0.8,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "legend.frameon": False,
        "legend.fontsize": SMALL,
        "legend.labelcolor": palette.ink,
    }
    return mpl.rc_context(style)


def canvas(height_px: float) -> tuple[Figure, Axes]:
    """An empty figure of the common width, and its axes."""
    # At matplotlib's 72 units per inch of SVG, one unit is one pixel at the figure's natural size.
    figure = Figure(figsize=(WIDTH_PX / 72, height_px / 72), dpi=72, layout="constrained")
    return figure, figure.add_subplot()


def label_axes(axes: Axes, below: str, beside: str) -> None:
    """What the axes show, with a few round numbers each."""
    axes.set_xlabel(below)
    axes.set_ylabel(beside)
    axes.tick_params(which="both", length=0)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "linear":
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(FuncFormatter(_thousands))


def legend(figure: Figure, axes: Axes) -> None:
    """Below the axes, where it covers no data; as many columns as the names allow."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, names, loc="outside lower left", ncols=_columns(names), handlelength=1.8, columnspacing=1.4
        )


def legend_px(names: Sequence[str]) -> int:
    """Height that `legend` needs for such names."""
    return 17 * -(-len(names) // _columns(names))


def marker(series: int) -> str:
    """The marker of a series; with its colour it does not repeat within 49 series."""
    return MARKERS[(series + series // len(MARKERS)) % len(MARKERS)]


def whiskers(estimate: Estimate) -> list[list[float]]:
    """The interval as matplotlib's error bars want it."""
    return [[estimate.value - estimate.low], [estimate.high - estimate.value]]


def shortened(name: str, characters: int) -> str:
    """A long name without its middle."""
    if len(name) <= characters:
        return name
    tail = characters * 2 // 3
    return f"{name[: characters - tail - 1]}…{name[-tail:]}"


def _columns(names: Sequence[str]) -> int:
    """As many as fit side by side: a letter takes about 6.2 px, the mark and the gaps 44 px."""
    return max(1, min(len(names), int(WIDTH_PX // (6.2 * max(map(len, names), default=1) + 44))))


def _thousands(number: float, _: int) -> str:
    return numerals.compact(number) if number >= 1e5 else f"{round(number, 6):,g}"


def _svg_text(figure: Figure, palette: Palette) -> str:
    text = io.StringIO()
    with styled(palette):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue()
