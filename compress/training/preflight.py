"""Do the data fit the model? Asked of a few images before hours of training depend on it."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from compress.errors import InputError, first_line
from compress.modes import evaluation_mode
from compress.tasks import CLASSIFICATION, IGNORED, Classification, Evaluation, Segmentation, Task, prediction
from compress.training.placement import moved


def check_fit(
    model: nn.Module, loader: Iterable[Any], *, classes: Sequence[str] | None = None, task: Task = CLASSIFICATION
) -> None:
    """Run the first images of `loader` through `model`; check images, labels and outputs against each other.

    Args:
        loader: yields (images, labels); its dataset's labels are all checked where it lists them (`targets`,
        or a `TensorDataset`), else those of the first batch. classes: names of the data's classes; the model
        must then have one output for each. task: of a task other than the built-in ones nothing but a minibatch is
        asked, of which it must be able to count the accuracy.

    Raises:
        InputError: something does not fit; the message names the recipe key to change.
    """
    if not isinstance(task, Classification | Segmentation):
        _check_evaluation(model, loader, task)
        return
    masks = isinstance(task, Segmentation)
    images, labels = _first_batch(loader, masks=masks)
    outputs = _outputs(model, images[:2], masks=masks)
    labels = labels[labels != IGNORED] if masks else _all_labels(loader, labels)
    if classes is not None and len(classes) != outputs:
        raise InputError(
            f"The model has {outputs} outputs but the data have {len(classes)} classes: "
            f"set model.kwargs.num_classes: {len(classes)}."
        )
    if labels.numel() == 0:  # masks without any class, which the next minibatch may have
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise InputError(f"The labels go down to {low} but must count from 0: correct what data.source returns.")
    if high >= outputs:
        raise InputError(
            f"The model has {outputs} outputs but the labels go up to {high}: set model.kwargs.num_classes: {high + 1}."
        )


def check_precision(precision: str, needs: Collection[str]) -> None:
    """A pruner that reads gradients of activations cannot be used where the loss is scaled.

    Args:
        needs: of the pruner's criterion.

    Raises:
        InputError: precision is fp16 and the criterion needs activations.
    """
    if precision == "fp16" and "activations" in needs:
        raise InputError(
            "precision is fp16, which scales the gradients of activations that the importance criterion reads: set "
            "prune.training.precision to bf16 or no, or choose a criterion on parameters such as taylor."
        )


def _check_evaluation(model: nn.Module, loader: Iterable[Any], task: Task) -> None:
    batch = next(iter(loader), None)
    if not (isinstance(batch, list | tuple) and len(batch) == 2):
        raise InputError("The data loader must yield pairs of (images, targets): correct data.source.")
    images, targets = batch
    device = next(model.parameters(), torch.empty(0)).device
    name = type(task).__name__
    try:
        with torch.no_grad(), torch.random.fork_rng(), evaluation_mode(model):
            figures = task.evaluation(task.tally(model(moved(images, device)), moved(targets, device)))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise InputError(
            f"The task {name} cannot judge the model on the data ({type(error).__name__}: {first_line(error)}): "
            "correct its tally and evaluation, the model or data.source."
        ) from error
    if not isinstance(figures, Evaluation):
        raise InputError(f"The task {name} evaluates to a {type(figures).__name__}: return compress.tasks.Evaluation.")


def _first_batch(loader: Iterable[Any], *, masks: bool) -> tuple[Tensor, Tensor]:
    """First (images, labels), checked by themselves: types, shapes, number."""
    batch = next(iter(loader), None)
    if batch is None:
        raise InputError(
            "The data loader yields no batch: data.source is empty, or smaller than one batch that must be "
            "full; give more images or a smaller data.batch_size."
        )
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise InputError("The data loader must yield pairs of tensors (images, labels): correct data.source.")
    images, labels = batch
    if not images.is_floating_point():
        raise InputError(
            f"The images have the type {images.dtype} but must be floating point, scaled and normalised: "
            "convert them in what data.source names."
        )
    if labels.dtype != torch.int64:
        raise InputError(
            f"The labels have the type {labels.dtype} but must be int64 class indices: convert them in what "
            "data.source names."
        )
    if masks and (labels.shape != (len(images), *images.shape[2:]) or len(labels) == 0):
        raise InputError(
            f"The masks have the shape {_by(labels.shape)} for images of {_by(images.shape)} but must be one class "
            "index per pixel: correct what data.source returns."
        )
    if not masks and (labels.shape != images.shape[:1] or len(labels) == 0):
        raise InputError(
            f"The labels have the shape {_by(labels.shape)} for {len(images)} images but must be one class "
            "index per image: correct what data.source returns."
        )
    return images, labels


def _outputs(model: nn.Module, images: Tensor, *, masks: bool) -> int:
    """Number of outputs of `model` for these images, from a forward pass in evaluation mode."""
    met: list[tuple[nn.Conv2d, int]] = []  # convolutions in the order met, with the channels that reached them

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Conv2d):
            met.append((module, inputs[0].shape[1]))

    size = _by(images.shape[1:])
    parameter = next(model.parameters(), images)
    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    try:
        with torch.no_grad(), torch.random.fork_rng(), evaluation_mode(model):
            output = model(images.to(parameter.device))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        if len(met) == 1 and met[0][0].in_channels != met[0][1]:
            wanted, given = met[0][0].in_channels, met[0][1]
            raise InputError(
                f"The model takes images of {wanted} channels but the data have {given}: set "
                f"model.kwargs.in_channels: {given} where the model offers it, or choose another data.source."
            ) from error
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(
            f"The model cannot take images of {size} ({reason}): set data.image_size to a size it takes."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if masks:
        return _classes_of_pixels(output, images)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(images):
        found = f"a tensor of {_by(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise InputError(
            f"The model returns {found} for {len(images)} images but must return logits of (images, "
            "classes): choose an image classifier as model.factory."
        )
    return output.shape[1]


def _classes_of_pixels(output: Any, images: Tensor) -> int:
    scores = prediction(output)
    if scores.dim() != 4 or (len(scores), *scores.shape[2:]) != (len(images), *images.shape[2:]):
        raise InputError(
            f"The model returns scores of {_by(scores.shape)} for images of {_by(images.shape)} but must return "
            "(images, classes, height, width) of the images' size: choose a segmentation network as model.factory, and "
            "scale its output up inside it."
        )
    return scores.shape[1]


def _all_labels(loader: Iterable[Any], first: Tensor) -> Tensor:
    """All labels of the loader's dataset where it keeps them in one place, else those of the first batch."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1]
    targets = getattr(dataset, "targets", None)
    if isinstance(targets, Tensor | list) and len(targets) > 0:
        return torch.as_tensor(targets)
    return first


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
