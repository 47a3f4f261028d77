"""How good a network is over a set of labelled images, as its task counts."""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader

from compress.errors import InputError, WorkError
from compress.modes import evaluation_mode
from compress.progress import Bar, progress_bar
from compress.tasks import CLASSIFICATION, Evaluation, Task
from compress.training.placement import moved, opened_accelerator, placed, sharded

__all__ = ["Evaluation", "evaluate", "evaluate_on"]


def evaluate(
    model: nn.Module, loader: DataLoader, *, task: Task = CLASSIFICATION, description: str = "evaluation"
) -> Evaluation:
    """Evaluate `model` in evaluation mode and float32 over all of `loader`; mode and device are restored.

    Raises:
        InputError: the loader is empty.
        WorkError: the loss is not finite.
    """
    with opened_accelerator() as accelerator, placed(model, accelerator.device):
        visible = accelerator.is_main_process
        with progress_bar(description, len(loader), visible=visible) as bar:
            return evaluate_on(accelerator, model, loader, bar, task=task)


@torch.no_grad()
def evaluate_on(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader,
    bar: Bar | None = None,
    *,
    task: Task = CLASSIFICATION,
) -> Evaluation:
    """`evaluate` inside a piece of work that has its accelerator, and the model on its device, already."""
    totals: Sequence[float] = ()
    with evaluation_mode(model):
        for images, targets in sharded(loader, accelerator, seed=None):
            targets = moved(targets, accelerator.device)
            outputs = model(moved(images, accelerator.device))
            totals = _added([totals, task.tally(outputs, targets)])
            if bar is not None:
                bar.advance(f"{task.metric} {task.evaluation(totals).top1:.2f} %")
    if accelerator.num_processes > 1:
        totals = _added(gather_object([totals]))
    if not totals or totals[0] == 0:
        raise InputError("The evaluation data are empty: give data.source at least one test image.")
    found = task.evaluation(totals)
    if found.loss is not None and not math.isfinite(found.loss):
        raise WorkError(
            f"The loss over the evaluation data is {found.loss}: the weights or the images hold values that are not "
            "finite."
        )
    return found


def _added(tallies: Sequence[Sequence[float]]) -> Sequence[float]:
    """Term by term; one without terms is that of a process, or a beginning, without a minibatch."""
    given = [tally for tally in tallies if len(tally)]
    return [sum(terms) for terms in zip(*given, strict=True)]
