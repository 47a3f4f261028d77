"""Accuracy-driven quantisation: leave the layers that harm most in floating point until the file is accurate enough."""

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
import onnx
import torch
from torch.utils.data import DataLoader

from compress.errors import InputError, WorkError
from compress.progress import progress_bar
from compress.tasks import CLASSIFICATION, Task
from deploy.metadata import write_metadata
from deploy.onnx_file import read_metadata, read_onnx
from deploy.parity import evaluate_runtime, logits
from deploy.precision import Precision, Target
from deploy.precision.calibration import Ranges
from deploy.precision.layers import layer_names
from deploy.precision.placement import weighted_nodes
from deploy.precision.quantisation import Quantised, quantise
from deploy.runtimes import Runtime, open_runtime

logger = logging.getLogger(__name__)

RANKING_IMAGES: Final = 32
"""Images that each layer's harm is measured on; a divergence is smooth, so it takes fewer than an accuracy."""

BATCH: Final = 8
"""Images per inference of the ranking."""


@dataclass(frozen=True)
class Exclusion:
    """Which layers are left out of quantisation, and what that gives.

    layers: those left out, the most harmful first, by the first of their `layer_names`.
    excluded: what quantisation is to leave out: the names and patterns that were given, and the nodes of these layers.
    reference_top1, top1: percent, of the fp32 file and of the quantised one.
    harm: of every layer, see `least_exclusion`; empty where none had to be left out.
    curve: (number of layers left out, top-1 in percent) of every file that was tried.
    """

    layers: tuple[str, ...]
    excluded: tuple[str, ...]
    reference_top1: float
    top1: float
    harm: Mapping[str, float]
    curve: tuple[tuple[int, float], ...]


def least_exclusion(
    source: Path,
    *,
    precision: Precision,
    target: Target,
    ranges: Ranges,
    loader: DataLoader,
    task: Task = CLASSIFICATION,
    max_drop: float,
    exclude: Collection[str] = (),
) -> Exclusion:
    """Find how few layers must stay in floating point for a file that loses at most `max_drop` points.

    A layer is a module with weights together with what follows it without any, up to the next layers: an addition or
    a pooling left in int8 between layers that are not would round for nothing.

    The harm of a layer is the mean Kullback-Leibler divergence, in nats per image, of the class probabilities when
    that layer alone is quantised, from those of the fp32 file. Small noises add up nearly independently, so it is the
    layer's own share; with all layers but one quantised, it would be a small difference between two large noises. The
    layers are left out in the order of harm: 1, 2, 4, … of them until the file is accurate enough, and then the number
    is bisected. Every accuracy is that of a quantised file itself; the result meets the drop and, unless it is 0, one
    layer less does not. Fewer may do in another order, or where accuracy does not rise with the number.

    It takes one pass of `RANKING_IMAGES` for each layer (measured: 3 s a layer for ResNet-50 on one core, of which it
    has 54) and, of n layers, at most 2 log₂ n + 2 passes over `loader`; no ranking if the drop is met at once.
    Everything runs in ONNX Runtime on the CPU, what is made for GPUs, too: slowly, and for its numbers alone.

    Args:
        source: the fp32 file.
        precision, target, ranges: as for `quantise`.
        loader: labelled images; N of them cannot tell drops apart that differ by less than 100 / N points.
        task: how accuracy is counted.
        max_drop: percentage points of top-1, or of the task's own metric, at least 0.
        exclude: layers that are left out in any case, by name or pattern.

    Raises:
        InputError: the drop is negative, the file lacks our metadata, there are no images or they do not fit, or as
            `quantise`.
        WorkError: the drop is not met even if a single layer is quantised, or as `quantise`.
    """
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise InputError(f"The accuracy is allowed to drop by {max_drop} points of top-1; give a number of at least 0.")
    about = read_metadata(source).model_copy(update={"precision": precision, "target": target})
    with TemporaryDirectory(prefix="espalier-exclusion-") as folder:
        path = Path(folder) / source.name

        def write(nodes: Collection[str]) -> Quantised:
            left = (*exclude, *nodes)
            done = quantise(source, path, precision=precision, target=target, ranges=ranges, exclude=left)
            model = read_onnx(path)
            write_metadata(model, about)  # the runtime must know what the file is made for
            onnx.save(model, str(path))
            return done

        files = _Files(source, path, write)
        with files.original() as runtime:
            reference = evaluate_runtime(runtime, loader, task=task, description="accuracy in fp32").top1
        ranked: list[str] = []
        curve: dict[int, float] = {}

        def meets(count: int) -> bool:
            with files.leaving_out(ranked[:count]) as runtime:
                description = f"{count} layers left out"
                curve[count] = evaluate_runtime(runtime, loader, task=task, description=description).top1
            # Percentages are rounded: 1 image of 100 is not quite 1 point.
            return reference - curve[count] <= max_drop + 1e-9

        harm: dict[str, float] = {}
        fewest: int | None = 0
        if not meets(0):
            harm = _harm(files, _first_images(loader, RANKING_IMAGES))
            ranked += sorted(harm, key=harm.__getitem__, reverse=True)
            fewest = _fewest(meets, len(ranked) - 1)
    if fewest is None:
        count, top1 = max(curve.items())
        raise WorkError(
            f"{source.name} in {precision} has a {task.metric} of {top1:.2f} % with {count} of its "
            f"{len(files.layers)} layers left out, more than {max_drop:g} points below the {reference:.2f} % in fp32: "
            "allow a larger drop, calibrate on more samples or by another method, or use fp16."
        )
    logger.info("%s in %s: %d of %d layers left out", source.name, precision, fewest, len(files.layers))
    chosen = tuple(ranked[:fewest])
    return Exclusion(
        layers=chosen,
        excluded=(*exclude, *files.nodes(chosen)),
        reference_top1=reference,
        top1=curve[fewest],
        harm=harm,
        curve=tuple(sorted(curve.items())),
    )


