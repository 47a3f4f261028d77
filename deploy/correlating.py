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
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from benchmarks.harness.environment import environment
from compress import checkpoint, data
from compress.errors import InputError, WorkError
from compress.files import make_directory, replacing, write_json, write_text
from compress.graph import ChannelGraph, trace
from compress.importance import Minibatch, criteria
from compress.importance.comparison import Scores, build_all, score
from compress.importance.oracle import Reduction, changes_of_loss, reduce
from compress.tasks import Classification, Task, task_named
from compress.training import check_fit
from compress.training.placement import moved, opened_accelerator, placed
from deploy.agreement import compare, residual
from deploy.correlation_views import scatter
from deploy.preflight import OF_IMAGES

logger = logging.getLogger(__name__)

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
    model.requires_grad_(True)  # nothing is trained here, and the factory may have frozen layers
    size = image_size or architecture.image_shape[-1]
    loaded = data.load(source, batch_size=batch_size, image_size=size, augment=False, trust=trust)
    task = task_named(loaded.task, trust=trust)
    _check_fit(directory, model, loaded, task)
    out = out or directory.resolve().parent / "correlation"
    with opened_accelerator() as accelerator, placed(model, accelerator.device):
        minibatches, images_sha256 = _minibatches(loaded, task, batches, seed, accelerator.device)
        graph = trace(model, minibatches[0].inputs[0][:2])
        if not graph.groups:
            raise InputError(f"Nothing in {directory} can be pruned, so there is nothing to score.")
        left = DEARER_THAN_THE_ORACLE if isinstance(task, Classification) else DEARER_THAN_THE_ORACLE | OF_IMAGES
        chosen = sorted(set(criteria()) - left) if names is None else list(dict.fromkeys(names))
        built, skipped = build_all(chosen, model, graph, skip_unscorable=names is None)
        make_directory(out)  # now, and not after the hours that the oracle may take
        for reason in skipped.values():
            logger.warning("left out: %s", reason)
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
        values = {name: given.values for name, given in scores.items()}
        scatter(values, truth, residual(graph)).savefig(temporary, dpi=150, metadata={"Software": None})
    return {**found, "directory": str(out)}


def _check_fit(directory: Path, model: nn.Module, loaded: data.Data, task: Task) -> None:
    """Hold the data against the network; what the check advises for a recipe is said of this command's options."""
    try:
        check_fit(model, loaded.train, classes=loaded.classes, task=task)
    except InputError as error:
        fact, about_model, _ = str(error).partition(": set model.kwargs")
        if about_model:
            raise InputError(f"{fact}: give --data that {directory} was trained for.") from error
        for key, option in _OPTIONS.items():
            fact = fact.replace(key, option)
        raise InputError(fact) from error


_OPTIONS: Final = {"data.source": "--data", "data.image_size": "--image-size", "data.batch_size": "--batch-size"}
"""The key of a recipe -> what it is called here."""


def _minibatches(
    loaded: data.Data, task: Task, count: int, seed: int, device: torch.device
) -> tuple[list[Minibatch], str]:
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
                for tensor in pytree.tree_leaves((images, labels)):
                    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.cpu().contiguous().numpy().tobytes())
                targets = moved(labels, device)
                inputs = task.inputs(moved(images, device), targets)
                found.append(Minibatch(inputs, partial(task.loss, targets=targets)))
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
