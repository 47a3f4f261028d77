"""What a network is trained for: how it is called, what its loss is, and how its accuracy is counted.

classification            outputs (N, K), labels (N,)
segmentation              outputs (N, K, H, W), or a dictionary with "out" and perhaps "aux"; masks (N, H, W)
package.module:object     the user's own `Task`, imported only with the user's leave
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import InputError

IGNORED: Final = 255
"""In a mask: the pixel has no class; it counts neither in the loss nor in the accuracy."""

AUXILIARY_WEIGHT: Final = 0.5
"""Of the loss of every auxiliary output, as torchvision's reference training of segmentation networks has it."""


@dataclass(frozen=True)
class Evaluation:
    """How good a network is over `samples` images.

    top1: percent of what is counted that is right; `metric` says what that is. Of classification the images whose label
        comes first by score; of segmentation the pixels, those without a class left out.
    top5: percent of the images whose label is among the first five; with five classes or fewer 100 by definition. None
        for other tasks than classification.
    loss: mean cross-entropy per image, or per pixel, in nats, without label smoothing; None where a task has none in
        evaluation mode.
    others: further figures of the task in percent, such as "mean IoU".
    """

    top1: float
    top5: float | None
    loss: float | None
    samples: int
    metric: str = "top-1"
    others: dict[str, float] = field(default_factory=dict)


class Task(ABC):
    """Derive from it for networks that are called, trained or judged in another way, and name it `task:` in the recipe.

        class Detection(Task):
            def inputs(self, images, targets):
                return images, targets             # in training mode the network computes its losses itself

            def loss(self, outputs, targets, *, label_smoothing=0.0):
                return sum(outputs.values())

    Attributes:
        metric: what `Evaluation.top1` is.
    """

    metric: ClassVar[str] = "accuracy"

    def inputs(self, images: Any, targets: Any) -> tuple[Any, ...]:  # noqa: ARG002  for those that override it
        """Positional arguments of the forward pass in training mode; in evaluation mode they are the images alone."""
        return (images,)

    @abstractmethod
    def loss(self, outputs: Any, targets: Any, *, label_smoothing: float = 0.0) -> Tensor:
        """What the network returns in training mode -> mean loss over the minibatch, a scalar."""

    @abstractmethod
    def tally(self, outputs: Any, targets: Any) -> Sequence[float]:
        """What the network returns in evaluation mode for a minibatch -> sums that add up over minibatches.

        The first is the number of images; the others are the task's own.
        """

    @abstractmethod
    def evaluation(self, totals: Sequence[float]) -> Evaluation:
        """The figures that the sums over all minibatches give; called with one image or more."""


