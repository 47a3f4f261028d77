import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress.errors import InputError, WorkError
from compress.training.evaluation import evaluate


def loader_of(logits, labels, batch_size=2):
    return DataLoader(TensorDataset(torch.tensor(logits), torch.tensor(labels)), batch_size=batch_size)


def test_top1_top5_and_loss_by_hand():
    scores = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    # The labels stand at ranks 1, 5 and 6.
    result = evaluate(nn.Identity(), loader_of([scores] * 3, [0, 4, 5]))
    assert result.top1 == pytest.approx(100 / 3)
    assert result.top5 == pytest.approx(200 / 3)
    log_sum = math.log(sum(math.exp(score) for score in scores))
    assert result.loss == pytest.approx(log_sum - (6 + 2 + 1) / 3, rel=1e-6)
    assert result.samples == 3


def test_three_classes_have_a_top5_of_a_hundred():
    result = evaluate(nn.Identity(), loader_of([[1.0, 2.0, 3.0]] * 2, [0, 2]))
    assert (result.top1, result.top5) == (50.0, 100.0)


def test_modes_are_restored_and_statistics_untouched():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()
    evaluate(model, loader_of([[1.0, 2.0, 3.0]] * 2, [0, 2]))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert model[0].num_batches_tracked == 0


def test_nothing_to_evaluate_on():
    with pytest.raises(InputError, match="empty"):
        evaluate(nn.Identity(), DataLoader(TensorDataset(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))))


def test_outputs_that_are_not_finite():
    with pytest.raises(WorkError, match="not finite"):
        evaluate(nn.Identity(), loader_of([[float("nan"), 0.0]], [0]))


def test_an_accelerator_of_the_caller_survives():
    mine = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    evaluate(nn.Identity(), loader_of([[1.0, 2.0]], [1]))
    assert mine.mixed_precision == "bf16"
    assert mine.gradient_accumulation_steps == 4
