import math

import pytest
import torch

from compress.training.distillation import Distillation, distillation_loss, training_loss

LABEL = torch.tensor([0])


def test_distillation_loss_by_hand():
    # At T = 2 the teacher gives (3/4, 1/4), the student (1/2, 1/2):
    # KL = 3/4 ln(3/2) + 1/4 ln(1/2), times T^2 = 4.
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    student = torch.tensor([[1.0, 1.0]])
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected, abs=1e-6)


def test_distillation_loss_is_a_mean_over_the_batch_and_zero_for_equals():
    logits = torch.tensor([[3.0, -1.0, 0.5]])
    other = torch.tensor([[0.0, 2.0, 0.0]])
    alone = distillation_loss(logits, other, 3.0).item()
    both = distillation_loss(torch.cat([logits, other]), torch.cat([other, other]), 3.0).item()
    assert both == pytest.approx(alone / 2, rel=1e-5)
    assert distillation_loss(logits, logits + 5, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_labels_and_teacher_are_mixed_by_weight():
    student, teacher = torch.tensor([[1.0, 1.0]]), torch.tensor([[2 * math.log(3), 0.0]])
    mixed = training_loss(
        student, LABEL, distillation=Distillation(weight=0.25, temperature=2.0), teacher_logits=teacher
    )
    taught = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert mixed.item() == pytest.approx(0.75 * math.log(2) + 0.25 * taught, abs=1e-6)


def test_label_smoothing_by_hand():
    # Probabilities (3/4, 1/4); smoothing 0.2 over two classes makes the target (0.9, 0.1).
    logits = torch.tensor([[math.log(3), 0.0]])
    expected = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))
    assert training_loss(logits, LABEL, label_smoothing=0.2).item() == pytest.approx(expected, abs=1e-6)


def test_half_precision_logits_give_a_full_precision_loss():
    assert training_loss(torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16), LABEL).dtype == torch.float32