class Classification(Task):
    """One class for each image."""

    metric = "top-1"

    def loss(self, outputs: Any, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of logits (N, K) and labels (N,), in float32 whatever the precision of the logits.

        For a softmax in half precision loses small terms.
        """
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"The model returns a {type(outputs).__name__} in training mode but must return a tensor "
                "of logits: switch its auxiliary outputs off, as model.kwargs.aux_logits: false does for Inception."
            )
        return F.cross_entropy(outputs.to(torch.float32), targets, label_smoothing=label_smoothing)

    def tally(self, outputs: Tensor, targets: Tensor) -> list[float]:
        """Images, top-1 hits, top-5 hits, summed cross-entropy."""
        ranked = outputs.topk(min(5, outputs.shape[1]), dim=1).indices == targets[:, None]
        summed = F.cross_entropy(outputs.to(torch.float32), targets, reduction="sum")
        return [len(targets), ranked[:, 0].sum().item(), ranked.any(dim=1).sum().item(), summed.item()]

    def evaluation(self, totals: Sequence[float]) -> Evaluation:
        samples, top1, top5, loss = totals
        return Evaluation(100 * top1 / samples, 100 * top5 / samples, loss / samples, round(samples))


class Segmentation(Task):
    """One class for each pixel; pixels of the class `IGNORED` are left out everywhere."""

    metric = "pixel accuracy"

    def loss(self, outputs: Any, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy per pixel of the output, plus `AUXILIARY_WEIGHT` times that of every auxiliary one."""
        counted = (targets != IGNORED).sum().clamp(min=1)  # a crop may have no pixel with a class

        def of(logits: Tensor) -> Tensor:
            logits = logits.to(torch.float32)
            return (
                F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
                / counted
            )

        return of(prediction(outputs)) + AUXILIARY_WEIGHT * sum(map(of, _auxiliary(outputs)))

    def tally(self, outputs: Any, targets: Tensor) -> list[float]:
        """Images, summed cross-entropy, and of each class pixels that are right, that have it, that were given it."""
        logits = prediction(outputs).to(torch.float32)
        classes = logits.shape[1]
        summed = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        labelled = targets != IGNORED
        pairs = targets[labelled] * classes + logits.argmax(dim=1)[labelled]
        counts = torch.bincount(pairs, minlength=classes**2).view(classes, classes)  # (class of mask, class given)
        sums = torch.cat([counts.diagonal(), counts.sum(1), counts.sum(0)])
        return [len(targets), summed.item(), *sums.tolist()]

    def evaluation(self, totals: Sequence[float]) -> Evaluation:
        """The mean intersection over union is that of the classes that occur in masks or predictions."""
        samples, loss, *counts = totals
        right, labelled, given = torch.tensor(counts, dtype=torch.float64).view(3, -1)
        pixels = labelled.sum()  # of none, all figures are NaN
        union = labelled + given - right
        mean_iou = (right / union)[union > 0].mean().item()
        return Evaluation(
            top1=100 * (right.sum() / pixels).item(),
            top5=None,
            loss=(loss / pixels).item(),
            samples=round(samples),
            metric=self.metric,
            others={"mean IoU": 100 * mean_iou},
        )


CLASSIFICATION: Final = Classification()

TASKS: Final[Mapping[str, Task]] = {"classification": CLASSIFICATION, "segmentation": Segmentation()}


def task_named(name: str, *, trust: Collection[str] = ()) -> Task:
    """The task that a recipe or a data source names.

    Args:
        trust: modules that `package.module:object` may import, see `compress.models.find`. The object is a `Task`, or
            a class or function that gives one when it is called without arguments.

    Raises:
        InputError: there is no such task, its module is not trusted, or the object is none.
    """
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(TASKS)} or package.module:object."
        raise InputError(f"There is no task {name!r}: {hint}")
    from compress.models import find  # brings torchvision, which a process that only reads scores need not hold

    found = find(name, trust=trust)
    if not isinstance(found, Task) and callable(found):
        try:
            found = found()
        except TypeError as error:
            raise InputError(f"The task {name} could not be made ({error}): give every parameter a default.") from error
    if not isinstance(found, Task):
        raise InputError(f"The task {name} is a {type(found).__name__}: derive its class from compress.tasks.Task.")
    return found


def prediction(outputs: Any) -> Tensor:
    """The scores (N, K, …) among what a network returns: the tensor itself, or "out" of a dictionary.

    They are what an exported file gives, what a teacher teaches and what the classes are read from.

    Raises:
        InputError: the network returns something else.
    """
    if isinstance(outputs, Mapping) and isinstance(outputs.get("out"), Tensor):
        return outputs["out"]
    if isinstance(outputs, Tensor):
        return outputs
    keys = f" with {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
    raise InputError(
        f"The model returned a {type(outputs).__name__}{keys} and no tensor of scores: return the tensor, or a "
        'dictionary with the scores under "out".'
    )


def _auxiliary(outputs: Any) -> list[Tensor]:
    """The tensors beside "out"."""
    return [value for key, value in outputs.items() if key != "out"] if isinstance(outputs, Mapping) else []
