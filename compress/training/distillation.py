"""The loss a network is trained with: that of its task, and what it learns from a dense teacher."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.tasks import CLASSIFICATION, Task, prediction


class Distillation(BaseModel):
    """How much the student follows its teacher (Hinton et al. 2015, arXiv 1503.02531, section 2)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(0.5, gt=0, le=1, description="share of the teacher in the loss; labels have the rest")
    temperature: float = Field(
        4.0, gt=0, allow_inf_nan=False, description="divides the logits of both networks before the softmax"
    )


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), in nats, averaged over the batch, and over pixels.

    The factor T² keeps the gradients of the same size at every temperature (Hinton et al. 2015, section 2).

    Args:
        student: logits (N, classes) or (N, classes, H, W); gradients flow through these alone.
        teacher: logits of the same shape.
    """
    if student.dim() > 2:
        student, teacher = (logits.movedim(1, -1).flatten(0, -2) for logits in (student, teacher))
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence


def training_loss(
    outputs: Any,
    labels: Any,
    *,
    task: Task = CLASSIFICATION,
    label_smoothing: float = 0.0,
    distillation: Distillation | None = None,
    teacher_logits: Tensor | None = None,
) -> Tensor:
    """(1 - weight) · the task's loss + weight · distillation loss; the task's loss alone without a teacher.

    Args:
        outputs: what the network returns in training mode, such as logits (N, classes).
        labels: the task's targets, such as class indices, int64 (N,).
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, section 7).
        teacher_logits: the teacher's prediction (`compress.tasks.prediction`).
    """
    loss = task.loss(outputs, labels, label_smoothing=label_smoothing)
    if distillation is None or teacher_logits is None:
        return loss
    logits = prediction(outputs).to(torch.float32)
    taught = distillation_loss(logits, teacher_logits.to(torch.float32), distillation.temperature)
    return (1 - distillation.weight) * loss + distillation.weight * taught
