"""What `espalier correlate` found, as tables for the terminal and as a scatter plot."""

from collections.abc import Collection, Mapping, Sequence
from math import ceil
from typing import Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text
from scipy.stats import rankdata
from torch import Tensor

from benchmarks.harness.figures import colour, figure, legend
from deploy.agreement import ALL, RESIDUAL
from deploy.console import TABLE_WIDTH


def tables(found: Mapping[str, Any]) -> list[Table]:
    """What `correlate` found, for the terminal: the criteria by rank over all groups, then Spearman by layer."""
    ranked = sorted(found["criteria"], key=lambda name: -_sortable(found["criteria"][name][ALL]["spearman"]["value"]))
    return [_summary(found, ranked), _by_layer(found, ranked)]


def _summary(found: Mapping[str, Any], ranked: Sequence[str]) -> Table:
    channels = found["channels"]
    shown = [("spearman", ALL), ("spearman", RESIDUAL), ("pearson", ALL), ("kendall", ALL)]
    counts = {ALL: sum(channels.values()), RESIDUAL: sum(channels[name] for name in found["residual_groups"])}
    if not counts[RESIDUAL]:
        shown.remove(("spearman", RESIDUAL))
    seconds = found["seconds_per_minibatch"]
    explained = "In brackets 95 % bootstrap intervals over the channels. ms: of the criterion itself for one minibatch"
    if shared_ms := 1000 * seconds["forward_and_backward"]:
        explained += f";\none forward and backward pass, which all that read gradients share, takes {shared_ms:.1f} ms"
    table = Table(
        title=_line(
            f"Agreement with the measured change of loss ({found['reduction']}, {found['batches']} "
            f"minibatch{'' if found['batches'] == 1 else 'es'} of {found['batch_size']} images)"
        ),
        caption=_line(f"{explained}.\n"),
        **_LOOK,
    )
    table.add_column("criterion", overflow="fold")
    for coefficient, part in shown:
        table.add_column(f"{coefficient.title()}\n{part} ({counts[part]})", justify="right", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    for name in ranked:
        cells = [_with_interval(found["criteria"][name][part][coefficient]) for coefficient, part in shown]
        table.add_row(name if len(name) <= _NAME_WIDTH else _lines(name), *cells, f"{1000 * seconds[name]:.1f}")
    return table


def _by_layer(found: Mapping[str, Any], ranked: Sequence[str]) -> Table:
    layers = {name: f"{name}{'*' if name in found['residual_groups'] else ''}" for name in found["channels"]}
    room = TABLE_WIDTH - 2 - min(_NAME_WIDTH, max(map(len, layers.values()))) - len("channels") - 4
    columns: list[str] = []
    for name in ranked:
        room -= max(len("-.00"), *map(len, _lines(name).splitlines())) + 2
        if room < 0 and columns:
            break
        columns.append(name)
    best = f", the best {len(columns)} of {len(ranked)} criteria" if len(columns) < len(ranked) else ""
    stream = "; * is a residual stream" if found["residual_groups"] else ""
    table = Table(title=_line(f"Spearman by layer{best}{stream}"), **_LOOK)
    table.add_column("layer", overflow="fold")
    table.add_column("channels", justify="right", no_wrap=True)
    for name in columns:
        table.add_column(_lines(name), justify="right", no_wrap=True)
    for layer, shown in layers.items():
        values = [_decimal(found["criteria"][name][layer]["spearman"]["value"]) for name in columns]
        table.add_row(shown, str(found["channels"][layer]), *values)
    return table


_LOOK: Final[dict[str, Any]] = {
    "title_justify": "left",
    "caption_justify": "left",
    "box": box.SIMPLE_HEAD,
    "padding": (0, 1, 0, 0),
}

_NAME_WIDTH: Final = 22
"""Columns of a terminal that a name has for itself; a longer criterion puts every option on a line of its own."""


def _line(text: str) -> Text:
    """A title that may be wider than its table."""
    return Text(text, style="italic", no_wrap=True, overflow="ignore")


def _lines(name: str) -> str:
    return name.replace(":", "\n:")


def _with_interval(coefficient: Mapping[str, float | None]) -> str:
    if coefficient["value"] is None:
        return "—"
    value, low, high = (_decimal(coefficient[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _decimal(value: float | None) -> str:
    """Two decimals without the zero before them, as correlations are printed: .95, -.12, 1.00."""
    return "—" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("0.", ".", 1)


def _sortable(value: float | None) -> float:
    return -2.0 if value is None else value


def scatter(
    scores: Mapping[str, Mapping[str, Tensor]], truth: Mapping[str, Tensor], residual: Collection[str]
) -> Figure:
    """For each criterion, the rank of every channel by the oracle over its rank by the criterion, from 0 to 1.

    Args:
        scores: criterion -> group -> scores of its channels.
        truth: group -> the oracle's scores.
        residual: names of the groups that are residual streams.
    """
    rows = ceil(len(scores) / 4)
    columns = ceil(len(scores) / rows)
    drawing, axes = figure(rows, columns, width_in=2.6 * columns + 0.4, height_in=2.6 * rows + 0.6)
    streams = np.concatenate([np.full(len(values), name in residual) for name, values in truth.items()])
    y = _ranks(truth)
    panels = list(axes.flat)
    for index, (panel, (name, given)) in enumerate(zip(panels, scores.items(), strict=False)):
        x = _ranks(given)
        for series, (label, mask) in enumerate((("other groups", ~streams), ("residual streams", streams))):
            if mask.any():
                panel.scatter(x[mask], y[mask], s=8, color=colour(series), alpha=0.6, linewidths=0, label=label)
        panel.set_title(_lines(name), fontsize=9)
        panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xticks=_TICKS, yticks=_TICKS)
        panel.tick_params(labelsize=8)
        if index % columns == 0:
            panel.set_ylabel("rank by the measured change of loss", fontsize=8)
        if index + columns >= len(scores):
            panel.set_xlabel("rank by the criterion, 0 least important", fontsize=8)
    for panel in panels[len(scores) :]:
        panel.set_visible(False)
    if streams.any() and not streams.all():
        legend(drawing, panels[: len(scores)], columns=2)
    return drawing


_TICKS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)


def _ranks(values: Mapping[str, Tensor]) -> Any:
    """Ranks of all channels together, in [0, 1]."""
    joined = torch.cat(list(values.values())).numpy()
    return (rankdata(joined) - 1) / max(1, len(joined) - 1)
