"""The figures of `scale_invariance`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.harness import figures
from benchmarks.studies.scale_experiment import EPOCHS, LAMBDAS, SPARSITIES, SUBSET
from benchmarks.studies.two_layer import CRITERIA


def rescaled_figure(rescaled: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over sparsity; rows: weights, units; columns: λ."""
    drawing, axes = figures.figure(2, len(LAMBDAS), width_in=10, height_in=6)
    for row, kind in enumerate(("weights", "units")):
        for column, scale in enumerate(LAMBDAS):
            _accuracy_panel(axes[row, column], [seed[f"{scale:g}"][kind] for seed in rescaled])
            axes[row, column].set_title(f"{kind}, λ = {scale:g}")
            axes[row, column].set_xlabel(f"sparsity of {kind}, %")
        axes[row, 0].set_ylabel("test accuracy, %")
    figures.legend(drawing, axes.flat, columns=len(CRITERIA))
    return drawing


def trained_figure(trained: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Accuracy over sparsity of weights after training from a scaled start; columns: λ."""
    drawing, axes = figures.figure(1, len(LAMBDAS), width_in=10, height_in=3.6)
    for panel, (scale, seeds) in zip(axes.flat, trained.items(), strict=True):
        _accuracy_panel(panel, [seed["weights"] for seed in seeds])
        panel.set_title(f"trained from λ = {scale}")
        panel.set_xlabel("sparsity of weights, %")
    axes[0, 0].set_ylabel("test accuracy, %")
    figures.legend(drawing, axes.flat, columns=len(CRITERIA))
    return drawing


def training_figure(trained: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Mean |w| and importance of each layer over the epochs; columns: λ."""
    drawing, axes = figures.figure(2, len(LAMBDAS), width_in=10, height_in=5.6)
    for column, (scale, seeds) in enumerate(trained.items()):
        for row, key in enumerate(("magnitude", "importance")):
            values = np.array([seed[key] for seed in seeds])  # (seeds, epochs + 1, 2)
            for layer, label in enumerate(("W (input layer)", "V (output layer)")):
                _band(axes[row, column], np.arange(EPOCHS + 1), values[..., layer], layer + len(CRITERIA), "-", label)
            axes[row, column].set_xlabel("epoch")
        axes[1, column].sharey(axes[1, 0])
        axes[0, column].set_yscale("log")
        axes[0, column].set_ylim(5e-3, 3)
        axes[0, column].set_title(f"trained from λ = {scale}")
    axes[0, 0].set_ylabel("mean |w|")
    axes[1, 0].set_ylabel(f"loss added by zeroing\n{100 * SUBSET:.0f} % of the layer")
    figures.legend(drawing, axes.flat, columns=2)
    return drawing


def _accuracy_panel(panel: Axes, seeds: Sequence[Mapping[str, Sequence[float]]]) -> None:
    # Curves that coincide stay visible, for the upper ones have gaps.
    for index, (name, style) in enumerate(zip(CRITERIA, ("-", "-", "--", "-.", ":"), strict=True)):
        values = 100 * np.array([seed[name] for seed in seeds])
        _band(panel, 100 * np.array(SPARSITIES), values, index, style, name)
    panel.set_ylim(0, 102)


def _band(panel: Axes, x: NDArray[Any], values: NDArray[Any], index: int, style: str, label: str) -> None:
    """Mean over seeds, and their extremes; values are (seeds, len(x))."""
    panel.plot(x, values.mean(0), style, color=figures.colour(index), linewidth=2, label=label)
    panel.fill_between(x, values.min(0), values.max(0), color=figures.colour(index), alpha=0.15, linewidth=0)
