"""How good a classifier is: top-1, top-5 and mean loss over a set of labelled images."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from compress.errors import InputError, WorkError
from compress.modes import evaluation_mode
from compress.progress import Bar, progress_bar
from compress.training.placement import opened_accelerator, placed, sharded


@dataclass(frozen=True)
class Evaluation:
    """Result over `samples` images.

    top1, top5: percent of the images whose label is the first, or among the first five, by score; with five
    classes or fewer top5 is 100 by definition. loss: mean cross-entropy per image in nats, without label
    smoothing.
    """

    top1: float
    top5: float
    loss: float
    samples: int


def evaluate(model: nn.Module, loader: DataLoader, *, description: str = "evaluation") -> Evaluation:
    """Evaluate `model` in evaluation mode and float32 over all of `loader`; mode and device are restored.

    Raises:
        InputError: the loader is empty.
        WorkError: the loss is not finite.
    """
    with opened_accelerator() as accelerator, placed(model, accelerator.device):
        visible = accelerator.is_main_process
        with progress_bar(description, len(loader), visible=visible) as bar:
            return evaluate_on(accelerator, model, loader, bar)


@torch.no_grad()
def evaluate_on(accelerator: Accelerator, model: nn.Module, loader: DataLoader, bar: Bar | None = None) -> Evaluation:
    """`evaluate` inside a piece of work that has its accelerator, and the model on its device, already."""
    totals = [0.0, 0.0, 0.0, 0.0]  # top-1 hits, top-5 hits, summed loss, samples
    with evaluation_mode(model):
        for images, labels in sharded(loader, accelerator, seed=None):
            labels = labels.to(accelerator.device, non_blocking=True)
            logits = model(images.to(accelerator.device, non_blocking=True))
            for index, value in enumerate((*_hits(logits, labels), _summed_loss(logits, labels), len(labels))):
                totals[index] += value
            if bar is not None:
                bar.advance(f"top-1 {100 * totals[0] / totals[3]:.2f} %")
    if accelerator.num_processes > 1:
        totals = accelerator.reduce(torch.tensor(totals, device=accelerator.device), "sum").tolist()
    top1, top5, loss, samples = totals
    if samples == 0:
        raise InputError("The evaluation data are empty: give data.source at least one test image.")
    if not math.isfinite(loss):
        raise WorkError(
            f"The loss over the evaluation data is {loss}: the weights or the images hold values that are not finite."
        )
    return Evaluation(100 * top1 / samples, 100 * top5 / samples, loss / samples, round(samples))


def _hits(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Number of images whose label is first, and among the first five; (N, classes), (N,) -> two counts."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return ranked[:, 0].sum().item(), ranked.any(dim=1).sum().item()


def _summed_loss(logits: Tensor, labels: Tensor) -> float:
    return F.cross_entropy(logits.to(torch.float32), labels, reduction="sum").item()
