"""Which criterion ranks a user's own network as the measured change of loss does: `espalier correlate`."""

import csv
import hashlib
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
from rich.text import Text
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import environment
from benchmarks.harness.correlation import Agreement, agreement
from benchmarks.harness.figures import colour, figure, legend
from compress import checkpoint, data
from compress.errors import InputError, WorkError
from compress.files import make_directory, replacing, write_json, write_text
from compress.graph import ChannelGraph, trace
from compress.graph.groups import Group
from compress.importance import Minibatch, criteria
from compress.importance.comparison import Scores, build_all, score
from compress.importance.oracle import Reduction, changes_of_loss, reduce
from compress.training import check_fit
from compress.training.placement import opened_accelerator, placed
from deploy.console import TABLE_WIDTH

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
        InputError: checkpoint, data or criteria cannot be used, or do not fit together; or `out` cannot be written.
        WorkError: the network's loss on the images is NaN or infinite.
    """
    if batches < 1:
        raise InputError(f"batches is {batches}, but must be at least 1.")
    if names is not None and not names:
        raise InputError("--criteria names no criterion: name one or more, or leave it out to compare all that fit.")
    architecture = checkpoint.Architecture.read(directory)
    model = checkpoint.load(directory, trust=trust)
    size = image_size or architecture.image_shape[-1]
    loaded = data.load(source, batch_size=batch_size, image_size=size, augment=False, trust=trust)
    _check_fit(directory, model, loaded)
    out = out or directory.resolve().parent / "correlation"
    with opened_accelerator() as accelerator, placed(model, accelerator.device):
        minibatches, images_sha256 = _minibatches(loaded, batches, seed, accelerator.device)
        graph = trace(model, minibatches[0].inputs[0][:2])
        if not graph.groups:
            raise InputError(f"Nothing in {directory} can be pruned, so there is nothing to score.")
        chosen = sorted(set(criteria()) - DEARER_THAN_THE_ORACLE) if names is None else list(dict.fromkeys(names))
        built, skipped = build_all(chosen, model, graph, skip_unscorable=names is None)
        for reason in skipped.values():
            logger.warning("%s", reason)
        make_directory(out)  # now, and not after the hours that the oracle may take
        identity = f"{architecture.sha256} {images_sha256}"
        changes = changes_of_loss(model, graph, minibatches, saved=out / "oracle.safetensors", identity=identity)
        if not bool(changes.isfinite().all()):
            raise WorkError(
                f"The loss of {directory} on {source} is NaN or infinite: check its weights and the images."
            )
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
        "criteria": {name: compare(given.values, truth, residual(graph), seed=seed) for name, given in scores.items()},
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
    values: Mapping[str, Tensor], truth: Mapping[str, Tensor], streams: Sequence[str], *, seed: int = 0
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Correlate over all groups, over residual ones where there are any, and over every group by itself.

    Args:
        values, truth: group -> scores of its channels.
        streams: names of the residual groups.

    Returns:
        "all", "residual" or a group -> coefficient -> value, low and high.
    """
    sets = {ALL: list(truth), RESIDUAL: list(streams), **{name: [name] for name in truth}}
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
    ranked = sorted(found["criteria"], key=lambda name: -_sortable(found["criteria"][name][ALL]["spearman"]["value"]))
    return [_summary(found, ranked), _by_layer(found, ranked)]


def _summary(found: Mapping[str, Any], ranked: Sequence[str]) -> Table:
    channels = found["channels"]
    shown = [("spearman", ALL), ("spearman", RESIDUAL), ("pearson", ALL), ("kendall", ALL)]
    counts = {ALL: sum(channels.values()), RESIDUAL: sum(channels[name] for name in found["residual_groups"])}
    if not counts[RESIDUAL]:
        shown.remove(("spearman", RESIDUAL))
    seconds = found["seconds_per_minibatch"]
    table = Table(
        title=_line(
            f"Agreement with the measured change of loss ({found['reduction']}, {found['batches']} minibatches of "
            f"{found['batch_size']} images)"
        ),
        caption=_line(
            "In brackets 95 % bootstrap intervals over the channels. ms: of the criterion itself for one minibatch;\n"
            f"one forward and backward pass, which all that read gradients share, takes "
            f"{1000 * seconds['forward_and_backward']:.1f} ms."
        ),
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

_NAME_WIDTH: Final = 28
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


def scatter(scores: Mapping[str, Scores], truth: Mapping[str, Tensor], graph: ChannelGraph) -> Figure:
    """For each criterion, the rank of every channel by the oracle over its rank by the criterion, from 0 to 1."""
    columns = min(4, len(scores))
    rows = -(-len(scores) // columns)
    drawing, axes = figure(rows, columns, width_in=2.6 * columns + 0.4, height_in=2.6 * rows + 0.6)
    streams = torch.cat(
        [torch.full((group.width,), is_residual(group), dtype=torch.bool) for group in graph.groups.values()]
    ).numpy()
    y = _ranks(truth)
    panels = list(axes.flat)
    for index, (panel, (name, given)) in enumerate(zip(panels, scores.items(), strict=False)):
        x = _ranks(given.values)
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


def _check_fit(directory: Path, model: nn.Module, loaded: data.Data) -> None:
    """Hold the data against the network; what the check advises for a recipe is said of this command's options."""
    try:
        check_fit(model, loaded.train, classes=loaded.classes)
    except InputError as error:
        fact, about_model, _ = str(error).partition(": set model.kwargs")
        if about_model:
            raise InputError(f"{fact}: give --data that {directory} was trained for.") from error
        for key, option in _OPTIONS.items():
            fact = fact.replace(key, option)
        raise InputError(fact) from error


_OPTIONS: Final = {"data.source": "--data", "data.image_size": "--image-size", "data.batch_size": "--batch-size"}
"""The key of a recipe -> what it is called here."""


def _minibatches(loaded: data.Data, count: int, seed: int, device: torch.device) -> tuple[list[Minibatch], str]:
    """The first `count` minibatches of as many passes over the training split as that takes; SHA-256 of what they hold.

    By that hash a later call knows that it measures the same images, whatever the source is called.
    """
    found: list[Minibatch] = []
    digest = hashlib.sha256()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while len(found) < count:
            before = len(found)
            for images, labels in loaded.train:
                if len(images) < 2:
                    continue
                for tensor in (images, labels):
                    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.cpu().contiguous().numpy().tobytes())
                found.append(Minibatch((images.to(device),), partial(cross_entropy, target=labels.to(device))))
                if len(found) == count:
                    break
            if len(found) == before:
                raise InputError(f"The training split of {loaded.name} has no minibatch of 2 images or more.")
    return found, digest.hexdigest()


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