class _Files:
    """The quantised files of one network, written one after the other to one path."""

    def __init__(self, source: Path, path: Path, write: Callable[[Collection[str]], Quantised]) -> None:
        """
        Args:
            write: leaves the nodes of these names in floating point.
        """
        self._source = source
        self._path = path
        self._write = write
        self._nodes = _nodes(read_onnx(source), write(()).layers)

    @property
    def layers(self) -> list[str]:
        """All that can be quantised, in the order of the network."""
        return list(self._nodes)

    def nodes(self, layers: Collection[str]) -> list[str]:
        return [node for layer, nodes in self._nodes.items() if layer in layers for node in nodes]

    def original(self) -> Runtime:
        return open_runtime(self._source)

    def leaving_out(self, layers: Collection[str]) -> Runtime:
        """The file in which these layers stay in floating point, opened."""
        self._write(self.nodes(layers))
        return open_runtime(self._path, for_verification=True)


def _nodes(model: onnx.ModelProto, layers: Collection[str]) -> dict[str, list[str]]:
    """Each layer -> names of its nodes: those with its weights, and those behind them up to the next layers.

    What several layers lead to belongs to the last of them, and what stands before all layers to the first.
    """
    names = layer_names(model)
    weighted = {node.name: names[node.name][0] for node in weighted_nodes(model.graph)}
    order = [layer for layer in dict.fromkeys(weighted.values()) if layer in layers]
    found: dict[str, list[str]] = {layer: [] for layer in order}
    owners: dict[str, int] = {}
    for node in model.graph.node:  # in topological order, as ONNX demands
        layer = weighted.get(node.name)
        before = max((owners.get(name, 0) for name in node.input), default=0)
        owner = order.index(layer) if layer in found else before
        owners |= dict.fromkeys(node.output, owner)
        found[order[owner]].append(node.name)
    return found


def _fewest(meets: Callable[[int], bool], most: int) -> int | None:
    """A number that meets while the one before it does not, given that 0 does not; None if `most` does not either."""
    failing, count = 0, min(1, most)
    while count > failing and not meets(count):
        failing, count = count, min(2 * count, most)
    if count == failing:
        return None
    while count - failing > 1:
        middle = (failing + count) // 2
        if meets(middle):
            count = middle
        else:
            failing = middle
    return count


def _harm(files: _Files, images: torch.Tensor) -> dict[str, float]:
    """Layer -> harm, see `least_exclusion`, in the order of the network."""
    with files.original() as runtime:
        expected = _log_probabilities(runtime, images)
    harm = {}
    with progress_bar("harm of each layer", len(files.layers)) as bar:
        for layer in files.layers:
            with files.leaving_out([other for other in files.layers if other != layer]) as runtime:
                harm[layer] = _divergence(expected, _log_probabilities(runtime, images))
            bar.advance(f"{layer}: {harm[layer]:.2g} nats")
    return harm


def _divergence(expected: np.ndarray, actual: np.ndarray) -> float:
    """log p and log q, (N, classes, …) -> the mean of Σ p (log p − log q) over rows, or pixels, in nats."""
    if not np.isfinite(actual).all():
        return math.inf
    return float((np.exp(expected) * (expected - actual)).sum(axis=1).mean())


def _log_probabilities(runtime: Runtime, images: torch.Tensor) -> np.ndarray:
    return torch.from_numpy(logits(runtime, images, BATCH)).double().log_softmax(dim=1).numpy()


def _first_images(loader: DataLoader, count: int) -> torch.Tensor:
    batches: list[torch.Tensor] = []
    for images, _ in loader:
        batches.append(images)
        if sum(map(len, batches)) >= count:
            break
    return torch.cat(batches)[:count]
