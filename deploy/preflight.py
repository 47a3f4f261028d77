"""Everything that can be known to be wrong before hours of training depend on it."""

import importlib.util
import inspect
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from torch import nn

from compress import data, models
from compress.errors import InputError, MissingExtraError
from compress.importance import criterion
from compress.models import networks
from compress.tasks import Classification
from compress.training import TrainingConfig, check_fit
from compress.training.placement import opened_accelerator
from compress.training.preflight import check_precision
from deploy.export import export_onnx
from deploy.onnx_file import read_onnx
from deploy.precision import HALF
from deploy.precision.layers import match_layers
from deploy.recipe import Recipe
from deploy.stages import TRUST_ALL, Run, build_model, build_pruner, sample_images

logger = logging.getLogger(__name__)

OF_IMAGES: Final = frozenset({"taylor-logits"})
"""Criteria that need one row of logits for each image."""


def require_libraries(recipe: Recipe) -> None:
    """Refuse to begin what could not be written, verified and timed.

    Raises:
        MissingExtraError: ONNX Runtime is not installed, or what writes the recipe's precisions.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtraError("onnxruntime", "cpu", "Verifying and timing the exported networks")
    half = sorted(HALF & set(recipe.export.precision))
    if half and importlib.util.find_spec("modelopt") is None:
        raise MissingExtraError("nvidia-modelopt", "quant", f"Writing {' and '.join(half)}")


def open_data(recipe: Recipe) -> data.Data:
    """The recipe's data.

    Raises:
        InputError: they cannot be read.
    """
    settings = recipe.data
    return data.load(
        settings.source,
        batch_size=settings.batch_size,
        image_size=settings.image_size,
        workers=settings.workers,
        augment=settings.augment,
        trust=TRUST_ALL,
    )


def fill_in(recipe: Recipe, loaded: data.Data) -> Recipe:
    """The recipe with those arguments of the factory that follow from the data and were not given.

    Where weights are trusted as they are, the number of classes stays theirs, so that a misfit shows.
    """
    channels, height, width = loaded.image_shape
    known: dict[str, Any] = {"num_classes": len(loaded.classes), "in_channels": channels, "in_chans": channels}
    if height == width:
        known["image_size"] = height
    if recipe.baseline is None and recipe.model.weights is not None:
        del known["num_classes"]
    taken = _arguments(recipe.model.factory)
    kwargs = {key: value for key, value in known.items() if key in taken} | recipe.model.kwargs
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"kwargs": kwargs})})


def check(run: Run) -> None:
    """Build the network and the pruner once, and run real images through, before anything is trained.

    Raises:
        InputError: model, weights, data, classes, pruning settings, precisions or batch sizes do not fit.
    """
    recipe = run.recipe
    for config in (recipe.baseline, recipe.prune.training, recipe.finetune):
        _check_precision(config)
    _check_trusted_weights(recipe, run.data)
    needed = max(recipe.parity.samples, *recipe.measure.batch_sizes)
    sample_images(run.data, at_least=needed, at_most=needed)
    _check_criterion(run)
    model = build_model(recipe)
    for loader in (run.data.train, run.data.test):
        check_fit(model, loader, classes=run.data.classes, task=run.task)
    _check_excluded(model, run)
    pruner = build_pruner(model, run)
    check_precision(recipe.prune.training.precision, pruner.needs)
    groups, frozen = pruner.graph.groups, pruner.graph.frozen
    logger.info("%d channel groups can be pruned, %d sets of layers stay as they are", len(groups), len(frozen))


def _check_criterion(run: Run) -> None:
    name = criterion(run.recipe.prune.importance)[0].name
    if name in OF_IMAGES and not isinstance(run.task, Classification):
        raise InputError(
            f"prune.importance is {name}, which expands the logits (images, classes) of a classifier, but the task is "
            f"{run.recipe.task or run.data.task}: choose another, such as taylor or hessian."
        )


def _check_excluded(model: nn.Module, run: Run) -> None:
    """Names of layers are those of the exported graph, so they are looked up in one."""
    if not run.recipe.export.exclude:
        return
    with TemporaryDirectory() as folder:
        exported = export_onnx(model, Path(folder) / "dense.onnx", image_shape=run.data.image_shape)
        match_layers(read_onnx(exported), run.recipe.export.exclude)


def _arguments(factory: str) -> set[str]:
    """Names of arguments that the factory takes."""
    prefix, _, name = factory.partition(":")
    if prefix == "torchvision":
        return {"num_classes", "image_size"} if name.startswith("vit_") else {"num_classes"}
    if prefix == "timm":
        return {"num_classes", "in_chans"}
    function = getattr(networks, name, None) if prefix == "espalier" else models.resolve(factory, trust=TRUST_ALL)
    return set(inspect.signature(function).parameters) if callable(function) else set()


def _check_trusted_weights(recipe: Recipe, loaded: data.Data) -> None:
    """Published weights of other classes leave the classifier untrained, which only a training makes good."""
    if recipe.baseline is not None or recipe.model.weights is None:
        return
    implied = models.without_weights(recipe.model.factory, {"weights": recipe.model.weights})
    classes = implied.get("num_classes", len(loaded.classes))
    if classes != len(loaded.classes):
        raise InputError(
            f"The weights {recipe.model.weights} are for {classes} classes and {loaded.name} has "
            f"{len(loaded.classes)}, so they cannot be trusted as they are: give settings of a training under baseline."
        )


def _check_precision(config: TrainingConfig | None) -> None:
    """fp16 trains on a GPU only."""
    if config is not None:
        with opened_accelerator(config.precision):
            pass
