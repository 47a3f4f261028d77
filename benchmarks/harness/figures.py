"""The look that all figures outside the report share: studies and correlations, drawn as PNG on white."""

from collections.abc import Iterable
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Told apart by people with any of the common colour deficiencies: Okabe and Ito 2008, "Color universal design",
# without the yellow, which is too pale for a line on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_GRID = "#dddddd"


def figure(rows: int, columns: int, *, width_in: float = 8.0, height_in: float = 3.6) -> tuple[Figure, NDArray[Any]]:
    """An empty figure and its axes, always as a (rows, columns) array; sizes of the whole figure in inches.

    Made without pyplot, which would keep every figure alive and wants a display.
    """
    drawing = Figure(figsize=(width_in, height_in), layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(visible=True, color=_GRID, linewidth=0.8)
        panel.set_axisbelow(True)
    return drawing, axes


def colour(index: int) -> str:
    """The colour of series `index`; they repeat after the last."""
    return COLOURS[index % len(COLOURS)]


def legend(drawing: Figure, panels: Iterable[Axes], *, columns: int) -> None:
    """One legend below all panels, where it covers no data: every label of `panels` once, in order of appearance."""
    entries: dict[str, Artist] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(str(label), handle)
    drawing.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)
