"""Which criterion ranks a user's own network as the measured change of loss does: `espalier correlate`."""

import csv
import io
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.harness import environment
from benchmarks.harness.correlation import Agreement, agreement
from benchmarks.harness.figures import colour, figure, legend
from compress import checkpoint, data
from compress.errors import InputError
from compress.files import replacing, write_json, write_text
from compress.graph import ChannelGraph, trace
from compress.graph.groups import Group
from compress.importance import Minibatch, criteria
from compress.importance.comparison import Scores, build_all, score
from compress.importance.oracle import Reduction, changes_of_loss, reduce
from compress.training import check_fit
from compress.training.placement import opened_accelerator, placed

logger = logging.getLogger(__name__)

ALL, RESIDUAL = "all", "residual"
"""Names of the two sets of groups: every one, and those that several producers add up to."""

DEARER_THAN_THE_ORACLE: Final = frozenset({"oracle", "taylor-so", "obd"})
"""Not among the criteria that are compared by default: they cost as much as what they are compared with, or more."""


def correlate(
    directory: Path,
    source: str,
    *,
    names: Sequence[str] | None = None,
    batches: int = 16,
    batch_size: int = 64,
    image_size: int | None = None,
    reduction: Reduction = "squared",
    seed: int = 0,
    out: Path | None = None,
    trust: Collection[str] = (),
) -> dict[str, Any]:
    """Measure the oracle on a checkpoint, let criteria score it on the same minibatches, and correlate.

    Writes `correlation.json`, `scores.csv` and `scatter.png` into `out`, and `oracle.safetensors`, from which a killed
    measurement goes on.

    Args:
        directory: of the checkpoint.
        source: of the data, see `compress.data.load`; the training split is used, without augmentation.
        names: criteria with their options; None takes all that can score the network and cost less than the oracle.
        batches, batch_size: minibatches that oracle and criteria see, and images in each.
        reduction: how the oracle's changes of loss become one score over minibatches.
        seed: of the choice of images and of the bootstrap.
        out: directory; None takes `correlation` beside the checkpoint.
        trust: modules that the checkpoint's factory and the data source may import.

    Returns:
        JSON values: `criteria` as name -> "all", "residual" or a layer -> coefficient -> value, low, high (None where
        it is not defined), and what was measured with how many samples and at what cost.

    Raises:
        InputError: checkpoint, data or criteria cannot be used, or do not fit together.
    """
    architecture = checkpoint.Architecture.read(directory)
    model = checkpoint.load(directory, trust=trust)
    size = image_size or architecture.image_shape[-1]
    loaded = data.load(source, batch_size=batch_size, image_size=size, augment=False, trust=trust)
    check_fit(model, loaded.train, classes=loaded.classes)
    out = out or directory.resolve().parent / "correlation"
    with opened_accelerator() as accelerator, placed(model, accelerator.device):
        minibatches = _minibatches(loaded, batches, seed, accelerator.device)
        graph = trace(model, minibatches[0].inputs[0][:2])
        if not graph.groups:
            raise InputError(f"Nothing in {directory} can be pruned, so there is nothing to score.")
        chosen = sorted(set(criteria()) - DEARER_THAN_THE_ORACLE) if names is None else list(dict.fromkeys(names))
        built, skipped = build_all(chosen, model, graph, skip_unscorable=names is None)
        for reason in skipped.values():
            logger.warning("%s", reason)
        identity = f"{architecture.sha256} {source} {size} {batches}x{batch_size} seed {seed}"
        changes = changes_of_loss(model, graph, minibatches, saved=out / "oracle.safetensors", identity=identity)
        scores, pass_seconds = score(model, built, minibatches)
    truth = _by_group(graph, reduce(changes, reduction))
    found = {
        "checkpoint": str(directory),
        "data": source,
        "batches": batches,
        "batch_size": batch_size,
        "reduction": reduction,
        "seed": seed,
        "channels": {name: len(values) for name, values in truth.items()},
        "residual_groups": residual(graph),
        "criteria": {name: compare(given.values, truth, graph, seed=seed) for name, given in scores.items()},
        "seconds_per_minibatch": {
            "forward_and_backward": pass_seconds,
            **{name: given.seconds for name, given in scores.items()},
        },
        "skipped": skipped,
        "environment": environment(),
    }
    write_json(out / "correlation.json", found)
    write_text(out / "scores.csv", _csv(scores, truth))
    with replacing(out / "scatter.png") as temporary:
        scatter(scores, truth, graph).savefig(temporary, dpi=150, metadata={"Software": None})
    return {**found, "directory": str(out)}


def residual(graph: ChannelGraph) -> list[str]:
    """Names of the groups whose channels several layers add up to: residual streams."""
    return [name for name, group in graph.groups.items() if is_residual(group)]


def is_residual(group: Group) -> bool:
    """Whether gates stand on several layers of the group, so that a rule must combine them."""
    return len({tensor.rpartition(".")[0] for tensor, _ in group.gates}) > 1


def compare(
    values: Mapping[str, Tensor], truth: Mapping[str, Tensor], graph: ChannelGraph, *, seed: int = 0
) -> dict[str, dict[str, dict[str, float | None]]]:
    """ "all", "residual" where there is one, and every group -> coefficient -> value, low and high."""
    sets = {ALL: list(graph.groups), RESIDUAL: residual(graph), **{name: [name] for name in graph.groups}}
    found = {}
    for title, names in sets.items():
        if names:
            mine, other = (torch.cat([part[name] for name in names]).numpy() for part in (values, truth))
            found[title] = _coefficients(agreement(mine, other, seed=seed))
    return found


def _coefficients(found: Agreement) -> dict[str, dict[str, float | None]]:
    return {name: getattr(found, name).model_dump() for name in ("pearson", "spearman", "kendall")}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """What `correlate` found, for the terminal: the criteria by rank over all groups, then Spearman by layer."""
    ranked = sorted(found["criteria"], key=lambda name: -(found["criteria"][name][ALL]["spearman"]["value"] or -2))
    streams = any(RESIDUAL in parts for parts in found["criteria"].values())
    summary = Table(
        title=f"Agreement with the measured change of loss ({found['reduction']}, {found['batches']} minibatches of "
        f"{found['batch_size']} images, {sum(found['channels'].values())} channels)",
        **_LOOK,
    )
    summary.add_column("criterion", overflow="fold")
    for header in ("Spearman, all", *(["residual"] if streams else []), "Pearson, all", "Kendall, all", "ms/minibatch"):
        summary.add_column(header, justify="right")
    for name in ranked:
        parts = found["criteria"][name]
        cells = [_cell(parts[ALL]["spearman"])]
        if streams:
            cells.append(_cell(parts[RESIDUAL]["spearman"]))
        cells += [_cell(parts[ALL]["pearson"]), _cell(parts[ALL]["kendall"])]
        summary.add_row(name, *cells, f"{1000 * found['seconds_per_minibatch'][name]:.1f}")
    layers = Table(title="Spearman by layer, * residual stream", **_LOOK)
    layers.add_column("layer", overflow="fold")
    layers.add_column("channels", justify="right")
    for name in ranked[:_COLUMNS]:
        layers.add_column(name, justify="right", overflow="fold")
    for layer, width in found["channels"].items():
        values = [_value(found["criteria"][name][layer]["spearman"]["value"]) for name in ranked[:_COLUMNS]]
        layers.add_row(f"{layer}{'*' if layer in found['residual_groups'] else ''}", str(width), *values)
    return [summary, layers]


_LOOK: Final[dict[str, Any]] = {"title_justify": "left", "box": box.SIMPLE_HEAD}

_COLUMNS: Final = 6
"""Criteria that the table by layer has room for; all of them stand in correlation.json."""


def _cell(coefficient: Mapping[str, float | None]) -> str:
    if coefficient["value"] is None:
        return "—"
    return f"{coefficient['value']:.3f} [{coefficient['low']:.2f}, {coefficient['high']:.2f}]"


def _value(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"


def scatter(scores: Mapping[str, Scores], truth: Mapping[str, Tensor], graph: ChannelGraph) -> Figure:
    """For each criterion, the rank of every channel by the criterion over its rank by the oracle, from 0 to 1."""
    columns = min(4, len(scores))
    rows = -(-len(scores) // columns)
    drawing, axes = figure(rows, columns, width_in=2.6 * columns + 0.4, height_in=2.6 * rows + 0.6)
    streams = torch.cat(
        [torch.full((group.width,), is_residual(group), dtype=torch.bool) for group in graph.groups.values()]
    ).numpy()
    y = _ranks(truth)
    for panel, (name, given) in zip(axes.flat, scores.items(), strict=False):
        x = _ranks(given.values)
        for index, (label, mask) in enumerate((("other groups", ~streams), ("residual streams", streams))):
            if mask.any():
                panel.scatter(x[mask], y[mask], s=8, color=colour(index), alpha=0.6, linewidths=0, label=label)
        panel.set_title(name, fontsize=9)
        panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    for panel in list(axes.flat)[len(scores) :]:
        panel.set_visible(False)
    drawing.supxlabel("rank by the criterion (0 least important)", fontsize=10)
    drawing.supylabel("rank by the measured change of loss", fontsize=10)
    legend(drawing, list(axes.flat)[: len(scores)], columns=2)
    return drawing


def _ranks(values: Mapping[str, Tensor]) -> Any:
    """Ranks of all channels together, in [0, 1]."""
    joined = torch.cat(list(values.values())).numpy()
    return (rankdata(joined) - 1) / max(1, len(joined) - 1)


def _minibatches(loaded: data.Data, count: int, seed: int, device: torch.device) -> list[Minibatch]:
    """The first `count` whole minibatches of as many passes over the training split as that takes."""
    found: list[Minibatch] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while len(found) < count:
            before = len(found)
            for images, labels in loaded.train:
                if len(images) < 2:
                    continue
                found.append(Minibatch((images.to(device),), partial(cross_entropy, target=labels.to(device))))
                if len(found) == count:
                    break
            if len(found) == before:
                raise InputError(f"The training split of {loaded.name} has no minibatch of 2 images or more.")
    return found


def _by_group(graph: ChannelGraph, values: Tensor) -> dict[str, Tensor]:
    return dict(zip(graph.groups, values.split(list(graph.widths.values())), strict=True))


def _csv(scores: Mapping[str, Scores], truth: Mapping[str, Tensor]) -> str:
    """One row for each channel: its group, its number, the oracle and every criterion."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "channel", "oracle", *scores])
    for group, values in truth.items():
        columns = [values, *(given.values[group] for given in scores.values())]
        for channel in range(len(values)):
            writer.writerow([group, channel, *(repr(float(column[channel])) for column in columns)])
    return text.getvalue()
